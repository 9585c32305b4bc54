"""Study: what it refuses, what it keeps, and that it publishes everything or nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from toys import DEFAULTS

import heads
from heads.course import papers, record
from heads.course.study import Study, plain


class Model:
    record = {"name": "toy", "revision": "1", "sha256": "00", "dtype": "float32"}


class Scores:
    def to_dict(self):
        return {"layers": 1, "heads": 2, "values": [[1 / 3, float("nan")]]}


@pytest.fixture
def study(tree):
    return Study("toy-paper", **DEFAULTS)


def conclude(study):
    study.claim("C1", measured=0.5, holds=True)
    study.claim("C2", measured=None, holds=None, why="Not here.")
    return study.verdict()


def a_figure(value=1):
    fig, ax = plt.subplots()
    ax.plot([0, value])
    return fig


def published(tree):
    return json.loads((tree / "figures" / "toy-paper" / "result.json").read_text())


def hidden(folder):
    return [path.name for path in folder.glob(".*") if not path.name.endswith(".lock")]


def of(run, tree):
    """What a process has aside."""
    return [name for name in hidden(tree / "figures") if f"-{run.pid}-" in name]


# ---- parameters ---------------------------------------------------------------------------


def test_the_keywords_are_the_parameters_cell(tree):
    with pytest.raises(LookupError, match="Did you mean 'toy-paper'"):
        Study("toy-papier", **DEFAULTS)
    with pytest.raises(TypeError, match="no parameter 'sise'. Did you mean 'size'"):
        Study("toy-paper", **DEFAULTS, sise=3)
    with pytest.raises(TypeError, match="lacks rate, names"):
        Study("toy-paper", **{k: v for k, v in DEFAULTS.items() if k not in ("rate", "names")})
    with pytest.raises(TypeError, match="'size' of toy-paper is a int"):
        Study("toy-paper", **{**DEFAULTS, "size": "3"})
    with pytest.raises(ValueError, match="'seed' of toy-paper is a whole number from 0"):
        Study("toy-paper", **{**DEFAULTS, "seed": -1})
    assert not (tree / "figures").exists(), "a refused study leaves nothing behind"


def test_a_paper_without_a_notebook_takes_any_parameter(tree):
    assert Study("far-paper", anything=1).preset == "default"


@pytest.mark.parametrize("changes, preset", [({}, "default"), ({"size": 1}, "smoke"), ({"size": 2}, "custom")])
def test_the_preset_is_derived(tree, changes, preset):
    study = Study("toy-paper", **{**DEFAULTS, **changes})
    conclude(study)
    [result] = [path for path in tree.rglob("result.json") if not path.parent.name.startswith(".")]
    assert json.loads(result.read_text())["preset"] == study.preset == preset
    assert (result.parent.parent.name == "figures") == (preset == "default")


def test_one_seed_for_all(tree):
    def draw():
        Study("toy-paper", **{**DEFAULTS, "seed": 5})
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


# ---- claims -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "holds, partly, verdict",
    [(True, False, "holds"), (True, True, "holds"), (False, True, "partly"), (False, False, "fails"),
     (None, False, "not tested here"), (np.bool_(True), np.bool_(False), "holds"),
     (np.bool_(False), np.bool_(True), "partly")],
)  # fmt: skip
def test_verdicts(study, holds, partly, verdict):
    assert str(study.claim("C1", measured=1, holds=holds, partly=partly, why="So.")).startswith(f"C1 {verdict}: 1")


@pytest.mark.parametrize(
    "holds, partly", [(1, False), ("yes", False), (0.3, False), (False, None), (torch.tensor(True), False)]
)
def test_a_verdict_is_a_bool(study, holds, partly):
    with pytest.raises(TypeError, match="is True or False"):
        study.claim("C1", measured=1, holds=holds, partly=partly, why="So.")


def test_a_claim_that_does_not_hold_needs_a_reason(study):
    for holds in (False, None):
        with pytest.raises(ValueError, match="C1.*needs why="):
            study.claim("C1", measured=1, holds=holds, why=" ")


def test_an_unknown_claim_lists_the_known(study):
    with pytest.raises(LookupError, match="no claim of toy-paper 'C3'. Known: C1, C2"):
        study.claim("C3", measured=1, holds=True)


def test_every_claim_needs_a_verdict(study):
    study.claim("C1", measured=1, holds=True)
    for close in (study.verdict, study.summary):
        with pytest.raises(ValueError, match="no verdict on C2"):
            close()


def test_a_cell_may_be_run_again(study, tree):
    study.claim("C1", measured=1, holds=False, why="Wrong cell.")
    study.figure(a_figure(), "1-a")
    conclude(study)
    study.figure(a_figure(2), "1-a")
    study.figure(a_figure(3), "2-b")
    conclude(study)
    result = published(tree)
    assert [figure["name"] for figure in result["figures"]] == ["1-a", "2-b"]
    assert result["claims"][0]["verdict"] == "holds"
    assert (tree / "figures" / "toy-paper" / "2-b.svg").is_file()


def test_what_is_measured_is_kept_as_json():
    given = {"a": np.float32(1 / 3), 2: [np.int64(3), (True, np.bool_(False))], "n": np.nan, "i": -np.inf}
    assert plain(given) == {"a": 0.3333, "2": [3, [True, False]], "n": None, "i": None}
    assert plain(torch.ones(2)) == [1.0, 1.0]
    assert plain(123456.7) == 123500.0
    with pytest.raises(TypeError, match="not object"):
        plain({"x": object()})


# ---- what is shown ------------------------------------------------------------------------


def test_the_tables_in_a_notebook(study):
    claims = study.claims()._repr_mimebundle_()[0]["text/markdown"]
    assert claims.count("\n") == 3 and "\\|r\\| of C1" in claims and "> 0.1" in claims
    verdict = conclude(study)
    assert str(verdict) == "C1 holds\nC2 not tested here"
    assert "| C1 |" in verdict._repr_mimebundle_()[0]["text/markdown"]


def test_what_is_measured_cannot_write_html(study):
    shown = study.claim("C1", measured="<b>|r|</b>", holds=True)._repr_mimebundle_()[0]["text/markdown"]
    assert "&lt;b>\\|r\\|&lt;/b>" in shown and "<b>" not in shown
    study.claim("C2", measured=None, holds=None, why="<script>\nx")
    table = study.verdict()._repr_mimebundle_()[0]["text/markdown"]
    assert table.count("\n") == 3 and "&lt;script> x" in table and "<b>" not in table and "**holds**" in table


def test_the_summary_is_the_same_on_every_machine(study, capsys):
    conclude(study)
    study.summary()
    assert capsys.readouterr().out == "C1 holds\nC2 not tested here\n"


def test_the_summary_leaves_out_a_verdict_that_a_busy_machine_can_turn(study, capsys):
    study.claim("C1", measured=1, holds=True, timed=True)
    study.claim("C2", measured=1, holds=None, why="No time.")
    study.summary()
    assert capsys.readouterr().out == "C1 timed\nC2 not tested here\n"
    study.claim("C1", measured=1, holds=True)
    study.summary()
    assert capsys.readouterr().out == "C1 holds\nC2 not tested here\n"


def test_a_figure_is_closed_after_it_was_kept(study):
    fig = a_figure()
    assert study.figure(fig, "1-a") is None
    assert not plt.fignum_exists(fig.number)
    for name in ("../1-a", ".", "..", "", ".hidden", "a/b", "a b", None, 3):
        with pytest.raises(ValueError, match="file stem"):
            study.figure(a_figure(), name)


def test_an_animation_is_kept_and_closed(study, tree):
    fig = a_figure()
    study.animation(fig, lambda x: fig.axes[0].set_xlim(0, x), [1, 2], "1-film", {"x": [1, 2]}, "It moves.", seconds=1)
    assert not plt.fignum_exists(fig.number)
    with pytest.raises(ValueError, match="file stem"):
        study.animation(a_figure(), print, [1, 2], "a/b")
    conclude(study)
    [film] = published(tree)["figures"]
    assert film == {"name": "1-film", "caption": "It moves.", "files": [f"1-film.{kind}" for kind in ("png", "film.png", "gif", "csv")]}
    assert all((tree / "figures" / "toy-paper" / name).is_file() for name in film["files"])


# ---- the record ---------------------------------------------------------------------------


def test_names_give_what_the_parameters_cell_declares_and_nothing_else(tree):
    around = {**DEFAULTS, "np": np, "_": 3, "study": None}
    assert Study("toy-paper", around).parameters == DEFAULTS
    with pytest.raises(TypeError, match="lacks size"):
        Study("toy-paper", {name: value for name, value in around.items() if name != "size"})
    with pytest.raises(TypeError, match="'size' of toy-paper is a int"):
        Study("toy-paper", {**around, "size": "three"})


def test_a_picture_has_its_caption_as_alternative_text(study, monkeypatch):
    shown = []
    monkeypatch.setattr("heads.course.study.get_ipython", lambda: True)
    monkeypatch.setattr("heads.course.study.display", lambda *what: shown.extend(what))
    study.figure(a_figure(), "1-a", caption='A line "rises".')
    study.animation(a_figure(), lambda x: None, [1, 2], "2-b", caption='It <moves> "on".', seconds=1)
    data, about = shown[0]._repr_mimebundle_()
    assert about == {"image/png": {"alt": 'A line "rises".'}} and data["image/png"].startswith(b"\x89PNG")
    film = shown[-1]._repr_mimebundle_()[0]["text/html"]
    assert film.startswith("<details><summary>Play") and 'alt="It &lt;moves&gt; &quot;on&quot;. (film)"' in film


def test_smoke_says_that_it_is_smoke(tree):
    smoke = Study("toy-paper", **{**DEFAULTS, "size": 1})
    assert smoke.preset == "smoke"
    assert papers.is_smoke("toy-paper", {**DEFAULTS, "size": 1, "seed": 7}) and not papers.is_smoke("toy-paper", DEFAULTS)
    assert "C1 holds (smoke: too small to mean anything)" in repr(smoke.claim("C1", measured=1, holds=True))
    smoke.claim("C2", measured=1, holds=True)
    assert "verdict (smoke: too small" in smoke.verdict()._repr_mimebundle_()[0]["text/markdown"]


def test_runs_kept_from_elsewhere_stay_beside_the_result_and_are_shown(study, tree):
    assert "no other run" in repr(study.elsewhere()).lower()
    kept = tree / "figures" / "toy-paper" / papers.ELSEWHERE
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps([{"parameters": {"seed": 1}, "model": None, "seconds": 3.2, "code": "0" * 64,
                                 "verdicts": {"C1": "holds", "C2": "fails"}}]))  # fmt: skip
    conclude(study)
    assert kept.is_file() and published(tree)
    table = study.elsewhere()._repr_mimebundle_()[0]["text/markdown"]
    assert "| run with |  | C1 | C2 |" in table and "| seed 1 (earlier code) | 3 s | holds | fails |" in table


def test_the_record_is_complete(study, tree):
    model = Model()
    assert study.uses(model) is model
    with pytest.raises(TypeError, match="heads.load"):
        study.uses("smollm2-135m")
    study.scores("retrieval", Scores())
    study.figure(a_figure(), "1-a", {"x": [1]}, "A caption.")
    conclude(study)
    result = published(tree)
    assert list(result) == [
        "paper", "arxiv", "preset", "parameters", "seed", "model", "versions", "hardware", "seconds",
        "peak_memory_bytes", "code", "claims", "scores", "figures",
    ]  # fmt: skip
    assert result["parameters"] == DEFAULTS and result["arxiv"] == "2401.00001"
    assert {"name": "toy", "revision": "1", "sha256": "00"}.items() <= result["model"].items()
    assert result["scores"] == {"retrieval": {"layers": 1, "heads": 2, "values": [[0.3333, None]]}}
    assert list(result["claims"][0]) == ["id", "text", "paper", "measured", "verdict", "why"]
    [figure] = result["figures"]
    assert figure["caption"] == "A caption." and figure["files"] == ["1-a.png", "1-a.svg", "1-a.csv"]
    assert result["versions"]["torch"] == torch.__version__ and result["seconds"] >= 0
    assert result["peak_memory_bytes"] > 2**20 and list(result["code"]) == ["sha256", "modules", "data"]
    assert len(result["code"]["sha256"]) == 64 and "course/study.py" in result["code"]["modules"]
    assert "house.mplstyle" in result["code"]["modules"], "how figures look is part of a result"


def test_the_record_names_no_host_user_or_path(study, tree):
    conclude(study)
    text = json.dumps({k: published(tree)[k] for k in ("hardware", "versions")})
    assert str(tree) not in text and os.uname().nodename not in text and os.path.expanduser("~") not in text


MODULES, DATA = ["house.mplstyle", "lab/ablation.py", "lab/training.py", "names.py"], ["words.jsonl"]


@pytest.fixture
def digest(tree, tmp_path, monkeypatch):
    """The digest of the toy paper, over a copy of the package that a test may change."""
    copy = tmp_path / "package"
    shutil.copytree(Path(record.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(record, "PACKAGE", copy)
    (tree / "data" / "words.jsonl").write_text("one")
    return lambda: record.digest("toy-paper", MODULES, DATA)


def rewritten(path, change):
    """Change a notebook's cells in place."""
    book = json.loads(path.read_text())
    change(book["cells"])
    path.write_text(json.dumps(book))


