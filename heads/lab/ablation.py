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
from heads.model.anatomy import Head
from heads.model.attention import call_of, pattern
from heads.model.weights import decoder_only
from heads.names import known, wholes

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
        at, number, prompts, _ = self.places.now(model)
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


def force_attention(model, heads: Iterable[Head], weights: torch.Tensor, position: int | torch.Tensor = -1) -> Envoy:
    """The model with chosen rows of attention: at one position, these heads mix the values as they are told to.

    Everything downstream is recomputed. Only what the heads mix is replaced, so no pattern is computed (and reading
    `.pattern` shows what the model would have done); it acts in the pass of the prompt, not on generated tokens.

        w = task.at(["first colour", "second colour"]).float()         # half and half, Merullo et al. 2024
        repaired = heads.force_attention(model, movers, w / w.sum(1, keepdim=True), task.ids.shape[1] - 1)
        heads.metrics.evaluate(repaired, task, batch=len(task))

    Args:
        heads: (layer, head) pairs.
        weights: `[prompt, key]`, one row for each prompt of the batch that will be run, or `[1, key]` for all.
        position: column of the query, one for all prompts or `[prompt]`; negative ones count from the end.

    Returns:
        An edited copy; `model` is unchanged.

    Raises:
        ValueError: rows that do not sum to one, are negative, or look behind the query; when the edited model runs,
            a batch or a length that does not fit.
        IndexError: a head or position that does not exist.
    """
    mask = head_mask(model, [heads])[0]  # [layer, head]
    weights, at = _checked_rows(weights, position, causal=not model.anatomy.encoder)
    places = Places(positions=at, decode=False)
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            _force(edited, mask, weights, places)
    return edited


def _force(model, mask: torch.Tensor, weights: torch.Tensor, places: Places) -> None:
    """Edit the pass that is running. Call inside a trace, once per forward."""
    here = places.now(model)
    at = here.at[:, :, None, None]
    group = model.anatomy.n_heads // model.anatomy.n_kv_heads
    for layer in layers_of(mask) if at.any() else ():
        attn = model.layers[layer].attn
        if (keys := attn.v).shape[1] < here.end:
            raise ValueError(f"the cache of layer {layer} keeps its sliding window alone, {keys.shape[1]} of {here.end} keys: run the "
                             "prompt whole (no prefill_chunk_size), or in a trace with a heads.Prefix or DynamicCache()")
        v = keys[:, : weights.shape[1]].repeat_interleave(group, 2)  # [batch, key, head, d_head]
        w = for_beams(weights[:, : v.shape[1]].to(v), len(v)).expand(len(v), -1)  # a part of the prompt sees its keys alone
        mixed, z = torch.einsum("bk,bkhd->bhd", w, v)[:, None], attn.heads
        attn.heads = torch.where((at & mask[layer][:, None]).to(z.device), mixed, z)  # not in place: for backward


def _checked_rows(weights, position, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as float32 `[row, key]`, and booleans alike that say where the query is."""
    weights = torch.as_tensor(weights).float().cpu()
    if weights.dim() != 2 or not weights.numel():
        raise ValueError(f"weights are [prompt, key], got {tuple(weights.shape)}")
    length = weights.shape[1]
    at = torch.tensor(wholes("a position", position))
    if at.shape not in ((1,), (len(weights),)):
        raise ValueError(f"position is one number, or one for each of {len(weights)} rows, got {tuple(at.shape)}")
    if (at < -length).any() or (at >= length).any():
        raise IndexError(f"position {int(at.abs().max())} does not exist: the rows have {length} keys")
    at = at % length
    sums = weights.sum(1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        worst = int((sums - 1).abs().argmax())
        raise ValueError(f"row {worst} sums to {sums[worst]:.3g}: a row of attention sums to one; divide by its sum")
    if (weights < 0).any():
        raise ValueError("a row of attention has no negative entries")
    behind = torch.arange(length) > at[:, None]
    if causal and (weights * behind > 0).any():
        row = int((weights * behind > 0).any(1).nonzero()[0])
        query = int(at[min(row, len(at) - 1)])
        raise ValueError(f"row {row} looks into the future: it gives weight to keys behind position {query}")
    return weights, (torch.arange(length) == at[:, None]).expand(len(weights), -1)
