"""A plausible wrong answer to each exercise of notebook 41, and words that the check says about it."""

WRONG = [
    # every head counts the same, whatever it says
    ("def merge(kq, weight):\n    return kq.mean(0), weight.sum()", "the part that depends on the query"),
    # the step is left as it is
    ("def best_error(guess, truth):\n    return (guess - truth).square().mean()", "is possible"),
    # only one of the two ways to have a single sign
    ("def both_by_chance(size):\n    return 1 - 0.5**size", "ways have both signs"),
]
