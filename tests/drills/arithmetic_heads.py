"""Wrong answers to the exercises of notebook 14, and words that their checks must say."""

WRONG = [
    ("def most_key_heads():\n    return int(1 / threshold)", "not to 100 %"),
    (
        'def right_when_zeroed(chosen):\n'
        '    return torch.cat([knock_out(t, {"cut": chosen}, None, "zero")["cut"] for t in held]).sum().item()',
        "are right, not",
    ),
    (
        "def shuffled(examples, rng):\n    return [examples[i] for i in rng.permutation(len(examples))]",
        "the prompts moved",
    ),
]
