"""Heads that each read a few chunks of the text and no more (LongHeads, arXiv 2402.10685): an attention function of its own.

It chooses what to *read* and frees nothing. A cache holds everything that it was given, cut into chunks with a key each; for
every query and head a `Reader` scores these keys, and the chunks it takes are read as if they stood one after another, so no
distance is longer than what is read. Keys are turned to their place inside their chunk once; the *query* is turned, for each
chunk, to the distance that it has there. The products with chunks that were not taken are made, too, and hidden: the logits
are the paper's, the saving is not here.
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers.cache_utils import Cache, DynamicCache

from heads.lab.caches import Reading, free_layers
from heads.model.prefix import _by_prompt
from heads.names import whole


@dataclass(frozen=True)
class Look:
    """A layer and the queries that are about to choose.

    Attributes:
        layer: of the model.
        queries: `[prompt, head, query, d_head]`, not rotated.
        pooled: `[prompt, head, chunk, d_head]`: a key for each complete chunk, pooled by the chunk's own attention.
        mean: the same shape: the plain mean of its keys, not rotated.
    """

    layer: int
    queries: torch.Tensor
    pooled: torch.Tensor
    mean: torch.Tensor


def by_key(look: Look) -> torch.Tensor:
    """The paper's score of every complete chunk, `[prompt, head, query, chunk]`: the query's product with its key."""
    return look.queries @ look.pooled.transpose(-1, -2)


@dataclass(frozen=True)
class Reader:
    """Which chunks every head reads: the first, the last complete one, the current one, and the best of the others.

    Attributes:
        count: chunks that a query sees, the current one among them; None: all of them.
        scores: `Look` -> a score of every complete chunk, `[prompt, head, query, chunk]`.
        first: False: the first chunk is never read, and one more of the others is.
    """

    count: int | None = 8
    scores: Callable[[Look], torch.Tensor] = by_key
    first: bool = True

    def __post_init__(self):
        if self.count is not None:
            whole("count", self.count, 3)
        if not callable(self.scores):
            raise TypeError(f"scores are a function of a Look, got {self.scores!r}")
        if not isinstance(self.first, bool):
            raise TypeError(f"first is True or False, got {self.first!r}")

    def choose(self, look: Look) -> torch.Tensor:
        """`[prompt, head, query, chunk]`, true where a complete chunk is read. ValueError for scores of another shape."""
        shape = (*look.queries.shape[:3], n := look.pooled.shape[2])
        chosen = torch.ones(shape, dtype=torch.bool, device=look.queries.device)
        chosen[..., : not self.first] = False
        chosen[..., -1:] = True  # the last complete one, also where it is the first
        if self.count is not None and n > self.count - 1:
            scores = self.scores(look)
            if scores.shape != shape:
                raise ValueError(f"scores are [prompt, head, query, chunk], {list(shape)} here, got {list(scores.shape)}")
            chosen[..., 1 : n - 1] = False
            best = scores[..., 1 : n - 1].topk(min(self.count - 2 - self.first, n - 2), -1).indices
            chosen.scatter_(-1, best + 1, True)
        return chosen


class _Turn:
    """A model's own rotary embedding, forth and back, at any places. ValueError for a model that has none such."""

    def __init__(self, model, attention: torch.nn.Module, family: str):
        found = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        kinds = [(getattr(m, "attention_scaling", 1), getattr(m, "rope_type", "")) for m in found]
        self.apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if len(found) != 1 or kinds[0][0] != 1 or kinds[0][1] in ("dynamic", "longrope") or self.apply is None:
            raise ValueError(f"a {family} model has no single rotary embedding that only turns: its chunks cannot be moved")
        self.rotary, self.cos, self.sin = weakref.ref(found[0]), torch.empty(0), None

    def __call__(self, x: torch.Tensor, places: torch.Tensor, back: bool = False) -> torch.Tensor:
        """`[..., d_head]`, turned to places, an integer for each vector (or broadcast to that)."""
        longest = int(places.max()) + 1 if places.numel() else 0
        if longest > len(self.cos):  # twice as far as is asked, so that it grows seldom
            tables = self.rotary()(x.reshape(1, -1, x.shape[-1]), torch.arange(2 * longest, device=x.device)[None])
            self.cos, self.sin = tables[0][0], tables[1][0]
        x, places = torch.broadcast_tensors(x, places[..., None])
        if not x.numel():
            return x
        width, rows = self.cos.shape[-1], x.reshape(-1, 1, x.shape[-2], x.shape[-1])
        cos, sin = (table[places[..., 0].reshape(-1, rows.shape[2])] for table in (self.cos, self.sin))
        turned = self.apply(rows[..., :width], rows[:, :0, :, :width], cos, -sin if back else sin)[0]
        return (turned if width == x.shape[-1] else torch.cat([turned, rows[..., width:]], -1)).view(x.shape)


