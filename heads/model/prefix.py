"""What stands before and is kept once: the keys and values of prompts, shared by many rows or joined into one batch."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def prefill(model, ids: torch.Tensor) -> DynamicCache:
    """KV cache of a prompt, through SDPA: no pattern is materialised, no logits but the last.

    Layers with a sliding window keep all their keys here (the mask still hides them), so that a key's
    index is its position in every layer.

    Args:
        ids: `[batch, position]`; a batch of one if the cache is to be shared.
    """
    cache = DynamicCache()
    with torch.no_grad(), model.trace(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1):
        pass
    return cache


class SharedLayer(DynamicLayer):
    """One layer's keys and values: a prefix held once, and what each row of the batch adds to it."""

    def __init__(self, prefix: DynamicLayer):
        super().__init__()
        self.prefix_keys, self.prefix_values = prefix.keys, prefix.values

    def get_seq_length(self) -> int:
        return self.prefix_keys.shape[-2] + super().get_seq_length()



class SharedPrefix(Cache):
    """A KV cache whose prefixes are stored once and read by every row of a batch.

    Pass it twice, `model(ids, past_key_values=cache, shared_prefix=cache)`: the first lets
    transformers count positions, the second lets `attention` find the prefix. Row r of the batch
    then continues prefix r modulo their number, and a prefix costs memory once, not once a row.

    Args:
        prefix: a cache of one or several prompts of equal length (`[prompt, kv_head, position, d_head]` in
            every layer), left as it is.
    """

    def __init__(self, prefix: Cache):
        super().__init__(layers=[SharedLayer(layer) for layer in prefix.layers])


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

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[2]
        for part, new in zip(self.store, (key_states, value_states)):
            part[:, :, start : self.length] = new
        return self._show()

    def batch_select_indices(self, indices) -> None:
        self.store = [part[indices] for part in self.store]
        self._show()



def join(caches: list[DynamicCache], room: int) -> Cache:
    """Caches of one prompt each as one batch, with room for so many more tokens. They are emptied on the way, layer
    by layer, so that nothing is held twice."""
    joined = []
    for layers in zip(*(cache.layers for cache in caches)):
        joined.append(JoinedLayer(list(layers), room))
        for layer in layers:
            layer.reset()
    return Cache(layers=joined)
