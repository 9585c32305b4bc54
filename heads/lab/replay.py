"""Replay: a batch of prompts run once and kept, so that an edit restarts where it acts.

An edit at layer l and position p changes nothing below l and, in a causal model, nothing before p. So a sweep
keeps the residual stream entering each layer and the KV cache of what stands before, and recomputes only the
rest: all heads of some layers at once, as rows of one batch that grows on its way up. The model's own layers
are called, outside any trace, with the arguments that they were given in the clean run; no architecture is
written a second time here. Every replay is checked against the model before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from heads.model.offers import require
from heads.model.prefix import Prefix
from heads.model.weights import check_length, finished, heads_everywhere, hooked, projection
from heads.names import whole


class ReplayError(RuntimeError):
    """A model's layers, called one by one, do not give what the model gives."""


@contextmanager
def swapped(module: torch.nn.Module, value: Any, name: str = "forward") -> Iterator[None]:
    """A module that computes something else, or whose attribute of another name is another, for the length of a `with`."""
    own = vars(module)
    kept = {key: own[key] for key in own.keys() & {name}}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own |= kept


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class Replay:
    """What one clean forward of a batch leaves behind, and the means to go on from any layer.

    Attributes, all of positions `start` and later (`position` below counts from there):
        resid: per layer, the residual stream entering it, `[prompt, position, d_model]`.
        z: per layer, the heads, `[prompt, position, head, d_head]`.
        attn, mlp: per layer, what attention and MLP put out, `[prompt, position, d_model]`, with `keep_parts`.
        final: the residual stream leaving the last layer at END, `[prompt, d_model]`.
        logits: at END, `[prompt, vocabulary]`.

    Args:
        model: a loaded model.
        ids: `[prompt, position]`, unpadded prompts of one length.
        start: nothing before this position will be edited; it comes from a KV cache.
        check: replay once without an edit; a batch that is only read needs none.

    Raises:
        ReplayError: for an edited model; if replaying without an edit does not give the model's own logits.
        ValueError: for an encoder.
    """

    def __init__(self, model, ids: torch.Tensor, start: int = 0, keep_parts: bool = False, check: bool = True):
        self.model, self.ids, self.start = model, ids.to(model.device), start
        self.n_layers, self.n_prompts = model.anatomy.n_layers, len(ids)
        heads_everywhere(model)
        require(model, "readout")
        if model._edits:
            raise ReplayError(
                "a replay runs the loaded module, without the edits of this model: sweep the unedited model, "
                "or for paths take engine='literal'"
            )
        check_length(model, ids.shape[1], start)
        self.resid, self.z, self.calls, self.attn, self.mlp = [], [], [], [], []
        self.prefix = Prefix(model, self.ids[:, :start], ids.shape[1]) if start else None
        self._run(keep_parts)
        if check:
            self.check()

    def cache(self) -> dict:
        """A fresh KV cache to continue from, as keywords for a layer; it serves one pass."""
        return {"past_key_values": self.prefix.cache()} if self.prefix else {}

    def _run(self, keep_parts: bool) -> None:
        model, hooks = self.model, []
        for i, layer in enumerate(model.layers):
            hooks.append((layer._module.register_forward_pre_hook, self._keep_call, {"with_kwargs": True}))
            hooks.append((projection(model, i).register_forward_pre_hook, self._keep_heads, {}))
            if keep_parts:
                hooks.append((layer.attn._module.register_forward_hook, lambda m, a, o: self.attn.append(_first(o)), {}))
                hooks.append((layer.mlp._module.register_forward_hook, lambda m, a, o: self.mlp.append(_first(o)), {}))
        leaving = []
        hooks.append((model.layers[-1]._module.register_forward_hook, lambda m, a, o: leaving.append(_first(o)), {}))
        with torch.no_grad(), hooked(*hooks):
            out = model._module(
                input_ids=self.ids[:, self.start :], logits_to_keep=1, use_cache=self.prefix is not None, **self.cache()
            )
        self.final, self.logits = leaving[0][:, -1], out.logits[:, -1]

    def _keep_call(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.resid.append(hidden)
        # Prompts have one length and no padding, so masks and rotary tables are the same in every row.
        one = lambda x: x[:1] if isinstance(x, torch.Tensor) and x.dim() > 1 else x  # noqa: E731
        one_of = lambda x: tuple(map(one, x)) if isinstance(x, tuple) else one(x)  # noqa: E731
        keywords = {k: one_of(v) for k, v in kwargs.items() if k != "hidden_states"}
        self.calls.append((tuple(map(one_of, args[1:])), keywords))

    def _keep_heads(self, module, args):
        self.z.append(args[0].view(*args[0].shape[:-1], self.model.anatomy.n_heads, -1))

    def layer(self, i: int, hidden: torch.Tensor, cache: dict, z: torch.Tensor | None = None, call: tuple | None = None,
              edit: Callable | None = None) -> torch.Tensor:  # fmt: skip
        """One layer on other rows: `[row, position, d_model]` -> the same; from the last layer END alone, which is all
        that is read there: its heads are projected, and its MLP runs, at one position.

        Args:
            hidden: rows in the order (condition, prompt).
            cache: from `cache()`, the same for all layers of one pass.
            z: `[row, position, head, d_head]` for the last `len(z)` rows: their heads, instead of what the
                layer's attention gives.
            call: (arguments, keywords) for the layer, instead of those of the clean run.
            edit: (query, key, value) -> what the attention call uses in their place; None leaves that of an outer `with`.
        """
        args, kwargs = call or self.calls[i]
        # Only this pass's cache: the clean run's would grow. Its name differs between architectures.
        args = tuple(cache.get("past_key_values") if isinstance(a, Cache) else a for a in args)
        kwargs = {k: cache.get("past_key_values") if isinstance(v, Cache) else v for k, v in kwargs.items()}

        def put(module, inputs):
            x = inputs[0].clone()
            x[-len(z) :] = z.flatten(-2)
            return (x, *inputs[1:])

        heads, mlp = projection(self.model, i), getattr(self.model.layers[i], "mlp", None)
        hooks = [] if z is None else [(heads.register_forward_pre_hook, put, {})]
        if last := i == self.n_layers - 1:
            # What they return is added to the residual stream of every position, of which END is right.
            # (A layer that flattens its positions, as OPT's MLP does, computes all.)
            end = lambda module, inputs: (inputs[0][:, -1:], *inputs[1:]) if inputs[0].dim() == 3 else None  # noqa: E731
            hooks += [(module.register_forward_pre_hook, end, {}) for module in (heads, mlp and mlp._module) if module]
        module, attn = self.model.layers[i], self.model.layers[i].attn._module
        with torch.no_grad(), hooked(*hooks), swapped(attn, edit or vars(attn).get("_edit"), "_edit"):
            hidden = _first(module._module(hidden, *args, **kwargs))
        return hidden[:, -1:] if last else hidden

    def rows(self, i: int, n: int) -> torch.Tensor:
        """The clean residual stream entering layer i, once for each of n conditions: `[n * prompt, position, d_model]`."""
        x = self.resid[i]
        return x.expand(n, *x.shape).reshape(-1, *x.shape[1:])

    @torch.no_grad()
    def read(self, hidden: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """Logits at END from what leaves the last layer: `[n * prompt, d_model]` -> `[n, prompt, column]`.

        Args:
            columns: token ids `[prompt, column]`, or None for the whole vocabulary. Only these rows of the
                unembedding are multiplied, which spares a small model a fifth of its work.
        """
        model = self.model
        x = model.final_norm._module(hidden).view(-1, self.n_prompts, hidden.shape[-1])
        unembed = model.unembed._module
        if columns is None:
            logits = unembed(x)
        else:
            columns = columns.to(x.device)
            logits = torch.einsum("npd,pcd->npc", x, unembed.weight[columns])
            if unembed.bias is not None:
                logits = logits + unembed.bias[columns]
        return finished(model, logits)

    def check(self) -> None:
        """Replay all layers without an edit, and hold the logits against the model's own."""
        cache, hidden = self.cache(), self.resid[0]
        for i in range(self.n_layers):
            hidden = self.layer(i, hidden, cache)
        found, wanted = self.read(hidden[:, -1], None)[0].float(), self.logits.float()
        exact = {torch.float32: 1e-4, torch.float16: 1e-2}.get(self.model._module.dtype, 5e-2)
        error = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1.0)
        if not error <= exact:
            raise ReplayError(
                f"replaying a {self.model.anatomy.family} model layer by layer is off by {error:.1e} of its logits "
                f"(allowed {exact:g}): its layers need something that the clean run did not hand over. Cut heads one by one with "
                "heads.ablate(...); for paths take engine='literal'"
            )


def chunks(units: list, size: int) -> list[list]:
    return [units[i : i + size] for i in range(0, len(units), size)]


def room(model, positions: int, prompts: int, tokens: int | None) -> int:
    """How many conditions one forward takes."""
    tokens = whole("tokens", tokens, 1) if tokens is not None else (2048 if model.device.type == "cpu" else 131072)  # on a CPU, what fits its caches
    return max(1, tokens // (positions * prompts))
