"""Switching heads off: zero, mean, resample, and the uniform attention of the Retrieval Head paper.

An ablation is an edited model: `trace` and `generate` work on it as before, the original is as it
was, and ablations stack. A set of heads is ablated jointly, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import index

import nnsight
import torch
from torch.nn.functional import pad

from heads.names import known

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

    def where(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """What is ablated of the pass that is called with `inputs`: booleans and `token_numbers`, `[row or 1, position]`."""
        past, number = inputs.get("past_key_values"), token_numbers(inputs)
        chosen, positions = number >= 0, self.positions
        if past is None or not past.get_seq_length():
            # The last prompt token decides the first answer token: it belongs to decoding.
            last = at_positions(number, [-1])
            chosen = chosen & {"both": chosen, "prefill": ~last, "decode": last}[self.phase]
        else:
            chosen = chosen & (self.phase != "prefill")
            # Negative positions count from the end of the prompt, so they mean something in its pass only.
            positions = positions and [p for p in positions if p >= 0]
        return chosen if positions is None else chosen & at_positions(number, positions), number

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
        layers = self.mask.any(0).any(-1).nonzero().flatten().tolist()
        # Read even if no head is chosen: a step of `tracer.iter` that asks for nothing never ends.
        at, number = self.where(named_inputs(*model.inputs))
        for i in layers if at.any() else ():
            attn = model.layers[i].attn
            # A query of zeros makes all logits equal: attention is uniform over what is visible.
            what = "q" if self.kind == "uniform" else "heads"
            old = getattr(attn, what)
            if len(self.mask) not in (1, len(old)):
                sets, rows = len(self.mask), len(old)
                raise ValueError(f"{sets} sets of heads for a batch of {rows} rows: give one, or one for each row")
            chosen = (at[:, :, None] & self.mask[:, None, i])[..., None].to(old.device)
            setattr(attn, what, torch.where(chosen, self.new(i, at, number, old), old))


def named_inputs(args, kwargs) -> dict:
    """What a model is called with, by name."""
    return {**({"input_ids": args[0]} if args else {}), **kwargs}


def token_numbers(inputs: dict) -> torch.Tensor:
    """Each position's number among the real tokens of its row, from 0 and cached ones included, in the pass that is
    called with `inputs`; -1 for padding. `[row or 1, position]`, on the CPU."""
    ids = inputs.get("input_ids")
    length = (ids if ids is not None else inputs["inputs_embeds"]).shape[1]
    mask, past = inputs.get("attention_mask"), inputs.get("past_key_values")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        mask = torch.ones(1, length + (past.get_seq_length() if past is not None else 0))
    mask = mask.cpu().long()
    return (mask.cumsum(-1) * mask - 1)[:, -length:]


def at_positions(number: torch.Tensor, positions: Iterable[int]) -> torch.Tensor:
    """Where `token_numbers` are among `positions`, of which negative ones count from a row's last token: booleans alike."""
    wanted = torch.tensor(list(positions), dtype=torch.long)
    from_end = number - number.amax(1, keepdim=True) - 1  # -1 for the last token
    return (number >= 0) & (torch.isin(number, wanted[wanted >= 0]) | torch.isin(from_end, wanted[wanted < 0]))


