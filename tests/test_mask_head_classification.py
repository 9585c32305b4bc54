"""Notebook 51: the masked-word head, its prompts and its targets; and the script that prepares one behind a gate."""

import json
import re
import runpy
import sys
import types
from hashlib import sha256
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


@pytest.mark.parametrize("share", [0.1, 0.15, 0.2, 0.25, 0.4, 0.7, 1])
def test_the_share_of_another_target_is_what_was_asked_for(book, share):
    pairs, targets = [(2 * j, 2 * j + 1) for j in range(400)], {j: [j] for j in range(800)}
    mixture = run_cells("mask-head-classification", "mix", lm=book.lm, targets=targets)["mixture"]
    other = [j for j, (row, _) in enumerate(mixture(pairs, "dummy", share)) if row == 2 * j + 1]
    assert len(other) == round(400 * share) and other[0] == 0
    assert len(set(np.diff(other))) <= 2  # evenly apart


def test_each_task_has_its_turn_with_another_target(book):
    """The mixes must not differ in which task has fewer answers."""
    tasks = {f"task {k}": ([[f"text {k}"] * 3], None) for k in range(5)}
    space = {"tunings": 1, "tuning_steps": 50, "batch": 10, "test_each": 1, "tuning_tasks": list(tasks), "seed": 0,
             "shares": [0.2], "data": tasks, "words": {task: ["word"] for task in tasks}, "prompts": [], "targets": [],
             "pieces": {task: [k] for k, task in enumerate(tasks)}, "prompt": book.prompt, "other": book.other,
             "blanked": lambda text, rng: None}  # fmt: skip
    space = run_cells("mask-head-classification", "draws", **space)
    asked = [space["targets"][row][0] for row, _ in space["drawn"][0]]
    assert np.bincount(asked).tolist() == [100] * 5  # each as often as any
    assert np.bincount(asked[::5], minlength=5).min() >= 10  # 20 expected, and once all of them were of one


def test_a_class_with_too_few_short_texts_is_refused_by_name(book):
    names = {"json": json, "sha256": sha256, "heads": heads, "lm": book.lm, "seed": 0, "label_words": "letters", "RENAMED": {},
             "longest": 4, "test_each": 6, "shots": [1, 16], "curve_tasks": ["sector"], "tuning_tasks": [], "families": [],
             "piece": lambda word: ord(word)}  # fmt: skip
    with pytest.raises(ValueError, match="longest: 'administration' of sector has .* at most 4 pieces, not 22"):
        run_cells("mask-head-classification", "texts", **names)


DRILL = runpy.run_path(str(Path(__file__).parent / "drills" / "mask_head_classification.py"))
PURE = {name: DRILL["WRONG"][i] for i, name in ((0, "not_one_piece"), (2, "dummy_targets"))}
MORE = [
    ("def not_one_piece(w, t):\n    return [x for x in w if len(t(x)) > 1]", "a word of no pieces"),
    ("def not_one_piece(w, t):\n    return [x for x in w if not t(x) or any('##' in p for p in t(x))]", "'x-ray' is three"),
    ("def dummy_targets(ids, places, mask):\n    return [ids[i] if i in places else -100 for i in range(len(ids))]",
     "that is the real masked-word target"),
    ("def dummy_targets(ids, places, mask):\n    return [103 if i in places else -100 for i in range(len(ids))]", "expected"),
    ("def dummy_targets(ids, places, mask):\n    return [mask if i % 2 else -100 for i in range(len(ids))]", "expected"),
]  # fmt: skip


@pytest.mark.parametrize("answer, words", [*PURE.values(), *MORE, ("def not_one_piece(w, t):\n    pass", None),
                                           ("def dummy_targets(i, p, m):\n    pass", None)])  # fmt: skip
def test_a_check_names_what_is_wrong(answer, words, capsys):
    names = {name: lambda *_: ... for name in ("not_one_piece", "other_words", "dummy_targets")}
    names |= {"words": {0: []}, "first": 0, "MASK": "[MASK]"}
    exec(answer, names)
    if words is None:  # a forgotten return
        run_cells("mask-head-classification", "check", **names)
        assert capsys.readouterr().out.count("nothing to check yet") == 3
    else:
        with pytest.raises(AssertionError, match=re.escape(words)):
            run_cells("mask-head-classification", "check", **names)


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


def test_two_classes_of_the_same_piece_are_refused(book):
    names = {"json": json, "sha256": sha256, "heads": heads, "lm": book.lm, "seed": 0, "label_words": "letters", "RENAMED": {},
             "longest": 200, "test_each": 1, "pool_each": 1, "shots": [1], "curve_tasks": ["sector"], "tuning_tasks": [],
             "families": [], "piece": lambda word: 7}  # fmt: skip
    with pytest.raises(ValueError, match="two classes of a task have the same word"):
        run_cells("mask-head-classification", "texts", **names)
