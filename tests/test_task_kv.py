"""Notebook 32: its test of agreement, against all shuffles and loops; what its own policies keep, by counting."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from cells import run_cells
from scipy import stats

import heads
from heads.lab.caches import Keep, Seen

SLUG, N, HEADS = "task-kv", 60, 8
SIZES = dict(n_heads=HEADS, counts=[3, 1], beta=0.375, last=1, sinks=2, tail=6, window=8, top=20, seed=0)


def seen(index):
    """The first or last layer of two, of random queries, keys and values."""
    dice = torch.Generator().manual_seed(index)
    q, k, v = (torch.randn(1, h, N, 4, generator=dice) for h in (HEADS, 4, 4))
    return Seen(index, (0, 1), q, k, v, 0.5, N)


def sizes():
    return run_cells(SLUG, "sizes", heads=heads, Keep=Keep, replace=replace, math=math, **SIZES)


@pytest.mark.parametrize("k", [0, 4, 16])
@pytest.mark.parametrize("index", [0, 1])
def test_the_others_keep_their_ends_and_k_tokens_of_the_middle(k, index):
    kept = sizes()["middle"](k, "selected" if k else None)(seen(index)).tokens
    whole = [head for head, row in enumerate(kept) if row is None]
    assert len(whole) == SIZES["counts"][index]
    for row in (row.tolist() for row in kept if row is not None):
        assert {0, 1, *range(N - 6, N)} <= set(row) and row == sorted(set(row))
        assert len(row) - 8 in ((k, k + 1) if k else (0,))  # a budget is a whole number for each head: one token more at most


def test_more_recent_tokens_and_a_merged_one():
    longer = sizes()["middle"](0, None, more=5)(seen(0))
    assert all(row.tolist() == [0, 1, *range(N - 11, N)] for row in longer.tokens if row is not None)
    merged = sizes()["middle"](0, "merged")(seen(0))
    assert [extra is None for extra in merged.stand_ins] == [row is None for row in merged.tokens]


def test_tokens_at_random_are_as_many_and_of_the_middle():
    cells = sizes()
    policy, layer = cells["middle"](9), seen(0)
    ours, random = policy(layer).tokens, cells["at_random"](policy)(layer).tokens
    for a, b in zip(ours, random, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert len(set(b.tolist())) == len(a) and {0, 1, *range(N - 6, N)} <= set(b.tolist()) and b.tolist() == sorted(b.tolist())
    assert any(a is not None and a.tolist() != b.tolist() for a, b in zip(ours, random))


def test_agreement_within_and_between_and_its_chance():
    judge = run_cells(SLUG, "shuffling", seed=0)["inside_outside"]
    matrix = np.random.default_rng(3).random((6, 6))
    matrix += matrix.T

    def gap(inside):
        pairs = list(combinations(range(6), 2))
        same = [matrix[a, b] for a, b in pairs if (a in inside) == (b in inside)]
        return np.mean(same), np.mean([matrix[a, b] for a, b in pairs if (a in inside) != (b in inside)])

    within, between, p = judge(matrix, list("aaabbb"))
    assert (within, between) == pytest.approx(gap({0, 1, 2}))
    gaps = [np.subtract(*gap(set(inside))) for inside in combinations(range(6), 3)]  # every way to deal the labels out
    assert p == pytest.approx(np.mean([g >= within - between - 1e-12 for g in gaps]), abs=0.04)


def test_judged_is_what_loops_over_tokens_give():
    judged = run_cells(SLUG, "judging", torch=torch, pd=pd, stats=stats, np=np, seed=0)["judged"]
    p = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    gold = torch.tensor([1, 0, 6, 3])
    found = judged(p, gold)
    for i in range(3):
        nll = [-p[i, t, gold[t]].item() for t in range(4)]
        kl = [sum((p[0, t, w].exp() * (p[0, t, w] - p[i, t, w])).item() for w in range(7)) for t in range(4)]
        hits = [int(p[i, t].argmax()) == int(gold[t]) for t in range(4)]
        assert (found["NLL"][i], found["KL"][i], found["accuracy"][i]) == pytest.approx((np.mean(nll), np.mean(kl), np.mean(hits)), abs=1e-5)


def test_a_real_cache_holds_what_any_head_of_a_group_keeps():
    cells, layer = run_cells(SLUG, "counting"), seen(0)  # 8 query heads on 4 key-value heads
    dice = torch.Generator().manual_seed(2)
    rows = [torch.randperm(N, generator=dice)[: 7 + h].sort().values for h in range(HEADS - 1)] + [None]
    assert cells["counted"](lambda _: Keep(rows), 0.4)(layer).tokens == rows
    wanted = [set(range(N)) if row is None else set(row.tolist()) for row in rows]
    union = sum(len(wanted[2 * g] | wanted[2 * g + 1]) for g in range(4)) / (4 * N)
    assert cells["held"] == {0.4: [pytest.approx(union)]}
