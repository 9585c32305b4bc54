"""Caches in which every head keeps other tokens: really smaller equals masked equals by hand; budgets; what is refused."""

import math

import numpy as np
import pytest
import torch
from conftest import DECODERS, ids_of, logits_of, near, padded, plain_logits, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import heads
from heads import policies
from heads.lab.caches import Keep, Seen, Share, StandIn, _KeptLayer, budget_of
from heads.lab.policies import semantic_distances
from heads.lab.repeats import by_kv_head, echo_and_induction, repeated_tokens
from heads.model.attention import attention
from heads.model.zoo import TINY

LENGTH, QUESTION, STEPS, ROOM = 60, 5, 3, 8
FREE = [family for family in DECODERS if None in tiny(family).anatomy.windows]  # at least one layer that sees everything
ALL = [family for family in TINY if not tiny(family).anatomy.encoder and None in tiny(family).anatomy.windows]


def free(model) -> list[int]:
    return [i for i, window in enumerate(model.anatomy.windows) if window is None]


def every_policy(model) -> dict:
    """Name -> (policy, share)."""
    full = [(free(model)[0], 0)]
    return {
        "everything": (policies.everything, 1.0), "recent": (policies.recent(2), 0.5), "no sinks": (policies.recent(0), 0.5),
        "snapkv": (policies.observed(8, 3), 0.5), "adakv": (policies.observed(8, 3, shared=True), 0.5),
        "razor": (policies.razor(full, "count", 2), 0.6), "razor, one": (policies.razor(full, "one", 2), 0.6),
        "razor, none": (policies.razor(full, None, 2), 0.6), "task-kv": (policies.semantic(0.34, 1, 2, 8, 8, 3), 0.6),
        "task-kv, merged": (policies.semantic(0.34, 1, 2, 8, 8, 3, middle="merged"), 0.6),
    }  # fmt: skip


def passes(ids) -> list:
    """What follows the prompt: a question of several tokens, and single steps."""
    return [ids[:, LENGTH : LENGTH + QUESTION], *(ids[:, i : i + 1] for i in range(LENGTH + QUESTION, ids.shape[1]))]


