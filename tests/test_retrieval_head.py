"""Notebook 11: its generated facts can be answered from the passage alone, and its F1 is SQuAD's."""

import json
import re
import types
from collections import Counter

import pytest
import torch
from cells import run_cells

from heads.names import data
from heads.tasks.needle import Sample, continuation, find_span


@pytest.fixture(scope="module")
def book(default):
    names = {"lm": default, "json": json, "re": re, "Counter": Counter, "data": data, "Sample": Sample,
             "continuation": continuation, "find_span": find_span}  # fmt: skip
    return types.SimpleNamespace(**run_cells("retrieval-head", "facts", **names))


def test_every_fact_can_be_answered_from_its_passage_alone(book, default):
    samples = book.facts(6, n_facts=8, seed=3)
    for sample in samples:
        text = default.tokenizer.decode(sample.ids[0])
        assert default.tokenizer.decode(sample.copied).strip() == sample.answer
        assert text.count(sample.answer) == 1 and sample.span[1] < sample.ids.shape[1]
        assert default.tokenizer.decode(sample.answer_ids) == f" {sample.answer}"
    assert len({sample.name for sample in samples}) == 6 and len({sample.depth for sample in samples}) > 1


def test_the_answer_is_found_in_its_own_sentence(book, default):
    for sample in book.facts(12, seed=1):
        text = default.tokenizer.decode(sample.ids[0])
        sentence = next(s for s in text.split(". ") if s.startswith(text.rpartition(". ")[2]))
        assert default.tokenizer.decode(sample.ids[0, : sample.span[1]]).endswith(sentence.rstrip("."))


def test_facts_are_made_by_their_seed(book):
    one, same, other = ([sample.ids for sample in book.facts(3, seed=seed)] for seed in (1, 1, 2))
    assert all(map(torch.equal, one, same)) and not all(map(torch.equal, one, other)) and book.facts(0) == []


@pytest.mark.parametrize(
    "prediction, answer, f1",
    [
        ("a red boat", "the red boat", 1.0),
        ("Red, boat!", "red boat", 1.0),
        ("red", "red boat", 2 / 3),
        ("red red boat", "red boat", 0.8),
        ("blue", "red boat", 0.0),
        ("", "red boat", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_token_f1_is_squads(book, prediction, answer, f1):
    assert book.token_f1(prediction, answer) == pytest.approx(f1)
