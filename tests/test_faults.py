"""What goes wrong: kills at any moment, full disks, two processes at once, and nonsense where sense was asked for.

The storm prints how many kills it dealt and what they damaged. It lasts some 25 seconds; HEADS_STORM=20 makes it twenty
times as long.
"""

import inspect
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from conftest import tiny
from toys import DEFAULTS, toy, toy_notebook

import heads
from heads.course import papers, record
from heads.lab import documents

resource = pytest.importorskip("resource")  # nor is there a fork without it
LONGER = float(os.environ.get("HEADS_STORM", 1))
FORK = multiprocessing.get_context("fork")


# ---- a storm ------------------------------------------------------------------------------


def alone(function, *args):
    """What a forked process does: in a group of its own, as in the foreground of a terminal."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    with suppress(KeyboardInterrupt):
        function(*args)
        status = 0
    os._exit(status)


def struck(draw, function, *args, longest=0.25) -> bool:
    """Start it and kill its group at some moment; whether it was killed before it was through."""
    process = FORK.Process(target=alone, args=(function, *args))
    process.start()
    os.setpgid(process.pid, process.pid)  # by both, whoever comes first: else a stroke may find no group, and nothing ends
    process.join(draw.uniform(0.0, longest))
    kind = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    for _ in range(3):  # Python drops an interrupt that arrives inside a destructor; a reader presses Ctrl-C again
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        process.join(10)
    assert process.exitcode is not None, "it did not end"
    return process.exitcode != 0


def storm(tell, name, seconds, once):
    """`once(draw) -> (kills, damaged)` for so many seconds; prints and holds the sums."""
    draw, kills, damaged, end = random.Random(name), 0, [], time.monotonic() + seconds * LONGER
    while time.monotonic() < end:
        more, wrong = once(draw)
        kills += more
        damaged += wrong
    tell(f"storm over {name}", f"{kills} kills, {len(damaged)} damaged, {seconds * LONGER:.0f} s")
    assert kills and not damaged, damaged[:5]


FILES = [f"{n}-figure.svg" for n in range(6)] + ["result.json"]


def publish(target, first=0, last=10**9):
    """One generation of a folder after the other."""
    folder = record.Folder(target)
    for generation in range(first, last):
        for name in FILES:
            (folder.work / name).write_text(str(generation), encoding="utf-8")
        folder.publish()


def broken(target):
    """What is wrong with a published folder."""
    if not target.is_dir():
        return ["the folder is gone"]
    held = {path.name: path.read_text(encoding="utf-8") for path in target.iterdir()}
    return [] if sorted(held) == sorted(FILES) and len(set(held.values())) == 1 else [held]


def left(target):
    return [path.name for path in target.parent.iterdir() if path.name not in (target.name, f".{target.name}.lock")]


def test_a_storm_over_publishing(tmp_path, record_property):
    target = tmp_path / "figures" / "toy"
    publish(target, 0, 1)

    def once(draw):
        return struck(draw, publish, target, draw.randrange(1000)), broken(target)

    storm(record_property, "publishing", 5, once)
    record.Folder(target)
    assert len(left(target)) == 1, "the next start tidies up"


CORPUS = [{"id": n, "text": f"owl {n} sleeps in tower {n * n}"} for n in range(60)]


def score(out):
    documents.score_documents(tiny("llama"), CORPUS, out, {"base": [], "cut": [(1, 1)]}, window=4, progress=False)


def test_a_storm_over_document_scores(tmp_path, record_property):
    whole, out = tmp_path / "whole", tmp_path / "scores"
    score(whole)

    def once(draw):
        killed = struck(draw, score, out, longest=0.6)
        if killed:
            return 1, [] if not out.exists() or out.read_bytes() == whole.read_bytes() else ["an unfinished file"]
        wrong = [] if out.read_bytes() == whole.read_bytes() else ["another file"]
        for path in tmp_path.glob("scores*"):
            path.unlink()
        return 0, wrong

    storm(record_property, "document scores", 7, once)
    score(out)
    assert out.read_bytes() == whole.read_bytes()


def table(size):
    """Stands for an instrument whose result is large enough to be cut in two."""
    return {"table": np.arange(size) / 7}


def test_a_storm_over_kept_results(tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("HEADS_HOME", str(tmp_path))
    monkeypatch.setenv("HEADS_CACHE", "1")

    def once(draw):
        size = draw.choice([20_000, 20_001, 20_002])
        killed = struck(draw, heads.kept, table, size, longest=0.1)
        found = heads.kept(table, size)["table"]
        for path in (tmp_path / "kept").glob("*.kept") if draw.random() < 0.5 else ():
            path.unlink()
        return killed, [] if np.array_equal(found, table(size)["table"]) else [size]

    storm(record_property, "kept results", 4, once)


def test_a_storm_over_a_run(tree, record_property):
    """A command with a kernel: whatever kills it, no half notebook, no traceback, and no kernel goes on."""
    book = toy_notebook("import os\nopen('kernel', 'w').write(str(os.getpid()))", "import time; time.sleep(0.4)", "x = 1")
    book.cells = book.cells[:-3]  # no study: nothing heavy to import
    nbformat.write(book, papers.notebook("toy-paper"))
    out, kernel = tree / "runs" / "toy-paper-default" / "notebook.ipynb", tree / "notebooks" / "kernel"

    def once(draw):
        kernel.unlink(missing_ok=True)
        command = [sys.executable, "-m", "heads", "run", "toy-paper"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        time.sleep(draw.uniform(0.3, 3.5))
        how = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        said, wrong = process.communicate(timeout=60)[1], []
        if out.exists():
            wrong += [] if json.loads(out.read_text(encoding="utf-8"))["cells"] else ["no cells"]
        wrong += [said] if "cli.py" in said and how != signal.SIGINT else []  # Ctrl-C may come before there is a handler
        if kernel.exists() and kernel.read_text().isdigit():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(kernel.read_text())).wait(10)
        return process.returncode != 0, wrong

    storm(record_property, "a run", 9, once)


@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_fetch_that_is_stopped_stops_pip(tmp_path, how, status):
    pid, home = tmp_path / "pid", tmp_path / "home"
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "pip" / "__main__.py").write_text(code, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(heads.__file__).parents[1]}", "HEADS_HOME": str(home)}
    process = subprocess.Popen([sys.executable, "-m", "heads", "fetch"], env=env, stderr=subprocess.PIPE, text=True)
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == status and said.endswith("heads: stopped\n") and "Traceback" not in said
    with suppress(psutil.NoSuchProcess):  # killed with its parent; on a busy machine init takes a moment to clear it away
        psutil.Process(int(pid.read_text())).wait(10)
    assert [path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock")] == []


# ---- a full disk, and two at once ---------------------------------------------------------


def short_of_room(function, *args):
    """In a forked process that may write no file above 300 bytes: what it raised."""
    receive, send = FORK.Pipe(False)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            send.send(function(*args) and None)
        except OSError as error:
            send.send(error)

    process = FORK.Process(target=alone, args=(limited,))
    process.start()
    found = receive.recv() if receive.poll(60) else "nothing"
    process.join()
    return found


def test_a_full_disk_leaves_the_last_good_figures(tmp_path):
    target = tmp_path / "toy"
    publish(target, 0, 1)

    def large(folder):
        (folder.work / "1-a.svg").write_text("x" * 1000, encoding="utf-8")
        folder.publish()

    found = short_of_room(lambda: large(record.Folder(target)))
    assert isinstance(found, OSError) and "too large" in str(found)
    assert broken(target) == []


def test_document_scores_go_on_after_a_full_disk(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "scores"
    score(whole)
    assert isinstance(short_of_room(score, out), OSError) and not out.exists()
    score(out)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("words, limit", [("list", 100), ("list --json", 100), ("run toy-paper", 3000)])
def test_a_command_on_a_full_disk_says_so_in_a_sentence(tree, tmp_path, words, limit):
    nbformat.write(toy_notebook("print('x' * 5000)"), papers.notebook("toy-paper"))
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); from heads.cli import main; main()"
    with (tmp_path / "out").open("w", encoding="utf-8") as out:
        command = [sys.executable, "-c", code, *words.split()]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    said = done.stderr.splitlines()
    assert done.returncode not in (0, 120) and "too large" in said[-1] and said[-1].startswith("heads: "), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_two_that_publish_at_once_never_leave_a_gap(tmp_path):
    target = tmp_path / "toy"
    publish(target, 0, 1)
    both = [FORK.Process(target=alone, args=(publish, target, first, first + 150)) for first in (0, 1000)]
    for process in both:
        process.start()
    looks = 0
    while any(process.is_alive() for process in both):
        assert target.is_dir(), "at a moment there was no folder"
        looks += 1
    assert [process.exitcode for process in both] == [0, 0] and looks > 100
    assert broken(target) == [] and target.joinpath("result.json").read_text(encoding="utf-8") in ("149", "1149")


# ---- nonsense in, a named error out -------------------------------------------------------

PAIRS = {"letters": (torch.arange(10, 16), torch.tensor([[0, 1], [1, 2], [2, 3]]))}


def sense(model, folder) -> dict[str, dict]:
    """Arguments with which each public function would do its work."""
    task, row = toy(model), torch.arange(10, 22)[None]
    few = [heads.lab.answers.Example((10, 11, 12), (13, 14))]
    sample = heads.tasks.Sample(row, (3, 5), "a", row[0, 3:5], "s", "stem", 12, 0.5)
    n, h, d = model.anatomy.n_layers, model.anatomy.n_heads, model.anatomy.d_head
    scores, samples = np.arange(16.0).reshape(4, 4), np.ones((3, 4, 4))
    item = heads.tasks.Item("a b", " c", (" d",), "a e")
    on = {"model": model}
    return {
        "Conditions": {**on, "ids": row, "sets": {"none": []}},
        "Effects": {"samples": samples, "base": np.ones(3)},
        "HeadScores": {"values": scores},
        "Prefix": {**on, "ids": row},
        "Steering": {**on, "vectors": torch.zeros(n, h, d)},
        "Trie": {"labels": {"red": [5]}, "end": 2},
        "Study": {"slug": "toy-paper", **DEFAULTS},
        "ablate": {**on, "heads": [(1, 1)]},
        "ablation_scores": {**on, "task": task, "progress": False},
        "all_weights": on,
        "answer_loss": {**on, "batch": few},
        "attention_to": {**on, "task": task},
        "attribution_patching": {**on, "task": task},
        "copying_score": {**on, "lists": PAIRS},
        "decode_batch": {**on, "prompts": [row]},
        "decode_rows": {**on, "ids": row},
        "candidate_scores": {**on, "prompt": "a b", "candidates": [" c"]},
        "packed_loss": {**on, "items": few},
        "by_kv_head": {"scores": heads.HeadScores(np.zeros((n, h))), **on},
        "direct_attribution": {**on, "task": task},
        "echo_and_induction": {**on, "tokens": 5, "repeats": 2},
        "effective_embedding": {**on, "ids": row[0]},
        "embed": {**on, "texts": ["two owls"]},
        "evaluate": {**on, "task": task},
        "examples": {**on, "pairs": [("a b", " c")]},
        "fit": {"trained": [torch.nn.Parameter(torch.ones(1))], "loss": lambda batch: batch, "data": [1, 2], "steps": 1},
        "ChunkCache": on,
        "Reader": {},
        "HeadCache": {**on, "policy": heads.policies.everything},
        "MaskedPrefix": {**on, "ids": row, "policies": [heads.policies.everything]},
        "head_activations": {**on, "texts": [row]},
        "head_means": {**on, "texts": [row]},
        "head_outputs": {**on, "layer": 1, "z": torch.zeros(1, 3, h, d)},
        "head_weights": {**on, "heads": [(1, 1)]},
        "kept": {"function": table, "size": 3},
        "load": {"name": "tiny-llama", "device": "cpu"},
        "logit_lens": {**on, "task": task},
        "lora": on,
        "output_projection": {**on, "layer": 1},
        "ov": {**on, "layer": 1, "head": 1},
        "ov_logits": {**on, "layer": 1, "head": 1, "x": torch.zeros(1, model.anatomy.d_model), "ids": row[0]},
        "path_scores": {**on, "task": task, "progress": False},
        "prefill": {**on, "ids": row},
        "prompt_tuning": on,
        "prune": {**on, "heads": [(1, 1)]},
        "qk": {**on, "layer": 1, "head": 1},
        "random_heads": {"like": [(1, 1)], "shape": (4, 4)},
        "ranking": {"scores": [[1.0, 2.0]], "relevant": [[0, 1]]},
        "retrieval_scores": {**on, "samples": [sample], "progress": False},
        "rouge1_recall": {"response": "a", "answer": "a"},
        "score_answers": {**on, "items": few},
        "score_documents": {**on, "documents": ["two owls"], "out": folder / "out", "conditions": {"cut": [(1, 1)]}},
        "successor_score": {**on, "lists": PAIRS},
        "token_losses": {**on, "rows": [[10, 11, 12]]},
        "upper_stack": {**on, "texts": ["two owls"], "cut": 2},
        "tasks.Instance": {"input": "a"},
        "tasks.Instruction": {"id": "t", "category": "c", "source": "s", "definition": "Do."},
        "tasks.Item": {"prompt": "a", "answer": "b", "foils": (), "corrupted": "c"},
        "tasks.Sample": vars(sample),
        "tasks.Task": {"name": "t", "ids": task.ids, "answers": task.answers, "foils": task.foils, "corrupted": task.corrupted},
        "tasks.TaskSet": {"tasks": []},
        "tasks.arithmetic": on,
        "tasks.build": {**on, "name": "t", "items": [item]},
        "tasks.colored_objects": on,
        "tasks.encode": {"task": heads.tasks.Instruction("t", "c", "s", "Do."), "x": "a"},
        "tasks.haystack": {},
        "tasks.ioi": on,
        "tasks.macro": {"scores": {"t": [1.0]}},
        "tasks.mixture": {"parts": [(heads.tasks.TaskSet.builtin().values(), 2)]},
        "tasks.needle": {**on, "lengths": [400], "source": ["a long way. " * 400]},
        "tasks.needles": {},
        "tasks.score": {"predictions": ["a"], "instances": [heads.tasks.Instance("a", ("a",))]},
        "tasks.word_pairs": {"name": "capitals"},
        "tasks.word_tasks": {},
        "tasks.words": {**on, "name": "capitals"},
    }


SENSELESS = {
    "batch": [0, -1, 1.5], "tokens": [-1], "n": [0, -1, 1.5, "few"], "n_facts": [0, -1], "shots": [-1], "limit": [0, -2],
    "max_new_tokens": [-1], "n_sets": [0, -1], "rank": [0], "steps": [0, -1], "every": [0], "length": [1, -4], "rows": [[[]]],
    "window": [0, 1.5], "shard": [(2, 2), ("a", 2)], "first": [-1], "largest": [-1], "batch_tokens": [-1, 1.5],
    "kind": ["nonsense"], "phase": ["nonsense"], "metric": ["nonsense"], "positions": ["nonsense"], "position": ["nonsense"],
    "direction": ["nonsense"], "component": ["nonsense"], "mlps": ["nonsense"], "scan": ["nonsense"], "engine": ["nonsense"],
    "how": ["nonsense"], "match": ["nonsense"], "operation": ["nonsense"], "template": ["nonsense"], "form": ["nonsense"],
    "which": ["nonsense"], "corruption": ["nonsense"], "counterfactual": ["nonsense"], "split": ["nonsense"],
    "family": ["nonsense"], "schedule": ["nonsense"], "dtype": ["nonsense"], "where": ["nonsense"], "parts": ["nonsense"],
    "query": ["nonsense"], "effective": ["nonsense"], "slug": ["nonsense"], "device": ["nonsense"], "name": ["nonsense", ""],
    "foils": ["nonsense"], "heads": [[(99, 0)], [(0.5, 0)], [3]], "like": [[(99, 0)]], "receivers": [[(99, 0)]],
    "conditions": [{}, {"a": [(99, 0)]}, np.zeros((2, 2)), [3]], "sets": [{}, {"a": [(99, 0)]}], "layer": [99, "nonsense"],
    "head": [99, "nonsense"], "layers": [[99]], "depths": [[1.5], [float("nan")], []], "lengths": [[], [10]],
    "values": [np.array([[float("nan")]]), np.zeros(3), np.zeros((0, 0))], "samples": [np.zeros(3)],
    "texts": [[], ["", ""]], "prompts": [[torch.zeros(1, 0).long()]], "data": [[]], "chosen": [[]],
    "documents": [None, {"text": "a"}, 3, Path("nowhere.jsonl")], "source": ["nowhere.txt", 3],
    "ids": [torch.zeros(1, 0).long()], "vectors": [torch.zeros(2, 2)], "z": [torch.zeros(1, 3, 9, 9)],
    "labels": [{}, {"red": []}, {"red": [5], "Red": [5]}, {"red": [2]}], "cut": [0, 99, 1.5], "pool": ["nonsense"],
    "scores": [[1.0], [[float("nan"), 1.0]]], "relevant": [[[0, 0]], [[0, 1, 1]]], "measures": [["nonsense"]],
    "weights": [torch.ones(3)], "reference": ["nonsense"], "function": [3],
}  # fmt: skip
# What an error may call the thing instead.
CALLED = {"sets": "condition|head", "conditions": "condition|head", "like": "head", "receivers": "head", "ids": "prompt|token",
          "samples": "effects", "lengths": "tokens", "n": "prompts", "prompts": "prompt", "texts": "text", "values": "head scores",
          "scores": "score", "labels": "label", "measures": "measure",
          "source": "haystack"}  # fmt: skip
# Records of what somebody has checked before, and names that mean another thing there (a batch of examples).
OTHER = {"Effects-source", "tasks.Task-foils", "answer_loss-batch", "Conditions-rows", "ablation_scores-reference",
         "retrieval_scores-samples", "tasks.Task-prompts", "tasks.words-foils", "tasks.mixture-parts", "tasks.macro-scores"}  # fmt: skip
NAMED = {"load", "tasks.word_pairs", "tasks.words"}  # elsewhere a name is any text
PUBLIC = {name: getattr(heads, name) for name in heads.__all__}
PUBLIC |= {f"tasks.{name}": getattr(heads.tasks, name) for name in heads.tasks.__all__}
PUBLIC = {name: found for name, found in PUBLIC.items() if callable(found)}
RECORDS = {"tasks.Instance", "tasks.Instruction", "tasks.Item", "tasks.Sample"}


def cases():
    """(function, parameter, nonsense) by a name of their own."""
    for name, function in sorted(PUBLIC.items()):
        for parameter in inspect.signature(function).parameters if name not in RECORDS else ():
            for value in SENSELESS.get(parameter, []) if f"{name}-{parameter}" not in OTHER else ():
                if parameter != "name" or name in NAMED:
                    shown = f"{type(value).__name__}{tuple(value.shape)}" if hasattr(value, "shape") else str(value)
                    yield f"{name}-{parameter}-{shown}", (name, parameter, value)


CASES = dict(cases())

def test_every_public_function_has_arguments_here(tmp_path, record_property):
    assert set(sense(tiny("llama"), tmp_path)) == set(PUBLIC)
    record_property("nonsense", f"{len(CASES)} cases over {len(PUBLIC)} public functions")


@pytest.mark.parametrize("case", CASES)
def test_nonsense_is_refused_by_name_before_any_forward(llama, tmp_path, monkeypatch, request, case):
    name, parameter, value = CASES[case]
    if name == "Study":
        request.getfixturevalue("tree")
    monkeypatch.chdir(tmp_path)
    arguments = sense(llama, tmp_path)[name] | {parameter: value}
    monkeypatch.setattr(llama._module, "forward", lambda *a, **k: pytest.fail("a forward pass ran"))
    with pytest.raises((ValueError, TypeError, LookupError, FileNotFoundError)) as refused:
        found = PUBLIC[name](**arguments)
        if hasattr(found, "__enter__") and name in ("lora", "prompt_tuning", "all_weights"):
            found.__enter__()
        elif inspect.isgenerator(found):
            next(found)
    said = str(refused.value)
    assert re.search(f"{parameter.rstrip('s')}|{CALLED.get(parameter, parameter)}", said) or str(value) in said, said
    assert not (tmp_path / "out").exists()


SCORES = heads.HeadScores(np.arange(16.0).reshape(4, 4))
EFFECTS = heads.Effects(np.arange(48.0).reshape(3, 4, 4), np.ones(3))


@pytest.mark.parametrize("call, words", [
    (lambda: SCORES.top(-1), r"top\(-1\)"), (lambda: SCORES.top(99), r"top\(99\)"),
    (lambda: SCORES.overlap(SCORES, 0), "k must be at least 1"), (lambda: SCORES.correlate(SCORES, "nonsense"), "nonsense"),
    (lambda: EFFECTS.gap(), "no source run"),
    (lambda: SCORES.top(float("nan")), "top"),
    (lambda: SCORES.overlap(SCORES, 2, n_shuffles=0), "n_shuffles"),
    (lambda: SCORES.overlap(SCORES, 2, n_shuffles=-1), "n_shuffles"),
    (lambda: EFFECTS.interval(n=0), "n is at least 1, not 0"),
    (lambda: EFFECTS.interval(level=2), "level"),
])  # fmt: skip
def test_a_method_refuses_nonsense_by_name(call, words):
    with pytest.raises((ValueError, TypeError, LookupError), match=words):
        call()
