"""Where heads look: attention from a position to the roles of a task, and rows of attention that are forced."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

import nnsight
import torch

from heads.attention import pattern
from heads.names import known
from heads.scores import HeadScores
from heads.tasks.base import Task


@torch.no_grad()
def attention_to(model, task: Task, query: str = "END", roles: Mapping[str, torch.Tensor] | None = None,
                 batch: int = 32) -> dict[str, HeadScores]:  # fmt: skip
    """Mean attention of every head from one position to each role.

    Only the query's row of each pattern is computed, never `[query, key]`.

    Args:
        query: the role that looks.
        roles: name -> `[prompt]` positions, in place of the task's own; for example
            `{**task.roles, "first": torch.zeros(len(task), dtype=int)}`, where many heads rest.
        batch: prompts in one pass.

    Returns:
        name -> HeadScores, and "rest": what goes to positions without a role. Two roles at one position both count its
        attention; it is missing from "rest" once. A role behind the query gets none.

    Raises:
        LookupError: for an unknown query. ValueError: for positions outside the prompts, or a role called "rest".
    """
    known(f"role of {task.name}", query, task.roles)
    roles = dict(task.roles if roles is None else roles)
    if not roles:
        raise ValueError("no roles: give name -> positions, or None for those of the task")
    where = torch.stack([_positions(task, name, at) for name, at in roles.items()], 1)  # [prompt, role]
    total = 0
    for start in range(0, len(task), batch):
        part, at = task[start : start + batch], where[start : start + batch]
        rows = _rows(model, part.ids, part.roles[query])  # [layer, prompt, head, key]
        named = torch.zeros_like(part.ids, dtype=torch.bool).scatter_(1, at, True)
        seen = rows.gather(-1, at[None, :, None].expand(*rows.shape[:-1], -1))
        rest = (rows * ~named[None, :, None]).sum(-1, keepdim=True)
        total = total + torch.cat([seen, rest], -1).sum(1)
    means = total / len(task)
    return {name: HeadScores(means[..., i], f"attention from {query} to {name}") for i, name in enumerate([*roles, "rest"])}


def _positions(task: Task, name: str, at) -> torch.Tensor:
    at = torch.as_tensor(at)
    length = task.ids.shape[1]
    if name == "rest":
        raise ValueError("'rest' is what no role holds: give this role another name")
    if at.shape != (len(task),) or (at < 0).any() or (at >= length).any():
        raise ValueError(f"role {name!r} needs one position below {length} for each of {len(task)} prompts")
    return at.long()


def _rows(model, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """One row of every pattern for each prompt, `[layer, prompt, head, key]`, float32 on the CPU."""
    with model.trace(input_ids=ids.to(model.device), use_cache=False):
        found = nnsight.save([])
        for layer in model.layers:
            found.append(_row(_call(layer.attn).inputs, at))
    return torch.stack([x.cpu() for x in found])


def _call(attn):
    """The envoy of a layer's attention call."""
    for name in attn.call_input.split(".")[:-1]:
        attn = getattr(attn, name)
    return attn


def _row(inputs, at: torch.Tensor) -> torch.Tensor:
    """The pattern's rows at the positions `at` `[prompt]`: `[prompt, head, key]`."""
    (module, q, k, _, mask), kwargs = inputs[0][:5], inputs[1]
    rows = torch.arange(len(q), device=q.device)
    at = at.to(q.device)
    if mask is None:  # SDPA was told that attention is causal (or, in an encoder, full) by a flag
        visible = torch.arange(k.shape[2], device=q.device) <= at[:, None]
        visible = visible if getattr(module, "is_causal", True) else torch.ones_like(visible)
        mask = visible[:, None, None]
    else:
        mask = mask.expand(len(q), *mask.shape[1:])[rows, :, at][:, :, None]
    return pattern(module, q[rows, :, at][:, :, None], k, mask, **kwargs)[:, :, 0].float()


def force_attention(model, heads, weights: torch.Tensor, position: int | torch.Tensor = -1):
    """The model with chosen rows of attention: at one position, these heads mix the values as they are told to.

    Everything downstream is recomputed. Only what the heads mix is replaced, so no pattern is computed (and reading
    `.pattern` shows what the model would have done); it acts in the pass of the prompt, not on generated tokens.

        w = task.at(["first colour", "second colour"]).float()         # half and half, Merullo et al. 2024
        repaired = heads.force_attention(model, movers, w / w.sum(1, keepdim=True), task.ids.shape[1] - 1)
        heads.metrics.evaluate(repaired, task, batch=len(task))

    Args:
        heads: (layer, head) pairs.
        weights: `[prompt, key]`, one row for each row of the batch that will be run, or `[1, key]` for all.
        position: of the query, one for all prompts or `[prompt]`; negative ones count from the end.

    Returns:
        An edited copy; `model` is unchanged.

    Raises:
        ValueError: rows that do not sum to one, are negative, or look behind the query; when the edited model runs,
            a batch or a length that does not fit.
        IndexError: a head or position that does not exist.
    """
    chosen = model.anatomy.check(heads)
    weights, at = _checked(weights, position, causal=not model.anatomy.encoder)
    by_layer = {layer: [h for i, h in chosen if i == layer] for layer in sorted({i for i, _ in chosen})}
    group = model.anatomy.n_heads // model.anatomy.n_kv_heads
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            _force(edited, by_layer, weights, at, group)
    return edited


def _force(model, by_layer: dict[int, list[int]], weights: torch.Tensor, at: torch.Tensor, group: int) -> None:
    """Edit the pass that is running. Call inside a trace, once per forward."""
    # Read even if there is nothing to do: a step of `tracer.iter` that asks for nothing never ends.
    past = model.inputs[1].get("past_key_values")
    if past is not None and past.get_seq_length():
        return
    for layer, chosen in by_layer.items():
        attn = model.layers[layer].attn
        v = attn.v  # [batch, key, kv_head, d_head]
        if len(weights) not in (1, len(v)) or weights.shape[1] != v.shape[1]:
            raise ValueError(
                f"attention is forced for {len(weights)} prompts of {weights.shape[1]} tokens, but this batch has "
                f"{len(v)} of {v.shape[1]}: run the whole task as one batch, or force each batch on its own"
            )
        read = v[:, :, [h // group for h in chosen]]
        mixed = torch.einsum("bk,bkhd->bhd", weights.to(read).expand(len(v), -1), read)
        z, rows = attn.heads.clone(), torch.arange(len(v), device=v.device)[:, None]
        z[rows, at.to(v.device).expand(len(v))[:, None], torch.tensor(chosen, device=v.device)] = mixed
        attn.heads = z  # not in place: backward may need what was there


def _checked(weights, position, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as float32 `[row, key]`, positions as `[1 or row]`, not negative."""
    weights = torch.as_tensor(weights).float().cpu()
    if weights.dim() != 2 or not weights.numel():
        raise ValueError(f"weights are [prompt, key], got {tuple(weights.shape)}")
    length = weights.shape[1]
    at = torch.tensor([int(position)]) if isinstance(position, Integral) else torch.as_tensor(position).cpu().long()
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
    return weights, at
