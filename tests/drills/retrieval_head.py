"""A plausible wrong answer to each exercise of notebook 11, and words that its check must say."""

WRONG = [
    (
        "def looks_but_never_copies():\n    attention = np.mean([trial.needle for trial in detected.successes], axis=0)\n"
        "    return divmod(int(attention.argmax()), scores.shape[1])",
        "does copy",
    ),
    ("def prompts_needed(p, risk):\n    return round(1 / (1 - p))", "still looks always active"),
    ("def weakest_copiers(n):\n    return scores.rank()[-n:]", "random heads do that already"),
]
