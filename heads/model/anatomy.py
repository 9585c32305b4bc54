"""One vocabulary for every architecture.

Every supported model answers to the same names inside an nnsight trace:

    model.layers[i].attn.q       [batch, position, head, d_head]     after norms and rotary embedding
    model.layers[i].attn.k .v    [batch, key, kv_head, d_head]       cached positions included
    model.layers[i].attn.pattern [batch, head, query, key]
    model.layers[i].attn.heads   [batch, position, head, d_head]     what enters the output projection
    model.layers[i].mlp  .layers[i].output (residual stream)  .final_norm  .unembed  .logits

They are read in this order, and all of them may be edited in place or assigned. A head is what
enters the output projection, never a slice of what leaves it: after the projection the heads are
mixed, and a slice of the sum is no head's.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator

from heads.model.attention import call_of
from heads.model.attention import pattern as attention_pattern
from heads.model.families import family_of, windows
from heads.model.weights import output_projection

Head = tuple[int, int]


class Located(eproperty):
    """An eproperty whose place differs between architectures: its key names an attribute of the
    envoy that holds the path below the attention module."""

    def _location(self, obj):
        return f"{obj.path}.{getattr(obj, self.key)}"


class Argument(Located):
    """One argument of the attention call, `[batch, head, position, d_head]` there, handed out by position."""

    def __init__(self, which: int, description: str):
        super().__init__(key="call_input", description=description)
        self.which = which
        self(self._read).transform(self._keep)
        self.postprocess(lambda obj, value: self._put(obj._raw(self), value))

    def __set_name__(self, owner, name):
        self.name = name

    def _read(self, obj, value) -> torch.Tensor:
        args = value[0]
        if self.which != 1 and hasattr(args[2], "prefix"):
            raise NotImplementedError(
                "keys and values that a cache shares between conditions, or holds for every head by itself, cannot be read one "
                "by one; read q, pattern or heads, or run the condition alone with heads.ablate(...)"
            )
        # keys and values belong to the KV cache: hand out a copy, so that an edit stays in this pass
        view = (args[self.which] if self.which == 1 else args[self.which].clone()).transpose(1, 2)
        obj.__dict__["_version", self.which] = None if view.is_inference() else view._version
        return view

    def _keep(self, obj, view: torch.Tensor, raw):
        """What was handed out goes back, changed in place or not; as a mere reading it changes nothing."""
        before = obj.__dict__.get(("_version", self.which))
        return raw if before is not None and view._version == before and self.which == 1 else self._put(raw, view, before)

    def _put(self, value, view: torch.Tensor, before: int | None = None):
        args, kwargs = value
        if self.which != 3 and kwargs.get("pattern_override") is not None and (before is None or view._version != before):
            raise NotImplementedError(
                f"the pattern of this layer was edited before, so an edit of {self.name} would change nothing: edit {self.name} "
                "first, or the pattern again"
            )
        return (*args[: self.which], view.transpose(1, 2), *args[self.which + 1 :]), kwargs


class Attention(Envoy):
    """The attention module of one layer, with its heads. See the module's docstring for shapes."""

    # set by `bind` for each layer
    call_input: str  # the attention call inside the forward: (module, q, k, v, mask), {scaling, ...}
    proj_input: str  # the input of the output projection
    n_heads: int

    q = Argument(1, "queries [batch, position, head, d_head], as they meet the keys")
    k = Argument(2, "keys [batch, key, kv_head, d_head], cached ones included")
    v = Argument(3, "values [batch, key, kv_head, d_head], cached ones included")

    def _raw(self, prop: Located):
        return Mediator.value(prop._location(self))

    @Located(key="call_input", description="attention pattern [batch, head, query, key]; rows sum to one")
    def pattern(self, value: tuple) -> torch.Tensor:
        module, q, k, mask, kwargs = call_of(value)
        weights = attention_pattern(module, q, k, mask, **kwargs)
        weights = weights.clone() if weights.requires_grad else weights  # softmax keeps its own for the way back
        self.__dict__["_pattern_version"] = None if weights.is_inference() else weights._version
        return weights

    @pattern.transform
    def pattern(self, view: torch.Tensor, raw: tuple) -> tuple:
        # A pattern that was only read leaves the pass to SDPA, to the bit. An inference tensor counts no versions: it is
        # taken as edited, which is always correct.
        before = self.__dict__.get("_pattern_version")
        return raw if before is not None and view._version == before else self._override(raw, view)

    @pattern.postprocess
    def pattern(self, value: torch.Tensor) -> tuple:
        return self._override(self._raw(Attention.pattern), value)

    @staticmethod
    def _override(raw, weights: torch.Tensor):
        now = Mediator.current("pattern")
        if now.batch_group is not None and now.interleaver.batcher.batching:  # nnsight puts back rows of what was there
            raise NotImplementedError(
                "a pattern cannot be edited in one of several invokes: edit it in a trace of its own, or edit q or heads"
            )
        return raw[0], {**raw[1], "pattern_override": weights}

    @Located(key="proj_input", description="heads [batch, position, head, d_head], before the output projection")
    def heads(self, value: tuple) -> torch.Tensor:
        x = value[0][0]
        return x.view(*x.shape[:-1], self.n_heads, -1)

    @heads.transform
    def heads(self, view: torch.Tensor, raw: tuple) -> tuple:
        return (view.flatten(-2), *raw[0][1:]), raw[1]

    @heads.postprocess
    def heads(self, value: torch.Tensor) -> tuple:
        args, kwargs = self._raw(Attention.heads)
        return (value.flatten(-2), *args[1:]), kwargs


