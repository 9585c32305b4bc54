"""The command line as a user meets it: in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from conftest import tiny
from toys import toy_notebook

from heads import cli
from heads.course import copies, papers, runs
from heads.scores import HeadScores


def heads(*arguments, **env):
    """(exit status, stdout, stderr) of `python -m heads ...`."""
    done = subprocess.run([sys.executable, "-m", "heads", *arguments], capture_output=True, text=True, env=os.environ | env)
    return done.returncode, done.stdout, done.stderr


POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and links as POSIX has them")


def called(monkeypatch, capsys, *arguments):
    """The same from `main` in this process, as `python -m heads` calls it."""
    monkeypatch.setattr(sys, "argv", ["heads", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, *capsys.readouterr()


@pytest.fixture
def result(tree):
    """A last default run, as its result.json would have it."""
    folder = tree / "figures" / "toy-paper"
    folder.mkdir(parents=True)
    claims = [
        {"id": "C1", "measured": {"r": 0.95, "heads": 3}, "verdict": "holds"},
        {"id": "C2", "measured": 0.01, "verdict": "fails"},
    ]
    (folder / "result.json").write_text(json.dumps({"paper": "toy-paper", "claims": claims}))


def test_list_for_people_and_for_programs(result):
    status, out, _ = heads("list")
    assert status == 0 and "toy-paper" in out and "planned" in out and "1 holds, 1 fails" in out
    status, out, _ = heads("list", "--json")
    assert status == 0
    first, second = json.loads(out)
    assert first["slug"] == "toy-paper" and first["verdicts"] == {"C1": "holds", "C2": "fails"}
    assert second == {"number": 12, "slug": "far-paper", "title": "Far-Paper", "part": 1, "state": "planned", "verdicts": {}}


def test_the_list_has_one_line_for_each_paper(result):
    """Eighty columns are enough; only a title is ever shortened."""
    long = "1 holds, 1 fails"
    for width in (20, 80, 500):
        found = cli.listing(width)
        assert len(found) == 1 + len(papers.papers())
        for paper, line in zip(papers.papers(), found[1:]):
            assert str(paper.number) in line and paper.slug in line and (cli.verdicts(paper.slug) or paper.state) in line
        assert all(len(line) <= max(width, 2 + len("toy-paper") + 8 + len(long) + 6) for line in found)
    status, out, _ = heads("list")
    assert status == 0 and out.count("\n") == 1 + len(papers.papers())


def test_the_real_list_fits_eighty_columns():
    assert max(map(len, cli.listing(80))) <= 80


def test_titles_are_shortened_with_an_ellipsis(tree, monkeypatch):
    """Eight columns are left for a title: one of eight fits, a longer one is cut after a letter."""
    monkeypatch.setattr(papers, "papers", lambda: [papers.Paper(*["x"] * 3, title, *["x"] * 7) for title in titles])
    monkeypatch.setattr(cli, "verdicts", lambda slug: "")
    titles = ["Low Rank", "Low Rank Factorization", "Longer than"]
    assert [line[10:18].rstrip() for line in cli.listing(8)[1:]] == ["Low Rank", "Low Ran…", "Longer…"]


def test_the_readme_table_links_what_is_ready(result):
    status, out, _ = heads("list", "--markdown")
    assert status == 0
    assert "[11](notebooks/11_toy_paper.ipynb)" in out and "1 holds, 1 fails" in out
    assert "| 12 |" in out and "planned" in out


def test_a_title_cannot_break_the_table(result, monkeypatch):
    paper = papers.paper("toy-paper")
    monkeypatch.setattr(papers, "papers", lambda: [replace(paper, title="|r| <b>", question="Q & A?\nB?")])
    line = cli.papers_table().splitlines()[-1]
    assert "[\\|r\\| &lt;b>](" in line and "| Q &amp; A? B? |" in line and line.count("|") == 7


@POSIX
def test_on_a_terminal_a_title_links_to_its_paper(result):
    """And nowhere else: what is piped is plain text."""
    import pty

    parent, child = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-m", "heads", "list"], stdout=child, env=env)
    os.close(child)
    seen = os.read(parent, 10_000).decode()
    os.close(parent)
    link = r"\x1b]8;[^;]*;https://arxiv.org/abs/2401.00001\x1b\\(.*?)\x1b]8;;\x1b\\"
    assert re.findall(link, seen) == ["Toy-Paper", "Far-Paper"] and "\x1b" not in heads("list")[1]


def test_the_version():
    assert heads("--version") == (0, f"heads {version('heads')}\n", "") and "--version" in heads("--help")[1]


def test_info_shows_both_numbers_and_the_parameters(result):
    status, out, _ = heads("info", "toy-paper")
    assert status == 0
    assert "Does it?" in out and "the paper: 0.9 (Fig 1)" in out and "here: r 0.95, heads 3: holds" in out
    assert "size = 3  # how many samples" in out and "smoke, paper" in out
    assert heads("info", "11")[1] == out
    status, out, _ = heads("info", "12")
    assert status == 0 and "no notebook yet" in out and out == heads("info", "far-paper")[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["info", "toy-papre"], "Did you mean 'toy-paper'"),
        (["info", "13"], "no paper 13. The nearest: 11 toy-paper, 12 far-paper. `heads list` shows all 2."),
        (["info", "0x11"], "no paper '0x11'. `heads list`"),
        (["run", "1"], "no paper 1. The nearest: 11 toy-paper"),
        (["run", "11", "-p", "sise=3"], "toy-paper has no parameter 'sise'. Did you mean 'size'"),
        (["run", "11", "12"], "far-paper has no notebook yet (planned)"),
        (["open", "12", "--no-lab"], "far-paper has no notebook yet (planned)"),
        (["open", "13", "--no-lab"], "no paper 13"),
        (["open", "toy-papre"], "Did you mean 'toy-paper'"),
        (["run", "toy-papre"], "Did you mean 'toy-paper'"),
        (["run", "far-paper"], "no notebook yet"),
        (["run", "toy-paper", "-p", "sise=3"], "Did you mean 'size'"),
        (["run", "toy-paper", "-p", "size=many"], "'size' of toy-paper is a int (default 3), not 'many'"),
        (["run", "toy-paper", "-p", "names=[a"], "'names' of toy-paper is a list of str (default ['a', 'b']), not '[a'"),
        (["run", "toy-paper", "-p", "=3"], "expected name=value"),
        (["run", "toy-paper", "-p", "seed=010"], "'seed' of toy-paper is a int (default 0), not '010'"),
        (["run", "toy-paper", "-p", "seed=1:30"], "'seed' of toy-paper is a int (default 0), not '1:30'"),
        (["run", "toy-paper", "-p", "seed=-1"], "'seed' of toy-paper is a whole number from 0 to 4294967295"),
        (["run", "toy-paper", "-p", "size=0"], "'size' of toy-paper is a whole number from 1 (default 3), not 0"),
        (["run", "toy-paper", "-p", "size=2.0"], "'size' of toy-paper is a int (default 3), not 2.0"),
        (["run", "toy-paper", "-p", "rate=nan"], "'rate' of toy-paper is a float (default 0.5), not 'nan'"),
        (["run", "toy-paper", "-p", "rate=NaN"], "'rate' of toy-paper must be finite (default 0.5), not nan"),
        (["run", "toy-paper", "-p", "rate=1e999"], "'rate' of toy-paper must be finite (default 0.5), not inf"),
        (["run", "toy-paper", "-p", "flag=yes"], "'flag' of toy-paper is a bool (default False), not 'yes'"),
        (["run", "toy-paper", "-p", "limit=many"], "'limit' of toy-paper is a int (default None), not 'many'"),
        (["run", "toy-paper", "--preset", ""], "no preset of toy-paper ''. Known: smoke, paper"),
        (["run", "toy-paper", "--refresh", "--preset", ""], "--refresh runs the defaults"),
        (["run", "toy-paper", "-p", "size"], "expected name=value"),
        (["run", "toy-paper", "--preset", "smokey"], "Did you mean 'smoke'"),
        (["run", "toy-paper", "--model", "gpt2"], "no parameter 'model'"),
        (["run", "toy-paper", "--refresh", "-p", "size=3"], "--refresh runs the defaults"),
        (["run"], "--all"),
        (["run", "--all", "toy-paper"], "--all"),
        (["rnu"], "Did you mean"),
        (["fetch", "smolm2-135m"], "smollm2-135m"),
    ],
)
def test_what_is_wrong_is_refused_in_a_line_or_two(tree, arguments, words, monkeypatch, capsys):
    status, out, err = called(monkeypatch, capsys, *arguments)
    assert status == 2 and words in err and out == ""
    assert "Traceback" not in err and (err.count("\n") <= 2 or "Usage" in err)
    assert not (tree / "runs").exists(), "nothing was started"


def test_one_wrong_paper_stops_all_before_the_first(tree):
    status, _, err = heads("run", "toy-paper", "far-paper")
    assert status == 2 and "far-paper has no notebook yet" in err and not (tree / "runs").exists()


@pytest.mark.parametrize("text, value", [("a=1", "1"), ("a=b=c", "b=c"), (" a = cuda:1", "cuda:1"), ("a=", "")])
def test_an_assignment_is_two_texts(text, value):
    assert cli._assignment(text) == ("a", value)


NAMED = "model = 'tiny-llama'  # a zoo name\ndevice = 'auto'  # where\nranks = [2, 5]  # of each\n"


@pytest.mark.parametrize("arguments, words", [
    ("-p device=gpu", "device='gpu': expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or 'spread'"),
    ("--device cuda:7777", "device='cuda:7777': expected"), ("--device meta", "device='meta': expected"),
    ("--device=", "'device' of toy-paper must not be empty (default 'auto'), not ''"),
    ("--model=", "'model' of toy-paper must not be empty (default 'tiny-llama'), not ''"),
    ("-p model=", "'model' of toy-paper must not be empty"), ("--model tiny-lama", "Did you mean 'tiny-llama'"),
    ("-p ranks=2,x", "'ranks' of toy-paper is a list of int (default [2, 5]), not [2, 'x']"),
    ("-p ranks=2,0", "'ranks' of toy-paper is a whole number from 1"),
])  # fmt: skip
def test_a_model_or_a_device_that_is_not_there_is_refused_before_a_kernel_starts(tree, monkeypatch, capsys, arguments, words):
    nbformat.write(toy_notebook(parameters=NAMED), papers.notebook("toy-paper"))
    status, out, err = called(monkeypatch, capsys, "run", "toy-paper", *arguments.split())
    assert status == 2 and words in err and err.count("\n") == 1 and not (tree / "runs").exists()


# ---- one handler at the door ----------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    ('{"claims": [', "line 1 column 13"), ('{\n"claims":\n}', "line 3 column 1"), ("", "line 1"),
    ("[]", "not what a study writes"), ('{"paper": "toy-paper"}', "not what a study writes"), ('{"claims": [3]}', "not what"),
])  # fmt: skip
@pytest.mark.parametrize("how", [[], ["--json"], ["--markdown"]])
def test_a_broken_record_stops_no_list(result, tree, monkeypatch, capsys, text, words, how):
    (tree / "figures" / "toy-paper" / "result.json").write_text(text, encoding="utf-8")
    status, out, err = called(monkeypatch, capsys, "list", *how)
    assert status == 0 and "toy-paper" in out.lower() and "far-paper" in out.lower()
    assert words in err and "toy-paper" in err and err.startswith("heads: ") and err.count("\n") == 1
    status, out, err = called(monkeypatch, capsys, "info", "toy-paper")
    assert status == 2 and words in err and out == ""


@pytest.mark.parametrize("file", ["data/papers.yaml", "data/presets/toy-paper.yaml", "notebooks/11_toy_paper.ipynb"])
def test_a_broken_file_is_named(tree, monkeypatch, capsys, file):
    (tree / file).write_text("smoke: {\n", encoding="utf-8")
    papers._read.cache_clear()
    status, out, err = called(monkeypatch, capsys, "run", "toy-paper", "--preset", "smoke")
    papers._read.cache_clear()
    assert status == 2 and f"{Path(file).name} is broken: " in err and "line " in err and err.count("\n") == 1


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "heads: out of memory: try smaller sizes or a smaller model\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "heads: out of memory: try smaller"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "heads: out of memory"),
    (OSError(28, "No space left on device", "/x/y"), "heads: [Errno 28] No space left on device: '/x/y'\n"),
    (KeyError("no such thing"), "heads: no such thing\n"), (ValueError(), "heads: ValueError:"),
    (AttributeError("no x"), "heads: AttributeError: no x (--debug shows where)\n"), (AssertionError(), "AssertionError"),
    (KeyboardInterrupt(), "heads: stopped\n"),
])  # fmt: skip
def test_whatever_goes_wrong_is_one_sentence(tree, monkeypatch, capsys, error, words):
    def fail():
        raise error

    monkeypatch.setattr(papers, "papers", fail)
    status, out, err = called(monkeypatch, capsys, "list")
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 2) and words in err and err.count("\n") == 1
    if not isinstance(error, KeyboardInterrupt):
        monkeypatch.setattr(sys, "argv", ["heads", "list", "--debug"])
        with pytest.raises(type(error)):
            cli.main()


def test_debug_shows_where():
    status, _, err = heads("info", "nowhere")
    assert status == 2 and "Traceback" not in err
    for words in (["--debug", "info", "nowhere"], ["info", "nowhere", "--debug"]):
        status, _, err = heads(*words)
        assert status == 1 and "Traceback" in err and "no paper 'nowhere'" in err
    assert "--debug" in heads("--help")[1]


def test_a_truncated_file_of_weights_is_named(tree, monkeypatch, capsys):
    model, tokenizer = tiny("llama")._module, tiny("llama").tokenizer
    model.save_pretrained(tree / "model")
    tokenizer.save_pretrained(tree / "model")
    weights = tree / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    HeadScores(torch.ones(4, 4)).save(tree / "scores.json")
    (tree / "in").write_text('{"text": "two owls"}\n', encoding="utf-8")
    words = ["score-documents", tree / "in", tree / "out", "--scores", tree / "scores.json", "--device", "cpu", "--model"]
    status, _, err = called(monkeypatch, capsys, *words, tree / "model")
    assert status == 2 and "heads: a file of weights is damaged (" in err and "Traceback" not in err


@POSIX
@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_so_and_stops_its_kernel(tree, how, status):
    nbformat.write(toy_notebook("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"),
                   papers.notebook("toy-paper"))  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "heads", "run", "toy-paper"], stderr=subprocess.PIPE, text=True)
    pid, give_up = tree / "notebooks" / "pid", time.monotonic() + 60
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.1)
    process.send_signal(how)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == status and err.endswith("heads: stopped\n") and "Traceback" not in err, err
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)
    assert not list(tree.glob("runs/*/*")), "no half notebook"


@POSIX
def test_whoever_reads_may_stop_reading():
    command = f"{sys.executable} -m heads list | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert len(done.stdout) == 10 and done.stderr == ""


# ---- where it may be ------------------------------------------------------------------------

C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_terminal_without_umlauts_is_enough(tree):
    catalogue = tree / "data" / "papers.yaml"
    text = yaml.safe_dump({**yaml.safe_load(catalogue.read_text(encoding="utf-8"))}, allow_unicode=True)
    catalogue.write_text(text.replace("A. Author", "A. Müller–Ω"), encoding="utf-8")
    for words in (["list"], ["list", "--json"], ["list", "--markdown"], ["info", "toy-paper"], ["run", "toy-papér"]):
        status, out, err = heads(*words, **C)
        assert status == 2 * (words[0] == "run") and "Traceback" not in err and out + err
    assert "M?ller" in heads("info", "toy-paper", **C)[1] and "Müller–Ω" in heads("info", "toy-paper", PYTHONUTF8="1")[1]


def test_the_real_list_wants_no_locale(monkeypatch):
    monkeypatch.delenv("HEADS_ROOT", raising=False)
    for words in (["list"], ["list", "--json"], ["info", "retrieval-head"]):
        status, out, err = heads(*words, **C)
        assert status == 0 and "retrieval-head" in out + words[-1] and err == ""


def test_a_checkout_that_cannot_be_written_is_enough(tree, tmp_path_factory):
    """Where root runs the tests, nothing is read-only: that nothing was written there is what counts."""
    aside = tmp_path_factory.mktemp("aside")
    before = sorted(path.relative_to(tree) for path in tree.rglob("*"))
    tree.chmod(0o555)
    try:
        where = {"HEADS_FIGURES": str(aside / "figures"), "HEADS_RUNS": str(aside / "runs")}
        for words in (["--preset", "smoke"], []):
            status, out, err = heads("run", "toy-paper", *words, **where)
            assert status == 0 and "C1 holds" in out, err
    finally:
        tree.chmod(0o755)
    assert sorted(path.relative_to(tree) for path in tree.rglob("*")) == before
    assert (aside / "figures" / "toy-paper" / "result.json").is_file()
    assert {path.name for path in (aside / "runs").iterdir()} == {"toy-paper-smoke", "toy-paper-default"}


def test_folders_may_be_named_from_here(tree):
    """The kernel runs in the folder of the notebook: a path that begins here must not begin there."""
    where = {"HEADS_ROOT": ".", "HEADS_FIGURES": "drawn", "HEADS_RUNS": "ran"}
    done = subprocess.run([sys.executable, "-m", "heads", "run", "toy-paper"], cwd=tree, env=os.environ | where,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "C1 holds" in done.stdout, done.stderr
    assert (tree / "drawn" / "toy-paper" / "result.json").is_file()
    assert (tree / "ran" / "toy-paper-default" / "notebook.ipynb").is_file()
    assert [path.name for path in (tree / "notebooks").iterdir()] == ["11_toy_paper.ipynb"]


@POSIX
@pytest.mark.parametrize("bad", ["file", "loop", "below a file", "shut"])
def test_doctor_and_fetch_name_a_cache_that_cannot_be_used(tree, bad):
    (tree / "file").write_text("", encoding="utf-8")
    (tree / "loop").symlink_to(tree / "loop")
    (tree / "shut").mkdir(mode=0o500)
    if bad == "shut" and os.access(tree / "shut", os.W_OK):
        pytest.skip("nothing is shut to root")
    home = str(tree / "file" / "x" if bad == "below a file" else tree / bad)
    status, out, err = heads("doctor", HEADS_HOME=home)
    assert status == 1 and "cache  cannot be used: " in out and f"(HEADS_HOME is '{home}'" in out, out + err
    status, out, err = heads("fetch", HEADS_HOME=home)
    assert status == 2 and f"HEADS_HOME is '{home}'" in err and err.count("\n") == 1


def test_a_run_ends_with_its_verdicts(tree):
    status, out, err = heads("run", "11", "--preset", "smoke")
    said = r"11 toy-paper: \d+ s; smoke, no verdicts on the paper: C1 holds, C2 not tested here\n"
    assert status == 0 and re.fullmatch(said, out)
    assert (tree / "runs" / "toy-paper-smoke" / "figures" / "result.json").is_file()
    assert "Traceback" not in err and "\r" not in err, "no bar where there is no terminal"


def test_only_a_smoke_run_says_so(monkeypatch, capsys, tree):
    """Parameters that equal the preset are the preset; beside it, others may stand."""
    monkeypatch.setattr(runs, "run", lambda *_: runs.Outcome(1.2, tree, {"C1": "fails"}))
    for words, smoke in (([], False), (["--preset", "paper"], False), (["-p", "size=1"], True),
                         (["--preset", "smoke", "-p", "size=2"], True)):  # fmt: skip
        status, out, _ = called(monkeypatch, capsys, "run", "toy-paper", *words)
        assert status == 0 and out == f"11 toy-paper: 1 s; {'smoke, no verdicts on the paper: ' * smoke}C1 fails\n"


def test_a_run_is_kept_as_one_of_elsewhere(monkeypatch, capsys, tree):
    asked = []
    monkeypatch.setattr(runs, "elsewhere", lambda *what: asked.append(what) or tree / "figures" / "elsewhere.json")
    status, out, _ = called(monkeypatch, capsys, "run", "11", "-p", "seed=3", "--elsewhere")
    assert status == 0 and asked == [("toy-paper", {"seed": 3})] and out.startswith("11 toy-paper: kept in ")
    for words in (["--preset", "smoke"], ["--refresh"]):
        status, _, error = called(monkeypatch, capsys, "run", "11", "--elsewhere", *words)
        assert status == 2 and "--elsewhere keeps a run with other parameters" in error


# ---- a copy to try things on ----------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch):
    """How JupyterLab would have been called: [(words, environment)]; it ends with status 3."""
    found = []
    monkeypatch.setattr(copies.subprocess, "call", lambda words, env: found.append((words, env)) or 3)
    return found


def test_open_copies_a_notebook_once_and_keeps_what_was_written(tree, monkeypatch, capsys):
    source, copy = papers.notebook("toy-paper"), tree / "runs" / "open" / "11_toy_paper.ipynb"
    before = source.read_bytes()
    assert called(monkeypatch, capsys, "open", "11", "--no-lab") == (0, f"{copy}\n", "")
    assert copy.read_bytes() == before
    copy.write_text("mine", encoding="utf-8")
    assert called(monkeypatch, capsys, "open", "toy-paper", "--no-lab") == (0, f"{copy}\n", "")
    assert copy.read_text(encoding="utf-8") == "mine"
    for n in (1, 2):
        status, out, err = called(monkeypatch, capsys, "open", "11", "--fresh", "--no-lab")
        assert (status, out, err) == (0, f"{copy}\n", f"heads: your earlier copy is now 11_toy_paper-{n}.ipynb\n")
    assert copy.read_bytes() == source.read_bytes() == before
    assert copy.with_name("11_toy_paper-1.ipynb").read_text(encoding="utf-8") == "mine"
    assert len(list(copy.parent.iterdir())) == 3


def test_fresh_without_a_copy_is_a_copy(tree, monkeypatch, capsys):
    monkeypatch.setenv("HEADS_RUNS", "elsewhere")
    monkeypatch.chdir(tree)
    copy = tree / "elsewhere" / "open" / "11_toy_paper.ipynb"
    assert called(monkeypatch, capsys, "open", "11", "--fresh", "--no-lab") == (0, f"{copy}\n", "")
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_open_ends_as_lab_ends(tree, lab, monkeypatch, capsys):
    monkeypatch.setenv("HEADS_RUNS", "elsewhere")
    monkeypatch.chdir(tree)
    handler = signal.getsignal(signal.SIGINT)
    status, out, _ = called(monkeypatch, capsys, "open", "11", "--", "--no-browser", "--port", "9")
    [(words, env)] = lab
    assert status == 3 and words == [sys.executable, "-m", "jupyterlab", out.strip(), "--no-browser", "--port", "9"]
    assert env["HEADS_RUNS"] == str(tree / "elsewhere"), "the kernel runs elsewhere"
    assert env["JUPYTER_PATH"].startswith(str(Path(sys.prefix))) and signal.getsignal(signal.SIGINT) is handler


def test_without_lab_the_cure_is_named(tree, lab, monkeypatch, capsys):
    monkeypatch.setattr(copies, "find_spec", lambda name: None)
    status, out, err = called(monkeypatch, capsys, "open", "11")
    assert status == 2 and "pip install" in err and "--no-lab" in err and Path(out.strip()).is_file() and not lab


def test_a_folder_that_cannot_be_written_is_named(tree, monkeypatch, capsys):
    (tree / "runs").write_text("", encoding="utf-8")  # in place of a folder: root may write anywhere
    status, out, err = called(monkeypatch, capsys, "open", "11", "--no-lab")
    assert status == 2 and out == "" and err.count("\n") == 1 and "set HEADS_RUNS" in err and str(tree / "runs") in err
    monkeypatch.setenv("HEADS_RUNS", str(tree / "runs"))
    status, out, err = called(monkeypatch, capsys, "open", "11", "--no-lab")
    assert status == 2 and f"(HEADS_RUNS is '{tree / 'runs'}'" in err


def test_a_copy_draws_beside_itself_whoever_opens_it(tree):
    """A default run of it, and one with other parameters, in whatever starts a kernel in its folder."""
    copy = copies.copied("toy-paper")
    other = copy.with_stem("other")
    book = nbformat.read(copy, as_version=4)
    book.cells[1].source = book.cells[1].source.replace("size = 3", "size = 1")
    nbformat.write(book, other)
    for path in (copy, other):
        runs._execute(path, None)
    drawn = {path.relative_to(tree).as_posix() for path in tree.rglob("result.json")}
    assert drawn == {f"runs/open/figures/{name}/result.json" for name in ("toy-paper", "toy-paper-smoke")}


# ---- TAB ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, offered", [
    ("heads open ", "toy-paper"), ("heads info ", "toy-paper far-paper"), ("heads info 1", "11 12"), ("heads run 1", "11"),
    ("heads run far", ""), ("heads run toy-paper --preset ", "smoke paper"), ("heads run 11 --preset s", "smoke"),
    ("heads run --preset ", ""), ("heads run 11 -p na", "names= names=a,b"), ("heads run toy-paper -p r", "rate= rate=0.5"),
    ("heads run 12 -p na", ""), ("heads run zzz -p na", ""), ("heads op", "open"),
])  # fmt: skip
def test_the_shell_completes(tree, monkeypatch, capsys, words, offered):
    monkeypatch.setenv("_HEADS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    status, out, err = called(monkeypatch, capsys)
    assert status == 0 and out.split() == offered.split() and err == ""


def test_outside_a_clone_tab_says_nothing(tmp_path):
    where = {"HEADS_ROOT": str(tmp_path), "_HEADS_COMPLETE": "complete_bash", "COMP_WORDS": "heads run ", "COMP_CWORD": "2"}
    assert heads(**where)[1:] == ("", "")


def test_the_exit_status_counts_failures(tree):
    nbformat.write(toy_notebook("1 / 0"), papers.notebook("toy-paper"))  # no study: nothing heavy to import before it fails
    status, out, err = heads("run", "toy-paper", "toy-paper")
    assert status == 2 and err.count("toy-paper: failed: cell 2: ZeroDivisionError") == 2 and "Traceback" not in err
    status, _, err = heads("run", "--all")
    assert status == 1
    status, _, err = heads("run", "--all", "--refresh")
    assert status == 1 and "was left as it is: cell 2: ZeroDivisionError" in err


def test_refresh_renews_the_committed_notebook(tree):
    status, out, _ = heads("run", "toy-paper", "--refresh")
    assert status == 0 and "renewed 11_toy_paper.ipynb" in out
    assert nbformat.read(papers.notebook("toy-paper"), as_version=4).cells[-1].outputs


def test_doctor_fits_a_screen():
    status, out, err = heads("doctor")
    assert status == 0, err
    assert out.count("\n") <= 24
    for word in ("Python", "GPU", "smollm2-135m", "free", "kernel"):
        assert word in out


def test_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADS_ROOT", str(tmp_path))
    status, _, err = heads("list")
    assert status == 2 and "pip install -e" in err and "Traceback" not in err
