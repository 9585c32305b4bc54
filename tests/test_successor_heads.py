"""Notebook 12: its lists are the tokens of the lists, its prompts and twins are what they say, and its controls keep the order's shape."""

import types
from statistics import mode

import pytest
import torch
from cells import run_cells
from transformers import AutoTokenizer

import heads
import heads.model.tiny
from heads.tasks.base import Item, build, fill, pieces, single, spaced

NAMES = {f.__name__: f for f in (mode, Item, build, fill, pieces, single, spaced)}


def book_of(tokenizer):
    lm = types.SimpleNamespace(tokenizer=tokenizer)  # lists and prompts need no more of a model
    return types.SimpleNamespace(**run_cells("successor-heads", "lists", lm=lm, **NAMES))


@pytest.fixture(scope="module")
def book():
    """With the default model's tokenizer."""
    return book_of(AutoTokenizer.from_pretrained(heads.models.fetch()))


def tokens(book, ids) -> list[str]:
    return [book.lm.tokenizer.decode([i]) for i in ids.tolist()]


def token(book, task, role: str, i: int) -> str:
    """The token at a role of a prompt, without its space."""
    return book.lm.tokenizer.decode(task.ids[i, task.roles[role][i]]).strip()


def test_lists_are_the_tokens_of_the_list(book):
    found = book.succession_lists(least=1)
    assert len(found) == len({(f.name, f.form) for f in found}) and sum(len(f.pairs) for f in found) > 200
    for one in found:
        whole, cyclic = book.LISTS[one.name], one.name.startswith(("day", "month"))
        assert tokens(book, one.ids) == list(one.texts)
        for text, place in zip(one.texts, one.index.tolist()):
            assert text.strip().lower() == whole[place].lower() and text.startswith(" ") == one.form.startswith("space")
            assert (text.strip() == whole[place]) != ("flipped" in one.form) or not text.strip().isalpha()
        for a, b in one.pairs.tolist():
            step = int(one.index[b] - one.index[a])
            assert step == 1 or (cyclic and step == 1 - len(whole))
    days = next(f for f in found if (f.name, f.form) == ("days", "space"))
    assert days.pairs.tolist() == [[i, (i + 1) % 7] for i in range(7)]
    assert all(len(f.pairs) >= 4 for f in book.succession_lists())


def test_a_tokenizer_of_bytes_has_numbers_and_letters_alone():
    book = book_of(heads.model.tiny.tokenizer(whole=False))
    assert {found.name for found in book.succession_lists()} == {"numbers", "letters"}
    assert len(book.succession("numbers")) == 6
    with pytest.raises(ValueError):
        book.succession("days")


@pytest.mark.parametrize("name", ["numbers", "number words", "ordinals", "days", "months", "month prefixes", "letters"])
@pytest.mark.parametrize("corruption", ["window", "shuffled"])
def test_the_answer_is_the_next_of_the_list(book, name, corruption):
    task, whole = book.succession(name, corruption=corruption), list(book.LISTS[name])
    assert len(task) == len(set(task.prompts)) and len({*task.answers.tolist()}) > 1
    for i, prompt in enumerate(task.prompts):
        assert book.lm.tokenizer(prompt).input_ids == task.ids[i].tolist()
        longer = torch.cat([task.ids[i], task.answers[i : i + 1]])
        assert book.lm.tokenizer(book.lm.tokenizer.decode(longer)).input_ids == longer.tolist()
        shown = prompt.strip().rstrip(",").split(", ")
        after = whole[(whole.index(shown[-1]) + 1) % len(whole)]
        assert book.lm.tokenizer.decode(task.answers[i]).strip() == after
        assert [token(book, task, f"element {k}", i) for k in (1, 2, 3)] == shown[:3]
        assert token(book, task, "last", i) == shown[3]
        options = {t.strip() for t in tokens(book, task.foils[i])}
        assert after not in options and len(options) == task.foils.shape[1] and {*shown} <= options <= {*whole}
        twin = book.lm.tokenizer.decode(task.corrupted[i]).strip().rstrip(",").split(", ")
        in_order = [whole[(whole.index(x) + 1) % len(whole)] == y for x, y in zip(twin, twin[1:])]
        assert after not in twin or corruption == "window"
        if corruption == "window":
            assert all(in_order) and twin[-1] != shown[-1]
        else:
            assert not any(in_order) and twin[-1] == shown[-1]


def test_lists_that_go_round_go_round_and_others_end(book):
    assert len(book.succession("days")) == 7 and len(book.succession("months")) == 12
    assert len(book.succession("letters")) == 22
    assert len(book.succession("letters", length=2, n=5)) == 5
    both = book.succession(["days", "letters"])
    assert len(both) == 29 and both.foils.shape[1] == 6  # as many as the shorter list allows
    assert torch.equal(both.ids, book.succession(["days", "letters"]).ids)
    assert not torch.equal(both.ids, book.succession(["days", "letters"], seed=1).ids)


def test_other_maps_keep_the_shape_of_the_order():
    counting = {"open": (torch.tensor([10, 17, 31]), torch.tensor([[0, 1], [1, 2]])),
                "cyclic": (torch.tensor([77, 80, 91, 103]), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]))}  # fmt: skip
    relabelled = run_cells("successor-heads", "maps", counting=counting)["relabelled"]
    shuffled = relabelled("permutation", seed=3)
    for name, (ids, pairs) in counting.items():
        assert torch.equal(shuffled[name][0], ids) and shuffled[name][1].shape == pairs.shape
        assert (shuffled[name][1][:, 0] != shuffled[name][1][:, 1]).all()
        assert torch.equal(relabelled("predecessor")[name][1], pairs.flip(1))
    follow = dict(shuffled["cyclic"][1].tolist())
    walk = [0]
    while follow[walk[-1]] not in walk:
        walk.append(follow[walk[-1]])
    assert len(walk) == 4, "a permuted cycle is one cycle"
