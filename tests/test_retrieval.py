"""Retrieval scores equal a literal, slow reading of their definition (Wu et al. 2024, section 2)."""

import numpy as np
import pytest
import torch
from conftest import ids_of, plain_of
from hypothesis import given
from hypothesis import strategies as st

import heads
from heads.lab import retrieval
from heads.lab.decoding import Step
from heads.lab.retrieval import Retrieval, Trial, batches, copying, retrieval_scores, rouge1_recall
from heads.tasks import Sample


def trial(model, sample, *args) -> Trial:
    """One sample by itself."""
    return retrieval_scores(model, [sample], *args, progress=False).trials[0]


def literal(module, tokenizer, sample, max_new_tokens, stop):
    """One full eager forward per token, one head at a time. Returns scores (every copy counts; every place once),
    attention to needle and first, text."""
    text, (start, end) = sample.ids[0].tolist(), sample.span
    k, prompt, copied = end - start, len(text), {}
    needle, first, written = 0, 0, []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            out = module(torch.tensor([text]), output_attentions=True)
        w = out.logits[0, -1].argmax().item()
        if w == module.generation_config.eos_token_id or (stop and stop in tokenizer.decode([w])):
            break
        rows = torch.stack([layer[0, :, -1] for layer in out.attentions])
        for layer in range(rows.shape[0]):
            for head in range(rows.shape[1]):
                j = max(range(len(text)), key=rows[layer, head].tolist().__getitem__)
                if start <= j < end and text[j] == w:
                    copied.setdefault((layer, head), []).append(j)
        needle, first = needle + rows[..., start:end].sum(-1), first + rows[..., 0]
        text.append(w)
        written.append(w)
    scores = np.zeros((2, *rows.shape[:2]))
    for head, places in copied.items():
        scores[:, *head] = len(places) / k, len(set(places)) / k
    return scores, needle / len(written), first / len(written), tokenizer.decode(text[prompt:])


def compare(model, module, sample, max_new_tokens, stop) -> Trial:
    scores, needle, first, response = literal(module, model.tokenizer, sample, max_new_tokens, stop)
    for dedup in (False, True):
        found = trial(model, sample, max_new_tokens, stop, dedup)
        np.testing.assert_allclose(found.copies, scores[int(dedup)], atol=1e-6)
        np.testing.assert_allclose(found.needle, needle, atol=1e-4)
        np.testing.assert_allclose(found.first, first, atol=1e-4)
        assert found.response == response
    return found


