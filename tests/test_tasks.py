"""Needle prompts: the answer stands where the sample says, and the prompt is what was asked for."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

import heads
import heads.model.tiny
from heads.tasks import haystack, needle, needles
from heads.tasks.needle import FORMATS, find_span

HAY = ["The brown owl sleeps in the barn all day. It wakes at dusk. " * 40]


def same(a, b) -> bool:
    """Equality of two lists of samples, token by token."""
    return len(a) == len(b) and all(
        torch.equal(x.ids, y.ids) and x.span == y.span and x.name == y.name for x, y in zip(a, b)
    )


# ---------------------------------------------------------------------------------------------- needles


@pytest.mark.parametrize("form", FORMATS)
def test_the_span_holds_the_answer_inside_the_needle_for_every_needle(default, form):
    decode, n = default.tokenizer.decode, len(needles())
    samples = needle(default, lengths=[200], depths=[i / n for i in range(n)], form=form, chosen=needles())
    for row, sample in zip(needles(), samples, strict=True):
        assert decode(sample.copied).strip() == row["answer"] == sample.answer
        said = row["needle"][: row["needle"].index(row["answer"]) + len(row["answer"])]
        assert decode(sample.ids[0, : sample.span[1]]).endswith(said), "the span is not where the needle is"
        assert decode(sample.ids[0]).count(row["needle"]) == 1
        assert sample.name == row["id"] and sample.form == form


def test_a_stem_prompt_is_continued_by_the_answer(default):
    samples = needle(default, lengths=[200], depths=[0.5] * len(needles()), chosen=needles())
    for row, sample in zip(needles(), samples, strict=True):
        text = default.tokenizer.decode(torch.cat([sample.ids[0], sample.answer_ids]))
        assert text.endswith(f" {row['stem']} {row['answer']}")
        assert torch.equal(sample.answer_ids, sample.copied), "the answer has other tokens than its original"


def test_a_chat_prompt_asks_and_leaves_the_turn_to_the_model(default):
    row = needles("detect")[0]
    (sample,) = needle(default, lengths=[200], depths=[0.5], form="chat", chosen=[row])
    text = default.tokenizer.decode(sample.ids[0])
    assert row["question"] in text and text.endswith("<|im_start|>assistant\n") and row["stem"] in text
    assert default.tokenizer.decode(sample.answer_ids) == row["answer"]


def test_depth_0_is_the_start_and_depth_1_the_end_and_needles_follow_a_full_stop(default):
    row = needles("detect")[0]
    for depth in (0, 0.3, 0.5, 0.9, 1):
        (sample,) = needle(default, lengths=[400], depths=[depth], chosen=[row])
        before, _, after = default.tokenizer.decode(sample.ids[0]).partition(row["needle"])
        after = after.removesuffix(f" {row['stem']}").strip()
        assert before == "" if depth == 0 else before.endswith(". ")
        share = len(before) / len(before + after)
        assert depth - 0.15 <= share <= depth + 0.05  # walked back to the previous full stop


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [150, 500, 2000])
def test_a_prompt_is_about_as_long_as_asked(default, form, length):
    for sample in needle(default, lengths=[length], form=form):
        assert length - 60 <= sample.ids.shape[1] <= length + 10
        assert sample.length == length


def test_the_grid_is_lengths_by_depths_and_needles_take_turns(default):
    samples = needle(default, lengths=[150, 200], depths=[0.2, 0.8])
    assert [(s.length, s.depth) for s in samples] == [(150, 0.2), (150, 0.8), (200, 0.2), (200, 0.8)]
    assert [s.name for s in samples] == [row["id"] for row in needles("detect")[:4]]
    few = needle(default, lengths=[150, 200], depths=[0.2, 0.8], limit=2)
    assert [(s.length, s.depth) for s in few] == [(150, 0.2), (200, 0.8)]
    assert len(needle(default, lengths=[150], depths=[0.5], limit=9)) == 1


def test_prompts_are_made_by_their_seed(default):
    assert same(needle(default, lengths=[150], seed=1), needle(default, lengths=[150], seed=1))
    assert not same(needle(default, lengths=[150], seed=1), needle(default, lengths=[150], seed=2))


def test_the_first_special_token_is_kept_and_a_closing_one_is_not():
    """BERT-like tokenizers close a text; a prompt that is to be continued must stay open."""
    tokenizer = heads.model.tiny.tokenizer(whole=False)

    class Closing:
        chat_template, all_special_ids, decode, batch_decode = None, [1, 2], tokenizer.decode, tokenizer.batch_decode

        def __call__(self, text, add_special_tokens=True, **kwargs):
            ids = tokenizer(text).input_ids
            return SimpleNamespace(input_ids=[1, *ids, 2] if add_special_tokens else ids)

    (sample,) = needle(SimpleNamespace(tokenizer=Closing()), lengths=[400], depths=[0.5], source=HAY)
    assert sample.ids[0, 0] == 1 and sample.ids[0, -1] != 2 and 1 not in sample.answer_ids and 2 not in sample.answer_ids
    assert tokenizer.decode(sample.copied).strip() == sample.answer


def test_tiny_models_have_needles_too():
    samples = needle(tiny("qwen3"), lengths=[400], depths=[0, 1], source=HAY)
    assert [tiny("qwen3").tokenizer.decode(s.copied).strip() for s in samples] == [s.answer for s in samples]


def test_a_haystack_comes_from_help_topics_a_file_or_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one  two\n\nthree")
    assert haystack(tmp_path / "a.txt") == haystack(str(tmp_path / "a.txt")) == "one two three"
    assert haystack(["one ", "two\tthree"]) == haystack(iter(["one", "two three"])) == "one two three"
    assert len(haystack()) > 100_000 and haystack() == haystack()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(lengths=[90]), "a prompt of 90 tokens leaves .* for the haystack: ask for at least"),
        (dict(lengths=[4000], source=HAY), "the haystack holds .* tokens, .* are needed: give a longer source"),
        (dict(depths=[0.5, 1.5]), "depth 1.5 is not between 0 and 1"),
        (dict(depths=[-0.1]), "depth -0.1 is not between"),
        (dict(depths=[]), "no needle prompts: give at least one of lengths"),
        (dict(lengths=[]), "no needle prompts: give at least one of lengths"),
        (dict(chosen=[]), "no needle prompts: .* chosen needles"),
        (dict(limit=0), "needle: n=0 prompts asked for"),
    ],
)
def test_prompts_that_cannot_be_made_are_refused(default, arguments, words):
    with pytest.raises(ValueError, match=words):
        needle(default, **arguments)


def test_the_length_that_the_refusal_asks_for_is_enough(default):
    with pytest.raises(ValueError) as refused:
        needle(default, lengths=[50], depths=[0.5])
    enough = int(str(refused.value).rpartition(" ")[2])
    assert len(needle(default, lengths=[enough], depths=[0.5])) == 1
    with pytest.raises(ValueError):
        needle(default, lengths=[enough - 1], depths=[0.5])


def test_other_bad_input_is_refused(default, tmp_path):
    with pytest.raises(ValueError, match="tiny-llama has no chat template: use form='stem'"):
        needle(tiny("llama"), form="chat", source=HAY)
    with pytest.raises(LookupError, match="no form of a needle prompt 'question'. Known: stem, chat"):
        needle(default, form="question")
    with pytest.raises(LookupError, match="no set of needles 'both'. Known: detect, evaluate"):
        needles("both")
    with pytest.raises(FileNotFoundError, match="is not a file: give a path"):
        haystack(tmp_path / "nowhere.txt")
    with pytest.raises(TypeError, match="a path, an iterable of texts, or None, got int"):
        haystack(3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_the_answer_is_found_in_the_needle_and_not_in_the_haystack(default, form, depth):
    row = {"needle": "The password of the lighthouse is seven grey owls.", "stem": "The password of the lighthouse is",
           "answer": "seven grey owls", "question": "What is the password of the lighthouse?", "id": "owls"}  # fmt: skip
    source = ["They saw seven grey owls on the roof. seven grey owls flew away. " * 60]
    (sample,) = needle(default, lengths=[300], depths=[depth], source=source, chosen=[row], form=form)
    before = default.tokenizer.decode(sample.ids[0, : sample.span[0]])
    assert default.tokenizer.decode(sample.copied).strip() == row["answer"] and before.endswith(row["stem"])


# --------------------------------------------------------------------------------------------- find_span


def ids(text: str) -> list[int]:
    return heads.model.tiny.tokenizer(whole=False)(text).input_ids


def span(prompt: str, answer: str) -> str:
    start, end = find_span(heads.model.tiny.tokenizer(whole=False), ids(prompt), answer)
    return prompt[start:end]


def test_an_exact_match_is_preferred_with_its_space_then_without_then_a_window():
    assert span("bca abc", "abc") == " abc"
    assert span("(abc) abc", "abc") == " abc"
    assert span("cab (abc)", "abc") == "abc"
    assert span("say c ab!", "abc") == "c ab"
    with pytest.raises(ValueError, match="the answer 'abcd' was not found among the prompt's tokens"):
        span("say ab c!", "abcd")


def test_the_fallback_wants_more_than_nine_in_ten_distinct_tokens():
    answer = "abcdefghij"  # with its space: eleven distinct tokens
    assert span("jihgfedcba __", answer) == "jihgfedcba "  # all of them, in another order
    assert span("__jihgfedcbX __", answer) == "jihgfedcbX "  # ten of eleven
    with pytest.raises(ValueError, match="was not found"):
        span("__jihgfedcXX __", answer)  # nine of eleven