def longer(path):
    path.write_text(path.read_text() + "# new")


def follow(what, tree, monkeypatch):
    """Change one thing of the toy paper, of the package's copy or of the façade."""
    book, copy = tree / "notebooks" / "11_toy_paper.ipynb", tree / "package"
    catalogue = tree / "data" / "papers.yaml"
    {
        "a code cell": lambda: rewritten(book, lambda cells: cells[-1].update(source="print(1)")),
        "the parameters": lambda: rewritten(book, lambda cells: cells[1].update(source="seed = 1  # other")),
        "the paper's claims": lambda: catalogue.write_text(catalogue.read_text().replace("> 0.1", "> 0.2")),
        "a module that was imported": lambda: longer(copy / "lab" / "ablation.py"),
        "the style sheet": lambda: longer(copy / "house.mplstyle"),
        "a module that is gone": lambda: (copy / "names.py").unlink(),
        "data that was read": lambda: (tree / "data" / "words.jsonl").write_text("two"),
        "a row that leads elsewhere now": lambda: monkeypatch.setitem(heads.HOMES, "ablate", ("heads.lab.new", "ablate")),
        "a module's row that leads elsewhere now": lambda: monkeypatch.setitem(heads.HOMES, "train", ("heads.lab", "new")),
        "prose": lambda: rewritten(book, lambda cells: cells[0].update(source="# Other prose")),
        "a new cell of prose": lambda: rewritten(book, lambda cells: cells.insert(1, dict(cells[0]))),
        "outputs": lambda: rewritten(book, lambda cells: cells[-1].update(outputs=["x"], execution_count=7)),
        "a module that was not imported": lambda: longer(copy / "lab" / "paths.py"),
        "a new module": lambda: (copy / "lab" / "new.py").write_text("x = 1"),
        "data that was not read": lambda: (tree / "data" / "more.jsonl").write_text("x"),
        "a new row to another module": lambda: monkeypatch.setitem(heads.HOMES, "new", ("heads.lab.new", "new")),
    }[what]()


