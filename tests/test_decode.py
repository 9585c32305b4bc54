"""Reading attention while decoding, and many conditions as one batch: the same as the slow way."""

import pytest
import torch
from conftest import ids_of, logits_of, near, plain_of, tiny
from toys import by_hand, replaced

import heads
from heads.lab.decoding import Conditions, decode_batch, decode_rows, join, prefill

SETS = {"none": [], "one": [(0, 1)], "three": [(0, 1), (2, 3), (2, 0)], "layer": [(1, h) for h in range(4)]}


def greedy(module, ids, n: int) -> torch.Tensor:
    with torch.no_grad():
        return module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


# ------------------------------------------------------------------------------------- decode_rows


def same_rows(model, module, ids, n: int, tolerance: float = 1):
    """Tokens equal greedy generation, and rows those of one eager forward over the whole text."""
    steps = list(decode_rows(model, ids, n, stop=None))
    text = greedy(module, ids, n)[0, ids.shape[1] :].tolist()
    eos = module.generation_config.eos_token_id
    assert [step.token for step in steps] == [token for token in text if token != eos] and steps
    whole = torch.cat([ids, torch.tensor([[step.token for step in steps]])], dim=1)
    with torch.no_grad():
        attentions = torch.stack(module(whole, output_attentions=True).attentions)[:, 0]
    for i, step in enumerate(steps):
        last = ids.shape[1] - 1 + i
        assert step.rows.shape == (*attentions.shape[:2], last + 1)
        near(step.rows, attentions[:, :, last, : last + 1], tolerance)


def test_rows_and_tokens_equal_transformers_own(decoder):
    same_rows(decoder, plain_of(decoder).module, ids_of(decoder, length=20), 6)


def test_rows_and_tokens_of_the_default_model_equal_transformers_own(default, default_eager, sample):
    same_rows(default, default_eager, sample.ids, 4)


def test_decoding_stops_before_the_stop_text_and_at_the_end_of_text(llama, monkeypatch):
    ids = ids_of(llama)
    tokens = [step.token for step in decode_rows(llama, ids, 20, stop=None)]
    texts = llama.tokenizer.batch_decode([[token] for token in tokens])
    at = next(i for i, text in enumerate(texts) if i and text.isascii() and text not in texts[:i])
    assert [step.token for step in decode_rows(llama, ids, 20, stop=texts[at])] == tokens[:at]
    monkeypatch.setattr(llama._module.generation_config, "eos_token_id", [tokens[at], 2])
    assert [step.token for step in decode_rows(llama, ids, 20, stop=None)] == tokens[:at]


def test_decoding_never_makes_a_square_of_positions(llama, monkeypatch):
    lengths, made = [], heads.model.attention.pattern

    def recorded(module, query, *args, **kwargs):
        lengths.append(query.shape[2])
        return made(module, query, *args, **kwargs)

    monkeypatch.setattr("heads.model.attention.pattern", recorded)
    monkeypatch.setattr("heads.model.anatomy.attention_pattern", recorded)
    steps = list(decode_rows(llama, ids_of(llama, length=30), 3, stop=None))
    assert lengths == [1] * 4 * len(steps) and steps


def test_a_prompt_is_prefilled_without_logits_for_every_position(default, sample):
    seen = []
    handle = default._module.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    cache = prefill(default, sample.ids)
    handle.remove()
    assert seen == [1] and cache.get_seq_length() == sample.ids.shape[1]


# ------------------------------------------------------------------------------------ decode_batch


def prompts_of(model, lengths=(5, 20, 14, 20)) -> list[torch.Tensor]:
    """Prompts of different lengths; the tiny models' sliding windows are shorter than the longest."""
    return [ids_of(model, length=length, seed=seed) for seed, length in enumerate(lengths)]


def same_steps(model, prompts, n: int, stop: str | None = None, tolerance: float = 1) -> list[int]:
    """A batch equals its prompts one by one, in tokens and rows; returns how many tokens each wrote."""
    found = [[] for _ in prompts]
    for steps in decode_batch(model, prompts, n, stop):
        assert steps, "a forward that nobody needed"
        for i, step in steps.items():
            found[i].append(step)
    for ids, together in zip(prompts, found):
        alone = list(decode_rows(model, ids, n, stop))
        assert [step.token for step in together] == [step.token for step in alone]
        for ours, theirs in zip(together, alone):
            near(ours.rows, theirs.rows, tolerance)
    return [len(steps) for steps in found]


