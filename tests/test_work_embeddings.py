"""Notebook 54: its average precision against scikit-learn's, its loss against a loop, its matching against its limits."""

import types

import numpy as np
import pytest
import torch
from cells import run_cells
from sklearn.metrics import label_ranking_average_precision_score
from torch.nn import functional as F

SLUG = "work-embeddings"
X = F.normalize(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), dim=1)
measure = types.SimpleNamespace(**run_cells(SLUG, "measure"))
late = types.SimpleNamespace(**run_cells(SLUG, "late"))
loss = types.SimpleNamespace(**run_cells(SLUG, "loss", F=F, X=X))


def test_average_precision_is_that_of_scikit_learn_ties_included():
    draw = np.random.default_rng(0)
    scores, right = draw.integers(0, 6, (40, 15)).astype(np.float32), draw.random((40, 15)) < 0.2
    right[:, 0] = True
    ours = measure.average_precision(torch.from_numpy(scores), torch.from_numpy(right))
    assert ours.tolist() == pytest.approx([label_ranking_average_precision_score(r[None], s[None]) for r, s in zip(right, scores)])


def losses(way, many, linked):
    asker, answer = torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[6, 7, 6, 8]]])
    W = [torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1)) / 3, torch.zeros(1, 1, 6)]
    right = loss.right_in_batch(linked[None], asker, answer, many)
    found = loss.graph_losses(W, asker, answer, right, torch.full((1, 1, 1), 0.1), loss.cosine, way)
    W, asker, answer = [W[0][0]], asker[0], answer[0]
    moved = F.normalize(X + X @ W[0], dim=1)
    return found.item(), (moved[asker[0]] @ moved[answer[0]].T / 0.1).double().numpy(), asker[0].tolist(), answer[0].tolist()


@pytest.mark.parametrize("way", ["one way", "turned round", "symmetric"])
@pytest.mark.parametrize("many", [True, False])
def test_the_loss_is_that_of_a_loop_over_the_links(way, many):
    linked = torch.zeros(12, 12, dtype=torch.bool)
    for pair in [(0, 6), (0, 7), (1, 6), (2, 8)]:
        linked[pair] = True
    found, s, askers, answers = losses(way, many, linked)

    def one_side(s, is_right):
        rows = []
        for i in range(4):
            right = [j for j in range(4) if (is_right(i, j) if many else i == j)]
            rows.append(-np.mean([s[i, j] - np.log(np.exp(s[i]).sum()) for j in right]))
        return np.mean(rows)

    there = one_side(s, lambda i, j: bool(linked[askers[i], answers[j]]))
    back = one_side(s.T, lambda j, i: bool(linked[askers[i], answers[j]]))
    assert found == pytest.approx({"one way": there, "turned round": back, "symmetric": there + back}[way], rel=1e-4)


def texts(lengths, width, seed):
    """Token vectors [text, position, d] of length 1, noise where there is no token, and which exist."""
    there = torch.arange(width) < torch.tensor(lengths)[:, None]
    return F.normalize(torch.randn(len(lengths), width, 5, generator=torch.Generator().manual_seed(seed)), dim=-1), there


@pytest.mark.parametrize("tau", [0, 1e-4, 0.1, float("inf")])
def test_matching_is_that_of_a_loop_over_texts_without_padding(tau):
    (q, asks), (y, answers) = texts([1, 3], 4, 0), texts([2, 5, 3], 5, 1)
    there, back = late.both_ways(torch.einsum("and,bmd->abnm", q, y), asks, answers, tau)

    def one(a, b):
        C = (a @ b.T).numpy()
        if tau < 1e-3:  # hard
            return C.max(1).mean()
        A = np.exp(C / tau)
        return (A / A.sum(1, keepdims=True) * C).sum(1).mean()

    for i in range(2):
        for j in range(3):
            a, b = q[i][asks[i]], y[j][answers[j]]
            assert there[i, j].item() == pytest.approx(one(a, b), abs=1e-4)
            assert back[i, j].item() == pytest.approx(one(b, a), abs=1e-4)


def test_padding_has_no_gradient():
    (q, asks), (y, answers) = texts([1, 3], 4, 0), texts([2, 5], 5, 1)
    y.requires_grad_()
    there, back = late.both_ways(torch.einsum("and,bmd->abnm", q, y), asks, answers, 0.1)
    (there.sum() + back.sum()).backward()
    assert y.grad.isfinite().all() and not y.grad[~answers].any() and y.grad[answers].any()


def test_two_splits_side_by_side_are_two_alone():
    linked = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    asker, answer = torch.tensor([[[0, 1, 2]], [[3, 0, 1]]]), torch.tensor([[[6, 7, 8]], [[9, 6, 7]]])
    linked[torch.arange(2)[:, None, None], asker, answer] = True
    W = [torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.randn(2, 1, 6)]

    def of(k):
        right = loss.right_in_batch(linked[k], asker[k], answer[k], True)
        return loss.graph_losses([w[k] for w in W], asker[k], answer[k], right, torch.ones(1, 1, 1), loss.cosine, "symmetric")

    together = of(slice(None))
    assert together.shape == (2, 1) and torch.allclose(together, torch.cat([of(slice(0, 1)), of(slice(1, 2))]), atol=1e-6)
