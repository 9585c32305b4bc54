"""The catalogue, a notebook's declared parameters, presets, and where a run belongs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat import v4
from toys import DEFAULTS, toy_notebook

from heads.course import papers


def test_importing_the_command_line_is_light():
    heavy = "torch transformers nnsight matplotlib pandas papermill".split()
    code = f"import sys, heads.cli, heads.course.runs, heads.course.papers; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_ready_paper_has_a_notebook_and_presets():
    for paper in papers.papers():
        if paper.state == "ready":
            assert papers.parameters(paper.slug)
            assert {"smoke", "paper"} <= set(papers.presets(paper.slug))
            papers.check_parameters(paper.slug, {p.name: p.default for p in papers.parameters(paper.slug)}, complete=True)


def test_an_unknown_paper_names_the_nearest(tree):
    assert papers.paper("toy-paper").claims[0].id == "C1"
    with pytest.raises(LookupError, match="Did you mean 'toy-paper'"):
        papers.paper("toy-papre")
    with pytest.raises(LookupError, match="`heads list`"):
        papers.paper("zzz")


def test_outside_a_clone_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADS_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        papers.papers()


def test_parameters_are_those_that_papermill_sees(tree):
    declared = papers.parameters("toy-paper")
    assert {p.name: p.default for p in declared} == DEFAULTS
    assert [type(p.default).__name__ for p in declared] == ["int", "int", "float", "list", "bool", "NoneType"]
    assert declared[0].comment == "where it all starts"
    seen = papermill.inspect_notebook(papers.notebook("toy-paper"))
    assert {name: eval(p["default"]) for name, p in seen.items()} == DEFAULTS


def test_a_planned_paper_has_no_parameters_yet(tree):
    with pytest.raises(FileNotFoundError, match="far-paper has no notebook yet"):
        papers.parameters("far-paper")


@pytest.mark.parametrize(
    "line",
    ["import os", "n = len('x')", "a, b = 1, 2", "a = b = 1", "n: int | None = 3", "x: int", "n += 1", "f'{seed}'",
     "n = [seed]", "%matplotlib inline", "n = ("],
)  # fmt: skip
def test_a_parameters_cell_is_plain_literals(tree, line):
    nbformat.write(toy_notebook(parameters=f"seed = 0  # first\n{line}"), papers.notebook("toy-paper"))
    with pytest.raises(ValueError, match="11_toy_paper.ipynb, parameters cell, line 2"):
        papers.parameters("toy-paper")


def test_literals_may_span_lines_and_be_annotated(tree):
    source = "grid = [\n    1,\n    -2,\n]  # two sizes\nrate: float = 1e-3  # small\n"
    nbformat.write(toy_notebook(parameters=source), papers.notebook("toy-paper"))
    grid, rate = papers.parameters("toy-paper")
    assert (grid.default, grid.comment) == ([1, -2], "two sizes")
    assert (rate.default, rate.comment) == (0.001, "small")


def test_exactly_one_parameters_cell(tree):
    book = toy_notebook()
    book.cells.append(v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}))
    nbformat.write(book, papers.notebook("toy-paper"))
    with pytest.raises(ValueError, match="2 cells tagged 'parameters'"):
        papers.parameters("toy-paper")


@pytest.mark.parametrize(
    "good", [{"rate": 1}, {"size": 10}, {"limit": 7}, {"limit": None}, {"names": []}, {"names": ("x",)}, {"flag": True},
             {"seed": 0}, {"seed": 2**32 - 1}]
)  # fmt: skip
def test_values_like_the_default_pass(tree, good):
    papers.check_parameters("toy-paper", good)


@pytest.mark.parametrize(
    "bad, expected",
    [({"size": True}, "int"), ({"size": 1.5}, "int"), ({"rate": False}, "float"), ({"flag": 1}, "bool"),
     ({"names": "a"}, "list of str"), ({"limit": "any"}, "int"), ({"limit": 2.5}, "int"), ({"names": [1]}, "list of str"), ({"size": None}, "int"), ({"size": "3"}, "int")],
)  # fmt: skip
def test_an_ill_typed_value_is_refused(tree, bad, expected):
    with pytest.raises(TypeError, match=f"parameter '{next(iter(bad))}' of toy-paper is a {expected}"):
        papers.check_parameters("toy-paper", bad)


@pytest.mark.parametrize(
    "bad, expected",
    [({"size": 0}, "is a whole number from 1 (default 3), not 0"), ({"limit": 0}, "is a whole number from 1"),
     ({"seed": -1}, "is a whole number from 0 to 4294967295"), ({"seed": 2**32}, "is a whole number from 0 to 4294967295"),
     ({"rate": float("nan")}, "must be finite (default 0.5), not nan"), ({"rate": float("-inf")}, "must be finite")],
)  # fmt: skip
def test_a_number_that_means_nothing_is_refused(tree, bad, expected):
    with pytest.raises(ValueError, match=re.escape(f"parameter {next(iter(bad))!r} of toy-paper {expected}")):
        papers.check_parameters("toy-paper", bad)


def test_the_default_and_the_comment_say_from_where_a_number_counts(tree):
    cell = "a = 0  # none\nb = 5  # 0 skips it\nc = 5  # 10 or so\nd = [0, 2]  # of each\ne = [2, 3]  # of each\n"
    cell += "f = -1  # from the end\ng = [0.5]  # shares\nh = 'x'  # a name\ni = ''  # or a folder\nj = []  # some\n"
    nbformat.write(toy_notebook(parameters=cell), papers.notebook("toy-paper"))
    papers.check_parameters("toy-paper", {"a": 0, "b": 0, "d": [0], "f": -1, "g": [0, 1], "i": "", "j": [0, "x"]})
    for bad in ({"a": -1}, {"b": -1}, {"c": 0}, {"d": [1, -1]}, {"e": [2, 0]}, {"f": -2}):
        with pytest.raises(ValueError, match=f"'{next(iter(bad))}' of toy-paper is a whole number from"):
            papers.check_parameters("toy-paper", bad)
    for bad, expected in (({"g": [0.5, float("inf")]}, "finite"), ({"h": ""}, "empty"), ({"h": " "}, "empty")):
        with pytest.raises(ValueError, match=f"must (be|not be) {expected}"):
            papers.check_parameters("toy-paper", bad)


@pytest.mark.parametrize(
    "name, text, value",
    [("size", "5", 5), ("size", "010", "010"), ("size", "1:30", "1:30"), ("size", "1_000", 1000), ("size", "0x10", 16),
     ("size", "5.0", 5.0), ("size", "many", "many"), ("rate", "1e-3", 0.001), ("rate", ".5", 0.5), ("rate", "nan", "nan"),
     ("flag", "true", True), ("flag", "False", False), ("flag", "yes", "yes"), ("flag", "on", "on"),
     ("limit", "None", None), ("limit", "null", None), ("limit", "3", 3), ("word", "owner/name", "owner/name"),
     ("word", "b=c", "b=c"), ("word", "'1'", "1"), ("word", "1", "1"), ("word", "010", "010"), ("word", "null", "null"),
     ("word", "cuda:1", "cuda:1"), ("word", "", ""), ("names", "a,b", ["a", "b"]), ("names", "[x, y]", ["x", "y"]),
     ("names", "a", ["a"]), ("names", '["a, b", "c"]', ["a, b", "c"]), ("names", "1,b", ["1", "b"]), ("names", "[a", "[a"),
     ("ranks", "2,5,10", [2, 5, 10]), ("ranks", "2, 4", [2, 4]), ("ranks", "[2]", [2]), ("ranks", "(2, 4)", [2, 4]),
     ("ranks", "7", [7]), ("ranks", "010", ["010"]), ("ranks", ["2", "5"], [2, 5]), ("some", "a.jsonl", ["a.jsonl"]),
     ("some", "16,32", [16, 32]), ("rates", "1e-3,1", [0.001, 1])],
)  # fmt: skip
def test_a_text_is_read_as_the_default_is(tree, name, text, value):
    """Literals of Python or JSON, as YAML 1.2 has them: no octal 010, no 1:30 of the clock, no yes for True."""
    cell = "size = 3  # a\nrate = 0.5  # b\nflag = False  # c\nlimit = None  # d\nword = 'x'  # e\nnames = ['a']  # f\n"
    cell += "ranks = [2, 5]  # g\nsome = []  # h\nrates = [0.1]  # i\n"
    nbformat.write(toy_notebook(parameters=cell), papers.notebook("toy-paper"))
    found = papers.read("toy-paper", {name: text})
    assert found == {name: value} and type(found[name]) is type(value)


def test_presets_are_read_as_the_command_line_is(tree):
    (tree / "data" / "presets" / "toy-paper.yaml").write_text("a: {size: 010}\nb: {rate: 1e-3, names: [x, 1]}\nc:\n")
    assert papers.presets("toy-paper") == {"a": {"size": "010"}, "b": {"rate": 0.001, "names": ["x", "1"]}, "c": {}}


@pytest.mark.parametrize("file, text, words", [
    ("data/papers.yaml", "parts:\n  1: [a\n", "line 3"), ("data/presets/toy-paper.yaml", "smoke: {size: 1\n", "line 2"),
    ("notebooks/11_toy_paper.ipynb", '{"cells": [\n', "line 2 column 1"),
])  # fmt: skip
def test_a_broken_file_is_named_with_its_line(tree, file, text, words):
    (tree / file).write_text(text, encoding="utf-8")
    papers._read.cache_clear()
    with pytest.raises(ValueError, match=f"{Path(file).name} is broken: .*{words}"):
        papers.presets("toy-paper")
    papers._read.cache_clear()


def test_a_cell_of_a_table_holds_no_markup_of_its_own():
    assert papers.cell("|r| < 1 & <script>\nx") == "\\|r\\| &lt; 1 &amp; &lt;script> x"


def test_an_unknown_parameter_names_the_nearest(tree):
    with pytest.raises(TypeError, match="Did you mean 'size'"):
        papers.check_parameters("toy-paper", {"sise": 3})


def test_presets_are_recognised_by_their_values(tree):
    assert papers.preset_of("toy-paper", DEFAULTS) == papers.preset_of("toy-paper", {}) == "default"
    assert papers.preset_of("toy-paper", {**DEFAULTS, "size": 9, "names": ("c",)}) == "paper"
    assert papers.preset_of("toy-paper", {"size": 9}) == "custom"
    assert papers.preset("toy-paper", "smoke") == {"size": 1}
    with pytest.raises(LookupError, match="Did you mean 'smoke'"):
        papers.preset("toy-paper", "smokey")


def test_only_a_default_run_publishes_in_figures(tree, monkeypatch):
    custom = papers.run_name("toy-paper", {"size": 7})
    assert custom == papers.run_name("toy-paper", {**DEFAULTS, "size": 7}) != papers.run_name("toy-paper", {"size": 8})
    assert papers.figures_folder("toy-paper", {}) == tree / "figures" / "toy-paper"
    assert papers.figures_folder("toy-paper", {"size": 1}) == tree / "runs" / "toy-paper-smoke" / "figures"
    assert papers.figures_folder("toy-paper", {"size": 7}) == tree / "runs" / custom / "figures"
    monkeypatch.setenv("HEADS_RUNS", str(tree / "aside"))
    assert papers.run_folder("toy-paper", {"size": 1}) == tree / "aside" / "toy-paper-smoke"
    assert papers.figures_folder("toy-paper", {"size": 1}) == tree / "aside" / "toy-paper-smoke" / "figures"
    monkeypatch.setenv("HEADS_FIGURES", str(tree / "elsewhere"))
    assert papers.figures_folder("toy-paper", {}) == tree / "elsewhere" / "toy-paper"
    assert papers.figures_folder("toy-paper", {"size": 1}) == tree / "elsewhere" / "toy-paper-smoke"


def test_the_result_of_the_last_run(tree):
    assert papers.result("toy-paper") is None
    (tree / "figures" / "toy-paper").mkdir(parents=True)
    (tree / "figures" / "toy-paper" / "result.json").write_text(json.dumps({"paper": "toy-paper"}))
    assert papers.result("toy-paper") == {"paper": "toy-paper"}