def test_prompts_of_different_lengths_decode_together_as_one_by_one(decoder):
    assert max(same_steps(decoder, prompts_of(decoder), 8)) == 8


def test_prompts_of_the_default_model_decode_together_as_one_by_one(default):
    samples = heads.tasks.needle(default, lengths=[110, 150, 128], depths=[0.4])
    written = same_steps(default, [sample.ids for sample in samples], 12, "\n")
    assert min(written) > 1


def test_a_prompt_that_stops_leaves_the_batch(llama, monkeypatch):
    """Forwards run for the prompts that still write only, and the others' rows stay theirs."""
    prompts, sizes, joined = prompts_of(llama), [], heads.lab.decoding._step
    first = [[step.token for step in decode_rows(llama, ids, 6, stop=None)] for ids in prompts]
    stop = next(t for token in first[1][2:] if (t := llama.tokenizer.decode([token])).strip())

    def step(model, cache, ids, *args):
        sizes.append(len(ids))
        return joined(model, cache, ids, *args)

    monkeypatch.setattr(heads.lab.decoding, "_step", step)
    list(decode_batch(llama, prompts, 6, stop))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4 > sizes[-1]
    monkeypatch.undo()
    written = same_steps(llama, prompts, 6, stop)
    assert min(written) < max(written)


def test_padding_gets_no_attention_at_all(decoder, monkeypatch):
    made, prompts, seen = heads.model.attention.pattern, prompts_of(decoder), []

    def recorded(module, query, *args, **kwargs):
        weights = made(module, query, *args, **kwargs)
        if query.shape[0] == len(prompts):
            seen.extend(weights[row, ..., : 20 - ids.shape[1]] for row, ids in enumerate(prompts))
        return weights

    monkeypatch.setattr("heads.model.anatomy.attention_pattern", recorded)
    steps = list(decode_batch(decoder, prompts, 3, stop=None))
    assert seen and all((weights == 0).all() for weights in seen)
    for step in steps[0].values():
        near(step.rows.sum(-1), torch.ones(step.rows.shape[:2]))


def test_joined_caches_are_aligned_at_their_ends_emptied_and_written_in_place(llama):
    caches = [prefill(llama, ids) for ids in prompts_of(llama, (5, 8))]
    keys = [cache.layers[2].keys.clone() for cache in caches]
    joined = join(caches, room=3)
    layer = joined.layers[2]
    assert joined.get_seq_length() == 8 and all(cache.get_seq_length() == 0 for cache in caches)
    assert torch.equal(layer.keys[1], keys[1][0]) and torch.equal(layer.keys[0, :, 3:], keys[0][0])
    assert not layer.keys[0, :, :3].any() and not layer.values[0, :, :3].any()
    place, new = layer.keys.data_ptr(), torch.ones(2, *keys[0].shape[1:2], 1, keys[0].shape[3])
    for length in (9, 10, 11):
        found, _ = layer.update(new, new)
        assert found.data_ptr() == place and found.shape[2] == length and (found[:, :, 8:] == 1).all()
    joined.batch_select_indices([1])
    assert torch.equal(layer.keys[0, :, :8], keys[1][0]) and layer.keys.shape[:3] == (1, keys[0].shape[1], 11)


def test_a_prompt_of_another_shape_is_refused_before_anything_runs(llama):
    for wrong in (ids_of(llama, rows=2), ids_of(llama, length=1), ids_of(llama)[0]):
        with pytest.raises(ValueError, match=r"prompt 1 has the shape \[.*\]: expected one prompt"):
            next(decode_batch(llama, [ids_of(llama), wrong]))
    assert not list(decode_batch(llama, []))


