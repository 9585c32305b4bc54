"""Notebook 31: its ALiBi head, the inputs that break the bound, and what its spy says of a token, against loops."""

import math
import types

import pytest
import torch
from cells import run_cells
from conftest import near


@pytest.fixture(scope="module")
def alibi():
    return types.SimpleNamespace(**run_cells("razor-attention", "alibi"))


@pytest.fixture(scope="module")
def token():
    return types.SimpleNamespace(**run_cells("razor-attention", "token"))


def test_an_alibi_head_in_loops(alibi):
    dice = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*shape, generator=dice, dtype=torch.float64) for shape in ((7, 4), (4, 4)))
    pattern = alibi.alibi(x, W, 0.3)
    for m in range(7):
        weights = [math.exp(sum(x[m, a] * W[a, b] * x[n, b] for a in range(4) for b in range(4)) - 0.3 * (m - n)) for n in range(m + 1)]
        near(pattern[m, : m + 1], torch.tensor(weights, dtype=torch.float64) / sum(weights))
    assert (pattern.triu(1) == 0).all()


def test_the_reach_is_the_formula(alibi):
    gain, bias = torch.tensor([3.0, 4.0]).double(), torch.tensor([0.0, 2.0]).double()
    W = torch.diag(torch.tensor([-0.5, 0.25]).double())
    assert alibi.reach(W, gain, bias, 0.1, math.exp(-5)) == pytest.approx((2 * 0.5 * (25 + 4) + 5) / 0.1)


def test_made_inputs_are_what_a_layer_norm_gives(alibi):
    """Taken back through gain and bias, every token has mean zero and norm sqrt(d): LayerNorm leaves it as it is."""
    norm = lambda u: torch.nn.functional.layer_norm(u, [u.shape[-1]], eps=0.0)
    turns = torch.tensor([1.0, -1.0]).double().repeat(4)
    two = torch.zeros(8).double()
    two[:2] = torch.tensor([2.0, -2.0]).double()
    for u in (turns, two):
        gain, bias = torch.linspace(0.5, 2, 8).double(), 0.1 * turns
        x, W = alibi.made_to_break(gain, bias, u, 0.7, 5)
        near(norm((x - bias) / gain), (x - bias) / gain)
        assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(0.7)


def test_equal_gains_without_a_bias_come_up_to_the_bound_and_the_others_break_it(alibi):
    for seed in (0, 1):
        cases = alibi.alibi_cases(seed=seed)
        most = {}
        for name, (_, _, pattern, limit, _) in cases.items():
            assert limit < len(pattern) - 20, "there is nothing behind the bound to look at"
            most[name] = max(pattern.diagonal(-t).max().item() for t in range(math.ceil(limit), len(pattern)))
        assert most["random"] < 1e-6 and 1e-5 < most["equal gains"] <= 1e-3
        assert most["unequal gains"] > 0.1 and most["a bias"] > 2e-3


def test_a_token_draws_no_more_than_what_it_stands_for(token):
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(*shape, generator=dice).double() for shape in ((6,), (15, 6), (15, 6)))
        drop = torch.arange(15).ge(2) & torch.arange(15).lt(11)
        true, stand_in, without, with_it = token.with_token(q, k, v, drop)
        weight = [math.exp(q @ key) for key in k]
        dropped, kept = sum(weight[2:11]), sum(weight) - sum(weight[2:11])
        one = 9 * math.exp(q @ k[2:11].mean(0))
        assert true == pytest.approx(dropped / (dropped + kept)) and stand_in == pytest.approx(one / (one + kept)) and stand_in <= true
        o = sum(w * x for w, x in zip(weight, v)) / sum(weight)
        rest = sum(w * x for w, x in zip(weight[:2] + weight[11:], torch.cat([v[:2], v[11:]])))
        assert without == pytest.approx(((rest / kept - o).norm() / o.norm()).item())
        mended = (rest + one * v[2:11].mean(0)) / (kept + one)
        assert with_it == pytest.approx(((mended - o).norm() / o.norm()).item())
