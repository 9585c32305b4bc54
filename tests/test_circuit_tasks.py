"""Tasks for circuits: what every family promises of its prompts, twins, roles and leaks, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import heads.model.tiny
import heads.model.zoo
from heads.tasks import arithmetic, base, colored_objects, ioi, word_pairs, word_tasks, words
from heads.tasks.arithmetic import OPERATIONS, TEMPLATES
from heads.tasks.ioi import NAMES
from heads.tasks.ioi import TEMPLATES as SENTENCES

BYTES = SimpleNamespace(tokenizer=heads.model.tiny.tokenizer(whole=False), record={"name": "bytes"})


@pytest.fixture(scope="module")
def model():
    """The default model's tokenizer; tasks need no more of a model."""
    return SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(heads.models.fetch()), record={"name": "smollm2-135m"})


EVERY = {
    "ioi": lambda m, **k: ioi(m, **{"n": 12, **k}),
    "ioi, abc": lambda m, **k: ioi(m, **{"n": 12, "corruption": "abc", "template": 3, **k}),
    "colored_objects": lambda m, **k: colored_objects(m, **{"n": 12, "foils": "both", **k}),
    "arithmetic": lambda m, **k: arithmetic(m, **{"n": 12, **k}),
    "arithmetic, operator": lambda m, **k: arithmetic(m, **{"n": 12, "counterfactual": "operator", **k}),
    "arithmetic, noun": lambda m, **k: arithmetic(m, **{"n": 12, "operation": "subtraction", "template": "noun", **k}),
    "words": lambda m, **k: words(m, "capitals", **{"foils": 3, **k}),
    "words, partial": lambda m, **k: words(m, "english-french", **{"partial": True, "split": "test", **k}),
    "words, nothing shown": lambda m, **k: words(m, "antonyms", **{"shots": 0, **k}),
}


def tokens(model, ids) -> list[str]:
    return [model.tokenizer.decode([i]) for i in ids.tolist()]


def token(model, task, role: str, i: int) -> str:
    """The token at a role of a prompt, without its space."""
    return model.tokenizer.decode(task.ids[i, task.roles[role][i]]).strip()


# ------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", EVERY)
def test_a_task_is_the_text_it_shows(model, family):
    task, decode = EVERY[family](model), model.tokenizer.decode
    assert len(task) == len(task.prompts) == len(set(task.prompts)) and len(task) >= 12
    for i, prompt in enumerate(task.prompts):
        assert model.tokenizer(prompt).input_ids == task.ids[i].tolist()
        longer = torch.cat([task.ids[i], task.answers[i : i + 1]])
        assert model.tokenizer(decode(longer)).input_ids == longer.tolist(), "the answer is another token in its place"
    assert len({*task.answers.tolist()}) > 1
    assert all(len({*row.tolist()}) == task.foils.shape[1] for row in task.foils), "a foil stands there twice"
    assert torch.equal(task.roles["END"], torch.full((len(task),), task.ids.shape[1] - 1))


@pytest.mark.parametrize("family", EVERY)
def test_a_seed_makes_a_task(model, family):
    one, same, other = EVERY[family](model, seed=1), EVERY[family](model, seed=1), EVERY[family](model, seed=2)
    for key in ("ids", "corrupted", "answers", "foils"):
        assert torch.equal(getattr(one, key), getattr(same, key))
    assert one.prompts == same.prompts and one.dropped == same.dropped
    assert not torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("n", [0, -1, True, 2.5])
