"""Running a notebook: refused before it starts, executed in this environment, published only after success."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import nbformat
import pytest
import torch
from toys import DEFAULTS, FIGURE, STUDY, toy_notebook

from heads.course import papers
from heads.course import runs as run


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bare(*cells):
    """A notebook of these cells alone, without a study: its kernel has nothing heavy to import."""
    book = toy_notebook(*cells)
    book.cells = book.cells[:-3]
    return book


def write(*cells):
    nbformat.write(toy_notebook(*cells), papers.notebook("toy-paper"))


@pytest.fixture
def good(tree):
    """The folder that an earlier run published, and what is in it."""
    folder = tree / "figures" / "toy-paper"
    folder.mkdir(parents=True)
    for name in ("1-line.png", "1-line.svg", "1-old.csv", "result.json"):
        (folder / name).write_text(f"an earlier {name}")
    return snapshot(folder)


# ---- before anything starts ---------------------------------------------------------------


@pytest.mark.parametrize(
    "slug, preset, values, error, words",
    [
        ("toy-papers", None, {}, LookupError, "'toy-paper'"),
        ("far-paper", None, {}, FileNotFoundError, "no notebook yet"),
        ("toy-paper", "smoek", {}, LookupError, "'smoke'"),
        ("toy-paper", None, {"sise": 1}, TypeError, "'size'"),
        ("toy-paper", None, {"size": "many"}, TypeError, "is a int"),
        ("toy-paper", "smoke", {"rate": "x"}, TypeError, "is a float"),
        ("toy-paper", "", {}, LookupError, "no preset of toy-paper ''. Known: smoke, paper"),
        ("toy-paper", None, {"size": 0}, ValueError, "is a whole number from 1"),
        ("toy-paper", None, {"seed": -1}, ValueError, "is a whole number from 0"),
        ("toy-paper", None, {"rate": float("nan")}, ValueError, "must be finite"),
    ],
)
def test_what_cannot_run_is_refused(tree, slug, preset, values, error, words):
    with pytest.raises(error, match=words):
        run.plan(slug, preset, values)


def test_a_value_goes_before_a_preset(tree):
    assert run.plan("toy-paper", "paper", {"size": 4}) == {"size": 4, "names": ["c"]}


def test_a_tuple_is_a_list(tree):
    """Papermill makes a text of a tuple."""
    assert run.plan("toy-paper", None, {"names": ("a", "c")}) == {"names": ["a", "c"]}


def test_an_unknown_model_is_refused(tree):
    nbformat.write(toy_notebook(parameters='model = "smollm2-135m"  # which\n'), papers.notebook("toy-paper"))
    assert run.plan("toy-paper", None, {"model": "tiny-llama"}) == {"model": "tiny-llama"}
    with pytest.raises(LookupError, match="smollm2-135m"):
        run.plan("toy-paper", None, {"model": "smollm2"})


def test_a_folder_of_a_model_is_meant_from_here(tree, monkeypatch):
    """The kernel runs in the folder of the notebook."""
    nbformat.write(toy_notebook(parameters='model = "smollm2-135m"  # which\n'), papers.notebook("toy-paper"))
    monkeypatch.chdir(tree)
    for name in ("mine", "smollm2-135m"):
        (tree / name).mkdir()
    assert run.plan("toy-paper", None, {"model": "./mine"}) == run.plan("toy-paper", None, {"model": "mine"})
    assert run.plan("toy-paper", None, {"model": "mine"}) == {"model": str(tree / "mine")}
    assert run.plan("toy-paper", None, {"model": "smollm2-135m"}) == {"model": "smollm2-135m"}
    assert run.plan("toy-paper", None, {"model": "owner/name"}) == {"model": "owner/name"}


@pytest.mark.parametrize("device, gpus, good", [
    ("auto", 0, True), ("cpu", 0, True), ("spread", 0, True), ("cuda", 1, True), ("cuda:1", 2, True), ("cuda", 0, False),
    ("cuda:2", 2, False), ("cuda:-1", 2, False), ("cuda:x", 2, False), ("gpu", 2, False), ("meta", 2, False), ("cuda ", 2, False),
])  # fmt: skip
def test_a_device_must_be_here(tree, monkeypatch, device, gpus, good):
    nbformat.write(toy_notebook(parameters="device = 'auto'  # which\n"), papers.notebook("toy-paper"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if good:
        assert run.plan("toy-paper", None, {"device": device}) == {"device": device}
    else:
        with pytest.raises(ValueError, match=f"^device='{device}': expected 'auto', .*; this torch sees {gpus} GPUs$"):
            run.plan("toy-paper", None, {"device": device})


# ---- one run ------------------------------------------------------------------------------


def test_a_default_run_publishes_and_leaves_the_source_alone(tree):
    source = papers.notebook("toy-paper").read_bytes()
    outcome = run.run("toy-paper")
    assert outcome.verdicts == {"C1": "holds", "C2": "not tested here"} and outcome.seconds > 0
    assert outcome.notebook == tree / "runs" / "toy-paper-default" / "notebook.ipynb"
    assert papers.notebook("toy-paper").read_bytes() == source
    assert set(snapshot(tree / "figures" / "toy-paper")) == {"1-line.png", "1-line.svg", "1-line.csv", "result.json"}
    assert papers.result("toy-paper")["parameters"] == DEFAULTS
    executed = nbformat.read(outcome.notebook, as_version=4)
    pictures = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1, "a figure appears once"


def test_a_run_of_ones_own_stays_in_its_folder(tree):
    outcome = run.run("toy-paper", "smoke", {"limit": 3})
    [result] = [json.loads(path.read_text()) for path in tree.rglob("result.json")]
    assert result["preset"] == "custom" and result["parameters"] == {**DEFAULTS, "size": 1, "limit": 3}
    folder = papers.run_folder("toy-paper", {"size": 1, "limit": 3})
    assert (folder / "figures" / "result.json").is_file() and outcome.notebook == folder / "notebook.ipynb"
    assert papers.result("toy-paper") is None


def test_a_failed_cell_is_named_and_the_last_good_figures_stay(tree, good):
    write(STUDY, FIGURE, "1 / 0")
    with pytest.raises(RuntimeError, match="^cell 4: ZeroDivisionError: division by zero\n.*notebook.ipynb$"):
        run.run("toy-paper")
    assert snapshot(tree / "figures" / "toy-paper") == good


def test_a_kernel_that_dies_is_a_failed_run(tree):
    write("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeError, match="died.*\n.*notebook.ipynb$"):
        run.run("toy-paper")


def test_the_kernel_is_this_interpreter_whatever_is_in_the_home_folder(tree, monkeypatch):
    spec = tree / "home" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "Another", "language": "python"}')
    monkeypatch.setenv("HOME", str(tree / "home"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    nbformat.write(bare(f"import sys\nassert sys.executable == {sys.executable!r}"), papers.notebook("toy-paper"))
    run.run("toy-paper")


def test_a_killed_run_leaves_the_last_good_figures(tree, good):
    write(STUDY, FIGURE, f"import os, time\nopen({str(tree / 'halfway')!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)")
    process = subprocess.Popen([sys.executable, "-m", "heads", "run", "toy-paper"], stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while not (tree / "halfway").exists() or not (tree / "halfway").read_text():
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ProcessLookupError):  # its kernel sleeps on until it notices
        os.kill(int((tree / "halfway").read_text()), signal.SIGKILL)
    assert snapshot(tree / "figures" / "toy-paper") == good
    folder = tree / "runs" / "toy-paper-default"
    assert len(list(folder.iterdir())) == 1 and not (folder / "notebook.ipynb").exists(), "no half notebook"
    write("x = 1")
    with pytest.raises(RuntimeError, match="^cell 3: NameError"):
        run.run("toy-paper")
    assert [path.name for path in folder.iterdir()] == ["notebook.ipynb"], "the next run tidies up"


def test_the_kernel_is_quiet_and_speaks_over_sockets_of_its_own(tree, capfd, monkeypatch):
    code = "import json, sys, glob\nfrom ipykernel.connect import get_connection_info\n"
    code += "info = get_connection_info(unpack=True)\nopen('info', 'w').write(json.dumps([info['transport'], info['ip']]))"
    nbformat.write(bare(code), papers.notebook("toy-paper"))
    for long in (False, True):
        if long:  # the name of a socket has an end: then it is TCP, and quiet as well
            (tree / ("x" * 100)).mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(tree / ("x" * 100)))
        run.run("toy-paper")
        transport, ip = json.loads((tree / "notebooks" / "info").read_text(encoding="utf-8"))
        assert transport == ("tcp" if long or os.name != "posix" else "ipc")
        assert transport == "tcp" or not os.path.exists(os.path.dirname(ip)), "its folder is gone"
        assert "TCP" not in capfd.readouterr().err


def test_a_section_is_the_nearest_heading_above():
    cells = [
        {"cell_type": kind, "source": text}
        for kind, text in [("code", "# no heading"), ("markdown", "# 1 · Toy\n\ntext\n\n## C1 · " + "x" * 40), ("code", "y"),
                           ("markdown", "prose, and #no heading"), ("code", "# a comment"), ("markdown", "### Last ")]
    ]  # fmt: skip
    long = "C1 · " + "x" * 30 + "…"
    assert [run.section(cells, n) for n in range(6)] == ["", long, long, long, long, "Last"] and len(long) == 36


@pytest.mark.skipif(os.name != "posix", reason="a terminal as POSIX has it")
def test_on_a_terminal_the_bar_names_the_section(tree):
    import fcntl
    import pty
    import struct
    import termios

    book = bare("1", "2")
    book.cells[2].source = "## C1 · Rare"
    nbformat.write(book, papers.notebook("toy-paper"))
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", "from heads.course import runs; runs.run('toy-paper')"], stderr=child)
    os.close(child)
    seen = os.read(parent, 10_000).decode()
    os.close(parent)
    assert "11_toy_paper  A toy  " in seen and "11_toy_paper  C1 · Rare  " in seen
    assert all(len(line) <= 80 for line in seen.replace("\x1b[A", "").replace("\n", "\r").split("\r") if "[" in line)


# ---- the committed notebook ---------------------------------------------------------------


def test_refresh_commits_the_same_bytes_twice(tree):
    path = papers.notebook("toy-paper")
    run.refresh("toy-paper")
    first = path.read_bytes()
    book = nbformat.reads(first.decode(), as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.metadata for cell in code if cell.metadata] == [{"tags": ["parameters"]}, {"tags": ["nbval-check-output"]}]
    assert code[-1].outputs[0].text == "C1 holds\nC2 not tested here\n"
    assert set(book.metadata) == {"kernelspec", "language_info"} and book.metadata.kernelspec.name == "python3"
    run.refresh("toy-paper")
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_refresh_leaves_the_notebook(tree):
    write("1 / 0")
    path = papers.notebook("toy-paper")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run.refresh("toy-paper")
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_notebook_too_large_to_commit_is_refused(tree):
    nbformat.write(bare("print('x' * 400_000)"), papers.notebook("toy-paper"))
    path = papers.notebook("toy-paper")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="300 kB"):
        run.refresh("toy-paper")
    assert path.read_bytes() == before


# ---- runs that are kept beside the default's ------------------------------------------------


def test_a_run_elsewhere_is_kept_once_and_leaves_the_figures_alone(good, tree):
    folder = tree / "figures" / "toy-paper"
    for seed, rate in ((1, 0.5), (2, 0.5), (1, 0.5)):
        assert run.elsewhere("toy-paper", {"seed": seed, "rate": rate}) == folder / papers.ELSEWHERE
    first, second = papers.elsewhere("toy-paper")
    assert first["parameters"] == {"seed": 2, "rate": 0.5} and second["parameters"] == {"seed": 1, "rate": 0.5}
    assert second["verdicts"] == {"C1": "holds", "C2": "not tested here"} and len(second["code"]) == 64
    kept = snapshot(folder)
    assert kept.pop(papers.ELSEWHERE) and kept == good


@pytest.mark.parametrize("values", [{}, {"seed": 0}, {"size": 1}])
def test_defaults_and_presets_are_not_elsewhere(good, tree, values):
    with pytest.raises(ValueError, match="name what differs, such as -p seed=1"):
        run.elsewhere("toy-paper", values)
    assert snapshot(tree / "figures" / "toy-paper") == good
