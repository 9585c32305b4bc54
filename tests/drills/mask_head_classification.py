"""Wrong answers to the exercises of notebook 51, in order, with words that the check must say."""

WRONG = [
    ("def not_one_piece(words, tokenize):\n    return [word for word in words if len(tokenize(word)) > 1]",
     "a word of no pieces is not one piece"),
    ("def other_words(words):\n    return words[1:] + words[:1]", "exactly one word is replaced"),
    ("def dummy_targets(ids, places, mask):\n    return [ids[i] if i in places else -100 for i in range(len(ids))]",
     "that is the real masked-word target"),
]  # fmt: skip