@pytest.mark.parametrize("what", [
    "a code cell", "the parameters", "the paper's claims", "a module that was imported", "a module that is gone",
    "data that was read", "the style sheet", "a row that leads elsewhere now", "a module's row that leads elsewhere now",
])  # fmt: skip
def test_the_digest_follows_what_a_result_rests_on(digest, tree, monkeypatch, what):
    papers._read.cache_clear()
    before = digest()
    assert before == digest() and len(before) == 64
    follow(what, tree, monkeypatch)
    papers._read.cache_clear()
    assert digest() != before


@pytest.mark.parametrize("what", [
    "prose", "a new cell of prose", "outputs", "a module that was not imported", "a new module", "data that was not read",
    "a new row to another module",
])  # fmt: skip
def test_the_digest_follows_nothing_else(digest, tree, monkeypatch, what):
    before = digest()
    follow(what, tree, monkeypatch)
    assert digest() == before


def test_a_result_names_the_modules_and_the_data_that_its_process_used(tree):
    """In a fresh process: the façade alone brings nothing, a name that was used brings its module."""
    (tree / "data" / "words.jsonl").write_text("one")
    code = """if True:
        import json
        import heads
        from heads import names
        from heads.course import record
        heads.models
        names.data("words.jsonl")
        print(json.dumps(record.code("toy-paper")))"""
    used = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert used["modules"] == ["course/papers.py", "course/record.py", "model/families.py", "model/zoo.py", "names.py"]
    assert used["data"] == ["words.jsonl"]
    assert used["sha256"] == record.digest("toy-paper", used["modules"], used["data"])


