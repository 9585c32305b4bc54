"""Measures of a ranking, against sorting by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import heads
from heads.lab.ranking import RANKINGS


def by_hand(scores, relevant) -> dict[str, float]:
    """One query: items one after the other, the worst order of those that tie."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))
    hits = [bool(relevant[i]) for i in order]
    first, n = hits.index(True), sum(hits)
    worse = [(s, w) for s, r in zip(scores, relevant) if r for w, q in zip(scores, relevant) if not q]
    gain = lambda found: sum(hit / np.log2(rank + 2) for rank, hit in enumerate(found))  # noqa: E731
    return {
        "hit@1": float(hits[0]),
        "MRR": 1 / (first + 1),
        "R-precision": sum(hits[:n]) / n,
        "MAP": sum(sum(hits[: k + 1]) / (k + 1) for k in range(len(hits)) if hits[k]) / n,
        "AUC": sum((s > w) + 0.5 * (s == w) for s, w in worse) / max(len(worse), 1),
        "nDCG": gain(hits) / gain(sorted(hits, reverse=True)),
    }


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 5))
def test_measures_are_those_of_sorting_by_hand(seed, items, queries):
    generator = np.random.default_rng(seed)
    scores = generator.permuted(np.tile(np.arange(items) / 7, (queries, 1)), axis=1)  # no ties
    relevant = generator.random((queries, items)) < 0.4
    relevant[:, 0], relevant[:, 1] = True, False
    found = heads.ranking(scores, relevant, RANKINGS)
    itself = generator.random((queries, items)) < 0.2
    itself[:, :2] = False
    kept = heads.ranking(scores, relevant, RANKINGS, excluded=itself)
    for i in range(queries):
        left = by_hand(scores[i][~itself[i]], relevant[i][~itself[i]])
        assert all(kept[name][i] == pytest.approx(left[name]) for name in left)
        expected = by_hand(scores[i], relevant[i])
        for name, column in found.items():
            assert column[i] == pytest.approx(expected[name]), name


def test_a_constant_ranks_nothing_well():
    """What ties stands before what is relevant: the order of the items decides nothing."""
    relevant = np.eye(5, dtype=bool)
    found = heads.ranking(np.zeros((5, 5)), relevant, ["hit@1", "MRR", "R-precision", "MAP", "AUC"])
    assert {name: set(column.round(6)) for name, column in found.items()} == {
        "hit@1": {0.0}, "MRR": {0.2}, "R-precision": {0.0}, "MAP": {0.2}, "AUC": {0.5}}  # fmt: skip
    expected = by_hand(np.zeros(5), relevant[2])
    assert all(found[name][2] == pytest.approx(expected[name]) for name in found)


def test_what_is_excluded_is_not_ranked():
    scores, relevant = np.array([[9.0, 1, 2], [0, 9, 1]]), np.array([[0, 0, 1], [1, 0, 0]])
    itself = np.array([[1, 0, 0], [0, 1, 0]])
    assert heads.ranking(scores, relevant, ["hit@1"])["hit@1"].tolist() == [0, 0]
    assert heads.ranking(scores, relevant, ["hit@1", "MRR"], excluded=itself)["MRR"].tolist() == [1, 0.5]


@pytest.mark.parametrize(
    "scores, relevant, more, words",
    [
        ([[1, 2]], [[0, 0]], {}, "query 0 has no relevant item among the 2"),
        ([[1, 2]], [[1, 0]], {"excluded": [[1, 0]]}, "query 0 has no relevant item among the 1"),  # it is its only answer
        ([[1, 2]], [[1, 1]], {"measures": ["AUC"]}, "query 0 has no irrelevant item"),
        ([[1, float("nan")]], [[1, 0]], {}, "query 0 has a score that is no number"),
        ([1, 2], [1, 0], {}, r"scores \(2,\)"),
        ([[1, 2]], [[1, 0, 0]], {}, r"relevant \(1, 3\)"),
    ],
)
def test_queries_that_cannot_be_judged_are_refused(scores, relevant, more, words):
    with pytest.raises(ValueError, match=words):
        heads.ranking(scores, relevant, **more)


def test_an_unknown_measure_is_named():
    with pytest.raises(LookupError, match="no measure of a ranking 'hit1'. Did you mean 'hit@1'"):
        heads.ranking([[1, 2]], [[1, 0]], ["hit1"])
