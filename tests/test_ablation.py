"""Ablations equal what a hand-written hook on plain transformers does, at the right places."""

import warnings

import pytest
import torch
from conftest import DECODERS, ids_of, plain_logits, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_anatomy import projection

import heads

CHOSEN = [(0, 1), (2, 3), (2, 0)]


def logits(model, ids):
    with model.trace(ids):
        found = model.logits.save()
    return found


def by_hooks(model, chosen, ids, replace, at=slice(None)):
    """Logits with heads replaced by plain PyTorch hooks: `replace(layer)` is what goes in their place."""
    d, handles = model.anatomy.d_head, []
    for layer in {layer for layer, _ in chosen}:

        def hook(module, args, layer=layer):
            x = args[0].clone()
            for head in (h for other, h in chosen if other == layer):
                part = slice(head * d, (head + 1) * d)
                x[:, at, part] = replace(layer)[..., part] if replace else 0
            return (x, *args[1:])

        handles.append(projection(model, layer).register_forward_pre_hook(hook))
    try:
        return plain_logits(model, ids)
    finally:
        [handle.remove() for handle in handles]


def inputs_of_projections(model, ids):
    seen, handles = {}, []
    for layer in range(model.anatomy.n_layers):
        handles.append(
            projection(model, layer).register_forward_pre_hook(lambda m, args, layer=layer: seen.update({layer: args[0]}))
        )
    plain_logits(model, ids)
    [handle.remove() for handle in handles]
    return seen


def near(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_zero(any_model):
    ids = ids_of(any_model, rows=2)
    near(logits(heads.ablate(any_model, CHOSEN), ids), by_hooks(any_model, CHOSEN, ids, None))


def test_mean_per_position_and_over_all(any_model):
    ids, reference = ids_of(any_model), [ids_of(any_model, seed=s) for s in (1, 2, 3)]
    seen = [inputs_of_projections(any_model, r) for r in reference]
    mean = {layer: torch.stack([s[layer] for s in seen]).mean(0) for layer in seen[0]}
    near(logits(heads.ablate(any_model, CHOSEN, "mean", reference=reference), ids), by_hooks(any_model, CHOSEN, ids, mean.get))
    flat = {layer: m.mean(1, keepdim=True) for layer, m in mean.items()}
    ours = heads.ablate(any_model, CHOSEN, "mean", reference=reference, per_position=False)
    near(logits(ours, ids), by_hooks(any_model, CHOSEN, ids, flat.get))


def test_resample(any_model):
    ids, other = ids_of(any_model), ids_of(any_model, seed=7)
    seen = inputs_of_projections(any_model, other)
    near(logits(heads.ablate(any_model, CHOSEN, "resample", reference=[other]), ids), by_hooks(any_model, CHOSEN, ids, seen.get))


def test_uniform_attention_is_the_mean_of_the_visible_values(any_model):
    ids = ids_of(any_model)
    edited = heads.ablate(any_model, [(1, 2)], "uniform")
    with edited.trace(ids):
        v = edited.layers[1].attn.v.save()
        pattern = edited.layers[1].attn.pattern.save()
        z = edited.layers[1].attn.heads.save()
    visible = (pattern[0, 2] > 0).float()
    uniform = visible / visible.sum(-1, keepdim=True)
    near(pattern[0, 2], uniform)
    group = any_model.anatomy.n_heads // any_model.anatomy.n_kv_heads
    near(z[0, :, 2], uniform @ v[0, :, 2 // group])


@pytest.mark.parametrize("positions, at", [([3], [3]), ([-1], [11]), ([0, -2], [0, 10])])
def test_positions(llama, positions, at):
    ids = ids_of(llama)
    near(logits(heads.ablate(llama, CHOSEN, positions=positions), ids), by_hooks(llama, CHOSEN, ids, None, at))


def test_prefill_and_decode_meet_at_the_last_prompt_token(llama):
    ids = ids_of(llama)
    near(logits(heads.ablate(llama, CHOSEN, phase="decode"), ids), by_hooks(llama, CHOSEN, ids, None, [11]))
    near(logits(heads.ablate(llama, CHOSEN, phase="prefill"), ids), by_hooks(llama, CHOSEN, ids, None, slice(0, 11)))


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("phase", ["both", "decode", "prefill"])
def test_generate_equals_running_the_whole_text_again(family, phase):
    """The cache must not remember or forget an ablation: one long forward per token is the oracle."""
    model, prompt, steps = tiny(family), ids_of(tiny(family), length=10), 4
    edited = heads.ablate(model, CHOSEN, phase=phase)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with edited.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, do_sample=False) as tracer:
            found = tracer.result.save()
    ids = prompt
    for _ in range(steps):
        at = {"both": slice(None), "decode": slice(9, None), "prefill": slice(0, 9)}[phase]
        ids = torch.cat([ids, by_hooks(model, CHOSEN, ids, None, at)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_each_row_of_a_batch_has_its_own_set(llama):
    ids = ids_of(llama).expand(3, -1)
    sets = [[], [(0, 1)], CHOSEN]
    found = logits(heads.ablate(llama, sets), ids)
    for row, chosen in enumerate(sets):
        near(found[row : row + 1], by_hooks(llama, chosen, ids[:1], None))


def test_the_original_is_as_it_was_and_nothing_warns(llama):
    ids = ids_of(llama)
    before = plain_logits(llama, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(heads.ablate(llama, CHOSEN), ids)
    assert torch.equal(logits(llama, ids), before)


heads_of_llama = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5)


@settings(max_examples=15, deadline=None)
@given(first=heads_of_llama, second=heads_of_llama)
def test_ablations_stack_and_order_does_not_matter(first, second):
    model = tiny("llama")
    ids = ids_of(model)
    one = logits(heads.ablate(heads.ablate(model, first), second), ids)
    near(one, logits(heads.ablate(model, [*second, *first]), ids))


def test_ablating_nothing_changes_nothing(any_model):
    ids = ids_of(any_model)
    assert torch.equal(logits(heads.ablate(any_model, []), ids), plain_logits(any_model, ids))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(heads=[(9, 0)]), IndexError, "does not exist"),
        (dict(heads=CHOSEN, kind="median"), ValueError, "median"),
        (dict(heads=CHOSEN, phase="later"), ValueError, "later"),
        (dict(heads=CHOSEN, kind="mean"), ValueError, "needs a reference"),
        (dict(heads=CHOSEN, kind="zero", reference=["x"]), ValueError, "neither"),
        (dict(heads=CHOSEN, kind="mean", reference=["short", "a longer one"]), ValueError, "equal length"),
        (dict(heads=CHOSEN, kind="mean", reference=[]), ValueError, "no text"),
        (dict(heads=CHOSEN, kind="mean", reference="one text"), TypeError, "list of texts"),
    ],
)
def test_bad_input_is_refused(llama, arguments, error, words):
    with pytest.raises(error, match=words):
        heads.ablate(llama, **arguments)


def test_a_reference_that_is_too_short_is_named(llama):
    edited = heads.ablate(llama, CHOSEN, "mean", reference=[ids_of(llama, length=5)])
    with pytest.raises(Exception, match="the reference holds 5 positions"):
        logits(edited, ids_of(llama))
