"""KV caches in which every key-value head keeps other tokens, and which are really smaller for it.

A policy (`heads.lab.policies`) looks at a layer when its prompt has been read and says what each head keeps. `HeadCache`
keeps that and nothing else: per layer a few groups of heads that keep equally many tokens, each one block with room to grow
and one SDPA call, the query heads of a key-value head packed as its rows. `heads.lab.masked` compares many policies in one
pass, without freeing anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from heads.model.attention import NAME, attention, mix, pattern
from heads.model.prefix import agrees
from heads.model.weights import decoder_only
from heads.names import whole


@dataclass(frozen=True)
class Seen:
    """A layer whose prompt was read, as a policy sees it.

    Attributes:
        layer: of the model. free: the layers that see everything (one with a sliding window keeps that, by itself).
        queries: `[prompt, head, position, d_head]`; keys, values: `[prompt, kv_head, position, d_head]`, as they meet.
        scaling: factor on their products.
        budget: tokens that a key-value head may keep on average over the whole model.
    """

    layer: int
    free: tuple[int, ...]
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    budget: int
    memo: dict = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: object, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What several policies ask of the same layer is computed for the first of them."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]

    @property
    def layers(self) -> int:
        """The number of layers that see everything; `index` is the place of this one among them."""
        return len(self.free)

    @property
    def index(self) -> int:
        return self.free.index(self.layer)

    @property
    def positions(self) -> torch.Tensor:
        """`[position]`."""
        return torch.arange(self.keys.shape[2], device=self.keys.device)


@dataclass(frozen=True)
class StandIn:
    """One key and value `[prompt, d_head]` in place of what a head drops, and the logarithm of its weight
    (RazorAttention's compensation token)."""

    key: torch.Tensor
    value: torch.Tensor
    bias: float


@dataclass(frozen=True)
class Keep:
    """What a policy answers.

    Attributes:
        tokens: for each key-value head the places that it keeps, `[place]` or `[prompt, place]`, ascending; None: all. Masked,
            there may be one entry for each query head: as if its keys and values were held for every query head.
        stand_ins: for each of them a StandIn or None.
    """

    tokens: Sequence[torch.Tensor | None]
    stand_ins: Sequence[StandIn | None] = ()

    def checked(self, seen: Seen) -> Keep:
        """The same with `[prompt, place]` everywhere. ValueError naming layer and head."""
        n, (prompts, kv_heads, length, _) = len(self.tokens), seen.keys.shape
        if n not in (kv_heads, seen.queries.shape[1]) or len(self.stand_ins) not in (0, n):
            raise ValueError(f"layer {seen.layer}: a policy answers for {n} heads and {len(self.stand_ins)} stand-ins: expected "
                             f"{kv_heads} key-value heads (or {seen.queries.shape[1]} query heads)")  # fmt: skip
        rows: list[torch.Tensor] = []
        for head, kept in enumerate(self.tokens):
            if head and kept is self.tokens[head - 1]:  # several heads that keep the same
                rows.append(rows[-1])
                continue
            row = seen.positions if kept is None else torch.as_tensor(kept, device=seen.keys.device)
            row = row.expand(prompts, -1) if row.dim() == 1 else row
            ends = kept is not None and row.numel() and ((row[:, 0] < 0) | (row[:, -1] >= length)).any()
            if row.shape[0] != prompts or ends or kept is not None and (row.diff(dim=-1) <= 0).any():
                raise ValueError(f"layer {seen.layer}, head {head}: kept places are [place] or [prompt, place], ascending, from 0 "
                                 f"to {length - 1}, got {list(row.shape)}: {row.flatten()[:6].tolist()}...")  # fmt: skip
            rows.append(row)
        return Keep(rows, tuple(self.stand_ins) or (None,) * n)


Policy = Callable[[Seen], Keep]


def budget_of(share: float, length: int, room: int) -> int:
    """Tokens a head may keep of `length`, so that they and the room are at most that share of a whole cache with the room."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: a share of the whole cache lies above 0 and is at most 1")
    found = length if share == 1 else math.floor(share * (length + room)) - room
    if found < 1:
        raise ValueError(f"a share of {share} of {length} tokens leaves nothing beside the room for {room} new ones: a larger "
                         "share, or less room")  # fmt: skip
    return found


class Share:
    """A policy with what it may keep and what it has kept, layer by layer."""

    def __init__(self, policy: Policy, share: float, room: int, free: Sequence[int]):
        self.policy, self.share, self.room, self.free = policy, share, whole("room", room, 0), tuple(free)
        self.kept: list[list[int]] = []
        budget_of(share, 10**9, room)

    def ask(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
            memo: dict | None = None) -> Keep:  # fmt: skip
        """What the layer keeps. ValueError when the model has kept more than its share."""
        budget = budget_of(self.share, key.shape[2], self.room)
        seen = Seen(layer, self.free, query, key, value, scaling, budget, {} if memo is None else memo)
        keep = self.policy(seen).checked(seen)
        self.kept.append([row.shape[1] + (extra is not None) for row, extra in zip(keep.tokens, keep.stand_ins)])
        used, allowed = sum(map(sum, self.kept)), budget * len(keep.tokens) * len(self.free)
        if used > allowed:
            raise ValueError(f"the policy has kept {used} tokens up to layer {layer}, more than the {allowed} of all layers that a "
                             f"share of {self.share} with room for {self.room} leaves: a larger share, or a policy that takes less")  # fmt: skip
        return keep


class Reading(DynamicLayer):
    """A layer that is read first and asked afterwards: marks the keys of the prompt with itself and computes the call."""

    def __init__(self, model, layer: int):
        super().__init__()
        self.config, self.layer, self.seen, self.waiting = model.config.get_text_config(), layer, 0, False

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        by = self.config._attn_implementation
        if self.waiting:
            raise RuntimeError("a pass over this cache stopped half-way, so it holds a part of it: reset() it, or make a new one")
        if not by.startswith(NAME):
            raise RuntimeError(f"this cache computes its attention itself, as the attention implementation {NAME!r} lets it; the "
                               f"model has {by!r}: model.set_attn_implementation({NAME!r})")  # fmt: skip
        if not self.seen:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.seen, self.waiting = self.seen + key_states.shape[2], True
        marked = key_states.view(key_states.shape)
        marked.prefix = self
        return marked, value_states

    def logits(self, queries: torch.Tensor) -> torch.Tensor:
        if not self._first():
            raise NotImplementedError("every head keeps other tokens here, so there is no pattern [batch, head, query, key]: read it "
                                      "while the prompt is read, or with heads.Prefix")  # fmt: skip
        return queries.new_empty(*queries.shape[:-1], 0)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a pattern is not edited in a cache that forgets: edit it without the cache, or edit heads")

    def attend(self, module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
               scaling: float | None = None, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        """`[batch, head, query, d_head]` and what is new -> `[batch, query, head, d_head]`."""
        if mask is not None:
            visible = mask if mask.dtype == torch.bool else mask >= 0
            steps, length = visible.shape[-2:]
            wanted = torch.ones(steps, length, dtype=torch.bool, device=mask.device).tril(length - steps)
            if (wanted & ~visible).any():
                raise ValueError(f"layer {self.layer}: something earlier is hidden from a token (padding, or a window of this layer's "
                                 "own): prompts of equal length, without padding")  # fmt: skip
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._first():
            out = attention(module, query, key.view(key.shape), value, mask, scaling=scaling, **kwargs)[0]
            self.settle(query, key, value, scaling)
        else:
            out = self.step(query, key, value, scaling, **kwargs)
        self.waiting = False  # not where one of these raised
        return out


class _Group:
    """Heads of a layer that keep equally many tokens, in one block: `[keys or values, batch, head, token, d_head]`."""

    def __init__(self, heads: list[int], keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, room: int):
        self.length, self.bias = keys.shape[2], None if bias is None else bias.to(keys.dtype)[:, None, None]
        apart = heads[1] - heads[0] if len(heads) > 1 else 1  # evenly spaced heads are read in place, others copied
        even = heads == list(range(heads[0], heads[-1] + 1, apart))
        self.heads = slice(heads[0], heads[-1] + 1, apart) if even else torch.tensor(heads, device=keys.device)
        self.store = keys.new_empty(2, *keys.shape[:2], self.length + room, keys.shape[3])
        self.store[:, :, :, : self.length] = torch.stack([keys, values])

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.store.shape[3]:  # by a quarter, so that long texts are copied seldom
            more = self.store.new_empty(*self.store.shape[:3], self.length + max(64, self.length // 4), self.store.shape[4])
            more[:, :, :, :start] = self.store[:, :, :, :start]
            self.store = more
        self.store[0, :, :, start : self.length], self.store[1, :, :, start : self.length] = keys, values

    def mixed(self, query: torch.Tensor, scaling: float, softcap: float | None, sink: torch.Tensor | None) -> torch.Tensor:
        """`[batch, head of this group, rows of it, query, d_head]` -> the same shape."""
        batch, heads, per, steps, width = query.shape
        keys, values = self.store[:, :, :, : self.length]
        rows, mask = query.reshape(batch, heads, per * steps, width), None
        if steps > 1:
            mask = query.new_full((steps, self.length), -math.inf).triu(self.length - steps + 1).repeat(per, 1)
        if self.bias is not None:
            mask = query.new_zeros(1, self.length) if mask is None else mask
            mask = mask.repeat(heads, 1, 1)
            mask[..., :1] += self.bias
        if softcap is None and sink is None:
            mask = None if mask is None else mask.expand(batch, heads, -1, -1)
            return scaled_dot_product_attention(rows, keys, values, mask, scale=scaling).view(query.shape)
        if mask is not None:
            mask = mask.expand(batch, heads, per * steps, -1).reshape(batch, heads * per, steps, -1)
        sink = None if sink is None else sink.view(-1, per)[self.heads].flatten()
        weights = pattern(None, query.flatten(1, 2), keys, mask, scaling, softcap, s_aux=sink)
        return mix(weights, values).transpose(1, 2).reshape(query.shape)


class _KeptLayer(Reading):
    """One layer of a HeadCache. Positions *seen* are counted; what a head holds is another number."""

    def __init__(self, model, layer: int, share: Share):
        super().__init__(model, layer)
        self.share, self.groups, self.rows = share, [], 0

    def _first(self) -> bool:
        return not self.groups

    def settle(self, query, key, value, scaling) -> None:
        keep = self.share.ask(self.layer, query, key, value, scaling)
        if len(keep.tokens) != key.shape[1]:
            raise ValueError(f"layer {self.layer}: the policy answers for {len(keep.tokens)} query heads, and a cache holds tokens for "
                             f"{key.shape[1]} key-value heads: only a MaskedPrefix can pretend")  # fmt: skip
        alike: dict = {}
        for head, (row, extra) in enumerate(zip(keep.tokens, keep.stand_ins)):
            alike.setdefault((row.shape[1], extra is not None), []).append(head)
        for (_, extra), heads in sorted(alike.items()):
            places = torch.stack([keep.tokens[h] for h in heads], 1)[..., None].expand(-1, -1, -1, key.shape[3])
            parts, bias = [x[:, heads].gather(2, places) for x in (key, value)], None
            if extra:
                given = [keep.stand_ins[h] for h in heads]
                stand = [torch.stack([getattr(g, part) for g in given], 1)[:, :, None] for part in ("key", "value")]
                parts = [torch.cat([s.to(p), p], 2) for s, p in zip(stand, parts)]
                bias = torch.tensor([g.bias for g in given], device=key.device)
            self.groups.append(_Group(heads, *parts, bias, self.share.room))
        self.rows = len(key)

    def step(self, query, key, value, scaling, softcap=None, s_aux=None, **_) -> torch.Tensor:
        batch, n_heads, steps, width = query.shape
        if batch != self.rows:
            raise ValueError(f"this cache holds {self.rows} prompts and was given {batch} rows: a cache serves its own prompts")
        query, out = query.reshape(batch, key.shape[1], -1, steps, width), None
        for group in self.groups:
            group.append(key[:, group.heads], value[:, group.heads])
            found = group.mixed(query[:, group.heads], scaling, softcap, s_aux)
            if len(self.groups) == 1:
                out = found
            else:
                out = torch.empty_like(query) if out is None else out
                out[:, group.heads] = found
        return out.reshape(batch, n_heads, steps, width).transpose(1, 2)

    def reset(self) -> None:
        self.groups, self.seen, self.waiting, self.is_initialized = [], 0, False, False
        self.share.kept.clear()

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for group in self.groups:
            group.store = change(group.store)
            self.rows = group.store.shape[1]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda store: store[:, indices])

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda store: store.repeat_interleave(repeats, 1))

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("a cache that forgets cannot be cropped: what was dropped for its end does not come back")

    def offload(self) -> None:
        raise NotImplementedError("a HeadCache stays where the model is: it is not offloaded")

    prefetch = offload


def free_layers(model) -> list[int]:
    """The layers that see everything. ValueError if there are none, or others than heads can forget in."""
    decoder_only(model)
    agrees(model)
    found, windows = DynamicCache(config=model.config).layers, model.anatomy.windows
    for i, layer in enumerate(found):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"layer {i} of a {model.anatomy.family} model keeps a {type(layer).__name__}: only attention over keys "
                             "and values can forget by heads")  # fmt: skip
    free = [i for i, window in enumerate(windows) if window is None]
    if not free:
        raise ValueError(f"every layer of this {model.anatomy.family} model sees a window only: there is nothing to forget")
    return free


class HeadCache(Cache):
    """A KV cache that keeps, for each key-value head, what a policy chose when the prompt had been read.

        cache = heads.HeadCache(lm, heads.policies.razor(full), share=0.33)
        lm.generate(ids, past_key_values=cache, max_new_tokens=50)        # or lm.trace, or plain transformers

    A layer is cut as soon as its own attention over the prompt is done, so the peak is what is kept and one whole layer. All
    that comes later (a question, generated tokens) is kept by every head. Layers with a sliding window keep their window. Like
    every cache it goes on where it is: another prompt needs `reset()` or a cache of its own.

    Args:
        model: a loaded decoder.
        policy: what each head keeps (`heads.policies`).
        share: of the bytes that a whole cache with the same room would hold, all that ours may hold.
        room: tokens for which there is space from the start; they count. More is made when it is full.

    Raises:
        ValueError: an encoder, a model whose layers keep something else; when the prompt is read, a policy that keeps more than
            its share, padded prompts, and more or other rows than the cache holds. RuntimeError: another attention
            implementation. NotImplementedError: to crop or offload it, to read a pattern afterwards, to edit one.
    """

    prompt = None  # of what length the whole prompts are is not known

    def __init__(self, model, policy: Policy, share: float = 1.0, room: int = 64):
        free = free_layers(model)
        self.share, layers = Share(policy, share, room, free), DynamicCache(config=model.config).layers
        for i in free:
            layers[i] = _KeptLayer(model._module, i, self.share)
        super().__init__(layers=layers)

    @property
    def kept(self) -> list[list[int]]:
        """Tokens of the prompt that each head keeps, stand-ins counted: a list for each layer that sees everything."""
        return self.share.kept

    def nbytes(self) -> int:
        """Bytes held by the layers that see everything, room included."""
        return sum(group.store.nbytes for layer in self.layers if isinstance(layer, _KeptLayer) for group in layer.groups)
