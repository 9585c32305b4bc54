"""One vocabulary: the heads that a trace shows are the heads that the model has, in every family."""

import os
from functools import cache
from pathlib import Path

import nnsight
import pytest
import torch
from conftest import DECODERS, ENCODERS, fresh, ids_of, logits_of, near, padded, plain_logits, plain_of, tiny
from families import MARK
from toys import naive, toy
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import heads
import heads.model.tiny
from heads.model import checks
from heads.model.anatomy import Attention, Located
from heads.model.load import Model
from heads.model.zoo import TINY

TEXTS = ["a short one", "and a longer one, so that the first is padded", "rain"]
ODD_MLPS = ("gpt_oss", "opt")  # they put out something else than [batch, position, d_model]: paths are refused
TABLE = Path(__file__).resolve().parents[1] / "figures" / "families.md"


def patterns_of(model, inputs) -> list[torch.Tensor]:
    with torch.no_grad(), model.trace(inputs):
        found = nnsight.save([])
        for layer in model.layers:
            found.append(layer.attn.pattern)
    return found


# ------------------------------------------------------------- what every family must pass, and the table of it


def heads_sum_to_the_attention_output(model):
    """Through its slice of the output projection, every head adds its share."""
    plain, ids, seen = plain_of(model), ids_of(model, rows=2), []
    handles = [m.register_forward_hook(lambda m, args, out: seen.append(out)) for m in plain.projections]
    plain(ids)
    [handle.remove() for handle in handles]
    with model.trace(ids):
        z = nnsight.save([])
        for layer in model.layers:
            z.append(layer.attn.heads)
    for layer, (ours, theirs) in enumerate(zip(z, plain.z(ids), strict=True)):
        near(ours, theirs)
        bias = plain.projections[layer].bias
        total = torch.einsum("bphd,hdm->bpm", ours, plain.slices(layer)) + (0 if bias is None else bias)
        near(total, seen[layer])
        near(heads.head_outputs(model, layer, ours).sum(2) + (0 if bias is None else bias), total)


def zeroing_a_head_is_knocking_it_out(model):
    """In a trace, by a hook on plain transformers, and in the weights: the same logits."""
    plain, ids, layer, head = plain_of(model), ids_of(model), 1, 3
    with model.trace(ids):
        model.layers[layer].attn.heads[:, :, head] = 0
        edited = model.logits.save()

    def zero(i, z):
        if i == layer:
            z[:, :, head] = 0
        return z

    with plain.edited(zero):
        near(edited, plain(ids).logits)
    rows = plain.slices(layer)[head]
    kept = rows.clone()
    rows.zero_()
    try:
        near(edited, plain(ids).logits)
    finally:
        rows.copy_(kept)
    assert (edited - plain(ids).logits).abs().max() > 1e-2, "the head does nothing here: this check cannot fail"


def reading_changes_nothing(model):
    """To the bit, and shapes are as documented."""
    ids, a = ids_of(model), model.anatomy
    with model.trace(ids):
        shapes = nnsight.save([])
        for layer in model.layers:
            attn = layer.attn
            shapes.append([tuple(x.shape) for x in (attn.q, attn.k, attn.v, attn.pattern, attn.heads)])
            shapes[-1].append(tuple(layer.mlp.output.shape) if a.family not in ODD_MLPS else (1, ids.shape[1], a.d_model))
            shapes[-1].append(tuple(layer.output.shape))
        logits = model.logits.save()
    assert torch.equal(logits, plain_logits(model, ids))
    n = ids.shape[1]
    q, kv, residual = (1, n, a.n_heads, a.d_head), (1, n, a.n_kv_heads, a.d_head), (1, n, a.d_model)
    assert shapes == [[q, kv, kv, (1, a.n_heads, n, n), q, residual, residual]] * a.n_layers


def writing_back_changes_nothing(model):
    """To the bit for q, k, v and heads; a written pattern leaves SDPA, so to rounding."""
    ids = ids_of(model)
    clean = plain_logits(model, ids)
    for part in ("q", "k", "v", "heads", "pattern"):
        with model.trace(ids):
            for layer in model.layers:
                view = getattr(layer.attn, part)
                view[:] = view.clone()
            in_place = model.logits.save()
        with model.trace(ids):
            for layer in model.layers:
                setattr(layer.attn, part, getattr(layer.attn, part).clone())
            assigned = model.logits.save()
        for found in (in_place, assigned):
            near(found, clean) if part == "pattern" else torch.testing.assert_close(found, clean, atol=0, rtol=0, msg=part)


