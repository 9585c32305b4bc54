"""Switching heads off: zero, mean, resample, and the uniform attention of the Retrieval Head paper.

An ablation is an edited model: `trace` and `generate` work on it as before, the original is as it
was, and ablations stack. A set of heads is ablated jointly, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral

import nnsight
import torch

KINDS = ("zero", "mean", "resample", "uniform")
PHASES = ("both", "prefill", "decode")


@dataclass(frozen=True)
class Plan:
    """What an ablation does to the pass that is running.

    `mask` is `[row or 1, layer, head]`: one row for the whole batch, or one for each row of it.
    `values` is what replaces the heads: None (zero), `[layer, head, d_head]` or
    `[layer, position, head, d_head]`.
    """

    mask: torch.Tensor
    kind: str
    phase: str
    positions: tuple[int, ...] | None
    values: torch.Tensor | None

    def where(self, offset: int, length: int) -> list[int]:
        """Which of the `length` positions of a pass that starts at `offset` are ablated."""
        if offset == 0:
            # The last prompt token decides the first answer token: it belongs to decoding.
            first = {"both": range(length), "prefill": range(length - 1), "decode": range(length - 1, length)}
            chosen = first[self.phase]
        else:
            chosen = range(length) if self.phase != "prefill" else range(0)
        if self.positions is None:
            return list(chosen)
        # Negative positions count from the end of the prompt, so they mean something in its pass only.
        wanted = {p + length if p < 0 and offset == 0 else p - offset for p in self.positions}
        return [p for p in chosen if p in wanted]

    def new(self, layer: int, offset: int, at: list[int], old: torch.Tensor) -> torch.Tensor:
        """Replacement for `old`, `[batch, position, head, d_head]`, at the positions `at` of this pass."""
        if self.values is None:
            return torch.zeros_like(old)
        values = self.values[layer].to(old)
        if values.dim() == 2:
            return values.expand_as(old)
        absolute = [offset + p for p in at]
        if absolute[-1] >= values.shape[0]:
            raise IndexError(
                f"position {absolute[-1]} is ablated, but the reference holds {values.shape[0]} positions: give a reference "
                "as long as the prompt, choose positions, or use per_position=False"
            )
        return values[absolute].expand_as(old)

    def apply(self, model) -> None:
        """Edit the pass that is running. Call inside a trace, once per forward."""
        layers = self.mask.any(0).any(-1).nonzero().flatten().tolist()
        # Read even if no head is chosen: a step of `tracer.iter` that asks for nothing never ends.
        args, kwargs = model.inputs
        past = kwargs.get("past_key_values")
        offset = past.get_seq_length() if past is not None else 0
        for i in layers:
            attn = model.layers[i].attn
            # A query of zeros makes all logits equal: attention is uniform over what is visible.
            view = attn.q if self.kind == "uniform" else attn.heads
            if len(self.mask) not in (1, len(view)):
                sets, rows = len(self.mask), len(view)
                raise ValueError(f"{sets} sets of heads for a batch of {rows} rows: give one, or one for each row")
            at = self.where(offset, view.shape[1])
            if at:
                chosen = self.mask[:, i, None, :, None].to(view.device)
                old = view[:, at]
                view[:, at] = torch.where(chosen, self.new(i, offset, at, old), old)


def head_mask(model, sets: list[Iterable]) -> torch.Tensor:
    """Sets of heads as `[set, layer, head]` booleans; checks that every head exists."""
    anatomy = model.anatomy
    mask = torch.zeros(len(sets), anatomy.n_layers, anatomy.n_heads, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        for layer, head in anatomy.check(chosen):
            mask[row, layer, head] = True
    return mask


def _is_head(x) -> bool:
    return len(x) == 2 and all(isinstance(i, Integral) for i in x)


def ablate(model, heads, kind: str = "zero", *, phase: str = "both", positions=None, reference=None, values=None,
           per_position: bool = True, seed: int = 0):  # fmt: skip
    """The model with some heads switched off.

    Args:
        heads: (layer, head) pairs, or a list of such lists: one set for each row of the batch.
        kind: "zero": the head writes nothing. "mean": it writes its mean over `reference`. "resample": it
            writes what it wrote on another prompt, drawn from `reference`. "uniform": it attends equally to
            every visible token (the masking of Wu et al. 2024, which sets the pre-softmax logits to 0).
        phase: "prefill": prompt tokens but the last. "decode": the last prompt token and what is generated,
            as the paper's released code masks. "both".
        positions: absolute positions in the sequence, or negative ones counted from the end of the prompt;
            None means all.
        reference: texts of equal length in tokens, for "mean" and "resample".
        values: instead of a reference, `[layer, head, d_head]` or `[layer, position, head, d_head]`.
        per_position: mean per position (the field's default) or one over all positions.
        seed: which reference prompt "resample" takes.

    Returns:
        An edited copy; `model` is unchanged.

    Raises:
        IndexError: a head that does not exist. ValueError: an unknown kind or phase, a missing or needless
        reference.
    """
    if kind not in KINDS or phase not in PHASES:
        raise ValueError(f"kind={kind!r}, phase={phase!r}: expected one of {KINDS} and one of {PHASES}")
    needs = kind in ("mean", "resample")
    if needs != (reference is not None or values is not None):
        wants = "needs a reference=[texts] or values=" if needs else "takes neither a reference nor values"
        raise ValueError(f"kind={kind!r} {wants}")
    heads = list(heads)
    mask = head_mask(model, [heads] if not heads or _is_head(heads[0]) else heads)
    if needs and values is None:
        values = reference_values(model, reference, kind, per_position, seed)
    plan = Plan(mask, kind, phase, None if positions is None else tuple(positions), values)
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            plan.apply(edited)
    return edited


def reference_values(model, texts, kind: str, per_position: bool = True, seed: int = 0) -> torch.Tensor:
    """What replaces ablated heads: the mean over texts, or the activations of one drawn text."""
    if isinstance(texts, (str, Mapping)):
        raise TypeError("a reference is a list of texts")
    texts = list(texts)
    if kind == "resample" and texts:
        texts = [texts[torch.randint(len(texts), (1,), generator=torch.Generator().manual_seed(seed)).item()]]
    return head_means(model, texts, per_position=per_position or kind == "resample")


def head_means(model, texts: list[str], per_position: bool = True) -> torch.Tensor:
    """Mean of every head's z over texts, streamed one text at a time.

    Returns:
        `[layer, position, head, d_head]`, or `[layer, head, d_head]` over all positions and texts.

    Raises:
        ValueError: if a mean per position is asked of texts of different lengths.
    """
    total, count, length = 0, 0, None
    for text in texts:
        ids = text if isinstance(text, torch.Tensor) else model.ids(text)
        if per_position and length not in (None, ids.shape[1]):
            raise ValueError(
                f"a mean per position needs texts of equal length, got {length} and {ids.shape[1]} tokens: "
                "use one template, or per_position=False"
            )
        length = ids.shape[1]
        z = _heads(model, ids)
        total = total + (z if per_position else z.sum(1))
        count += 1 if per_position else length
    if not count:
        raise ValueError("the reference holds no text")
    return total / count


def _heads(model, ids: torch.Tensor) -> torch.Tensor:
    """z of every head on one prompt, `[layer, position, head, d_head]`, float32."""
    with torch.no_grad(), model.trace(ids):
        z = nnsight.save([])
        for layer in model.layers:
            z.append(layer.attn.heads[0].float())
    return torch.stack([x.to(z[0].device) for x in z])
