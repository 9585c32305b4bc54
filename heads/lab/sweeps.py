"""Sweeps: cut or patch every head, one at a time, exactly, and read what it does to a metric.

The total effect: everything downstream of the head is recomputed. Fast because a head is cut where it stands: the
layers below and the positions before are read from `Replay`, the heads of a layer run as one batch, and only the
logits that the metric reads are computed. Equal to the naive loop to float tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from heads.lab.replay import Replay, chunks, room
from heads.metrics import Metric, logit_difference, named
from heads.names import known, whole
from heads.scores import Effects
from heads.tasks.base import Task

KINDS = ("zero", "mean", "resample", "counterfactual")


def ablation_scores(model, task: Task, kind: str = "mean", positions: str | Sequence[str] = "all",
                    metric: str | Metric = logit_difference, *, reference: torch.Tensor | None = None, batch: int = 32,
                    tokens: int | None = None, seed: int = 0, progress: bool = True) -> Effects:  # fmt: skip
    """What the metric loses when each head alone is cut: mean over prompts of edited minus base.

    Args:
        kind: what a head writes instead. "zero": nothing. "mean": its mean over the reference, position by position.
            "resample": what it wrote on another prompt of the reference. "counterfactual": what it wrote on the
            corrupted twin: activation patching, which asks whether the head is necessary; of `task.swapped()` it writes
            clean activations into the corrupted run, and asks whether it suffices. They are not mirror images.
        positions: "all", a role's name ("END"), or a list of roles. One late position is an order of magnitude cheaper,
            because only the columns from there on are computed.
        reference: `[prompt, position]` ids of the same length for "mean" and "resample"; the corrupted twins if None.
        batch: prompts at a time, tokens: rows x positions in one forward (memory; by default 2048 on a CPU).

    Returns:
        Effects `[layer, head]`; `samples` has every prompt.

    Raises:
        ValueError, LookupError: an unknown kind, role or metric, a reference that does not fit: before any forward pass.
    """
    known("kind of ablation", kind, KINDS)
    whole("batch", batch, 1), whole("tokens", 1 if tokens is None else tokens, 1)
    if reference is not None and kind not in ("mean", "resample"):
        raise ValueError(f"kind={kind!r} takes no reference")
    others = task.corrupted if reference is None else reference
    if others.shape[1:] != task.ids.shape[1:]:
        raise ValueError(
            f"the reference holds prompts of {others.shape[1]} tokens, the task {task.ids.shape[1]}: "
            "positions must correspond"
        )
    if kind == "resample":
        others = others[_others(len(task), len(others), seed)]
    where, read = task.at(positions), named(metric)
    start = int(where.any(0).nonzero()[0])
    mean = [x.mean(0, keepdim=True) for x in _heads(model, others, start, batch)] if kind == "mean" else None
    bar = tqdm(total=len(task) * model.anatomy.n, desc=f"{kind} ablation", unit="run", disable=None if progress else True)
    samples, base, source = [], [], []
    for at in range(0, len(task), batch):
        part, mask = task[at : at + batch], where[at : at + batch, start:].to(model.device)
        clean = Replay(model, part.ids, start)
        twin = Replay(model, others[at : at + batch], start, check=False) if kind in ("resample", "counterfactual") else None
        new = mean if kind == "mean" else twin.z if twin else [torch.zeros_like(z[:1]) for z in clean.z]
        columns, reference_logits = read.columns(part), read.pick(clean.logits, part)
        logits = _cut(clean, new, mask, columns, tokens, bar)
        base.append(read(reference_logits, part, reference_logits))
        values = read(logits, part, reference_logits) - base[-1]  # [head, prompt]
        samples.append(values.T.reshape(len(part), model.anatomy.n_layers, -1))
        if kind == "counterfactual":
            source.append(read(read.pick(twin.logits, part), part, reference_logits))
    bar.close()
    return Effects(torch.cat(samples), torch.cat(base), torch.cat(source) if source else None, f"change of {read.name}",
                   model=model)


def _others(n: int, m: int, seed: int) -> torch.Tensor:
    """For each of n prompts another one of m: never the one with its own number."""
    if m < 2:
        raise ValueError("resampling needs at least two reference prompts")
    shift = torch.randint(1, m, (n,), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(n) + shift) % m


def _heads(model, ids: torch.Tensor, start: int, batch: int) -> list[torch.Tensor]:
    """Mean of z over prompts, per layer `[1, position, head, d_head]`, streamed."""
    total = None
    for part in ids.split(batch):
        sums = [z.float().sum(0, keepdim=True) for z in Replay(model, part, start, check=False).z]
        total = sums if total is None else [a + b for a, b in zip(total, sums)]
    return [x.to(model._module.dtype) / len(ids) for x in total]


def _cut(clean: Replay, new: list, mask: torch.Tensor, columns, tokens: int | None, bar) -> torch.Tensor:
    """Logits at END with each head in turn replaced by `new` where `mask`: `[head, prompt, column]`."""
    anatomy, logits = clean.model.anatomy, []
    every = [(layer, head) for layer in range(anatomy.n_layers) for head in range(anatomy.n_heads)]
    for group in chunks(every, room(clean.model, mask.shape[1], clean.n_prompts, tokens)):
        hidden, cache = clean.resid[0][:0], clean.cache()
        for i in range(group[0][0], clean.n_layers):
            cut = [head for layer, head in group if layer == i]
            z = None
            if cut:
                z = clean.z[i].expand(len(cut), *clean.z[i].shape).clone()  # [condition, prompt, position, head, d_head]
                for row, head in enumerate(cut):
                    z[row, ..., head, :] = torch.where(mask[..., None], new[i][..., head, :], z[row, ..., head, :])
                hidden, z = torch.cat([hidden.to(z.device), clean.rows(i, len(cut))]), z.flatten(0, 1)
            hidden = clean.layer(i, hidden, cache, z)
        logits.append(clean.read(hidden[:, -1], columns))
        bar.update(len(group) * clean.n_prompts)
    return torch.cat(logits)
