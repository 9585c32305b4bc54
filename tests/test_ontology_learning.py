"""Notebook 57: its layer against the formula as it is written, its rule and its measures against slower ones, bad input."""

import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cells import run_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score
from torch.nn import functional as F

import heads

SLUG = "ontology-learning"


def load(*tags, **names):
    found = {"tile": 4, "n_heads": 2, "steps": 300, "lr": 3e-2, "seed": 0, "held_out": 0.5, "place": torch.device("cpu"),
             "model": "toy", "heads": heads, "json": json, "math": math, "re": re, "Path": Path, "stats": stats, "F": F}  # fmt: skip
    for tag in tags:
        found = run_cells(SLUG, tag, **{**found, **names})
    return types.SimpleNamespace(**found)


book = load("rule", "read", "rank", "layer", "tiles", "ensemble", "tree", SimpleNamespace=types.SimpleNamespace, S=None, right=None)


def index_of(names):
    found = {}
    for i, name in enumerate(names):
        found.setdefault(tuple(book.words(name)), []).append(i)
    return found


def test_the_rule_reads_whole_words_and_never_the_name_itself():
    names = ["cell", "T cell", "art", "t CELL", "CD8-positive T cell"]
    assert book.contained("CD8-positive T cell", index_of(names)) == {0: 1 / 4, 1: 2 / 4, 3: 2 / 4}
    assert book.contained("T cell", index_of(names)) == {0: 1 / 2}, "nor a namesake in other capitals"
    assert book.contained("heart", index_of(names)) == {}
    assert book.contained("\u7d30\u80de", index_of(names)) == {} and book.contained("?!", index_of(names)) == {}


def test_the_layer_is_the_formula_and_its_rows_sum_to_one():
    g = torch.Generator().manual_seed(0)
    Wq, Wk, x, y = (torch.randn(1, n, 6, generator=g) for n in (6, 6, 3, 5))
    A = book.adjacency(book.head_scores(Wq, Wk, x, y))
    expected = torch.zeros(3, 5)
    for h in (slice(0, 3), slice(3, 6)):
        q, k = (F.rms_norm((v[0] @ W[0])[:, h], (3,), eps=1e-6) for v, W in ((x, Wq), (y, Wk)))
        expected += (q @ k.T / math.sqrt(3)).softmax(1) / 2
    torch.testing.assert_close(A[0], expected)
    torch.testing.assert_close(A.sum(-1), torch.ones(1, 3))


@given(st.integers(0, 1000), st.integers(3, 40))
@settings(max_examples=40, deadline=None)
def test_a_tile_holds_the_parents_first_and_no_candidate_twice(seed, n):
    rng = np.random.default_rng(seed)
    parents = [sorted({int(p) for p in rng.integers(n, size=rng.integers(0, 3))} - {i}) for i in range(n)]
    children = np.array([i for i, found in enumerate(parents) if found] or [0])
    some, candidates = book.draw_tile(rng, children, parents, n)
    wanted = list(dict.fromkeys(p for child in some for p in parents[child]))[: book.tile]
    assert len(some) == book.tile and set(some) <= set(children)
    assert candidates[: len(wanted)].tolist() == wanted
    assert len(set(candidates.tolist())) == len(candidates) == min(n, book.tile)


def test_ones_and_zeros_have_equal_shares_in_the_loss():
    A, truth = torch.full((1, 2, 4), 0.25), torch.zeros(1, 2, 4)
    truth[0, :, 0] = 1
    assert book.loss_of(A, truth).item() == pytest.approx(-math.log(0.25) - math.log(0.75))


