"""Texts as vectors are plain transformers', and the upper layers give what the whole model gives."""

import copy

import pytest
import torch
from conftest import ENCODERS, near, tiny
from transformers import AutoModel

import heads
from heads.lab import embedding
from heads.model import load, zoo

TEXTS = ["a baker", "wine", "nuclear engineers of the north", "東京 タワー", "Ω"]
CUTS = ("bert", "distilbert", "modernbert", "roberta", "gpt2", "llama", "gemma3", "mistral", "opt", "gpt-neox", "mixtral")


def plain_states(model, text) -> torch.Tensor:
    """Last hidden states `[position, d_model]` of one text, by transformers' own eager attention on a copy of the module."""
    module = copy.deepcopy(model._module)
    module.set_attn_implementation("eager")
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return getattr(module, "base_model", module)(input_ids=ids).last_hidden_state[0]


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "electra", "llama", "gemma3", "opt"])
def test_vectors_are_those_of_plain_transformers(family):
    model = tiny(family)
    found, one = heads.embed(model, TEXTS, batch=2), heads.embed(model, TEXTS, pool="cls")
    for i, text in enumerate(TEXTS):
        states = plain_states(model, text)
        near(found.tokens[i], states)
        near(found.pooled[i], states.mean(0))
        near(one.pooled[i], states[0])


