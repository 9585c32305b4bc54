"""The attention call, made readable.

transformers lets a model take its attention function by name. *heads* registers one under the
name `heads`: SDPA as long as nobody looks, and the explicit pattern where somebody does. Nothing
else about the model changes, so reading a pattern never needs a second, eager copy of the model,
and a prompt of any length is prefilled without a `[head, position, position]` tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import softmax
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "heads"


def _group(x: torch.Tensor, n_kv: int) -> torch.Tensor:
    """Query heads by the key-value head they read: [batch, head, q, d] -> [batch, kv, group * q, d]."""
    return x.reshape(x.shape[0], n_kv, -1, x.shape[-1])


def pattern(module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None, scaling: float | None = None,
            softcap: float | None = None, is_causal: bool | None = None, s_aux: torch.Tensor | None = None,
            pattern_override: torch.Tensor | None = None,
            **_: Any) -> torch.Tensor:  # fmt: skip
    """The attention pattern of one call, as the eager formula gives it.

    Args:
        module: the attention module (its `layer_idx` and `is_causal` are read).
        query: `[batch, head, query, d_head]`, after rotary embedding and norms.
        key: `[batch, kv_head, key, d_head]`; marked with what is kept before it, if anything (`heads.model.prefix`).
        mask: boolean (True = visible) or additive `[batch, 1 or head, query, key]`, or None.
        scaling: factor on the logits; `d_head ** -0.5` if None.
        softcap: cap of the logits through `tanh`, if the model has one.
        s_aux: `[head]`, the logit of a sink in every row, if the model has one (gpt-oss): it takes its share and gives nothing.
        pattern_override: what an edit has put in place of all that.

    Returns:
        `[batch, head, query, key]`; rows sum to one, with a sink to what it leaves. Softmax in float32, then the query's dtype.
    """
    if pattern_override is not None:
        return pattern_override.clone()  # the next edit changes its own
    n_kv, n_query = key.shape[1], query.shape[2]
    q = _group(query, n_kv)
    logits = q @ key.transpose(-1, -2)
    if (prefix := getattr(key, "prefix", None)) is not None:
        logits = torch.cat([prefix.logits(q), logits], dim=-1)
    logits = logits.reshape(query.shape[0], -1, n_query, logits.shape[-1])
    logits = logits * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and n_query > 1 and causal:  # SDPA was told so by a flag instead of a mask
        mask = torch.ones(n_query, logits.shape[-1], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], dim=-1)
    weights = softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights if s_aux is None else weights[..., :-1]


def call_of(inputs: tuple) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor | None, dict]:
    """What an attention call is given: module, query, key, mask (which some name), and its other keywords."""
    (module, query, key), kwargs = inputs[0][:3], dict(inputs[1])
    return module, query, key, inputs[0][4] if len(inputs[0]) > 4 else kwargs.pop("attention_mask", None), kwargs


def mix(weights: torch.Tensor, value: torch.Tensor, prefix: Any = None) -> torch.Tensor:
    """Values mixed by a pattern: `[batch, head, query, key]`, `[batch, kv_head, key, d_head]` ->
    `[batch, query, head, d_head]`. `prefix` mixes what is kept before these values."""
    w, n = _group(weights, value.shape[1]), weights.shape[-1] - value.shape[2]
    z = w @ value if prefix is None else prefix.mix(w[..., :n]) + w[..., n:] @ value
    return z.reshape(weights.shape[0], -1, weights.shape[2], z.shape[-1]).transpose(1, 2).contiguous()


def attention(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
              dropout: float = 0.0, *, pattern_override: torch.Tensor | None = None,
              **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """transformers' attention interface: SDPA, or explicit weights where SDPA cannot do what is asked.

    What is ours comes by keyword only: some libraries that wrap every registered attention hand `dropout` on by position.
    A cache layer that keeps other tokens for every head marks the keys with itself and computes the call (`prefix.attend`).

    `pattern_override` (`[batch, head, query, key]`) replaces the pattern: what an edit of
    `layers[i].attn.pattern` becomes. For replays outside a trace the module's own `_edit(query, key, value)`, if it has
    one, gives what is used in their place: not every architecture hands on the keywords of a layer.
    Returns (`[batch, query, head, d_head]`, pattern or None).
    """
    prefix = getattr(key, "prefix", None)
    if (edit := module.__dict__.get("_edit")) is not None:
        query, key, value = edit(query, key, value)
        if prefix is not None:
            key.prefix = prefix  # a changed copy stands behind the same prefix
    weights = pattern_override
    if weights is None:
        if (attend := getattr(prefix, "attend", None)) is not None:
            return attend(module, query, key, value, attention_mask, **kwargs), None
        if prefix is None and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)
        weights = pattern(module, query, key, attention_mask, **kwargs)
    return mix(weights, value, prefix), weights


@contextmanager
def _computed_by(module: torch.nn.Module, name: str) -> Iterator[None]:
    """While it lasts, the model takes another attention function."""
    module.set_attn_implementation(name)
    try:
        yield
    finally:
        module.set_attn_implementation(NAME)


@contextmanager
def watched(module: torch.nn.Module, see: Callable) -> Iterator[None]:
    """While it lasts, `see(query, key, value, scaling, z)` is told of every attention call of this model, in order."""

    def watching(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        out = attention(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)
        see(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, out[0])
        return out

    AttentionInterface.register("heads-watched", watching)
    AttentionMaskInterface.register("heads-watched", sdpa_mask)
    with _computed_by(module, "heads-watched"):
        yield


@torch.no_grad()
def plain_logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (without a head for them: hidden states) of one whole forward with transformers' own eager attention:
    nothing of ours takes part in it."""
    with _computed_by(module, "eager"):
        return module(input_ids=ids)[0]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
