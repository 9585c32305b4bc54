"""Ablations equal what a hand-written hook on plain transformers does, at the right places."""

import warnings

import numpy as np
import pytest
import torch
from conftest import DECODERS, ids_of, logits_of, near, padded, plain_logits, plain_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import by_hand, eager, replaced, uniform

import heads
from heads.lab.ablation import KINDS

CHOSEN = [(0, 1), (2, 3), (2, 0)]
TEXTS = ["ten brown owls", "a grey teapot", "the old lamps"]  # 14, 13 and 13 tokens
LENGTH = 12


def matters(model, edited, ids):
    """An ablation that does nothing would pass every comparison."""
    assert (edited - plain_logits(model, ids)).abs().max() > 1e-2


# --------------------------------------------------------------------------------- the four kinds


def test_zero_equals_a_hook(any_model):
    ids, plain = ids_of(any_model, rows=2), plain_of(any_model)
    found = logits_of(heads.ablate(any_model, CHOSEN), ids)
    with replaced(plain, CHOSEN):
        near(found, plain(ids).logits)
    matters(any_model, found, ids)


def test_mean_per_position_and_over_all_positions_equal_hooks(any_model):
    ids, plain = ids_of(any_model, length=LENGTH), plain_of(any_model)
    reference = [ids_of(any_model, length=LENGTH, seed=s) for s in (1, 2, 3)]
    z = [torch.stack([plain.z(r)[i][0] for r in reference]) for i in range(4)]  # per layer: [text, position, head, d_head]
    for per_position, means in ((True, [x.mean(0) for x in z]), (False, [x.mean((0, 1)) for x in z])):
        found = logits_of(heads.ablate(any_model, CHOSEN, "mean", reference=reference, per_position=per_position), ids)
        near(torch.stack(means), heads.head_means(any_model, reference, per_position=per_position))
        with replaced(plain, CHOSEN, means):
            near(found, plain(ids).logits)
        matters(any_model, found, ids)


def test_resample_equals_a_hook_with_the_drawn_text(any_model):
    ids, plain = ids_of(any_model, length=LENGTH), plain_of(any_model)
    reference = [ids_of(any_model, length=LENGTH, seed=s) for s in (1, 2)]
    candidates = []
    for text in reference:
        with replaced(plain, CHOSEN, [z[0] for z in plain.z(text)]):
            candidates.append(plain(ids).logits)
    drawn = []
    for seed in range(8):
        found = logits_of(heads.ablate(any_model, CHOSEN, "resample", reference=reference, seed=seed), ids)
        drawn.append(min((0, 1), key=lambda i: (found - candidates[i]).abs().max()))
        near(found, candidates[drawn[-1]])
    assert set(drawn) == {0, 1}, "the seed never changes the text that is drawn"


def test_uniform_equals_zeroed_attention_logits(any_model):
    ids, plain = ids_of(any_model, length=24, rows=2), plain_of(any_model)  # longer than the sliding windows
    found = logits_of(heads.ablate(any_model, CHOSEN, "uniform"), ids)
    with uniform(plain, CHOSEN):
        near(found, plain(ids).logits)
    matters(any_model, found, ids)


def test_values_may_be_given_instead_of_a_reference(llama):
    ids, texts = ids_of(llama, length=13), TEXTS[1:]
    means = heads.head_means(llama, texts)
    assert means.shape == (4, 13, 4, 8)
    given_values = logits_of(heads.ablate(llama, CHOSEN, "mean", values=means), ids)
    assert torch.equal(given_values, logits_of(heads.ablate(llama, CHOSEN, "mean", reference=texts), ids))


# ------------------------------------------------------------------------------- where and when


@pytest.mark.parametrize("kind", ["zero", "uniform"])
@pytest.mark.parametrize("positions, at", [([3], [3]), ([-1], [11]), ([0, -2], [0, 10]), ([], [])])
def test_positions_count_from_the_start_or_back_from_the_end_of_the_prompt(decoder, kind, positions, at):
    ids, plain = ids_of(decoder, length=LENGTH), plain_of(decoder)
    found = logits_of(heads.ablate(decoder, CHOSEN, kind, positions=positions), ids)
    with by_hand(kind, plain, CHOSEN, at):
        near(found, plain(ids).logits)


@pytest.mark.parametrize("kind", ["zero", "uniform"])
@pytest.mark.parametrize("phase, at", [("both", slice(None)), ("decode", slice(11, None)), ("prefill", slice(0, 11))])
def test_the_last_prompt_token_belongs_to_decoding(decoder, kind, phase, at):
    ids, plain = ids_of(decoder, length=LENGTH), plain_of(decoder)
    found = logits_of(heads.ablate(decoder, CHOSEN, kind, phase=phase), ids)
    with by_hand(kind, plain, CHOSEN, at):
        near(found, plain(ids).logits)
    matters(decoder, found, ids)