# -------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("kind", ["zero", "uniform"])
@pytest.mark.parametrize("phase", ["decode", "both"])
def test_conditions_equal_one_by_one(decoder, kind, phase):
    """Scores against hooks on the whole text, answers against `ablate(...).generate`."""
    ids, answer, plain = ids_of(decoder, length=20), ids_of(decoder, length=5, seed=3)[0], plain_of(decoder)
    conditions = Conditions(decoder, ids, SETS, kind, phase)
    scores, answers = conditions.score(answer), conditions.generate(5, stop=None)
    assert list(scores) == list(answers) == list(SETS)
    whole = torch.cat([ids, answer[None, :-1]], dim=1)
    for name, chosen in SETS.items():
        with by_hand(kind, plain, chosen, slice(19 if phase == "decode" else 0, None)):
            expected = plain(whole).logits[0, 19:].log_softmax(-1)
        near(scores[name].logprob, expected.gather(-1, answer[:, None])[:, 0])
        assert torch.equal(scores[name].correct, expected.argmax(-1) == answer)
        with heads.ablate(decoder, chosen, kind, phase=phase).generate(ids, max_new_tokens=5, do_sample=False) as tracer:
            written = tracer.result.save()
        assert answers[name] == decoder.tokenizer.decode([t for t in written[0, 20:].tolist() if t != 2])


