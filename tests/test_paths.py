"""Path patching: the fast engine equals the passes as defined, and the passes equal plain hooks."""

import numpy as np
import pytest
from conftest import plain_of, tiny
from toys import toy

import heads
from heads import metrics
from heads.lab.paths import Replay
from heads.lab.replay import ReplayError
from heads.tasks import Task

ROUTES = {
    "logits": dict(mlp_senders=True),
    "logits, skip path": dict(mlp_senders=True, mlps="freeze"),
    "queries": dict(receivers=[(3, 0), (3, 2)]),
    "queries in two layers": dict(receivers=[(2, 0), (3, 2)], scan="last", mlp_senders=True),
    "values elsewhere": dict(receivers=[(2, 1), (3, 0)], component="v", position="S"),
    "keys elsewhere": dict(receivers=[(2, 1), (3, 0)], component="k", position="S", scan="last", mlps="freeze"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_both_engines_agree(decoder, route):
    task = toy(decoder, prompts=3)
    fast = heads.path_scores(decoder, task, **ROUTES[route], engine="fast", batch=2, tokens=25, progress=False)
    slow = heads.path_scores(decoder, task, **ROUTES[route], engine="literal", progress=False)
    np.testing.assert_allclose(fast.samples, slow.samples, atol=1e-4)
    np.testing.assert_allclose(fast.source, slow.source, atol=1e-4)
    if ROUTES[route].get("mlp_senders"):
        np.testing.assert_allclose(fast.mlps, slow.mlps, atol=1e-4)
    assert np.abs(slow.samples).max() > 1e-3


def test_the_literal_engine_equals_hooks_on_plain_transformers(decoder):
    """Sender to logits with MLPs recomputed: all heads held at the clean run but the sender's last position."""
    task, plain = toy(decoder), plain_of(decoder)
    clean, twin = plain.z(task.ids), plain.z(task.corrupted)
    columns = metrics.logit_difference.columns(task)
    read = lambda logits: metrics.logit_difference(logits[:, -1].gather(-1, columns), task)  # noqa: E731
    found = heads.path_scores(decoder, task, engine="literal", progress=False)
    base = read(plain(task.ids).logits)
    for layer, head in [(0, 0), (1, 3), (3, 2)]:

        def hold(at, z):
            z = clean[at].clone()
            if at == layer:
                z[:, -1, head] = twin[at][:, -1, head]
            return z

        with plain.edited(hold):
            change = read(plain(task.ids).logits) - base
        np.testing.assert_allclose(found.samples[:, layer, head], change, atol=5e-5)


def test_the_skip_path_of_a_head_is_what_it_writes(llama):
    """MLPs and heads held: the final residual stream moves by W_O (z' - z), and nothing else."""
    task = toy(llama)
    clean, twin = Replay(llama, task.ids), Replay(llama, task.corrupted)
    found = heads.path_scores(llama, task, mlps="freeze", progress=False)
    columns = metrics.logit_difference.columns(task)
    for layer, head in [(0, 1), (2, 3)]:
        written = heads.head_outputs(llama, layer, twin.z[layer] - clean.z[layer])[:, -1, head]
        logits = clean.read(clean.final + written, columns)[0]
        np.testing.assert_allclose(
            found.samples[:, layer, head] + found.base, metrics.logit_difference(logits, task), atol=5e-5
        )


def test_heads_that_are_no_senders_score_zero(llama):
    found = heads.path_scores(llama, toy(llama), [(2, 0), (3, 1)], progress=False)
    assert (found.values[2:] == 0).all() and np.abs(found.values[:2]).max() > 0
    found = heads.path_scores(llama, toy(llama), [(2, 0), (3, 1)], scan="last", progress=False)
    assert found[2, 0] == 0 and np.abs(found.values[2, 1:]).max() > 0


def test_a_group_of_heads_receives_its_key_together(llama):  # 4 heads, 2 key-value heads
    task = toy(llama)
    one, pair = ([h for h in ((3, 0), (3, 1))][:k] for k in (1, 2))
    a = heads.path_scores(llama, task, one, "k", position="S", progress=False)
    b = heads.path_scores(llama, task, pair, "k", position="S", progress=False)
    np.testing.assert_allclose(a.samples, b.samples, atol=1e-6)


def test_auto_falls_back_and_fast_refuses(llama, monkeypatch, capsys):
    task = toy(llama)
    wanted = heads.path_scores(llama, task, engine="literal", progress=False)

    def broken(self):
        raise ReplayError("off by 1")

    monkeypatch.setattr(Replay, "check", broken)
    found = heads.path_scores(llama, task, progress=False)
    np.testing.assert_allclose(found.samples, wanted.samples, atol=1e-6)
    assert "takes longer" in capsys.readouterr().out
    with pytest.raises(ReplayError):
        heads.path_scores(llama, task, engine="fast", progress=False)


@pytest.mark.parametrize("call, error, said", [
    (dict(component="o"), LookupError, "'o'. Known: q, k, v"),
    (dict(mlps="melt"), LookupError, "'melt'. Known: recompute, freeze"),
    (dict(position="S"), ValueError, "reaches the logits"),
    (dict(position="T"), LookupError, "no role of toy 'T'. Known: S, END, all"),
    (dict(position="all"), ValueError, "one position per prompt"),
    (dict(receivers=[(9, 0)]), IndexError, "layers 0 to 3"),
    (dict(receivers=[(0, 0)]), ValueError, "a path goes upwards"),
    (dict(scan="first"), LookupError, "'first'. Known: earliest, last"),
    (dict(engine="slow"), LookupError, "'slow'. Known: auto, fast, literal"),
])  # fmt: skip
def test_bad_routes_are_refused_before_any_forward(llama, monkeypatch, call, error, said):
    monkeypatch.setattr(llama._module, "forward", lambda *a, **k: pytest.fail("a forward pass ran"))
    with pytest.raises(error, match=said):
        heads.path_scores(llama, toy(llama), **call)


def test_encoders_have_no_paths():
    model = tiny("bert")
    with pytest.raises(ValueError, match="encoder"):
        heads.path_scores(model, toy(model))


def test_a_twin_that_does_not_differ_at_a_prompt_is_refused(llama):
    task = toy(llama)
    with pytest.raises(ValueError, match="does not differ"):
        Task("same", task.ids, task.answers, task.foils, task.ids.clone())


@pytest.mark.parametrize("engine", ["fast", "literal"])
def test_receivers_come_in_many_forms(llama, engine):
    task = toy(llama, prompts=3)
    once = heads.path_scores(llama, task, [(2, 0)], progress=False, engine=engine).values
    for receivers in ((pair for pair in [(2, 0)]), np.array([[2, 0]]), [(2, 0), (2, 0)]):
        assert np.array_equal(once, heads.path_scores(llama, task, receivers, progress=False, engine=engine).values)
    with pytest.raises(ValueError, match="a role, not"):
        heads.path_scores(llama, task, position=["END"])