@pytest.mark.parametrize("kind", ["zero", "uniform"])
@pytest.mark.parametrize(
    "where, at",
    [
        ({"phase": "both"}, slice(None)),
        ({"phase": "decode"}, slice(9, None)),
        ({"phase": "prefill"}, slice(0, 9)),
        ({"positions": [2, -1, 11]}, [2, 9, 11]),
    ],
    ids=["both", "decode", "prefill", "positions"],
)
def test_generate_equals_running_the_whole_text_again(decoder, kind, where, at):
    """The cache neither remembers nor forgets an ablation: one long forward per token is the oracle."""
    prompt, steps, plain = ids_of(decoder, length=10, rows=2), 5, plain_of(decoder)
    edited = heads.ablate(decoder, CHOSEN, kind, **where)
    with edited.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, do_sample=False) as tracer:
        found = tracer.result.save()
    ids = prompt
    for _ in range(steps):
        reached = at if isinstance(at, slice) else [p for p in at if p < ids.shape[1]]
        with by_hand(kind, plain, CHOSEN, reached):
            logits = plain(ids).logits[:, -1:]
        logits[..., plain.module.config.eos_token_id] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    assert torch.equal(found, ids)


WHERE = [{"phase": "decode"}, {"positions": [-2]}, {}, {"phase": "prefill"}, {"positions": [1, 3]}]
FULLY = ("llama", "gpt2", "gemma2")  # where to edit is counted alike in every family: two ways tell whether a mask is read


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, where", [(f, w) for f in DECODERS for w in (WHERE if f in FULLY else WHERE[:2])])
def test_a_padded_batch_is_ablated_like_each_prompt(family, side, where):
    decoder, texts = tiny(family), ["rain", "ten geese and a lamp", "two brown owls"]
    values = torch.randn(4, 20, 4, decoder.anatomy.d_head)  # another one at each position
    for kind, more in (("zero", {}), ("uniform", {}), ("mean", {"values": values})):
        edited, inputs = heads.ablate(decoder, CHOSEN, kind, **more, **where), padded(decoder, texts, side)
        found = logits_of(edited, **{"ids": inputs.pop("input_ids"), **inputs})
        for row, text in enumerate(texts):
            near(found[row, inputs["attention_mask"][row].bool()], logits_of(edited, decoder.ids(text))[0])


def test_gradients_flow_past_an_ablation(llama):
    """Attribution in an ablated model: the edit is no in-place change of what backward needs."""
    ids = ids_of(llama, rows=2)
    task = heads.tasks.Task("hand", ids, ids[:, 0], ids[:, 1:2], ids_of(llama, rows=2, seed=1))
    for kind in ("zero", "uniform"):
        edited = heads.ablate(llama, [(1, 1)], kind)
        found = heads.attribution_patching(edited, task, positions="all")
        assert abs(found.values[0]).max() > 0
        assert np.allclose(found.base, heads.evaluate(edited, task), atol=1e-5)


def test_each_row_of_a_batch_has_its_own_set(decoder):
    ids, plain, sets = ids_of(decoder).expand(3, -1), plain_of(decoder), [[], [(0, 1)], CHOSEN]
    for kind in ("zero", "uniform"):
        found = logits_of(heads.ablate(decoder, sets, kind), ids)
        for row, chosen in enumerate(sets):
            with by_hand(kind, plain, chosen):
                near(found[row : row + 1], plain(ids[:1]).logits)


def test_different_ablations_stack(decoder):
    ids, plain = ids_of(decoder), plain_of(decoder)
    edited = heads.ablate(heads.ablate(decoder, [(1, 0)], "uniform"), [(2, 1)], positions=[4])
    with uniform(plain, [(1, 0)]), replaced(plain, [(2, 1)], at=[4]):
        near(logits_of(edited, ids), plain(ids).logits)


