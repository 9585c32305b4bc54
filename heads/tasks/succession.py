"""Ordered lists: "Monday, Tuesday, Wednesday, Thursday," -> " Friday".

The lists of Gould et al. (2023, arXiv 2312.09230), as prompts and as tokens for scores from weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mode

import numpy as np
import torch

from heads.names import count, known
from heads.tasks.base import Item, Task, build, fill, pieces, single, spaced

LISTS = {
    "numbers": tuple(str(i) for i in range(201)),
    "number words": tuple(
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split()
    ),
    "ordinals": tuple("first second third fourth fifth sixth seventh eighth ninth tenth".split()),
    "days": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    "day prefixes": tuple("Mon Tue Wed Thu Fri Sat Sun".split()),
    "months": tuple("January February March April May June July August September October November December".split()),
    "month prefixes": tuple("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
CYCLIC = ("days", "day prefixes", "months", "month prefixes")
# Space before, and case: as in LISTS, or with the first letter's case flipped.
FORMS = {"space": (" ", False), "bare": ("", False), "space, case flipped": (" ", True), "bare, case flipped": ("", True)}
CORRUPTIONS = ("window", "shuffled")
# name -> (ids [item], pairs [pair, 2]); or what `succession_lists` returns
Lists = Mapping[str, tuple[torch.Tensor, torch.Tensor]] | Sequence


@dataclass(frozen=True)
class TokenList:
    """The one-token items of a list in one surface form.

    Attributes:
        name, form: keys of `LISTS` and `FORMS`.
        texts: the items with their leading space, in order; `ids`: `[item]`, their tokens.
        index: `[item]`, the place of each in the whole list, from 0.
        pairs: `[pair, 2]`, positions among the items here of an item and its successor.
    """

    name: str
    form: str
    texts: tuple[str, ...]
    ids: torch.Tensor
    index: torch.Tensor
    pairs: torch.Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"TokenList({self.name!r}, {self.form!r}, {len(self)} items, {len(self.pairs)} pairs)"


def succession_lists(model, which: str | Iterable[str] | None = None, least: int = 4) -> list[TokenList]:
    """Every list in every surface form, with the items that are one token.

    Args:
        which: a key of `LISTS` or several; None for all.
        least: leave out what has fewer pairs than this.

    Raises:
        LookupError: for an unknown list.
    """
    found = []
    for name in _names(LISTS if which is None else which):
        forms: dict[tuple[str, ...], str] = {}
        for form, (space, flipped) in FORMS.items():  # digits have no case to flip
            items = [item[0].swapcase() + item[1:] if flipped else item for item in LISTS[name]]
            forms.setdefault(tuple(space + item for item in items), form)
        made = [_token_list(model, name, form, texts) for texts, form in forms.items()]
        found += [one for one in made if len(one.pairs) >= max(least, 1)]
    return found


def _token_list(model, name: str, form: str, texts: tuple[str, ...]) -> TokenList:
    kept = set(single(model, texts, lead="")[0])
    index = [i for i, text in enumerate(texts) if text in kept]
    after = {i: (i + 1) % len(texts) if name in CYCLIC else i + 1 for i in index}
    pairs = [(k, index.index(after[i])) for k, i in enumerate(index) if after[i] in after]
    ids = [pieces(model.tokenizer, "\n", texts[i])[0] for i in index]
    return TokenList(name, form, tuple(texts[i] for i in index), torch.tensor(ids), torch.tensor(index),
                     torch.tensor(pairs).reshape(-1, 2))  # fmt: skip


def _names(which) -> list[str]:
    return [known("list", name, LISTS) for name in ([which] if isinstance(which, str) else which)]


def relabelled(lists: Lists, kind: str, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same tokens with another map, for controls.

    Args:
        kind: "predecessor": pairs turned round. "copy": every token that has a successor to itself. "permutation": the
            successor map of a randomly shuffled list (one draw of `seed`; draw many for a null distribution).

    Raises:
        LookupError: for an unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = {
        "predecessor": lambda ids, pairs: pairs.flip(1),
        "copy": lambda ids, pairs: pairs[:, :1].expand(-1, 2),
        "permutation": lambda ids, pairs: torch.randperm(len(ids), generator=generator)[pairs],
    }
    turned = maps[known("map of a list", kind, maps)]
    return {name: (ids, turned(ids, torch.as_tensor(pairs))) for name, (ids, pairs) in _by_name(lists).items()}


def _by_name(lists: Lists) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    return lists if isinstance(lists, Mapping) else {f"{x.name}, {x.form}": (x.ids, x.pairs) for x in lists}


def checked(lists: Lists, with_input: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Lists as tensors, the empty ones left out.

    Raises:
        ValueError: naming the list that cannot be scored and why, or if none is left.
    """
    found = {}
    for name, (ids, pairs) in _by_name(lists).items():
        ids, pairs = torch.as_tensor(ids), torch.as_tensor(pairs, dtype=torch.long)
        if not len(pairs):
            continue
        if ids.dim() != 1 or pairs.dim() != 2 or pairs.shape[1] != 2:
            got = f"{tuple(ids.shape)} and {tuple(pairs.shape)}"
            raise ValueError(f"list {name!r}: expected ids [item] and pairs [pair, 2], got {got}")
        if pairs.min() < 0 or pairs.max() >= len(ids):
            raise ValueError(f"list {name!r}: pairs point to item {int(pairs.max())}, but it has items 0 to {len(ids) - 1}")
        if len(ids.unique()) < len(ids):
            raise ValueError(f"list {name!r} holds a token twice: its items cannot be told apart")
        if not with_input and (pairs[:, 0] == pairs[:, 1]).any():
            raise ValueError(f"list {name!r} maps a token to itself: with_input=False would make that impossible to score")
        found[name] = (ids, pairs)
    if not found:
        raise ValueError("no list has a pair of items: nothing to score with this tokenizer")
    return found


