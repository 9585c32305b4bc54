"""A plausible wrong answer to each exercise of notebook 21, and words that the check says about it."""

WRONG = [
    # the answer comes out at the top, so the top must be it
    ("def layer_of_the_old_answer():\n    return n_layers - 1", "another layer raises it more"),
    # one mean for the whole model: forgets the layers with the heads
    ("def layer_means(table):\n    return table.mean((1, 2), keepdim=True).expand_as(table)", "the amount that is injected"),
    # the head that is nowhere open far, instead of everywhere
    (
        "def wanted_by_all():\n    return np.unravel_index(np.argmin(table.max(0)), table.shape[1:])",
        "there is a head that all open further",
    ),
]
