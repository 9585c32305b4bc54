"""What each head adds to a metric, without patching: direct attribution, gradients, and the logit lens.

Two answers to one question. `direct_attribution` is what a head writes into the logits itself; `attribution_patching` is
the first-order guess of what patching it would do. Both read END, the last position.
"""

from __future__ import annotations

from collections.abc import Iterable

import nnsight
import numpy as np
import torch

from heads.metrics import Metric, logit_difference, named
from heads.model.offers import require
from heads.model.weights import heads_everywhere, norm, output_projection, post_norms, projection, row_of, finished
from heads.names import known, whole
from heads.scores import Effects
from heads.tasks.base import DIRECTIONS, Task


class Attribution(Effects):
    """Direct contributions to a metric, `[prompt, layer, head]` in `samples`, with all that is not a head beside them.

    For a metric that is linear in the logits, and without a reference, `samples` + `mlp_samples` + `embedding` +
    `biases`, summed over layers and heads, is `base`. Where the model caps its logits (Gemma 2), no metric of them is
    linear in what is written: the sum is then that of the logits before the cap, times the cap's slope in the run.

    Attributes:
        embedding: `[prompt]`, contribution of the token (and position) embedding at END.
        biases: `[prompt]`, of the biases of output projections, of the final norm and of the unembedding.
    """

    embedding: np.ndarray
    biases: np.ndarray


def _differentiable(metric: str | Metric) -> Metric:
    read = named(metric)
    if not read.gradient:
        raise ValueError(
            f"{read.name!r} has no useful gradient at the base run: use a logit difference or a log-probability, or patch"
        )
    return read


def _read(part: Task, read: Metric, logits: torch.Tensor) -> torch.Tensor:
    """`[prompt, vocabulary]` logits at END -> `[prompt]`."""
    return read(read.pick(logits, part), part)


# -------------------------------------------------------------------------- direct attribution


def _ends(model, part: Task) -> tuple[torch.Tensor, ...]:
    """What a batch writes at END: the embedding and the last stream, `[prompt, d_model]`, z `[layer, prompt, head, d_head]`,
    MLPs `[layer, prompt, d_model]`, and the logits `[prompt, vocabulary]`; float32, on the last layer's device."""
    after = (row_of(model).post_norms or ("", "mlp"))[1]
    with torch.no_grad(), model.trace(input_ids=part.ids.to(model.device), logits_to_keep=1, use_cache=False):
        z, mlp = nnsight.save([]), nnsight.save([])
        embedding = model.layers[0].input[:, -1].float().save()
        for layer in model.layers:
            z.append(layer.attn.heads[:, -1].float())
            mlp.append(getattr(layer, after).output[:, -1].float())
        last = model.layers[-1].output[:, -1].float().save()
        logits = model.logits[:, -1].float().save()
    z, mlp = (torch.stack([x.to(last.device) for x in found]) for found in (z, mlp))
    return embedding.to(last.device), last, z, mlp, logits.to(last.device)


