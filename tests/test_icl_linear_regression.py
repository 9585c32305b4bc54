"""Notebook 41: its batched layers are separate layers, its refusals name the cure."""

import math
import sys
import types

import pytest
import torch
from cells import run_cells

from heads.course import papers

SLUG = "icl-linear-regression"


@pytest.fixture(scope="module")
def book():
    # a dataclass looks its module up by name
    sys.modules.setdefault("icl_linear_regression", types.ModuleType("icl_linear_regression"))
    return types.SimpleNamespace(**run_cells(SLUG, "batched"))


def a_world(book, streams=2, d=3, tasks=1):
    return book.World(torch.eye(d).repeat(streams, 1, 1), torch.full((d, tasks), d**-0.5), torch.full((streams, tasks), 0.1))


def some_layers(book, sizes=(1, 3), linear=1, streams=2, d=3, tasks=1, length=7):
    return book.Layers(streams, list(sizes), d, tasks, linear, length, torch.Generator().manual_seed(0))


def test_prompts_have_the_stated_moments(book):
    world = a_world(book, streams=1, d=3)
    examples, query, target = book.prompts(world, 5_000, 12, torch.Generator().manual_seed(0))
    assert examples.shape == (1, 5_000, 12, 4) and query.shape == (1, 5_000, 3) and target.shape == (1, 5_000, 1)
    assert examples[..., :3].var().item() == pytest.approx(1, rel=0.1)
    assert examples[..., 3].var().item() == pytest.approx(1.1, rel=0.1), "signal 1 and noise 0.1"
    assert target.var().item() == pytest.approx(1.1, rel=0.1)
    beta = torch.linalg.lstsq(examples[0, ..., :3], examples[0, ..., 3:]).solution  # one task in a prompt, not many
    assert torch.corrcoef(torch.stack([(query[0, :, None] @ beta).flatten(), target.flatten()]))[0, 1] > 0.8


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_layer_is_plain_attention(book, tasks):
    """Each softmax head against torch's own attention, through the four weight matrices."""
    layers = some_layers(book, tasks=tasks)
    examples, query, _ = book.prompts(a_world(book, tasks=tasks), 5, 7, torch.Generator().manual_seed(1))
    ours = layers(examples, query)
    padded = torch.cat([query, torch.zeros(2, 5, tasks)], -1)[:, :, None]
    said = []
    for h in range(4):
        q, k, v = (x @ w[:, None, h].mT for x, w in ((padded, layers.Q), (examples, layers.K), (examples, layers.V)))
        read = torch.nn.functional.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(d + task)
        said.append((read @ layers.O[:, None, h].mT)[:, :, 0])
    torch.testing.assert_close(ours[:, :, 0], said[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[:, :, 1], sum(said[1:]), atol=1e-5, rtol=1e-4)


def test_linear_attention_is_a_sum(book):
    layers = some_layers(book)
    examples, query, _ = book.prompts(a_world(book), 5, 7, torch.Generator().manual_seed(1))
    KQ, OV = layers.circuits()
    scores = torch.einsum("sbli,sij,sbj->sbl", examples, KQ[:, 4, :, :3], query) / 7
    expected = torch.einsum("sbl,sbli,si->sb", scores, examples, OV[:, 4, 0])
    torch.testing.assert_close(layers(examples, query)[:, :, 2, 0], expected, atol=1e-5, rtol=1e-4)


def test_layers_side_by_side_do_not_feel_each_other(book):
    layers, world = some_layers(book), a_world(book)
    examples, query, target = book.prompts(world, 6, 7, torch.Generator().manual_seed(1))
    errors = (layers(examples, query) - target[:, :, None]).square().mean((1, 3))  # [stream, layer]
    (alone,) = torch.autograd.grad(errors[1, 1], layers.K, retain_graph=True)
    (together,) = torch.autograd.grad(errors.sum(), layers.K)
    torch.testing.assert_close(alone[1, 1:4], together[1, 1:4])
    assert alone[0].abs().max() == 0 and alone[1, 0].abs().max() == 0 and alone[1, 4].abs().max() == 0


def test_training_goes_down_and_notes_its_circuits(book):
    layers, marks, KQ, OV, loss = book.train(a_world(book), [2], 300, 0.02, batch=32, length=12, notes=8)
    assert marks[0] == 0 and marks[-1] == 300 and marks == sorted(set(marks))
    assert KQ.shape == (len(marks), 2, 2, 4, 4) and OV.shape == (len(marks), 2, 2, 1, 4) and loss.shape == (301, 2, 1)
    assert loss[-30:].mean() < 0.9 * loss[:30].mean()
    torch.testing.assert_close(layers.circuits()[0].isfinite().all(), torch.tensor(True))


def test_the_same_seed_gives_the_same_layers(book):
    first, again, other = (book.train(a_world(book), [2], 5, 0.01, batch=4, length=6, seed=s)[2] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_training_that_diverges_stops_and_says_where(book):
    with pytest.raises(FloatingPointError, match=r"diverged by step \d+.*layer with 2 head.*stream 0.*Lower lr"):
        book.train(a_world(book), [2], 30, 1e20, batch=8, length=6)


GOOD = {p.name: p.default for p in papers.parameters(SLUG)}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"length": 4, "lengths": [4, 8]}, "take length > d"),
        ({"noise": 0.0}, "must be above 0"),
        ({"rho": 1.0}, "correlation from 0 to below 1"),
        ({"sizes": [1, 4]}, "1, 2 and 4 heads"),
        ({"lengths": [10, 40]}, "need 40 and 80 among them"),
    ],
)
def test_what_the_theory_does_not_cover_is_refused(book, change, words):
    names = {**GOOD, **change, "World": book.World}
    with pytest.raises(ValueError, match=words):
        run_cells(SLUG, "worlds", **names)
    assert math.isclose(run_cells(SLUG, "worlds", **{**GOOD, "World": book.World})["world"].noise[-1, 0].item(), GOOD["loud"])
