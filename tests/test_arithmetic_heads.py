"""Notebook 14: many sets cut in one batch are the sets cut one by one."""

import types

import pytest
import torch
from cells import run_cells
from conftest import ids_of, plain_logits, tiny

import heads
from heads.tasks import Task

SLUG, N = "arithmetic-heads", 5


def cells(tag, **names):
    return types.SimpleNamespace(**run_cells(SLUG, tag, heads=heads, **names))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def task(lm):
    """Random prompts whose right answers are what the model says, so that a cut can only lose."""
    ids = ids_of(lm, rows=N)
    answers = plain_logits(lm, ids)[:, -1].argmax(-1)
    foils = ((answers + 1) % lm.config.get_text_config().vocab_size)[:, None]
    return Task("random", ids, answers, foils, ids_of(lm, rows=N, seed=1))


def test_twin_means_are_those_of_the_library(lm, task):
    found = cells("cut", lm=lm).twin_means(task)
    torch.testing.assert_close(found, heads.head_means(lm, list(task.corrupted[:, None]))[:, -1])


@pytest.mark.parametrize("rows", [400, 3], ids=["one batch", "a prompt at a time"])
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_a_batch_of_sets_equals_one_set_after_the_other(lm, task, kind, rows):
    book = cells("cut", lm=lm)
    values = 3 * book.twin_means(task) if kind == "mean" else None  # far enough to change an answer
    everything = [(i, h) for i in range(lm.anatomy.n_layers) for h in range(lm.anatomy.n_heads)]
    sets = {"none": [], "one": everything[:1], "all": everything}
    found = book.knock_out(task, sets, values, kind, rows=rows)
    assert list(found) == list(sets) and found["none"].tolist() == [1.0] * N
    for name in ("one", "all"):
        cut = heads.ablate(lm, sets[name], kind, values=values, positions=[-1])
        assert found[name].tolist() == heads.evaluate(cut, task, "accuracy").tolist()
    assert found["all"].mean() < 1