@pytest.mark.parametrize("phase", ["decode", "both"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_number_of_rows_in_a_forward_does_not_matter(llama, rows, phase):
    ids, answer = ids_of(llama), ids_of(llama, length=3, seed=3)[0]
    together, apart = Conditions(llama, ids, SETS, phase=phase), Conditions(llama, ids, SETS, phase=phase, rows=rows)
    assert together.generate(5, stop=None) == apart.generate(5, stop=None)
    apart = apart.score(answer)
    for name, score in together.score(answer).items():
        near(apart[name].logprob, score.logprob)


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_conditions_take_values(llama, kind):
    ids, answer, values = (
        ids_of(llama),
        ids_of(llama, length=3, seed=3)[0],
        heads.head_means(llama, [ids_of(llama, seed=4)], False),
    )
    scores = Conditions(llama, ids, SETS, kind, values=values).score(answer)
    whole = torch.cat([ids, answer[None, :-1]], dim=1)
    for name, chosen in SETS.items():
        logits = logits_of(heads.ablate(llama, chosen, kind, values=values, positions=range(11, 14)), whole)
        near(scores[name].logprob, logits[0, 11:].log_softmax(-1).gather(-1, answer[:, None])[:, 0])


def test_conditions_of_the_default_model_equal_one_by_one(default, sample):
    last = sample.ids.shape[1] - 1
    sets = {"none": [], "late": [(18, 6), (17, 3), (20, 6), (18, 7)]}
    conditions = Conditions(default, sample.ids, sets)
    scores, answers = conditions.score(sample.answer_ids), conditions.generate(4)
    whole = torch.cat([sample.ids, sample.answer_ids[None, :-1]], dim=1)
    for name, chosen in sets.items():
        edited = heads.ablate(default, chosen, "uniform", positions=range(last, whole.shape[1]))
        with torch.no_grad(), edited.trace(whole):
            logits = edited.logits[0, last:].save()
        expected = logits.log_softmax(-1).gather(-1, sample.answer_ids[:, None])[:, 0]
        torch.testing.assert_close(scores[name].logprob, expected, atol=1e-4, rtol=0)
        edited = heads.ablate(default, chosen, "uniform", phase="decode")
        with torch.no_grad(), edited.generate(sample.ids, max_new_tokens=4, do_sample=False) as tracer:
            written = tracer.result.save()
        text = default.tokenizer.decode(written[0, last + 1 :], skip_special_tokens=True)
        assert answers[name] == text.partition("\n")[0]
    assert (scores["none"].logprob - scores["late"].logprob).max() > 0.5, "the heads do nothing: this test cannot fail"


def test_answers_of_one_condition_end_where_it_stops(llama):
    """A condition that stops early writes no more, while the others go on."""
    ids = ids_of(llama)
    free = Conditions(llama, ids, SETS).generate(8, stop=None)
    stop = free["none"][3]
    stopped = Conditions(llama, ids, SETS).generate(8, stop=stop)
    assert stopped == {name: text.partition(stop)[0] for name, text in free.items()} and stopped != free


def test_a_prefix_can_serve_several_batches(llama):
    ids, answer = ids_of(llama), ids_of(llama, length=3, seed=3)[0]
    prefix = heads.Prefix(llama, ids[:, :-1])
    for _ in range(2):
        shared = Conditions(llama, ids, SETS, prefix=prefix).score(answer)
        for name, score in Conditions(llama, ids, SETS).score(answer).items():
            assert torch.equal(score.logprob, shared[name].logprob)
    for other in (ids[:, :9], ids_of(llama, seed=5)):  # shorter, and of the same length
        with pytest.raises(ValueError, match="the prefix holds 11 other positions"):
            Conditions(llama, other, SETS, prefix=prefix)


def test_a_prefix_is_left_alone_where_the_prompt_is_cut_too(llama):
    """It was read by the clean model: with phase="both" every row reads its own."""
    ids, answer = ids_of(llama), ids_of(llama, length=3, seed=3)[0]
    alone = Conditions(llama, ids, SETS, phase="both").score(answer)
    given = Conditions(llama, ids, SETS, phase="both", prefix=heads.Prefix(llama, ids[:, :-1])).score(answer)
    decode = Conditions(llama, ids, SETS).score(answer)
    assert all(torch.equal(score.logprob, given[name].logprob) for name, score in alone.items())
    assert any(not torch.allclose(score.logprob, decode[name].logprob, atol=1e-2) for name, score in alone.items())


def test_bad_input_is_refused(llama):
    ids = ids_of(llama)
    with pytest.raises(ValueError, match="no conditions"):
        Conditions(llama, ids, {})
    with pytest.raises(ValueError, match="leaves decoding clean"):
        Conditions(llama, ids, SETS, phase="prefill")
    with pytest.raises(LookupError, match="'median'. Did you mean 'mean'. Known: zero, mean, resample, uniform"):
        Conditions(llama, ids, SETS, kind="median")
    with pytest.raises(IndexError, match=r"\(9, 9\) does not exist"):
        Conditions(llama, ids, {"none": [], "wrong": [(9, 9)]})
    with pytest.raises(ValueError, match="one prompt"):
        Conditions(llama, ids_of(llama, rows=2), SETS).score(ids[0])


def test_an_empty_answer_has_no_score(llama):
    with pytest.raises(ValueError, match="no token"):
        heads.Conditions(llama, ids_of(llama), {"none": []}).score(torch.tensor([], dtype=torch.long))


# ---------------------------------------------------------------------------------- edited models


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_edited_model_decodes_with_its_edits_where_they_are(family):
    """The last token of the prompt is that of each prompt, also while it is read without it and while it is continued."""
    model, chosen = tiny(family), SETS["three"]
    vectors = torch.zeros(3, model.anatomy.d_head)
    edited = heads.Steering(model, vectors, how="replace", heads=chosen, positions=[-1, 1], decode=[2]).edited
    prompts, found = prompts_of(model, (5, 20, 14)), [[], [], []]
    for steps in decode_batch(edited, prompts, 6, None):
        for i, step in steps.items():
            found[i].append(step.token)
    plain = plain_of(model)
    for ids, written in zip(prompts, found):
        grown, n = ids, ids.shape[1]
        for token in written:
            with replaced(plain, chosen, at=[p for p in (1, n - 1, n + 1) if p < grown.shape[1]]):
                assert plain(grown).logits[0, -1].argmax() == token
            grown = torch.cat([grown, torch.tensor([[token]])], 1)
    assert all(found)


def test_conditions_of_an_edited_model_keep_its_edits_where_they_are(llama):
    ids, answer, plain = ids_of(llama, length=20), ids_of(llama, length=4, seed=3)[0], plain_of(llama)
    base = heads.Steering(llama, torch.zeros(1, 8), how="replace", heads=[(0, 2)], positions=[-1], decode=False).edited
    whole = torch.cat([ids, answer[None, :-1]], dim=1)
    for prefix in (None, heads.Prefix(base, ids[:, :-1], prompt=20)):
        scores = Conditions(base, ids, SETS, "zero", prefix=prefix).score(answer)
        for name, chosen in SETS.items():
            with replaced(plain, [(0, 2)], at=[19]), replaced(plain, chosen, at=slice(19, None)):
                expected = plain(whole).logits[0, 19:].log_softmax(-1)
            near(scores[name].logprob, expected.gather(-1, answer[:, None])[:, 0])


def test_a_pattern_that_is_edited_is_the_one_that_decodes(llama):
    """Rows are read from the edited pattern, and the tokens are those that it writes."""
    ids = ids_of(llama)
    with llama.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            edited.layers[1].attn.pattern[:, 2] = 0
    steps = list(decode_rows(edited, ids, 3, stop=None))
    assert all((step.rows[1, 2] == 0).all() and (step.rows[1, 1] > 0).any() for step in steps)
    with replaced(plain_of(llama), [(1, 2)]):
        assert steps[0].token == plain_of(llama)(ids).logits[0, -1].argmax()
