"""What weights alone say: the OV and QK circuits of a head, copying and successor scores.

Vectors are rows: a head reads x and writes N(x) @ OV, where N is the input norm of its layer; what it writes
becomes logits through the final norm's weight and the unembedding. Norms only rescale a token's vector, so a
rank over tokens does not depend on their scale; their weights (Gemma's 1 + w included) and LayerNorm's centring do
matter, and are applied. Notation of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import nnsight
import numpy as np
import torch

from heads.model.offers import require
from heads.model.weights import (
    decoder_only, heads_everywhere, input_norm, kv_head, mlp_norm, output_projection, post_norms, project, qk_fold, qk_scale,
    unembedding,
)  # fmt: skip
from heads.names import known, whole
from heads.scores import HeadScores

KINDS = ("mlp0", "e+mlp0", "block0", "resid")
Lists = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # name -> (ids [item], pairs [pair, 2] of indices into ids)


# ------------------------------------------------------------------------------------ OV and QK


@dataclass(frozen=True)
class Factored:
    """A matrix of low rank, kept as its factors: x -> (x @ left + bias) @ right.

    Attributes:
        left: `[d_model, d_head]`. right: `[d_head, d_model]`. bias: `[d_head]` or None.
    """

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_model]` -> `[..., d_model]`, without ever forming the matrix."""
        inner = x.float() @ self.left
        return (inner if self.bias is None else inner + self.bias) @ self.right


def ov(model, layer: int, head: int) -> Factored:
    """What a head writes about a token that it attends to: N(x) -> N(x) W_V W_O, of rank d_head.

    Query heads of one group share W_V, and each has its own W_O. `bias` is that of the values. In Gemma 2 and 3 the sum
    over heads is normalised after this; the weight of that norm is not included.

    Raises:
        IndexError: for a head that does not exist. ValueError: for a model where the heads are not norm times W_V.
    """
    ((layer, head),) = model.anatomy.check([(layer, head)])
    require(model, "ov")
    (weight, bias), kv = project(model, layer, "v"), kv_head(model, head)
    return Factored(weight[kv], _writes(model, layer)[head], None if bias is None else bias[kv])


def qk(model, layer: int, head: int) -> Factored:
    """Where a head looks: N(x_query) @ QK @ N(x_key) is its attention logit, scale included, before any soft cap.

    With rotary embeddings the logit also depends on the distance, and this is the logit at distance 0, where the two
    rotations cancel: what the contents alone would say. Where queries and keys are normalised (Qwen 3, Gemma 3), the
    norms' weights are folded in and their scales left out: each logit is right up to one positive factor for
    the query and one for the key. `bias` is that of the queries; that of the keys adds the same to all
    keys of a query, and softmax does not see it (in a model without norms of keys, at distance 0).

    Raises:
        IndexError: for a head that does not exist. ValueError: for a model where queries and keys are something else.
    """
    ((layer, head),) = model.anatomy.check([(layer, head)])
    require(model, "qk")
    (q, bias), (k, _) = project(model, layer, "q"), project(model, layer, "k")
    factor = (qk_fold(model, layer)[head] * qk_scale(model, layer)).to(q.device)
    return Factored(q[head] * factor, k[kv_head(model, head)].T, None if bias is None else bias[head] * factor)