@dataclass(frozen=True)
class Anatomy:
    """Counts of a model's parts. `windows[i]` is the sliding window of layer i in tokens (in an encoder: on
    either side), None where the layer sees everything. `bare`: layers that mix positions in another way than by
    attention (Qwen3-Next's linear ones) and have no heads."""

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    windows: tuple[int | None, ...]
    encoder: bool = False
    bare: tuple[int, ...] = ()

    def __str__(self):
        kv = "" if self.n_kv_heads == self.n_heads else f" ({self.n_kv_heads} key-value heads)"
        local = sum(w is not None for w in self.windows)
        windows = f", {local} layers with a sliding window of {min(w for w in self.windows if w)}" if local else ""
        only = f" (heads in layers {', '.join(map(str, self.attention_layers))} only)" if self.bare else ""
        return f"{self.family}: {self.n_layers} layers x {self.n_heads} heads{kv}, d_head {self.d_head}{windows}{only}"

    __repr__ = __str__

    @property
    def n(self) -> int:
        """Number of heads in the whole model."""
        return len(self.attention_layers) * self.n_heads

    @property
    def attention_layers(self) -> list[int]:
        """Layers with heads."""
        return [i for i in range(self.n_layers) if i not in self.bare]

    @property
    def full_layers(self) -> list[int]:
        """Layers without a sliding window: the only ones that can look arbitrarily far back."""
        return [i for i, w in enumerate(self.windows) if w is None]

    def check(self, heads: Iterable) -> list[Head]:
        """The heads as a sorted list of (layer, head) without repeats.

        Raises:
            TypeError: if an entry is not a pair of integers.
            IndexError: if one does not exist; the message says how many there are.
        """
        found = set()
        for pair in heads:
            try:
                layer, head = map(index, pair)
            except (TypeError, ValueError):
                raise TypeError(f"a head is a pair of whole numbers (layer, head), got {pair!r}") from None
            if not (0 <= layer < self.n_layers and 0 <= head < self.n_heads):
                raise IndexError(
                    f"head ({layer}, {head}) does not exist: the model has layers 0 to {self.n_layers - 1} "
                    f"with heads 0 to {self.n_heads - 1} each"
                )
            if layer in self.bare:
                raise IndexError(f"layer {layer} has no heads: only {self.attention_layers} are attention layers")
            found.add((layer, head))
        return sorted(found)


