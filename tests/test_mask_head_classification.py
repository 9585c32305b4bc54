"""Notebook 51: the masked-word head, its prompts and its targets; and the script that prepares one behind a gate."""

import json
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cells import run_cells
from conftest import tiny
from torch.nn.functional import cross_entropy, gelu, layer_norm

import heads

DATA = Path(__file__).resolve().parents[1] / "data"
TEXTS = ["a red thing", "the blue one of them", "north"]


@pytest.fixture(scope="module")
def book():
    lm = tiny("bert")
    names = {"re": re, "heads": heads, "lm": lm, "cut": 2, "seed": 0, "batch": 2, "rate": 1e-2,
             "MASK": lm.tokenizer.mask_token,
             "ANCHOR": "", "SimpleNamespace": SimpleNamespace, "cross_entropy": cross_entropy, "gelu": gelu,
             "layer_norm": layer_norm}  # fmt: skip
    return types.SimpleNamespace(**run_cells("mask-head-classification", "mask", **names))


def test_the_head_reads_the_state_at_the_mask_and_nothing_else(book):
    prompts = [book.prompt(text) for text in TEXTS]
    body = book.body_of(book.lm, prompts)
    assert [len(places) for places in body.masks] == [1, 1, 1]
    w = book.fresh(body)
    together = book.at_masks([0, 1, 2], w, body)
    for row, text in enumerate(prompts):  # by hand, alone, through the whole model
        (place,) = body.masks[row]
        h = heads.embed(book.lm, [text]).tokens[0][place]
        x = gelu(h @ w["dense"].T + w["dense.bias"])
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * w["norm"] + w["norm.bias"]
        torch.testing.assert_close(together[row], x, atol=1e-4, rtol=1e-4)


def test_some_options_score_as_they_do_among_all_words(book):
    body = book.body_of(book.lm, [book.prompt(text) for text in TEXTS])
    w, options = book.fresh(body), torch.tensor([7, 3, 90])
    everything = book.at_masks([0, 1], w, body) @ body.table.T
    torch.testing.assert_close(book.scores([0, 1], w, options, body), everything[:, options].detach())


def test_tuning_says_the_piece_that_it_is_asked_for_and_leaves_the_model_alone(book):
    body = book.body_of(book.lm, [book.prompt(text) for text in TEXTS])
    before = {name: weight.clone() for name, weight in body.stack.weights.items()}
    options = torch.tensor([20, 30, 40])
    w = book.tune([(row, [int(options[row])]) for row in range(3)], 60, 0, body)
    assert book.scores([0, 1, 2], w, options, body).argmax(-1).tolist() == [0, 1, 2]
    assert all(torch.equal(body.stack.weights[name], weight) for name, weight in before.items())


class Halves:
    """A tokenizer that cuts words of more than five letters in two."""

    mask_token_id, mask_token = 103, "<mask>"

    def __init__(self):
        self.vocabulary = {self.mask_token: self.mask_token_id}

    def __call__(self, text, add_special_tokens=True):
        found = re.findall(r"<mask>|\w+|[^\w\s]", text)
        cut = [piece for w in found for piece in ((w[:5], "##" + w[5:]) if len(w) > 5 and w != "<mask>" else (w,))]
        return SimpleNamespace(input_ids=[self.vocabulary.setdefault(piece, 1000 + len(self.vocabulary)) for piece in cut])


def test_what_is_blanked_comes_back_in_order_and_the_rest_stays(book, monkeypatch):
    toy, text = Halves(), "the northernmost of all the settlements, seen"
    monkeypatch.setattr(book.lm, "tokenizer", toy)
    ids, seen = toy(text).input_ids, set()
    for seed in range(20):
        new, said = book.blanked(text, np.random.default_rng(seed))
        now = toy(new).input_ids
        hidden = [i for i, piece in enumerate(now) if piece == toy.mask_token_id]
        assert [ids[i] for i in hidden] == said and all(a == b for i, (a, b) in enumerate(zip(ids, now)) if i not in hidden)
        assert len(now) == len(ids) and new.count("<mask>") == len(said)
        seen |= set(hidden)
    assert seen == set(range(len(ids)))  # every piece has its turn, and a word of two pieces is hidden whole


def test_a_class_of_several_pieces_is_refused_by_name(book, monkeypatch):
    toy = Halves()
    monkeypatch.setattr(book.lm, "tokenizer", toy)
    assert book.piece("heart") == toy("heart").input_ids[0]
    with pytest.raises(ValueError, match="'digestion' is 2 pieces, not one: rename its class"):
        book.piece("digestion")


def test_every_fifth_prompt_has_another_target_and_the_others_are_shared(book):
    pairs, targets = [(2 * j, 2 * j + 1) for j in range(10)], {j: [j, j] for j in range(20)}
    mix = run_cells("mask-head-classification", "mix", lm=book.lm, targets=targets)["mixture"]
    answers, real, dummy = (mix(pairs, kind) for kind in ("answers", "real", "dummy"))
    other = [j for j in range(10) if real[j] != answers[j]]
    assert other == [0, 5] == [j for j in range(10) if dummy[j] != answers[j]]
    assert all(real[j] == (2 * j + 1, [2 * j + 1] * 2) for j in other)
    assert all(dummy[j] == (2 * j + 1, [book.lm.tokenizer.mask_token_id] * 2) for j in other)


@pytest.fixture(scope="module")
def prepare():
    sys.path.insert(0, str(DATA))
    try:
        import prepare
    finally:
        sys.path.remove(str(DATA))
    return prepare


def test_masks_hide_some_pieces_never_the_special_ones(prepare):
    for size in (3, 4, 20, 64):
        ids = list(range(1000, 1000 + size))
        new, at = prepare.masked(ids, 103, np.random.default_rng(size))
        assert at == sorted(set(at)) and 0 < at[0] and at[-1] < size - 1 and len(at) == max(1, round(0.15 * (size - 2)))
        assert new == [103 if i in at else piece for i, piece in enumerate(ids)] and ids[0] == 1000


def test_what_missed_its_gate_is_not_shipped(prepare):
    found = json.loads((DATA / "prepare.json").read_text(encoding="ascii"))
    assert found["gate"] == prepare.GATE == 0.35 and found["reached"] == (found["tuned"]["named"] >= prepare.GATE)
    assert (DATA / "minilm-mlm.safetensors").exists() == found["reached"]
