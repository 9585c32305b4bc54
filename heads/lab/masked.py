"""Many policies of what a head forgets, over one prompt that is kept once: the masked twins of `heads.HeadCache`.

A twin hides what the policy would have dropped, frees nothing, and gives the same logits. It compares policies cheaply: each
is a row of one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from heads.lab.caches import Policy, Reading, Share, free_layers, weighed
from heads.model.prefix import Prefix, SharedLayer, _check
from heads.names import whole


class _WholeLayer(Reading):
    """A layer that is kept whole, with what each policy would keep of it."""

    def __init__(self, model, layer: int, shares: list[Share]):
        super().__init__(model, layer)
        self.shares, self.keeps = shares, []

    def _first(self) -> bool:
        return not self.keeps

    def settle(self, query, key, value, scaling) -> None:
        self.keys, self.values = key.view(key.shape), value
        memo: dict = {}
        self.keeps = [share.ask(self.layer, query, key, value, scaling, memo) for share in self.shares]


class _MaskedLayer(SharedLayer):
    """A layer of a MaskedPrefix: row r has what policy r // prompts keeps of prompt r % prompts."""

    def __init__(self, whole_layer: _WholeLayer, model, per: int):
        super().__init__(whole_layer, model)
        (prompts, kv_heads, length, width), self.policies = self.prefix_keys.shape, len(whole_layer.keeps)
        shape, like = (self.policies, prompts, kv_heads * per), self.prefix_keys
        self.hidden = like.new_full((*shape, length), -math.inf)
        self.stand, self.bias = like.new_zeros(2, *shape, width), like.new_full(shape, -math.inf)
        for p, keep in enumerate(whole_layer.keeps):
            each = kv_heads * per // len(keep.tokens)
            sizes: dict[int, list[int]] = {}
            for n, row in enumerate(keep.tokens):
                sizes.setdefault(row.shape[1], []).append(n)
            for of in sizes.values():  # heads that keep equally many at once
                at = torch.tensor([n * each + i for n in of for i in range(each)], device=like.device)
                rows = torch.stack([keep.tokens[n] for n in of for _ in range(each)], 1)
                self.hidden[p, :, at] = self.hidden[p, :, at].scatter(2, rows, 0.0)
            for n, extra in enumerate(keep.stand_ins):
                if extra is not None:
                    mine = slice(n * each, (n + 1) * each)
                    self.stand[:, p, :, mine] = torch.stack([extra.key, extra.value]).to(like)[:, :, None]
                    self.bias[p, :, mine] = extra.bias

    def attend(self, module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_) -> torch.Tensor:
        rows, n_heads, steps, width = query.shape
        if rows != self.policies * len(self.prefix_keys):
            raise ValueError(f"{rows} rows: expected {self.policies * len(self.prefix_keys)}, for each of {self.policies} policies "
                             f"the {len(self.prefix_keys)} prompts")  # fmt: skip
        kv_heads, new = key.shape[1], key.shape[2]
        split = (rows, kv_heads, n_heads // kv_heads)
        q = query.reshape(rows, kv_heads, -1, width)
        stand = self.stand.reshape(2, *split, width)
        parts = [(q @ key.transpose(-1, -2)).view(*split, steps, new), self.logits(q).view(*split, steps, -1),
                 query.view(*split, steps, width) @ stand[0][..., None]]  # fmt: skip
        later = torch.ones(steps, new, dtype=torch.bool, device=q.device).triu(new - steps + 1)
        masks = [q.new_zeros(steps, new).masked_fill(later, -math.inf).expand(*split, -1, -1),
                 self.hidden.reshape(*split, 1, -1).expand(*split, steps, -1), self.bias.reshape(*split, 1, 1).expand(*split, steps, 1)]  # fmt: skip
        hides = torch.cat(masks, -1)
        if mask is not None:  # padding of what follows: the columns of the prompt, and of what is new
            given = mask.to(q) if mask.dtype != torch.bool else q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
            given = given[:, :, None] if given.shape[1] == 1 else given.view(*split, *given.shape[2:])
            prompt, rest = given[..., : self.prefix_keys.shape[2]], given[..., -new:]
            given = torch.cat([rest, prompt, prompt.new_zeros(*prompt.shape[:-1], 1)], -1)
            hides = (hides + given).clamp(min=torch.finfo(q.dtype).min)  # a row of padding may see nothing
        logits = torch.cat(parts, -1) * (width**-0.5 if scaling is None else scaling)
        sink = None if s_aux is None else s_aux.view(kv_heads, -1)
        w = weighed(logits, hides, softcap, sink).view(rows, kv_heads, -1, logits.shape[-1])
        z = w[..., :new] @ value + self.mix(w[..., new:-1].contiguous())
        z = z.view(*split, steps, width) + w[..., -1:].view(*split, steps, 1) * stand[1][..., None, :]
        return z.reshape(rows, n_heads, steps, width).transpose(1, 2)

    def batch_select_indices(self, *_: Any) -> None:
        raise NotImplementedError("the rows of a MaskedPrefix are policies, which are not reordered: no beams, no choice of rows")

    reorder_cache = batch_repeat_interleave = batch_select_indices


class MaskedPrefix(Prefix):
    """Prompts of equal length, read and kept once, and continued as under many policies at a time.

        masked = heads.MaskedPrefix(lm, ids, [heads.policies.everything, heads.policies.recent(4)], [1, 0.3])
        with lm.trace(questions, past_key_values=masked.cache()):     # row r: policy r // prompts, prompt r % prompts

    Frees nothing: the logits are those of a HeadCache of each policy (to float tolerance).

    Args:
        model, ids, prompt: as for `heads.Prefix`.
        policies: what each head keeps; one that answers for every query head is taken, too.
        shares: one for each policy, or one for all; as for `HeadCache`.
        room: as there; it only counts.
    """

    def __init__(self, model, ids: torch.Tensor, policies: Sequence[Policy], shares: float | Sequence[float] = 1.0, room: int = 64,
                 prompt: int | None = None):  # fmt: skip
        _check(model, ids)
        free = free_layers(model)
        each = [shares] * len(policies) if isinstance(shares, (int, float)) else list(shares)
        if not policies or len(each) != len(policies):
            raise ValueError(f"{len(policies)} policies and {len(each)} shares: expected one or more, and a share for each")
        self.shares = [Share(policy, share, room, free) for policy, share in zip(policies, each)]
        self.ids, self.prompt, self._module, self.edits = ids, prompt, model._module, list(model._edits)
        self._per = model.anatomy.n_heads // model.anatomy.n_kv_heads
        layers = [_WholeLayer(model._module, i, self.shares) if i in free else DynamicLayer() for i in range(model.anatomy.n_layers)]
        cache = Cache(layers=layers)
        cache.prompt = math.inf if prompt is None else whole("the prompt's length", prompt, 1)
        with torch.no_grad(), model.trace(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1):
            pass
        self.layers = layers

    def cache(self) -> Cache:
        """A fresh KV cache for policies times prompts rows: for one pass, or for the steps of one generation."""
        found = Cache(layers=[
            _MaskedLayer(layer, self._module, self._per) if isinstance(layer, _WholeLayer) else SharedLayer(layer, self._module)
            for layer in self.layers
        ])  # fmt: skip
        found.prompt = self.prompt
        return found