def test_a_result_is_current_until_its_code_changes(study, tree):
    assert not record.current("toy-paper"), "there is none yet"
    conclude(study)
    assert record.current("toy-paper") and record.current("toy-paper", tree / "figures" / "toy-paper")
    assert not record.current("toy-paper", tree / "nowhere") and not record.current("far-paper")
    book = tree / "notebooks" / "11_toy_paper.ipynb"
    rewritten(book, lambda cells: cells[0].update(source="# Other prose"))
    assert record.current("toy-paper")
    rewritten(book, lambda cells: cells[-1].update(source="print(1)"))
    assert not record.current("toy-paper")
    conclude(study)
    assert record.current("toy-paper")
    result = tree / "figures" / "toy-paper" / "result.json"
    for damaged in ('{"paper": "toy-paper"}', '{"code": "0123"}', '{"code": {"sha256": "0123"}}', "{"):
        result.write_text(damaged)
        assert not record.current("toy-paper"), damaged


# ---- all or nothing -----------------------------------------------------------------------

RUN = """
import sys, time, matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
from heads.course.study import Study
study = Study("toy-paper", seed=0, size=3, rate=0.5, names=["a", "b"], flag=False, limit=None)
fig, ax = plt.subplots()
study.figure(fig, "9-half")
print("halfway", flush=True)
time.sleep(60)
"""


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failed_run_leaves_the_last_good_figures(study, tree):
    study.figure(a_figure(), "1-a")
    conclude(study)
    good = snapshot(tree / "figures" / "toy-paper")
    second = Study("toy-paper", **DEFAULTS)
    second.figure(a_figure(5), "1-a")
    second.figure(a_figure(), "2-b")
    with pytest.raises(ValueError):
        second.verdict()
    assert snapshot(tree / "figures" / "toy-paper") == good


