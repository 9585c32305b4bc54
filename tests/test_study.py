"""Study: what it refuses, what it keeps, and that it publishes everything or nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_papers import DEFAULTS, tree  # noqa: F401 (a fixture)

from heads.course import record
from heads.course.study import Study, plain


class Model:
    record = {"name": "toy", "revision": "1", "sha256": "00", "dtype": "float32"}


class Scores:
    def to_dict(self):
        return {"layers": 1, "heads": 2, "values": [[1 / 3, float("nan")]]}


@pytest.fixture
def study(tree):  # noqa: F811
    return Study("toy-paper", **DEFAULTS)


def conclude(study):
    study.claim("C1", measured=0.5, holds=True)
    study.claim("C2", measured=None, holds=None, why="Not here.")
    return study.verdict()


def a_figure(value=1):
    fig, ax = plt.subplots()
    ax.plot([0, value])
    return fig


def published(tree):  # noqa: F811
    return json.loads((tree / "figures" / "toy-paper" / "result.json").read_text())


def hidden(folder):
    return [path.name for path in folder.glob(".*") if not path.name.endswith(".lock")]


# ---- parameters ---------------------------------------------------------------------------


def test_the_keywords_are_the_parameters_cell(tree):  # noqa: F811
    with pytest.raises(LookupError, match="Did you mean 'toy-paper'"):
        Study("toy-papier", **DEFAULTS)
    with pytest.raises(TypeError, match="no parameter 'sise'. Did you mean 'size'"):
        Study("toy-paper", **DEFAULTS, sise=3)
    with pytest.raises(TypeError, match="lacks rate, names"):
        Study("toy-paper", **{k: v for k, v in DEFAULTS.items() if k not in ("rate", "names")})
    with pytest.raises(TypeError, match="'size' of toy-paper is a int"):
        Study("toy-paper", **{**DEFAULTS, "size": "3"})
    assert not (tree / "figures").exists(), "a refused study leaves nothing behind"


def test_a_paper_without_a_notebook_takes_any_parameter(tree):  # noqa: F811
    assert Study("far-paper", anything=1).preset == "default"


@pytest.mark.parametrize("changes, preset", [({}, "default"), ({"size": 1}, "smoke"), ({"size": 2}, "custom")])
def test_the_preset_is_derived(tree, changes, preset):  # noqa: F811
    study = Study("toy-paper", **{**DEFAULTS, **changes})
    conclude(study)
    [result] = [path for path in tree.rglob("result.json") if not path.parent.name.startswith(".")]
    assert json.loads(result.read_text())["preset"] == study.preset == preset
    assert (result.parent.parent.name == "figures") == (preset == "default")


def test_one_seed_for_all(tree):  # noqa: F811
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
    with pytest.raises(LookupError, match="no claim 'C3'. It has: C1, C2"):
        study.claim("C3", measured=1, holds=True)


def test_every_claim_needs_a_verdict(study):
    study.claim("C1", measured=1, holds=True)
    for close in (study.verdict, study.summary):
        with pytest.raises(ValueError, match="no verdict on C2"):
            close()


def test_a_cell_may_be_run_again(study, tree):  # noqa: F811
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
    claims = study.claims()._repr_mimebundle_()["text/markdown"]
    assert claims.count("\n") == 3 and "\\|r\\| of C1" in claims and "> 0.1" in claims
    verdict = conclude(study)
    assert str(verdict) == "C1 holds\nC2 not tested here"
    assert "| C1 |" in verdict._repr_mimebundle_()["text/markdown"]


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
    with pytest.raises(ValueError, match="file stem"):
        study.figure(a_figure(), "../1-a")


def test_an_animation_is_kept_and_closed(study, tree):  # noqa: F811
    fig = a_figure()
    study.animation(fig, lambda x: fig.axes[0].set_xlim(0, x), [1, 2], "1-film", {"x": [1, 2]}, "It moves.", seconds=1)
    assert not plt.fignum_exists(fig.number)
    with pytest.raises(ValueError, match="file stem"):
        study.animation(a_figure(), print, [1, 2], "a/b")
    conclude(study)
    [film] = published(tree)["figures"]
    assert film == {"name": "1-film", "caption": "It moves.", "files": ["1-film.png", "1-film.gif", "1-film.csv"]}
    assert all((tree / "figures" / "toy-paper" / name).is_file() for name in film["files"])


# ---- the record ---------------------------------------------------------------------------


def test_the_record_is_complete(study, tree):  # noqa: F811
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
        "peak_memory_bytes", "code_sha256", "claims", "scores", "figures",
    ]  # fmt: skip
    assert result["parameters"] == DEFAULTS and result["arxiv"] == "2401.00001"
    assert {"name": "toy", "revision": "1", "sha256": "00"}.items() <= result["model"].items()
    assert result["scores"] == {"retrieval": {"layers": 1, "heads": 2, "values": [[0.333333, None]]}}
    assert list(result["claims"][0]) == ["id", "text", "paper", "measured", "verdict", "why"]
    [figure] = result["figures"]
    assert figure["caption"] == "A caption." and figure["files"] == ["1-a.png", "1-a.svg", "1-a.csv"]
    assert result["versions"]["torch"] == torch.__version__ and result["seconds"] >= 0
    assert result["peak_memory_bytes"] > 2**20 and len(result["code_sha256"]) == 64


def test_the_record_names_no_host_user_or_path(study, tree):  # noqa: F811
    conclude(study)
    text = json.dumps({k: published(tree)[k] for k in ("hardware", "versions")})
    assert str(tree) not in text and os.uname().nodename not in text and os.path.expanduser("~") not in text


def test_the_code_digest_follows_code_not_outputs(tree):  # noqa: F811
    def digest():
        conclude(Study("toy-paper", **DEFAULTS))
        return published(tree)["code_sha256"]

    path = tree / "notebooks" / "11_toy_paper.ipynb"
    first, book = digest(), json.loads(path.read_text())
    book["cells"][0]["source"] = "# Other prose"
    book["cells"][1]["execution_count"] = 7
    path.write_text(json.dumps(book))
    assert digest() == first
    book["cells"][-1]["source"] = "print(1)"
    path.write_text(json.dumps(book))
    assert digest() != first


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


def test_a_failed_run_leaves_the_last_good_figures(study, tree):  # noqa: F811
    study.figure(a_figure(), "1-a")
    conclude(study)
    good = snapshot(tree / "figures" / "toy-paper")
    second = Study("toy-paper", **DEFAULTS)
    second.figure(a_figure(5), "1-a")
    second.figure(a_figure(), "2-b")
    with pytest.raises(ValueError):
        second.verdict()
    assert snapshot(tree / "figures" / "toy-paper") == good


def test_a_figure_that_is_no_longer_drawn_goes(study, tree):  # noqa: F811
    study.figure(a_figure(), "1-old")
    conclude(study)
    conclude(Study("toy-paper", **DEFAULTS))
    assert [path.name for path in (tree / "figures" / "toy-paper").iterdir()] == ["result.json"]


def test_a_swap_that_fails_puts_the_old_folder_back(study, tree, monkeypatch):  # noqa: F811
    conclude(study)
    good = snapshot(tree / "figures" / "toy-paper")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full_disk)
    with pytest.raises(OSError, match="No space"):
        study.verdict()
    assert snapshot(tree / "figures" / "toy-paper") == good


def test_a_killed_run_leaves_the_last_good_figures(study, tree):  # noqa: F811
    conclude(study)
    good = snapshot(tree / "figures" / "toy-paper")
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "halfway\n"
    left = [name for name in hidden(tree / "figures") if name.endswith(f"-{run.pid}")]
    assert left, "the run writes aside"
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert snapshot(tree / "figures" / "toy-paper") == good
    Study("toy-paper", **DEFAULTS)
    assert not [name for name in hidden(tree / "figures") if name.endswith(f"-{run.pid}")], "the next run tidies up"


def test_two_runs_at_once_keep_out_of_each_others_way(study, tree):  # noqa: F811
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "halfway\n"
    study.figure(a_figure(), "1-a")
    conclude(study)
    assert [name for name in hidden(tree / "figures") if name.endswith(f"-{run.pid}")], "the other still writes"
    assert sorted(snapshot(tree / "figures" / "toy-paper")) == ["1-a.png", "1-a.svg", "result.json"]
    run.kill()
    run.wait()


def test_peak_memory_is_in_bytes():
    held = np.ones(2**24)  # 128 MiB
    assert record.peak_memory_bytes() > held.nbytes
