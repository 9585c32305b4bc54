"""Probes find the head that knows, and the direction it knows it by."""

import numpy as np
import pytest
import torch
from conftest import ids_of, logits_of, tiny

import heads
from heads.lab.readings import fit_probes


def planted(n: int = 60, seed: int = 0):
    """Activations in which only head (1, 2) tells the labels apart, along its third entry."""
    generator = torch.Generator().manual_seed(seed)
    z, labels = torch.randn(n, 3, 4, 8, generator=generator), torch.arange(n) % 2
    z[:, 1, 2, 3] += 4.0 * labels
    return z, labels


@pytest.mark.parametrize("kind", ["mean", "probe"])
def test_the_planted_head_and_direction_are_found(kind):
    z, labels = planted()
    found = fit_probes(z, labels, kind, progress=False)
    assert found.accuracy.top(1) == [(1, 2)] and found.accuracy[1, 2] > 0.9
    others = np.delete(found.accuracy.values.ravel(), 1 * 4 + 2)
    assert abs(others.mean() - 0.5) < 0.15, "held-out accuracy of the others is chance"
    assert found.directions[1, 2, 3] > 0.8 and found.directions.norm(dim=-1).allclose(torch.ones(3, 4))
    along = (z[:, 1, 2] @ found.directions[1, 2]).std()
    assert found.std[1, 2].item() == pytest.approx(along.item(), rel=1e-5)
    assert found.vectors[1, 2].norm().item() == pytest.approx(along.item(), rel=1e-4)


def test_probes_of_a_model_can_steer_it():
    model = tiny("qwen3")
    texts = ["a warm day", "a cold day"] * 4
    found = fit_probes(heads.head_activations(model, texts), [1, 0] * 4, folds=2, progress=False)
    assert found.accuracy.shape == (4, 4) and found.vectors.shape == (4, 4, 16)
    best = found.accuracy.top(2)
    steered = heads.Steering(model, found.vectors, 15.0, heads=best).edited
    assert not torch.equal(logits_of(steered, ids_of(model)), logits_of(model, ids_of(model)))


def test_bad_labels_are_refused():
    z, labels = planted(12)
    for bad, message in ((labels[:5], "for each of 12"), (labels + 1, "0 or 1"), (labels * 0, "examples of each label")):
        with pytest.raises(ValueError, match=message):
            fit_probes(z, bad, progress=False)
    with pytest.raises(LookupError, match="no direction 'median'. Did you mean 'mean'"):
        fit_probes(z, labels, "median", progress=False)


@pytest.mark.parametrize("z", [torch.zeros(10, 4, 8), torch.full((10, 1, 1, 8), torch.nan)])
def test_activations_of_another_shape_or_not_finite_are_refused(z):
    with pytest.raises(ValueError, match="finite activations"):
        heads.fit_probes(z, [0, 1] * 5, progress=False)
