"""Attention by role equals eager patterns; forced rows equal a computation by hand."""

import pytest
import torch
from conftest import ids_of, logits_of, near, plain_logits, plain_of, tiny
from toys import eager

import heads
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


def forced(model, chosen, weights, at):
    """The model with rows of attention `[prompt, key]` in place of what some heads look at from `at`."""
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            for layer, head in sorted(chosen):
                edited.layers[layer].attn.pattern[:, head, at] = weights
    return edited


def test_forced_rows_equal_a_computation_by_hand(any_model):
    task, plain = task_of(any_model, 3), plain_of(any_model)
    weights = halves(task, "subject", "object")
    found = logits_of(forced(any_model, CHOSEN, weights, 14), task.ids)
    near(found, forced_by_hand(plain, task.ids, CHOSEN, weights, 14))
    assert (found - plain_logits(any_model, task.ids)).abs().max() > 1e-2


def test_the_rows_that_are_there_change_nothing_and_the_original_stays(decoder):
    task, before = task_of(decoder, 3), plain_logits(decoder, task_of(decoder, 3).ids)
    rows = patterns(decoder, task.ids)[1, :, 2, -1]
    near(logits_of(forced(decoder, [(1, 2)], rows, -1), task.ids), before)
    assert torch.equal(logits_of(decoder, task.ids), before)


def test_forcing_stacks_with_ablation(decoder):
    task, plain = task_of(decoder, 3), plain_of(decoder)
    weights = halves(task, "subject", "object")
    cut = heads.ablate(forced(decoder, [(0, 1)], weights, -1), [(2, 1)], positions=[4])

    def change(layer, z):
        if layer == 2:
            z[:, 4, 1] = 0
        return z

    with plain.edited(change):
        near(logits_of(cut, task.ids), forced_by_hand(plain, task.ids, [(0, 1)], weights, 19))


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
