"""A plausible wrong answer to each exercise of notebook 32, and words that its check must say."""

WRONG = [
    # the line of the formula, whether or not the others still get their ends
    (
        "def whole_heads(layer, tokens, part):\n"
        "    line = n_heads * beta + (last - n_heads * beta) * layer / max(1, layers - 1)\n"
        "    return min(n_heads, max(0, round(line)))",
        "do the others still get their first and last tokens",
    ),
    # divided by the larger set, not by the union
    (
        "def chance_overlap(draws=300):\n"
        "    dice, found = np.random.default_rng(1), []\n"
        "    for _ in range(draws):\n"
        "        a, b = [{(r, h) for r, f in enumerate(counts) for h in dice.permutation(n_heads)[:f]} for _ in range(2)]\n"
        "        found.append(len(a & b) / max(len(a), len(b)))\n"
        "    return np.mean(found)",
        "the union counts shared heads once",
    ),
    # what each query head keeps, as if each had a cache of its own
    (
        "def really_held(wanted, tokens, group):\n"
        "    return np.mean([len(places) / tokens for row in wanted for places in row])",
        "one of a group is enough to hold it",
    ),
]
