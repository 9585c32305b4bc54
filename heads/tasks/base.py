"""Task: prompts of one length, each with an answer, foils, a corrupted twin and the positions of its roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch


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
            raise ValueError(f"{self.name}: ids are [prompt, position] with at least one prompt, got {tuple(self.ids.shape)}")
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
        return f"Task({self.name!r}, {len(self)} prompts of {self.ids.shape[1]} tokens, {self.foils.shape[1]} foils{dropped})"

    def __getitem__(self, chosen) -> Task:
        """Some of the prompts, by slice, list of indices or boolean mask: a Task again."""
        if isinstance(chosen, int):
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
        return (self[i : i + size] for i in range(0, len(self), size))

    def halves(self, seed: int = 0) -> tuple[Task, Task]:
        """Two disjoint random halves, for split-half ceilings and held-out knock-outs."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self[order[: len(self) // 2]], self[order[len(self) // 2 :]]

    def swapped(self) -> Task:
        """The corrupted prompts as the base and the clean ones as their twins; answers stay: denoising."""
        return replace(self, name=f"{self.name}, denoised", ids=self.corrupted, corrupted=self.ids, prompts=())

    def at(self, positions) -> torch.Tensor:
        """Where something happens, `[prompt, position]` booleans.

        Args:
            positions: "all", a role's name, or a list of roles.

        Raises:
            LookupError: for an unknown role; the message lists the known ones.
        """
        if isinstance(positions, str) and positions == "all":
            return torch.ones_like(self.ids, dtype=torch.bool)
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        for role in [positions] if isinstance(positions, str) else positions:
            if role not in self.roles:
                raise LookupError(f"{self.name} has no role {role!r}: choose from {', '.join(self.roles)}, or 'all'")
            mask[torch.arange(len(self)), self.roles[role]] = True
        return mask


def build(model, name: str, items: Iterable[Item], n: int | None = None) -> Task:
    """A Task from texts, for the tokenizer at hand.

    Items are dropped, with the reason kept in `Task.dropped`, if the answer or a foil is not one token after the
    prompt, if prompt and twin differ in length, or if the prompt is not of the commonest length.

    Args:
        n: keep at most so many prompts.

    Raises:
        ValueError: if no item is left; the message gives the commonest reason.
    """
    good, dropped = [], []
    for item in items:
        try:
            good.append((item, _encode(model.tokenizer, item)))
        except ValueError as reason:
            dropped.append((item.prompt, str(reason)))
    length = Counter(len(encoded[0]) for _, encoded in good).most_common(1)[0][0] if good else 0
    kept = [(item, encoded) for item, encoded in good if len(encoded[0]) == length]
    dropped += [(i.prompt, f"{len(e[0])} tokens, most have {length}") for i, e in good if len(e[0]) != length]
    if not kept:
        reason = Counter(reason for _, reason in dropped).most_common(1)[0][0] if dropped else "there were none"
        raise ValueError(f"{name}: no item can be used with this tokenizer: {reason}")
    kept = kept[:n]
    ids, corrupted, answers, foils = (torch.tensor([encoded[k] for _, encoded in kept]) for k in range(4))
    roles = {role: torch.tensor([encoded[4][role] for _, encoded in kept]) for role in kept[0][0].roles}
    return Task(name, ids, answers, foils, corrupted, roles, tuple(item.prompt for item, _ in kept), tuple(dropped))


def _encode(tokenizer, item: Item):
    """(ids, corrupted ids, answer, foils, roles) of one item; ValueError says why it cannot be used."""
    found = tokenizer(item.prompt, return_offsets_mapping=True)
    ids, offsets = found.input_ids, found.offset_mapping
    twin = tokenizer(item.corrupted).input_ids
    if len(twin) != len(ids):
        raise ValueError(f"{len(ids)} tokens, but its corrupted twin has {len(twin)}")
    answer = one_token(tokenizer, item.prompt, item.answer, ids)
    foils = [one_token(tokenizer, item.prompt, foil, ids) for foil in item.foils]
    roles = {}
    for role, (start, end) in item.roles.items():
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not inside:
            raise ValueError(f"role {role} covers no token")
        roles[role] = inside[-1]
    return ids, twin, answer, foils, roles


def one_token(tokenizer, prompt: str, continuation: str, ids: list[int] | None = None) -> int:
    """The single token that a continuation is after this prompt; ValueError if it is not one."""
    ids = tokenizer(prompt).input_ids if ids is None else ids
    whole = tokenizer(prompt + continuation).input_ids
    if whole[: len(ids)] != ids or len(whole) != len(ids) + 1:
        raise ValueError(f"{continuation!r} is not one token after its prompt")
    return whole[-1]