def test_a_number_of_prompts_is_a_whole_number_from_one(model, family, n):
    with pytest.raises(ValueError, match="prompts asked for: expected a whole number from 1"):
        EVERY[family](model, n=n)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: ioi(m, corruption="ABC"), "no corruption of ioi 'ABC'.* Known: flip, abc"),
        (lambda m: ioi(m, template=99), "no template of ioi 99"),
        (lambda m: colored_objects(m, foils="two"), "no foils of colored_objects 'two'.* Known: twin, both"),
        (lambda m: arithmetic(m, operation="adition"), "no operation 'adition'. Did you mean 'addition'"),
        (lambda m: arithmetic(m, template="symbol"), "no template of arithmetic 'symbol'. Did you mean 'symbols'"),
        (lambda m: arithmetic(m, counterfactual="operators"), "Did you mean 'operator"),
        (lambda m: words(m, "capital"), "no word task 'capital'. Did you mean 'capitals'"),
        (lambda m: words(m, "capitals", split="valid"), "no split 'valid'.* Known: train, test"),
        (lambda m: word_tasks("morfology"), "no family of word tasks 'morfology'. Did you mean 'morphology'"),
        (lambda m: word_pairs("antonym"), "Did you mean 'antonyms'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(model, make, words):
    with pytest.raises(LookupError, match=words):
        make(model)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: arithmetic(m, n=37), "37 prompts asked for, but there are 36: ask for at most 36"),
        (lambda m: arithmetic(m, shots=33), "shots=33: 36 calculations allow 0 to 32 examples"),
        (lambda m: arithmetic(m, largest=2), "largest=2: expected a whole number from 3"),
        (lambda m: words(m, "capitals", shots=0, n=1000), "1000 prompts asked for, but there are"),
        (lambda m: words(m, "capitals", shots=1, n=100_000), "100000 different prompts asked for, but only"),
        (lambda m: words(m, "capitals", shots=1000), "too few for 1000 examples; partial=True"),
        (lambda m: words(m, "capitals", shots=-1), "too few for -1 examples"),
        (lambda m: words(m, "capitals", foils=0), "foils=0: between 1 and"),
        (lambda m: words(m, "country-continent", foils=9), "foils=9: between 1 and 3 answers can be foils"),
    ],
)
def test_what_cannot_be_made_is_refused(model, make, words):
    with pytest.raises(ValueError, match=words):
        make(model)


def test_a_tokenizer_of_bytes_has_sums_but_no_words():
    assert len(arithmetic(BYTES)) == 36
    with pytest.raises(ValueError, match="one token for 0 of .* names"):
        ioi(BYTES)
    with pytest.raises(ValueError, match="one token for 0 of 17 objects"):
        colored_objects(BYTES)
    with pytest.raises(ValueError, match="words, capitals: this tokenizer leaves 0 pairs to ask"):
        words(BYTES, "capitals")


# --------------------------------------------------------------------------------------------------- base


def test_a_filled_template_knows_where_its_parts_are():
    text, spans = base.fill("a {x}, {y}!", x="one", y="three")
    assert text == "a one, three!" and {k: text[slice(*v)] for k, v in spans.items()} == {"x": "one", "y": "three"}


def test_single_tokens_are_told_from_pieces(model):
    kept, dropped = base.single(model, ["Mary", "leash"])
    assert kept == ["Mary"] and dropped == [("leash", "2 tokens")]
    assert base.single(BYTES, ["a", "ab"], lead="") == (["a"], [("ab", "2 tokens")])
    assert len(base.pieces(model.tokenizer, "A:", " Zagreb")) == 3


def test_what_a_tokenizer_cannot_do_is_dropped_with_its_reason(model):
    assert ("leash", "2 tokens") in colored_objects(model, 4).dropped
    assert ("Croatia: Zagreb", "the answer is 3 tokens") in words(model, "capitals").dropped


# ---------------------------------------------------------------------------------------------------- ioi


@pytest.mark.parametrize("template", range(len(SENTENCES)))
@pytest.mark.parametrize("corruption", ["flip", "abc"])
def test_ioi_has_its_names_where_the_roles_say(model, template, corruption):
    task = ioi(model, 10, template=template, corruption=corruption, seed=3)
    names = {model.tokenizer.decode(i).strip() for i in model.tokenizer(" ".join([""] + NAMES)).input_ids}
    for i, (io, s) in enumerate(zip(tokens(model, task.answers), tokens(model, task.foils[:, 0]))):
        io, s = io.strip(), s.strip()
        assert token(model, task, "IO", i) == io != s == token(model, task, "S1", i) == token(model, task, "S2", i)
        assert task.prompts[i].count(io) == 1 and task.prompts[i].count(s) == 2
        assert task.roles["S1+1"][i] == task.roles["S1"][i] + 1
        changed = (task.ids[i] != task.corrupted[i]).nonzero().flatten().tolist()
        where = sorted(int(task.roles[r][i]) for r in (("S2",) if corruption == "flip" else ("IO", "S1", "S2")))
        assert changed == where, "the twin differs elsewhere"
        new = [t.strip() for t in tokens(model, task.corrupted[i, where])]
        assert new == [io] if corruption == "flip" else len({*new, io, s}) == 5 and names >= {*new}


