"""The catalogue, a notebook's declared parameters, presets, and where a run belongs."""

import json
import subprocess
import sys

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
    "good", [{"rate": 1}, {"size": 10}, {"limit": "any"}, {"names": []}, {"names": ("x",)}, {"flag": True}]
)
def test_values_like_the_default_pass(tree, good):
    papers.check_parameters("toy-paper", good)


@pytest.mark.parametrize(
    "bad, expected",
    [({"size": True}, "int"), ({"size": 1.5}, "int"), ({"rate": False}, "float"), ({"flag": 1}, "bool"),
     ({"names": "a"}, "list of str"), ({"names": [1]}, "list of str"), ({"size": None}, "int"), ({"size": "3"}, "int")],
)  # fmt: skip
def test_an_ill_typed_value_is_refused(tree, bad, expected):
    with pytest.raises(TypeError, match=f"parameter '{next(iter(bad))}' of toy-paper is a {expected}"):
        papers.check_parameters("toy-paper", bad)


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
    monkeypatch.setenv("HEADS_FIGURES", str(tree / "elsewhere"))
    assert papers.figures_folder("toy-paper", {}) == tree / "elsewhere" / "toy-paper"
    assert papers.figures_folder("toy-paper", {"size": 1}) == tree / "elsewhere" / "toy-paper-smoke"


def test_the_result_of_the_last_run(tree):
    assert papers.result("toy-paper") is None
    (tree / "figures" / "toy-paper").mkdir(parents=True)
    (tree / "figures" / "toy-paper" / "result.json").write_text(json.dumps({"paper": "toy-paper"}))
    assert papers.result("toy-paper") == {"paper": "toy-paper"}
