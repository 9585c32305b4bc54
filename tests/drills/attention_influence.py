"""A plausible wrong answer to each exercise of notebook 23, and words that the check says about it."""

WRONG = [
    # the old control once more: matched in layer, but with its sleeping heads
    (
        "def fair_control():\n"
        "    sleepers = sorted(set(np.ndindex(*scores.shape)) - set(taboo), key=lambda head: (-rest[head], head))\n"
        "    mine = [head for head in sleepers if head[0] >= min(top)[0]]\n"
        "    return mine[: len(top)]",
        "the mask wakes it",
    ),
    # one loss too many: the first token has none
    (
        "def influence_of_first(n):\n"
        "    base, masked = token_losses['as it is'], token_losses['retrieval']\n"
        "    rises = [m[:n].mean().item() / b[:n].mean().item() - 1 for m, b in zip(masked, base)]\n"
        "    return pd.Series(rises).groupby(kind_of, sort=False).mean().to_dict()",
        "the first token has none",
    ),
    # the linear correlation, which a single loop of keys decides
    (
        "def agreements():\n"
        "    return influence['retrieval'].corr(influence['first layers']), difference.corr(mean_loss['first layers'] - clean)",
        "is not the rank correlation",
    ),
]