def test_ioi_is_balanced_in_every_even_slice(model):
    task = ioi(model, 20)
    abba = task.roles["IO"] < task.roles["S1"]
    assert abba.tolist() == [True, False] * 10
    assert len(ioi(model, 1)) == 1 and len(ioi(model, 7)) == 7


# ---------------------------------------------------------------------------------------- colored objects


@pytest.mark.parametrize("foils", ["twin", "both"])
def test_colored_objects_ask_for_what_stands_there(model, foils):
    task = colored_objects(model, 16, foils=foils)
    for i, prompt in enumerate(task.prompts):
        example, query = prompt.split("\nQ: ")
        asked = query.partition("What color is the ")[2].partition("?")[0]
        assert token(model, task, "query object", i) == token(model, task, "right object", i) == asked
        (answer,), wrong = tokens(model, task.answers[i : i + 1]), tokens(model, task.foils[i])
        colours = {role: token(model, task, f"{role} colour", i) for role in ("right", "foil", "other")}
        assert answer == f" {colours['right'].capitalize()}"
        assert wrong == [f" {colours[role].capitalize()}" for role in ("foil", "other")][: 1 + (foils == "both")]
        for role in colours:
            assert f" {colours[role]} {token(model, task, f'{role} object', i)}" in query
            assert task.roles[f"{role} object"][i] == task.roles[f"{role} colour"][i] + 1
        assert example.endswith(token(model, task, "example answer", i))
        changed = (task.ids[i] != task.corrupted[i]).nonzero().flatten().tolist()
        assert changed == [int(task.roles["query object"][i])]
        assert tokens(model, task.corrupted[i, changed])[0].strip() == token(model, task, "foil object", i)
        assert " a orange" not in prompt and (" an orange" in prompt) == ("orange" in prompt)


def test_every_place_in_the_question_is_asked_for(model):
    task = colored_objects(model, 60)
    assert len({*task.roles["right colour"].tolist()}) == 3


# --------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("counterfactual", ["operands", "operator"])
def test_sums_are_right_and_twins_share_nothing(model, operation, template, counterfactual):
    task = arithmetic(model, 12, operation=operation, template=template, counterfactual=counterfactual, shots=3)
    compute, *requests = OPERATIONS[operation]
    for i, prompt in enumerate(task.prompts):
        a, b = (int(token(model, task, f"operand {k}", i)) for k in (1, 2))
        answer = int(model.tokenizer.decode(task.answers[i]))
        assert compute(a, b) == answer and prompt.count("\n") == 3
        assert sorted(int(t) for t in tokens(model, task.foils[i])) == [k for k in range(10) if k != answer]
        assert token(model, task, "operator", i) in requests
        twin = model.tokenizer.decode(task.corrupted[i]).split("\n")
        numbers = [int(c) for c in twin[-1] if c.isdigit()]
        asked = [tuple(int(c) for c in line if c.isdigit()) for line in prompt.split("\n")]
        assert len(set(asked)) == 4 and all({*shown[:2]} != {a, b} for shown in asked[:-1]), "a calculation is repeated"
        assert asked[-1] == (a, b) and all(compute(*shown[:2]) == shown[2] for shown in asked[:-1])
        if counterfactual == "operands":
            assert twin[:-1] == prompt.split("\n")[:-1] and compute(*numbers) != answer
            assert numbers[0] != a and numbers[1] != b and answer not in numbers
            assert all({*shown[:2]} != {*numbers} for shown in asked[:-1]), "the twin's calculation is an example"
        else:
            left = [word for word in requests if word in " ".join(twin)]
            assert numbers == [a, b] and left == []
            assert task.ids[i, -1] == task.corrupted[i, -1]


