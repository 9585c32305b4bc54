"""A plausible wrong answer to each exercise of notebook 33, and words that its check must say."""

WRONG = [
    (
        "def chunks_read(scores, count):\n    last = len(scores) - 1\n"
        "    free = sorted(range(1, last), key=lambda chunk: -scores[chunk])\n    return sorted([0, last, *free[: count - 2]])",
        "the current one counts",
    ),
    ("def at_least_one(free, picks, wanted):\n    return 1 - (1 - picks / free) ** wanted", "no chunk is picked twice"),
]
