"""What a head owns in the weights, and where: its rows and columns, the norms around it, the hook at its projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from nnsight import Envoy
from torch import nn

from heads.model.families import Family, family_of


def row_of(model) -> Family:
    """The row of a loaded model's family."""
    return family_of(model.config)


def decoder_only(model) -> None:
    """Refuse an encoder, loaded or a module of transformers. ValueError says why."""
    if row_of(model).encoder:
        raise ValueError(f"{model.config.model_type} is an encoder: its END predicts nothing. Use a decoder")


def check_length(model, n: int, kept: int = 0) -> None:
    """Say so where a run of n tokens, cached ones included, is longer than the context of a model (or of a module).

    Raises:
        ValueError: where positions are learnt one by one (GPT-2, BERT): there are no more. Rotary positions go on, to where
        the model was never trained: a warning, once.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or n
    if "roberta" in config.model_type:  # whose positions begin behind the number of the padding token
        context -= config.pad_token_id + 1
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in ropes.values() if ropes and all(isinstance(x, dict) for x in ropes.values()) else [ropes]:
        kind, limit = rope.get("rope_type"), rope.get("original_max_position_embeddings") or context
        if kept and n > limit and (kind == "dynamic" or kind == "longrope" and kept <= limit):
            raise ValueError(f"rotary positions of this {config.model_type} model change behind {limit} tokens: what was kept of the "
                             f"first {kept} is not that of a run of {n}; run whole prompts")
    if n <= context:
        return
    what = f"the {context} of this {config.model_type} model's context"
    if not getattr(config, "rope_parameters", None):
        raise ValueError(f"{n} tokens are more than {what}: cut the prompt")
    warnings.warn(f"a run has more tokens than {what}: what it says behind them was never trained", stacklevel=3)


def heads_everywhere(model) -> None:
    """Refuse a model in which only some layers have heads. ValueError names them."""
    if model.anatomy.bare:
        raise ValueError(
            f"only layers {model.anatomy.attention_layers} of this {model.anatomy.family} model have heads, and this reads every "
            "layer: read and cut those in a trace, or by ablate"
        )


@contextmanager
def hooked(*hooks: tuple[Callable, Callable, dict]) -> Iterator[None]:
    """Torch hooks for the length of a `with`: (register, function, keywords) each."""
    with ExitStack() as stack:
        for register, function, keywords in hooks:
            stack.callback(register(function, **keywords).remove)
        yield


# ---------------------------------------------------------------------------------- projections


def transposed(module: nn.Module) -> bool:
    """Whether the weight is [in, out], as GPT-2's Conv1D keeps it; one that is being tuned is a subclass."""
    return any(kind.__name__ == "Conv1D" for kind in type(getattr(module, "base_layer", module)).__mro__)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight that a projection applies, `[in, out]`, an active adapter of peft included."""
    base = getattr(module, "base_layer", module)
    weight = base.weight
    if base is not module and not (module.merged or module.disable_adapters):
        weight = weight + sum(module.get_delta_weight(name) for name in module.active_adapters)
    return weight if transposed(module) else weight.T


def projection(model, layer: int | Envoy) -> nn.Module:
    """The module of a layer's output projection, whose input is the heads. `layer`: an index, or the layer's envoy."""
    if not isinstance(layer, Envoy):
        ((layer, _),) = model.anatomy.check([(layer, 0)])
        layer = model.layers[layer]
    return layer.attn._module.get_submodule(row_of(model).proj)


def output_projection(model, layer: int | Envoy) -> torch.Tensor:
    """Weight of a layer's output projection, `[n_heads * d_head, d_model]` (rows are head inputs).

    Args:
        layer: an index, or the layer's envoy.
    """
    return weight_of(projection(model, layer))


def projection_envoy(model, layer: int) -> Envoy:
    """The envoy of a layer's output projection (its `.output` is the sum over heads, plus bias)."""
    envoy = model.layers[layer].attn
    for part in row_of(model).proj.split("."):
        envoy = envoy.E_output if part == "output" and hasattr(envoy, "E_output") else getattr(envoy, part)
    return envoy


