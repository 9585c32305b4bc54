"""Notebook 42: its margin solvers against a general one, its batched training against one run alone, its refusals."""

import types
from contextlib import suppress

import cvxpy as cp
import numpy as np
import pytest
import torch
from cells import run_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch.nn import functional as F

SLUG = "attention-svm"


def load(tag):
    return types.SimpleNamespace(**run_cells(SLUG, tag, cp=cp, optimize=optimize, F=F, suppress=suppress))


svm, training = load("svm"), load("training")


def a_problem(n=3, T=4, d=5, seed=0):
    """Token differences and queries of a random choice of tokens, `[n (T - 1), d]` each."""
    rng = np.random.default_rng(seed)
    X, z = rng.normal(size=(n, T, d)), rng.normal(size=(n, d))
    return svm.differences(X, z, rng.integers(T, size=n))


def margins(W, D, Z):
    return np.einsum("md,de,me->m", D, W, Z)


def test_differences_leave_the_chosen_token_out():
    X, z = np.arange(12.0).reshape(2, 3, 2), np.array([[1.0, 0.0], [0.0, 1.0]])
    D, Z = svm.differences(X, z, np.array([0, 2]))
    assert D.tolist() == [[-2, -2], [-4, -4], [4, 4], [2, 2]]
    assert Z.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("solve, norm", [("frobenius", "fro"), ("nuclear", "nuc")])
@pytest.mark.parametrize("seed", range(3))
def test_both_solvers_find_what_a_general_one_finds(solve, norm, seed):
    D, Z = a_problem(seed=seed)
    ours = getattr(svm, solve)(D, Z)
    W = cp.Variable((5, 5))  # as it is written in the paper, without any reduction
    cp.Problem(cp.Minimize(cp.norm(W, norm)), [d @ W @ z >= 1 for d, z in zip(D, Z)]).solve(solver=cp.CLARABEL)
    assert margins(ours, D, Z).min() > 1 - 1e-5
    assert np.linalg.norm(ours, norm) == pytest.approx(np.linalg.norm(W.value, norm), rel=1e-4)


@given(seed=st.integers(0, 10_000), d=st.integers(4, 9), scale=st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_the_frobenius_solution_is_minimal_scales_and_has_low_rank(seed, d, scale):
    D, Z = a_problem(d=d, seed=seed)  # d >= max(T - 1, n): always solvable
    W = svm.frobenius(D, Z)
    m = margins(W, D, Z)
    assert m.min() > 1 - 1e-6 and np.isclose(m.min(), 1, atol=1e-6)
    assert np.linalg.matrix_rank(W, tol=1e-8) <= 3, "one for each query"
    np.testing.assert_allclose(svm.frobenius(D * scale, Z), W / scale, rtol=1e-5, atol=1e-7)


def test_of_two_norms_each_solution_has_the_smaller_of_its_own():
    D, Z = a_problem(n=4, T=5, d=6, seed=1)
    fro, nuc = svm.frobenius(D, Z), svm.nuclear(D, Z)
    assert np.linalg.norm(fro) < np.linalg.norm(nuc)
    assert np.linalg.norm(nuc, "nuc") < np.linalg.norm(fro, "nuc")


@pytest.mark.parametrize("solve", ["frobenius", "nuclear"])
def test_a_token_inside_the_hull_of_the_others_cannot_be_selected(solve):
    triangle = np.array([[[0.0, 0.0], [1, 0], [-0.5, 0.9], [-0.5, -0.9]]])
    with pytest.raises(svm.Infeasible, match="no matrix separates"):
        getattr(svm, solve)(*svm.differences(triangle, np.array([[1.0, 0.0]]), np.array([0])))


def test_the_generalised_solution_keeps_the_ratios_and_the_margin():
    rng = np.random.default_rng(0)
    X, z = rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 6))
    rows = np.array([[0.7, 0.3, 0, 0], [1, 0, 0, 0], [0.2, 0, 0.5, 0.3]])
    finite, margin = (part.reshape(6, 6) for part in svm.general(X, z, rows))
    scores = np.einsum("ntd,de,ne->nt", X, finite, z)
    flat = np.einsum("ntd,de,ne->nt", X, margin, z)
    for i, p in enumerate(rows):
        inside = p > 0
        np.testing.assert_allclose(np.diff(scores[i, inside]), np.diff(np.log(p[inside])), atol=1e-8)
        np.testing.assert_allclose(flat[i, inside], flat[i, inside][0], atol=1e-6)
        assert (flat[i, inside][0] - flat[i, ~inside]).min(initial=2) > 1 - 1e-6