def patterns_are_eager_attention(model):
    """Of texts longer than the sliding windows, without a mask: rows sum to one (with a sink to less) and are transformers'."""
    ids = ids_of(model, length=24, rows=2)
    expected = plain_of(model)(ids, output_attentions=True).attentions
    for ours, theirs in zip(patterns_of(model, ids), expected, strict=True):
        near(ours, theirs)
        rows = ours.sum(-1)
        if model.anatomy.family == "gpt_oss":
            assert (rows < 1).all() and (rows < 0.9).any()
        else:
            near(rows, torch.ones_like(rows))


def patterns_of_a_padded_batch(model):
    """Padding on either side: what real tokens see is what they see in transformers, and in a batch of one."""
    for side in ("left", "right"):
        inputs = padded(model, TEXTS, side)
        if "roberta" in model.anatomy.family:  # counts positions of real tokens by itself, from 1
            del inputs["position_ids"]
        real = inputs["attention_mask"].bool()
        ids = inputs["input_ids"]
        expected = plain_of(model)(ids, output_attentions=True, **without_ids(inputs)).attentions
        found = patterns_of(model, inputs)
        for ours, theirs in zip(found, expected, strict=True):
            near(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])
        for row, text in enumerate(TEXTS):
            at = real[row].nonzero().flatten()
            for ours, alone in zip(found, patterns_of(model, ids[row : row + 1, at]), strict=True):
                near(ours[row][:, at][:, :, at], alone[0])


def without_ids(inputs: dict) -> dict:
    return {key: value for key, value in inputs.items() if key != "input_ids"}


def generate_shows_every_step(model):
    """Rows of each step, in a padded batch, equal transformers' own; watching does not change what is written."""
    inputs = padded(model, TEXTS)
    del inputs["position_ids"]  # generate counts for itself
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        eager = plain_of(model).module.generate(**inputs, **settings, output_attentions=True, return_dict_in_generate=True)
    with model.generate(inputs, **settings) as tracer:
        steps = nnsight.save([])
        for _ in tracer.iter[:4]:
            steps.append([layer.attn.pattern for layer in model.layers])
        written = tracer.result.save()
    assert torch.equal(written, eager.sequences)
    real = inputs["attention_mask"].bool()
    assert [step[0].shape[2] for step in steps] == [real.shape[1], 1, 1, 1]
    for ours, theirs in zip(steps, eager.attentions, strict=True):
        shown = real if ours is steps[0] else real[:, -1:]
        for a, b in zip(ours, theirs, strict=True):
            near(a.transpose(1, 2)[shown], b.transpose(1, 2)[shown])


def a_sweep_is_cutting_one_head_after_the_other(model):
    """Zeroed by a hook on plain transformers, whole prompts, all heads: the same change of the logit difference."""
    found = heads.ablation_scores(model, toy(model), "zero", progress=False)
    near(torch.tensor(found.samples).float(), naive(model, toy(model), "zero", "all")[0])


def fast_paths_are_the_literal_passes(model):
    """Path patching to logits and to queries, heads and MLPs as senders: both engines agree."""
    for receivers in ((), [(2, 0), (3, 2)]):
        route = dict(receivers=receivers, scan="last", mlp_senders=True, progress=False)
        fast, slow = (heads.path_scores(model, toy(model), engine=engine, **route) for engine in ("fast", "literal"))
        near(torch.tensor(fast.samples), torch.tensor(slow.samples))
        near(torch.tensor(fast.mlp_samples), torch.tensor(slow.mlp_samples))


CHECKS = {
    "heads sum": heads_sum_to_the_attention_output,
    "knock-out": zeroing_a_head_is_knocking_it_out,
    "reading": reading_changes_nothing,
    "writing back": writing_back_changes_nothing,
    "pattern": patterns_are_eager_attention,
    "padding": patterns_of_a_padded_batch,
    "generate": generate_shows_every_step,
    "sweep": a_sweep_is_cutting_one_head_after_the_other,
    "paths": fast_paths_are_the_literal_passes,
}


