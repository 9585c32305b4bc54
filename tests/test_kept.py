"""Kept results: a hit is the same to the bit, and whatever changes makes it no hit."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import fresh, tiny

import heads
import heads.lab.retrieval
from heads import cli
from heads.course import kept as module
from heads.scores import HeadScores

CALLS = []


def toy(model, size: int = 2, more=None):
    """Stands for an instrument: HeadScores, arrays, tensors, numbers and text."""
    CALLS.append(size)
    table = np.arange(size * 3.0).reshape(size, 3) / 7
    text = ["ä", None, 0.1, True, np.int64(size), np.float32(0.1), np.bool_(True)]
    return {"scores": HeadScores(table, "toy"), "tensor": torch.arange(size).bfloat16(), "text": text}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, switched on (make test switches it off)."""
    monkeypatch.setenv("HEADS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HEADS_CACHE", "1")
    CALLS.clear()
    return tmp_path / "home" / "kept"


def files(cache):
    return sorted(cache.glob("*.kept"))


def test_a_hit_is_the_same_and_computes_nothing(llama, cache):
    first, second = heads.kept(toy, llama, 4), heads.kept(toy, llama, size=4)
    assert CALLS == [4] and len(files(cache)) == 1
    np.testing.assert_array_equal(first["scores"].values, second["scores"].values)
    assert isinstance(second["scores"], HeadScores) and second["scores"].name == "toy"
    assert second["tensor"].dtype == torch.bfloat16 and torch.equal(first["tensor"], second["tensor"])
    assert first["text"] == second["text"] and list(map(type, first["text"])) == list(map(type, second["text"]))
    heads.kept(toy, llama, np.int64(3), np.bool_(True))


def test_retrieval_scores_come_back_whole(llama, cache, monkeypatch):
    samples = heads.tasks.needle(llama, lengths=[240], depths=[0.3, 0.6])
    fresh = heads.retrieval_scores(llama, samples, 4, progress=False)
    heads.kept(heads.retrieval_scores, llama, samples, 4, progress=False)
    monkeypatch.setattr(heads.lab.retrieval, "decode_batch", None)  # nothing can be computed any more
    again = heads.kept(heads.retrieval_scores, llama, samples, 4, progress=False)
    assert again.name == fresh.name and len(again.trials) == 2
    for ours, theirs in zip(again.trials, fresh.trials):
        assert (ours.response, ours.recall, ours.sample.answer) == (theirs.response, theirs.recall, theirs.sample.answer)
        for name in ("copies", "needle", "first"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.sample.copied, theirs.sample.copied)


@pytest.mark.parametrize("other", [(3,), (2, [1]), (2, {"a": torch.zeros(2)}), (2, np.ones(2)), (2, np.zeros(2))])
def test_other_arguments_are_no_hit(llama, cache, other):
    heads.kept(toy, llama)
    heads.kept(toy, llama, *other)
    assert len(CALLS) == len(files(cache)) == 2


def test_another_model_is_no_hit(cache):
    for model in (tiny("llama"), tiny("gpt2"), fresh("llama", seed=1), fresh("llama", dtype="bfloat16")):
        heads.kept(toy, model)
    assert len(CALLS) == len(files(cache)) == 4


def test_a_model_that_was_trained_since_is_no_hit(cache):
    model = fresh("llama")
    heads.kept(toy, model)
    table = next(model._module.parameters()).data
    for change in (lambda: table[1, 2].add_(1e-3), table.neg_, lambda: table.copy_(table.flip(0))):
        change()  # a sum, or another digest that forgets the order or the sign, would not see the last two
        heads.kept(toy, model)
    assert len(CALLS) == 4


def test_an_edited_model_is_refused(llama, cache):
    with pytest.raises(TypeError, match="edited model"):
        heads.kept(toy, heads.ablate(llama, [(0, 1)]))
    assert not files(cache)


def test_what_has_no_bytes_is_refused(llama):
    with pytest.raises(TypeError, match="object is no number"):
        heads.kept(toy, llama, more=object())


def test_a_key_that_is_no_text_is_named(llama):
    with pytest.raises(TypeError, match="heads.kept: keys must be str, int, float, bool or None, not tuple"):
        heads.kept(toy, llama, more={(0, 1): 2.0})


@pytest.mark.parametrize("place", ["write_bytes", "replace"])
def test_a_full_disk_does_not_lose_the_result(llama, cache, monkeypatch, place):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not kept, toy-.*written.*No space left"):
        patch.setattr(Path if place == "write_bytes" else os, place, full)
        found = heads.kept(toy, llama)
    assert found["text"][0] == "ä" and not [path for path in cache.iterdir() if path.suffix != ".lock"]
    heads.kept(toy, llama), heads.kept(toy, llama)
    assert len(CALLS) == 2


def test_other_code_or_another_version_is_no_hit(llama, cache, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(module.record, "PACKAGE", tmp_path / "package")
    for text in ("a = 1", "a = 2"):
        (tmp_path / "package" / "new.py").write_text(text)
        heads.kept(toy, llama)
    monkeypatch.setattr(module.record, "versions", lambda: {"torch": "0"})
    heads.kept(toy, llama)
    assert len(CALLS) == len(files(cache)) == 3


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_byte_is_computed_again_with_a_remark(llama, cache, capsys, place):
    heads.kept(toy, llama)
    (path,) = files(cache)
    good = path.read_bytes()
    bad = bytearray(good)
    bad[place] ^= 1
    path.write_bytes(bad)
    heads.kept(toy, llama)
    assert len(CALLS) == 2 and path.read_bytes() == good
    assert capsys.readouterr().err == f"heads.kept: {path.name} is damaged and is computed again\n"


def test_half_a_file_is_computed_again(llama, cache):
    heads.kept(toy, llama)
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:20])
    heads.kept(toy, llama)
    assert len(CALLS) == 2


def test_it_can_be_switched_off(llama, cache, monkeypatch):
    heads.kept(toy, llama)
    monkeypatch.setenv("HEADS_CACHE", "0")
    heads.kept(toy, llama)
    assert len(CALLS) == 2


def test_a_cache_that_cannot_be_written_keeps_nothing(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADS_HOME", str(tmp_path / "file"))
    heads.kept(toy, llama)
    assert len(CALLS) == 1


def test_a_function_that_fails_leaves_nothing(llama, cache):
    with pytest.raises(ValueError):
        heads.kept(toy, llama, size=-1)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def slow(folder):
    """Stands for an instrument that takes a while and leaves a trace of every call."""
    Path(folder, str(time.monotonic_ns())).touch()
    time.sleep(1)
    return [1, 2]


def ask(folder, answers):
    answers.put(heads.kept(slow, folder))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_two_processes_compute_once(tmp_path, cache):
    (tmp_path / "calls").mkdir()
    own = multiprocessing.get_context("fork")
    answers = own.Queue()
    both = [own.Process(target=ask, args=(str(tmp_path / "calls"), answers)) for _ in range(2)]
    for process in both:
        process.start()
    assert [answers.get(timeout=120) for _ in both] == [[1, 2], [1, 2]]
    for process in both:
        process.join()
    assert len(list((tmp_path / "calls").iterdir())) == 1


def test_doctor_says_how_much_is_kept(llama, capsys):
    heads.kept(toy, llama)
    with pytest.raises(typer.Exit):
        cli.doctor()
    assert "MB of results that notebooks share (1)" in capsys.readouterr().out
