"""What stands before and is kept once: the keys and values of prompts, shared by many rows or joined into one batch.

A cache layer that keeps something once hands the attention call the keys and values of what came after, and marks the
keys with itself (`keys.prefix`). The call then asks it for its part: the logits of the queries, and the mix of its values.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from heads.model.attention import plain_logits
from heads.model.weights import decoder_only
from heads.names import whole


def prefill(model, ids: torch.Tensor, prompt: int | None = None) -> DynamicCache:
    """KV cache of the beginning of prompts, through SDPA: no pattern is materialised, no logits but the last.

    Layers with a sliding window keep all their keys here (the mask still hides them), so that a key's
    index is its position in every layer.

    Args:
        ids: `[prompt, position]`, of equal length.
        prompt: columns of the whole prompts, which edits may count from; the cache says it to what continues it. None: at
            least one more token follows.

    Raises:
        ValueError: an encoder, or ids of another shape; for edits at places counted from an end that is not known.
    """
    _check(model, ids)
    cache = DynamicCache()
    cache.prompt = math.inf if prompt is None else whole("the prompt's length", prompt, 1)
    with torch.no_grad(), model.trace(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1):
        pass
    cache.prompt = prompt
    return cache


def _check(model, ids: torch.Tensor) -> None:
    decoder_only(model)
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"the ids are {list(ids.shape)}: expected [prompt, position], with at least one token")


@torch.no_grad()
def twice(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last tokens of a short prompt whose beginning is kept once, and those of one whole plain forward."""
    module, size = model._module, model.config.get_text_config().vocab_size
    ids, cache = (torch.arange(24, device=model.device) * (size // 7) + 5).remainder(size)[None], DynamicCache()
    module(input_ids=ids[:, :16], past_key_values=cache, use_cache=True)
    shared = Cache(layers=[SharedLayer(layer, module) for layer in cache.layers])
    ours = module(input_ids=ids[:, 16:], past_key_values=shared, use_cache=True).logits
    return ours, plain_logits(module, ids)[:, 16:]


def agrees(model) -> None:
    """Once per module: a beginning that is kept once gives the logits of the whole prompt. ValueError if not."""
    found = model._module.__dict__
    if "_prefix" not in found:
        try:
            ours, theirs = twice(model)
            found["_prefix"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):  # a cache or an attention of its own
            found["_prefix"] = math.inf
    if not found["_prefix"] <= (1e-3 if model._module.dtype == torch.float32 else 5e-2):
        how = "fails" if math.isinf(found["_prefix"]) else f"is off by {found['_prefix']:.0%} of its logits"
        raise ValueError(f"a {model.anatomy.family} model that keeps the beginning of a prompt once {how}: run whole prompts")


class Prefix:
    """Prompts of equal length, read once and kept once, that any number of passes continue.

        prefix = heads.Prefix(lm, ids[:, :-1])                        # [prompt, position]
        with lm.trace(ids[:, -1:], past_key_values=prefix.cache()):   # as if the whole prompt were run
            logits = lm.logits.save()

    Row r of a batch continues prompt r modulo their number, so one prompt serves many conditions, and costs memory
    once, not once a row. Beams of several prompts stand in another order and are refused.

    Args:
        model: a loaded model; if it is edited, the prompts are read with its edits.
        ids: `[prompt, position]` token ids.
        prompt: columns of the whole prompts, where edits count from their end or the prefix holds what follows them. None:
            at least one more token follows, and with edits at `positions=[-1]` the prefix is refused.

    Raises:
        ValueError: an encoder, or ids of another shape; a model that does not give the same logits when the beginning of a
            prompt is kept once; for a batch whose rows are no multiple of the prompts.
    """

    def __init__(self, model, ids: torch.Tensor, prompt: int | None = None):
        _check(model, ids)
        agrees(model)
        self.ids, self.prompt, self._module, self.edits = ids, prompt, model._module, list(model._edits)
        self.layers = prefill(model, ids, prompt).layers

    def __len__(self) -> int:
        """Positions that are kept."""
        return self.ids.shape[1]

    def cache(self) -> Cache:
        """A fresh KV cache that continues the prompts: for one pass, or for the steps of one generation."""
        found = Cache(layers=[SharedLayer(layer, self._module) for layer in self.layers])
        found.prompt = self.prompt
        return found


class SharedLayer(DynamicLayer):
    """One layer's keys and values: prompts held once (`[prompt, kv_head, position, d_head]`), and what each row adds."""

    def __init__(self, prefix: DynamicLayer, model: torch.nn.Module):
        super().__init__()
        self.prefix_keys, self.prefix_values = prefix.keys, prefix.values
        self.model = weakref.ref(model)  # whose run says how many prompts it was given

    def get_seq_length(self) -> int:
        return self.prefix_keys.shape[-2] + super().get_seq_length()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        n, rows, run = len(self.prefix_keys), len(key_states), vars(self.model()).get("_run", {})
        given = run.get("given", {})
        beams = run.get("generates") and rows != len(given.get("input_ids", given.get("inputs_embeds")))
        if rows % n or n > 1 and n != rows and beams:
            keep = "for k beams of each, keep every row: heads.Prefix(model, ids.repeat_interleave(k, 0))"
            raise ValueError(f"{rows} rows cannot continue {n} prompts: row r continues prompt r modulo {n}; {keep}")
        keys, values = super().update(key_states, value_states)
        marked = keys.view(keys.shape)  # not what is stored here: a tensor and its owner would keep each other alive
        marked.prefix = self
        return marked, values

    def logits(self, queries: torch.Tensor) -> torch.Tensor:
        """`[row, kv_head, query, d_head]` -> `[row, kv_head, query, prefix position]`, unscaled."""
        return _by_prompt(queries, self.prefix_keys.transpose(-1, -2))

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """`[row, kv_head, query, prefix position]` -> `[row, kv_head, query, d_head]`."""
        return _by_prompt(weights, self.prefix_values)


def _by_prompt(rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Matrix products of many rows with few shared matrices, one product per prompt instead of one per row.

    `[condition * prompt, kv, a, b]`, `[prompt, kv, b, c]` -> `[condition * prompt, kv, a, c]`: row r belongs to
    prompt r % n_prompts, and all conditions of a prompt join the a axis.
    """
    n, (kv, a, b) = shared.shape[0], rows.shape[1:]
    joined = rows.view(-1, n, kv, a, b).permute(1, 2, 0, 3, 4).reshape(n, kv, -1, b) @ shared
    return joined.view(n, kv, -1, a, shared.shape[-1]).permute(2, 0, 1, 3, 4).reshape(-1, kv, a, shared.shape[-1])


class JoinedLayer(DynamicLayer):
    """One layer's keys and values of several prompts, aligned at their ends: `[row, kv_head, position, d_head]`.

    Shorter prompts have zeros on the left, which the attention mask hides; the distance of two tokens, and so a
    sliding window, is what it was. Room for `room` more tokens is there from the start: no step copies the cache.
    """

    def __init__(self, layers: list[DynamicLayer], room: int):
        super().__init__()
        self.length = max(layer.get_seq_length() for layer in layers)
        self.store = [self._join([getattr(layer, part) for layer in layers], room) for part in ("keys", "values")]
        self._show()
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def _join(self, parts: list[torch.Tensor], room: int) -> torch.Tensor:
        kv_heads, _, d_head = parts[0].shape[1:]
        joined = parts[0].new_zeros(len(parts), kv_heads, self.length + room, d_head)
        for row, part in zip(joined, parts):
            row[:, self.length - part.shape[2] : self.length] = part[0]
        return joined

    def _show(self):
        self.keys, self.values = (part[:, :, : self.length] for part in self.store)
        return self.keys, self.values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        start, self.length = self.length, self.length + key_states.shape[2]
        for part, new in zip(self.store, (key_states, value_states)):
            part[:, :, start : self.length] = new
        return self._show()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.store = [part[indices] for part in self.store]
        self._show()

    reorder_cache = batch_select_indices  # beams: what is shown is a view of the store


def join(caches: list[DynamicCache], room: int) -> Cache:
    """Caches of one prompt each as one batch, with room for so many more tokens. They are emptied on the way, layer
    by layer, so that nothing is held twice."""
    joined = []
    for layers in zip(*(cache.layers for cache in caches)):
        joined.append(JoinedLayer(list(layers), room))
        for layer in layers:
            layer.reset()
    return Cache(layers=joined)