class _ChunkLayer(Reading):
    """One layer. `parts`: the complete chunks of the prompts, held once for all readers, and then each that came after: keys
    (turned inside their chunk), values `[row, kv_head, chunk, token, d_head]` and chunk keys `[pooled or mean, row, head, chunk,
    d_head]`. `rest`: queries, keys and values that are no chunk yet, not rotated. All are replaced, never changed."""

    def __init__(self, model, layer: int, turn: _Turn, size: int, readers: list[Reader], quirk: bool):
        super().__init__(model, layer)
        self.turn, self.size, self.readers, self.quirk = turn, size, readers, quirk
        self.reset()

    def reset(self) -> None:
        self.parts, self.rest, self.picked, self.seen, self.waiting, self.is_initialized = [], [], [], 0, False, False

    def _first(self) -> bool:
        return not self.parts

    def crop(self, *_, **__) -> None:
        raise NotImplementedError("a cache read in chunks is not cropped, reordered or moved: decode greedily, or sample")

    reorder_cache = batch_select_indices = batch_repeat_interleave = offload = prefetch = crop

    def settle(self, query, key, value, scaling) -> None:
        if self.seen < self.size:
            raise ValueError(f"the prompt has {self.seen} tokens, less than a chunk of {self.size}: smaller chunks")
        new, end = self.unturned(query, key, value), self.seen - self.seen % self.size
        self.parts, self.rest = [self.complete(*(x[:, :, :end] for x in new), scaling)], [x[:, :, end:].clone() for x in new]

    def unturned(self, query, key, value) -> list[torch.Tensor]:
        places = torch.arange(self.seen - query.shape[2], self.seen, device=query.device)
        return [self.turn(query, places, True), self.turn(key, places, True), value]

    def complete(self, query, key, value, scaling) -> tuple:
        """Complete chunks of what was not rotated, with their two keys."""
        query, key, value = (x.unflatten(2, (-1, self.size)) for x in (query, key, value))
        inside, per = torch.arange(self.size, device=key.device), query.shape[1] // key.shape[1]
        keys = self.turn(key, inside)
        each = keys.repeat_interleave(per, 1)
        mixed = scaled_dot_product_attention(self.turn(query, inside), each, value.repeat_interleave(per, 1), scale=scaling)
        pooled = softmax(mixed.mean(3, True) @ each.transpose(-1, -2) * scaling, -1) @ each
        return keys, value, torch.stack([pooled[:, :, :, 0], key.mean(3).repeat_interleave(per, 1)])

    def step(self, query, key, value, scaling, softcap=None, s_aux=None, **_) -> torch.Tensor:
        rows, prompts, readers = len(query), len(self.parts[0][0]), len(self.readers)
        if rows != prompts * readers:
            raise ValueError(f"{rows} rows: expected {prompts * readers}, for each of {readers} readers the {prompts} prompts")
        if softcap is not None or s_aux is not None:
            raise ValueError(f"layer {self.layer} caps its attention or gives a part of it to a sink: chunks are not read there")
        if len(self.rest[0]) != rows:
            self.rest = [x.repeat(readers, 1, 1, 1) for x in self.rest]
        steps, left = query.shape[2], self.size - self.rest[0].shape[2]
        pieces = [min(left, steps), *[self.size] * ((steps - left) // self.size), max(0, steps - left) % self.size]
        new, out, self.picked = self.unturned(query, key, value), [], []
        for piece in zip(*(x.split([n for n in pieces if n], 2) for x in new)):  # queries of one chunk have the same choice
            self.rest = [torch.cat(pair, 2) for pair in zip(self.rest, piece)]
            out.append(self.mixed(piece[0].shape[2], scaling, self.quirk and steps > 1))
            if self.rest[0].shape[2] == self.size:
                self.parts, self.rest = [*self.parts, self.complete(*self.rest, scaling)], [x[:, :, :0] for x in self.rest]
        return torch.cat(out, 2).transpose(1, 2)

    def mixed(self, steps: int, scaling: float, quirk: bool) -> torch.Tensor:
        """The last queries of the rest over the chunks that they choose and the rest: `[row, head, query, d_head]`."""
        query, (rows, kv_heads, length, width) = self.rest[0][:, :, -steps:], self.rest[1].shape
        per, prompts = query.shape[1] // kv_heads, len(self.parts[0][0])
        keys = torch.cat([key.repeat(1, rows // key.shape[1], 1, 1, 1) for _, _, key in self.parts], 3)
        looks = [Look(self.layer, *found) for found in zip(query.split(prompts), *(k.split(prompts) for k in keys))]
        chosen = torch.cat([reader.choose(look) for reader, look in zip(self.readers, looks)])
        self.picked.append(chosen)
        own = torch.arange(length - steps, length, device=query.device)
        ahead = chosen.sum(-1, keepdim=True) - chosen.cumsum(-1) + 1  # chunks between a query's own and the one that it reads
        turned = query.new_zeros(*chosen.shape, width)
        turned[chosen] = self.turn(query[:, :, :, None].expand(turned.shape)[chosen], (ahead * self.size + own[:, None])[chosen])
        turned = turned.unflatten(1, (kv_heads, per)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # chunks in front of queries
        here = self.turn(query, own).unflatten(1, (kv_heads, per)).flatten(2, 3)
        inside, logits, sizes = torch.arange(length, device=query.device), [], [k.shape[2] for k, _, _ in self.parts]
        for (k, _, _), asks in zip(self.parts, turned.split(sizes, 2)):
            found = _by_prompt(asks.flatten(1, 2), k.flatten(1, 2).transpose(-1, -2)).unflatten(1, (kv_heads, -1))
            logits.append(found.transpose(2, 3).flatten(3))
        logits.append(here @ self.turn(self.rest[1], inside).transpose(-1, -2))
        earlier = (inside < own[:, None] + (not quirk)).expand(*chosen.shape[:3], -1)
        hidden = ~torch.cat([chosen.repeat_interleave(self.size, -1), earlier], -1)
        logits = (torch.cat(logits, -1) * scaling).unflatten(2, (per, steps))
        logits = logits.masked_fill_(hidden.unflatten(1, (kv_heads, per)), -math.inf)
        w = softmax(logits, -1, dtype=torch.float32).to(logits.dtype).flatten(2, 3)
        *w, last = w.split([n * self.size for n in sizes] + [length], -1)
        mixed = (_by_prompt(weights.contiguous(), v.flatten(2, 3)) for weights, (_, v, _) in zip(w, self.parts))
        return sum(mixed, last @ self.rest[2]).unflatten(2, (per, steps)).flatten(1, 2)


class ChunkCache(Cache):
    """A KV cache that is read in chunks: every head takes a few, for every query anew.

        cache = heads.ChunkCache(lm, size=32)                             # LongHeads, 8 chunks of 32 tokens
        lm.generate(ids, past_key_values=cache, max_new_tokens=50)        # or lm.trace, or plain transformers

    The first pass is ordinary attention, whatever its length; whatever comes later chooses. A text longer than the model can
    read begins with a pass that it can, and goes on in passes of a few chunks.

    Args:
        model: a loaded decoder with rotary positions.
        size: tokens of a chunk.
        readers: what is read; with several, row r of all passes but the first has reader r // prompts, prompt r % prompts.
        quirk: as the released code: in passes of several tokens no query sees its own key.

    Raises:
        ValueError: an encoder; positions that are not rotary in every layer, a sliding window, a soft cap or a sink; padding,
            and rows that are not readers times prompts. NotImplementedError: to crop it, to read a pattern afterwards.
    """

    def __init__(self, model, size: int = 32, readers: Sequence[Reader] | Reader = (Reader(),), quirk: bool = False):
        windows, module, n = free_layers(model), model._module, model.anatomy.n_layers
        if len(windows) < n:
            raise ValueError(f"layers of this {model.anatomy.family} model see a sliding window only: chunks are not read there")
        self.readers, size = _several(readers), whole("size", size, 2)
        turn = _Turn(module, model.layers[0].attn._module, model.anatomy.family)
        turns(model, turn)
        super().__init__(layers=[_ChunkLayer(module, i, turn, size, self.readers, quirk) for i in range(n)])

    def fork(self, readers: Sequence[Reader] | Reader) -> ChunkCache:
        """The prompts of this cache, read once and held once, for other readers. ValueError when more than them was read."""
        if any(layer._first() or layer.picked for layer in self.layers):
            raise ValueError("a cache is forked when its prompts were read and nothing else yet")
        found = copy.copy(self)  # layers replace what they hold and never change it
        found.readers = _several(readers)
        found.layers = [copy.copy(layer) for layer in self.layers]
        for layer in found.layers:
            layer.readers = found.readers
        return found

    @property
    def picked(self) -> list[list[torch.Tensor]]:
        """What the last pass has read: for each layer, the chunks of all its queries in order, one tensor for the queries of
        each chunk: `[row, head, query, complete chunk]`, true where it was read."""
        return [layer.picked for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes that all layers hold: more than a plain cache, by the chunk keys and the last queries."""
        return sum(x.nbytes for layer in self.layers for part in (*layer.parts, layer.rest) for x in part)


def _several(readers: Sequence[Reader] | Reader) -> list[Reader]:
    found = [readers] if isinstance(readers, Reader) else list(readers)
    if not found or not all(isinstance(reader, Reader) for reader in found):
        raise ValueError(f"readers are heads.Reader, one or more, got {readers!r}")
    return found


@torch.no_grad()
def turns(model, turn: _Turn) -> None:
    """Once per module: keys of one token again and again are the same in every layer, once they are turned back. ValueError
    where they are not: positions come in elsewhere, too."""
    found = model._module.__dict__
    if "_turns" not in found:
        cache = DynamicCache()
        model._module(input_ids=torch.full((1, 12), 7, device=model.device), past_key_values=cache, use_cache=True)
        keys = [turn(layer.keys, torch.arange(12, device=model.device), True) for layer in cache.layers]
        found["_turns"] = max(((k - k[:, :, :1]).abs().max() / k.abs().max()).item() for k in keys)
    if not found["_turns"] <= (1e-3 if model._module.dtype == torch.float32 else 0.1):
        raise ValueError(f"the keys of this {model.anatomy.family} model, turned back by its rotary embedding, still depend on "
                         "their position: its chunks cannot be moved")  # fmt: skip
