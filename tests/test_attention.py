"""The attention call of heads: SDPA's result, an explicit pattern where one is asked for, and a shared prefix."""

from types import SimpleNamespace

import nnsight
import pytest
import torch
from conftest import ids_of, logits_of, near, plain_of
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import eager

from heads.lab.replay import swapped
from heads.model.attention import attention, mix, pattern
from heads.model.prefix import Prefix

MODULE = SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=2, training=False)


def qkv(n_query: int, n_key: int, batch: int = 2, seed: int = 0):
    """Four query heads on two key-value heads of width 8."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, n, 8, generator=generator) for h, n in ((4, n_query), (2, n_key), (2, n_key))]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 7),
    past=st.integers(0, 5),
    kind=st.sampled_from(["bool", "additive", "per head"]),
    seed=st.integers(0, 99),
)
def test_pattern_times_values_is_sdpa(n, past, kind, seed):
    q, k, v = qkv(n, n + past, seed=seed)
    visible = torch.ones(n, n + past, dtype=torch.bool).tril(past).expand(2, 1, n, n + past)
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, -1e30)
    mask = mask.expand(2, 4, n, n + past) if kind == "per head" else mask
    rows = pattern(MODULE, q, k, mask, scaling=0.3)
    expected, _ = attention(MODULE, q, k, v, mask, scaling=0.3)
    near(mix(rows, v), expected)
    near(rows.sum(-1), torch.ones(2, 4, n))
    assert (rows[~visible.expand_as(rows)] == 0).all()


def test_without_a_mask_a_causal_module_looks_back_only_and_another_everywhere():
    q, k, v = qkv(5, 5)
    for causal in (True, False):
        module = SimpleNamespace(**{**vars(MODULE), "is_causal": causal})
        rows = pattern(module, q, k)
        assert ((rows > 0) == (torch.ones(5, 5).tril() > 0 if causal else torch.ones(5, 5) > 0)).all()
        near(mix(rows, v), attention(module, q, k, v, None)[0])


def test_a_batch_without_a_mask_is_read_as_its_prompts_alone(decoder):
    ids = ids_of(decoder, length=7, rows=3)  # shorter than the sliding windows: transformers passes no mask
    with decoder.trace(ids):
        together = decoder.layers[1].attn.pattern.save()
    for row in range(3):
        with decoder.trace(ids[row : row + 1]):
            alone = decoder.layers[1].attn.pattern.save()
        near(together[row], alone[0])


def test_a_soft_cap_bounds_the_logits():
    q, k, v = qkv(4, 4)
    logits = 100 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    expected = (torch.tanh(logits / 5) * 5).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf).softmax(-1)
    near(pattern(MODULE, q, k, scaling=100, softcap=5), expected)
    near(attention(MODULE, q, k, v, None, scaling=100, softcap=5)[0], mix(expected, v))


def test_a_sink_takes_its_share_and_gives_nothing():
    """Written out: one more logit in every row, whose column is thrown away."""
    q, k, v = qkv(2, 2)
    sinks = torch.randn(q.shape[1], generator=torch.Generator().manual_seed(1))
    z, weights = attention(MODULE, q, k, v, None, s_aux=sinks)
    for head in range(q.shape[1]):
        kv = head * k.shape[1] // q.shape[1]
        logits = q[:, head] @ k[:, kv].transpose(-1, -2) * q.shape[-1] ** -0.5
        rows = torch.cat([logits, sinks[head].expand(*logits.shape[:-1], 1)], -1)
        if q.shape[2] > 1:
            later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
            rows = torch.cat([logits.masked_fill(later, -torch.inf), rows[..., -1:]], -1)
        rows = rows.softmax(-1)[..., :-1]
        torch.testing.assert_close(weights[:, head], rows, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(z[:, :, head], rows @ v[:, kv], atol=1e-5, rtol=1e-4)


def test_an_edit_inside_another_gives_it_back():
    module, (q, k, v) = SimpleNamespace(**vars(MODULE)), qkv(3, 3)
    run = lambda: attention(module, q, k, v, None)[0]  # noqa: E731
    with swapped(module, lambda q, k, v: (q, k, 0 * v), "_edit"):
        with swapped(module, lambda q, k, v: (q, k, 0 * v + 1), "_edit"):
            near(run(), torch.ones_like(run()))
        assert (run() == 0).all()
    assert (run() != 0).any() and "_edit" not in vars(module)


@pytest.mark.parametrize("second", [1, 2])
def test_edits_of_one_pattern_stack(decoder, second):
    ids, plain = ids_of(decoder), plain_of(decoder)
    model, kept = decoder, torch.eye(12)[0].expand(12, 12).clone()
    for head in (1, second):
        with model.edit() as (tracer, model):
            for _ in tracer.iter[:]:
                pattern = model.layers[2].attn.pattern
                pattern[:, head] = (pattern[:, head] + kept) / 2

    def rows(layer, pattern):
        for head in (1, second) if layer == 2 else ():
            pattern[:, head] = (pattern[:, head] + kept) / 2

    for _ in range(2):  # a second run finds them as they were
        with eager(plain, rows=rows):
            near(logits_of(model, ids), plain(ids).logits)


# ----------------------------------------------------------------------------------- a shared prefix


def shared_logits(model, prefix, ids):
    cache = prefix.cache()
    return logits_of(model, ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("length", [1, 3])
def test_a_shared_prefix_equals_running_the_whole_text(decoder, rows, length):
    """Each row of the batch continues one prompt, longer than the sliding windows, in its own way."""
    prompt, ends = ids_of(decoder, length=20), ids_of(decoder, length=length, rows=rows, seed=1)
    found = shared_logits(decoder, Prefix(decoder, prompt), ends)
    whole = plain_of(decoder)(torch.cat([prompt.expand(rows, -1), ends], dim=1)).logits
    near(found, whole[:, 20:])


def test_a_shared_prefix_grows_by_what_each_row_writes(decoder):
    prompt, ends = ids_of(decoder, length=20), ids_of(decoder, length=4, rows=3, seed=1)
    prefix = Prefix(decoder, prompt)
    before = [layer.keys.clone() for layer in prefix.layers]
    cache, found = prefix.cache(), []
    for step in (slice(0, 2), slice(2, 3), slice(3, 4)):
        found.append(logits_of(decoder, ends[:, step], past_key_values=cache, use_cache=True))
    near(torch.cat(found, dim=1), plain_of(decoder)(torch.cat([prompt.expand(3, -1), ends], dim=1)).logits[:, 20:])
    assert cache.get_seq_length() == 24
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(prefix.layers, before, strict=True))


def test_a_pattern_over_a_shared_prefix_is_that_of_the_whole_text(decoder):
    prompt, ends = ids_of(decoder, length=20), ids_of(decoder, length=3, rows=2, seed=1)
    cache = Prefix(decoder, prompt).cache()
    with torch.no_grad(), decoder.trace(input_ids=ends, past_key_values=cache, use_cache=True):
        found = nnsight.save([])
        for layer in decoder.layers:
            found.append(layer.attn.pattern)
    whole = plain_of(decoder)(torch.cat([prompt.expand(2, -1), ends], dim=1), output_attentions=True).attentions
    for ours, theirs in zip(found, whole, strict=True):
        near(ours, theirs[:, :, 20:])


@pytest.mark.parametrize("part", ["k", "v"])
def test_shared_keys_and_values_are_not_handed_out_in_pieces(llama, part):
    cache = Prefix(llama, ids_of(llama)).cache()
    with pytest.raises(Exception, match="cannot be read one by one"):
        with llama.trace(input_ids=ids_of(llama, length=1), past_key_values=cache, use_cache=True):
            getattr(llama.layers[0].attn, part).save()


def test_several_prompts_are_shared_by_several_conditions_each(decoder):
    prompts, ends = ids_of(decoder, length=20, rows=3), ids_of(decoder, length=2, rows=6, seed=1)
    cache = Prefix(decoder, prompts).cache()
    found = logits_of(decoder, ends, past_key_values=cache, use_cache=True)
    near(found, plain_of(decoder)(torch.cat([prompts.repeat(2, 1), ends], dim=1)).logits[:, 20:])
