"""A trie allows what brute force allows, and what a model writes under it is a label."""

import pytest
import torch
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

import heads

END = 9
IDS = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)


def brute(labels, prefix, used):
    """Every next token of a label that begins with the prefix, read off the list."""
    whole = [[*ids, END] for name, ids in labels.items() if name not in used]
    return sorted({ids[len(prefix)] for ids in whole if ids[: len(prefix)] == list(prefix) and len(ids) > len(prefix)})


@given(st.lists(IDS, min_size=1, max_size=8, unique=True), st.lists(st.integers(0, 4), max_size=4), st.data())
def test_allowed_is_brute_force(sequences, prefix, data):
    labels = {str(i): ids for i, ids in enumerate(sequences)}
    used = data.draw(st.sets(st.sampled_from(sorted(labels))))
    trie = heads.Trie(labels, END)
    for start in (prefix, sequences[0], sequences[-1][:1], ()):
        assert trie.allowed(start, used) == brute(labels, start, used)
    for name, ids in labels.items():
        assert trie.read(ids) == trie.read([*ids, END, 3]) == name


def test_a_label_that_is_the_beginning_of_another():
    trie = heads.Trie({"red": [1], "red wine": [1, 2]}, END)
    assert trie.allowed([1]) == [2, END] and trie.allowed([1], {"red"}) == [2] and trie.allowed([1], "red wine") == [END]
    assert trie.allowed([1, 2]) == [END] and trie.allowed([1, 2, END]) == [] and trie.allowed([7]) == []
    assert trie.read([1, 2]) == "red wine" and trie.read([2]) is None and trie.read([]) is None
    assert trie.split([1, END, 1, 2]) == (["red"], [1, 2])


@pytest.mark.parametrize(
    "labels, words",
    [
        ({}, "needs labels"),
        ({"a": [1], "b": []}, "label 'b' has no tokens"),
        ({"a": [1, END]}, "label 'a' holds token 9, which ends a label"),
        ({"red": [1, 2], "Red": [1, 2]}, r"labels 'red' and 'Red' are the same tokens: \[1, 2\]"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        heads.Trie(labels, END)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_a_label(seed):
    """With transformers' own generate, on a random model, which without the trie writes none."""
    model = heads.load("tiny-llama", device="cpu", seed=seed)
    end = model.tokenizer.eos_token_id
    names = ["red", "red wine", "green", "grey", "blue"]
    ids = {name: model.tokenizer(name, add_special_tokens=False).input_ids for name in names}
    trie, prompt = heads.Trie(ids, end), model.ids("colour: ")
    settings = dict(max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    free = model._module.generate(prompt, **settings)[0, prompt.shape[1] :].tolist()
    assert trie.read(free) is None
    one = model._module.generate(prompt, prefix_allowed_tokens_fn=trie.constraint(prompt.shape[1]), **settings)
    assert trie.read(one[0, prompt.shape[1] :].tolist()) in names


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 5, 9])
def test_several_labels_are_written_and_none_twice(seed, most):
    model = heads.load("tiny-llama", device="cpu", seed=seed)
    names = ["a", "ab", "b", "ca", "cb"]
    semicolon, end = model.tokenizer(";", add_special_tokens=False).input_ids[0], model.tokenizer.eos_token_id
    trie = heads.Trie({name: model.tokenizer(name, add_special_tokens=False).input_ids for name in names}, semicolon)
    prompt = model.ids("which: ")
    rule = trie.constraint(prompt.shape[1], most, stop=end)
    out = model._module.generate(
        prompt, prefix_allowed_tokens_fn=rule, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0
    )[0, prompt.shape[1] :].tolist()
    assert out[-1] == end or out.index(end) > 0
    done, open_ = trie.split(out[: out.index(end)])
    assert not open_ and 1 <= len(done) <= min(most, len(names))
    assert set(done) <= set(names) and len(set(done)) == len(done)


def test_labels_in_other_scripts():
    model, names = tiny("llama"), ["東京", "東京都", "Ω"]
    trie = heads.Trie({n: model.tokenizer(n, add_special_tokens=False).input_ids for n in names}, model.tokenizer.eos_token_id)
    prompt = model.ids("où: ")
    out = model._module.generate(prompt, prefix_allowed_tokens_fn=trie.constraint(prompt.shape[1]), max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    assert trie.read(out[0, prompt.shape[1] :].tolist()) in names
