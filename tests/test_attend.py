"""Attention by role equals eager patterns; forced rows equal a computation by hand."""

import pytest
import torch
from conftest import ids_of, logits_of, near, plain_logits, plain_of, tiny
from toys import eager

import heads
from heads.lab.ablation import force_attention
from heads.lab.readings import attention_to
from heads.tasks.base import Task

CHOSEN = [(0, 1), (2, 3), (2, 0)]


def task_of(model, prompts: int = 5, length: int = 20) -> Task:
    """Random prompts longer than the tiny models' sliding windows, with roles at moving positions."""
    ids, steps = ids_of(model, length, prompts), torch.arange(prompts)
    roles = {"subject": steps % 3 + 2, "object": 12 - steps % 2, "late": torch.full((prompts,), length - 2)}
    return Task("random", ids, torch.full((prompts,), 5), torch.full((prompts, 1), 6), ids.flip(1), roles)


def patterns(model, ids) -> torch.Tensor:
    """`[layer, prompt, head, query, key]` from eager attention."""
    return torch.stack(plain_of(model)(ids, output_attentions=True).attentions)


# --------------------------------------------------------------------------- attention by role


@pytest.mark.parametrize("query", ["END", "object"])
def test_attention_to_roles_equals_the_eager_pattern(any_model, query):
    task = task_of(any_model)
    found = attention_to(any_model, task, query, batch=2)
    assert list(found) == ["subject", "object", "late", "END", "rest"]
    weights, prompts = patterns(any_model, task.ids), torch.arange(5)
    rows = weights[:, prompts, :, task.roles[query]]  # advanced indices first: [prompt, layer, head, key]
    for role, at in task.roles.items():
        near(torch.tensor(found[role].values).float(), rows[prompts, :, :, at].mean(0))
    free = ~task.at(list(task.roles))
    near(torch.tensor(found["rest"].values).float(), (rows * free[:, None, None]).sum(-1).mean(0))


def test_roles_and_rest_sum_to_one(any_model):
    found = attention_to(any_model, task_of(any_model))
    near(torch.tensor(sum(x.values for x in found.values())), torch.ones(4, 4).double())


def test_what_lies_behind_the_query_gets_nothing(decoder):
    found = attention_to(decoder, task_of(decoder), "subject")
    assert all((found[role].values == 0).all() for role in ("object", "late", "END"))


def test_roles_may_be_given(llama):
    task = task_of(llama)
    found = attention_to(llama, task, roles={"first": torch.zeros(5, dtype=int), "again": torch.zeros(5, dtype=int)})
    near(torch.tensor(found["first"].values).float(), patterns(llama, task.ids)[..., -1, 0].mean(1))
    assert (found["first"].values == found["again"].values).all()
    near(torch.tensor(found["first"].values + found["rest"].values), torch.ones(4, 4).double())  # not counted twice


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(query="verb"), LookupError, "no role of random 'verb'. Known: subject, object, late, END"),
        (dict(roles={"first": torch.zeros(4)}), ValueError, "'first' needs one position below 20 for each of 5"),
        (dict(roles={"far": torch.full((5,), 20)}), ValueError, "'far' needs one position"),
        (dict(roles={"rest": torch.zeros(5)}), ValueError, "another name"),
        (dict(roles={"half": torch.full((5,), 2.5)}), TypeError, "position of role 'half' is a whole number, not 2.5"),
    ],
)
def test_bad_roles_are_refused(llama, arguments, error, words):
    with pytest.raises(error, match=words):
        attention_to(llama, task_of(llama), **arguments)


# -------------------------------------------------------------------------------- forced rows


def forced_by_hand(plain, ids, chosen, weights, at):
    """Logits with rows replaced in an attention that is written out."""
    prompts = torch.arange(len(ids))

    def force(layer, pattern):
        for head in (h for i, h in chosen if i == layer):
            pattern[prompts, head, at] = weights

    with eager(plain, rows=force):
        return plain(ids).logits


def halves(task: Task, *roles: str) -> torch.Tensor:
    chosen = task.at(list(roles)).float()
    return chosen / chosen.sum(1, keepdim=True)


@pytest.mark.parametrize("where", ["last", "number", "each"])
def test_forced_rows_equal_a_computation_by_hand(any_model, where):
    task, plain = task_of(any_model, 3), plain_of(any_model)
    weights = halves(task, "subject", "object")
    each = torch.tensor([13, -1, 17]), torch.tensor([13, 19, 17])
    given, at = {"last": (-1, 19), "number": (14, 14), "each": each}[where]
    found = logits_of(force_attention(any_model, CHOSEN, weights, given), task.ids)
    near(found, forced_by_hand(plain, task.ids, CHOSEN, weights, at))
    assert (found - plain_logits(any_model, task.ids)).abs().max() > 1e-2


def test_any_row_may_be_forced_and_one_serves_all(decoder):
    task, plain = task_of(decoder, 3), plain_of(decoder)
    row = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = logits_of(force_attention(decoder, CHOSEN, row), task.ids)
    near(found, forced_by_hand(plain, task.ids, CHOSEN, row.expand(3, -1), 19))


def test_the_rows_that_are_there_change_nothing(decoder):
    task = task_of(decoder, 3)
    rows = patterns(decoder, task.ids)[1, :, 2, -1]
    near(logits_of(force_attention(decoder, [(1, 2)], rows), task.ids), plain_logits(decoder, task.ids))


