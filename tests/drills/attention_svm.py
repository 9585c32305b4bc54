"""Wrong answers to the exercises of notebook 42, and what their checks say."""

WRONG = [
    ("def can_win():\n    return {0, 1, 2, 3, 4}", "token 2 never wins"),
    ("def supports(D, Z):\n    return np.ones(len(D), bool)", "the solution would be the same"),
    ("def can_end():\n    return {0, 1, 3}", "starts at token 3 leaves it"),
]