def real(model, ids, policy, share, room=ROOM, run=None) -> tuple[torch.Tensor, heads.HeadCache]:
    cache, found = heads.HeadCache(model, policy, share, room), []
    run = run or model._module
    with torch.no_grad():
        run(ids[:, :LENGTH], past_key_values=cache, use_cache=True)
        for part in passes(ids):
            found.append(run(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1), cache


def masked(model, ids, chosen: dict) -> torch.Tensor:
    prefix = heads.MaskedPrefix(model, ids[:, :LENGTH], *zip(*chosen.values()), room=ROOM)
    cache, found = prefix.cache(), []
    for part in passes(ids):
        found.append(logits_of(model, part.repeat(len(chosen), 1), past_key_values=cache, use_cache=True))
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", ALL)
def test_really_smaller_equals_masked(family):
    model = tiny(family)
    ids, chosen = ids_of(model, LENGTH + QUESTION + STEPS), every_policy(model)
    hidden = masked(model, ids, chosen)
    near(hidden[:1], plain_logits(model, ids)[:, LENGTH:])
    for row, (policy, share) in zip(hidden, chosen.values()):
        logits, cache = real(model, ids, policy, share)
        near(logits, row[None])
        assert policy is policies.everything or (row - hidden[0]).abs().max() > 1e-3, "it forgets nothing"
        whole = LENGTH * model.anatomy.n_kv_heads * len(free(model))
        assert (sum(map(sum, cache.kept)) < whole) == (share < 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_sinks_and_recent_equal_eager_attention_under_one_mask(family):
    """Nothing of ours takes part: transformers' eager attention with what is hidden written into its mask."""
    model, length = tiny(family), LENGTH + QUESTION
    ids = ids_of(model, length)
    logits, cache = real(model, ids, policies.recent(3), 0.5)
    last = budget_of(0.5, LENGTH, ROOM) - 3
    assert cache.kept == [[last + 3] * model.anatomy.n_kv_heads] * model.anatomy.n_layers
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[LENGTH:, 3 : LENGTH - last] = False
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    model._module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            wanted = model._module(ids, attention_mask=mask, position_ids=torch.arange(length)[None]).logits
    finally:
        model._module.set_attn_implementation("heads")
    near(logits, wanted[:, LENGTH:])


@pytest.mark.parametrize("weight", ["count", "one", None])
def test_a_stand_in_is_the_formula_of_the_paper(weight):
    """Algorithm 1, in loops: one key-value head with all tokens and one with two sinks, three last tokens and a stand-in."""
    torch.manual_seed(0)
    model, n, width = tiny("llama"), 12, 8
    q, k, v = torch.randn(1, 4, n + 1, width), torch.randn(1, 2, n + 1, width), torch.randn(1, 2, n + 1, width)
    layer = _KeptLayer(model._module, 0, Share(policies.razor([(0, 1)], weight, 2, tail=3), 1.0, 4, [0]))
    module = model.layers[0].attn._module
    for part in (slice(n), slice(n, n + 1)):
        marked, values = layer.update(k[:, :, part], v[:, :, part])
        out = attention(module, q[:, :, part], marked, values, None)[0]
    kept, dropped = [0, 1, 9, 10, 11, 12], range(2, 9)
    for head in range(4):
        at = q[0, head, n] / math.sqrt(width)
        keys, values = k[0, head // 2], v[0, head // 2]
        top = bottom = 0.0
        for place in range(n + 1) if head // 2 == 1 else kept:
            weight_of = math.exp(at @ keys[place])
            top, bottom = top + weight_of * values[place], bottom + weight_of
        if head // 2 == 0 and weight is not None:
            mean_key, mean_value = (sum(x[place] for place in dropped) / 7 for x in (keys, values))
            weight_of = math.exp(at @ mean_key) * (7 if weight == "count" else 1)
            top, bottom = top + weight_of * mean_value, bottom + weight_of
        near(out[0, 0, head], top / bottom)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_choice_is_the_same_masked(data):
    model = tiny(data.draw(st.sampled_from(["llama", "gpt2", "gemma2"])))
    rows, n_kv = data.draw(st.integers(1, 2)), model.anatomy.n_kv_heads
    ids = ids_of(model, LENGTH + QUESTION + STEPS, rows, seed=data.draw(st.integers(0, 99)))
    sizes = {i: [data.draw(st.sampled_from([0, 1, 7, 30, LENGTH])) for _ in range(n_kv)] for i in free(model)}
    biased = {(i, h): data.draw(st.booleans()) for i in sizes for h in range(n_kv)}

    def policy(seen):
        dice, tokens, extra = torch.Generator().manual_seed(seen.layer), [], []
        for head, size in enumerate(sizes[seen.layer]):
            tokens.append(torch.stack([torch.randperm(LENGTH, generator=dice)[:size].sort().values for _ in range(rows)]))
            noise = torch.randn(2, rows, model.anatomy.d_head, generator=dice)
            extra.append(StandIn(*noise, 0.7) if biased[seen.layer, head] and size < LENGTH else None)
        return Keep(tokens, extra)

    near(real(model, ids, policy, 1.0)[0], masked(model, ids, {"it": (policy, 1.0)}))


def test_query_heads_may_keep_their_own_in_a_mask():
    model = tiny("llama")
    ids = ids_of(model, LENGTH + QUESTION + STEPS)
    alike = masked(model, ids, {"a": (policies.semantic(0.5, 1, 2, 8, 8, 3, by_query=True), 0.6)})
    wanted = masked(model, ids, {"a": (policies.semantic(0.5, 1, 2, 8, 8, 3), 0.6)})
    assert (alike - wanted).abs().max() > 1e-3
    with pytest.raises(ValueError, match="only a MaskedPrefix"):
        real(model, ids, policies.semantic(0.5, 1, 2, 8, 8, 3, by_query=True), 0.6)


@pytest.mark.parametrize("family", FREE)
def test_bytes_are_the_budget_and_the_room(family):
    model, length = tiny(family), 400
    ids = ids_of(model, length)
    for policy in (policies.recent(4), policies.observed(16, 5), policies.observed(16, 5, shared=True),
                   policies.razor([(free(model)[0], 0)], "count", 4), policies.semantic(0.3, 1, 4, 32)):  # fmt: skip
        cache = heads.HeadCache(model, policy, 0.7, room=20)
        with torch.no_grad():
            model._module(ids, past_key_values=cache, use_cache=True)
        size = model.anatomy.n_kv_heads * len(free(model)) * 2 * model.anatomy.d_head * 4
        assert 0.98 * 0.7 * (length + 20) * size <= cache.nbytes() <= 0.7 * (length + 20) * size
        assert not any(isinstance(x, torch.Tensor) and x.shape[-2] == length for x in vars(cache.layers[free(model)[0]]).values())


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_everything_kept_is_generation(decoder, beams):
    if decoder not in map(tiny, FREE):
        return
    ids, how = ids_of(decoder, 30, 2), dict(max_new_tokens=12, do_sample=False, num_beams=beams)
    wanted = decoder._module.generate(ids, **how)
    plain = decoder._module.generate(ids, past_key_values=heads.HeadCache(decoder, policies.everything, room=4), **how)
    assert torch.equal(plain, wanted)


def test_ours_and_plain_transformers_generate_the_same_from_a_cut_cache(llama):
    ids, how = ids_of(llama, LENGTH), dict(max_new_tokens=10, do_sample=False)
    policy = policies.razor([(1, 0)], None, 2)
    plain = llama._module.generate(ids, past_key_values=heads.HeadCache(llama, policy, 0.5, ROOM), **how)
    with llama.generate(ids, past_key_values=heads.HeadCache(llama, policy, 0.5, ROOM), **how) as generated:
        ours = generated.result.save()
    assert torch.equal(ours, plain)
    assert not torch.equal(plain, llama._module.generate(ids, **how)), "an example in which forgetting shows"
    traced, _ = real(llama, ids_of(llama, LENGTH + QUESTION), policy, 0.5, run=lambda *a, **k: type("", (), {"logits": logits_of(llama, *a, **k)}))
    near(traced, real(llama, ids_of(llama, LENGTH + QUESTION), policy, 0.5)[0])


def test_ablated_heads_stay_ablated(llama):
    ids = ids_of(llama, LENGTH + QUESTION)
    cut = heads.ablate(llama, [(1, 2), (3, 0)])
    cache = heads.HeadCache(cut, policies.everything)
    logits_of(cut, ids[:, :LENGTH], past_key_values=cache, use_cache=True)
    near(logits_of(cut, ids[:, LENGTH:], past_key_values=cache, use_cache=True), logits_of(cut, ids)[:, LENGTH:])


def test_reset_serves_another_prompt(llama):
    one, other = ids_of(llama, LENGTH + QUESTION), ids_of(llama, LENGTH + QUESTION, seed=7)
    policy = policies.observed(8, 3)
    _, cache = real(llama, one, policy, 0.5)
    cache.reset()
    logits_of(llama, other[:, :LENGTH], past_key_values=cache, use_cache=True)
    near(logits_of(llama, other[:, LENGTH:], past_key_values=cache, use_cache=True), real(llama, other, policy, 0.5)[0])


def test_a_pattern_is_read_while_the_prompt_is_read(llama):
    ids, cache = ids_of(llama, LENGTH), heads.HeadCache(llama, policies.recent(2), 0.5, ROOM)
    with torch.no_grad(), llama.trace(ids, past_key_values=cache, use_cache=True):
        ours = llama.layers[1].attn.pattern.save()
    with torch.no_grad(), llama.trace(ids):
        wanted = llama.layers[1].attn.pattern.save()
    near(ours, wanted)
    assert cache.kept == [[budget_of(0.5, LENGTH, ROOM)] * 2] * 4


# --------------------------------------------------------------------------- bad input


def continued(model, change, policy=policies.everything, ids=None):
    cache = heads.HeadCache(model, policy)
    with torch.no_grad():
        model._module(ids_of(model, 20, 2) if ids is None else ids, past_key_values=cache, use_cache=True)
        return change(cache)


def traced(model, cache, part):
    with torch.no_grad(), model.trace(ids_of(model, 1, 2), past_key_values=cache, use_cache=True):
        found = getattr(model.layers[1].attn, part).save()
    return found


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m, c: c.crop(-1), NotImplementedError, "cannot be cropped"),
        (lambda m, c: c.layers[0].offload(), NotImplementedError, "not offloaded"),
        (lambda m, c: m._module(ids_of(m, 1, 3), past_key_values=c), ValueError, "holds 2 prompts and was given 3 rows"),
        (lambda m, c: traced(m, c, "pattern"), NotImplementedError, "other tokens here, so there is no pattern"),
        (lambda m, c: traced(m, c, "k"), NotImplementedError, "for every head by itself, cannot be read"),
    ],
)
def test_what_such_a_cache_cannot_do_is_refused(llama, change, error, words):
    with pytest.raises(error, match=words):
        continued(llama, lambda cache: change(llama, cache))


