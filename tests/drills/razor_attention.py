"""A plausible wrong answer to each exercise of notebook 31, and words that its check must say."""

WRONG = [
    # the share of each head that forgets, as if the full heads cost nothing
    ("def last_tokens(H, F, N, s, N0):\n    return int(s * N) - N0 - 1", "of the cache is kept, more than"),
    # the token without its weight
    (
        "def compensated(q, k, v, drop):\n"
        "    weights = torch.cat([k[~drop] @ q, (q @ k[drop].mean(0))[None]]).softmax(0)\n"
        "    return weights @ torch.cat([v[~drop], v[drop].mean(0)[None]])",
        "its weight is missing",
    ),
    # the paper's own, which unequal gains and a bias get past
    ("def largest(gain, bias):\n    return gain.norm() ** 2 + bias.norm() ** 2", "an input has squared norm"),
]
