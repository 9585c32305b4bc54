"""Switching heads off: zero, mean, resample, and the uniform attention of the Retrieval Head paper.

An ablation is an edited model: `trace` and `generate` work on it as before, the original is as it
was, and ablations stack. A set of heads is ablated jointly, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from nnsight.intervention.envoy import Envoy

from heads.lab.places import Places, Positions, for_beams, head_mask, is_head, layers_of
from heads.lab.readings import reference_values
from heads.model.attention import call_of, pattern
from heads.model.weights import decoder_only
from heads.names import known

KINDS = ("zero", "mean", "resample", "uniform")


@dataclass(frozen=True)
class Plan:
    """What an ablation does to the pass that is running.

    `mask` is `[prompt or 1, layer, head]`: one row for the whole batch, or one for each prompt of it (its beams share it).
    `values` is what replaces the heads: None (zero), `[layer, head, d_head]` or
    `[layer, position, head, d_head]`.
    """

    mask: torch.Tensor
    kind: str
    places: Places
    values: torch.Tensor | None

    def new(self, layer: int, at: torch.Tensor, number: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """What stands in for `old`, `[row, position, head, d_head]`, where `at`."""
        if self.values is None:
            return old.new_zeros(1)
        values = self.values[layer].to(old)
        if values.dim() == 2:
            return values
        if (last := int(number[at].max())) >= len(values):
            raise IndexError(
                f"position {last} is ablated, but the reference holds {len(values)} positions: give a reference "
                "as long as the prompt, choose positions, or use per_position=False"
            )
        return values[number.clamp(0, len(values) - 1).to(values.device)]

    def apply(self, model) -> None:
        """Edit the pass that is running. Call inside a trace, once per forward."""
        at, number, prompts = self.places.now(model)
        if (sets := len(self.mask)) not in (1, prompts):
            raise ValueError(f"{sets} sets of heads for a batch of {prompts} rows: give one, or one for each row")
        for i in layers_of(self.mask) if at.any() else ():
            attn = model.layers[i].attn
            # A query of zeros makes all logits equal: attention is uniform over what is visible.
            what = "q" if self.kind == "uniform" else "heads"
            old = getattr(attn, what)
            chosen = (at[:, :, None] & for_beams(self.mask, len(old))[:, None, i])[..., None].to(old.device)
            new = torch.where(chosen, self.new(i, at, number, old), old)
            if what == "heads" or not _follow(attn, new, chosen):
                setattr(attn, what, new)


def _follow(attn, queries: torch.Tensor, chosen: torch.Tensor) -> bool:
    """A pattern that an earlier edit put in place answers to no queries: where they change, it is made again. Whether there
    was one."""
    module, _, k, mask, kwargs = call_of(attn._raw(type(attn).pattern))
    if (kept := kwargs.pop("pattern_override", None)) is None:
        return False
    attn.pattern = torch.where(chosen.transpose(1, 2), pattern(module, queries.transpose(1, 2), k, mask, **kwargs), kept)
    return True


def ablate(model, heads: Iterable, kind: str = "zero", *, phase: str = "both", positions: Positions = None,
           reference: Iterable | None = None, values: torch.Tensor | None = None, per_position: bool = True, seed: int = 0,
           prompt: int | None = None) -> Envoy:  # fmt: skip
    """The model with some heads switched off.

    Args:
        heads: (layer, head) pairs, or a list of such lists: one set for each prompt of the batch.
        kind: "zero": the head writes nothing. "mean": it writes its mean over `reference`. "resample": it
            writes what it wrote on another prompt, drawn from `reference`. "uniform": it attends equally to
            every visible token (the masking of Wu et al. 2024, which sets the pre-softmax logits to 0).
        phase: "prefill": prompt tokens but the last. "decode": the last prompt token and what is generated,
            as the paper's released code masks. "both".
        positions: numbers of tokens in the sequence, or negative ones counted from the end of the prompt; or booleans
            `[column]` or `[row or 1, column]` of the prompt. None means all, an empty list none.
        reference: texts of equal length in tokens, for "mean" and "resample". They are read by `model`, with the edits
            that it has; `values=heads.head_means(clean, texts)` takes the means of another one.
        values: instead of a reference, `[layer, head, d_head]` or `[layer, position, head, d_head]`.
        per_position: mean per position (the field's default) or one over all positions.
        seed: which reference prompt "resample" takes.
        prompt: length of the prompt, for a trace that also holds what follows it; see `heads.lab.places`.

    Returns:
        An edited copy; `model` is unchanged.

    Raises:
        IndexError: a head that does not exist. LookupError: an unknown kind or phase. ValueError: a missing or
        needless reference, values that are not finite; a phase in an encoder; when the edited model runs, sets of heads for
        another number of prompts, or positions that are not there.
    """
    known("kind of ablation", kind, KINDS)
    places, needs = Places(phase, positions, prompt=prompt), kind in ("mean", "resample")
    if phase != "both":
        decoder_only(model)
    if needs != (reference is not None or values is not None) or (reference is not None and values is not None):
        wants = "needs a reference=[texts] or values=, one of the two" if needs else "takes neither a reference nor values"
        raise ValueError(f"kind={kind!r} {wants}")
    if values is not None:
        values, (n, h, d) = torch.as_tensor(values), (model.anatomy.n_layers, model.anatomy.n_heads, model.anatomy.d_head)
        if values.dim() not in (3, 4) or (values.shape[0], *values.shape[-2:]) != (n, h, d):
            raise ValueError(f"the values are {list(values.shape)}, expected [{n}, {h}, {d}] or [{n}, position, {h}, {d}]")
        if not values.isfinite().all():
            raise ValueError(f"{int((~values.isfinite()).sum())} of the values are not finite")
    heads = [list(x) if isinstance(x, Iterable) else x for x in heads]
    mask = head_mask(model, [heads] if not heads or is_head(heads[0]) else heads)
    if needs and values is None:
        values = reference_values(model, reference, kind, per_position, seed)
    plan = Plan(mask, kind, places, values)
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            plan.apply(edited)
    return edited