@pytest.mark.parametrize("how", ["changed", "put"])
def test_uniform_attention_after_an_edit_of_the_pattern(decoder, how):
    """The later edit is there, and the earlier one stays where the later one is not; in the other order, too."""
    ids, plain, first = ids_of(decoder), plain_of(decoder), torch.zeros(12, 12)
    first[:, 0] = 1  # everything looks at the first token

    def look(model):
        with model.edit() as (tracer, edited):
            for _ in tracer.iter[:]:
                attn = edited.layers[1].attn
                if how == "changed":
                    attn.pattern[:, :2] = first
                else:
                    attn.pattern = torch.cat([first.expand(len(attn.q), 2, 12, 12), attn.pattern[:, 2:]], 1)
        return edited

    def zero(layer, logits):
        if layer == 1:
            logits[:, 1, 6:] = 0

    def rows(layer, pattern):
        if layer == 1:
            pattern[:, :2 if last else 1] = first
            pattern[:, 1, :6] = first[:6]

    uniform_last = logits_of(heads.ablate(look(decoder), [(1, 1)], "uniform", positions=range(6, 12)), ids)
    pattern_last = logits_of(look(heads.ablate(decoder, [(1, 1)], "uniform", positions=range(6, 12))), ids)
    for last, found in ((False, uniform_last), (True, pattern_last)):
        with eager(plain, zero, rows):
            near(found, plain(ids).logits)
    assert (uniform_last - pattern_last).abs().max() > 1e-2


def test_a_stacked_mean_is_that_of_the_edited_model_or_of_another(llama):
    """The reference is read with the edits so far; values of the clean model are given as values."""
    ids, reference, plain = ids_of(llama), [ids_of(llama, seed=s) for s in (1, 2)], plain_of(llama)
    first = heads.ablate(llama, [(0, 1)])
    clean = [torch.stack([plain.z(r)[i][0] for r in reference]).mean(0) for i in range(4)]
    with replaced(plain, [(0, 1)]):
        cut = [torch.stack([plain.z(r)[i][0] for r in reference]).mean(0) for i in range(4)]
    for options, means in (({"reference": reference}, cut), ({"values": heads.head_means(llama, reference)}, clean)):
        with replaced(plain, [(0, 1)]), replaced(plain, [(2, 3)], means):
            near(logits_of(heads.ablate(first, [(2, 3)], "mean", **options), ids), plain(ids).logits)
    assert (cut[2] - clean[2]).abs().max() > 1e-2


def test_an_ablated_model_can_be_read_and_edited(llama):
    ids, plain = ids_of(llama), plain_of(llama)
    edited = heads.ablate(llama, [(0, 1)])
    with edited.trace(ids):
        z = edited.layers[0].attn.heads.clone().save()
        edited.layers[2].attn.heads[:, :, 3] = 0
        logits = edited.logits.save()
    assert (z[:, :, 1] == 0).all() and (z[:, :, 0] != 0).all()
    with replaced(plain, [(0, 1), (2, 3)]):
        near(logits, plain(ids).logits)


# ------------------------------------------------------------------------------------ what stays


def test_the_original_is_unchanged_while_and_after_it_is_ablated(any_model):
    ids = ids_of(any_model)
    before = plain_logits(any_model, ids)
    edited = heads.ablate(any_model, CHOSEN)
    matters(any_model, logits_of(edited, ids), ids)
    assert torch.equal(logits_of(any_model, ids), before) and torch.equal(plain_logits(any_model, ids), before)


def test_no_warning_reaches_the_user(decoder):
    edited, ids = heads.ablate(heads.ablate(decoder, [(1, 1)]), CHOSEN, "uniform", phase="decode"), ids_of(decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(edited, ids)
        with edited.generate(ids, max_new_tokens=3, do_sample=False) as tracer:
            tracer.result.save()


some_heads = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5)
quick = settings(max_examples=20, deadline=None)


@quick
@given(first=some_heads, second=some_heads)
def test_zeroing_one_set_then_another_zeroes_their_union(first, second):
    model, ids = tiny("llama"), ids_of(tiny("llama"))
    stacked = logits_of(heads.ablate(heads.ablate(model, first), second), ids)
    assert torch.equal(stacked, logits_of(heads.ablate(model, {*first, *second}), ids))


@quick
@given(chosen=some_heads, kind=st.sampled_from(["zero", "uniform"]), random=st.randoms(use_true_random=False))
def test_the_order_of_heads_does_not_matter(chosen, kind, random):
    model, ids = tiny("qwen3"), ids_of(tiny("qwen3"))
    shuffled = random.sample(chosen, len(chosen)) + chosen[:1]
    assert torch.equal(
        logits_of(heads.ablate(model, chosen, kind), ids), logits_of(heads.ablate(model, shuffled, kind), ids)
    )


def ablated(model, nothing, kind, ids):
    reference = {"reference": [ids_of(model, seed=1)]} if kind in ("mean", "resample") else {}
    return logits_of(heads.ablate(model, nothing, kind, **reference), ids)


def test_ablating_nothing_changes_nothing_to_the_bit(any_model):
    ids = ids_of(any_model, rows=2)
    for kind in KINDS:
        assert torch.equal(ablated(any_model, [], kind, ids), plain_logits(any_model, ids)), kind


