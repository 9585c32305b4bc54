"""Notebook 56: its index and search against brute force, its weight and scores by hand, its models side by side, bad input."""

import copy
import hashlib
import json
import math
import re
import sys
import types
from collections import defaultdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from cells import run_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DynamicCache

import heads
from heads.course import papers

SLUG = "generative-retriever"
LINES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=8)


def load(*tags, **names):
    found = {"seed": 0, "topics": 3, "queries": 2, "beam": 3, "length": 4, "corpus": "manual", "width": 16, "lr": 2e-3, "steps": 4,
             "entities": 6, "batch": 2, "tests": 2, "heads": heads, "json": json, "math": math, "re": re, "sys": sys, "F": F,
             "hashlib": hashlib, "copy": copy, "Path": Path, "defaultdict": defaultdict, "SimpleNamespace": types.SimpleNamespace,
             "DynamicCache": DynamicCache, "manual": __import__("pydoc_data.topics").topics}  # fmt: skip
    for tag in tags:
        found = run_cells(SLUG, tag, **{**found, **names})
    return types.SimpleNamespace(**found)


book = load("index", "read", "search", "weight")


def source_of(tag):
    """The source of the first cell with a tag."""
    cells = nbformat.read(papers.notebook(SLUG), 4).cells
    return next(cell.source for cell in cells if tag in cell.metadata.get("tags", []))


def follow(lines, prefix):
    n = len(prefix)
    return {line[i + n] for line in lines for i in range(len(line) - n) if line[i : i + n] == prefix}


