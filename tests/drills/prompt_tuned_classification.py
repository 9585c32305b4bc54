"""Wrong answers to the exercises of notebook 52, in order, with words that the check must say."""

WRONG = [
    (
        "def next_tokens(written):\n    begun = tree.split(written)[1]\n"
        "    return tree.allowed(begun) + ([STOP] if written and not begun else [])",
        "a used label is written again",
    ),
    ("def tokens_by_hand(n, m, w, n_layers=30, cut=26):\n    return n + m + max(0, w - 1)", "layers from the cut on"),
]
