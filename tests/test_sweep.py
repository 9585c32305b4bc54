"""Sweeps equal the naive loop: one head, one forward, edited by a hook on plain transformers."""

import numpy as np
import pytest
import torch
from conftest import DECODERS, fresh, plain_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import naive, toy

import heads
from heads import metrics
from heads.lab.replay import Replay, ReplayError
from heads.lab.sweeps import KINDS


@pytest.mark.parametrize("positions", ["all", "END", "S"])
@pytest.mark.parametrize("kind", ["zero", "mean", "counterfactual"])
def test_a_sweep_equals_cutting_one_head_after_the_other(decoder, kind, positions):
    task = toy(decoder)
    found = heads.ablation_scores(decoder, task, kind, positions, batch=2, tokens=30, progress=False)
    if kind == "mean":  # the reference is the whole task's, however it is batched
        assert len(task) > 2
    wanted, base = naive(decoder, task, kind, positions)
    np.testing.assert_allclose(found.samples, wanted, atol=2e-5)
    np.testing.assert_allclose(found.base, base, atol=2e-5)
    assert np.abs(wanted).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["accuracy among options", "accuracy", "probability", "log-probability", "KL from the base run", "answer logit"]
)
def test_every_metric_reads_the_same_logits(llama, name):
    task, metric = toy(llama), metrics.named(name)
    found = heads.ablation_scores(llama, task, "zero", "END", metric, progress=False)
    np.testing.assert_allclose(found.samples, naive(llama, task, "zero", "END", metric)[0], atol=2e-5)


def test_resampling_takes_another_prompt_never_its_own(llama):
    task = toy(llama)
    same = task.corrupted[:1].expand_as(task.corrupted)
    found = heads.ablation_scores(llama, task, "resample", "END", reference=same, progress=False)
    mean = heads.ablation_scores(llama, task, "mean", "END", reference=same, progress=False)
    np.testing.assert_allclose(found.samples, mean.samples, atol=2e-5)  # one prompt is its own mean
    own = heads.ablation_scores(llama, task, "resample", "END", reference=task.ids, progress=False)
    assert (np.abs(own.samples).max((1, 2)) > 1e-6).all()


def test_noising_and_denoising_share_their_runs(llama):
    task = toy(llama)
    noise = heads.ablation_scores(llama, task, "counterfactual", progress=False)
    denoise = heads.ablation_scores(llama, task.swapped(), "counterfactual", progress=False)
    np.testing.assert_allclose(noise.base, denoise.source, atol=1e-5)
    np.testing.assert_allclose(noise.source, denoise.base, atol=1e-5)


def test_a_head_without_output_weights_scores_zero():
    model = fresh("llama")  # its own copy: the weights are edited
    heads.output_projection(model, 1)[8:16] = 0  # head 1 of layer 1
    found = heads.ablation_scores(model, toy(model), "zero", progress=False)
    assert np.abs(found.samples[:, 1, 1]).max() < 1e-5 < np.abs(found.samples[:, 1, 0]).max()


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)), st.integers(1, 5), st.integers(1, 200))
def test_neither_order_nor_batches_change_anything(order, batch, tokens):
    model = tiny("qwen3")
    task = toy(model)
    one = heads.ablation_scores(model, task, "counterfactual", "S", progress=False)
    other = heads.ablation_scores(
        model, task[list(order)], "counterfactual", "S", batch=batch, tokens=tokens, progress=False
    )
    np.testing.assert_allclose(one.samples[list(order)], other.samples, atol=2e-5)


def test_the_model_is_as_before(decoder):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder._module.modules()]

    task, there = toy(decoder), hooks()
    before = plain_of(decoder)(task.ids).logits
    heads.ablation_scores(decoder, task, "zero", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(decoder._module(task.ids).logits, before, atol=5e-5, rtol=1e-4)
    assert hooks() == there


@pytest.mark.parametrize("call, error, said", [
    (dict(kind="nought"), LookupError, "'nought'. Known: zero, mean, resample, counterfactual"),
    (dict(positions="S3"), LookupError, "no role of toy 'S3'. Did you mean 'S'. Known: S, END, all"),
    (dict(metric="logit diference"), LookupError, "'logit diference'. Did you mean 'logit difference'"),
    (dict(kind="zero", reference=torch.ones(2, 10).long()), ValueError, "takes no reference"),
    (dict(kind="mean", reference=torch.ones(2, 9).long()), ValueError, "9 tokens"),
    (dict(kind="resample", reference=torch.ones(1, 10).long()), ValueError, "at least two"),
])  # fmt: skip
def test_bad_input_is_refused_before_any_forward(llama, monkeypatch, call, error, said):
    monkeypatch.setattr(llama._module, "forward", lambda *a, **k: pytest.fail("a forward pass ran"))
    with pytest.raises(error, match=said):
        heads.ablation_scores(llama, toy(llama), **call)


def test_an_encoder_is_refused(llama):
    with pytest.raises(ValueError, match="encoder"):
        heads.ablation_scores(tiny("bert"), toy(llama), progress=False)


def test_a_model_whose_layers_need_more_is_found_out(monkeypatch):
    model = fresh("llama")
    norm = model.final_norm._module.forward
    monkeypatch.setattr(Replay, "read", lambda self, hidden, columns: self.model.unembed._module(hidden)[None])
    with pytest.raises(ReplayError, match="off by"):
        Replay(model, toy(model).ids)
    assert model.final_norm._module.forward == norm


def test_all_kinds_are_tested():
    assert set(KINDS) == {"zero", "mean", "counterfactual", "resample"} and len(DECODERS) >= 6


def test_an_edited_model_is_refused_where_its_edits_would_be_lost(llama):
    edited, task = heads.ablate(llama, [(1, 1)]), toy(llama)
    with pytest.raises(ReplayError, match="edits of this model"):
        heads.ablation_scores(edited, task, progress=False)
    with pytest.raises(ReplayError, match="engine='literal'"):
        heads.path_scores(edited, task, engine="fast", progress=False)
    found = heads.path_scores(edited, task, progress=False)  # "auto" takes the engine that keeps them
    np.testing.assert_allclose(found.base, heads.evaluate(edited, task), atol=1e-5)