def head_mask(model, sets: list[Iterable]) -> torch.Tensor:
    """Sets of heads as `[set, layer, head]` booleans; checks that every head exists."""
    anatomy = model.anatomy
    mask = torch.zeros(len(sets), anatomy.n_layers, anatomy.n_heads, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        for layer, head in anatomy.check(chosen):
            mask[row, layer, head] = True
    return mask


def _is_head(x) -> bool:
    try:
        return len([index(i) for i in x]) == 2
    except TypeError:
        return not isinstance(x, list)  # not a set of heads either: `check` names it


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
        IndexError: a head that does not exist. LookupError: an unknown kind or phase. ValueError: a missing or
        needless reference.
    """
    known("kind of ablation", kind, KINDS)
    known("phase", phase, PHASES)
    needs = kind in ("mean", "resample")
    if needs != (reference is not None or values is not None) or (reference is not None and values is not None):
        wants = "needs a reference=[texts] or values=, one of the two" if needs else "takes neither a reference nor values"
        raise ValueError(f"kind={kind!r} {wants}")
    if values is not None:
        values, (n, h, d) = torch.as_tensor(values), (model.anatomy.n_layers, model.anatomy.n_heads, model.anatomy.d_head)
        if values.dim() not in (3, 4) or (values.shape[0], *values.shape[-2:]) != (n, h, d):
            raise ValueError(f"the values are {list(values.shape)}, expected [{n}, {h}, {d}] or [{n}, position, {h}, {d}]")
    heads = [list(x) if isinstance(x, Iterable) else x for x in heads]
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
    texts = list(_listed(texts))
    if kind == "resample" and texts:
        texts = [texts[torch.randint(len(texts), (1,), generator=torch.Generator().manual_seed(seed)).item()]]
    return head_means(model, texts, per_position=per_position or kind == "resample")


def _listed(texts):
    if isinstance(texts, (str, Mapping, torch.Tensor)):
        raise TypeError(
            f"expected a list of texts, or of token ids [1, position], got one {type(texts).__name__}: put a text in a "
            "list, and cut ids into prompts with ids.split(1)"
        )
    return texts


def head_means(model, texts, per_position: bool | None = None, *, positions=None, batch: int = 1) -> torch.Tensor:
    """Mean of every head's z over texts, streamed: one batch of texts is held at a time.

    Args:
        texts: texts, or token ids `[1, position]`; any iterable.
        per_position: a mean for each position (if no positions are chosen, the default), or one over all.
        positions: only these, absolute or negative from the end of each text: `[-1]` is the last token.
        batch: texts in one forward pass.

    Returns:
        `[layer, head, d_head]`, or `[layer, position, head, d_head]` with `per_position`; float32.

    Raises:
        ValueError: without texts; if a mean per position is asked of texts of different lengths.
        IndexError: a position beyond the end of a text.
    """
    per_position = positions is None if per_position is None else per_position
    total, count, length = 0, 0, None
    for z in _activations(model, texts, positions, batch):
        if per_position and length not in (None, z.shape[1]):
            raise ValueError(
                f"a mean per position needs texts of equal length, got {length} and {z.shape[1]} tokens: "
                "use one template, or per_position=False"
            )
        length = z.shape[1]
        total = total + (z if per_position else z.sum(1))
        count += 1 if per_position else length
    if not count:
        raise ValueError("the reference holds no text, or no position")
    return total / count


def head_activations(model, texts, position: int = -1, batch: int = 1) -> torch.Tensor:
    """Every head's z at one position of each text, `[text, layer, head, d_head]`, float32: what probes are fitted on."""
    found = [z[:, 0] for z in _activations(model, texts, [position], batch)]
    if not found:
        raise ValueError("there are no texts")
    return torch.stack(found)


def _activations(model, texts, positions, batch: int) -> Iterator[torch.Tensor]:
    """z of every head for each text in turn, `[layer, position, head, d_head]`, float32; at some positions, or all."""
    texts = iter(_listed(texts))
    while group := [x if isinstance(x, torch.Tensor) else model.ids(x) for x in islice(texts, batch)]:
        if bad := [list(ids.shape) for ids in group if ids.dim() != 2 or len(ids) != 1 or not ids.numel()]:
            raise ValueError(f"a text of token ids {bad[0]}: expected [1, position], with at least one token")
        longest = max(ids.shape[1] for ids in group)
        inputs = {"input_ids": torch.cat([pad(ids, (0, longest - ids.shape[1])) for ids in group]).to(model.device)}
        if any(ids.shape[1] < longest for ids in group):
            mask = torch.cat([pad(torch.ones_like(ids), (0, longest - ids.shape[1])) for ids in group])
            inputs["attention_mask"] = mask.to(model.device)
        with torch.no_grad(), model.trace(**inputs):
            z = nnsight.save([])
            for layer in model.layers:
                z.append(layer.attn.heads.float())
        for row, ids in enumerate(group):
            n = ids.shape[1]
            if beyond := [p for p in positions or () if not -n <= p < n]:
                raise IndexError(f"position {beyond[0]} of a text with {n} tokens")
            at = slice(n) if positions is None else [p % n for p in positions]
            yield torch.stack([x[row, at].to(z[0].device) for x in z])