def _unembedding(model, columns: torch.Tensor | None, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Unembedding rows of some tokens, `[prompt, column, d_model]`, or all, `[vocabulary, d_model]`, and their biases (0
    where there are none); float32."""
    pick = lambda x: (x.detach() if columns is None else x.detach()[columns.to(x.device)]).to(device).float()  # noqa: E731
    unembed = model.unembed._module
    bias = getattr(unembed, "bias", None)
    return pick(unembed.weight), torch.zeros((), device=device) if bias is None else pick(bias)


def _direction(model, part: Task, read: Metric, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the metric points before the final norm, `[prompt, d_model]`, its scale included, and what the biases of
    the norm and the unembedding add, `[prompt]`. Metrics that are not linear are linearised at the run."""
    final, columns = norm(model.final_norm._module), read.columns(part)
    rows, fixed = _unembedding(model, columns, last.device)
    with torch.enable_grad():
        logits = torch.einsum("pm,vm->pv" if columns is None else "pm,pcm->pc", final(last), rows)
        logits = (logits + fixed).detach().requires_grad_(True)
        slope = torch.autograd.grad(read(finished(model, logits), part).sum(), logits)[0]
    u = torch.einsum("pv,vm->pm" if columns is None else "pc,pcm->pm", slope, rows)
    constant = (slope * fixed).sum(-1)
    if final.bias is not None:
        constant = constant + u @ final.bias
    return final.back(u) / final.scale(last), constant


def _frozen(model, layer: int, z: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's heads against a direction u `[prompt, d_model]`.

    Returns:
        What z `[prompt, head, d_head]` is multiplied with, `[prompt, head, d_head]`; what the bias adds, `[prompt]`; and
        what the attention writes, `[prompt, d_model]`.
    """
    weight = output_projection(model, layer).detach().to(u.device).float()
    bias = projection(model, layer).bias
    written = z.flatten(1) @ weight
    written = written if bias is None else written + bias.detach().to(u.device).float()
    post = post_norms(model, layer)[0]
    if post is not None:  # Gemma 2 and 3: the norm of the sum, with its scale as it was in this run
        after = norm(post)
        u, written = after.back(u) / after.scale(written), after(written)
    reads = (u @ weight.T).view(z.shape)
    return reads, u.new_zeros(len(u)) if bias is None else u @ bias.detach().to(u.device).float(), written


@torch.inference_mode(False)
@torch.no_grad()
def direct_attribution(
    model, task: Task, metric: str | Metric = logit_difference, reference: str | None = None, batch: int = 64
) -> Attribution:
    """What each head writes at END, read straight through the final norm and the unembedding.

    <r, u> / s for what the head writes, r; u is the difference of unembedding rows that the metric takes, times the final
    norm's weight; s the norm's scale in this very run (frozen, so that contributions add). Later layers are passed by:
    a large contribution is not yet a role. A metric that is not linear in the logits is linearised at the run. Models
    that normalise what attention writes (Gemma 2 and 3) are linearised: that norm's scale is frozen, too, and heads add.

    Args:
        metric: any with a gradient.
        reference: None, or "mean": r minus its mean over the task's prompts, the direct effect of mean ablation, with its
            sign turned: what the head adds here beyond what it always writes (Gould et al. 2023). MLPs likewise.
        batch: prompts in one pass. With a reference every prompt's z is kept, on the CPU.

    Returns:
        `Attribution`: `samples`, `mlps`, `embedding`, `biases`, `base`.

    Raises:
        ValueError: for a metric without a gradient, an encoder, an unknown reference, or a model whose residual stream is
            not the sum of what is written to it (scaled residuals).
    """
    read = _differentiable(metric)
    known("reference", reference, (None, "mean"))
    parts = task.batches(batch)
    heads_everywhere(model)
    require(model, "readout", "mlp")
    found = [_attribute(model, part, read, keep=reference == "mean") for part in parts]
    samples, mlps, embedding, biases, base = (torch.cat([x[i] for x in found]) for i in range(5))
    if reference == "mean":
        z, reads, out, u = (torch.cat([x[i] for x in found]) for i in range(5, 9))
        samples = torch.einsum("plhd,plhd->plh", z - z.mean(0), reads)
        mlps = torch.einsum("plm,pm->pl", out - out.mean(0), u)
    effects = Attribution(samples, base, name=f"direct attribution to {read.name}", mlps=mlps, model=model)
    effects.embedding, effects.biases = embedding.numpy(), biases.numpy()
    return effects


def _attribute(model, part: Task, read: Metric, keep: bool):
    """One batch on the CPU: heads `[prompt, layer, head]`, MLPs `[prompt, layer]`, embedding, biases, base `[prompt]`;
    and with `keep` z, what reads it, MLP outputs and the direction."""
    embedding, last, z, mlp, logits = _ends(model, part)
    u, biases = _direction(model, part, read, last)
    reads, total = [], embedding + mlp.sum(0)
    for layer, heads in enumerate(z):
        read_by, added, written = _frozen(model, layer, heads, u)
        reads.append(read_by)
        biases, total = biases + added, total + written
    _adds_up(model, total, last)
    reads, z, mlp = torch.stack(reads, 1), z.transpose(0, 1), mlp.transpose(0, 1)
    base = _read(part, read, logits)
    found = [(z * reads).sum(-1), torch.einsum("plm,pm->pl", mlp, u), (embedding * u).sum(-1), biases, base]
    return [x.cpu() for x in (found + [z, reads, mlp, u] if keep else found)]


def _adds_up(model, total: torch.Tensor, last: torch.Tensor) -> None:
    tolerance = 1e-3 if model._module.dtype == torch.float32 else 0.1  # every addition rounds in bfloat16
    error = ((total - last).norm(dim=-1) / last.norm(dim=-1)).max().item()
    if not error <= tolerance:
        raise ValueError(
            f"what heads, MLPs and embedding write does not sum to the residual stream of this {model.anatomy.family} model "
            f"(off by {error:.1%}): direct attribution does not hold for it; patch instead"
        )


# ----------------------------------------------------------------------------------- gradients


Activations = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]


def activations(model, ids: torch.Tensor, at: torch.Tensor | slice = slice(None), gradient: bool = False) -> Activations:
    """z `[prompt, position, head, d_head]` and MLP outputs `[prompt, position, d_model]` of every layer, and the logits at
    END `[prompt, vocabulary]`, float32; cut to the positions `at` unless a gradient is wanted."""
    with torch.set_grad_enabled(gradient), model.trace(input_ids=ids.to(model.device), logits_to_keep=1, use_cache=False):
        z, mlp = nnsight.save([]), nnsight.save([])
        for layer in model.layers:  # each is marked before the next is read: the model has moved on by then
            z.append(_marked(layer.attn.heads, at, gradient))
            mlp.append(_marked(layer.mlp.output, at, gradient))
        logits = model.logits[:, -1].float().save()
    return z, mlp, logits


def _marked(value: torch.Tensor, at: torch.Tensor | slice, gradient: bool) -> torch.Tensor:
    if not gradient:
        return value[:, at].clone()
    return value if value.requires_grad else value.requires_grad_(True)  # weights have no gradient: start one


def _meant(model, task: Task, metric: str | Metric, direction: str, positions) -> tuple[Metric, Task]:
    """The metric, and the task with its base run first; what cannot be meant is refused."""
    read = _differentiable(metric)
    known("direction", direction, DIRECTIONS)
    task.at(positions)
    heads_everywhere(model)
    require(model, "mlp")
    return read, task if direction == "noising" else task.swapped()


@torch.inference_mode(False)  # gradients are taken, whatever the caller's mode
def attribution_patching(model, task: Task, metric: str | Metric = logit_difference, direction: str = "noising",
                         positions: str | Iterable[str] = "END", batch: int = 16) -> Effects:  # fmt: skip
    """A first-order estimate of activation patching, for all heads (and MLPs) from two forwards and one backward.

    (a_source - a_base) . gradient of the metric at a_base, with a the head's z (Nanda 2023). It is exact for small
    differences, and poor where attention or a norm saturates: check the heads that matter by patching.

    Args:
        metric: any with a gradient at the base run.
        direction: "noising": base is the clean prompt, source its twin. "denoising": the other way round.
        positions: "END", "all", a role or a list of roles: where a head would be patched.
        batch: prompts in one pass; its activations and gradients are held at once.

    Returns:
        Effects with `base`, `source` and `mlps`.

    Raises:
        ValueError: for a metric without a gradient (KL, accuracies), before any pass; an unknown direction; an encoder.
        LookupError: for an unknown role.
    """
    whole("batch", batch, 1)
    read, task = _meant(model, task, metric, direction, positions)
    parts = [_first_order(model, part, read, positions) for part in task.batches(batch)]
    heads, mlps, base, source = (torch.cat(x) for x in zip(*parts, strict=True))
    return Effects(heads, base, source, f"change of {read.name}, first order", mlps, model)


def _first_order(model, part: Task, read: Metric, positions):
    mask = part.at(positions)
    at = mask.any(0).nonzero().flatten()  # positions that any prompt asks for
    source_z, source_mlp, source_logits = activations(model, part.corrupted, at)
    z, mlp, logits = activations(model, part.ids, gradient=True)
    with torch.enable_grad():
        base = _read(part, read, logits)
        slopes = torch.autograd.grad(base.sum(), [*z, *mlp])
    rows = []
    for ours, theirs, slope in zip([*z, *mlp], [*source_z, *source_mlp], slopes, strict=True):
        here = at.to(ours.device)
        change = (theirs.float() - ours.detach()[:, here].float()) * slope[:, here].float()
        where = mask[:, at].to(change.device).float()
        rows.append((change.sum(-1) * where.view(*where.shape, *[1] * (change.dim() - 3))).sum(1).cpu())
    heads, mlps = torch.stack(rows[: len(z)], 1), torch.stack(rows[len(z) :], 1)
    return heads, mlps, base.detach().cpu(), _read(part, read, source_logits).cpu()


# ----------------------------------------------------------------------------------- logit lens


@torch.no_grad()
def logit_lens(model, task: Task, metric: str | Metric = logit_difference, batch: int = 64) -> torch.Tensor:
    """What the model would answer if it stopped early: the residual stream at END through final norm and unembedding.

    Args:
        metric: any; KL compares with the last layer.

    Returns:
        `[layer + 1, prompt]`: the stream that enters each layer, and last the one that leaves the model, whose metric is
        the model's own. Float32, on the CPU.
    """
    read = named(metric)
    parts = task.batches(batch)
    require(model, "readout")
    found = []
    for part in parts:
        with model.trace(input_ids=part.ids.to(model.device), logits_to_keep=1, use_cache=False):
            streams = nnsight.save([])
            for layer in model.layers:
                streams.append(layer.input[:, -1])
            streams.append(model.layers[-1].output[:, -1])
        columns = read.columns(part)
        base = _unembed(model, streams[-1], columns)
        found.append(torch.stack([read(_unembed(model, x, columns), part, base).cpu() for x in streams]))
    return torch.cat(found, dim=1)


def _unembed(model, x: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """`[prompt, d_model]` -> logits `[prompt, column]` float32 through the model's own final norm."""
    unembed, final = model.unembed._module, model.final_norm._module
    x = final(x.to(next(final.parameters(), unembed.weight).device)).to(unembed.weight.device)
    if columns is None:
        return finished(model, unembed(x).float())
    rows, bias = _unembedding(model, columns, x.device)
    return finished(model, torch.einsum("pm,pcm->pc", x.float(), rows) + bias)