def data(runs=3, n=2, T=3, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return normal(runs, n, T, d), normal(runs, n, d), normal(runs, n).sign(), normal(runs, d), 0.3 * normal(2, runs, d, d)


def readout(v):
    return lambda read: torch.einsum("rnd,rd->rn", read, v)


@pytest.mark.parametrize("matrices", [1, 2])
def test_runs_side_by_side_are_runs_alone(matrices):
    X, z, Y, v, start = data()
    marks, W, rows = training.train(X, z, Y, readout(v), list(start[:matrices]), 60, notes=5)
    one = slice(1, 2)
    _, alone, _ = training.train(X[one], z[one], Y[one], readout(v[one]), [s[one] for s in start[:matrices]], 60, notes=5)
    torch.testing.assert_close(W[:, one], alone)
    assert W.shape == (len(marks), 3, 4, 4) and torch.allclose(rows.sum(-1), torch.ones(()).double())


def test_a_step_is_the_gradient_of_the_loss_as_it_is_written():
    X, z, Y, v, start = data()
    _, W, _ = training.train(X, z, Y, readout(v), [start[0]], 1, lr=0.1, notes=2)
    w = start[0].clone().requires_grad_()
    s = torch.einsum("rntd,rde,rne->rnt", X, w, z).softmax(-1)
    loss = torch.log(1 + torch.exp(-Y * torch.einsum("rd,rntd,rnt->rn", v, X, s))).mean(1).sum()
    (gradient,) = torch.autograd.grad(loss, [w])
    expected = start[0] - 0.1 * gradient / gradient.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(W[1], expected)


def test_the_loop_of_the_five_minutes_is_a_run_of_train():
    book = types.SimpleNamespace(**run_cells(SLUG, "first", cp=cp, F=F, lr=0.1))
    X, z, zero = book.tokens[None, None], book.query[None, None], torch.zeros(1, 2, 2).double()
    _, W, rows = training.train(X, z, torch.ones(1, 1).double(), readout(book.right[None]), [zero], 500, notes=2)
    np.testing.assert_allclose(W[-1, 0] @ book.query, book.arrows[-1], rtol=1e-3)
    np.testing.assert_allclose(rows[-1, 0, 0], book.attended[-1], atol=1e-6)
    machine = svm.frobenius(*svm.differences(X[0].numpy(), z[0].numpy(), np.array([book.winner])))
    np.testing.assert_allclose(machine @ book.query.numpy(), book.margin, rtol=1e-4)
    assert svm.cosine(book.arrows[-1], book.margin) > 0.99


def test_the_direction_survives_a_gradient_below_the_rounding_error():
    """Without the leader taken out, normalising blows up noise: the cosine with the margin solution falls again."""
    X, z, Y, v, start = data(runs=4, n=3, T=4, d=6, seed=2)
    _, W, rows = training.train(X, z, Y, readout(v), [start[0] * 0], 3000, notes=3)
    chosen = rows[-1].argmax(-1).numpy()
    for run in range(4):
        machine = svm.frobenius(*svm.differences(X[run].numpy(), z[run].numpy(), chosen[run]))
        assert svm.cosine(W[-1, run].numpy(), machine) > 0.98
    assert W[-1].isfinite().all() and (rows[-1].amax(-1) > 1 - 1e-12).all()


def test_training_that_diverges_stops_and_says_where():
    X, z, Y, v, start = data()
    start[0][1] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged by step 0 in run 1: lower lr"):
        training.train(X, z, Y, readout(v), [start[0]], 5)
