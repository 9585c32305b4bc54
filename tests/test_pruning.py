"""Heads removed for good: what plain transformers loads is the ablated model; smaller where it can be."""

import pytest
import torch
from conftest import CORE, fresh, ids_of, logits_of, near, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import heads
from heads.lab.pruning import _copy

SOME = [(0, 1), (2, 3), (2, 0), (3, 2)]


def group(model, layer, which=1):
    """The query heads of a key-value head."""
    per = model.anatomy.n_heads // model.anatomy.n_kv_heads
    return [(layer, which * per + i) for i in range(per)]


def loaded(model, folder):
    kind = AutoModelForMaskedLM if model.anatomy.encoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("alike", [False, True])
def test_what_is_saved_is_the_ablated_model(family, alike, tmp_path):
    model = tiny(family)
    gone = sum((group(model, layer, layer % 2) for layer in range(model.anatomy.n_layers)), []) if alike else SOME
    before, ids = logits_of(model, ids_of(model, 14, 2)), ids_of(model, 14, 2)
    pruned = heads.prune(model, gone)
    assert sorted(pruned.removed + pruned.zeroed) == sorted(gone)
    with torch.no_grad():
        found = loaded(model, pruned.save(tmp_path / "small"))(ids).logits
    wanted = logits_of(heads.ablate(model, gone), ids)
    near(found, wanted)
    assert (wanted - before).abs().max() > 1e-3
    near(logits_of(model, ids), before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral", "phi3"])
def test_heads_that_every_layer_loses_are_gone(family, tmp_path):
    model = tiny(family)
    n = model.anatomy.n_layers
    gone = sum((group(model, layer) for layer in range(n)), []) + [(2, 0)]
    pruned = heads.prune(model, gone)
    assert pruned.zeroed == [(2, 0)] and len(pruned.removed) == n * len(group(model, 0))
    pruned.save(tmp_path / "small")
    small = heads.load(str(tmp_path / "small"), device="cpu")
    assert small.anatomy.n_kv_heads == model.anatomy.n_kv_heads - 1
    size = [sum(p.numel() for p in m.parameters()) for m in (model._module, small._module)]
    d, hidden, per = model.anatomy.d_head, model.anatomy.d_model, len(group(model, 0))
    biases = sum(p.shape[0] for name, p in model._module.named_parameters() if "self_attn" in name and name.endswith("bias"))
    assert size[0] - size[1] >= n * (2 * per + 2) * d * hidden and (biases or size[0] - size[1] == n * (2 * per + 2) * d * hidden)
    ids = ids_of(model, 14)
    near(logits_of(small, ids), logits_of(heads.ablate(model, gone), ids))


def test_a_layer_may_lose_all_its_heads(llama, tmp_path):
    gone = [(1, head) for head in range(4)]
    pruned = heads.prune(llama, gone)
    assert not pruned.removed and pruned.zeroed == gone
    every = heads.prune(llama, [(layer, head) for layer in range(4) for head in range(4)])
    assert len(every.removed) == 8 and len(every.zeroed) == 8


@pytest.mark.parametrize(
    ("heads_of", "error", "words"),
    [([], ValueError, "no heads"), ([(9, 0)], (IndexError, ValueError), "9"), ([(0, 9)], (IndexError, ValueError), "9")],
)
def test_heads_that_are_not_there(llama, heads_of, error, words):
    with pytest.raises(error, match=words):
        heads.prune(llama, heads_of)


def test_edits_are_no_weights(llama, tmp_path):
    with pytest.raises(ValueError, match="an edited model"):
        heads.prune(heads.ablate(llama, [(0, 0)]), [(0, 1)])
    pruned = heads.prune(llama, [(0, 1)])
    pruned.save(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        pruned.save(tmp_path)


def test_how_it_generates_is_kept():
    model = fresh("llama")
    model._module.generation_config.eos_token_id = [2, 7]
    assert heads.prune(model, [(0, 0)]).module.generation_config.eos_token_id == [2, 7]


def test_half_precision_leaves_rotary_frequencies(tmp_path):
    tiny("llama")._module.save_pretrained(tmp_path / "m")
    tiny("llama").tokenizer.save_pretrained(tmp_path / "m")
    model = heads.load(str(tmp_path / "m"), device="cpu", dtype="bfloat16")
    copy = _copy(model, [(0, 0)], [])
    assert copy.model.rotary_emb.inv_freq.dtype == torch.float32 and copy.lm_head.weight.dtype == torch.bfloat16


def test_a_family_whose_copy_is_not_the_ablated_model_is_refused(llama, monkeypatch):
    monkeypatch.setattr("heads.lab.pruning._copy", lambda model, gone, removed: _copy(model, [], []))  # forgets to remove
    with pytest.raises(ValueError, match="llama model without these heads is not the ablated one.*cannot be pruned"):
        heads.prune(llama, [(0, 1)])