def test_a_figure_that_is_no_longer_drawn_goes(study, tree):
    study.figure(a_figure(), "1-old")
    conclude(study)
    conclude(Study("toy-paper", **DEFAULTS))
    assert [path.name for path in (tree / "figures" / "toy-paper").iterdir()] == ["result.json"]


def test_a_swap_that_fails_puts_the_old_folder_back(study, tree, monkeypatch):
    conclude(study)
    good = snapshot(tree / "figures" / "toy-paper")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full_disk)
    with pytest.raises(OSError, match="No space"):
        study.verdict()
    assert snapshot(tree / "figures" / "toy-paper") == good


def test_names_are_exchanged_or_two_renames_do(study, tree, monkeypatch):
    for exchanged in (record._exchanged, lambda one, other: False):
        monkeypatch.setattr(record, "_exchanged", exchanged)
        for value in (1, 2):
            study.figure(a_figure(value), "1-a")
            conclude(study)
            assert sorted(snapshot(tree / "figures" / "toy-paper")) == ["1-a.png", "1-a.svg", "result.json"]
    assert len(hidden(tree / "figures")) == 1, "only what the study itself writes aside"


def test_what_an_earlier_version_left_aside_goes_too(tree):
    machine = record.Folder(tree / "figures" / "toy-paper")._machine
    for name in ("tmp", "new"):  # without the part that nobody can guess
        (tree / "figures" / f".toy-paper.{name}-{machine}-99999999").mkdir()
    Study("toy-paper", **DEFAULTS)
    assert not [name for name in hidden(tree / "figures") if "99999999" in name]


def test_what_is_aside_cannot_be_guessed_and_follows_no_link(tree):
    one, other = record.Folder(tree / "one").work, record.Folder(tree / "other").work
    assert one.name.rpartition("-")[2] != other.name.rpartition("-")[2] and len(one.name.rpartition("-")[2]) == 16


def test_a_killed_run_leaves_the_last_good_figures(study, tree):
    conclude(study)
    good = snapshot(tree / "figures" / "toy-paper")
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "halfway\n"
    assert of(run, tree), "the run writes aside"
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert snapshot(tree / "figures" / "toy-paper") == good
    Study("toy-paper", **DEFAULTS)
    assert not of(run, tree), "the next run tidies up"


def test_two_runs_at_once_keep_out_of_each_others_way(study, tree):
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "halfway\n"
    study.figure(a_figure(), "1-a")
    conclude(study)
    assert of(run, tree), "the other still writes"
    assert sorted(snapshot(tree / "figures" / "toy-paper")) == ["1-a.png", "1-a.svg", "result.json"]
    run.kill()
    run.wait()


def test_peak_memory_is_in_bytes():
    held = np.ones(2**24)  # 128 MiB
    assert record.peak_memory_bytes() > held.nbytes
