"""Notebook 61: composing task vectors, with scales that are shared by groups of blocks and learnt."""

import re
import types

import numpy as np
import pytest
import torch
from cells import run_cells
from conftest import tiny

import heads

TEXTS = ["a red thing", "a blue one", "north", "a town in the south", "up", "down"]


@pytest.fixture(scope="module")
def book():
    lm = tiny("bert")
    stack = heads.upper_stack(lm, TEXTS, 2)
    base = {name: weight.detach() for name, weight in stack.weights.items()}

    def loss_of(weights, rows):
        return stack.pooled(rows, weights).pow(2).mean()

    names = {"re": re, "heads": heads, "lm": lm, "stack": stack, "base": base, "blocks": list(base), "seed": 0, "learn_steps": 4,
             "learn_rate": 0.1, "per_task": 2, "val_texts": 4, "tasks": ["a"], "split": {"a": {"val": [0, 1, 2, 3]}},
             "loss_of": loss_of}  # fmt: skip
    return types.SimpleNamespace(**run_cells("task-vectors-atlas", "compose", **names))


def vectors(book, many=3, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(many, *weight.shape, generator=noise) for name, weight in book.base.items()}


def test_scales_of_nothing_and_of_one_vector_alone(book):
    taus = vectors(book)
    off, one = torch.zeros(3, len(book.blocks)), torch.zeros(3, len(book.blocks))
    one[1] = 1
    for name, weight in book.composed(off, taus).items():
        assert torch.equal(weight, book.base[name])
    for name, weight in book.composed(one, taus).items():
        torch.testing.assert_close(weight, book.base[name] + taus[name][1])


def test_a_sum_is_what_a_loop_adds(book):
    taus, scales = vectors(book), torch.randn(3, len(book.blocks))
    for j, name in enumerate(book.blocks):
        expected = book.base[name].clone()
        for i in range(3):
            expected += scales[i, j] * taus[name][i]
        torch.testing.assert_close(book.composed(scales, taus)[name], expected)


def test_every_block_is_a_matrix_or_not_and_the_groups_share_their_number(book):
    groups = book.GROUPS
    assert torch.equal(groups["weights"].sum(0) + groups["biases"].sum(0), torch.ones(len(book.blocks)))
    taus = vectors(book)
    found = {kind: book.learn(taus, groups[kind], book.mixed(["a"])) for kind in groups}
    assert all(scales.shape == (3, len(book.blocks)) and not scales.requires_grad for scales in found.values())
    assert torch.equal(found["vector"], found["vector"][:, :1].expand(-1, len(book.blocks)))
    assert found["block"].std(dim=1).min() > 0 and not found["weights"][:, ~book.matrix].any() and found["weights"].any()
    assert not found["biases"][:, book.matrix].any()


def test_what_is_learnt_lowers_the_loss_and_leaves_the_vectors_alone(book):
    taus = vectors(book)
    before = {name: tau.clone() for name, tau in taus.items()}
    scales = book.learn(taus, book.GROUPS["block"], book.mixed(["a"]), 20)
    with torch.no_grad():
        assert book.loss_of(book.composed(scales, taus), [0, 1, 2, 3]) < book.loss_of(book.base, [0, 1, 2, 3])
    assert all(torch.equal(taus[name], before[name]) for name in taus)


def test_batches_have_every_task_alike(book):
    for rows in book.mixed(["a"], draw=1):
        assert len(rows) == 2 == len(set(rows)) and set(rows) <= {0, 1, 2, 3}


@pytest.mark.parametrize("best", [0.1, 0.3, 0.6, 1.1, 1.2])
def test_the_search_finds_the_top_of_a_hill(book, best, monkeypatch):
    """On a curve with one top the two passes equal the full grid."""
    taus = {name: torch.ones(1, *weight.shape) for name, weight in book.base.items()}
    name = book.blocks[0]

    def right(weights, chosen, part):
        return np.array(-abs((weights[name] - book.base[name]).mean().item() - best))

    monkeypatch.setitem(book.search.__globals__, "right", right)
    assert book.search(taus) == pytest.approx(best)
