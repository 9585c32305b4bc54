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

from heads.lab.caches import Policy, Reading, Share, free_layers
from heads.model.attention import mix, pattern
from heads.model.prefix import Prefix, SharedLayer, _by_prompt, _check
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

    def attend(self, module, query, key, value, mask, **kwargs) -> torch.Tensor:
        if (rows := len(query)) != self.policies * len(self.prefix_keys):
            raise ValueError(f"{rows} rows: expected {self.policies * len(self.prefix_keys)}, for each of {self.policies} policies "
                             f"the {len(self.prefix_keys)} prompts")  # fmt: skip
        before, own = _Before(self, query.shape), key.view(key.shape)
        own.prefix = before
        return mix(pattern(module, query, own, self._hides(query, key.shape[2], mask), **kwargs), value, before)

    def _hides(self, query, new: int, mask: torch.Tensor | None) -> torch.Tensor:
        """`[row, head, query, key]` to add to the logits: of the prompt, the stand-in and what is new."""
        rows, n_heads, steps, _ = query.shape
        later = torch.ones(steps, new, dtype=torch.bool, device=query.device).triu(new - steps + 1)
        parts = [self.hidden.view(rows, n_heads, 1, -1), self.bias.view(rows, n_heads, 1, 1), query.new_zeros(steps, new).masked_fill(later, -math.inf)]
        found = torch.cat([part.expand(rows, n_heads, steps, -1) for part in parts], -1)
        if mask is None:
            return found
        # padding of what follows: the columns of the prompt, and of what is new
        given = mask.to(query) if mask.dtype != torch.bool else query.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
        prompt, rest = given[..., : self.prefix_keys.shape[2]], given[..., -new:]
        given = torch.cat([prompt, prompt.new_zeros(*prompt.shape[:-1], 1), rest], -1)
        return (found + given).clamp(min=torch.finfo(query.dtype).min)  # a row of padding may see nothing

    def logits(self, queries: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a policy hides other tokens from every head, and a pattern that is read or edited does not know of "
                                  "it: read it while the prompt is read, or with heads.Prefix")  # fmt: skip

    def batch_select_indices(self, *_: Any) -> None:
        raise NotImplementedError("the rows of a MaskedPrefix are policies, which are not reordered: no beams, no choice of rows")

    reorder_cache = batch_repeat_interleave = batch_select_indices


class _Before:
    """What stands before the new keys of a pass, as the attention call asks for it: the prompt, and one column more for the
    stand-in of each head."""

    def __init__(self, layer: _MaskedLayer, shape: torch.Size):
        rows, n_heads, self.steps, width = shape
        self.keys, self.values = layer.prefix_keys, layer.prefix_values
        self.stand = layer.stand.view(2, rows, self.keys.shape[1], -1, 1, width)  # [key or value, row, kv_head, per, 1, d_head]

    def logits(self, queries: torch.Tensor) -> torch.Tensor:
        stand = queries.unflatten(2, (-1, self.steps)) @ self.stand[0].transpose(-1, -2)
        return torch.cat([_by_prompt(queries, self.keys.transpose(-1, -2)), stand.flatten(2, 3)], -1)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        stand = weights[..., -1:].unflatten(2, (-1, self.steps)) * self.stand[1]
        return _by_prompt(weights[..., :-1].contiguous(), self.values) + stand.flatten(2, 3)


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
