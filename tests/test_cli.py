"""The command line as a user meets it: in a process of its own."""

import json
import subprocess
import sys

import nbformat
import pytest
from toys import toy_notebook

from heads import cli
from heads.course import papers


def heads(*arguments):
    """(exit status, stdout, stderr) of `python -m heads ...`."""
    done = subprocess.run([sys.executable, "-m", "heads", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


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


def test_info_shows_both_numbers_and_the_parameters(result):
    status, out, _ = heads("info", "toy-paper")
    assert status == 0
    assert "Does it?" in out and "the paper: 0.9 (Fig 1)" in out and "here: r 0.95, heads 3: holds" in out
    assert "size = 3  # how many samples" in out and "smoke, paper" in out
    status, out, _ = heads("info", "far-paper")
    assert status == 0 and "no notebook yet" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["info", "toy-papre"], "Did you mean 'toy-paper'"),
        (["run", "toy-papre"], "Did you mean 'toy-paper'"),
        (["run", "far-paper"], "no notebook yet"),
        (["run", "toy-paper", "-p", "sise=3"], "Did you mean 'size'"),
        (["run", "toy-paper", "-p", "size=many"], "'size' of toy-paper is a int (default 3), not 'many'"),
        (["run", "toy-paper", "-p", "names=[a"], "expected name=value"),
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
    """`main` in this process, as `python -m heads` calls it."""
    monkeypatch.setattr(sys, "argv", ["heads", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    status, (out, err) = stopped.value.code, capsys.readouterr()
    assert status == 2 and words in err and out == ""
    assert "Traceback" not in err and (err.count("\n") <= 2 or "Usage" in err)
    assert not (tree / "runs").exists(), "nothing was started"


def test_one_wrong_paper_stops_all_before_the_first(tree):
    status, _, err = heads("run", "toy-paper", "far-paper")
    assert status == 2 and "far-paper has no notebook yet" in err and not (tree / "runs").exists()


@pytest.mark.parametrize(
    "text, value",
    [("a=1", 1), ("a=1e-3", 0.001), ("a=[1e-3, 2]", [0.001, 2]), ("a=[x, y]", ["x", "y"]), ("a=true", True),
     ("a=None", None), ("a=null", None), ("a=b=c", "b=c"), ("a=owner/name", "owner/name"), ("a='1'", "1"),
     (" a = cuda:1", "cuda:1")],
)  # fmt: skip
def test_values_are_literals(text, value):
    assert cli._assignment(text) == ("a", value)


def test_a_run_ends_with_its_verdicts(tree):
    status, out, err = heads("run", "toy-paper", "--preset", "smoke")
    assert status == 0 and "C1 holds, C2 not tested here" in out
    assert (tree / "runs" / "toy-paper-smoke" / "figures" / "result.json").is_file()
    assert "Traceback" not in err and "\r" not in err, "no bar where there is no terminal"


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
