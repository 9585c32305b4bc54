"""Heads that copy, found without data: on random tokens that are repeated (RazorAttention, arXiv 2407.15891, section 3.2)."""

from __future__ import annotations

import torch

from heads.model.weights import check_length, decoder_only
from heads.names import whole
from heads.scores import HeadScores


def repeated_tokens(model, tokens: int = 96, repeats: int = 4, seed: int = 0) -> torch.Tensor:
    """`[1, position]`: the tokenizer's first special token, then distinct random words of the vocabulary, the same again and again.

    The first token matters: a model that was trained on texts that all begin with one repeats nothing after another.
    """
    check_length(model, 1 + whole("tokens", tokens, 2) * whole("repeats", repeats, 2))
    special = set(model.tokenizer.all_special_ids)
    usable = torch.tensor([i for i in range(min(len(model.tokenizer), model.config.get_text_config().vocab_size)) if i not in special])
    if len(usable) < tokens:
        raise ValueError(f"{tokens} distinct tokens: the vocabulary has {len(usable)}")
    block = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))[:tokens]]
    first = model.tokenizer("").input_ids[:1] or [model.tokenizer.bos_token_id or model.tokenizer.eos_token_id or 0]
    return torch.tensor([[*first, *block.tolist() * repeats]])


def echo_and_induction(model, tokens: int = 96, repeats: int = 4, seed: int = 0) -> tuple[HeadScores, HeadScores]:
    """How much each head attends to earlier copies of its token (echo), and to what followed them (induction).

    For each position behind the first block: the attention to the same token in all earlier blocks, and to the token after
    each of these; means over positions. The first token is left out of both.

    Returns:
        (echo, induction): `[layer, head]`, shares of attention from 0 to 1; zero in layers without heads.

    Raises:
        ValueError: an encoder; a text longer than the model reads; more distinct tokens than the vocabulary has.
    """
    decoder_only(model)
    ids = repeated_tokens(model, tokens, repeats, seed)
    to = torch.arange(1, ids.shape[1])
    back = to[:, None] - to[None]
    same = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    same[1:, 1:] = (back > 0) & (back % tokens == 0)
    after = torch.zeros_like(same)
    after[1:, 2:] = same[1:, 1:-1]
    rows, shape = slice(1 + tokens, None), (model.anatomy.n_layers, model.anatomy.n_heads)
    found, masks = torch.zeros(2, *shape), torch.stack([same, after]).to(model.device)
    sums = {}
    with torch.no_grad(), model.trace(ids.to(model.device)):
        for layer in model.anatomy.attention_layers:
            weights = model.layers[layer].attn.pattern[0, :, rows]
            sums[layer] = torch.einsum("hqk,mqk->mh", weights.float(), masks[:, rows].float()).save()
    for layer, value in sums.items():
        found[:, layer] = value.cpu() / (ids.shape[1] - 1 - tokens)
    return tuple(HeadScores(values.numpy(), name, model) for values, name in zip(found, ("echo", "induction")))


def by_kv_head(scores: HeadScores, model) -> HeadScores:
    """Scores of query heads as scores of the key-value heads that they read, the largest of each group: `[layer, kv_head]`."""
    if not isinstance(scores, HeadScores):
        raise TypeError(f"scores are heads.HeadScores of every query head, got {type(scores).__name__}")
    scores.belongs_to(model)
    groups = scores.values.reshape(len(scores.values), model.anatomy.n_kv_heads, -1)
    return HeadScores(groups.max(-1), scores.name, model)
