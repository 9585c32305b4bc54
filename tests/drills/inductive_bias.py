"""Wrong answers to the exercises of 44_inductive_bias, and the words that the checks must say."""

WRONG = [
    (
        "def normal_nats(errors, tolerated):\n    return -stats.norm.logsf(tolerated, errors.mean(), errors.std())",
        "upper tail",
    ),
    ("def half_the_exam():\n    return here['exact']", "half as many outputs"),
    (
        "def error_of_the_mean(space):\n    values, offset, axes = space\n    return (offset.square() + values[:, None]).mean()",
        "average first, then square",
    ),
]
