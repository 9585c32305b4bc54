"""Packed = padded = one by one; many answers to one prompt = each prompt read anew."""

import pytest
import torch
from conftest import DECODERS, fresh, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

import heads
from heads.lab.answers import Example
from heads.lab.packing import _row, rows_of
from heads.model.zoo import TINY

OTHERWISE = ["gpt-oss", "opt"]  # the positions of a row are not where these see that an example begins
ALL = [family for family in TINY if not tiny(family).anatomy.encoder and family not in OTHERWISE]


def items_of(model, lengths, seed=0):
    dice = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(5, model.config.get_text_config().vocab_size, (n,), generator=dice).tolist())
    return [Example(draw(p), draw(a)) for p, a in lengths]


LENGTHS = [(5, 2), (21, 1), (1, 4), (9, 9), (30, 3)]


def by_hand(model, item):
    """Each example alone through plain transformers."""
    ids = torch.tensor([[*item.prompt, *item.answer]])
    rows = log_softmax(model._module(ids).logits[0].float(), -1)[len(item.prompt) - 1 : -1]
    return -rows.gather(1, torch.tensor(item.answer)[:, None]).mean()


@pytest.mark.parametrize("family", ALL)
def test_packed_equals_one_by_one(family):
    model = tiny(family)
    items = items_of(model, LENGTHS)
    with torch.no_grad():
        wanted = torch.stack([by_hand(model, item) for item in items])
        for block in (1, 40, 1000):
            assert abs(heads.packed_loss(model, items, block) - wanted.mean()) < 1e-4
        alone = torch.stack([-score.logprob.mean() for score in _row(model, items)])
    assert (alone - wanted).abs().max() < 1e-4, "in one row, every answer has its own loss"


def test_gradients_of_packed_and_padded_are_the_same(decoder):
    items, found = items_of(decoder, LENGTHS), []
    weight = decoder.layers[1].attn._module.get_parameter(next(n for n, _ in decoder.layers[1].attn._module.named_parameters() if "weight" in n))
    for loss in (heads.packed_loss, heads.answer_loss):
        weight.requires_grad_(True)
        weight.grad = None
        loss(decoder, items).backward()
        found.append(weight.grad.clone())
        weight.requires_grad_(False)
        weight.grad = None
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max() + 1e-7


def test_lora_learns_the_same_packed():
    model, lines = fresh("llama"), []
    items = items_of(model, LENGTHS)
    for loss in (heads.packed_loss, heads.answer_loss):
        with heads.lora(model, rank=2, seed=3) as adapter:
            training = heads.fit(adapter, lambda batch, loss=loss: loss(model, batch), items, steps=4, batch=3, lr=1e-2)
            lines.append(torch.tensor(training.losses))
    assert (lines[0] - lines[1]).abs().max() < 1e-3 and lines[0][0] != lines[0][-1]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_rows_hold_every_example_once(lengths, block):
    rows = rows_of(lengths, block)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= block or len(row) == 1 for row in rows)
    assert len(rows) <= 1 or all(sum(sum(lengths[i] for i in r) for r in pair) > block for pair in [rows[:2]])


def test_what_cannot_be_packed_is_refused(llama):
    items = items_of(llama, LENGTHS)
    with pytest.raises(ValueError, match="no examples"):
        heads.packed_loss(llama, [])
    with pytest.raises(ValueError, match="edited model"):
        heads.packed_loss(heads.ablate(llama, [(0, 0)]), items)
    with pytest.raises(ValueError, match="encoder"):
        heads.packed_loss(tiny("bert"), items)
    for family in OTHERWISE:
        with pytest.raises(ValueError, match="cannot be packed.*padded batches"):
            heads.packed_loss(tiny(family), items_of(tiny(family), LENGTHS))
    model = fresh("llama")
    with heads.prompt_tuning(model, 3) as adapter, pytest.raises(ValueError, match="cannot be packed"):
        heads.packed_loss(adapter.module, items_of(model, LENGTHS))


# --------------------------------------------------------------------------- candidates


WORDS = [" one", " two", " three four five", " a"]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("prompt", ["count the owls in the tower and say how many:", "a"])
def test_candidates_equal_answers_read_anew(family, prompt):
    model = tiny(family)
    try:
        wanted = heads.score_answers(model, heads.examples(model, [(prompt, word) for word in WORDS]))
        found = heads.candidate_scores(model, prompt, WORDS, batch=3)
    except ValueError as error:
        assert "kept once" in str(error) or "continuation" in str(error)
        return
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.logprob - theirs.logprob).abs().max() < 1e-4 and torch.equal(ours.correct, theirs.correct)


def test_candidates_of_an_edited_model(llama):
    cut, prompt = heads.ablate(llama, [(1, 2), (3, 0)]), "count the owls in the tower:"
    wanted = heads.score_answers(cut, heads.examples(cut, [(prompt, word) for word in WORDS]))
    for ours, theirs, plain in zip(heads.candidate_scores(cut, prompt, WORDS), wanted, heads.candidate_scores(llama, prompt, WORDS)):
        assert (ours.logprob - theirs.logprob).abs().max() < 1e-4 < (ours.logprob - plain.logprob).abs().max()


@pytest.mark.parametrize(
    ("candidates", "words"),
    [([], "list of answers"), ("one", "list of answers"), ([" a", " b", " a"], "same tokens"), ([""], "no continuation")],
)
def test_candidates_that_cannot_be(llama, candidates, words):
    with pytest.raises(ValueError, match=words):
        heads.candidate_scores(llama, "count the owls:", candidates)


def test_edits_that_count_from_the_end_are_those_of_each_answer(llama):
    cut, prompt = heads.ablate(llama, [(1, 2), (3, 0)], positions=[-1]), "count the owls in the tower:"
    wanted = heads.score_answers(cut, heads.examples(cut, [(prompt, word) for word in WORDS]))
    for ours, theirs in zip(heads.candidate_scores(cut, prompt, WORDS), wanted):
        assert (ours.logprob - theirs.logprob).abs().max() < 1e-4


def test_a_module_in_training_mode_is_tried_without_dropout():
    model = fresh("gpt2")
    model._module.train()
    heads.packed_loss(model, items_of(model, LENGTHS))
    assert model._module.training and all(m.training for m in model._module.modules())
