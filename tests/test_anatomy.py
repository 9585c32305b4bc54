"""One vocabulary: the heads that a trace shows are the heads that the model has, in every family."""

import copy
import os

import nnsight
import pytest
import torch
from conftest import DECODERS, ids_of, plain_logits, tiny
from transformers import AutoModelForCausalLM

import heads
from heads import anatomy, checks
from heads.models import TINY
from heads.papers import root


def projection(model, layer):
    """The output projection of a layer, found without heads.anatomy's paths: by its place in the module."""
    attn = model.layers[layer].attn._module
    names = ("o_proj", "c_proj", "dense", "Wo")
    found = [m for name, m in attn.named_modules() if name.split(".")[-1] in names]
    assert len(found) == 1
    return found[0]


def weight(module):
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def hooked(model, layer, head, ids):
    """Logits with one head zeroed by a plain PyTorch hook on the input of the output projection."""
    d = model.anatomy.d_head

    def zero(module, args):
        x = args[0].clone()
        x[..., head * d : (head + 1) * d] = 0
        return (x, *args[1:])

    handle = projection(model, layer).register_forward_pre_hook(zero)
    try:
        return plain_logits(model, ids)
    finally:
        handle.remove()


def test_heads_sum_to_the_attention_output(any_model):
    ids, seen = ids_of(any_model), {}
    module = projection(any_model, 2)
    handle = module.register_forward_hook(lambda m, args, out: seen.update(z=args[0], out=out))
    plain_logits(any_model, ids)
    handle.remove()
    with any_model.trace(ids):
        z = any_model.layers[2].attn.heads.save()
    torch.testing.assert_close(z.flatten(-2), seen["z"])
    slices = weight(module).view(any_model.anatomy.n_heads, any_model.anatomy.d_head, -1)
    total = torch.einsum("bphd,hdm->bpm", z, slices) + (module.bias if module.bias is not None else 0)
    torch.testing.assert_close(total, seen["out"], atol=1e-5, rtol=1e-4)


def test_zeroing_a_head_equals_a_plain_hook_and_a_weight_knock_out(any_model):
    ids = ids_of(any_model)
    with any_model.trace(ids):
        any_model.layers[1].attn.heads[:, :, 3] = 0
        edited = any_model.logits.save()
    torch.testing.assert_close(edited, hooked(any_model, 1, 3, ids), atol=1e-5, rtol=1e-4)

    knocked = copy.deepcopy(projection(any_model, 1).state_dict())
    d = any_model.anatomy.d_head
    rows = weight(projection(any_model, 1))[3 * d : 4 * d]
    rows.zero_()
    try:
        torch.testing.assert_close(edited, plain_logits(any_model, ids), atol=1e-5, rtol=1e-4)
    finally:
        projection(any_model, 1).load_state_dict(knocked)
    assert (edited - plain_logits(any_model, ids)).abs().max() > 1e-3, "the head does nothing: this test cannot fail"


@pytest.mark.parametrize("part", ["q", "k", "v", "pattern", "heads"])
def test_an_edit_that_changes_nothing_changes_nothing(any_model, part):
    ids = ids_of(any_model)
    with any_model.trace(ids):
        view = getattr(any_model.layers[1].attn, part)
        view[:] = view.clone()
        edited = any_model.logits.save()
    # an edited pattern goes through an explicit product instead of SDPA: equal to rounding
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if part == "pattern" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(edited, plain_logits(any_model, ids), **tolerance)


def test_reading_everything_changes_nothing_to_the_bit(any_model):
    ids = ids_of(any_model)
    with any_model.trace(ids):
        shapes = nnsight.save([])
        for layer in any_model.layers:
            attn = layer.attn
            shapes.append([tuple(x.shape) for x in (attn.q, attn.k, attn.v, attn.pattern, attn.heads)])
            layer.mlp.output.clone()
            layer.output.clone()
        logits = any_model.logits.save()
    assert torch.equal(logits, plain_logits(any_model, ids))
    a, n = any_model.anatomy, ids.shape[1]
    q, kv = (1, n, a.n_heads, a.d_head), (1, n, a.n_kv_heads, a.d_head)
    assert shapes == [[q, kv, kv, (1, a.n_heads, n, n), q]] * a.n_layers


def eager(model):
    module = copy.deepcopy(model._module)
    module.set_attn_implementation("eager")
    return module


@pytest.mark.parametrize("family", TINY)
def test_patterns_are_those_of_eager_attention(family):
    model, ids = tiny(family), ids_of(tiny(family), length=20, rows=2)
    fresh = heads.load(f"tiny-{family}")._module
    fresh.set_attn_implementation("eager")
    expected = fresh(ids, output_attentions=True).attentions
    with model.trace(ids):
        found = nnsight.save([])
        for layer in model.layers:
            found.append(layer.attn.pattern)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))


@pytest.mark.parametrize("family", DECODERS)
def test_patterns_of_a_padded_batch_are_those_of_each_prompt(family):
    model, texts = tiny(family), ["a short one", "and a longer one, padded on the left"]
    with model.trace(texts):
        batch = model.layers[1].attn.pattern.save()
    for row, text in enumerate(texts):
        with model.trace(text):
            alone = model.layers[1].attn.pattern.save()
        n = alone.shape[-1]
        torch.testing.assert_close(batch[row, :, -n:, -n:], alone[0], atol=1e-5, rtol=1e-4)
        assert batch[row, :, -1, :-n].abs().max() < 1e-6 if n < batch.shape[-1] else True


