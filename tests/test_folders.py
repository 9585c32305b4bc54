"""Loading a folder: what is read is what was hashed, every weight is from the file, nothing that comes with it runs."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from conftest import fresh, ids_of, logits_of, plain_logits, tiny
from safetensors.torch import load_file, save_file

import heads
import heads.model.tiny
from heads.model import folders, zoo


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "mine"
    module, tokenizer = heads.model.tiny.build("llama", seed=3, whole=False)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADS_HOME", str(tmp_path / "home"))
    return shutil.copytree(saved, tmp_path / "mine")


def config(folder, **changes):
    """Change the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights(folder, change):
    """Change the folder's weights in place."""
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})


def load(folder):
    return heads.load(str(folder), device="cpu")


# ------------------------------------------------------------------------------------------ our attention, always


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["eager", "sdpa", "someone/kernels"])
def test_a_config_cannot_switch_our_attention_off(folder, key, value):
    config(folder, **{key: value})
    model, ids = load(folder), ids_of(tiny("llama"))
    assert model._module.config._attn_implementation == "heads"
    with torch.no_grad(), model.trace(ids):
        model.layers[1].attn.pattern[:] = 0
        edited = model.logits.save()
    assert (edited - plain_logits(model, ids)).abs().max() > 0.1


def test_a_pattern_whose_edit_is_lost_fails_at_loading(folder, monkeypatch):
    """The identity itself: with transformers' attention in place of ours the edit reaches nothing."""
    monkeypatch.setattr(heads.model.load.attention, "NAME", "sdpa")
    with pytest.raises(ValueError, match="zeroing the patterns of all layers is not zeroing their heads"):
        load(folder)


# ------------------------------------------------------------------------------------------ code that comes along

EVIL = "import pathlib; pathlib.Path({!r}).touch()\nfrom transformers import LlamaConfig as Config\nfrom transformers import LlamaForCausalLM as Model\n"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_never_runs(folder, where, known):
    """With "y" on standard input, which is what transformers would ask for."""
    file, ran = folder / where, folder / "ran"
    (folder / "evil.py").write_text(EVIL.format(str(ran)))
    found = json.loads(file.read_text())
    found["auto_map"] = {
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Config", "evil.Config"],
    }  # fmt: skip
    if not known:
        found["model_type" if where == "config.json" else "tokenizer_class"] = "Evil"
    file.write_text(json.dumps(found))
    code = f"import heads; heads.load({str(folder)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], input="y\ny\ny\n", capture_output=True, text=True, timeout=120)
    assert not ran.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if not known and where == "config.json":
        assert "needs code that comes with it (auto_map), which heads never runs" in done.stderr


# ------------------------------------------------------------------------------------------ what is read


def test_an_index_that_leads_elsewhere_is_refused(folder, tmp_path):
    outside = shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    keys = load_file(outside)
    for name in ("../outside.safetensors", "weights.bin", str(outside), "sub/model.safetensors"):
        (folder / folders.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {key: name for key in keys}}))
        with pytest.raises(ValueError, match="only safetensors inside the folder are read"):
            load(folder)
    (folder / folders.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {key: "a.safetensors" for key in keys}}))
    with pytest.raises(FileNotFoundError, match="'a.safetensors', which is not there"):
        load(folder)


def test_shards_are_read_and_a_decoy_changes_no_digest(folder):
    whole = load(folder)
    module = heads.model.tiny.build("llama", seed=3, whole=False)[0]
    (folder / "model.safetensors").unlink()
    module.save_pretrained(folder, max_shard_size="20KB")
    sharded = load(folder)
    assert torch.equal(logits_of(sharded, ids_of(whole)), logits_of(whole, ids_of(whole)))
    save_file({"a": torch.zeros(1)}, folder / "decoy.safetensors")
    assert load(folder).record["sha256"] == sharded.record["sha256"] != whole.record["sha256"]


def test_a_forged_record_in_a_folder_is_not_believed(folder):
    before = load(folder).record["sha256"]
    (folder / zoo.RECORD).write_text(json.dumps({"sha256": "0" * 64, "revision": "forged"}))
    record = load(folder).record
    assert record["sha256"] == before and record["revision"] is None


def test_a_changed_byte_of_a_fetched_model_is_found(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(zoo.ZOO, "mine", zoo.Packaged("mine", "none", (), ""))
    place = zoo.home() / "models" / "mine"
    shutil.copytree(folder, place)
    (place / zoo.RECORD).write_text(json.dumps({"sha256": zoo.sha256(place / "model.safetensors"), "revision": "1"}))
    assert heads.load("mine", device="cpu").record["revision"] == "1"
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (place / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="are not those that were fetched(.|\n)*heads fetch mine"):
        heads.load("mine", device="cpu")


def test_a_digest_is_computed_once_and_again_when_the_file_changes(folder, monkeypatch):
    file, calls = folder / "model.safetensors", []
    monkeypatch.setattr(folders, "sha256", lambda path: calls.append(path) or zoo.sha256(path))
    first = folders.digest(file)
    assert folders.digest(file) == first and len(calls) == 1
    os.utime(file, ns=(1, 1))
    assert folders.digest(file) == first and len(calls) == 2
    (zoo.home() / "digests.json").write_text("{ broken")
    assert folders.digest(file) == first and len(calls) == 3
    assert list(json.loads((zoo.home() / "digests.json").read_text())) == [str(file.resolve())]


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ValueError, match="holds an adapter, not a whole model"):
        load(folder)