def test_another_attention_implementation_is_refused(llama):
    llama._module.set_attn_implementation("sdpa")
    try:
        with pytest.raises(RuntimeError, match="attention implementation 'heads'.*has 'sdpa'"):
            continued(llama, None)
    finally:
        llama._module.set_attn_implementation("heads")


def test_padding_is_refused(llama):
    cache = heads.HeadCache(llama, policies.everything)
    with pytest.raises(ValueError, match="hidden from a token"):
        llama._module(**padded(llama, ["a short one", "and a longer one, so that the first is padded"]), past_key_values=cache)
    with pytest.raises(RuntimeError, match="stopped half-way"):
        llama._module(ids_of(llama, 5, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="hidden from a token"):
        hidden = torch.cat([torch.ones(2, 20), torch.zeros(2, 1), torch.ones(2, 1)], 1).long()
        continued(llama, lambda c: llama._module(ids_of(llama, 2, 2), attention_mask=hidden, past_key_values=c))


@pytest.mark.parametrize(
    ("policy", "share", "words"),
    [
        (policies.recent(40), 0.5, "and 40 of them are sinks"),
        (policies.observed(50), 0.5, "fewer than the window of 50"),
        (policies.razor([(i, h) for i in range(4) for h in range(2)]), 0.5, "more than|leave the other"),
        (policies.razor([(0, 2)]), 0.5, r"head \(0, 2\) of full.*2 key-value heads"),
        (policies.razor([(0, 0)], tail=50), 0.5, "has kept .* tokens up to layer"),
        (policies.semantic(sinks=40), 0.5, "40 of them are sinks"),
        (policies.everything, 0.5, "has kept .* more than the"),
        (policies.everything, 0.05, "leaves nothing beside the room"),
        (lambda seen: Keep([None]), 1.0, "answers for 1 heads.*2 key-value heads"),
        (lambda seen: Keep([None, torch.tensor([5, 3])]), 1.0, "layer 0, head 1: kept places.*ascending"),
        (lambda seen: Keep([None, torch.tensor([LENGTH])]), 1.0, "from 0 to 59"),
    ],
)
def test_budgets_and_answers_that_cannot_be(llama, policy, share, words):
    with pytest.raises(ValueError, match=words):
        real(llama, ids_of(llama, LENGTH + QUESTION), policy, share)


@pytest.mark.parametrize("policy", [policies.observed(8, 3, shared=True), policies.semantic(0.3, 1, 2, 8, 8, 3)])
def test_budgets_that_depend_on_the_prompt_take_one(llama, policy):
    with pytest.raises(ValueError, match="2 prompts: .* one at a time"):
        real(llama, ids_of(llama, LENGTH + QUESTION, 2), policy, 0.6)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: policies.recent(-1), ValueError, "sinks"),
        (lambda: policies.observed(pool=4), ValueError, "pool=4.*odd"),
        (lambda: policies.razor([(0, 0)], "two"), LookupError, "stand_in"),
        (lambda: policies.razor([0.5]), TypeError, "full"),
        (lambda: policies.semantic(middle="some"), LookupError, "middle"),
        (lambda: heads.HeadCache(tiny("llama"), policies.everything, 1.5), ValueError, "share=1.5"),
        (lambda: heads.HeadCache(tiny("llama"), policies.everything, room=-1), ValueError, "room"),
        (lambda: heads.HeadCache(tiny("bert"), policies.everything), ValueError, "bert"),
        (lambda: heads.HeadCache(tiny("mistral"), policies.everything), ValueError, "sees a window only"),
        (lambda: heads.MaskedPrefix(tiny("llama"), ids_of(tiny("llama")), []), ValueError, "0 policies"),
        (lambda: heads.MaskedPrefix(tiny("llama"), ids_of(tiny("llama")), [policies.everything], [1, 1]), ValueError, "2 shares"),
    ],
)
def test_nonsense_is_refused_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_masked_rows_are_policies_times_prompts(llama):
    prefix = heads.MaskedPrefix(llama, ids_of(llama, 20, 2), [policies.everything, policies.recent(1)], [1, 0.9], room=0)
    with pytest.raises(ValueError, match="2 rows: expected 4, for each of 2 policies the 2 prompts"):
        llama._module(ids_of(llama, 1, 2), past_key_values=prefix.cache())
    found = llama._module(ids_of(llama, 1, 2).repeat(2, 1), past_key_values=prefix.cache()).logits
    for row, (policy, share) in enumerate([(policies.everything, 1), (policies.recent(1), 0.9)]):
        cache = heads.HeadCache(llama, policy, share, room=0)
        llama._module(ids_of(llama, 20, 2), past_key_values=cache)
        near(found[2 * row : 2 * row + 2], llama._module(ids_of(llama, 1, 2), past_key_values=cache).logits)