@pytest.mark.parametrize("family", DECODERS)
def test_an_edited_pattern_reaches_the_model(family):
    model, ids = tiny(family), ids_of(tiny(family))
    with model.trace(ids):
        pattern = model.layers[2].attn.pattern
        pattern[:, 1] = 0
        pattern[:, 1, :, 0] = 1  # head 1 looks only at the first token
        v = model.layers[2].attn.v.save()
        z = model.layers[2].attn.heads.save()
    group = model.anatomy.n_heads // model.anatomy.n_kv_heads
    torch.testing.assert_close(z[:, :, 1], v[:, :1, 1 // group].expand_as(z[:, :, 1]))


@pytest.mark.parametrize("family", DECODERS)
def test_generate_shows_each_step_and_keeps_the_cache_clean(family):
    model, ids = tiny(family), ids_of(tiny(family), length=6)
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with model.generate(ids, **settings):
        sums, edited = nnsight.save([]), nnsight.save([])
        for step in range(1):
            model.layers[1].attn.v[:] = 0  # this pass only: later ones read the cache
        for layer in model.layers[2:3]:
            sums.append(layer.attn.pattern.sum(-1))
    with model.generate(ids, **settings) as tracer:
        rows = nnsight.save([])
        for step in tracer.iter[:4]:
            rows.append(model.layers[1].attn.pattern)
        out = tracer.result.save()
    assert [r.shape[-2] for r in rows] == [6, 1, 1, 1]
    assert all(torch.allclose(r.sum(-1), torch.ones_like(r.sum(-1))) for r in rows)
    assert torch.equal(out, model._module.generate(ids, **settings))


def test_an_edit_of_values_stays_in_its_pass(llama):
    from transformers.cache_utils import DynamicCache

    ids, clean, touched = ids_of(llama), DynamicCache(), DynamicCache()
    llama._module(ids, past_key_values=clean)
    with llama.trace(input_ids=ids, past_key_values=touched, use_cache=True):
        llama.layers[0].attn.v[:] = 0
        llama.layers[0].attn.k[:] = 0
    assert torch.equal(touched.layers[0].values, clean.layers[0].values)
    assert torch.equal(touched.layers[0].keys, clean.layers[0].keys)


def test_the_common_wrong_slice_fails_the_identity(llama):
    """A slice of the attention's output is no head: what most published recipes zero."""
    ids, d = ids_of(llama), llama.anatomy.d_head
    with llama.trace(ids):
        llama.layers[1].attn.output[0][..., 3 * d : 4 * d] = 0
        wrong = llama.logits.save()
    assert (wrong - hooked(llama, 1, 3, ids)).abs().max() > 1e-2


def test_a_wrong_view_is_refused():
    model = heads.load("tiny-llama")
    for layer in model.layers:
        layer.attn.n_heads = 8
    with pytest.raises(checks.IdentityError, match="knocking out"):
        checks.identities(model)


def test_an_edit_that_does_not_arrive_is_noticed(monkeypatch):
    model = heads.load("tiny-gpt2")
    monkeypatch.setattr(anatomy.Attention.heads, "_transform", lambda self, view, raw: raw)
    monkeypatch.setattr(
        anatomy.Attention.heads, "_preprocess", lambda self, value: value[0][0].view(1, 6, self.n_heads, -1).clone()
    )
    with pytest.raises(checks.IdentityError, match="knocking out"):
        checks.identities(model)


def test_heads_are_checked(llama):
    assert llama.anatomy.check([(3, 1), (0, 2), (3, 1)]) == [(0, 2), (3, 1)]
    with pytest.raises(IndexError, match=r"\(4, 0\) does not exist.*0 to 3"):
        llama.anatomy.check([(4, 0)])
    with pytest.raises(IndexError):
        llama.anatomy.check([(0, -1)])
    with pytest.raises(TypeError, match="pair"):
        llama.anatomy.check([3])


def families_table():
    """Which family passes which check: what the documentation shows."""
    names = ["sum", "knock-out", "no-op"]
    lines = [f"| family | model class | heads | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for family in TINY:
        model = tiny(family)
        passed = checks.identities(model)
        a = model.anatomy
        shape = f"{a.n_heads} ({a.n_kv_heads} key-value), d_head {a.d_head}, d_model {a.d_model}"
        ticks = " | ".join("yes" if name in passed else "no" for name in names)
        lines.append(f"| {family} | `{type(model._module).__name__}` | {shape} | {ticks} |")
    return "# Families\n\nWhat `tests/test_anatomy.py` checks on a random model of each family.\n\n" + "\n".join(lines) + "\n"


def test_the_table_of_families_is_what_the_tests_find():
    path = root() / "figures" / "families.md"
    if os.environ.get("HEADS_WRITE_FAMILIES"):
        path.write_text(families_table())
    assert path.read_text() == families_table(), "renew it: HEADS_WRITE_FAMILIES=1 pytest tests/test_anatomy.py"
