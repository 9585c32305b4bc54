"""Small sums: "1+2=3", "4+3=7", ..., "5+2=" -> "7", as in Zhang et al. (2024, arXiv 2409.01659)."""

from __future__ import annotations

import operator

import numpy as np

from heads.names import count, known
from heads.tasks.base import Item, Task, build, fill, single, spaced

# What computes the result, and the sign, verb and noun that ask for it.
OPERATIONS = {
    "addition": (operator.add, "+", "plus", "sum"),
    "subtraction": (operator.sub, "-", "minus", "difference"),
    "multiplication": (operator.mul, "*", "times", "product"),
    "division": (operator.floordiv, "/", "over", "ratio"),
}
TEMPLATES = {
    "symbols": "{operand 1}{operator}{operand 2}=",
    "question": "Question: What is {operand 1} {operator} {operand 2}? Answer:",
    "equals": "{operand 1} {operator} {operand 2} equals",
    "noun": "The {operator} of {operand 1} and {operand 2} is",
}
# What stands in the operator's place where nothing is to be calculated.
NEUTRAL = {"symbols": "&", "question": "and", "equals": "and", "noun": "pair"}


def arithmetic(model, n: int | None = None, seed: int = 0, operation: str = "addition", template: str = "symbols",
               shots: int = 4, counterfactual: str = "operands", largest: int = 9) -> Task:  # fmt: skip
    """Solved examples and one more calculation. Foils are the other numbers that could be an answer.

    A calculation is asked once at most, and neither it nor its twin's is among the examples, in either order. Roles:
    "operand 1", "operator", "operand 2", "END".

    Args:
        n: prompts; None for every calculation there is (36 for addition and for subtraction with one digit).
        operation: a key of `OPERATIONS`. Operands are from 1; division leaves no rest.
        template: a key of `TEMPLATES`. Where the tokenizer makes a space its own token, the prompt ends with it.
        shots: solved examples before the question.
        counterfactual: "operands", a calculation that shares no number with this one (neither operand nor result) where
            that is possible, and neither an operand in its place nor the result otherwise; or "operator", the
            same operands with a neutral word or sign in place of every operator, and the examples' results shuffled.
        largest: the largest number to appear. Answers must be single tokens, so many tokenizers allow 9 only.

    Raises:
        LookupError: for an unknown operation, template or counterfactual.
        ValueError: for more prompts or shots than there are calculations.
    """
    known("operation", operation, OPERATIONS)
    known("template of arithmetic", template, TEMPLATES)
    known("counterfactual of arithmetic", counterfactual, ("operands", "operator"))
    name = f"arithmetic, {operation}"
    gap, numbers, dropped = _numbers(model, template, largest)
    problems = _problems(operation, set(numbers))
    count(name, n, len(problems))
    most = max(len(problems) - 4, 0)  # the question, its twin's, and both in the other order are not shown
    if not 0 <= shots <= most:
        raise ValueError(f"{name}: shots={shots}: {len(problems)} calculations allow 0 to {most} examples")
    rng, items = np.random.default_rng(seed), []
    for i in rng.permutation(len(problems))[:n]:
        twin = _twin(rng, problems[i], problems)
        if twin is None:
            dropped.append((str(problems[i]), "no other calculation differs in both operands and the result"))
            continue
        left = [p for p in problems if sorted(p[:2]) not in (sorted(problems[i][:2]), sorted(twin[:2]))]
        examples = [left[k] for k in rng.choice(len(left), shots, replace=False)]
        items.append(_item(problems[i], twin, examples, operation, template, counterfactual, gap, numbers))
    return build(model, name, items, dropped)


def _numbers(model, template: str, largest: int):
    """(what stands between a prompt and its answer, the one-token numbers, (number, reason) of the others)."""
    if isinstance(largest, bool) or not isinstance(largest, int) or largest < 3:
        raise ValueError(f"arithmetic: largest={largest!r}: expected a whole number from 3")
    texts = [str(i) for i in range(largest + 1)]
    gap = ""
    if template == "symbols":
        kept, dropped = single(model, texts, "=", "")
    else:
        kept, gap, dropped = spaced(model, texts, " is")
    if not kept:
        raise ValueError("arithmetic: this tokenizer has no one-token digits")
    return gap, [int(text) for text in kept], dropped


def _problems(operation: str, numbers: set[int]) -> list[tuple[int, int, int]]:
    """(operand, operand, result), all from 1 and among the numbers."""
    compute = OPERATIONS[operation][0]
    found = [(a, b, compute(a, b)) for a in sorted(numbers - {0}) for b in sorted(numbers - {0})]
    return [p for p in found if p[2] >= 1 and p[2] in numbers and (operation != "division" or p[0] % p[1] == 0)]


def _twin(rng, problem, problems):
    """Another calculation: with no number in common if there is one, else no number in the same place."""
    strict = [p for p in problems if not set(p) & set(problem)]
    loose = [p for p in problems if all(x != y for x, y in zip(p, problem)) and problem[2] not in p]
    among = strict or loose
    return among[rng.integers(len(among))] if among else None


def _item(problem, twin, examples, operation, template, counterfactual, gap, numbers) -> Item:
    _, sign, verb, noun = OPERATIONS[operation]
    word = {"symbols": sign, "noun": noun}.get(template, verb)

    space = "" if template == "symbols" else " "
    results = [str(p[2]) for p in examples]

    def calculation(p, word, before=""):
        return fill(TEMPLATES[template], before, **{"operand 1": str(p[0]), "operator": word, "operand 2": str(p[1])})

    def text(asked, word, results):
        shown = "".join(f"{calculation(p, word)[0]}{space}{result}\n" for p, result in zip(examples, results))
        return calculation(asked, word, shown)

    prompt, roles = text(problem, word, results)
    if counterfactual == "operands":
        corrupted, _ = text(twin, word, results)
    else:
        corrupted, _ = text(problem, NEUTRAL[template], results[1:] + results[:1])
    lead = "" if gap else space
    foils = tuple(f"{lead}{i}" for i in numbers if i != problem[2])
    return Item(prompt + gap, f"{lead}{problem[2]}", foils, corrupted + gap, roles)
