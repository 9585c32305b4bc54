"""Where an edit acts: the same tokens, whatever `generate` does with the cache, and on either side of padding.

The second opinion is a plain model that reads everything again for each token, without a cache and without padding.
"""

import numpy as np
import pytest
import torch
from conftest import ids_of, logits_of, near, padded, plain_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import replaced
from transformers import DynamicCache

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


ENDS = [  # where an edit is, and at which tokens of the prompt that is
    ({"phase": "prefill"}, range(PROMPT - 1)), ({"phase": "decode"}, [PROMPT - 1]),
    ({"positions": [-1]}, [PROMPT - 1]), ({"positions": [-5, 0]}, [0, PROMPT - 5]), ({"positions": [6]}, [6]),
    ({"positions": torch.arange(PROMPT) % 2 == 1}, range(1, PROMPT, 2)),
]  # fmt: skip


@pytest.mark.parametrize("cut", [3, PROMPT - 1])
@pytest.mark.parametrize("where, at", ENDS)
def test_a_prefix_of_an_edited_model_is_no_prompt_of_its_own(decoder, cut, where, at):
    """What stands before the rest is read by the edited model; its last token is not the prompt's."""
    ids, edited, plain = ids_of(decoder, length=PROMPT), heads.ablate(decoder, HEADS, **where), plain_of(decoder)
    with replaced(plain, HEADS, at=list(at)):
        whole = plain(ids).logits[:, cut:]
    for prompt in (PROMPT, None):
        if prompt is None and min(where["positions"] if isinstance(where.get("positions"), list) else [0]) < 0:
            with pytest.raises(Exception, match="count from an end that a prefix cannot know: give it prompt"):
                heads.Prefix(edited, ids[:, :cut])
        else:
            cache = heads.Prefix(edited, ids[:, :cut], prompt=prompt).cache()
            near(logits_of(edited, ids[:, cut:], past_key_values=cache, use_cache=True), whole)


def test_what_follows_a_prompt_that_the_prefix_knows_is_generated(llama):
    """Teacher forcing behind a prefix, without a word in the edit."""
    ids, plain = ids_of(llama, length=PROMPT + 3), plain_of(llama)
    edited = heads.Steering(llama, torch.zeros(len(HEADS), 8), how="replace", heads=HEADS, positions=[-1], decode=[2]).edited
    cache = heads.Prefix(edited, ids[:, :4], prompt=PROMPT).cache()
    found = logits_of(edited, ids[:, 4:], past_key_values=cache, use_cache=True)
    with replaced(plain, HEADS, at=[PROMPT - 1, PROMPT + 1]):
        near(found, plain(ids).logits[:, 4:])


def test_a_prompt_may_be_read_in_parts_by_hand(llama):
    """With its length told, a part that holds none of the named positions is no mistake."""
    ids, plain, cache = ids_of(llama, length=PROMPT), plain_of(llama), DynamicCache()
    edited = heads.ablate(llama, HEADS, positions=[6, -1], prompt=PROMPT)
    parts = [logits_of(edited, ids[:, i : i + 3], past_key_values=cache, use_cache=True) for i in (0, 3, 6)]
    with replaced(plain, HEADS, at=[6, PROMPT - 1]):
        near(torch.cat(parts, 1), plain(ids).logits)


def test_each_prompt_keeps_its_set_and_its_positions_over_its_beams(llama):
    ids, sets = ids_of(llama, length=PROMPT, rows=2), [[(0, 1)], [(2, 3), (3, 2)]]
    at, plain = torch.arange(PROMPT) % 2 == torch.tensor([[0], [1]]), plain_of(llama)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    for where, places in (({}, [slice(None)] * 2), ({"positions": at}, at)):
        with heads.ablate(llama, sets, **where).generate(ids, **options) as tracer:
            found = tracer.result.save()
        for row, (chosen, columns) in enumerate(zip(sets, places)):
            def change(layer, z):
                if z.shape[1] > 1 or not where:  # the prompt, or a token that follows it
                    for head in (h for i, h in chosen if i == layer):
                        z[:, columns, head] = 0
                return z

            with plain.edited(change):
                alone = plain.module.generate(ids[row : row + 1], attention_mask=ids[:1] * 0 + 1, **options)
            assert torch.equal(found[2 * row : 2 * row + 2], alone)
    for wrong, words in (({}, "2 sets of heads for a batch of 1 rows"), ({"positions": at}, "for 2 rows of 9 tokens")):
        with pytest.raises(Exception, match=words):
            with heads.ablate(llama, sets if not wrong else sets[0], **wrong).generate(ids[:1], **options) as tracer:
                tracer.result.save()


