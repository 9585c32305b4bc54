"""Identities that every model passes before it is handed out.

They are what makes a number about a head trustworthy, they cost milliseconds, and the commonest
mistake of the field (slicing the attention's output after the heads were mixed) fails the second.
"""

from __future__ import annotations

import nnsight
import torch

from heads.model.attention import plain_logits
from heads.model.weights import head_outputs, output_projection, projection, projection_envoy


class IdentityError(ValueError):
    """A model does not behave as its anatomy says; the message names the identity and the layer."""


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float, otherwise: str) -> float:
    """Largest difference in units of the larger one's scale and the tolerance. Above 1 it is an error."""
    scale = max(a.abs().max().item(), b.abs().max().item(), 1e-6)
    error = (a.float() - b.float()).abs().max().item() / (scale * tolerance)
    if error != error:
        raise IdentityError("what the model computes is no number: its weights are not finite, or too large for their dtype")
    if not error <= 1:
        raise IdentityError(f"{otherwise} ({error:.1f} times the tolerance)")
    return error


def identities(model) -> dict[str, float]:
    """Run the checks; returns how far each was from exact, as a share of its tolerance.

    1. *sum*: in every layer the heads, each through its slice of the output projection, sum to what
       the projection puts out.
    2. *knock-out*: zeroing a head gives the logits of a model whose weights for that head are zero.
    3. *no-op*: writing back what was read changes no logit, to the bit.
    4. *pattern*: zeroing the patterns of all layers gives the logits of zeroing their heads: an edit reaches them.
    5. *plain*: the logits are those of transformers' own eager attention; in a decoder no token sees what follows it.

    Raises:
        IdentityError: naming the identity that failed, by how much, and where.
    """
    anatomy, size = model.anatomy, model.config.get_text_config().vocab_size
    # spread over the vocabulary, so that neighbouring rows of an embedding table do not matter
    ids = torch.linspace(1, size - 1, 6, device=model.device).long()[None]
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2}.get(model._module.dtype, 4e-2)
    layer = anatomy.attention_layers[len(anatomy.attention_layers) // 2]
    with torch.no_grad():
        clean = _logits(model, ids)
        return {
            "sum": _sum(model, ids, tolerance),
            "knock-out": _knock_out(model, ids, tolerance, layer, head=anatomy.n_heads - 1),
            "no-op": _no_op(model, ids, clean),
            "pattern": _pattern(model, ids, tolerance),
            "plain": _plain(model, ids, clean, tolerance),
        }


def _sum(model, ids, tolerance) -> float:
    z, out, q = [], [], []
    with model.trace(ids):
        for i in model.anatomy.attention_layers:
            q.append(model.layers[i].attn.q.shape)
            z.append(model.layers[i].attn.heads.clone())
            out.append(projection_envoy(model, i).output.clone())
        nnsight.save(q), nnsight.save(z), nnsight.save(out)
    worst = 0.0
    for i, q_shape, z_i, out_i in zip(model.anatomy.attention_layers, q, z, out, strict=True):
        expected = (model.anatomy.n_heads, model.anatomy.d_head)
        for what, shape in (("queries", q_shape), ("heads", z_i.shape)):
            if tuple(shape[2:]) != expected:
                found = tuple(shape[2:])
                raise IdentityError(f"layer {i}: the {what} are {found} (heads, d_head), the config says {expected}")
        bias = projection(model, i).bias
        summed = head_outputs(model, i, z_i).sum(-2) + (0 if bias is None else bias)
        worst = max(worst, _same(summed, out_i, tolerance, f"layer {i}: the heads do not sum to the attention output"))
    return worst


def _logits(model, ids, edit=lambda layers: None) -> torch.Tensor:
    with model.trace(ids):
        edit(model.layers)
        logits = model.output[0].save()  # of an encoder without a head that predicts words: its last hidden states
    return logits


def _knock_out(model, ids, tolerance, layer: int, head: int) -> float:
    def silence(layers):
        layers[layer].attn.heads[:, :, head] = 0

    edited = _logits(model, ids, silence)
    rows = output_projection(model, layer)[head * model.anatomy.d_head :][: model.anatomy.d_head]
    kept = rows.clone()
    try:
        rows.zero_()
        knocked = _logits(model, ids)
    finally:
        rows.copy_(kept)
    return _same(edited, knocked, tolerance, f"zeroing head ({layer}, {head}) is not knocking out its weights: "
                 "the edit does not reach the model where the head is")  # fmt: skip


def _pattern(model, ids, tolerance) -> float:
    def empty(layers):
        for i in model.anatomy.attention_layers:
            layers[i].attn.pattern = torch.zeros_like(layers[i].attn.pattern)

    def silence(layers):
        for i in model.anatomy.attention_layers:
            layers[i].attn.heads[:] = 0

    return _same(_logits(model, ids, empty), _logits(model, ids, silence), tolerance,
                 "zeroing the patterns of all layers is not zeroing their heads: an edit of a pattern does not reach them")  # fmt: skip


def _plain(model, ids, clean, tolerance) -> float:
    plain = plain_logits(model._module, ids)
    if not model.anatomy.encoder:
        other = ids.clone()
        other[:, -1] -= 1
        _same(plain[:, :-1], plain_logits(model._module, other)[:, :-1], tolerance,
              "tokens see what follows them: a bidirectional model is not supported as a decoder")  # fmt: skip
    return _same(clean, plain, tolerance, "the logits are not those of transformers' own attention")


def _no_op(model, ids, clean) -> float:
    def rewrite(layers):
        for i in model.anatomy.attention_layers:
            layers[i].attn.heads[:] = layers[i].attn.heads.clone()

    if not torch.equal(clean, _logits(model, ids, rewrite)):
        raise IdentityError("writing every head back as it was read changes the logits")
    return 0.0