@cache
def outcome(family: str, check: str) -> Exception | None:
    try:
        CHECKS[check](tiny(family))
    except Exception as error:
        return error


def applies(family: str, check: str) -> bool:
    if check == "paths" and family.replace("-", "_") in ODD_MLPS:
        return False
    return check not in ("generate", "sweep", "paths") or family not in ENCODERS


@pytest.mark.parametrize("family, check", [(f, c) for f in TINY for c in CHECKS if applies(f, c)])
def test_every_family_passes_every_check(family, check):
    if error := outcome(family, check):
        raise error


def families_table() -> str:
    def tick(family, check):
        return ("no" if outcome(family, check) else "✓") if applies(family, check) else ""

    lines = ["# Families", "", "What `tests/test_anatomy.py` found on a small random model of each family.", ""]
    lines += [f"| family | model class | heads | {' | '.join(CHECKS)} |", "|---|---|---|" + ":-:|" * len(CHECKS)]
    for family in TINY:
        a = tiny(family).anatomy
        kv = "" if a.n_kv_heads == a.n_heads else f" ({a.n_kv_heads} key-value)"
        name = type(tiny(family)._module).__name__
        ticks = " | ".join(tick(family, check) for check in CHECKS)
        lines.append(f"| {family} | `{name}` | {a.n_heads}{kv} of {a.d_head} in {a.d_model} | {ticks} |")
    lines += ["", "What the columns say:", ""]
    lines += [f"- **{name}** {check.__name__.replace('_', ' ')}. {check.__doc__}" for name, check in CHECKS.items()]
    return "\n".join(lines) + "\n"


def test_the_table_of_families_is_what_the_checks_found():
    ours, mark, tried = TABLE.read_text(encoding="utf-8").partition(MARK)  # below: what tests/families.py wrote
    if os.environ.get("HEADS_WRITE_FAMILIES") == "1":
        ours = families_table() + "\n"
        TABLE.write_text(ours + mark + tried, encoding="utf-8")
    assert ours == families_table() + "\n", "renew it: HEADS_WRITE_FAMILIES=1 pytest tests/test_anatomy.py"


# ------------------------------------------------------------------------------------------- edits


