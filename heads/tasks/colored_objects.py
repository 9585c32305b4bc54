"""Colored objects: three objects, three colours, one question, after one solved example.

The format of Merullo et al. (2023, arXiv 2310.08744), who took the task from BIG-bench.
"""

from __future__ import annotations

import numpy as np

from heads.names import known
from heads.tasks.base import Item, Task, build, distinct, fill, single

OBJECTS = (
    "ball bottle bowl bracelet cup envelope jug leash lighter mug necklace notebook pen pencil plate puzzle textbook"
).split()
COLOURS = "red orange yellow green blue purple brown black".split()
PLACES = "table desk floor".split()
OPENINGS = ("there is", "you see", "I see")
QUESTION = (
    "Q: On the {place}, {opening} {a 0} {colour 0} {object 0}, {a 1} {colour 1} {object 1}, "
    "and {a 2} {colour 2} {object 2}. What color is the {query object}?\nA:"
)


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
    objects, a = single(model, OBJECTS)
    small, b = single(model, COLOURS)
    large, c = single(model, [w.capitalize() for w in COLOURS])
    colours = [w for w in small if w.capitalize() in large]
    if len(objects) < 3 or len(colours) < 3:
        raise ValueError(
            f"colored_objects: this tokenizer has one token for {len(objects)} of {len(OBJECTS)} objects and "
            f"{len(colours)} of {len(COLOURS)} colours; three of each are needed"
        )
    rng = np.random.default_rng(seed)
    items = distinct("colored_objects", n, lambda: _item(rng, objects, colours, foils))
    return build(model, "colored_objects", items, a + b + c)


def _item(rng, objects, colours, foils: str) -> Item:
    (solved, (k, *_)), (parts, order) = _drawn(rng, objects, colours), _drawn(rng, objects, colours)
    answer = {"example answer": solved[f"colour {k}"].capitalize()}
    before, example = fill(QUESTION + " {example answer}\n", **solved, **answer, **{"query object": solved[f"object {k}"]})
    asked = [{**parts, "query object": parts[f"object {k}"]} for k in order[:2]]
    (prompt, spans), (twin, _) = (fill(QUESTION, before, **parts) for parts in asked)
    roles = {role: span[role] for role, span in (("example answer", example), ("query object", spans))}
    for role, k in zip(("right", "foil", "other"), order):
        roles |= {f"{role} {kind}": spans[f"{kind} {k}"] for kind in ("object", "colour")}
    right, *wrong = (f" {parts[f'colour {k}'].capitalize()}" for k in order)
    return Item(prompt, right, tuple(wrong if foils == "both" else wrong[:1]), twin, roles)


def _drawn(rng, objects, colours) -> tuple[dict[str, str], list[int]]:
    """Parts of a question, and its three objects in an order that begins with the one asked for."""
    things, shades = (rng.choice(words, 3, replace=False).tolist() for words in (objects, colours))
    parts = {"place": str(rng.choice(PLACES)), "opening": OPENINGS[rng.integers(len(OPENINGS))]}
    for k, (thing, colour) in enumerate(zip(things, shades)):
        parts |= {f"a {k}": "an" if colour[0] in "aeiou" else "a", f"colour {k}": colour, f"object {k}": thing}
    return parts, rng.permutation(3).tolist()
