"""Places: where an edit acts, in one language for ablation, steering and forced attention.

Everything is counted from the length of the prompt, in real tokens: padding on either side has no number. So a run with
or without a cache, with a static one, or read in chunks is edited at the same tokens.

The prompt is what `generate` is given. In a trace it is all there is, what a cache holds included, unless `prompt` says
where it ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from heads.names import known

PHASES = ("both", "prefill", "decode")


class Here(NamedTuple):
    """What of the pass that is running is edited.

    `at`: booleans `[row or 1, position]`. `number`: each position's number among the real tokens of its row, from 0, cached
    ones included, -1 for padding; alike. `prompt`: columns of the prompt, padding included.
    """

    at: torch.Tensor
    number: torch.Tensor
    prompt: int


@dataclass(frozen=True)
class Places:
    """Where an edit acts.

    Args:
        phase: "prefill": prompt tokens but the last. "decode": the last prompt token, which decides the first answer
            token, and what is generated. "both".
        positions: which tokens: their numbers from 0, or from the end of the prompt (-1 is its last); booleans
            `[row or 1, column]` of the prompt; None for all.
        decode: which generated tokens: True, False, or their numbers, the first one being 1; None: those that
            `positions` names.
        prompt: columns of the prompt, where a trace also holds what follows it (teacher forcing).

    Raises:
        LookupError: an unknown phase. TypeError: positions that are no whole numbers.
    """

    phase: str = "both"
    positions: tuple[int, ...] | torch.Tensor | None = None
    decode: bool | tuple[int, ...] | None = None
    prompt: int | None = None

    def __post_init__(self):
        known("phase", self.phase, PHASES)
        if self.positions is not None and not isinstance(self.positions, torch.Tensor):
            object.__setattr__(self, "positions", whole(self.positions, "a position"))
        if not isinstance(self.decode, (bool, type(None))):
            object.__setattr__(self, "decode", whole(self.decode, "the number of a generated token"))

    def now(self, model) -> Here:
        """Of the pass that is running. Call inside a trace, once per forward: it always reads the model's inputs, since
        a step of `tracer.iter` that asks for nothing never ends."""
        inputs = named_inputs(*model.inputs)
        return self.of(inputs, **model._module.__dict__.get("_run", {}))

    def of(self, inputs: dict, given: dict | None = None, generates: bool = False) -> Here:
        """Of a forward that is called with `inputs` in a run that was `given` something else.

        Raises:
            IndexError: a position that no row has. ValueError: padding that cannot be told; booleans of another shape.
        """
        past = inputs.get("past_key_values")
        start = 0 if past is None else int(past.get_seq_length())
        rows, length = _shape(inputs)
        prompt = self.prompt or (_shape(given)[1] if generates else start + length)
        mask = _mask(inputs, given or {}, rows, max(start + length, prompt))  # of the whole prompt, if it is read in parts
        number, real = (mask.cumsum(-1) * mask - 1)[:, start : start + length], mask[:, :prompt].sum(-1, keepdim=True)
        from_end = number - real  # -1 at the last token of the prompt, 0 at the first generated one
        named = self._in_prompt(number, from_end, start, (rows, prompt))
        if not (generates or start or named.any() or not len(self.positions)):
            raise IndexError(f"positions {list(self.positions)}: the longest row has {int(real.max())} tokens")
        phase = {"both": True, "prefill": from_end < -1, "decode": from_end >= -1}[self.phase]
        return Here((number >= 0) & phase & torch.where(from_end < 0, named, self._generated(number, from_end)), number, prompt)

    def _in_prompt(self, number: torch.Tensor, from_end: torch.Tensor, start: int, shape: tuple[int, int]) -> torch.Tensor:
        """Which tokens of a pass that begins at column `start` are named, were they all of the prompt."""
        if self.positions is None:
            return torch.ones_like(number, dtype=torch.bool)
        if isinstance(self.positions, tuple):
            wanted = torch.tensor(self.positions, dtype=torch.long)
            return torch.isin(number, wanted[wanted >= 0]) | torch.isin(from_end, wanted[wanted < 0])
        if self.positions.shape not in (shape, (1, shape[1])):
            (n, length), (rows, prompt) = self.positions.shape, shape
            raise ValueError(
                f"positions [row, position] are for {n} rows of {length} tokens, but this batch has {rows} of {prompt}: "
                "run what they were made for as one batch, or make them for each batch"
            )
        part = self.positions.bool().cpu()[:, start:]
        return pad(part, (0, max(0, number.shape[1] - part.shape[1])))[:, : number.shape[1]]

    def _generated(self, number: torch.Tensor, from_end: torch.Tensor) -> torch.Tensor:
        """Which tokens of a pass are named, were they all generated."""
        if isinstance(self.decode, tuple):
            return torch.isin(from_end + 1, torch.tensor(self.decode, dtype=torch.long))
        if self.decode is None and isinstance(self.positions, tuple):
            return torch.isin(number, torch.tensor([p for p in self.positions if p >= 0], dtype=torch.long))
        return torch.full_like(number, self.decode if self.decode is not None else self.positions is None, dtype=torch.bool)


def whole(values: Iterable, what: str) -> tuple[int, ...]:
    """Whole numbers as a tuple. TypeError names what is none: a float is not cut, a boolean is no 0 or 1."""
    values = tuple(values.tolist() if isinstance(values, torch.Tensor) else values)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{what} is a whole number, not {value!r}")
    return tuple(map(index, values))


def named_inputs(args: tuple, kwargs: dict) -> dict:
    """What a model is called with, by name."""
    return {**({"input_ids": args[0]} if args else {}), **kwargs}


def _shape(inputs: dict) -> tuple[int, int]:
    """Rows and columns of what a model is given."""
    ids = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
    return tuple(ids.shape[:2])


def _mask(inputs: dict, given: dict, rows: int, columns: int) -> torch.Tensor:
    """1 for real tokens, 0 for padding, `[row or 1, column]` on the CPU, of so many columns."""
    masks = [mask for mask in (inputs.get("attention_mask"), given.get("attention_mask")) if mask is not None]
    # that of a static cache is [row, 1, query, key] and holds causality, too: then what the run was given tells
    flat = [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.dim() == 2]
    if masks and not flat and "input_ids" not in given:
        raise ValueError("the attention mask is not [row, position]: which tokens are padding cannot be told from it")
    longest = max(flat, key=lambda mask: mask.shape[1], default=torch.ones(1, columns))
    mask = longest[:, :columns].cpu().long()
    mask = pad(mask, (0, columns - mask.shape[1]), value=1)  # what is generated is real
    return mask.repeat_interleave(rows // len(mask), 0) if 1 < len(mask) < rows else mask  # beams of one prompt


def head_mask(model, sets: list[Iterable]) -> torch.Tensor:
    """Sets of heads as `[set, layer, head]` booleans; checks that every head exists."""
    anatomy = model.anatomy
    mask = torch.zeros(len(sets), anatomy.n_layers, anatomy.n_heads, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        for layer, head in anatomy.check(chosen):
            mask[row, layer, head] = True
    return mask


def is_head(x: object) -> bool:
    """Whether this is a (layer, head) pair and not a set of them."""
    try:
        return len([index(i) for i in x]) == 2
    except TypeError:
        return not isinstance(x, list)  # not a set of heads either: `check` names it
