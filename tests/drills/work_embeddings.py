"""Wrong answers to the exercises of notebook 54, in order, with words that the check must say."""

WRONG = [
    ("def by_hand(places):\n    return sum(1 / place for place in places) / len(places)", "the share of right answers so far"),
    ("def right_answers(askers, answers, means):\n    return np.eye(4)", "name the same skill"),
    ("def one_sided():\n    return [[1, 0]], [[1, 0]]", "give it something more"),
]