@pytest.mark.parametrize(
    "operation, total", [("addition", 36), ("subtraction", 36), ("multiplication", 23), ("division", 23)]
)
def test_all_one_digit_calculations_are_asked_once(model, operation, total):
    task = arithmetic(model, operation=operation)
    assert len(task) == total == len({prompt.rpartition("\n")[2] for prompt in task.prompts})
    assert len(arithmetic(model, operation=operation, shots=0)) == total


# -------------------------------------------------------------------------------------------------- words


def parts(text: str) -> tuple[list[list[str]], str]:
    """(question, answer) of the examples, and the question asked."""
    *shown, asked = text.split("Q: ")[1:]
    return [part.strip().split("\nA: ") for part in shown], asked.removesuffix("\nA:")


@pytest.mark.parametrize("name", word_tasks())
def test_word_tasks_show_pairs_and_never_the_question(model, name):
    partial = name.startswith("english")
    task, pairs = words(model, name, n=20, partial=partial), dict(word_pairs(name))
    assert len(task) == 20
    for i, prompt in enumerate(task.prompts):
        shown, asked = parts(prompt)
        same, other = parts(model.tokenizer.decode(task.corrupted[i]))
        assert same == shown and len(shown) == 5 and all(pairs[x] == y for x, y in shown)
        assert asked != other and not {asked, other} & {x for x, _ in shown}
        given = {word for pair in shown for word in pair}
        assert pairs[asked] not in given and pairs[other] not in given, "an answer stands in the prompt"
        assert f" {pairs[asked]}".startswith(model.tokenizer.decode(task.answers[i]))
        assert f" {pairs[other]}".startswith(model.tokenizer.decode(task.foils[i, 0]))
        assert token(model, task, "query", i) == asked
        for k, (x, y) in enumerate(shown, start=1):
            assert token(model, task, f"example {k}", i) == x and y.endswith(token(model, task, f"label {k}", i))


def test_words_are_asked_once_before_they_come_again(model):
    task = words(model, "antonyms")
    assert sorted(parts(p)[1] for p in task.prompts) == sorted(x for x, _ in word_pairs("antonyms"))
    twice = words(model, "antonyms", n=2 * len(task))
    assert len({*twice.prompts}) == 2 * len(task)


def test_questions_come_from_their_split_and_examples_from_train(model):
    for name in ("capitals", "plurals"):
        train, test = (dict(word_pairs(name, split)) for split in ("train", "test"))
        assert not train.keys() & test.keys() and {**train, **test} == dict(word_pairs(name))
        for split, mine in (("train", train), ("test", test)):
            for prompt in words(model, name, n=15, split=split).prompts:
                shown, asked = parts(prompt)
                assert asked in mine and all(x in train for x, _ in shown)


def test_options_of_the_format(model):
    (prompt,) = words(model, "capitals", n=1, shots=0).prompts
    assert prompt.startswith("Q: ") and prompt.endswith("\nA:") and prompt.count("Q: ") == 1
    many = words(model, "capitals", n=5, foils=6)
    assert many.foils.shape == (5, 6)


def test_partial_answers_tell_the_options_apart(model):
    task = words(model, "english-german", partial=True)
    first = [model.tokenizer(f"A: {y}").input_ids[2] for _, y in word_pairs("english-german")]
    assert all(first.count(answer) == 1 for answer in task.answers.tolist())


def test_families_of_word_tasks():
    assert {"past-tense", "plurals"} <= set(word_tasks("morphology")) < set(word_tasks())
    assert len(word_tasks()) >= 15


def test_no_positions_are_refused_and_numpy_counts_are_counts():
    ids = torch.arange(12).view(3, 4)
    task = base.Task("hand", ids, torch.tensor([1, 2, 3]), torch.tensor([[9], [9], [9]]), ids + 1)
    with pytest.raises(LookupError, match="no positions are chosen.*END.*'all'"):
        task.at([])
    assert task[np.int64(1)].ids.tolist() == [[4, 5, 6, 7]]
    assert base.count("hand", np.int64(3), 5) == 3
