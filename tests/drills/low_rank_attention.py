"""Wrong answers to the exercises of notebook 43, in order, with words that the check must say."""

WRONG = [
    ("def by_hand():\n    return [0, 1, 0], [0, 1, 0]", "one class must lie above the other"),
    (
        "def beside(words):\n    i = words.index('[blank]')\n    return words[max(0, i - 1) : i] + words[i + 1 : i + 2]",
        "the sides are not told apart",
    ),
    ("def saving(d, m, r):\n    return d * d / (2 * d * m * r)", "counted"),
]