def ov_logits(model, layer: int, head: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits that a head gives tokens when it attends to x, up to one positive factor for each x.

    Args:
        x: `[..., d_model]`, before the layer's input norm, for example from `effective_embedding`.
        ids: `[token]`, the tokens that compete.

    Returns:
        `[..., token]`, float32.
    """
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"ids are [token] with at least one token, got {tuple(ids.shape)}")
    circuit = ov(model, layer, head)
    require(model, "readout")
    written = circuit(input_norm(model, layer)(x.to(circuit.left.device)))
    return written @ unembedding(model, ids, layer).to(written.device).T


# ------------------------------------------------------------------------- effective embeddings


@torch.no_grad()
def effective_embedding(model, ids: torch.Tensor, kind: str = "mlp0", batch: int = 256) -> torch.Tensor:
    """What a token looks like to heads above the first layers, without context.

    Args:
        ids: `[token]`.
        kind: "mlp0": the first MLP, with its own norm, on the embedding alone, as in Gould et al. 2023. "e+mlp0": embedding
            plus that. "block0": the residual stream after the first block, run on the token alone (its attention can
            only look at the token). "resid": the residual stream entering each layer at t, run on [BOS, t].
        batch: tokens in one pass.

    Returns:
        `[token, d_model]`, float32; `[layer, token, d_model]` for "resid". Position embeddings (GPT-2) are in "block0" and
        "resid" only.

    Raises:
        LookupError: for an unknown kind. ValueError: for no tokens, or a tokenizer without a first token.
    """
    decoder_only(model)
    known("effective embedding", kind, KINDS)
    ids = torch.as_tensor(ids, device=model.device)
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"ids are [token] with at least one token, got {tuple(ids.shape)}")
    parts = ids.split(whole("batch", batch, 1))
    if kind in ("mlp0", "e+mlp0"):
        require(model, "embedding", "mlp", "mlp0")
    return torch.cat([_effective(model, part, kind) for part in parts], dim=-2)


def _effective(model, ids: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "resid":
        bos = model.tokenizer.bos_token_id
        if bos is None:
            raise ValueError("this tokenizer has no first token (bos_token): set one, or use kind='e+mlp0' or 'block0'")
        with model.trace(input_ids=torch.stack([torch.full_like(ids, bos), ids], 1), use_cache=False):
            found = nnsight.save([])
            for block in model.layers:
                found.append(block.input[:, -1].float())
        return torch.stack([x.to(found[0].device) for x in found])
    if kind == "block0":
        with model.trace(input_ids=ids[:, None], use_cache=False):
            x = model.layers[0].output[:, -1].save()
        return x.float()
    # [token, 1, d_model]: a mixture of experts takes no less
    block, embedding = model.layers[0], model._module.get_input_embeddings()(ids[:, None])
    out = block.mlp._module(mlp_norm(model, 0)(embedding))
    post = post_norms(model, 0)[1]
    out = out if post is None else post(out)
    return (out.float() if kind == "mlp0" else out.float() + embedding.float())[:, 0]


# ------------------------------------------------------------------- successor and copying scores


class ListScores(HeadScores):
    """Share of pairs in which a head ranks the target first among its list, pooled over lists.

    Attributes:
        lists: name -> HeadScores of that list. pairs: name -> number of pairs.
        chance: expected score of a head that guesses.
    """

    def __init__(self, hits: Mapping[str, np.ndarray], sizes: Mapping[str, int], name: str, model=None):
        self.pairs = {key: len(x) for key, x in hits.items()}
        self.lists = {key: HeadScores(x.mean(0), f"{name}, {key}", model) for key, x in hits.items()}
        total = sum(self.pairs.values())
        self.chance = sum(n / sizes[key] for key, n in self.pairs.items()) / total
        super().__init__(np.concatenate(list(hits.values())).mean(0), name, model)


@torch.no_grad()
def successor_score(model, lists: Lists, effective: str | torch.Tensor = "mlp0", *, with_input: bool = True,
                    batch: int = 256, name: str = "successor score") -> ListScores:  # fmt: skip
    """How often each head, from weights alone, ranks an item's successor first (Gould et al. 2023).

    A head is fed the effective embedding of a token; of the logits that its OV circuit gives, only those of the same
    list compete.

    Args:
        lists: name -> (ids `[item]`, pairs `[pair, 2]` of indices into ids: an item and its successor), one entry for each
            task and surface form. Other pairs of the same tokens make controls.
        effective: see `effective_embedding`; or what that returned for the items of all lists in order, `[token, d_model]`
            or `[layer, token, d_model]`: many controls on one set of lists then cost one pass of the model.
        with_input: whether the token that went in competes, as in the paper: a head that only copies then fails.
        batch: tokens in one pass of the model.

    Returns:
        Scores `[layer, head]`, with `.lists`, `.pairs` and `.chance`.

    Raises:
        ValueError: for lists without pairs, or pairs that point outside their list.
    """
    heads_everywhere(model)
    lists = _checked(lists, with_input)
    ids = torch.cat([ids for ids, _ in lists.values()])
    x = effective if isinstance(effective, torch.Tensor) else effective_embedding(model, ids, effective, batch=batch)
    require(model, "ov", "readout")
    if x.shape[-2] != len(ids):
        raise ValueError(f"effective embeddings of {x.shape[-2]} tokens, but the lists with pairs hold {len(ids)} items")
    hits = {key: [] for key in lists}
    for layer in range(model.anatomy.n_layers):
        z, right = _values(model, layer, x[layer] if x.dim() == 3 else x)
        readout = unembedding(model, ids, layer).to(z.device)
        for (key, (members, pairs)), part, u in zip(lists.items(), *(y.split([len(m) for m, _ in lists.values()])
                                                                   for y in (z, readout)), strict=True):  # fmt: skip
            source, target = pairs.to(z.device).unbind(1)
            logits = torch.einsum("phd,hdt->pht", part[source], torch.einsum("hdm,tm->hdt", right, u))
            if not with_input:
                logits[torch.arange(len(source)), :, source] = -torch.inf
            hits[key].append((logits.argmax(-1) == target[:, None]).float().cpu())
    sizes = {key: len(members) - (not with_input) for key, (members, _) in lists.items()}
    return ListScores({key: torch.stack(layers, 1).numpy() for key, layers in hits.items()}, sizes, name, model)


def copying_score(
    model, lists: Lists | torch.Tensor, effective: str | torch.Tensor = "mlp0", batch: int = 256
) -> ListScores:
    """How often each head, from weights alone, ranks the token that it is fed first, among its list.

    Args:
        lists: as for `successor_score`, scored on the same tokens; or token ids `[token]` that make one list.
    """
    if isinstance(lists, torch.Tensor):
        lists = {"tokens": (lists, torch.arange(len(lists))[:, None].expand(-1, 2))}
    copies = {key: (ids, torch.as_tensor(pairs)[:, :1].expand(-1, 2)) for key, (ids, pairs) in lists.items()}
    return successor_score(model, copies, effective, batch=batch, name="copying score")


def _checked(lists: Lists, with_input: bool) -> Lists:
    """Lists as tensors, the empty ones left out.

    Raises:
        ValueError: naming the list that cannot be scored and why, or if none is left.
    """
    found = {}
    for name, (ids, pairs) in lists.items():
        ids, pairs = torch.as_tensor(ids), torch.as_tensor(pairs, dtype=torch.long)
        if not len(pairs):
            continue
        if ids.dim() != 1 or pairs.dim() != 2 or pairs.shape[1] != 2:
            got = f"{tuple(ids.shape)} and {tuple(pairs.shape)}"
            raise ValueError(f"list {name!r}: expected ids [item] and pairs [pair, 2], got {got}")
        if pairs.min() < 0 or pairs.max() >= len(ids):
            raise ValueError(f"list {name!r}: pairs point to item {int(pairs.max())}, but it has items 0 to {len(ids) - 1}")
        if len(ids.unique()) < len(ids):
            raise ValueError(f"list {name!r} holds a token twice: its items cannot be told apart")
        if not with_input and (pairs[:, 0] == pairs[:, 1]).any():
            raise ValueError(f"list {name!r} maps a token to itself: with_input=False would make that impossible to score")
        found[name] = (ids, pairs)
    if not found:
        raise ValueError("no list has a pair of items: nothing to score with this tokenizer")
    return found


def _writes(model, layer: int) -> torch.Tensor:
    """Every head's W_O, `[head, d_head, d_model]` float32."""
    return output_projection(model, layer).detach().float().unflatten(0, (model.anatomy.n_heads, -1))


def _values(model, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query head's values of residuals `[token, d_model]`, `[token, head, d_head]`; W_O `[head, d_head, d_model]`."""
    weight, bias = project(model, layer, "v")
    z = torch.einsum("tm,hmd->thd", input_norm(model, layer)(x.to(weight.device)), weight)
    z = z if bias is None else z + bias
    return z.repeat_interleave(model.anatomy.n_heads // z.shape[1], 1), _writes(model, layer)