def head_outputs(model, layer: int, z: torch.Tensor) -> torch.Tensor:
    """What each head writes: `[..., head, d_head]` -> `[..., head, d_model]`, without the bias.

    Their sum over heads plus the projection's bias is the attention's output. In models that
    normalise after the projection (Gemma 2 and 3) this is before that norm, and a head's share of
    the residual stream is not additive.
    """
    weight, expected = output_projection(model, layer), (model.anatomy.n_heads, model.anatomy.d_head)
    if tuple(z.shape[-2:]) != expected:
        raise ValueError(f"z is {list(z.shape)}, expected [..., head, d_head] with {list(expected)}")
    weight = weight.view(*expected, -1)
    return torch.einsum("...hd,hdm->...hm", z, weight)


def _caller(model, layer: int) -> nn.Module:
    """The module whose forward makes a layer's attention call: it holds queries, keys, values and their norms."""
    return model.layers[layer].attn._module.get_submodule(row_of(model).call)  # "" is the attention itself


def parts(model, layer: int) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Where a layer keeps its heads: "q", "k", "v", "o" -> (module, features `[head or kv_head, d_head]` of its output;
    for "o" of its input).

    Raises:
        ValueError: if the layer is not laid out as its family's row says.
    """
    anatomy, row, caller = model.anatomy, row_of(model), _caller(model, layer)
    n, n_kv, d = anatomy.n_heads, anatomy.n_kv_heads, anatomy.d_head
    counts = (n, n_kv, n_kv)
    if missing := [name for name in row.qkv if not hasattr(caller, name)]:
        raise ValueError(f"layer {layer} of a {anatomy.family} model has no {missing[0]}: how it keeps queries, keys and "
                         "values is not known; add a row to heads.model.families.FAMILIES")  # fmt: skip
    modules = [getattr(caller, name) for name in row.qkv]
    blocks = torch.arange(sum(counts) * d).view(-1, d).split(counts)
    if not row.fused:
        blocks = [torch.arange(m * d).view(m, d) for m in counts]
    elif row.fused == "groups":
        q, k, v = torch.arange(sum(counts) * d).view(n_kv, -1, d).split((n // n_kv, 1, 1), 1)
        blocks = [part.flatten(0, 1) for part in (q, k, v)]
    if sum(weight_of(module).shape[1] for module in modules) != sum(counts) * d:
        raise ValueError(f"layer {layer} of a {anatomy.family} model: q, k and v are not {counts} heads of {d}")
    found = dict(zip("qkv", zip(modules if len(modules) == 3 else modules * 3, blocks)))
    return {**found, "o": (projection(model, layer), torch.arange(n * d).view(n, d))}


def project(model, layer: int, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `[head, d_model, d_head]` and bias `[head, d_head]` of queries, keys or values ("q", "k", "v") in float32;
    `head` counts key-value heads for keys and values."""
    module, rows = parts(model, layer)[part]
    weight, bias = weight_of(module).detach().float(), module.bias
    rows = rows.to(weight.device)
    return weight[:, rows].permute(1, 0, 2), None if bias is None else bias.detach().float()[rows]


def kv_head(model, head: int) -> int:
    """The key-value head that a query head reads."""
    return head * model.anatomy.n_kv_heads // model.anatomy.n_heads


# ----------------------------------------------------------------------------------------- norms


