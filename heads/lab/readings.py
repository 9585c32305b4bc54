"""Where heads look: attention from a position to the roles of a task, and rows of attention that are forced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import nnsight
import torch
from torch.nn.functional import pad

from heads.model.attention import call_of, pattern
from heads.model.weights import heads_everywhere
from heads.names import known, whole, wholes
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
    for start in range(0, len(task), whole("batch", batch, 1)):
        part, at = task[start : start + batch], where[start : start + batch]
        rows = _rows(model, part.ids, part.roles[query])  # [layer, prompt, head, key]
        named = torch.zeros_like(part.ids, dtype=torch.bool).scatter_(1, at, True)
        seen = rows.gather(-1, at[None, :, None].expand(*rows.shape[:-1], -1))
        rest = (rows * ~named[None, :, None]).sum(-1, keepdim=True)
        total = total + torch.cat([seen, rest], -1).sum(1)
    means = total / len(task)
    return {to: HeadScores(means[..., i], f"attention from {query} to {to}", model) for i, to in enumerate([*roles, "rest"])}


def _positions(task: Task, name: str, at) -> torch.Tensor:
    at = torch.as_tensor(at)
    length = task.ids.shape[1]
    if name == "rest":
        raise ValueError("'rest' is what no role holds: give this role another name")
    if at.shape != (len(task),) or (at < 0).any() or (at >= length).any():
        raise ValueError(f"role {name!r} needs one position below {length} for each of {len(task)} prompts")
    return torch.tensor(wholes(f"the position of role {name!r}", at))


def _rows(model, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """One row of every pattern for each prompt, `[layer, prompt, head, key]`, float32 on the CPU."""
    heads_everywhere(model)
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
    module, q, k, mask, kwargs = call_of(inputs)
    rows = torch.arange(len(q), device=q.device)
    at = at.to(q.device)
    if (edited := kwargs.get("pattern_override")) is not None:
        return edited[rows, :, at].float()
    if mask is None:  # SDPA was told that attention is causal (or, in an encoder, full) by a flag
        visible = torch.arange(k.shape[2], device=q.device) <= at[:, None]
        visible = visible if getattr(module, "is_causal", True) else torch.ones_like(visible)
        mask = visible[:, None, None]
    else:
        mask = mask.expand(len(q), *mask.shape[1:])[rows, :, at][:, :, None]
    return pattern(module, q[rows, :, at][:, :, None], k, mask, **kwargs)[:, :, 0].float()


def head_means(model, texts: Iterable, per_position: bool | None = None, *, positions: Sequence[int] | None = None,
               batch: int = 1) -> torch.Tensor:
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


def head_activations(model, texts: Iterable, position: int = -1, batch: int = 1) -> torch.Tensor:
    """Every head's z at one position of each text, `[text, layer, head, d_head]`, float32."""
    found = [z[:, 0] for z in _activations(model, texts, [position], batch)]
    if not found:
        raise ValueError("there are no texts")
    return torch.stack(found)


def _activations(model, texts, positions, batch: int) -> Iterator[torch.Tensor]:
    """z of every head for each text in turn, `[layer, position, head, d_head]`, float32; at some positions, or all."""
    heads_everywhere(model)
    texts, positions = iter(_listed(texts)), None if positions is None else wholes("a position", positions)
    while group := [x if isinstance(x, torch.Tensor) else model.ids(x) for x in islice(texts, whole("batch", batch, 1))]:
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


def _listed(texts):
    if isinstance(texts, (str, Mapping, torch.Tensor)):
        raise TypeError(
            f"expected a list of texts, or of token ids [1, position], got one {type(texts).__name__}: put a text in a "
            "list, and cut ids into prompts with ids.split(1)"
        )
    return texts


def reference_values(model, texts: Iterable, kind: str, per_position: bool = True, seed: int = 0) -> torch.Tensor:
    """What replaces ablated heads: the mean over texts, or the activations of one drawn text."""
    texts = list(_listed(texts))
    if kind == "resample" and texts:
        texts = [texts[torch.randint(len(texts), (1,), generator=torch.Generator().manual_seed(seed)).item()]]
    return head_means(model, texts, per_position=per_position or kind == "resample")
