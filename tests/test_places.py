"""Where an edit acts: the same tokens, whatever `generate` does with the cache, and on either side of padding.

The second opinion is a plain model that reads everything again for each token, without a cache and without padding.
"""

import pytest
import torch
from conftest import ids_of, logits_of, near, padded, plain_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import heads
from heads.lab.places import Places

HEADS = [(0, 1), (1, 0), (2, 3), (3, 2)]
PROMPT, NEW = 9, 4
SETTINGS = {
    "cached": {},
    "without a cache": {"use_cache": False},
    "read in chunks": {"prefill_chunk_size": 4},
    "static cache": {"cache_implementation": "static"},
}


def by_hand(plain, ids, at, new: int = NEW) -> torch.Tensor:
    """Greedy continuation of one prompt; the heads are zeroed at the tokens `at`, (number of the token) -> bool."""
    for _ in range(new):
        chosen = [i for i in range(ids.shape[1]) if at(i)]

        def cut(layer, z):
            for head in [h for i, h in HEADS if i == layer]:
                z[:, chosen, head] = 0
            return z

        with plain.edited(cut):
            logits = plain(ids, use_cache=False).logits[:, -1]
        logits[..., plain.module.config.eos_token_id] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
    return ids


PHASES = {
    "both": lambda i: True,
    "prefill": lambda i: i < PROMPT - 1,
    "decode": lambda i: i >= PROMPT - 1,
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_is_the_same_tokens_whatever_the_cache(decoder, how, phase):
    ids = ids_of(decoder, length=PROMPT)
    edited = heads.ablate(decoder, HEADS, phase=phase)
    with edited.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **SETTINGS[how]) as tracer:
        found = tracer.result.save()
    assert torch.equal(found, by_hand(plain_of(decoder), ids, PHASES[phase]))


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize(
    "where, at",
    [
        ({"positions": [-1], "decode": False}, lambda i: i == PROMPT - 1),
        ({"positions": [0, 5], "decode": [2]}, lambda i: i in (0, 5, PROMPT + 1)),
        ({"positions": [], "decode": True}, lambda i: i >= PROMPT),
    ],
    ids=["last prompt token", "two of the prompt, the second written", "what is written"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_steering_is_at_the_same_tokens_whatever_the_cache(family, how, where, at):
    decoder = tiny(family)
    ids, anatomy = ids_of(decoder, length=PROMPT), decoder.anatomy
    edited = heads.Steering(decoder, torch.zeros(len(HEADS), anatomy.d_head), how="replace", heads=HEADS, **where).edited
    with edited.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **SETTINGS[how]) as tracer:
        found = tracer.result.save()
    assert torch.equal(found, by_hand(plain_of(decoder), ids, at))


@pytest.mark.parametrize("how", ["cached", "without a cache", "static cache"])
@pytest.mark.parametrize("phase", PHASES)
def test_each_row_of_a_padded_batch_is_its_own(how, phase):
    model, lengths = tiny("llama"), (PROMPT, PROMPT - 4)
    rows = [ids_of(model, length=n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (PROMPT - n) + [1] * n for n in lengths])
    inputs = {"input_ids": ids, "attention_mask": mask}
    edited = heads.ablate(model, HEADS, phase=phase)
    with edited.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **SETTINGS[how]) as tracer:
        found = tracer.result.save()
    for row, prompt, n in zip(found, rows, lengths):
        at = {"both": lambda i: True, "prefill": lambda i, n=n: i < n - 1, "decode": lambda i, n=n: i >= n - 1}[phase]
        assert torch.equal(row[None, PROMPT - n :], by_hand(plain_of(model), prompt, at))


@pytest.mark.parametrize("cut", [3, 8])
@pytest.mark.parametrize("where", [{}, {"phase": "decode"}, {"positions": [-1, 8]}])
def test_a_trace_that_continues_a_prefix_is_the_trace_of_the_whole(decoder, cut, where):
    """What is cut stands behind the prefix, so the prefix may be that of the clean model."""
    ids, edited = ids_of(decoder, length=PROMPT), heads.ablate(decoder, HEADS, **where)
    prefix = heads.Prefix(edited if where == {} else decoder, ids[:, :cut])
    near(logits_of(edited, ids[:, cut:], past_key_values=prefix.cache(), use_cache=True), logits_of(edited, ids)[:, cut:])


def test_a_prompt_that_ends_before_the_trace_does(llama):
    """Teacher forcing: the answer is fed with the prompt, and counts as generated."""
    ids = ids_of(llama, length=PROMPT + 3)
    found = logits_of(heads.ablate(llama, HEADS, phase="decode", prompt=PROMPT), ids)
    assert torch.equal(Places("decode", prompt=PROMPT).of({"input_ids": ids}).at.nonzero()[:, 1], torch.arange(PROMPT - 1, PROMPT + 3))
    assert (found - logits_of(heads.ablate(llama, HEADS, phase="decode"), ids)).abs().max() > 1e-3


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_numbers_are_of_real_tokens_on_either_side_of_padding(data):
    """Against counting in a loop."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    side, phase = data.draw(st.sampled_from(["left", "right"])), data.draw(st.sampled_from(list(PHASES)))
    longest = max(lengths)
    positions = data.draw(st.lists(st.integers(-longest, longest - 1), min_size=1, max_size=3))
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(longest - n, None) if side == "left" else slice(n)] = 1
    found = Places(phase, positions).of({"input_ids": mask, "attention_mask": mask})
    for row, n in enumerate(lengths):
        real = mask[row].nonzero().flatten().tolist()
        for column in range(longest):
            k = real.index(column) if column in real else None
            wanted = k is not None and (k in positions or k - n in positions)
            wanted = wanted and {"both": True, "prefill": k != n - 1, "decode": k == n - 1}[phase]
            assert bool(found.at[row if len(found.at) > 1 else 0, column]) == wanted
            assert found.number[row, column] == (-1 if k is None else k)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"positions": [True, False]}, TypeError, "whole number, not True"),
        ({"positions": [1.0]}, TypeError, "whole number, not 1.0"),
        ({"decode": [1.5]}, TypeError, "whole number, not 1.5"),
        ({"phase": "later"}, LookupError, "no phase 'later'. Known: both, prefill, decode"),
    ],
)
def test_what_is_no_place_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Places(**arguments)


def test_positions_that_no_row_has_are_refused(llama):
    with pytest.raises(Exception, match=r"positions \[40\]: the longest row has 9 tokens"):
        logits_of(heads.ablate(llama, HEADS, positions=[40]), ids_of(llama, length=9))
    texts = padded(llama, ["one", "a longer one"])
    assert logits_of(heads.ablate(llama, HEADS, positions=[8]), texts.pop("input_ids"), **texts).isfinite().all()
    with pytest.raises(ValueError, match="for 1 rows of 4 tokens, but this batch has 2 of 9"):
        Places(positions=torch.ones(1, 4, dtype=torch.bool)).of({"input_ids": ids_of(llama, 9, 2)})
    with pytest.raises(ValueError, match="which tokens are padding cannot be told"):
        Places().of({"input_ids": ids_of(llama), "attention_mask": torch.ones(1, 1, 12, 12)})
