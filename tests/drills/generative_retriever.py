"""Wrong answers to the exercises of notebook 56, in order, with words that the check must say."""

WRONG = [
    # as if all lines were one
    ("def follow(lines, prefix):\n    text, n = [t for line in lines for t in line], len(prefix)\n"
     "    return {text[i + n] for i in range(len(text) - n) if text[i : i + n] == list(prefix)}", "no phrase crosses a border"),
    # a probability alone, without the corpus, is no weight
    ("def blind(logp, count, size):\n    return math.exp(logp)", "its weight is 0"),
    # the largest context that holds all places, not the smallest
    ("def size_of(owners):\n    for size in ('document', 'entity', 'passage', 'sentence'):\n"
     "        if len(numbers := {owner[size] for owner in owners}) == 1 and -1 not in numbers:\n            return size",
     "the passage holds all places"),
]
