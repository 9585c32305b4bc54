"""Task: prompts of one length, each with an answer, foils, a corrupted twin and the positions of its roles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from statistics import mode
from string import Formatter

import torch

from heads.names import at_least, count, known

DIRECTIONS = ("noising", "denoising")  # what patching writes: corrupted into clean, or clean into corrupted


@dataclass(frozen=True)
class Item:
    """One prompt as text, before a tokenizer has seen it.

    Args:
        prompt, corrupted: texts; the corrupted twin asks for something else, in as many tokens.
        answer: what continues the prompt, with its leading space if it has one.
        foils: wrong continuations; the logit difference is answer minus mean foil.
        roles: name -> (start, end) characters in the prompt; the role's position is that of its last token.
    """

    prompt: str
    answer: str
    foils: tuple[str, ...]
    corrupted: str
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Prompts of equal length, ready for the verbs.

    Attributes:
        ids, corrupted: `[prompt, position]` token ids.
        answers: `[prompt]`, and `foils`: `[prompt, foil]`, single tokens.
        roles: name -> `[prompt]` positions. "END", the last position, is always there.
        prompts: the texts.
        dropped: (prompt, reason) of items that this tokenizer cannot use.

    Raises:
        ValueError: naming what is wrong: lengths, an answer among its foils, a twin that does not differ.
    """

    name: str
    ids: torch.Tensor
    answers: torch.Tensor
    foils: torch.Tensor
    corrupted: torch.Tensor
    roles: dict[str, torch.Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        n, length = self.ids.shape if self.ids.dim() == 2 else (0, 0)
        if not n:
            raise ValueError(
                f"{self.name}: ids are [prompt, position] with at least one prompt, got {tuple(self.ids.shape)}"
            )
        if self.corrupted.shape != self.ids.shape:
            raise ValueError(
                f"{self.name}: prompts are {tuple(self.ids.shape)} but their corrupted twins {tuple(self.corrupted.shape)}: "
                "a twin has as many tokens as its prompt, so that positions correspond"
            )
        if self.answers.shape != (n,) or self.foils.dim() != 2 or len(self.foils) != n or not self.foils.shape[1]:
            raise ValueError(
                f"{self.name}: expected {n} answers and [{n}, foil] foils of one token each, got "
                f"{tuple(self.answers.shape)} and {tuple(self.foils.shape)}"
            )
        self._refuse((self.foils == self.answers[:, None]).any(1), "has its answer among its foils")
        self._refuse((self.corrupted == self.ids).all(1), "does not differ from its corrupted twin")
        object.__setattr__(self, "roles", {**self.roles, "END": torch.full((n,), length - 1)})
        for role, at in self.roles.items():
            if at.shape != (n,) or (at < 0).any() or (at >= length).any():
                raise ValueError(f"{self.name}: role {role!r} needs one position below {length} for each of {n} prompts")

    def _refuse(self, bad: torch.Tensor, what: str) -> None:
        if bad.any():
            i = int(bad.nonzero()[0])
            shown = f" ({self.prompts[i]!r})" if self.prompts else ""
            raise ValueError(f"{self.name}: prompt {i}{shown} {what}; {int(bad.sum())} of {len(self)} such prompts")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        dropped = f", {len(self.dropped)} items dropped" if self.dropped else ""
        length, foils = self.ids.shape[1], self.foils.shape[1]
        return f"Task({self.name!r}, {len(self)} prompts of {length} tokens, {foils} foils{dropped})"

    def __getitem__(self, chosen: int | slice | list[int] | torch.Tensor) -> Task:
        """Some of the prompts, by slice, list of indices or boolean mask: a Task again."""
        if isinstance(chosen, Integral):
            chosen = [chosen]
        keep = torch.arange(len(self))[chosen]
        return replace(
            self,
            **{key: getattr(self, key)[keep] for key in ("ids", "answers", "foils", "corrupted")},
            roles={role: at[keep] for role, at in self.roles.items()},
            prompts=tuple(self.prompts[i] for i in keep.tolist()) if self.prompts else (),
        )

    def batches(self, size: int) -> Iterable[Task]:
        """The prompts, `size` at a time."""
        return (self[i : i + size] for i in range(0, len(self), at_least("batch", size)))

    def halves(self, seed: int = 0) -> tuple[Task, Task]:
        """Two disjoint random halves, for split-half ceilings and held-out knock-outs."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self[order[: len(self) // 2]], self[order[len(self) // 2 :]]

    def swapped(self) -> Task:
        """The corrupted prompts as the base and the clean ones as their twins; answers stay: denoising."""
        return replace(self, name=f"{self.name}, denoised", ids=self.corrupted, corrupted=self.ids, prompts=())

    def at(self, positions: str | Iterable[str]) -> torch.Tensor:
        """Where something happens, `[prompt, position]` booleans.

        Args:
            positions: "all", a role's name, or a list of roles.

        Raises:
            LookupError: for an unknown role; the message lists the known ones.
        """
        if isinstance(positions, str) and positions == "all":
            return torch.ones_like(self.ids, dtype=torch.bool)
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        roles = [positions] if isinstance(positions, str) else list(positions)
        if not roles:
            raise LookupError(f"no positions are chosen: give a role of {self.name} ({', '.join(self.roles)}), or 'all'")
        for role in roles:
            at = self.roles[known(f"role of {self.name}", role, [*self.roles, "all"])]
            mask[torch.arange(len(self)), at] = True
        return mask


def build(model, name: str, items: Iterable[Item], dropped: Iterable[tuple[str, str]] = ()) -> Task:
    """A Task from texts, for the tokenizer at hand.

    Items are dropped, with the reason kept in `Task.dropped`, if the answer or a foil is not one token after the
    prompt, if prompt and twin differ in length, or if the prompt is not of the commonest length.

    Args:
        dropped: (text, reason) of what was left out before, such as words of more than one token.

    Raises:
        ValueError: if no item is left; the message gives the commonest reason.
    """
    good, dropped = [], list(dropped)
    for item in items:
        try:
            good.append((item, _encode(model.tokenizer, item)))
        except ValueError as reason:
            dropped.append((item.prompt, str(reason)))
    length = mode(len(encoded[0]) for _, encoded in good) if good else 0
    kept = [(item, encoded) for item, encoded in good if len(encoded[0]) == length]
    dropped += [(i.prompt, f"{len(e[0])} tokens, most have {length}") for i, e in good if len(e[0]) != length]
    if not kept:
        reason = mode(reason for _, reason in dropped) if dropped else "there were none"
        raise ValueError(f"{name}: no item can be used with this tokenizer: {reason}")
    ids, corrupted, answers, foils = (torch.tensor([encoded[k] for _, encoded in kept]) for k in range(4))
    roles = {role: torch.tensor([encoded[4][role] for _, encoded in kept]) for role in kept[0][0].roles}
    return Task(name, ids, answers, foils, corrupted, roles, tuple(item.prompt for item, _ in kept), tuple(dropped))


def _encode(tokenizer, item: Item):
    """(ids, corrupted ids, answer, foils, roles) of one item; ValueError says why it cannot be used."""
    found = tokenizer(item.prompt, return_offsets_mapping=True)
    ids, offsets = found.input_ids, found.offset_mapping
    texts = [item.answer, *item.foils]
    twin, *longer = tokenizer([item.corrupted, *(item.prompt + text for text in texts)]).input_ids
    if len(twin) != len(ids):
        raise ValueError(f"{len(ids)} tokens, but its corrupted twin has {len(twin)}")
    for text, whole in zip(texts, longer):
        if whole[:-1] != ids:
            raise ValueError(f"{text!r} is not one token after its prompt")
    answer, *foils = [whole[-1] for whole in longer]
    roles = {}
    for role, (start, end) in item.roles.items():
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not inside:
            raise ValueError(f"role {role} covers no token")
        roles[role] = inside[-1]
    return ids, twin, answer, foils, roles


def single(model, words: Iterable[str], after: str = "\n", lead: str = " ") -> tuple[list[str], list[tuple[str, str]]]:
    """The words that are one token after a text and a `lead`, and (word, reason) for the others.

    A line break before them keeps apart what some tokenizers treat alike, the start of a text and a space.
    """
    kept, dropped = [], []
    for word in words:
        before, whole = model.tokenizer([after, after + lead + word]).input_ids
        if whole[:-1] == before:
            kept.append(word)
        else:
            dropped.append((word, f"{len(pieces(model.tokenizer, after, lead + word))} tokens"))
    return kept, dropped


def spaced(model, words: Sequence[str], after: str) -> tuple[list[str], str, list[tuple[str, str]]]:
    """`single` after a text and a space, with a gap before them: " " where the tokenizer makes a space before digits a
    token of its own, so that the prompt must end with it, else ""."""
    kept, dropped = single(model, words, after)
    if kept or not words[0].isdigit():
        return kept, "", dropped
    kept, dropped = single(model, words, f"{after} ", "")
    return kept, " ", dropped


def pieces(tokenizer, prompt: str, continuation: str) -> list[int]:
    """The tokens that a continuation adds to a prompt."""
    before, whole = tokenizer([prompt, prompt + continuation]).input_ids
    same = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(before))
    return whole[same:]


def distinct(name: str, n: int, make: Callable[[], Item]) -> list[Item]:
    """`n` items with different prompts from a random source.

    Raises:
        ValueError: if `n` is below 1, or so many different prompts do not come up.
    """
    count(name, n)
    found: dict[str, Item] = {}
    for _ in range(200 + 50 * n):
        item = make()
        found.setdefault(item.prompt, item)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"{name}: {n} different prompts asked for, but only {len(found)} were found: ask for fewer")


def fill(template: str, before: str = "", /, **parts: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """A template with its {parts} filled in, after another text, and where each part stands in characters."""
    text, spans = before, {}
    for between, key, _, _ in Formatter().parse(template):
        text += between
        if key is not None:
            spans[key] = (len(text), len(text) + len(parts[key]))
            text += parts[key]
    return text, spans
