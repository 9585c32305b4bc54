"""A plausible wrong answer to each exercise of notebook 22, and words that the check says about it."""

WRONG = [
    # every head in a layer of its own, and drawn with replacement
    ("def layers_shared_by_chance():\n    return k * k / len(everywhere)", "is not what chance gives"),
    # the rows of W_O are taken for its columns: one head's numbers for a bias
    (
        "def as_biases():\n"
        "    table = offsets[tasks[0]].tables()[0].detach().float()\n"
        "    return {layer: table[layer].sum(0) for layer, head in scores[tasks[0]].top(k)}",
        "a bias has",
    ),
    ("def best_strength(tried=(0.25, 0.5, 1.0, 2.0, 4.0)):\n    return 3.0", "expected one of"),
]