def test_an_edit_takes_part():
    model = tiny("bert")
    cut = heads.ablate(model, [(1, 2)])
    module = copy.deepcopy(model._module)
    weight = module.bert.encoder.layer[1].attention.output.dense.weight
    with torch.no_grad():
        weight[:, 16:24] = 0  # the columns of head 2, of 4 heads of 8
        ids = model.tokenizer(TEXTS[0], return_tensors="pt").input_ids
        expected = module.bert(input_ids=ids).last_hidden_state[0].mean(0)
    near(heads.embed(cut, TEXTS[:1]).pooled[0], expected)
    assert (heads.embed(model, TEXTS[:1]).pooled[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", CUTS)
def test_the_upper_layers_give_what_the_whole_model_gives(family):
    model = tiny(family)
    whole = heads.embed(model, TEXTS)
    forwards = [layer._module.__dict__.get("forward") for layer in model.layers]
    stack = heads.upper_stack(model, TEXTS, cut=2, batch=2)
    assert len(stack) == len(TEXTS) and stack.worst <= 1e-5
    rows = [3, 0, 2]
    hidden, mask = stack(rows)
    for i, row in enumerate(rows):
        n = len(whole.tokens[row])
        assert mask[i].sum() == n
        near(hidden[i, :n], whole.tokens[row])
    near(stack.pooled(rows).detach(), whole.pooled[rows])
    near(stack.pooled(rows, pool="cls").detach(), heads.embed(model, TEXTS, pool="cls").pooled[rows])
    assert [layer._module.__dict__.get("forward") for layer in model.layers] == forwards
    assert torch.equal(heads.embed(model, TEXTS).pooled, whole.pooled), "traces go on as before"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_trained_weights_are_the_same_as_training_those_layers_of_the_whole_model(family):
    """Three steps of plain gradient descent, here and on a copy of the module."""
    model, module = tiny(family), copy.deepcopy(tiny(family)._module)
    before = {name: p.clone() for name, p in model._module.named_parameters()}
    stack = heads.upper_stack(model, TEXTS, cut=3)
    ours = stack.fresh()
    body = module.base_model
    theirs = {name: p for name, p in body.named_parameters() if name in ours}
    assert set(theirs) == set(ours)
    target = torch.randn(len(TEXTS), model.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    for p in theirs.values():
        p.requires_grad_(True)
    for _ in range(3):
        mine = (stack.pooled(range(len(TEXTS)), ours) - target).square().mean()
        states = [body(input_ids=model.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0].mean(0) for text in TEXTS]
        other = (torch.stack(states) - target).square().mean()
        near(mine, other)
        for loss, weights in ((mine, ours), (other, theirs)):
            for p, grad in zip(weights.values(), torch.autograd.grad(loss, weights.values())):
                p.data -= 0.1 * grad
    for name, weight in ours.items():
        near(weight, theirs[name], scale=4)
    assert any((ours[name] - stack.weights[name]).abs().max() > 1e-4 for name in ours)
    assert all(torch.equal(p, before[name]) for name, p in model._module.named_parameters()), "the model itself was trained"


def test_the_stack_owns_the_layers_above_the_cut_and_the_final_norm_alone():
    assert {name.split(".")[2] for name in heads.upper_stack(tiny("bert"), TEXTS, 2).weights} == {"2", "3"}
    assert {".".join(name.split(".")[:2]) for name in heads.upper_stack(tiny("llama"), TEXTS, 3).weights} == {"layers.3", "norm.weight"}


def test_what_cannot_be_is_refused():
    model, stack = tiny("bert"), heads.upper_stack(tiny("bert"), TEXTS, 2)
    with pytest.raises(ValueError, match="text 1 .*600 tokens|text 1 .*more than the 512"):
        heads.embed(model, ["a", "b" * 600])
    with pytest.raises(ValueError, match="text 1 is empty"):
        heads.embed(model, ["a", " "])
    with pytest.raises(TypeError, match="a list of strings, got one string"):
        heads.embed(model, "a baker")
    with pytest.raises(TypeError, match="text 0 is int"):
        heads.embed(model, [3])
    for cut in (0, 4, -1):
        with pytest.raises(ValueError, match=f"cut={cut}.*1 to 3"):
            heads.upper_stack(model, TEXTS, cut)
    with pytest.raises(ValueError, match="leave the edits out"):
        heads.upper_stack(heads.ablate(model, [(0, 0)]), TEXTS, 2)
    with pytest.raises(LookupError, match="no weight above the cut 'encoder.layer.0"):
        stack([0], {"encoder.layer.0.output.dense.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no rows"):
        stack([])


def test_layers_that_do_not_give_what_the_whole_model_gives_are_refused(monkeypatch):
    """As those of a model whose upper layers take more from below than the stream."""
    monkeypatch.setattr(embedding, "_instead", lambda args, kwargs, states: ((states * 1.1, *args[1:]), kwargs))
    with pytest.raises(ValueError, match="do not give what this llama model gives"):
        heads.upper_stack(tiny("llama"), TEXTS, 2)


# ------------------------------------------------------------------------- encoders without a word head


def headless(family, folder) -> str:
    module, tokenizer = heads.model.tiny.build(family, whole=False)
    module.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_without_a_word_head_has_the_same_layers(family, tmp_path):
    model, whole = heads.load(headless(family, tmp_path), device="cpu"), tiny(family)
    assert model.anatomy == whole.anatomy
    ids = model.ids("two owls")
    with model.trace(ids):
        bare = model.layers[2].attn.heads.save()
    with whole.trace(ids):
        full = whole.layers[2].attn.heads.save()
    near(bare, full)
    near(heads.embed(model, TEXTS).pooled, heads.embed(whole, TEXTS).pooled)
    near(heads.upper_stack(model, TEXTS, 2).pooled([1, 2]).detach(), heads.embed(whole, TEXTS).pooled[1:3])
    with pytest.raises(ValueError, match="no head that predicts words"):
        with model.trace(ids):
            model.logits.save()


def test_a_module_without_a_word_head_is_wrapped(tmp_path):
    folder = headless("bert", tmp_path)
    model = load.wrap(AutoModel.from_pretrained(folder), tiny("bert").tokenizer)
    near(heads.embed(model, TEXTS).pooled, heads.embed(tiny("bert"), TEXTS).pooled)


def test_minilm_is_what_the_zoo_says():
    model = heads.load("minilm", device="cpu")
    assert str(model.anatomy) == "bert: 6 layers x 12 heads, d_head 32" and model.anatomy.encoder
    assert model.record["sha256"] == zoo.ZOO["minilm"].sha256
    assert {file.name for file in zoo.fetch("minilm").iterdir()} == {*zoo.FILES, zoo.RECORD}
    texts = ["A man is eating food.", "A man eats a meal.", "The girl carries a baby.", "eine Bäckerin", "東京"]
    found = heads.embed(model, texts)
    for i, text in enumerate(texts):
        assert (found.tokens[i] - plain_states(model, text)).abs().max() < 1e-5  # of numbers up to 3
        assert (found.pooled[i] - plain_states(model, text).mean(0)).abs().max() < 1e-6
    near = torch.nn.functional.cosine_similarity(found.pooled[:1], found.pooled[1:])
    assert near.argmax() == 0 and near[0] > 0.7
    assert heads.upper_stack(model, texts, 4).worst <= 1e-5
    assert len(model.tokenizer("word " * 300).input_ids) == 302, "nothing is cut off in silence"