def test_a_prompt_shorter_than_the_window_is_kept(llama):
    ids = ids_of(llama, LENGTH + QUESTION)
    near(real(llama, ids, policies.observed(LENGTH + 10), 1.0)[0], plain_logits(llama, ids)[:, LENGTH:])


# --------------------------------------------------------------------------- policies and the search


def seen_of(n_heads=4, kv_heads=2, n=40, width=8, budget=20, prompts=1, seed=0) -> Seen:
    dice = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(prompts, h, n, width, generator=dice) for h in (n_heads, kv_heads, kv_heads))
    return Seen(0, (0, 1, 2, 3), q, k, v, width**-0.5, budget)


def test_snapkv_in_loops():
    seen = seen_of()
    keep = policies.observed(6, 3)(seen)
    for kv in range(2):
        scores = np.zeros(34)
        for head in (2 * kv, 2 * kv + 1):
            for i in range(34, 40):
                row = np.exp((seen.queries[0, head, i] @ seen.keys[0, kv, : i + 1].T).double().numpy() * seen.scaling)
                scores += (row / row.sum())[:34]
        smooth = [sum(scores[max(0, j - 1) : j + 2]) for j in range(34)]
        wanted = sorted(np.argsort(smooth)[-14:].tolist()) + list(range(34, 40))
        assert keep.tokens[kv][0].tolist() == wanted


