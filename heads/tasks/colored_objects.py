"""Colored objects: three objects, three colours, one question, after one solved example.

The format of Merullo et al. (2023, arXiv 2310.08744), who took the task from BIG-bench.
"""

from __future__ import annotations

import numpy as np

from heads.names import count, known
from heads.tasks.base import Item, Task, build, distinct, single

OBJECTS = (
    "ball bottle bowl bracelet cup envelope jug leash lighter mug necklace notebook pen pencil plate puzzle textbook"
).split()
COLOURS = "red orange yellow green blue purple brown black".split()
PLACES = "table desk floor".split()
OPENINGS = ("there is", "you see", "I see")


def colored_objects(model, n: int = 64, seed: int = 0, foils: str = "twin") -> Task:
    """Which colour has the object? The twin asks about another object of the same three.

    Roles: "query object" (in the question), "right object" and "right colour" (where they stand together before),
    "foil object" and "foil colour" (those of the twin's question), "other object" and "other colour" (the third),
    "example answer", "END".

    Args:
        n: prompts, all different.
        foils: "twin", the colour that would be right in the twin, or "both", also the third colour (so that accuracy
            among options has a chance level of one third).

    Raises:
        LookupError: for unknown foils.
        ValueError: if this tokenizer has too few one-token objects or colours.
    """
    known("foils of colored_objects", foils, ("twin", "both"))
    count("colored_objects", n)
    objects, a = single(model, [f" {w}" for w in OBJECTS])
    small, b = single(model, [f" {w}" for w in COLOURS])
    large, c = single(model, [f" {w.capitalize()}" for w in COLOURS])
    objects = [w.strip() for w in objects]
    colours = [w for w in COLOURS if f" {w}" in small and f" {w.capitalize()}" in large]
    if len(objects) < 3 or len(colours) < 3:
        raise ValueError(
            f"colored_objects: this tokenizer has one token for {len(objects)} of {len(OBJECTS)} objects and "
            f"{len(colours)} of {len(COLOURS)} colours; three of each are needed"
        )
    rng = np.random.default_rng(seed)
    items = distinct("colored_objects", n, lambda: _item(rng, objects, colours, foils))
    return build(model, "colored_objects", items, n, a + b + c)


def _item(rng, objects, colours, foils: str) -> Item:
    prompt, spans, _ = _example(rng, objects, colours)
    answer = spans.pop("answer")
    prompt, example = f"{prompt} {answer}\n", (len(prompt) + 1, len(prompt) + 1 + len(answer))
    query, spans, asked = _example(rng, objects, colours)
    other = [asked[1], asked[2]]
    roles = {"example answer": example}
    for role, k in zip(("right", "foil", "other"), range(3)):
        for kind in ("object", "colour"):
            roles[f"{role} {kind}"] = tuple(len(prompt) + i for i in spans[f"{kind} {asked[k][0]}"])
    roles["query object"] = tuple(len(prompt) + i for i in spans["query"])
    cut, end = spans["query"]
    twin = query[:cut] + other[0][1] + query[end:]
    wrong = tuple(f" {colour.capitalize()}" for _, _, colour in (other if foils == "both" else other[:1]))
    return Item(prompt + query, f" {spans['answer']}", wrong, prompt + twin, roles)


def _example(rng, objects, colours):
    """One question without its answer, the spans in it, and (place, object, colour) with the asked one first."""
    things, shades = (rng.choice(words, 3, replace=False).tolist() for words in (objects, colours))
    three = list(zip(range(3), things, shades))
    text, spans = f"Q: On the {rng.choice(PLACES)}, {OPENINGS[rng.integers(len(OPENINGS))]}", {}
    for k, thing, colour in three:
        text += " and" * (k == 2) + (" an " if colour[0] in "aeiou" else " a ")
        spans[f"colour {k}"] = (len(text), len(text) + len(colour))
        text += colour + " "
        spans[f"object {k}"] = (len(text), len(text) + len(thing))
        text += thing + ("." if k == 2 else ",")
    order = rng.permutation(3)
    asked = [three[k] for k in order]
    text += " What color is the "
    spans["query"] = (len(text), len(text) + len(asked[0][1]))
    return f"{text}{asked[0][1]}?\nA:", {**spans, "answer": asked[0][2].capitalize()}, asked
