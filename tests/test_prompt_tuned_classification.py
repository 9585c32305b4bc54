"""Notebook 52: its packed layers against the whole model, its writing against transformers' own, its F1 against scikit-learn's."""

from difflib import SequenceMatcher

import numpy as np
import pytest
import torch
from cells import run_cells
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold
from transformers.cache_utils import DynamicCache

import heads

SLUG, ROOM, STOP = "prompt-tuned-classification", 7, 203
LABELS = ["ab", "abc", "xy"]
TREE = heads.Trie({"ab": [10, 11], "abc": [10, 11, 12], "xy": [40]}, end=31)


@pytest.fixture(scope="module")
def book():
    lm = heads.load("tiny-llama", dtype="float32")
    module = lm._module.requires_grad_(False)
    names = dict(
        module=module, layers=list(module.model.layers), norm=module.model.norm, unembed=module.lm_head, place=torch.device("cpu"),
        embedding=module.get_input_embeddings(), rotary=module.model.rotary_emb, cut=2, DynamicCache=DynamicCache, room=ROOM,
        STOP=STOP, LABELS=LABELS, tokenizer=lm.tokenizer, shrinking=TREE.constraint(0, most=3, stop=STOP), seed=0, test_texts=30,
        resamples=20, gold=np.zeros((30, 3), bool), SequenceMatcher=SequenceMatcher,
    )  # fmt: skip
    space = run_cells(SLUG, "layers", **names)
    return space | run_cells(SLUG, "measure", **space)


ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


def test_texts_end_to_end_are_texts_alone(book):
    ours = book["above"](book["below"](ROWS, size=2))
    for row, states in zip(ROWS, ours):
        assert torch.allclose(states, book["module"].model(torch.tensor([row]))[0][0], atol=1e-5)


def test_a_prompt_is_seen_by_all_and_sees_none(book):
    states, prompt = book["below"](ROWS), torch.randn(4, book["embedding"].weight.shape[1], generator=torch.Generator().manual_seed(0))
    together = book["above"](states, prompt)
    for one, s, without in zip(together, states, book["above"](states)):
        assert torch.allclose(one, book["above"]([s], prompt)[0], atol=1e-5)
        assert not torch.allclose(one, without, atol=1e-3)


def test_above_the_embeddings_a_prompt_of_tokens_is_the_tokens(book, monkeypatch):
    monkeypatch.setitem(book["above"].__globals__, "cut", 0)
    prompt = book["embedding"](torch.tensor([20, 21, 22]))
    ours = book["above"](book["below"](ROWS), prompt)
    for row, states in zip(ROWS, ours):
        whole = book["module"].model(torch.tensor([[20, 21, 22, *row]]))[0][0]
        assert torch.allclose(states, whole[3:], atol=1e-5)


@pytest.mark.parametrize("before", [[], [50, 51, 52]])
@pytest.mark.parametrize("held", [False, True])
def test_writing_is_transformers_own(book, before, held):
    allow = TREE.constraint(0, most=3, stop=STOP) if held else None
    ours = book["write"](ROWS, before, allow=allow)
    for row, ids in zip(ROWS, ours):
        given = torch.tensor([[*before, *row]])
        more = {"prefix_allowed_tokens_fn": TREE.constraint(given.shape[1], most=3, stop=STOP)} if held else {}
        whole = book["module"].generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=ROOM, eos_token_id=STOP, pad_token_id=STOP, **more)  # fmt: skip
        assert ids == whole[0, given.shape[1] :].tolist()


def test_along_the_tree_nothing_is_invalid_and_nothing_twice(book):
    for ids in book["write"](ROWS, allow=book["shrinking"]):
        labels, begun = TREE.split(ids)
        assert len(set(labels)) == len(labels) and set(labels) <= set(LABELS)


def test_an_answer_leaves_the_tree_or_stays(book):
    assert not book["leaves"]([10, 11, 31, STOP]) and not book["leaves"]([40, 31, 10, 11, 12, 31, STOP])
    assert book["leaves"]([10, 11, 31]) and book["leaves"]([40, 31, 40, 31, STOP]) and book["leaves"]([STOP]) and book["leaves"]([10, 31, STOP])


def test_f1_is_that_of_scikit_learn(book):
    draw = np.random.default_rng(0)
    chosen, truth = draw.random((30, 3)) < 0.4, draw.random((30, 3)) < 0.3
    weights = draw.integers(0, 3, (2, 30))
    ours = book["f1_of"](chosen, truth, weights)
    for found, w in zip(ours, weights):
        assert found == pytest.approx(f1_score(truth, chosen, average="macro", sample_weight=w, zero_division=0))


def test_an_invalid_string_is_mended_to_the_nearest_letters(book):
    assert book["mended"](["abc", "xyz"]) == ["abc", "xy"]


def test_a_label_of_one_company_and_one_of_nobody(book):
    names = {**book, "clone": clone, "LogisticRegression": LogisticRegression, "KFold": KFold}
    names |= {"ids_train": [], "train_labels": [], "below": list}  # no company is read here
    names = run_cells(SLUG, "rivals", **names)
    x, y = np.random.default_rng(0).normal(size=(12, 3)), np.zeros((12, 3), bool)
    y[0, 0] = y[::2, 1] = True
    for kind, values in (("LinearHead", [1.0, 10.0]), ("Neighbours", [1, 3])):
        chance = names["tuned"](names[kind], values, x, y)[1].chance(x)
        assert chance.shape == (12, 3) and np.isfinite(chance).all() and not chance[:, 2].any(), kind