def test_an_edited_pattern_reaches_the_model(any_model):
    """Head 1 is made to look at the first token only: it then writes that token's value, everywhere."""
    ids, a = ids_of(any_model), any_model.anatomy
    with any_model.trace(ids):
        v = any_model.layers[2].attn.v.clone().save()
        pattern = any_model.layers[2].attn.pattern
        pattern[:, 1] = 0
        pattern[:, 1, :, 0] = 1
        logits = any_model.logits.save()

    def by_hand(layer, z):
        if layer == 2:
            z[:, :, 1] = v[:, :1, 1 // (a.n_heads // a.n_kv_heads)]
        return z

    plain = plain_of(any_model)
    with plain.edited(by_hand):
        near(logits, plain(ids).logits)
    assert (logits - plain(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["in place", "assigned"])
@pytest.mark.parametrize("what", ["q", "k"])
def test_queries_edited_after_the_pattern_are_refused_not_lost(llama, what, how):
    ids = ids_of(llama)
    with llama.edit() as (_, edited):
        edited.layers[1].attn.pattern = edited.layers[1].attn.pattern * 0.5
    with torch.no_grad(), edited.trace(ids):  # reading is allowed
        read = getattr(edited.layers[1].attn, what).save()
    assert read.shape[1] == ids.shape[1]
    with pytest.raises(Exception, match=f"an edit of {what} would change nothing"), torch.no_grad(), edited.trace(ids):
        if how == "assigned":
            setattr(edited.layers[1].attn, what, getattr(edited.layers[1].attn, what) * 0)
        else:
            getattr(edited.layers[1].attn, what)[:] = 0


def test_an_assigned_pattern_reaches_the_model(decoder):
    ids = ids_of(decoder)
    with decoder.trace(ids):
        decoder.layers[0].attn.pattern = torch.eye(12).expand(1, 4, 12, 12)
        v = decoder.layers[0].attn.v.save()
        z = decoder.layers[0].attn.heads.save()
    near(z, v.repeat_interleave(decoder.anatomy.n_heads // decoder.anatomy.n_kv_heads, dim=2))


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_edited_logits_decide_what_is_written(decoder, how):
    with decoder.generate(ids_of(decoder), max_new_tokens=1, do_sample=False) as tracer:
        if how == "in place":
            decoder.logits[..., 77] = 1e4
        else:
            decoder.logits = torch.nn.functional.one_hot(torch.tensor([[77]]), decoder.logits.shape[-1]).float()
        written = tracer.result.save()
    assert written[0, -1] == 77


def test_an_edit_of_keys_and_values_stays_out_of_the_cache(decoder):
    ids, clean, touched = ids_of(decoder), DynamicCache(), DynamicCache()
    with torch.no_grad():
        decoder._module(ids, past_key_values=clean)
    with torch.no_grad(), decoder.trace(input_ids=ids, past_key_values=touched, use_cache=True):
        decoder.layers[3].attn.k[:] = 0
        decoder.layers[3].attn.v[:] = 0
        z = decoder.layers[3].attn.heads.save()
    assert (z == 0).all()
    assert torch.equal(touched.layers[3].keys, clean.layers[3].keys)
    assert torch.equal(touched.layers[3].values, clean.layers[3].values)


def test_values_edited_in_one_step_of_generate_are_whole_in_the_next(decoder):
    ids = ids_of(decoder, length=6)
    steps = {}
    for edit in (False, True):
        with decoder.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False) as tracer:
            found = nnsight.save([])
            for step in tracer.iter[:2]:
                if edit and step == 0:
                    decoder.layers[3].attn.v[:] = 0
                found.append(decoder.layers[3].attn.v.clone())
        steps[edit] = found
    assert (steps[True][0] == 0).all()
    assert torch.equal(steps[True][1][:, :6], steps[False][1][:, :6])


# ------------------------------------------------------------------------------- the checks can fail


def mixed():
    """The field's most copied recipe: a 'head' as a slice of the attention's output."""

    @Located(key="proj_output")
    def mixed(self, value):
        return value.view(*value.shape[:-1], self.n_heads, -1)

    @mixed.transform
    def mixed(self, view, raw):
        return view.flatten(-2)

    return mixed


@pytest.mark.parametrize("family", TINY)
def test_a_slice_of_the_attention_output_fails_the_knock_out(family, monkeypatch):
    model = fresh(family)
    monkeypatch.setattr(Attention, "heads", mixed())
    for layer in model.layers:
        layer.attn.proj_output = layer.attn.proj_input.removesuffix("input") + "output"
    with pytest.raises(checks.IdentityError, match=r"zeroing head \(2, 3\) is not knocking out its weights"):
        checks._knock_out(model, ids_of(model), 1e-4, 2, 3)


def test_heads_read_in_the_wrong_place_do_not_sum(monkeypatch):
    model = fresh("llama")
    monkeypatch.setattr(Attention, "heads", mixed())
    for layer in model.layers:
        layer.attn.proj_output = layer.attn.proj_input.removesuffix("input") + "output"
    with pytest.raises(checks.IdentityError, match="heads do not sum to the attention output"):
        checks.identities(model)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("n_heads", [2, 8])
def test_a_wrong_number_of_heads_in_any_layer_is_named(layer, n_heads):
    model = fresh("llama")
    model.layers[layer].attn.n_heads = n_heads
    with pytest.raises(checks.IdentityError, match=f"layer {layer}"):
        checks.identities(model)


def test_an_edit_that_does_not_arrive_is_named(monkeypatch):
    model = fresh("gpt2")
    monkeypatch.setattr(Attention.heads, "_transform", None)
    monkeypatch.setattr(Attention.heads, "_preprocess", lambda self, value: value[0][0].clone().view(1, 6, self.n_heads, -1))
    with pytest.raises(checks.IdentityError, match="does not reach the model"):
        checks.identities(model)


def test_writing_back_something_else_is_named(monkeypatch):
    model = fresh("llama")
    monkeypatch.setattr(Attention.heads, "_transform", lambda self, view, raw: ((view.flatten(-2) * 1.00001,), raw[1]))
    with pytest.raises(checks.IdentityError, match="writing every head back"):
        checks.identities(model)


# ------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("family", TINY)
def test_windows_are_what_a_layer_can_see(family):
    """In an encoder a window reaches to either side."""
    model = tiny(family)
    for window, pattern in zip(model.anatomy.windows, patterns_of(model, ids_of(model, length=24)), strict=True):
        visible = (pattern[0] > 0).sum(-1).max().item()
        assert visible == (24 if window is None else 2 * window + 1 if family in ENCODERS else window)


def test_heads_are_sorted_and_checked(llama):
    assert llama.anatomy.check([(3, 1), (0, 2), (3, 1)]) == [(0, 2), (3, 1)]
    for head in [(4, 0), (0, 4), (0, -1), (-1, 0)]:
        with pytest.raises(IndexError, match=r"does not exist: the model has layers 0 to 3 with heads 0 to 3"):
            llama.anatomy.check([(0, 0), head])
    for pair in [3, (1,), (1, 2, 3), ("a", 1), None]:
        with pytest.raises(TypeError, match="pair"):
            llama.anatomy.check([pair])


def test_an_unsupported_part_is_named():
    module, tokenizer = heads.model.tiny.build("gpt2", whole=False)
    with pytest.raises(ValueError, match="no layers in a gpt2 model"):
        heads.anatomy.bind(Model(module, tokenizer=tokenizer))


def test_the_anatomy_prints_its_counts():
    assert str(tiny("gemma3").anatomy) == (
        "gemma3_text: 4 layers x 4 heads (2 key-value heads), d_head 16, 2 layers with a sliding window of 8"
    )
    assert tiny("gemma3").anatomy.full_layers == [1, 3] and tiny("gemma3").anatomy.n == 16


def test_heads_may_be_an_iterator(llama):
    """Read once: a generator that is checked is not empty afterwards."""
    assert llama.anatomy.check(pair for pair in [(2, 1), (0, 3)]) == [(0, 3), (2, 1)]
    ids = ids_of(llama)
    found = logits_of(heads.ablate(llama, ((1, h) for h in range(4))), ids)
    assert torch.equal(found, logits_of(heads.ablate(llama, [(1, h) for h in range(4)]), ids))
    assert not torch.equal(found, logits_of(llama, ids))


@pytest.mark.parametrize("how", ["in place", "assigned"])
@pytest.mark.parametrize("what", ["heads", "q", "k", "v", "pattern"])
def test_an_edit_in_one_of_several_invokes(decoder, what, how):
    """It reaches its rows and no others, or is refused: it is never lost."""
    ids = ids_of(decoder, rows=2)

    def edit(attn):
        x = getattr(attn, what)
        if how == "assigned":
            setattr(attn, what, x.flip(1))
        else:
            x[:] = x.flip(1)

    def run():
        with torch.no_grad(), decoder.trace() as tracer:
            with tracer.invoke(input_ids=ids[:1]):
                first = decoder.logits.save()
            with tracer.invoke(input_ids=ids[1:]):
                edit(decoder.layers[1].attn)
                second = decoder.logits.save()
        return first, second

    if what == "pattern":
        with pytest.raises(Exception, match="cannot be edited in one of several invokes"):
            run()
        return
    first, second = run()
    with torch.no_grad(), decoder.trace(input_ids=ids[1:]):
        edit(decoder.layers[1].attn)
        alone = decoder.logits.save()
    near(first, logits_of(decoder, ids[:1]))
    near(second, alone)
    assert (second - logits_of(decoder, ids[1:])).abs().max() > 1e-3


def test_a_library_that_wraps_every_attention_leaves_edits_alive(llama):
    """kvpress, once imported, hands `dropout` on by position to whatever is registered."""
    ids = ids_of(llama, 9)
    edited = heads.ablate(llama, [(1, 2)])

    def pattern_cut():
        with torch.no_grad(), llama.trace(ids):
            llama.layers[1].attn.pattern[:, 2] = 0
            found = llama.logits.save()
        return found

    wanted = pattern_cut(), logits_of(edited, ids)
    ours = ALL_ATTENTION_FUNCTIONS["heads"]

    def wrapped(module, query, key, value, attention_mask, dropout, **kwargs):
        return ours(module, query, key, value, attention_mask, dropout, **kwargs)

    AttentionInterface.register("heads", wrapped)
    try:
        near(pattern_cut(), wanted[0])
        near(logits_of(edited, ids), wanted[1])
    finally:
        AttentionInterface.register("heads", ours)
    near(*wanted)