def test_no_heads_change_nothing_to_the_bit_and_the_original_stays(decoder):
    task, before = task_of(decoder, 3), plain_logits(decoder, task_of(decoder, 3).ids)
    weights = halves(task, "subject")
    assert torch.equal(logits_of(force_attention(decoder, [], weights), task.ids), before)
    force_attention(decoder, CHOSEN, weights)
    assert torch.equal(logits_of(decoder, task.ids), before)


def test_forcing_stacks_with_ablation_and_with_itself(decoder):
    task, plain = task_of(decoder, 3), plain_of(decoder)
    weights = halves(task, "subject", "object")
    twice = force_attention(force_attention(decoder, [(0, 1)], weights), [(2, 3), (2, 0)], weights)
    near(logits_of(twice, task.ids), forced_by_hand(plain, task.ids, CHOSEN, weights, 19))
    cut = heads.ablate(force_attention(decoder, [(0, 1)], weights), [(2, 1)], positions=[4])

    def change(layer, z):
        if layer == 2:
            z[:, 4, 1] = 0
        return z

    with plain.edited(change):
        near(logits_of(cut, task.ids), forced_by_hand(plain, task.ids, [(0, 1)], weights, 19))


def test_the_prompt_is_forced_and_what_follows_is_not(decoder):
    """Greedy decoding with a cache: the forced position writes its keys and values once, later tokens look freely."""
    task, plain = task_of(decoder, 3), plain_of(decoder)
    weights = halves(task, "subject", "object")
    edited = force_attention(decoder, CHOSEN, weights)
    with edited.generate(task.ids, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        found = tracer.result.save()
    ids = task.ids
    for _ in range(3):
        wide = torch.nn.functional.pad(weights, (0, ids.shape[1] - 20))
        logits = forced_by_hand(plain, ids, CHOSEN, wide, 19)[:, -1]
        logits[:, plain.module.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(weights=torch.full((3, 20), 0.1)), ValueError, "row 0 sums to 2"),
        (dict(weights=torch.tensor([[1.5, -0.5] + [0] * 18])), ValueError, "no negative"),
        (dict(weights=torch.eye(20)[[3, 15, 4]], position=10), ValueError, "row 1 looks into the future.*position 10"),
        (dict(weights=torch.eye(20)[[3, 5, 4]], position=torch.tensor([9, 4, 9])), ValueError, "row 1 looks.*position 4"),
        (dict(weights=torch.eye(20)[0]), ValueError, r"\[prompt, key\]"),
        (dict(position=20), IndexError, "position 20 does not exist.*20 keys"),
        (dict(position=torch.tensor([1, 2])), ValueError, "one for each of 3 rows"),
        (dict(position=1.7), TypeError, "a position is a whole number, not 1.7"),
        (dict(position=torch.tensor([1.0, 2.5, 3.0])), TypeError, "a whole number, not 1.0"),
        (dict(position=True), TypeError, "a whole number, not True"),
        (dict(heads=[(0, 9)]), IndexError, r"head \(0, 9\) does not exist"),
    ],
)
def test_bad_rows_are_refused(llama, change, error, words):
    arguments = dict(heads=CHOSEN, weights=torch.eye(20)[[1, 2, 3]], position=-1) | change
    with pytest.raises(error, match=words):
        force_attention(llama, **arguments)


@pytest.mark.parametrize("rows, length", [(2, 20), (3, 19)])
def test_a_batch_that_does_not_fit_is_refused(llama, rows, length):
    edited = force_attention(llama, CHOSEN, torch.eye(20)[[1, 2, 3]])
    with pytest.raises(Exception, match=f"for 3 rows of 20 tokens, but this batch has {rows} of {length}"):
        logits_of(edited, ids_of(llama, length, rows))


def test_an_encoder_may_look_ahead():
    model = tiny("bert")
    task, weights = task_of(model, 3), torch.eye(20)[[15, 16, 17]]
    found = logits_of(force_attention(model, CHOSEN, weights, 4), task.ids)
    near(found, forced_by_hand(plain_of(model), task.ids, CHOSEN, weights, 4))


def test_no_roles_are_refused(llama):
    with pytest.raises(ValueError, match="no roles"):
        heads.attention_to(llama, task_of(llama), roles={})


def test_attention_to_is_that_of_an_edited_pattern(llama):
    task, first = task_of(llama, 3), torch.eye(20)[0]
    with llama.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            edited.layers[1].attn.pattern[:, 2] = first
    found = attention_to(edited, task, "object", roles={"first": torch.zeros(3, dtype=int)})["first"]
    assert found[1, 2] == 1 and 0 < found[1, 1] < 1


def test_batches_are_whole_numbers(llama):
    for batch, error in ((0, ValueError), (2.5, TypeError), (-1, ValueError)):
        for run in (attention_to, heads.metrics.evaluate, heads.ablation_scores):
            with pytest.raises(error, match="batch is"):
                run(llama, task_of(llama, 3), batch=batch)
        with pytest.raises(error, match="batch is"):
            heads.head_means(llama, ["ab"], batch=batch)
    with pytest.raises(TypeError, match="a position is a whole number, not 0.5"):
        heads.head_activations(llama, ["ab"], 0.5)


def test_every_prompt_has_its_row_over_its_beams(llama):
    task = task_of(llama, 2)
    weights, options = halves(task, "subject", "object"), {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2}
    with force_attention(llama, CHOSEN, weights).generate(task.ids, do_sample=False, **options) as tracer:
        together = tracer.result.save()
    for row in range(2):
        alone = force_attention(llama, CHOSEN, weights[row : row + 1])
        with alone.generate(task.ids[row : row + 1], do_sample=False, **options) as tracer:
            found = tracer.result.save()
        assert torch.equal(together[row], found[0])
