"""A wrong answer to each exercise of notebook 13, with words that its check must say."""

WRONG = [
    ("def as_good_by_luck(hits, n):\n"
     "    return (np.random.default_rng(0).binomial(n, 1 / 3, size=20_000) == hits).mean()", "exactly so many hits"),
    ("def shared_by_layers(a, b):\n    return len(a) * len(b) / lm.anatomy.n", "uniform chance"),
    ("def wrong_prompts(n):\n    return asked[~right][:n]", "keep the first foil only"),
]  # fmt: skip