@pytest.mark.parametrize("nothing", [[[]], [[], []]], ids=["one empty set", "two empty sets"])
def test_empty_sets_are_no_heads_in_every_kind(llama, nothing):
    ids = ids_of(llama, rows=2)
    for kind in KINDS:
        assert torch.equal(ablated(llama, nothing, kind, ids), plain_logits(llama, ids)), kind


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(heads=[(9, 0)]), IndexError, r"head \(9, 0\) does not exist"),
        (dict(heads=[[(0, 0)], [(0, 9)]]), IndexError, r"head \(0, 9\) does not exist"),
        (dict(heads=CHOSEN, kind="median"), LookupError, "Did you mean 'mean'. Known: zero, mean, resample, uniform"),
        (dict(heads=CHOSEN, phase="later"), LookupError, "no phase 'later'. Known: both, prefill, decode"),
        (dict(heads=CHOSEN, kind="mean"), ValueError, "needs a reference"),
        (dict(heads=CHOSEN, kind="resample"), ValueError, "needs a reference"),
        (dict(heads=CHOSEN, kind="zero", reference=["x"]), ValueError, "neither"),
        (dict(heads=CHOSEN, kind="uniform", values=torch.zeros(4, 4, 8)), ValueError, "neither"),
        (dict(heads=CHOSEN, kind="mean", reference=TEXTS), ValueError, "equal length, got 14 and 13"),
        (dict(heads=CHOSEN, kind="mean", reference=[]), ValueError, "no text"),
        (dict(heads=CHOSEN, kind="resample", reference=[]), ValueError, "no text"),
        (dict(heads=CHOSEN, kind="mean", reference="one text"), TypeError, "list of texts"),
        (dict(heads=CHOSEN, kind="mean", reference=["x"], values=torch.zeros(4, 4, 8)), ValueError, "one of the two"),
        (dict(heads=CHOSEN, kind="mean", values=torch.zeros(7, 4, 8)), ValueError, r"\[7, 4, 8\], expected \[4, 4, 8\]"),
        (dict(heads=CHOSEN, kind="mean", values=torch.zeros(4, 8)), ValueError, r"or \[4, position, 4, 8\]"),
        (dict(heads=CHOSEN, kind="mean", values=torch.zeros(4, 4, 8) / 0), ValueError, "128 of the values are not finite"),
        (dict(heads=CHOSEN, kind="resample", values=torch.full((4, 4, 8), torch.inf)), ValueError, "not finite"),
    ],
)
def test_bad_input_is_refused(llama, arguments, error, words):
    with pytest.raises(error, match=words):
        heads.ablate(llama, **arguments)


def test_a_reference_shorter_than_the_prompt_is_named(llama):
    edited = heads.ablate(llama, CHOSEN, "mean", reference=[ids_of(llama, length=5)])
    with pytest.raises(Exception, match="the reference holds 5 positions"):
        logits_of(edited, ids_of(llama))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_does_not_fit_the_sets_is_refused(llama, rows):
    with pytest.raises(Exception, match=f"2 sets of heads for a batch of {rows} rows"):
        logits_of(heads.ablate(llama, [CHOSEN, []]), ids_of(llama, rows=rows))


@pytest.mark.parametrize("heads_given", [
    np.array([[1, 1], [2, 0]]), torch.tensor([[1, 1], [2, 0]]), {(1, 1), (2, 0)}, ((np.int64(1), 1), (2, np.int32(0))),
    [(pair for pair in [(1, 1), (2, 0)])],
])  # fmt: skip
def test_heads_come_in_many_forms(llama, heads_given):
    ids = ids_of(llama)
    found = logits_of(heads.ablate(llama, heads_given), ids)
    assert torch.equal(found, logits_of(heads.ablate(llama, [(1, 1), (2, 0)]), ids))


@pytest.mark.parametrize("wrong, words", [
    ((3, 1), "a head is a pair of whole numbers"), ([(1.5, 0)], "got 1.5"), ([("1", "0")], "got"), ("ab", "got"),
    (heads.HeadScores(np.zeros((4, 4))), r"choose some, with \.top\(k\)"),
])  # fmt: skip
def test_what_is_no_head_is_named(llama, wrong, words):
    with pytest.raises(TypeError, match=words):
        heads.ablate(llama, wrong)


@pytest.mark.parametrize("function", [heads.head_means, heads.head_activations])
@pytest.mark.parametrize("texts, error, words", [
    ("a text is no list of letters", TypeError, "got one str"), (torch.ones(3, 5).long(), TypeError, r"ids\.split\(1\)"),
    ([torch.ones(2, 5).long()], ValueError, r"\[2, 5\]: expected \[1, position\]"),
    (["ab", ""], ValueError, "at least one token"),
])  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(llama, function, texts, error, words):
    with pytest.raises(error, match=words):
        function(llama, texts, batch=2)