def succession(model, which: str | Iterable[str] = "days", n: int | None = None, seed: int = 0, length: int = 4,
               corruption: str = "window") -> Task:  # fmt: skip
    """`length` items of a list in order, separated by commas; the answer is the next one.

    Foils are the other items of the list (in a task of several lists, as many as the shortest allows, those
    nearest to the answer first), so that accuracy among options is accuracy within the list. Where the tokenizer
    makes a space before a digit its own token, prompts end with it. Roles: "element 1", "element 2", ..., "last" (the
    last element), "END".

    Args:
        which: a key of `LISTS` or several. Prompts of a task are equally long, so digits may not mix with words.
        n: prompts, drawn by `seed`; None for every window there is.
        corruption: "window" is another stretch of the same list with another successor; "shuffled" has other items of the
            list before the same last element, and nothing in it follows its predecessor.

    Raises:
        LookupError: for an unknown list or corruption.
        ValueError: if no window can be used, or there are fewer than `n`.
    """
    known("corruption of succession", corruption, CORRUPTIONS)
    names, rng, dropped, windows = _names(which), np.random.default_rng(seed), [], []
    listed = ", ".join(names) or "a list"
    if not 2 <= length < min((len(LISTS[name]) for name in names), default=0):
        raise ValueError(f"succession: length={length}: at least 2, and fewer than the items of {listed}")
    title = f"succession, {' and '.join(names)}"
    for name in names:
        found, left = _windows(model, name, length)
        windows, dropped = windows + found, dropped + left
    if not windows:
        raise ValueError(f"{title}: no {length + 1} neighbours are one token each with this tokenizer")
    lengths = [len(ids) for ids in model.tokenizer([w.prompt for w in windows]).input_ids]
    size = mode(lengths)
    dropped += [(w.prompt, f"{k} tokens, most have {size}") for w, k in zip(windows, lengths) if k != size]
    windows = [w for w, k in zip(windows, lengths) if k == size]
    count(title, n, len(windows))
    width, items = min(len(w.items) for w in windows), []
    for i in rng.permutation(len(windows))[:n]:
        w = windows[i]
        twin = _other(rng, w, windows) if corruption == "window" else _shuffled(model, rng, w, size)
        if twin is None:
            dropped.append((w.prompt, f"no twin of corruption {corruption!r}"))
        else:
            (prompt, roles), (answer, *foils) = w.text(w.elements), w.options[:width]
            items.append(Item(prompt, answer, tuple(foils), twin, roles))
    return build(model, title, items, dropped)


@dataclass(frozen=True)
class _Window:
    """A stretch of a list: its elements, the successor, and the one-token items of the list by place."""

    name: str
    elements: tuple[int, ...]
    answer: int
    items: dict[int, str]
    gap: str

    def text(self, elements: Iterable[int]) -> tuple[str, dict[str, tuple[int, int]]]:
        """Some items as a prompt, and its roles."""
        parts = {f"element {k}": self.items[i] for k, i in enumerate(elements, start=1)}
        parts["last"] = parts.pop(f"element {len(parts)}")
        return fill(", ".join(f"{{{role}}}" for role in parts) + "," + self.gap, **parts)

    @property
    def prompt(self) -> str:
        return self.text(self.elements)[0]

    @property
    def options(self) -> list[str]:
        """The items of the list as they continue the prompt: the answer, then those nearest to it."""
        near = sorted(self.items, key=lambda i: (abs(i - self.answer), i))
        return [self.items[i] if self.gap else f" {self.items[i]}" for i in near]


def _windows(model, name: str, length: int) -> tuple[list[_Window], list[tuple[str, str]]]:
    whole = LISTS[name]
    kept, gap, dropped = spaced(model, whole, ",")
    items = {i: text for i, text in enumerate(whole) if text in kept}
    starts = range(len(whole) if name in CYCLIC else len(whole) - length)
    runs = [[(start + k) % len(whole) for k in range(length + 1)] for start in starts]
    return [_Window(name, tuple(run[:-1]), run[-1], items, gap) for run in runs if items.keys() >= set(run)], dropped


def _other(rng, window: _Window, windows: list[_Window]) -> str | None:
    others = [w for w in windows if w.name == window.name and w.answer != window.answer]
    return others[rng.integers(len(others))].prompt if others else None


def _shuffled(model, rng, window: _Window, tokens: int) -> str | None:
    """Random items before the same last element; nothing follows its predecessor, and the answer is not there."""
    *before, last = window.elements
    size = len(LISTS[window.name])
    left = [i for i in window.items if i not in (last, window.answer)]
    for _ in range(200 if len(left) >= len(before) else 0):
        order = [*rng.choice(left, len(before), replace=False).tolist(), last]
        in_order = any((a + 1) % size == b for a, b in zip(order, order[1:]))
        text, _ = window.text(order)
        if not in_order and len(model.tokenizer(text).input_ids) == tokens:
            return text
    return None