@dataclass(frozen=True)
class Norm:
    """A layer or RMS norm with its parts told apart, in float32: N(x) = weight * centre(x) / scale(x) + bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    centred: bool
    eps: float

    def centre(self, x: torch.Tensor) -> torch.Tensor:
        """x less its mean, where the norm takes it away."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_model]` -> `[..., 1]`, what the norm divides by."""
        return (self.centre(x.float()).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight * self.centre(x.float()) / self.scale(x)
        return y if self.bias is None else y + self.bias

    def back(self, u: torch.Tensor) -> torch.Tensor:
        """The direction before the norm that reads u after it: <N(x), u> = <x, back(u)> / scale(x) + <bias, u>."""
        return self.centre(self.weight * u.to(self.weight.device))


def norm(module: nn.Module) -> Norm:
    """The parts of a norm. ValueError if the module does something else than they say."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((getattr(module, key) for key in ("eps", "variance_epsilon") if hasattr(module, key)), None)
    if weight is not None and weight.dim() == 1 and eps is not None:
        weight, bias = weight.detach().float(), None if bias is None else bias.detach().float()
        x = torch.linspace(-1, 2, len(weight), device=weight.device).to(module.weight.dtype)[None]
        with torch.no_grad():
            theirs = module(x).float()
            tried = [Norm(factor, bias, centred, eps) for factor, centred in product((weight, 1 + weight), (False, True))]
            # the nearest, not the first that is near: Gemma's factor is one more than what it keeps, and beside its
            # largest (162 in the 270M model) one more is little
            off = [float((theirs - candidate(x)).abs().max()) for candidate in tried]
            if min(off) <= 0.02 * theirs.abs().max():
                return tried[off.index(min(off))]
    raise ValueError(f"{type(module).__name__} is no layer or RMS norm as heads knows them: this readout is not offered")


def qk_norms(model, layer: int) -> tuple[nn.Module, nn.Module] | None:
    """The norms of a layer's queries and keys, where there are any."""
    caller, names = _caller(model, layer), row_of(model).qk_norms
    return tuple(getattr(caller, name) for name in names) if hasattr(caller, names[0]) else None


def qk_fold(model, layer: int) -> torch.Tensor:
    """What the norms' weights multiply queries times keys with, `[head, d_head]`; ones where there are no such norms."""
    a = model.anatomy
    found, kv = qk_norms(model, layer), [kv_head(model, head) for head in range(a.n_heads)]
    q, k = (norm(module).weight.view(-1, a.d_head) for module in found) if found else (torch.ones(1, a.d_head),) * 2
    return (q * (k[kv] if len(k) > 1 else k)).expand(a.n_heads, -1).to(model.device)


def qk_scale(model, layer: int) -> float:
    """The factor of attention logits."""
    return getattr(_caller(model, layer), "scaling", None) or model.anatomy.d_head**-0.5


def input_norm(model, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm before a layer's attention; the stream itself where there is none (OLMo 2 and 3)."""
    name = row_of(model).norms[0]
    return norm(_below(model, layer, name, "norm before the attention")) if name else torch.Tensor.float


def mlp_norm(model, layer: int) -> nn.Module:
    """The norm before a layer's MLP."""
    name = row_of(model).norms[1]
    return _below(model, layer, name, "norm before the MLP") if name else nn.Identity()


def post_norms(model, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms that Gemma 2 and 3, OLMo 2 and 3 put on what attention and MLP write; (None, None) elsewhere."""
    names = row_of(model).post_norms
    return tuple(_below(model, layer, name, "norm") for name in names) if names else (None, None)


def _below(model, layer: int, name: str, what: str) -> nn.Module:
    module = model.layers[layer]._module
    if not hasattr(module, name):
        raise ValueError(f"no {what} in {type(module).__name__} (looked for {name}): this architecture is not supported yet")
    return getattr(module, name)


# -------------------------------------------------------------------------------------- unembedding


# What some models do to logits before they hand them out: the config's name of a factor, or of a divisor
SCALES = {"logit_scale": lambda x: x, "logits_scaling": lambda x: 1 / x, "lm_head_multiplier": lambda x: x}


def finished(model, logits: torch.Tensor) -> torch.Tensor:
    """What the unembedding gives as the model hands it out: scaled (Cohere, Granite), or squeezed by `tanh` (Gemma 2)."""
    config = model.config.get_text_config()
    for name, factor in SCALES.items():
        if getattr(config, name, None) is not None:
            logits = logits * factor(getattr(config, name))
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def unembedding(model, ids: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    """Unembedding of tokens as directions in the residual stream, `[..., d_model]` float32, final norm's weight folded in
    and, for a layer, that of the norm which Gemma 2 and 3 put on what its attention writes."""
    rows = model.unembed._module.weight.detach()
    found = norm(model.final_norm._module).back(rows[ids.to(rows.device)].float())
    post = None if layer is None else post_norms(model, layer)[0]
    return found if post is None else norm(post).back(found)