@pytest.mark.parametrize("names", ["other.safetensors", "x.safetensors.index.json"])
def test_a_config_cannot_name_other_weights_than_those_that_are_hashed(folder, names):
    """transformers reads `transformers_weights` of a config in place of model.safetensors."""
    clean, other = load(folder), load_file(folder / "model.safetensors")
    save_file({key: value + 1 for key, value in other.items()}, folder / "other.safetensors", {"format": "pt"})
    map_ = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (folder / "x.safetensors.index.json").write_text(json.dumps(map_))
    config(folder, transformers_weights=names)
    assert torch.equal(logits_of(load(folder), ids_of(clean)), logits_of(clean, ids_of(clean)))


def test_weights_that_are_no_numbers_are_named(folder):
    weights(folder, lambda found: found["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="its weights are not finite"):
        load(folder)


def test_bytes_changed_behind_the_clock_are_hashed_again(folder):
    file = folder / "model.safetensors"
    stat, first = file.stat(), folders.digest(file)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    with file.open("r+b") as out:
        out.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folders.digest(file) != first
    for broken in ("5", "null", '["a"]'):
        (zoo.home() / "digests.json").write_text(f'{{"{file.resolve()}": {broken}}}')
        assert folders.digest(file) == zoo.sha256(file)


# ------------------------------------------------------------------------------------------ every weight from the file


def test_a_checkpoint_without_its_unembedding_is_refused(folder):
    weights(folder, lambda found: found.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="does not hold the weights of a LlamaForCausalLM .missing: lm_head.weight"):
        load(folder)


def test_an_incomplete_checkpoint_lists_what_is_missing(folder):
    def lose(found):
        for key in [key for key in found if ".layers.2." in key]:
            del found[key]

    weights(folder, lose)
    with pytest.raises(ValueError, match=r"missing: model.layers.2.input_layernorm.weight, .* and \d more"):
        load(folder)


def test_a_classifier_is_refused_even_if_its_embedding_is_tied(folder):
    config(folder, tie_word_embeddings=True)

    def classify(found):
        found["score.weight"] = found.pop("lm_head.weight")[:2].clone()

    weights(folder, classify)
    with pytest.raises(ValueError, match="unknown to this architecture: score.weight"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    weights(folder, lambda found: found.update({"model.norm.weight": torch.ones(16)}))
    with pytest.raises(ValueError, match="of another shape: model.norm.weight"):
        load(folder)


def test_what_a_bert_checkpoint_carries_beside_the_model_is_left_out(tmp_path):
    module, tokenizer = heads.model.tiny.build("bert", whole=False)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights(tmp_path, lambda found: found.update({"bert.pooler.dense.weight": torch.ones(32, 32),
                                                  "cls.seq_relationship.weight": torch.ones(2, 32)}))  # fmt: skip
    assert torch.equal(logits_of(load(tmp_path), ids_of(tiny("bert"))), logits_of(tiny("bert"), ids_of(tiny("bert"))))


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        load(folder)


# ------------------------------------------------------------------------------------------ what a model is asked to be


def test_a_dtype_may_be_torch_s_own(folder):
    model = heads.load(str(folder), device="cpu", dtype=torch.bfloat16)
    assert model.record["dtype"] == "bfloat16" and model._module.dtype == torch.bfloat16


def test_an_edited_model_called_like_a_module_keeps_its_edits():
    model, ids = tiny("llama"), ids_of(tiny("llama"))
    edited = heads.ablate(model, [(1, 0), (2, 3)])
    assert torch.equal(edited(input_ids=ids).logits, logits_of(edited, ids))
    assert (edited(ids).logits - plain_logits(model, ids)).abs().max() > 1e-2
    assert torch.equal(edited.forward(ids).logits, logits_of(edited, ids))
    assert torch.equal(model(ids).logits, plain_logits(model, ids))


def test_an_edited_model_is_not_saved_as_if_it_were_clean(tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match="an edited model cannot be saved"):
        heads.ablate(model, [(1, 0)]).save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited").exists()
    model.save_pretrained(tmp_path / "clean")
    assert (tmp_path / "clean" / "model.safetensors").exists()


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_model_is_neither_copied_nor_pickled(take):
    for model in (tiny("llama"), heads.ablate(tiny("llama"), [(1, 0)])):
        with pytest.raises(TypeError, match="load it a second time"):
            take(model)


def test_a_second_thread_is_told_to_wait_and_the_first_is_right():
    model, ids, found, told = fresh("llama"), ids_of(tiny("llama")), [], []

    def run(head):
        with torch.no_grad(), model.trace(ids):
            model.layers[1].attn.heads[:, :, head] = 0
            logits = model.logits.save()
        return logits

    expected = [run(head) for head in range(4)]

    def work(head):
        for _ in range(15):
            try:
                found.append(torch.equal(run(head), expected[head]))
            except RuntimeError as error:
                told.append(str(error))

    threads = [threading.Thread(target=work, args=(head,)) for head in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) + len(told) == 60 and found and all(found)
    assert all("another thread is running this model" in text for text in told)
    assert torch.equal(run(0), expected[0])