def vocabulary(config) -> dict:
    """The `rename`, `envoys` and `task` arguments that give an nnsight model the standard names."""
    names = family_of(config)
    parts = ((getattr(names, part), part) for part in ("layers", "final_norm", "unembed", "attn", "mlp"))
    rename = {path: part for path, part in parts if path not in ("", part)}
    task = ("fill-mask" if names.unembed else "feature-extraction") if names.encoder else "text-generation"
    return {"rename": rename, "envoys": {f"{names.layers}.*.{names.attn}": Attention}, "task": task}


def _attention_call(module: torch.nn.Module, op_names) -> str:
    """Name of nnsight's operation for the attention call in `module.forward`.

    Found by what it is: the call of the name that was bound to an entry of transformers' attention
    interface. Its number among nnsight's operations depends on the version and is not assumed.
    """
    forward = inspect.unwrap(type(module).forward)
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    bound = [
        (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "ALL_ATTENTION_FUNCTIONS" in ast.dump(node.value)
    ]
    if len(bound) != 1:
        raise ValueError(f"{type(module).__name__}.forward does not take its attention from transformers' interface")
    # the binding is an operation of its own, before the call
    calls = [name for name in op_names if name.rsplit("_", 1)[0] == bound[0]]
    if len(calls) != 2:
        raise ValueError(f"expected one attention call in {type(module).__name__}.forward, found {len(calls) - 1}")
    return calls[-1]


def bind(model) -> Anatomy:
    """Fill in where each layer's attention call and output projection are, and count the parts.

    Raises:
        ValueError: naming the part that was not found or whose shape disagrees with the config; latent attention, layers
            without attention.
    """
    config, names = model.config.get_text_config(), family_of(model.config)
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"a {config.model_type} model keeps keys and values of all heads in one latent vector (MLA): "
                         "its heads are not supported yet")  # fmt: skip
    for part in ("layers", "final_norm", "unembed"):
        if getattr(names, part) and not hasattr(model, part):
            raise ValueError(
                f"no {part} in a {config.model_type} model (looked at {getattr(names, part)}): this architecture is not "
                "supported yet; add a row to heads.model.families.FAMILIES"
            )
    n_layers = len(model.layers)
    try:
        n_heads = config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        n_kv_heads, seen = getattr(config, "num_key_value_heads", None) or n_heads, windows(config, n_layers)
    except RuntimeError as error:  # transformers' word for a config with a value for each layer
        raise ValueError(f"the layers of a {config.model_type} model differ in their heads, which is not supported yet "
                         f"({str(error).split('.')[0]})") from None  # fmt: skip
    bare = tuple(i for i, layer in enumerate(model.layers) if not hasattr(layer._module, names.attn.split(".")[0]))
    if len(bare) == n_layers:
        raise ValueError(f"no layer of this {config.model_type} model has a {names.attn}: no attention, or of another name")
    for layer in (layer for i, layer in enumerate(model.layers) if i not in bare):
        attn = layer.attn
        caller = getattr(attn, names.call) if names.call else attn
        prefix = f"{names.call}." if names.call else ""
        attn.call_input = f"{prefix}source.{_attention_call(caller._module, caller.source.names)}.input"
        attn.proj_input = f"{names.proj}.input"
        attn.n_heads = n_heads
        try:
            width = output_projection(model, layer).shape[0]
        except AttributeError as error:
            raise ValueError(f"{attn.path} of a {config.model_type} model has no {names.proj} with a weight: its heads "
                             f"cannot be told apart ({error})") from None  # fmt: skip
        if width != n_heads * d_head:
            raise ValueError(
                f"the config says {n_heads} heads of {d_head}, which make {n_heads * d_head}, but the output projection of "
                f"{attn.path} takes {width}: heads cannot be told apart"
            )
    return Anatomy(
        family=config.model_type,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_model=config.hidden_size,
        windows=seen,
        bare=bare,
        encoder=names.encoder,
    )
