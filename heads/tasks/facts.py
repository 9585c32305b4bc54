"""Extractive question answering on generated facts: a short passage about invented people, one question.

No world knowledge helps, and the answer stands in the passage word for word (data/facts.md).
"""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np

from heads.names import count, data
from heads.tasks.needle import Sample, continuation, find_span


def facts(model, n: int = 8, n_facts: int = 12, seed: int = 0) -> list[Sample]:
    """Passages of `n_facts` sentences, each ending with the stem of one of them.

    Every fact has its own person and value; attributes repeat, so that the attribute alone does not give
    the answer away.

    Raises:
        ValueError: if more facts are asked for than there are people.
    """
    count("facts", n)
    lists, rng, samples = json.loads(data("facts.json")), np.random.default_rng(seed), []
    if not 1 <= n_facts <= len(lists["people"]):
        raise ValueError(f"n_facts={n_facts}: between 1 and {len(lists['people'])} facts fit into a passage")
    for i in range(n):
        people = rng.permutation(lists["people"])[:n_facts]
        kinds = [lists["attributes"][k] for k in rng.choice(len(lists["attributes"]), size=n_facts)]
        values: list[str] = []
        for kind in kinds:
            left = [value for value in kind["values"] if value not in values]
            values.append(left[rng.integers(len(left))])
        sentences = [kind["sentence"].format(person=p, value=v) for kind, p, v in zip(kinds, people, values)]
        asked = int(rng.integers(n_facts))
        prompt = f"{' '.join(sentences)} {kinds[asked]['stem'].format(person=people[asked])}"
        ids, answer_ids = continuation(model.tokenizer, prompt, f" {values[asked]}")
        span = find_span(model.tokenizer, ids[0].tolist(), values[asked], " ".join(sentences[:asked]))
        name, length = f"facts-{seed}-{i}", ids.shape[1]
        samples.append(Sample(ids, span, values[asked], answer_ids, name, "stem", length, asked / n_facts))
    return samples


def token_f1(prediction: str, answer: str) -> float:
    """F1 over the words of two answers, as in SQuAD (Rajpurkar et al. 2016): lower case, no punctuation or
    articles."""
    def words(text):
        return [w for w in re.findall(r"\w+", text.lower()) if w not in {"a", "an", "the"}]

    predicted, gold = words(prediction), words(answer)
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0
