"""What cannot be continued, predicted or held is refused before a forward pass; beams of a prefix are their prompt's."""

import copy
import warnings

import pytest
import torch
from conftest import ids_of, logits_of, near, plain_of, tiny
from toys import toy

import heads
from heads.lab.answers import token_losses
from heads.lab.decoding import decode_batch, decode_rows, join
from heads.model.prefix import prefill
from heads.model.weights import check_length

BEAMS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}


def searched(model, ids, **kwargs):
    with model.generate(ids, **BEAMS, **kwargs) as tracer:
        found = tracer.result.save()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_beams_of_one_prompt_and_of_rows_that_are_kept_equal_transformers_own(family):
    model = tiny(family)
    ids, plain = ids_of(model, length=9, rows=2), plain_of(model).module
    wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), **BEAMS)
    one = heads.Prefix(model, ids[:1, :-1])
    for cache in (one.cache(), copy.deepcopy(one.cache())):  # a copy holds no second model
        assert torch.equal(searched(model, ids[:1], past_key_values=cache), wanted[:3])
    every = heads.Prefix(model, ids[:, :-1].repeat_interleave(3, 0))
    assert torch.equal(searched(model, ids, past_key_values=every.cache()), wanted)
    joined = join([prefill(model, row[None, :-1]) for row in ids.repeat_interleave(3, 0)], 8)
    assert torch.equal(searched(model, ids, past_key_values=joined), wanted)


def test_rows_that_are_not_their_prompts_are_refused(llama):
    ids = ids_of(llama, length=9, rows=2)
    prefix = heads.Prefix(llama, ids[:, :-1])
    with pytest.raises(Exception, match="6 rows cannot continue 2 prompts.*keep every row"):
        searched(llama, ids, past_key_values=prefix.cache())
    with pytest.raises(Exception, match="3 rows cannot continue 2 prompts"):
        logits_of(llama, ids_of(llama, length=1, rows=3), past_key_values=prefix.cache(), use_cache=True)


@pytest.mark.parametrize("shape", [(9,), (0,), (1, 0), (0, 9), (1, 9, 1)])
def test_ids_of_another_shape_are_refused(llama, shape):
    with pytest.raises(ValueError, match=r"the ids are \[.*\]: expected \[prompt, position\], with at least one token"):
        heads.Prefix(llama, torch.ones(shape, dtype=torch.long))


def test_the_length_of_a_prompt_is_a_whole_number(llama):
    for wrong, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="the prompt's length is"):
            heads.Prefix(llama, ids_of(llama), prompt=wrong)


ENCODED = {
    "ablate decode": lambda m: heads.ablate(m, [(0, 0)], phase="decode"),
    "ablate prefill": lambda m: heads.ablate(m, [(0, 0)], phase="prefill"),
    "token_losses": lambda m: token_losses(m, [[5, 6, 7]]),
    "module": lambda m: token_losses(m._module, [[5, 6, 7]]),
    "evaluate": lambda m: heads.metrics.evaluate(m, toy(m)),
    "decode_rows": lambda m: next(decode_rows(m, ids_of(m))),
    "decode_batch": lambda m: next(decode_batch(m, [ids_of(m)])),
    "conditions": lambda m: heads.Conditions(m, ids_of(m), {"none": []}),
    "conditions both": lambda m: heads.Conditions(m, ids_of(m), {"none": []}, phase="both").generate(1),
    "score_answers": lambda m: heads.score_answers(m, heads.examples(m, [("a", " b")])),
    "prefix": lambda m: heads.Prefix(m, ids_of(m)),
    "fit": lambda m: heads.fit(torch.zeros(1, requires_grad=True),
                               lambda batch: heads.answer_loss(m, batch), heads.examples(m, [("a", " b")]), steps=1),
}  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("what", ENCODED)
def test_an_encoder_predicts_no_next_token(family, what):
    model, ran = tiny(family), []
    handle = model._module.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError, match=f"{family} is an encoder: its END predicts nothing. Use a decoder"):
            ENCODED[what](model)
    finally:
        handle.remove()
    assert not ran
    heads.ablate(model, [(0, 0)], positions=[-1])  # as before: a place, no phase


def test_a_run_longer_than_the_context_says_so(any_model):
    """512 positions in every tiny model. Learnt one by one there are no more, rotary ones go on with a warning."""
    check_length(any_model, 512)
    if any_model.record["name"] in ("tiny-gpt2", "tiny-bert"):
        for model in (any_model, any_model._module):
            with pytest.raises(ValueError, match="513 tokens are more than the 512 of this (gpt2|bert) model's context"):
                check_length(model, 513)
    else:
        with pytest.warns(UserWarning, match="more tokens than the 512 of this"):
            check_length(any_model, 513)


def test_what_runs_without_a_trace_says_so_too():
    model, row = tiny("gpt2"), list(range(5, 200)) * 3
    task = toy(model, 2, 600)
    for long in (lambda: token_losses(model, [row]), lambda: heads.ablation_scores(model, task, progress=False)):
        with pytest.raises(ValueError, match="of this gpt2 model's context"):
            long()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(token_losses(model, [row[:513]])[0].mean(), token_losses(model._module, [row[:513]])[0].mean())
