"""Wrong answers to the exercises of notebook 57, in order, with words that the check must say."""

WRONG = [
    # letters instead of words
    ("def guess(child, names):\n    return max((n for n in names if n in child and n != child), key=len, default=None)", "as letters"),
    # the right letters, but the mean of the heads comes first
    ("def table(q, k):\n    scores = torch.einsum('ihd,jhd->ij', q, k) / q.shape[-1] ** 0.5\n    return scores.softmax(-1)",
     "the softmax comes first"),
    # precision and recall of a balanced world
    ("def f1_of(recall, alarm, rare):\n    return 2 * recall / (recall + alarm + 1)", "the false alarms drown the hits"),
]
