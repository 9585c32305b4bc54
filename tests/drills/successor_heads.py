"""A plausible wrong answer to each exercise of notebook 12, and words that its check must say."""

WRONG = [
    ("def two_on(pairs):\n    return torch.stack([pairs[:-2, 0], pairs[2:, 0]], 1)", "a pair is missing"),
    (
        'def rival_without(prompts):\n    cut = heads.direct_attribution(heads.ablate(lm, [rival]), prompts, reference="mean")\n'
        '    return heads.direct_attribution(lm, prompts, reference="mean")[rival], cut[rival]',
        "is not what is left",
    ),
    (
        "def right_modulo(m):\n    y = residue % m\n    return (tested(X, y, kind) == y)[np.isin(kind, taught)].mean()",
        "11 mod 7 is 4",
    ),
]