@given(st.integers(0, 99), st.integers(7, 39), st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=30, deadline=None)
def test_adakv_spends_one_budget(seed, budget, floor):
    seen = seen_of(budget=budget, seed=seed)
    sizes = [len(row) for row in policies.observed(6, 3, shared=True, floor=floor)(seen).tokens]
    assert sum(sizes) == 2 * budget and min(sizes) >= 6 + int(floor * (budget - 6))


def test_far_heads_of_task_kv_in_loops():
    seen = seen_of(n_heads=4, kv_heads=4, n=50)
    vectors = []
    for head in range(4):
        c = np.zeros(50)
        for i in range(42, 50):
            row = np.exp((seen.queries[0, head, i] @ seen.keys[0, head, : i + 1].T).double().numpy() * seen.scaling)
            c[: i + 1] += row / row.sum() / 8
        c = np.array([sum(c[max(0, j - 1) : j + 2]) / 3 for j in range(50)])
        best = np.argsort(c)[-10:]
        vectors.append(sum(c[j] * seen.values[0, head, j].double().numpy() for j in best))
    wanted = np.linalg.norm(np.array(vectors) - np.mean(vectors, 0), axis=1)
    np.testing.assert_allclose(semantic_distances(seen, 8, 3, 10), wanted, rtol=1e-4)


@given(st.integers(0, 99), st.integers(12, 60), st.sampled_from(["selected", "merged", None]))
@settings(max_examples=40, deadline=None)
def test_task_kv_keeps_to_its_budget(seed, budget, middle):
    seen = seen_of(n=60, budget=budget, seed=seed)
    keep = policies.semantic(0.5, 1, 4, 8, 8, 3, middle=middle)(seen).checked(seen)
    used = sum(row.shape[1] + (extra is not None) for row, extra in zip(keep.tokens, keep.stand_ins))
    assert used <= 2 * budget and (middle != "selected" or used >= 2 * budget - 1)


def test_echo_and_induction_equal_eager_patterns(decoder):
    ids = repeated_tokens(decoder, 7, 3, seed=1)
    assert ids.shape == (1, 22) and torch.equal(ids[0, 1:8], ids[0, 15:]) and len(set(ids[0, 1:8].tolist())) == 7
    echo, induction = echo_and_induction(decoder, 7, 3, seed=1)
    decoder._module.set_attn_implementation("eager")
    try:
        weights = decoder._module(ids, output_attentions=True).attentions
    finally:
        decoder._module.set_attn_implementation("heads")
    for layer, w in enumerate(weights):
        for head in range(w.shape[1]):
            a, same, after = w[0, head, 1:, 1:], 0.0, 0.0
            for i in range(7, 21):
                for r in (1, 2):
                    if i - 7 * r >= 0:
                        same, after = same + a[i, i - 7 * r], after + a[i, i - 7 * r + 1]
            near(torch.tensor([echo[layer, head], induction[layer, head]]), torch.stack([same, after]).detach() / 14)


