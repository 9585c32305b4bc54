"""HeadScores ranks, compares and saves; controls are matched and disjoint."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import heads
from heads import HeadScores, random_heads

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
numbers = st.floats(-1e6, 1e6, allow_nan=False, width=64) | st.integers(0, 2).map(float)  # ties are common
tables = shapes.flatmap(lambda shape: hnp.arrays(float, shape, elements=numbers)).map(HeadScores)
pairs = shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(float, shape, elements=numbers).map(HeadScores)] * 2))
TABLE = HeadScores([[0.1, 0.9], [0.5, 0.5], [0.0, -1.0]], "copies per token")


@given(tables)
def test_a_rank_is_all_heads_best_first_and_ties_in_order(scores):
    rank = scores.rank()
    assert sorted(rank) == list(np.ndindex(*scores.shape)) and len(rank) == len(scores)
    assert rank == sorted(rank, key=lambda head: (-scores[head], head))


@given(tables, st.data())
def test_top_and_above_are_the_start_of_the_rank(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    assert scores.top(k) == scores.rank()[:k]
    threshold = data.draw(numbers)
    found = scores.above(threshold)
    assert found == scores.top(len(found)) and len(found) == (scores.values > threshold).sum()


@given(tables, st.floats(0.001, 0.999))
def test_a_share_of_heads_is_rounded_up(scores, share):
    found = len(scores.top(share))
    assert found - 1 < share * len(scores) + 1e-4 and found >= share * len(scores) - 1e-4


def test_a_share_that_is_a_whole_number_is_not_rounded_up_by_float_noise():
    assert len(HeadScores(np.arange(300).reshape(30, 10)).top(0.07)) == 21


@given(tables)
def test_json_gives_back_every_bit(scores):
    again = HeadScores.from_dict(json.loads(json.dumps(scores.to_dict())), scores.name)
    assert again.values.tobytes() == scores.values.tobytes() and again.shape == scores.shape


def test_a_saved_table_is_loaded_with_its_name(tmp_path):
    again = HeadScores.load(TABLE.save(tmp_path / "scores.json"))
    assert again.name == TABLE.name and (again.values == TABLE.values).all()


def test_a_tensor_with_a_gradient_makes_a_table():
    assert HeadScores(torch.ones(2, 3, requires_grad=True)).shape == (2, 3)


@settings(deadline=None)
@given(pairs, st.data())
def test_overlap_counts_shared_heads_and_its_null_stays_in_range(pair, data):
    k = data.draw(st.integers(1, len(pair[0])))
    found = pair[0].overlap(pair[1], k, n_shuffles=50)
    assert found.k == k and found.shared == len({*pair[0].top(k)} & {*pair[1].top(k)})
    assert found.share == found.shared / k and found.expected == k * k / len(pair[0])
    assert 0 <= found.null <= k and 0 <= found.p <= 1 and 0 <= found.high <= k
    assert pair[0].overlap(pair[0], k, n_shuffles=5).shared == k


def test_the_null_knows_that_important_heads_share_layers():
    """Both top sets fill layer 0, where shuffles within the layer cannot part them."""
    clustered = HeadScores(np.array([[1.0] * 8, *[[0.0] * 8] * 9]))
    found = clustered.overlap(clustered, 8)
    assert (found.shared, found.null, found.p, found.high) == (8, 8, 1, 8) and found.expected == pytest.approx(0.8)
    spread = HeadScores(np.eye(8))
    found = spread.overlap(spread, 8)
    assert found.null == pytest.approx(1, abs=0.2) and found.p < 0.01


def test_the_null_is_reproducible():
    other = HeadScores(np.random.default_rng(0).normal(size=(3, 2)))
    assert TABLE.overlap(other, 3, seed=1) == TABLE.overlap(other, 3, seed=1)


@settings(deadline=None)
@given(pairs, st.sampled_from(["pearson", "spearman"]))
def test_correlation_is_symmetric_and_one_with_itself(pair, method):
    a, b = pair
    if min(np.ptp(a.values), np.ptp(b.values)) < 1e-3 or len(a) < 3:
        with pytest.raises(ValueError, match="no correlation"):
            a.correlate(HeadScores(np.zeros(a.shape)), method)
        return
    assert a.correlate(b, method) == pytest.approx(b.correlate(a, method), abs=1e-9)
    assert -1 - 1e-9 <= a.correlate(b, method) <= 1 + 1e-9
    assert a.correlate(a, method) == pytest.approx(1) and a.correlate(HeadScores(-a.values), method) == pytest.approx(-1)


def test_a_frame_has_one_labelled_row_for_every_head():
    frame = TABLE.to_frame()
    assert list(frame.columns) == ["layer", "head", "copies per token"] and len(frame) == 6
    assert all(TABLE[int(row.layer), int(row["head"])] == row["copies per token"] for _, row in frame.iterrows())


def test_a_heatmap_is_drawn_layer_by_head_and_labelled():
    image = TABLE.heatmap().figure.axes
    assert any("copies per token" in axis.get_ylabel() + axis.get_xlabel() + axis.get_title() for axis in image)


def test_the_printed_table_shows_its_best_heads():
    assert repr(TABLE) == "HeadScores('copies per token', 3 layers x 2 heads; top (0, 1) 0.90, (1, 0) 0.50, (1, 1) 0.50)"
    assert repr(HeadScores([[1.0, 2.0]])) == "HeadScores('score', 1 layers x 2 heads; top (0, 1) 2.00, (0, 0) 1.00)"


def test_a_share_may_be_a_number_of_numpy():
    table = HeadScores(np.arange(300).reshape(30, 10))
    assert table.top(np.float32(0.25)) == table.top(np.float64(0.25)) == table.top(0.25) and len(table.top(0.25)) == 75


def test_controls_take_whole_numbers_only():
    for wrong in ([(1.9, 2)], [(1, 2.7)], [(True, 0)]):
        with pytest.raises(TypeError, match="a layer or head is a whole number"):
            random_heads(wrong, (4, 4))
        with pytest.raises(TypeError, match="a layer or head is a whole number"):
            random_heads([(0, 0)], (4, 4), exclude=wrong)
    for n, error in ((1.5, TypeError), (-1, ValueError), (0, ValueError)):
        with pytest.raises(error, match="n_sets is"):
            random_heads([(0, 0)], (4, 4), n_sets=n)
    assert len(random_heads(np.array([[0, 0]]), (4, 4), n_sets=2)) == 2


@pytest.mark.parametrize(
    "action, words",
    [
        (lambda: HeadScores([1.0, 2.0]), r"\[layer, head\] table"),
        (lambda: HeadScores(np.zeros((0, 3))), r"\[layer, head\] table"),
        (lambda: HeadScores([[np.nan, 1.0, np.inf]]), "2 head scores are not finite"),
        (lambda: TABLE.top(7), "from 0 to 6"),
        (lambda: TABLE.top(-1), "from 0 to 6"),
        (lambda: TABLE.top(1.5), "from 0 to 6"),
        (lambda: TABLE.overlap(TABLE, 0), "at least 1"),
        (lambda: TABLE.overlap(HeadScores([[1.0]]), 1), "one model only"),
        (lambda: TABLE.correlate(HeadScores([[1.0]])), "one model only"),
        (lambda: HeadScores.from_dict({"layers": 2, "heads": 2, "values": [[1.0]]}), "record says 2 x 2"),
    ],
)
def test_bad_input_is_refused(action, words):
    with pytest.raises(ValueError, match=words):
        action()


def test_an_unknown_correlation_lists_the_known():
    with pytest.raises(LookupError, match="no method 'kendal'. Known: pearson, spearman"):
        TABLE.correlate(TABLE, "kendal")


# -------------------------------------------------------------------------------- random controls


@st.composite
def draws(draw):
    """A shape, heads to match and heads to bar, such that every layer has enough left."""
    n_layers, n_heads = draw(st.integers(1, 5)), draw(st.integers(3, 8))
    order = [draw(st.permutations(range(n_heads))) for _ in range(n_layers)]
    counts = [draw(st.integers(0, n_heads // 3)) for _ in range(n_layers)]
    like = [(layer, h) for layer, k in enumerate(counts) for h in order[layer][:k]]
    exclude = [(layer, h) for layer, k in enumerate(counts) for h in order[layer][k : 2 * k]]
    return (n_layers, n_heads), like, exclude


@given(draws(), st.integers(0, 1000))
def test_controls_match_the_layers_and_hold_no_excluded_head(drawn, seed):
    shape, like, exclude = drawn
    for match in ("layer", "near", "none"):
        sets = random_heads(like, shape, match, n_sets=3, exclude=exclude, seed=seed)
        assert sets == random_heads(like, shape, match, n_sets=3, exclude=exclude, seed=seed) and len(sets) == 3
        for control in sets:
            assert control == sorted(set(control)) and len(control) == len(like)
            assert not {*control} & {*like, *exclude}
            assert all(0 <= layer < shape[0] and 0 <= head < shape[1] for layer, head in control)
            if match != "none":
                assert Counter(layer for layer, _ in control) == Counter(layer for layer, _ in like)


def test_controls_differ_between_sets_and_seeds_and_reach_every_free_head():
    sets = random_heads([(1, 0), (2, 0)], (4, 6), n_sets=60, seed=0)
    assert {head for control in sets for head in control} == {(layer, head) for layer in (1, 2) for head in range(1, 6)}
    assert sets != random_heads([(1, 0), (2, 0)], (4, 6), n_sets=60, seed=1)


def test_a_full_layer_is_an_error_or_borrows_from_its_nearest_neighbours():
    like = [(2, h) for h in range(3)]  # all but one head of the layer, in a model with four heads a layer
    with pytest.raises(ValueError, match="layer 2 has 1 heads left for a control of 3.*match='near'"):
        random_heads(like, (6, 4))
    for control in random_heads(like, (6, 4), match="near", n_sets=20):
        assert Counter(abs(layer - 2) for layer, _ in control) == {0: 1, 1: 2}


def test_too_few_heads_and_unknown_matches_are_refused():
    with pytest.raises(ValueError, match="3 random heads asked for, but only 1 heads"):
        random_heads([(0, 0), (0, 1), (0, 2)], (1, 4), match="none")
    with pytest.raises(LookupError, match="'layers'. Did you mean 'layer'. Known: layer, near, none"):
        random_heads([(0, 0)], (2, 2), match="layers")


def test_controls_take_arrays_and_refuse_heads_that_do_not_exist():
    like = np.array([[0, 1], [2, 2]])
    assert random_heads(like, (4, 4)) == random_heads([(0, 1), (2, 2)], (4, 4))
    with pytest.raises(ValueError, match=r"head \(9, 0\) does not exist in 4 layers"):
        random_heads([(9, 0)], (4, 4), match="near")


def test_scores_say_whose_heads_they_are(tmp_path):
    here, there = (heads.load("tiny-llama", device="cpu", seed=seed) for seed in (0, 1))
    mine, other = (HeadScores(np.arange(16.0).reshape(4, 4), "made", model) for model in (here, there))
    assert mine.model == {"name": "tiny-llama", "sha256": here.record["sha256"]} != other.model
    assert HeadScores.load(mine.save(tmp_path / "mine.json")).model == mine.model
    mine.belongs_to(here)
    other.belongs_to(here, derivative=True)
    with pytest.raises(ValueError, match="'made' was found in tiny-llama.*not in tiny-llama.*derivative=True"):
        other.belongs_to(here)
    for compare in (lambda: mine.overlap(other, 3), lambda: mine.correlate(other)):
        with pytest.raises(ValueError, match="cannot compare heads of tiny-llama .* scores of one model only"):
            compare()
    unknown = HeadScores.from_dict({"layers": 4, "heads": 4, "values": mine.values.tolist()})  # as older files are
    unknown.belongs_to(there)
    assert unknown.model is None and unknown.correlate(mine) == pytest.approx(1) and "model" not in unknown.to_dict()
    with pytest.raises(ValueError, match=r"is of a model with \(2, 2\)"):
        HeadScores(np.eye(2), "small").belongs_to(here, derivative=True)
