"""Effects: shares of a gap, intervals, halves; and what metrics and tasks refuse."""

import numpy as np
import pytest
import torch
from conftest import logits_of, tiny
from toys import toy

import heads
from heads import metrics
from heads.scores import Effects
from heads.tasks import Item, Task, build


def effects(n=40, seed=0):
    rng = np.random.default_rng(seed)
    return Effects(rng.normal(-1, 0.5, (n, 3, 4)), np.full(n, 5.0), np.full(n, -5.0))


def test_shares_are_ratios_of_means():
    found = effects()
    np.testing.assert_allclose(found.values, found.samples.mean(0))
    np.testing.assert_allclose(found.normalised().values, found.values / -10)
    np.testing.assert_allclose(found.relative().values, found.values / 5)
    assert (found.magnitude().values >= 0).all()


def test_a_small_gap_is_not_divided_by():
    found = Effects(np.ones((2, 1, 1)), [1.0, 1.0], [1.5, 1.5])
    with pytest.raises(ValueError, match="below the floor"):
        found.normalised()
    assert found.normalised(floor=0.1)[0, 0] == pytest.approx(2)
    with pytest.raises(ValueError, match="no source"):
        Effects(np.ones((2, 1, 1)), [1.0, 1.0]).normalised()
    with pytest.raises(ValueError, match="undefined"):
        Effects(np.ones((2, 1, 1)), [1.0, -1.0]).relative()
    with pytest.raises(ValueError, match="ask for mlp_senders=True"):
        found.mlps  # noqa: B018


def test_an_interval_covers_the_mean_as_often_as_it_says():
    inside = []
    for seed in range(100):
        found = effects(seed=seed)
        low, high = found.interval(n=200, seed=seed)
        inside.append(((low < -1) & (high > -1)).mean())
    assert 0.88 < np.mean(inside) < 0.98


def test_halves_are_disjoint_and_average_to_the_whole():
    found = effects()
    a, b = found.halves(seed=3)
    np.testing.assert_allclose((a.values + b.values) / 2, found.values)
    with pytest.raises(ValueError, match="no halves"):
        Effects(np.ones((1, 1, 1)), [1.0]).halves()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="base for each prompt"):
        Effects(np.ones((2, 3, 4)), [1.0])


@pytest.mark.parametrize("name", ["logit difference", "accuracy", "probability"])
def test_evaluate_reads_the_models_own_logits(decoder, name):
    task, metric = toy(decoder), metrics.named(name)
    logits = logits_of(decoder, task.ids)[:, -1]
    logits = logits if metric.whole else logits.gather(-1, metric.columns(task))
    torch.testing.assert_close(metrics.evaluate(decoder, task, name, batch=2), metric(logits, task), atol=1e-4, rtol=1e-4)


def test_evaluate_takes_an_edited_model_and_refuses_kl(llama):
    task = toy(llama)
    edited = heads.ablate(llama, [(1, 1)], positions=[-1])
    one = heads.ablation_scores(llama, task, "zero", "END", progress=False)
    change = metrics.evaluate(edited, task) - metrics.evaluate(llama, task)
    np.testing.assert_allclose(one.samples[:, 1, 1], change, atol=2e-5)
    with pytest.raises(ValueError, match="two runs"):
        metrics.evaluate(llama, task, metrics.kl)


def test_a_contrast_needs_options(llama):
    task = toy(llama)
    found = metrics.evaluate(llama, task, metrics.contrast(range(10, 20)))
    logits = logits_of(llama, task.ids)[:, -1]
    torch.testing.assert_close(
        found, logits.gather(-1, task.answers[:, None])[:, 0] - logits[:, 10:20].mean(-1), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match="two options"):
        metrics.contrast([1])
    with pytest.raises(TypeError, match="a token id is a whole number, not 2.7"):
        metrics.contrast([1, 2.7])


def parts(n=3, length=6):
    ids = torch.arange(n * length).view(n, length) + 10
    twin = ids.clone()
    twin[:, 2] = 5
    return dict(name="t", ids=ids, answers=torch.arange(n), foils=torch.arange(n)[:, None] + 1, corrupted=twin)


@pytest.mark.parametrize("change, said", [
    (dict(foils=torch.arange(3)[:, None]), "answer among its foils"),
    (dict(corrupted=parts()["ids"]), "does not differ"),
    (dict(corrupted=torch.zeros(3, 5).long()), "as many tokens"),
    (dict(answers=torch.zeros(3, 2).long()), "one token each"),
    (dict(roles={"S": torch.tensor([0, 1, 6])}), "below 6"),
    (dict(ids=torch.zeros(0, 6).long()), "at least one prompt"),
])  # fmt: skip
def test_a_task_that_cannot_be_meant_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Task(**{**parts(), **change})


def test_parts_of_a_task():
    task = Task(**parts(4), roles={"S": torch.tensor([1, 2, 3, 4])})
    assert (
        task[1:3].roles["S"].tolist() == [2, 3]
        and len(task[[0, 3]]) == 2
        and len(task[torch.tensor([True] * 3 + [False])]) == 3
    )
    one, two = task.halves(seed=1)
    assert sorted(one.answers.tolist() + two.answers.tolist()) == [0, 1, 2, 3]
    assert task.at("S").sum() == 4 and task.at(["S", "END"])[0].tolist() == [False, True, False, False, False, True]
    assert torch.equal(task.swapped().ids, task.corrupted)
    with pytest.raises(LookupError, match="no role of t 'S9'. Did you mean 'S'. Known: S, END, all"):
        task.at("S9")


def test_build_drops_what_a_tokenizer_cannot_use_and_says_why():
    model = tiny("llama")  # one token a byte
    good = Item("ab cd", "e", ("f",), "ab ce", {"last": (3, 5)})
    task = build(
        model,
        "t",
        [good, Item("ab cd", "ee", ("f",), "ab ce"), Item("ab cd", "e", ("f",), "ab"), Item("abc", "e", ("f",), "abd")],
    )
    assert len(task) == 1 and task.roles["last"].item() == 4
    assert [reason for _, reason in task.dropped] == [
        "'ee' is not one token after its prompt",
        "5 tokens, but its corrupted twin has 2",
        "3 tokens, most have 5",
    ]
    with pytest.raises(ValueError, match="no item can be used.*not one token"):
        build(model, "t", [Item("ab", "ee", ("f",), "ac")])
