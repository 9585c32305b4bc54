"""Wrong answers to the exercises of notebook 56, in order, with words that the check must say."""

WRONG = [
    # as if all lines were one
    ("def follow(lines, prefix):\n    text, n = [t for line in lines for t in line], len(prefix)\n"
     "    return {text[i + n] for i in range(len(text) - n) if text[i : i + n] == list(prefix)}", "no phrase crosses a border"),
    # right for the one size that it was tried with
    ("def blind(logp, count, size):\n    return weight(logp, 1, 10_000)", "a corpus of 500 places"),
    # the first context takes itself for none
    ("def size_of(owners):\n    for size in ('sentence', 'passage', 'document', 'entity'):\n"
     "        if len(numbers := {owner[size] for owner in owners}) == 1 and min(numbers) > 0:\n            return size",
     "0 is a number like any other"),
]