def test_a_prompt_that_ends_before_the_trace_does(llama):
    """Teacher forcing: the answer is fed with the prompt, and counts as generated."""
    ids = ids_of(llama, length=PROMPT + 3)
    found = logits_of(heads.ablate(llama, HEADS, phase="decode", prompt=PROMPT), ids)
    at = Places("decode", prompt=PROMPT).of({"input_ids": ids}).at
    assert torch.equal(at.nonzero()[:, 1], torch.arange(PROMPT - 1, PROMPT + 3))
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
        ({"positions": torch.tensor([[3], [5]])}, TypeError, r"booleans \[row, position\], not torch.int64 \[2, 1\]"),
        ({"positions": torch.tensor([1.0])}, TypeError, "whole number, not 1.0"),
        ({"positions": 2.5}, TypeError, "whole number, not 2.5"),
        ({"decode": [0]}, ValueError, "number of a generated token is at least 1, not 0"),
        ({"decode": (-1,)}, ValueError, "at least 1, not -1"),
        ({"prompt": 0}, ValueError, "prompt's length is at least 1, not 0"),
        ({"prompt": -1}, ValueError, "at least 1, not -1"),
        ({"prompt": True}, TypeError, "prompt's length is a whole number, not True"),
        ({"prompt": 1.5}, TypeError, "whole number, not 1.5"),
    ],
)
def test_what_is_no_place_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Places(**arguments)


def test_positions_that_no_row_has_are_refused(llama):
    with pytest.raises(Exception, match=r"positions \[40\]: the longest row has 9 tokens"):
        logits_of(heads.ablate(llama, HEADS, positions=[40]), ids_of(llama, length=9))
    for where, words in (({"positions": [0, 99]}, r"positions \[99\]: the longest row has 9"), ({"prompt": 99}, "has 9"),
                         ({"positions": [9], "decode": False}, r"\[9\]"), ({"positions": [13]}, r"\[13\]"),
                         ({"positions": [-10]}, r"\[-10\]")):  # fmt: skip
        with pytest.raises(Exception, match=words):
            edited = heads.Steering(llama, torch.zeros(4, 4, 8), **{"decode": None, **where}).edited
            with edited.generate(ids_of(llama, length=9), max_new_tokens=NEW) as tracer:
                tracer.result.save()
    texts = padded(llama, ["one", "a longer one"])
    assert logits_of(heads.ablate(llama, HEADS, positions=[8]), texts.pop("input_ids"), **texts).isfinite().all()
    with pytest.raises(ValueError, match="for 1 rows of 4 tokens, but this batch has 2 of 9"):
        Places(positions=torch.ones(1, 4, dtype=torch.bool)).of({"input_ids": ids_of(llama, 9, 2)})
    with pytest.raises(ValueError, match="prompt=10, but this run has 9 tokens and no cache for more"):
        Places(prompt=10).of({"input_ids": ids_of(llama, 9)})
    with pytest.raises(ValueError, match="which tokens are padding cannot be told"):
        Places().of({"input_ids": ids_of(llama), "attention_mask": torch.ones(1, 1, 12, 12)})


def test_places_are_given_in_many_forms(llama):
    """One number, arrays of numbers, booleans for all rows; nothing where nothing is named."""
    ids = ids_of(llama, length=PROMPT, rows=2)
    at = lambda **where: Places(**where).of({"input_ids": ids}).at.expand(2, -1)  # noqa: E731
    wanted = at(positions=[2, -1])
    odd = torch.arange(PROMPT)
    for given_as in ((2, 8), np.array([2, -1]), torch.tensor([2, 8]), (odd == 2) | (odd == 8), np.isin(odd, [2, 8])[None]):
        assert torch.equal(at(positions=given_as), wanted)
    assert torch.equal(at(positions=2), at(positions=[2])) and torch.equal(at(positions=np.int64(2)), at(positions=[2]))
    assert Places(decode=2) == Places(decode=[2])
    for nothing in ([], torch.zeros(PROMPT).bool(), torch.zeros(2, PROMPT).bool()):
        assert not at(positions=nothing).any()
        clean = logits_of(llama, ids)
        assert torch.equal(logits_of(heads.ablate(llama, HEADS, positions=nothing), ids), clean)
