"""Word tasks from examples: "Q: France\\nA: Paris\\n\\nQ: Japan\\nA:" -> " Tokyo".

The kind of task of Todd et al. (2023, arXiv 2310.15213), in their format; the words are this project's (data/words.md).
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from statistics import mode

import numpy as np

from heads.names import count, data, known
from heads.tasks.base import Item, Task, build, fill, pieces


@cache
def _data() -> dict[str, dict]:
    return {row["task"]: row for row in map(json.loads, data("words.jsonl").splitlines())}


def word_tasks(family: str | None = None) -> list[str]:
    """Names of the word tasks, all or of one family. LookupError for an unknown family."""
    if family is not None:
        known("family of word tasks", family, dict.fromkeys(row["family"] for row in _data().values()))
    return [name for name, row in _data().items() if family in (None, row["family"])]


def word_pairs(name: str, split: str | None = None) -> list[tuple[str, str]]:
    """The pairs of a word task as plain text.

    Args:
        split: "train" (60 %), "test", or None for all: an even cut through the pairs in the order of a checksum.

    Raises:
        LookupError: for an unknown task or split, naming the nearest.
    """
    known("word task", name, _data())
    if split is not None:
        known("split", split, ("train", "test"))
    pairs = [(x, y) for x, y in _data()[name]["pairs"]]
    order = sorted(pairs, key=lambda pair: zlib.crc32(f"{name}: {pair[0]}".encode()))
    train = set(order[: round(0.6 * len(order))])
    return [pair for pair in pairs if split is None or (pair in train) == (split == "train")]


def words(model, name: str, n: int | None = None, seed: int = 0, shots: int = 5, split: str | None = None, foils: int = 1,
          partial: bool = False) -> Task:  # fmt: skip
    """Examples of a word task and one more question.

    The twin asks for another word after the same examples; its answer is the first foil. Neither question is among the
    examples, nor is either answer. Roles: "example 1", "label 1", ... (question and answer of each example), "query"
    (the word asked for), "END".

    Args:
        name: one of `word_tasks()`.
        n: prompts, all different; None to ask each word once.
        shots: examples, drawn anew for every prompt; 0 for the question alone.
        split: where questions come from, "train" or "test"; examples then come from "train". None mixes both.
        foils: how many; the others are answers of other questions.
        partial: ask also for answers of several tokens, by their first one, where no other answer of the task
            starts with it; examples all have answers of the commonest length. Most translations need it.

    Raises:
        LookupError: for an unknown task or split.
        ValueError: if this tokenizer leaves too few pairs.
    """
    title = f"words, {name}"
    usable, dropped = _usable(model, word_pairs(name), partial)
    to_ask, to_show = set(word_pairs(name, split)), set(word_pairs(name, "train" if split else None))
    asked, shown = ([pair for pair in usable if (pair.x, pair.y) in part] for part in (to_ask, to_show))
    commonest = mode(pair.tokens for pair in shown) if shown else 0
    shown = [pair for pair in shown if pair.tokens == commonest]
    if not 0 <= shots <= len(shown) - 2 or len(asked) < 2:
        raise ValueError(
            f"{title}: this tokenizer leaves {len(asked)} pairs to ask and {len(shown)} to show, too few for {shots} "
            "examples" + ("" if partial else "; partial=True adds answers of several tokens")
        )
    count(title, n, None if shots else len(asked))
    rng, wanted, items = np.random.default_rng(seed), n or len(asked), {}
    rounds = range(1 if n is None else 20 + wanted // len(asked))  # every word once before one comes again
    for i in (i for _ in rounds for i in rng.permutation(len(asked))):
        try:
            item = _item(rng, asked[i], asked, shown, shots, foils)
            items.setdefault(item.prompt, item)
        except ValueError as reason:
            dropped[f"{asked[i].x}: {asked[i].y}"] = str(reason)
        if len(items) == wanted:
            break
    task = build(model, title, items.values(), dropped.items())
    if n is not None and len(task) < n:
        raise ValueError(f"{title}: {n} different prompts asked for, but only {len(task)} can be made: ask for fewer")
    return task


@dataclass(frozen=True)
class _Pair:
    """A question, its answer, the answer's number of tokens, and the text of its first one with its space."""

    x: str
    y: str
    tokens: int
    piece: str


def _usable(model, pairs, partial: bool) -> tuple[list[_Pair], dict[str, str]]:
    """Pairs whose question is one token and whose answer can be told by one, and pair -> reason of the others."""
    decode, found, dropped = model.tokenizer.decode, [], {}
    cut = lambda lead, word: pieces(model.tokenizer, lead, f" {word}")
    answers = {y: cut("A:", y) for _, y in pairs}
    first = Counter(ids[0] for ids in answers.values())
    for x, y in pairs:
        asked, ids = len(cut("Q:", x)), answers[y]
        piece = decode(ids[:1])
        reasons = {
            f"the question is {asked} tokens": asked > 1,
            f"the answer is {len(ids)} tokens": len(ids) > 1 and not partial,
            "another answer starts with the same token": partial and first[ids[0]] > 1,
            # part of an accented letter, for instance
            "the answer's first token is no text of its own": cut("A:", piece[1:]) != ids[:1],
        }
        if any(reasons.values()):
            dropped[f"{x}: {y}"] = next(reason for reason, holds in reasons.items() if holds)
        else:
            found.append(_Pair(x, y, len(ids), piece))
    return found, dropped


def _item(rng, query: _Pair, asked: list[_Pair], shown: list[_Pair], shots: int, foils: int) -> Item:
    """A prompt for one question; ValueError where the pairs are too few for it."""
    twins = [pair for pair in asked if pair.y != query.y]
    if not twins:
        raise ValueError("no other question has another answer")
    twin = twins[rng.integers(len(twins))]
    answers = {query.y, twin.y}
    fit = [pair for pair in shown if pair.x not in {query.x, twin.x, *answers} and pair.y not in answers]
    if len(fit) < shots:
        raise ValueError(f"{len(fit)} examples left that do not give the answer away, {shots} needed")
    examples = [fit[k] for k in rng.choice(len(fit), shots, replace=False)]
    others = sorted({pair.piece for pair in asked} - {query.piece, twin.piece})
    if not 1 <= foils <= len(others) + 1:
        raise ValueError(f"foils={foils}: between 1 and {len(others) + 1} answers can be foils")
    more = rng.choice(others, foils - 1, replace=False).tolist() if foils > 1 else []
    template, parts = "Q: {query}\nA:", {}
    for k in range(shots, 0, -1):
        template = f"Q: {{example {k}}}\nA: {{label {k}}}\n\n{template}"
        parts |= {f"example {k}": examples[k - 1].x, f"label {k}": examples[k - 1].y}
    (prompt, roles), (corrupted, _) = (fill(template, query=pair.x, **parts) for pair in (query, twin))
    return Item(prompt, query.piece, (twin.piece, *more), corrupted, roles)
