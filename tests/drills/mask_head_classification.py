"""Wrong answers to the exercises of notebook 51, in order, with words that the check must say."""

WRONG = [
    ("def not_one_piece(words, tokenize):\n    return [word for word in words if tokenize(word) != [word]]",
     "'Asia' is one piece"),
    ("def other_words(words):\n    return [words[1], *words[1:]]", "two classes have the same piece"),
    ("def dummy_targets(ids, places, mask):\n    return [mask if ids.index(x) in places else -100 for x in ids]",
     "pieces 7 8 8 5 7, masked at 1, 3 and 4"),
]  # fmt: skip
