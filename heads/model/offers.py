"""What is right for a loaded model, found out by comparing with its own modules: the readouts of weights, the replay.

Heads, patterns and edits are checked when a model is loaded (`heads.model.checks`). What is read from weights assumes more
of a layer, and is held here against what the layer does to single tokens, and to one short prompt, once per module. What
does not hold is refused by name; the rest is offered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from heads.model import prefix
from heads.model.attention import watched
from heads.model.weights import (
    decoder_only, finished, hooked, input_norm, kv_head, mlp_norm, post_norms, project, projection, qk_fold, qk_norms,
    qk_scale,
)  # fmt: skip

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2}  # of the largest number compared; 5e-2 in bfloat16


def require(model, *names: str) -> None:
    """Refuse what is not right for this model. ValueError says what was compared, where, and how far off it is."""
    decoder_only(model)
    for name in names:
        if why := offered(model)[name]:
            raise ValueError(f"{name!r} is not offered for this {model.anatomy.family} model: {why}")


def offered(model) -> dict[str, str]:
    """name -> "" if it is right for this model, or why it is refused."""
    module = model._module
    if "_offered" not in module.__dict__:
        with torch.no_grad():
            seen = _seen(model)
            module.__dict__["_offered"] = {name: _why(check, model, seen) for name, check in CHECKS.items()}
    return module.__dict__["_offered"]


def summary(model) -> str:
    """One sentence about a model of a family without a row."""
    if model.anatomy.encoder:
        return f"{model.anatomy.family} is not a listed family; it loads, and its heads were checked"
    found = offered(model)
    right, wrong = ([name for name in found if bool(found[name]) is refused] for refused in (False, True))
    return (f"{model.anatomy.family} is not a listed family; it loads. Checked: heads, patterns, edits, {', '.join(right)}; "
            f"not offered: {', '.join(wrong) or 'nothing of what is checked'}")  # fmt: skip


def _why(check: Callable, model, seen: dict) -> str:
    try:
        pairs = check(model, seen)
        tolerance = TOLERANCE.get(model._module.dtype, 5e-2)
        for where, ours, theirs in pairs:
            if ours.shape != theirs.shape:
                return f"{where} has another shape"
            scale = max(theirs.abs().max().item(), 1e-6)
            error = (ours.float() - theirs.float()).abs().max().item() / scale
            if not error <= tolerance:
                return f"{where} is off by {error:.0%}"
    except (ValueError, AttributeError, TypeError, RuntimeError, LookupError) as error:  # laid out in another way
        said = str(error).splitlines()[0]
        return said if type(error) is ValueError else f"its parts are laid out in another way ({said})"
    return ""


def _seen(model) -> dict:
    """What every layer is given and gives, of three prompts of one token each: lists of `[token, ...]` over layers ("x",
    "out", "mlp", "mlp_in") or over attention layers."""
    module, a = model._module, model.anatomy
    size = model.config.get_text_config().vocab_size
    ids = torch.linspace(size // 7, size - 2, 3, device=model.device).long()[:, None]
    seen = {key: [] for key in ("x", "z", "q", "k", "v", "mixed", "attn", "mlp_in", "mlp", "out")}

    def keep(key, value):
        seen[key].append((value[0] if isinstance(value, tuple) else value).reshape(3, -1))

    def call(module, args, kwargs):
        keep("x", args[0] if args else kwargs["hidden_states"])

    def see(query, key, value, scaling, mixed):
        seen["q"].append(query[:, :, 0].float() * scaling)
        seen["k"].append(key[:, :, 0].float())
        seen["v"].append(value[:, :, 0])
        seen["mixed"].append(mixed[:, 0])

    hooks = []
    for i, layer in enumerate(model.layers):
        hooks += [
            (layer._module.register_forward_pre_hook, call, {"with_kwargs": True}),
            (layer._module.register_forward_hook, lambda m, args, out: keep("out", out), {}),
        ]
        if i not in a.bare:
            hooks += [
                (projection(model, i).register_forward_pre_hook, lambda m, args: keep("z", args[0]), {}),
                (layer.attn._module.register_forward_hook, lambda m, args, out: keep("attn", out), {}),
            ]
        if (mlp := getattr(layer, "mlp", None)) is not None:
            hooks += [
                (mlp._module.register_forward_pre_hook, lambda m, args: keep("mlp_in", args[0]), {}),
                (mlp._module.register_forward_hook, lambda m, args, out: seen["mlp"].append(out), {}),
            ]
    with hooked(*hooks), watched(module, see):
        seen["logits"] = module(input_ids=ids).logits[:, -1]
    seen["z"] = [z.unflatten(-1, (a.n_heads, -1)) for z in seen["z"]]
    return {**seen, "ids": ids[:, 0]}


# ------------------------------------------------------------- checks: (where, ours, theirs) for all that is compared


def _ov(model, seen: dict):
    """The values are N(x) W_V, and what the pattern makes of them enters the output projection as it is."""
    for i, v, mixed, z in zip(model.anatomy.attention_layers, seen["v"], seen["mixed"], seen["z"], strict=True):
        weight, bias = project(model, i, "v")
        ours = torch.einsum("tm,hmd->thd", input_norm(model, i)(seen["x"][i]), weight)
        yield f"N(x) W_V of layer {i}, against its values,", ours if bias is None else ours + bias, v
        yield f"what enters the output projection of layer {i}, against pattern times values,", mixed, z


def _qk(model, seen: dict):
    """Entry by entry, queries times keys are N(x) W_Q times N(x) W_K, up to a positive factor where a norm divides."""
    heads = range(model.anatomy.n_heads)
    kv = [kv_head(model, head) for head in heads]
    for i, their_q, their_k in zip(model.anatomy.attention_layers, seen["q"], seen["k"], strict=True):
        x = input_norm(model, i)(seen["x"][i])
        (w_q, b_q), (w_k, b_k) = project(model, i, "q"), project(model, i, "k")
        q, k = torch.einsum("tm,hmd->thd", x, w_q), torch.einsum("tm,hmd->thd", x, w_k)
        q, k = q if b_q is None else q + b_q, k if b_k is None else k + b_k
        ours = (q * qk_fold(model, i) * qk_scale(model, i))[:, None] * k[None][:, :, kv]  # [query, key, head, d_head]
        theirs = their_q[:, None] * their_k[None][:, :, kv]
        if qk_norms(model, i):
            ours, theirs = (y / y.norm(dim=-1, keepdim=True) for y in (ours, theirs))
        yield f"queries times keys of layer {i}, against N(x) W_Q and N(x) W_K,", ours, theirs


def _embedding(model, seen: dict):
    """Two tokens enter the first layer as far apart as their embeddings are (what is added to all, GPT-2's position, aside)."""
    e = model._module.get_input_embeddings()(seen["ids"])
    yield "what enters the first layer, against the embeddings,", e[1:] - e[:1], seen["x"][0][1:] - seen["x"][0][:1]


def _mlp(model, seen: dict):
    """What every MLP puts out is one tensor `[batch, position, d_model]`, and all that stands behind it is added."""
    if len(seen["mlp"]) != model.anatomy.n_layers:
        raise ValueError("its layers have no part called mlp: add a row to heads.model.families.FAMILIES")
    for i, (x, mlp) in enumerate(zip(seen["x"], seen["mlp"])):
        if not isinstance(mlp, torch.Tensor) or mlp.shape != (len(x), 1, x.shape[1]):
            raise ValueError(f"the MLP of layer {i} puts out something else than [batch, position, d_model]")
    return ()


def _mlp0(model, seen: dict):
    """The first MLP reads the stream through its norm, and what it gives, through its own, is what the layer adds."""
    if 0 in model.anatomy.bare:
        raise ValueError("its first layer has no heads")
    x, attn, mlp_in, mlp, out = (seen[key][0] for key in ("x", "attn", "mlp_in", "mlp", "out"))
    if mlp_in.shape != x.shape:
        raise ValueError("its MLP is not one module that reads the stream")
    mlp = mlp.reshape(x.shape)
    after_attn, after_mlp = (post or torch.nn.Identity() for post in post_norms(model, 0))
    middle = x + after_attn(attn)
    reads = [mlp_norm(model, 0)(y) for y in (middle, x)]  # one after the other, or side by side
    yield "what the first MLP reads, against its norm of the stream,", min(reads, key=lambda y: (y - mlp_in).abs().max()), mlp_in
    yield "what the first layer adds, against its attention and its MLP,", after_mlp(mlp), out - middle


def _readout(model, seen: dict):
    """The last stream through final norm, unembedding, scale and cap gives the model's logits."""
    if len(seen["out"]) != model.anatomy.n_layers:
        raise ValueError("not every layer of it runs on text alone")
    ours = finished(model, model.unembed._module(model.final_norm._module(seen["out"][-1])))
    yield "the last stream through final norm and unembedding, against the logits,", ours, seen["logits"]


def _prefix(model, seen: dict):
    """A prompt whose beginning is kept once, against one whole plain forward."""
    prefix.agrees(model)
    return ()


CHECKS = {"ov": _ov, "qk": _qk, "embedding": _embedding, "mlp": _mlp, "mlp0": _mlp0, "readout": _readout, "prefix": _prefix}