@given(LINES, st.lists(st.integers(0, 4), max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_index_allows_counts_and_locates_what_brute_force_does(lines, prefix):
    index = book.suffixes(lines, 4)
    span = book.find(index, prefix)
    starts = [(n, i) for n, line in enumerate(lines) for i in range(len(line)) if line[i : i + len(prefix)] == prefix]
    if not prefix:
        assert span is None
    elif not starts:
        assert span is None and not follow(lines, prefix)
        return
    else:
        at = np.cumsum([0, *(len(line) + 1 for line in lines)])
        assert sorted(index.order[span[0] : span[1]]) == [at[n] + i for n, i in starts]
    assert set(book.allowed(index, span, len(prefix))[0].tolist()) == follow(lines, prefix)


class Fixed:
    """A writer whose next token depends on the last one alone: logp [last, token]; it says how rows were continued."""

    def __init__(self, table, n):
        self.table, self.n, self.last = table, n, np.zeros(n, int)

    @property
    def logp(self):
        return self.table[self.last]

    def grow(self, parents, tokens):
        self.last = np.array(tokens)


@given(LINES, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_wide_beam_is_exhaustive_and_all_it_writes_exists(lines, seed):
    table = np.log(np.random.default_rng(seed).dirichlet(np.ones(5), 5))
    index = book.suffixes(lines, 3)
    found = book.search(Fixed(table, 2), book.within(index, 5), 500, 3)
    runs = {tuple(line[i : i + n]) for line in lines for n in (1, 2, 3) for i in range(len(line) - n + 1)}
    for q in (0, 1):
        mine = {g[1]: g[2] for g in found if g[0] == q}
        assert set(mine) == runs
        for ids, logp in mine.items():
            assert logp == pytest.approx(sum(table[a, b] for a, b in zip((0, *ids), ids)))
    narrow = book.search(Fixed(table, 1), book.within(index, 5), 1, 3)
    assert len(narrow) <= 3 and {g[1] for g in narrow} <= runs
    assert all(g[3] is None for g in book.search(Fixed(table, 1), book.within(None, 5), 2, 3))


def test_the_weight_is_the_formula_and_never_below_zero():
    p, f = math.exp(-2.0), 12 / 1005
    assert book.weight(-2.0, 7, 1000) == pytest.approx(math.log(p * (1 - f) / (f * (1 - p))) ** 2)
    assert book.weight(-9.0, 900, 1000) == 0 and math.isfinite(book.weight(0.0, 1, 1000))


def test_scores_go_where_phrases_stand_and_covered_words_count_a_fifth():
    lines = [[1, 2, 3], [1, 2], [4]]
    index = book.suffixes(lines, 3)
    context = np.repeat([0, 1, -1], [4, 3, 2])
    phrases = [(0, ids, logp, book.find(index, ids), 0) for ids, logp in (((1, 2), -0.5), ((1,), -1.0), ((4,), -0.1))]
    scores = book.retrieve(phrases, index, context, 2)
    w = [book.weight(logp, count, index.size) for logp, count in ((-0.5, 2), (-1.0, 2))]
    np.testing.assert_allclose(scores, [w[0] + 0.2 * w[1]] * 2)
    assert book.retrieve(phrases, index, context, 2, most=1).sum() == 0
    assert [g[3] for g in book.placed(phrases, book.suffixes([[9]], 3))] == [None] * 3
    with pytest.raises(ValueError, match="there are none"):
        book.interval([])


def test_a_beam_goes_on_from_its_own_row_with_what_was_read_once():
    lm = heads.load("tiny-llama", device="cpu")
    reader = load("writer", lm=lm).Writer(["a short one", "the longer one of two"])
    twin = reader.copy()
    twin.grow([1, 0, 1], [5, 6, 7])
    twin.grow([2, 0], [8, 9])
    for row, text, said in ((0, "the longer one of two", [7, 8]), (1, "the longer one of two", [5, 9])):
        ids = torch.tensor([lm.tokenizer(text).input_ids + said])
        with torch.no_grad(), lm.trace(ids):
            logits = lm.logits[0, -1].save()
        np.testing.assert_allclose(twin.logp[row], logits.log_softmax(-1).numpy(), atol=1e-4)
    assert len(reader.logp) == 2 and reader.mask.shape[1] == twin.mask.shape[1] - 2


def test_documents_of_a_file_and_one_that_is_not_there(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"title": "b", "text": "One. Two?\n\nThree\nfour."}, {"title": "a", "text": " "}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found, source = book.documents(str(path))
    assert found == {"b": [["One.", "Two?"], ["Three four."]]} and source.startswith("x.jsonl, SHA-256 ")
    with pytest.raises(FileNotFoundError, match="JSON Lines file"):
        book.documents("nowhere.jsonl")
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="holds no text"):
        book.documents(str(path))
    for row in ({"text": "One."}, {"title": "c"}, ["title", "text"]):
        path.write_text("\n".join(map(json.dumps, [rows[0], row])))
        with pytest.raises(ValueError, match='line 2: a document needs both "title" and "text"'):
            book.documents(str(path))


WRONG = [
    ("def follow(lines, prefix): return sorted(right_follow(lines, prefix))", "not a list"),
    ("def follow(lines, prefix):\n    rows, cut = [''.join(map(str, row)) for row in lines], ''.join(map(str, prefix))\n"
     "    return {int(row[i + len(cut)]) for row in rows for i in range(len(row) - len(cut)) if row[i:].startswith(cut)}",
     "compare tokens"),
    ("def follow(lines, prefix):\n    return {line[len(prefix)] for line in lines if line[: len(prefix)] == prefix != line}",
     "anywhere in it"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_the_first_check_says_what_is_wrong_and_takes_the_solution(wrong, words, capsys):
    cells = {tag: source_of(tag) for tag in ("solution", "check")}
    names = {**vars(book)}
    exec(cells["solution"].replace("def follow", "def right_follow").split("\n\n\n")[0], names)
    exec(wrong, names)
    with pytest.raises(AssertionError, match=words):
        exec(cells["check"], names)
    for nothing in ("...", "None"):
        exec(f"def follow(lines, prefix): return {nothing}\n" + cells["check"], names)
    exec(cells["solution"] + "\n" + cells["check"], names)
    assert capsys.readouterr().out.count("nothing to check yet") == 2


def test_too_few_sentences_to_ask_for_are_counted():
    with pytest.raises(ValueError, match=r"0 sentences to ask for \(8 to 30 words .* a-z\), fewer than queries=2"):
        load("questions", frequency={}, sentence=["too short"], np=np)


def side():
    device = types.SimpleNamespace(device=torch.device("cpu"))
    return load("world", "side", "arms", lm=device, suffixes=book.suffixes, seeds=2)


def test_models_side_by_side_learn_as_each_would_alone():
    s = side()
    arms = {"a": dict(start=0), "b": dict(start=1, kind="none")}
    both, _ = s.taught(arms)
    for name, arm in arms.items():
        alone, _ = s.taught({name: arm})
        for key, value in alone[name].items():
            torch.testing.assert_close(both[name][key], value, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="width=18 does not divide into 4 heads"):
        s.weights.__globals__["width"] = 18
        s.weights([0])


def test_a_split_hides_each_fact_from_one_size_and_a_single_model_sees_what_the_joint_one_sees():
    s = side()
    train, test = s.split("sizes", 0)
    assert sorted(train + test) == sorted(s.EVERY)
    assert {len({row[3] for row in test if row[:2] == fact}) for fact in {row[:2] for row in s.EVERY}} == {1}
    whole, one = s.lessons(0), s.lessons(0, sizes=["passage"])
    for a, b in zip(whole, one):
        np.testing.assert_array_equal(a[:, 2 * s.batch : 3 * s.batch], b)
    with pytest.raises(ValueError, match="there are 2 to"):
        s.world(1, np.random.default_rng(0))


def test_a_question_without_words_finds_nothing():
    names = {"bm25s": pytest.importorskip("bm25s"), "book": {"a": [["x"]]}, "sentence": ["x"], "tokens_of": lambda _: [[1]],
             "queries": 0, "chosen": []}  # fmt: skip
    names = run_cells(SLUG, "bm25", **names)
    found = names["bm25"]([["a", "b"], ["c"]], [["a"], []])
    assert found[0, 0] > 0 and not found[1].any()
