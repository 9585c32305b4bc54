"""Places: where an edit acts, in one language for ablation and steering.

Everything is counted from the length of the prompt, in real tokens: padding on either side has no number. So a run with
or without a cache, with a static one, or read in chunks is edited at the same tokens.

The prompt is what `generate` is given. In a trace it is all there is, what a cache holds included, unless `prompt` says
where it ended, or the cache does: that of `heads.Prefix(model, ids, prompt=...)`. The prompt of a prefix ends behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from operator import index
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from heads.names import known, whole, wholes

PHASES = ("both", "prefill", "decode")
Positions = int | Iterable[int] | torch.Tensor | None


class Here(NamedTuple):
    """What of the pass that is running is edited.

    `at`: booleans `[row or 1, position]`. `number`: each position's number among the real tokens of its row, from 0, cached
    ones included, -1 for padding; alike. `prompts`: how many rows the run was given; beams and several sequences of one
    prompt are rows of the pass, one after the other.
    """

    at: torch.Tensor
    number: torch.Tensor
    prompts: int


@dataclass(frozen=True)
class Places:
    """Where an edit acts.

    Args:
        phase: "prefill": prompt tokens but the last. "decode": the last prompt token, which decides the first answer
            token, and what is generated. "both".
        positions: which tokens: their numbers from 0, or from the end of the prompt (-1 is its last); booleans
            `[column]` or `[row or 1, column]` of the prompt; None for all. An empty list, and booleans that are all
            false, are no token of the prompt.
        decode: which generated tokens: True, False, or their numbers, the first one being 1; None: those that
            `positions` names.
        prompt: columns of the prompt, where a trace also holds what follows it (teacher forcing) or less (chunks).

    Raises:
        LookupError: an unknown phase. TypeError: positions that are no whole numbers. ValueError: a number too small.
    """

    phase: str = "both"
    positions: Positions = None
    decode: bool | int | Iterable[int] | None = None
    prompt: int | None = None

    def __post_init__(self):
        known("phase", self.phase, PHASES)
        object.__setattr__(self, "positions", _positions(self.positions))
        if not isinstance(self.decode, (bool, type(None))):
            object.__setattr__(self, "decode", wholes("the number of a generated token", self.decode, 1))
        if self.prompt is not None:
            object.__setattr__(self, "prompt", whole("the prompt's length", self.prompt, 1))

    def now(self, model) -> Here:
        """Of the pass that is running. Call inside a trace, once per forward: it always reads the model's inputs, since
        a step of `tracer.iter` that asks for nothing never ends."""
        inputs = named_inputs(*model.inputs)
        return self.of(inputs, **model._module.__dict__.get("_run", {}))

    def of(self, inputs: dict, given: dict | None = None, generates: bool = False) -> Here:
        """Of a forward that is called with `inputs` in a run that was `given` something else.

        Raises:
            IndexError: a position that no row has. ValueError: padding that cannot be told; booleans of another shape; a
            prompt longer than the run; a position counted from an end that a prefix does not know.
        """
        past, given = inputs.get("past_key_values"), given or {}
        start, (rows, length) = 0 if past is None else int(past.get_seq_length()), _shape(inputs)
        end, told = start + length, self.prompt or getattr(past, "prompt", None)
        prompts, whole_run = _shape(given) if generates else (rows, end)
        prompt = told or whole_run
        if told == inf:  # a prefix is read: at least one token of the prompt is still to come
            prompt = self.positions.shape[1] if isinstance(self.positions, torch.Tensor) else end + 1
        elif prompt > whole_run and (generates or past is None):
            raise ValueError(f"prompt={prompt}, but this run has {whole_run} tokens and no cache for more")
        mask = _mask(inputs, given, rows, max(end, prompt))  # of the whole prompt, if it is read in parts
        number, real = (mask.cumsum(-1) * mask - 1)[:, start:end], mask[:, :prompt].sum(-1, keepdim=True)
        from_end = number - real  # -1 at the last token of the prompt, 0 at the first generated one
        if isinstance(self.positions, tuple):
            more = (given.get("max_new_tokens") or inf) if generates else inf if told and past is not None else end - prompt
            more, longest = more if self.decode is None or told == inf else 0, int(real.max())
            if told == inf and min(self.positions, default=0) < 0:
                raise ValueError(f"positions {self.positions} count from an end that a prefix cannot know: give it prompt")
            if beyond := [p for p in self.positions if not -longest <= p < longest + more]:
                raise IndexError(f"positions {beyond}: the longest row has {longest} tokens")
        named = self._in_prompt(number, from_end, start, (prompts, prompt), rows)
        phase = {"both": True, "prefill": from_end < -1, "decode": from_end >= -1}[self.phase]
        at = (number >= 0) & phase & torch.where(from_end < 0, named, self._generated(number, from_end))
        return Here(at, number, prompts)

    def _in_prompt(self, number, from_end, start: int, shape: tuple[int, int], rows: int) -> torch.Tensor:
        """Which tokens of a pass that begins at column `start` are named, were they all of the prompt."""
        if self.positions is None:
            return torch.ones_like(number, dtype=torch.bool)
        if isinstance(self.positions, tuple):
            wanted = torch.tensor(self.positions, dtype=torch.long)
            return torch.isin(number, wanted[wanted >= 0]) | torch.isin(from_end, wanted[wanted < 0])
        if self.positions.shape not in (shape, (1, shape[1])):
            (n, length), (prompts, prompt) = self.positions.shape, shape
            raise ValueError(
                f"positions [row, position] are for {n} rows of {length} tokens, but this batch has {prompts} of "
                f"{prompt}: run what they were made for as one batch, or make them for each batch"
            )
        part = for_beams(self.positions[:, start:], rows)
        return pad(part, (0, max(0, number.shape[1] - part.shape[1])))[:, : number.shape[1]]

    def _generated(self, number: torch.Tensor, from_end: torch.Tensor) -> torch.Tensor:
        """Which tokens of a pass are named, were they all generated."""
        if isinstance(self.decode, tuple):
            return torch.isin(from_end + 1, torch.tensor(self.decode, dtype=torch.long))
        if self.decode is None and isinstance(self.positions, tuple):
            return torch.isin(number, torch.tensor([p for p in self.positions if p >= 0], dtype=torch.long))
        return torch.full_like(number, self.decode if self.decode is not None else self.positions is None, dtype=torch.bool)


def _positions(given: Positions) -> tuple[int, ...] | torch.Tensor | None:
    """Whole numbers as a tuple, booleans as `[row or 1, column]`."""
    at = torch.as_tensor(given).cpu() if hasattr(given, "dtype") else given
    if isinstance(at, torch.Tensor) and (at.dtype == torch.bool or at.dim() > 1):
        if at.dtype != torch.bool or at.dim() not in (1, 2):
            raise TypeError(f"positions are numbers, or booleans [row, position], not {at.dtype} {list(at.shape)}")
        return at[None] if at.dim() == 1 else at
    return None if at is None else wholes("a position", at)


def named_inputs(args: tuple, kwargs: dict) -> dict:
    """What a model is called with, by name."""
    return {**({"input_ids": args[0]} if args else {}), **kwargs}


def _shape(inputs: dict) -> tuple[int, int]:
    """Rows and columns of what a model is given."""
    ids = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
    return tuple(ids.shape[:2])


def for_beams(x: torch.Tensor, rows: int) -> torch.Tensor:
    """What was given for each prompt (or once for all), for each row of a pass: beams of one prompt stand together."""
    return x.repeat_interleave(rows // len(x), 0) if 1 < len(x) < rows else x


def _mask(inputs: dict, given: dict, rows: int, columns: int) -> torch.Tensor:
    """1 for real tokens, 0 for padding, `[row or 1, column]` on the CPU, of so many columns."""
    masks = [mask for mask in (inputs.get("attention_mask"), given.get("attention_mask")) if mask is not None]
    # that of a static cache is [row, 1, query, key] and holds causality, too: then what the run was given tells
    flat = [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.dim() == 2]
    if masks and not flat and ("input_ids" not in given or given.get("attention_mask") is not None):
        raise ValueError("the attention mask is not [row, position]: which tokens are padding cannot be told from it")
    longest = max(flat, key=lambda mask: mask.shape[1], default=torch.ones(1, columns))
    mask = longest[:, :columns].cpu().long()
    return for_beams(pad(mask, (0, columns - mask.shape[1]), value=1), rows)  # what is generated is real


def head_mask(model, sets: list[Iterable]) -> torch.Tensor:
    """Sets of heads as `[set, layer, head]` booleans; checks that every head exists."""
    anatomy = model.anatomy
    mask = torch.zeros(len(sets), anatomy.n_layers, anatomy.n_heads, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        for layer, head in anatomy.check(chosen):
            mask[row, layer, head] = True
    return mask


def layers_of(mask: torch.Tensor) -> list[int]:
    """The layers that a mask `[..., layer, head]` touches."""
    return mask.any(-1).view(-1, mask.shape[-2]).any(0).nonzero().flatten().tolist()


def is_head(x: object) -> bool:
    """Whether this is a (layer, head) pair and not a set of them."""
    try:
        return len([index(i) for i in x]) == 2
    except TypeError:
        return not isinstance(x, list)  # not a set of heads either: `check` names it
