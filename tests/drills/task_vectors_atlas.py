"""Wrong answers to the exercises of notebook 61, in order, with words that the check must say."""

WRONG = [
    ("def by_layer(layer):\n    return np.ones((len(np.unique(layer)), len(layer)))", "a block lies in exactly one layer"),
    ("def best_scale(a, c):\n    return c / (a + c)", "without harm (c = 0) the best scale is 1"),
    ("def error_between(alone, together):\n    return abs(alone - together).mean()", "the order of classes has no meaning"),
]