def toy(n=40, d=8, seed=0):
    """An ontology in which class i is a child of class i // 4, with vectors that say so."""
    rng = np.random.default_rng(seed)
    X = torch.tensor(rng.normal(size=(n, d)), dtype=torch.float32)
    for i in range(1, n):
        X[i] += X[i // 4].roll(1)
    parents = [[i // 4] if i else [] for i in range(n)]
    truth = np.array([[j in found for j in range(n)] for found in parents])
    train, test = book.split(parents, rng)
    own = np.equal.outer(test, np.arange(n))
    return types.SimpleNamespace(name="toy", X=F.normalize(X, dim=1), parents=parents, truth=truth, n=n, train=train, test=test,
                                 self=own, R=np.zeros((n, n), np.float32))  # fmt: skip


def test_layers_side_by_side_learn_and_one_map_stays_one():
    o = toy()
    arms, vectors, (q, k, b, g) = book.train(o, 0)
    one, real = arms.index("one map"), arms.index("attention")
    assert torch.equal(q[one], k[one]) and not torch.equal(q[real], k[real])
    assert not torch.equal(vectors[arms.index("random")], o.X)
    torch.testing.assert_close(q[arms.index("rule in the softmax")], q[real])  # the rule is silent here
    found = book.answer_of(o, arms, vectors, [q, k, b, g])
    known = types.SimpleNamespace(**{**vars(o), "test": o.train, "self": np.equal.outer(o.train, np.arange(o.n))})
    hits = {arm: book.ranked(S, o.truth[o.train], known.self)["hit@1"].mean()
            for arm, S in book.answer_of(known, arms, vectors, [q, k, b, g]).items()}  # fmt: skip
    assert hits["attention"] > 0.5 > hits["shuffled"] and set(found) == {*arms, "swapped"}
    assert "shuffled" not in book.train(o, 1)[0]


def test_training_that_diverges_names_the_layer():
    o = toy()
    o.X[3] = float("nan")
    with pytest.raises(FloatingPointError, match="on toy is no number at step \\d+: lower lr"):
        book.train(o, 0)
    with pytest.raises(ValueError, match="n_heads=2 does not divide the 7 dimensions"):
        book.starting(["attention"], 7, torch.Generator())


def test_ranks_are_those_of_the_library():
    rng = np.random.default_rng(0)
    S, truth = rng.integers(0, 6, (30, 12)) / 6, rng.random((30, 12)) < 0.2  # with ties
    own = np.eye(30, 12, dtype=bool)
    truth[:, 5], own[:, 5] = True, False
    truth &= ~own
    theirs = heads.ranking(S, truth, ["AUC", "hit@1", "MRR"], own)
    for name, ours in book.ranked(S, truth, own).items():
        np.testing.assert_allclose(ours, theirs[name], atol=1e-12)


def test_f1_and_the_best_threshold():
    rng = np.random.default_rng(1)
    A, truth = rng.random((6, 9)), rng.random((6, 9)) < 0.3
    assert book.f1_at(A, truth, 0.5) == pytest.approx(f1_score(truth.ravel(), A.ravel() >= 0.5))
    best, at = book.best_threshold(A, truth)
    assert best == pytest.approx(max(f1_score(truth.ravel(), A.ravel() >= t) for t in A.ravel())) == book.f1_at(A, truth, at)


@pytest.mark.parametrize("n", [3, 4, 5, 13])
def test_tiles_are_of_nearly_equal_width_and_each_sums_to_one(n):
    A = book.in_tiles(torch.randn(2, 3, n))  # a last tile of one candidate would be sure of it
    assert A.shape == (3, n)
    torch.testing.assert_close(A.sum(1), torch.full((3,), float(math.ceil(n / book.tile))))
    assert n == 1 or A.max() < 1


def test_confidence_weights_as_the_formula_is_written():
    S, K = np.random.default_rng(2).normal(size=(3, 5, 4)), 4
    P = np.exp(S / 0.5) / np.exp(S / 0.5).sum(-1, keepdims=True)
    H = stats.entropy(P, axis=-1)
    c = (P.max(-1) * (1 - H / np.log(K))).mean(1)
    w = 0.7 * c / c.sum() + 0.3 * (1 - H.mean(1) / H.mean(1).sum())
    np.testing.assert_allclose(book.weights_of(S, 0.5), w / w.sum(), rtol=1e-9)


def test_a_tree_with_a_cycle_ends_and_two_roots_stay_apart():
    assert book.subtree([[2], [0], [1], []], 0) == [(0, 0), (1, 1), (2, 2)]
    assert book.subtree([[], [0], [], [2]], 2) == [(2, 0), (3, 1)]


def test_pairs_of_a_file_are_read_and_a_missing_file_says_where_they_are(tmp_path):
    pairs = [("T cell", "cell"), ("T cell", "cell"), ("cell", "cell"), ("T cell", "lymphocyte")]
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"ID": str(i), "child": c, "parent": p} for i, (c, p) in enumerate(pairs)]))
    names, parents = book.read(str(path))
    assert names == ["T cell", "cell", "lymphocyte"] and parents == [[1, 2], [], []]
    with pytest.raises(FileNotFoundError, match="LLMs4OL-Challenge"):
        book.read("nowhere.json")


def test_a_split_is_by_child():
    parents = [[], [0], [0, 1], [1], [2]]
    train, test = book.split(parents, np.random.default_rng(0))
    assert sorted([*train, *test]) == [1, 2, 3, 4] and len(test) == 2


def test_an_interval_resamples_families():
    spread = load("interval", pd=pd).interval
    alone = spread([1.0] * 20 + [0.0] * 20, range(40))
    family = spread([1.0] * 20 + [0.0] * 20, [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10)
    assert family[0] < alone[0] < 0.5 < alone[1] < family[1]
    assert math.isnan(spread([1.0], [0])[0])


def test_a_cycle_and_two_roots_in_a_file_are_read_and_split(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"child": c, "parent": p} for c, p in (("a", "b"), ("b", "a"), ("c", "d"))]))
    names, parents = book.read(str(path))
    assert (names, parents) == (["a", "b", "c", "d"], [[1], [0], [3], []])
    assert sorted(np.concatenate(book.split(parents, np.random.default_rng(0)))) == [0, 1, 2]
    assert book.subtree(parents, 0) == [(0, 0), (1, 1)] and book.subtree(parents, 3) == [(3, 0), (2, 1)]