def test_groups_take_their_best_head(llama):
    scores = heads.HeadScores(np.arange(16.0).reshape(4, 4) % 5, "s", llama)
    assert by_kv_head(scores, llama).values.tolist() == [[1, 3], [4, 2], [4, 1], [3, 4]]
    with pytest.raises(ValueError, match="has"):
        by_kv_head(heads.HeadScores(np.zeros((2, 2))), llama)


def test_too_many_distinct_tokens_are_refused(llama):
    with pytest.raises(ValueError, match="distinct tokens|reads"):
        repeated_tokens(llama, 10**6, 2)


# --------------------------------------------------------------------------- found by trying to break it


def test_padded_questions_are_masked_or_refused(llama):
    prompt, question = ids_of(llama, 20), ids_of(llama, 4, seed=3)
    mask, at = torch.tensor([[1] * 20 + [0, 0, 1, 1]]), torch.tensor([[0, 0, 20, 21]])
    rows = torch.cat([ids_of(llama, 2, seed=5), question[:, :2]], 1)
    for policy, share in ((policies.everything, 1.0), (policies.recent(1), 0.6)):
        prefix = heads.MaskedPrefix(llama, prompt, [policy], share, room=0)
        padded_to = llama._module(rows, attention_mask=mask, position_ids=at, past_key_values=prefix.cache()).logits[:, 2:]
        near(padded_to, llama._module(question[:, :2], past_key_values=prefix.cache()).logits)
        cache = heads.HeadCache(llama, policy, share, room=0)
        llama._module(prompt, past_key_values=cache)
        with pytest.raises(ValueError, match="hidden from a token"):
            llama._module(rows, attention_mask=mask, position_ids=at, past_key_values=cache)


def test_rows_of_a_masked_prefix_are_no_beams(llama):
    ids = ids_of(llama, 21)
    prefix = heads.MaskedPrefix(llama, ids[:, :-1], [policies.everything, policies.recent(1)], [1, 0.5], room=0)
    with pytest.raises(NotImplementedError, match="rows of a MaskedPrefix are policies"):
        llama._module.generate(ids, past_key_values=prefix.cache(), num_beams=2, max_new_tokens=8, do_sample=False)


def test_heads_in_full_are_in_layers_that_see_everything():
    model = tiny("gemma2")
    for layer in (0, 99):
        with pytest.raises(ValueError, match=rf"head \({layer}, 0\) of full: only layers 1, 3 see everything"):
            real(model, ids_of(model, LENGTH + QUESTION), policies.razor([(layer, 0), (1, 0)], None, 2), 0.7)


def test_a_pattern_behind_a_masked_prefix_is_refused(llama):
    """It would be that of a whole cache: what a policy hides is not in it."""
    prefix = heads.MaskedPrefix(llama, ids_of(llama, 20), [policies.everything, policies.recent(1)], [1, 0.5], room=0)
    for read in (True, False):
        with pytest.raises(NotImplementedError, match="a policy hides other tokens"), torch.no_grad():
            with llama.trace(ids_of(llama, 2, 2), past_key_values=prefix.cache(), use_cache=True):
                if read:
                    llama.layers[1].attn.pattern.save()
                else:
                    llama.layers[1].attn.pattern[:] = 0


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_a_quantised_or_offloaded_cache_beside_ours_is_refused(llama, kind):
    with pytest.raises(ValueError, match="cache_implementation.*past_key_values.*unsupported"):  # by transformers itself
        llama._module.generate(ids_of(llama, 20), past_key_values=heads.HeadCache(llama, policies.everything), cache_implementation=kind, max_new_tokens=3)


def test_a_second_prompt_without_reset_goes_on_behind_the_first(llama):
    one, other, cache = ids_of(llama, 20), ids_of(llama, 20, seed=7), heads.HeadCache(llama, policies.everything)
    logits_of(llama, one, past_key_values=cache, use_cache=True)
    near(logits_of(llama, other, past_key_values=cache, use_cache=True), logits_of(llama, torch.cat([one, other], 1))[:, 20:])


def test_a_layer_is_cut_before_the_next_one_is_read(llama):
    held = []
    cache = heads.HeadCache(llama, lambda seen: (held.append(cache.nbytes()), policies.recent(2)(seen))[1], 0.5, ROOM)
    llama._module(ids_of(llama, LENGTH), past_key_values=cache)
    assert held == [layer * cache.nbytes() // 4 for layer in range(4)]