def repeating(model, seed: int = 0, length: int = 36) -> Sample:
    """A prompt of what a random model writes by itself: it soon repeats itself, and so it 'copies'."""
    with torch.no_grad():
        text = model._module.generate(
            ids_of(model, length=4, seed=seed), max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
    span = (text.shape[1] - 12, text.shape[1])
    return Sample(text, span, "answer", text[0, slice(*span)], "repeating", "stem", length, 1.0)


def test_scores_of_tiny_models_equal_the_definition(decoder):
    found = [compare(decoder, plain_of(decoder).module, repeating(decoder, seed), 8, None) for seed in range(8)]
    assert sum(t.copies.sum() for t in found) > 0, "no head copies: this test cannot fail"


def test_scores_of_the_default_model_equal_the_definition(default, default_eager, sample):
    found = compare(default, default_eager, sample, 8, "\n")
    assert found.success and found.copies.max() > 0.5


def test_a_copy_is_the_most_attended_position_of_all_with_the_written_token():
    ids = torch.tensor([[5, 6, 7, 6, 8]])
    heads_ = {  # what a head attends to most (position 5 is generated), and whether it copies token 6 from the span [1, 3)
        "in the span, the token": (1, True),
        "in the span, another token": (2, False),
        "the token, outside of the span": (3, False),
        "a generated token": (5, False),
    }
    rows = torch.nn.functional.one_hot(torch.tensor([[at for at, _ in heads_.values()]]), 6) * 0.6 + 0.1
    assert copying(rows.argmax(-1), 6, ids, (1, 3)).tolist() == [[copies for _, copies in heads_.values()]]


def test_without_dedup_a_model_that_repeats_itself_passes_one(monkeypatch, llama):
    """The head always looks at position 1, and the model always writes the token that stands there."""
    sample = Sample(torch.tensor([[5, 70, 7, 8]]), (1, 3), "x", torch.tensor([70]), "x", "stem", 4, 0)
    rows = torch.zeros(4, 4, 4)
    rows[..., 1] = 1
    monkeypatch.setattr(retrieval, "decode_batch", lambda *args: iter([{0: Step(70, rows)}] * 3))
    assert (trial(llama, sample).copies == 1.5).all()
    assert (trial(llama, sample, 50, None, True).copies == 0.5).all()


# --------------------------------------------------------------------------------------- over samples


def made(recall: float, *copies: float) -> Trial:
    table = np.array([copies])
    return Trial(None, "", recall, table, table, table)


def test_only_successes_count_for_mean_and_frequency():
    found = Retrieval([made(100, 0.4, 0), made(51, 0, 0), made(50, 1, 1), made(0, 1, 1)])
    assert [t.recall for t in found.successes] == [100, 51]
    np.testing.assert_allclose(found.mean.values, [[0.2, 0]])
    np.testing.assert_allclose(found.frequency.values, [[0.5, 0]])
    assert found.samples.shape == (2, 1, 2) and found.mean.name == "retrieval score"


def test_a_model_that_answers_nothing_has_no_scores():
    for trials in ([made(50, 1, 1), made(0, 1, 1)], []):
        with pytest.raises(ValueError, match=f"answered none of {len(trials)} samples .* defined on successes only"):
            _ = Retrieval(trials).mean


def test_a_model_that_stops_at_once_has_a_trial_of_zeros(llama, monkeypatch):
    monkeypatch.setattr(retrieval, "decode_batch", lambda *args: iter([]))
    found = trial(llama, repeating(llama))
    assert found.response == "" and not found.success and not found.copies.any() and not found.needle.any()


def same(ours: list[Trial], theirs: list[Trial]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.sample is b.sample and a.response == b.response and a.recall == b.recall
        np.testing.assert_array_equal(a.copies, b.copies)
        np.testing.assert_allclose(a.needle, b.needle, atol=1e-5)
        np.testing.assert_allclose(a.first, b.first, atol=1e-5)


def test_samples_of_different_lengths_together_score_as_one_by_one(decoder, dedup=False):
    samples = [repeating(decoder, seed, length) for seed, length in enumerate((36, 24, 40, 30))]
    together, few, alone = (
        retrieval_scores(decoder, samples, 8, None, dedup, progress=False, batch_tokens=tokens).trials
        for tokens in (8192, 100, 0)
    )
    same(together, alone)
    same(few, alone)
    assert sum(t.copies.sum() for t in alone) > 0, "no head copies: this test cannot fail"


def test_places_that_count_once_do_so_in_a_batch(llama):
    test_samples_of_different_lengths_together_score_as_one_by_one(llama, dedup=True)


def test_samples_of_the_default_model_together_score_as_one_by_one(default):
    samples = heads.tasks.needle(default, lengths=[128, 110, 150], depths=[0.4])
    together, alone = (retrieval_scores(default, samples, 12, progress=False, batch_tokens=n) for n in (8192, 0))
    same(together.trials, alone.trials)
    assert together.successes and len({len(t.response) for t in together.trials}) > 1


@given(st.lists(st.integers(2, 50), max_size=12), st.integers(0, 200))
def test_batches_hold_every_prompt_once_and_no_more_tokens_than_asked(lengths, tokens):
    found = batches(lengths, tokens)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens for batch in found)
    if lengths and len(lengths) * max(lengths) <= tokens:
        assert len(found) == 1


def test_scores_over_samples_are_those_of_each_trial(llama, monkeypatch, capsys):
    monkeypatch.setattr(retrieval, "GATE", -1.0)
    samples = [repeating(llama), repeating(llama, 1)]
    found = retrieval_scores(llama, samples, 6, None, name="copies", progress=False)
    each = [trial(llama, sample, 6, None).copies for sample in samples]
    np.testing.assert_allclose(found.mean.values, np.mean(each, axis=0))
    assert found.mean.name == "copies" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "response, answer, recall",
    [
        ("carve tiny boats", "carve tiny boats", 100),
        ("It carves a tiny boat, often.", "carve tiny boats", 100),  # stemmed
        ("boats", "carve tiny boats", 100 / 3),
        ("boats boats boats", "carve tiny boats", 100 / 3),
        ("", "carve tiny boats", 0),
    ],
)
def test_rouge_counts_the_answers_words(response, answer, recall):
    assert rouge1_recall(response, answer) == pytest.approx(recall)
    assert heads.rouge1_recall is rouge1_recall
