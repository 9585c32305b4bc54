"""Indirect object identification: "Then, Mary and John went to the store. John gave a drink to" -> " Mary".

The task of Wang et al. (2022, arXiv 2211.00593), with the corruption of Merullo et al. (2023, arXiv 2310.08744) as the
default.
"""

from __future__ import annotations

import numpy as np

from heads.names import count, known
from heads.tasks.base import Item, Task, build, distinct, fill, single

NAMES = (
    "Adam Alice Andrew Anna Anthony Ben Benjamin Brian Charles Chris Christopher Daniel David Edward Elizabeth Emily Emma "
    "Eric Frank George Henry Jack James Jane Jason Jennifer Jessica Jim Joe John Joseph Joshua Julia Justin Karen Kate "
    "Kelly Kevin Laura Lisa Louis Lucy Maria Martin Mary Matthew Max Michael Nancy Nick Nicole Patrick Paul Peter Philip "
    "Rachel Rebecca Richard Robert Ryan Sam Samuel Sarah Scott Simon Stephen Steve Steven Susan Thomas Tom William"
).split()
PLACES = (
    "bank beach church garden hospital hotel house library market museum office park restaurant school station store "
    "theater farm"
).split()
OBJECTS = (
    "bag ball bone book card coin computer cup drink flower gift hat key letter map pen phone ring shirt ticket toy"
).split()
# As many words each, so that most tokenizers make them equally long. {first} and {second} are the two names.
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {S2} gave a {object} to",
    "Today, {first} and {second} met at the {place}. {S2} sent a {object} to",
    "When {first} and {second} came to the {place} together, {S2} gave a {object} to",
    "After {first} and {second} went to the {place} today, {S2} gave a {object} to",
    "While {first} and {second} were at the {place} together, {S2} gave a {object} to",
    "Friends {first} and {second} were at the {place}. So {S2} gave a {object} to",
)
CORRUPTIONS = ("flip", "abc")


def ioi(model, n: int = 64, seed: int = 0, corruption: str = "flip", template: int = 0) -> Task:
    """Two names, one of them again: the other one is the answer, the repeated one the foil.

    Prompts alternate between the orders ABBA (the answer's name first) and BABA, so that any even-sized slice is
    balanced. Roles: "IO" (the answer's name), "S1" (the subject), "S1+1" (the token after it), "S2" (its second mention),
    "END".

    Args:
        n: prompts, all different.
        corruption: "flip" puts the answer's name in the place of S2, which makes the subject the right answer;
            "abc" puts three other names in the places of all three, which leaves no right answer.
        template: which of `TEMPLATES`.

    Raises:
        LookupError: for an unknown corruption or template.
        ValueError: if this tokenizer has too few one-token names, places or objects, or for too many prompts.
    """
    known("corruption of ioi", corruption, CORRUPTIONS)
    known("template of ioi", template, range(len(TEMPLATES)))
    count("ioi", n)
    (names, a), (places, b), (objects, c) = (single(model, words) for words in (NAMES, PLACES, OBJECTS))
    if len(names) < 5 or not places or not objects:
        raise ValueError(
            f"ioi: this tokenizer has one token for {len(names)} of {len(NAMES)} names, {len(places)} of {len(PLACES)} "
            f"places and {len(objects)} of {len(OBJECTS)} objects; five names, a place and an object are needed"
        )
    rng, words = np.random.default_rng(seed), (names, places, objects)
    made = [distinct("ioi", half, lambda: _item(rng, words, TEMPLATES[template], order, corruption))
            for order, half in (("ABBA", n - n // 2), ("BABA", n // 2)) if half]  # fmt: skip
    items = [made[i % 2][i // 2] for i in range(n)]
    return build(model, "ioi", items, a + b + c)


def _item(rng, words, template: str, order: str, corruption: str) -> Item:
    io, s, *others = rng.choice(words[0], 5, replace=False).tolist()
    parts = dict(place=str(rng.choice(words[1])), object=str(rng.choice(words[2])))

    def text(a, b, c):
        first, second = (a, b) if order == "ABBA" else (b, a)
        return fill(template, first=first, second=second, S2=c, **parts)

    prompt, spans = text(io, s, s)
    corrupted = text(io, s, io)[0] if corruption == "flip" else text(*others)[0]
    first, second = ("IO", "S1") if order == "ABBA" else ("S1", "IO")
    roles = {first: spans["first"], second: spans["second"], "S2": spans["S2"]}
    roles["S1+1"] = (roles["S1"][1], roles["S1"][1] + 2)  # the space and the next letter
    return Item(prompt, f" {io}", (f" {s}",), corrupted, roles)
