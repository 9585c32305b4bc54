"""The health of the committed notebooks, and proof that each check can fail.

The usual tools pass when they should fail: papermill exits 0 on a misspelt parameter, nbval compares
nothing in a notebook whose outputs were stripped. These checks run nothing; nbval runs the notebooks.
"""

import ast
import copy
import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat import v4
from toys import toy_notebook

import heads
from heads.course import papers, record, runs
from tests import notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
INSTALLS = re.compile(r"^\s*[!%]|pip3? install|conda install|\binput\(|git clone", re.MULTILINE)
LOCAL_PATH = re.compile(r"(?<![\w.])/(work|home|root|tmp|Users)/|[A-Z]:\\\\?Users")


# ---- the checks: each yields what is wrong ------------------------------------------------


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def tagged(book, tag):
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", [])]


def well_formed(book, path):
    try:
        nbformat.validate(book)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {str(error).splitlines()[0]}"
    if book.nbformat != 4:
        yield f"nbformat {book.nbformat}, expected 4"
    if (name := book.metadata.get("kernelspec", {}).get("name")) != "python3":
        yield f"its kernel is {name!r}, expected 'python3'"


def executed_in_order(book, path):
    counts = [cell.execution_count for cell in code_cells(book)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"executed out of order or in part: {counts}"


def without_errors(book, path):
    for cell in code_cells(book):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {cell.execution_count} ended in {output.ename}"


def parameters_are_plain(book, path):
    try:
        declared = papers.parameters_in(path)
    except ValueError as error:
        yield str(error)
        return
    seen = papermill.inspect_notebook(path)
    for parameter in declared:
        if not parameter.comment:
            yield f"parameter {parameter.name} has no comment"
        if parameter.name not in seen or ast.literal_eval(seen[parameter.name]["default"]) != parameter.default:
            yield f"papermill does not see {parameter.name} = {parameter.default!r}"


def nothing_to_install(book, path):
    for cell in code_cells(book):
        if INSTALLS.search(cell.source):
            yield f"cell {cell.execution_count} installs, calls a shell, or waits for input"


def nothing_volatile(book, path):
    for key in ("widgets", "papermill"):
        if key in book.metadata:
            yield f"metadata of {key}"
    for cell in book.cells:
        if extra := set(cell.metadata) - {"tags", "jupyter", "collapsed"}:
            yield f"cell metadata {', '.join(sorted(extra))}"
        for output in cell.get("outputs", []):
            if any("widget" in mime for mime in output.get("data", {})):
                yield f"cell {cell.execution_count} shows a widget, which is blank without a kernel"


def small(book, path):
    if (size := path.stat().st_size) >= 300_000:
        yield f"{size // 1000} kB, at most 300 kB"


KINDS = (*runs.OPEN, *runs.FOLDED)


def kind(cell):
    return next((tag for tag in cell.metadata.get("tags", []) if tag in KINDS), None)


def lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


def every_cell_has_a_kind(book, path):
    """What a cell is for is its tag, and its tag decides whether a reader sees it open."""
    for cell in code_cells(book):
        if len(found := [tag for tag in cell.metadata.get("tags", []) if tag in KINDS]) != 1:
            yield f"cell {cell.execution_count} has the tags {found}, expected one of {', '.join(KINDS)}"
    for cell in book.cells:
        if dict(cell.metadata) != runs.folded(cell.metadata.get("tags", [])):
            yield f"cell {cell.get('execution_count')}: its tags say {runs.folded(cell.metadata.get('tags', []))}"


def an_idea_fits_a_glance(book, path):
    for cell in code_cells(book):
        count, width = len(lines(cell)), max(map(len, lines(cell)), default=0)
        if kind(cell) in ("idea", "exercise"):
            if count > 12:
                yield f"cell {cell.execution_count} has {count} lines, at most 12"
            if width > 90:
                yield f"cell {cell.execution_count} is {width} columns wide, at most 90"
        elif count > 40 or width > 125:
            yield f"cell {cell.execution_count} has {count} lines of at most {width} columns: at most 40 of 125"
    runs_ = [len(list(run)) for kind, run in groupby(cell.cell_type for cell in book.cells) if kind == "code"]
    if max(runs_, default=0) > 3:
        yield f"{max(runs_)} code cells in a row, at most 3"


def visible(book):
    """The code that a reader sees open, cell by cell."""
    return [cell for cell in code_cells(book) if kind(cell) in (None, "parameters", "idea", "exercise")]


def something_happens_soon(book, path):
    before = 0
    for cell in code_cells(book):
        before += len(lines(cell)) if cell in visible(book) else 0
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            break
    else:
        yield "it shows no picture"
    if before > 40:
        yield f"its first picture comes after {before} visible lines of code, at most 40"


def half_of_it_is_prose(book, path):
    prose = sum(len(cell.source) for cell in book.cells if cell.cell_type == "markdown")
    code = sum(len(cell.source) for cell in visible(book))
    if prose < code:
        yield f"{prose / (prose + code):.2f} of what is open is prose, at least 0.50"


def it_asks(book, path):
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    if "minutes" not in book.cells[0].source:
        yield "its title does not say how many minutes it takes"
    if (asked := len(re.findall(r"\bpredict", text, re.IGNORECASE))) < 3:
        yield f"it asks {asked} times to predict, at least 3"


def exercises_are_checked(book, path):
    order = [kind(cell) for cell in code_cells(book) if kind(cell) in ("exercise", "check", "solution")]
    if len(order) not in (6, 9) or order != ["exercise", "check", "solution"] * (len(order) // 3):
        yield f"two or three exercises, each with exercise, check and solution in this order, not {order}"
    for cell in code_cells(book):
        if kind(cell) == "check" and not cell.outputs:
            yield f"cell {cell.execution_count}: a check of an untouched stub says what to do"
    hints = sum("<details>" in cell.source for cell in book.cells if cell.cell_type == "markdown")
    if hints < order.count("exercise"):
        yield f"{hints} hints in <details> for {order.count('exercise')} exercises"


def pictures_say_what_they_show(book, path):
    for cell in code_cells(book):
        for output in cell.outputs:
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if "image/png" in output.get("data", {}) and len(alt) < 20:
                yield f"cell {cell.execution_count}: a picture's alternative text is {alt!r}: give study.figure a caption"


def no_local_paths(book, path):
    for cell in code_cells(book):
        shown = [output.get("text", "") for output in cell.outputs]
        for output in cell.outputs:  # but not a picture, whose base64 may spell anything
            shown += [data for mime, data in output.get("data", {}).items() if not mime.startswith("image/")]
        if found := LOCAL_PATH.search(json.dumps(shown)):
            yield f"cell {cell.execution_count} shows a path of the machine it ran on: {found[0]}"


def presets_exist(book, path):
    slug = path.stem[3:].replace("_", "-")
    for name in ("smoke", "paper"):
        try:
            papers.check_parameters(slug, papers.preset(slug, name))
        except (LookupError, TypeError, ValueError) as error:
            yield f"preset {name}: {error}"


def nbval_has_something_to_compare(book, path):
    checked = tagged(book, "nbval-check-output")
    if not checked:
        yield "no cell is tagged nbval-check-output"
    for cell in checked:
        if not cell.get("outputs") or not cell.get("execution_count"):
            yield "a cell tagged nbval-check-output has no output: nbval would compare nothing"


def it_concludes(book, path):
    if not any("study.verdict()" in cell.source for cell in code_cells(book)):
        yield "it never calls study.verdict()"


CHECKS = [
    well_formed, executed_in_order, without_errors, parameters_are_plain, nothing_to_install, nothing_volatile, small,
    no_local_paths, presets_exist, nbval_has_something_to_compare, it_concludes,
    # the measure
    every_cell_has_a_kind, an_idea_fits_a_glance, something_happens_soon, half_of_it_is_prose, it_asks, exercises_are_checked,
    pictures_say_what_they_show,
]  # fmt: skip


def complaints(path, checks=CHECKS):
    """Everything that is wrong with a notebook file."""
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    return [f"{check.__name__}: {wrong}" for check in checks for wrong in check(book, path)]


# ---- the committed notebooks --------------------------------------------------------------


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_health(path, check):
    assert complaints(path, [check]) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_by_jupyterlab_it_stays_as_it_is(path, tmp_path):
    """The server of JupyterLab reads and writes it with the metadata of the kernel that Lab finds on this machine."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_server.services.contents.filemanager import FileContentsManager

    spec = KernelSpecManager().get_kernel_spec("python3")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    manager = FileContentsManager(root_dir=str(tmp_path))
    model = manager.get(path.name, content=True, type="notebook")
    model["content"]["metadata"]["kernelspec"] = {"display_name": spec.display_name, "language": "python", "name": "python3"}
    manager.save({"type": "notebook", "content": model["content"]}, path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


READY = [paper.slug for paper in papers.papers() if paper.state == "ready"]


@pytest.mark.parametrize("slug", READY)
def test_a_committed_result_is_of_this_code(slug):
    assert record.current(slug), f"figures/{slug} is not of this code: run make refresh PAPER={slug}"


def used_after_the_verdict(cells):
    """Files of `heads` that the code after `study.verdict()` names, through the façades or by import: the digest in the
    result, made there, must know them already."""
    verdict = next(i for i, cell in enumerate(cells) if "study.verdict()" in cell["source"])
    homes = {f"heads.{name}": home for name, home in heads.HOMES.items()}
    homes |= {f"heads.tasks.{name}": home for name, home in heads.tasks.HOMES.items()}
    package = Path(heads.__file__).parent
    for node in (n for cell in cells[verdict + 1 :] for n in ast.walk(ast.parse(cell["source"]))):
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in (n for n in names if n and n.startswith("heads.")):
            module, what = homes.get(name, (name, ""))
            files = [f"{m.removeprefix('heads.').replace('.', '/')}.py" for m in (module, f"{module}.{what}")]
            yield from (file for file in files if (package / file).is_file())


@pytest.mark.parametrize("slug", READY)
def test_nothing_is_first_imported_after_the_verdict(slug):
    recorded = json.loads((ROOT / "figures" / slug / "result.json").read_text(encoding="utf-8"))["code"]["modules"]
    assert set(used_after_the_verdict(papers.code_cells(papers.notebook(slug)))) <= set(recorded)


def test_a_module_first_imported_after_the_verdict_is_found():
    later = "heads.tasks.ioi(lm)\nheads.train.fit\nfrom heads.lab import paths\nfrom heads.lab.replay import room"
    cells = [{"source": source} for source in ("import heads\nheads.load('x')", "study.verdict()", later)]
    assert set(used_after_the_verdict(cells)) == {"tasks/ioi.py", "lab/training.py", "lab/paths.py", "lab/replay.py"}


# Seconds of the yardstick (tests/benchmarks/yardstick.py) on the machine for which the budget was set. It was derived: on a
# slower machine of the same kind it is .811 s, and the four notebooks whose code had not changed (41 to 44) took 1.742 times
# as long as before, geometric mean.
REFERENCE = 0.811 / 1.742


def over_budget(seconds, yardstick=REFERENCE):
    """What is wrong with the seconds of `{slug: default run}`, run where the yardstick takes so long."""
    seconds = {slug: found * REFERENCE / yardstick for slug, found in seconds.items()}
    for slug, found in seconds.items():
        if found > notebooks.BUDGET:
            yield f"{slug} takes {found:.0f} s, at most {notebooks.BUDGET}"
    if (total := sum(seconds.values())) > 40 * 60:
        yield f"together {total / 60:.0f} minutes, at most 40"


def test_every_default_run_keeps_to_its_budget():
    yardstick = json.loads((ROOT / "figures" / "benchmarks" / "yardstick.json").read_text(encoding="utf-8"))["ours"]
    assert list(over_budget({slug: notebooks.seconds(slug) for slug in READY}, yardstick)) == []


def test_a_budget_can_be_missed():
    assert list(over_budget({"a": 90.6, "b": 20})) == ["a takes 91 s, at most 90"]
    assert list(over_budget({"a": 170}, 2 * REFERENCE)) == [] and list(over_budget({"a": 90}, REFERENCE / 2))
    assert list(over_budget(dict.fromkeys(range(34), 90))) == ["together 51 minutes, at most 40"]


# ---- each check can fail ------------------------------------------------------------------


@pytest.fixture
def healthy(tree):
    """A notebook that passes every check, as a file of the small tree."""
    kinds = ["setup", "idea", "plot", "verdict", *["exercise", "check", "solution"] * 2]
    book = toy_notebook(*(f"print({i})" for i in range(len(kinds))))
    cells = code_cells(book)
    for cell, tag in zip(cells, ["parameters", *kinds, "verdict", "verdict"]):
        also = [tag for tag in cell.metadata.get("tags", []) if tag.startswith("nbval")]
        cell.metadata = nbformat.from_dict(runs.folded([tag, *also]))
    for count, cell in enumerate(cells, start=1):
        cell.execution_count = count
        cell.outputs = [v4.new_output("stream", name="stdout", text=f"{count}\n")]
    show(book, image_png="iVBOR", alt="A line that rises from left to right.")
    book.cells[0].source += ", ten minutes\n" + "Predict: what comes next? <details>A hint.</details>\n" * 3
    book.cells[2].source += "<details>" + "word " * 100
    return book


def saved(book):
    path = papers.notebook("toy-paper")
    path.write_text(json.dumps(book))
    return path


def test_a_healthy_notebook_has_no_complaints(healthy):
    assert complaints(saved(healthy)) == []


def cell(book, number=4):
    return code_cells(book)[number - 1]


def show(book, alt="", **data):
    data, about = {k.replace("_", "/", 1): v for k, v in data.items()}, {"image/png": {"alt": alt}}
    cell(book).outputs.append(v4.new_output("display_data", data=data, metadata=about))


def retag(book, number, *tags):
    cell(book, number).metadata = nbformat.from_dict(runs.folded(tags))


BREAKS = {
    "not a valid notebook": lambda book: cell(book).update(execution_count="four"),
    "its kernel is 'heads'": lambda book: book.metadata.kernelspec.update(name="heads"),
    "out of order": lambda book: cell(book).update(execution_count=9),
    "in part": lambda book: cell(book).update(execution_count=None),
    "ended in ZeroDivisionError": lambda book: cell(book).outputs.append(v4.new_output("error", ename="ZeroDivisionError")),
    "0 cells tagged 'parameters'": lambda book: cell(book, 1).metadata.clear(),
    "2 cells tagged 'parameters'": lambda book: cell(book).metadata.update(tags=["parameters"]),
    "line 1: 'import os'": lambda book: cell(book, 1).update(source="import os\n" + cell(book, 1).source),
    "parameter size has no comment": lambda book: cell(book, 1).update(source="size = 3\n"),
    "cell 4 installs": lambda book: cell(book).update(source="%pip install heads"),
    "calls a shell": lambda book: cell(book).update(source="x = 1\n!ls"),
    "waits for input": lambda book: cell(book).update(source="name = input('?')"),
    "metadata of widgets": lambda book: book.metadata.update(widgets={}),
    "cell metadata execution": lambda book: cell(book).metadata.update(execution={"start": 1}),
    "cell metadata papermill": lambda book: book.cells[0].metadata.update(papermill={}),
    "shows a widget": lambda book: show(book, **{"application_vnd.jupyter.widget-view+json": {}}),
    "kB, at most 300 kB": lambda book: show(book, image_png="x" * 320_000),
    "the tags []": lambda book: cell(book).metadata.clear(),
    "the tags ['idea', 'plot']": lambda book: retag(book, 3, "idea", "plot"),
    "its tags say": lambda book: cell(book).metadata.pop("jupyter"),
    "has 13 lines": lambda book: cell(book, 3).update(source="x = 1\n" * 13),
    "is 91 columns wide": lambda book: cell(book, 3).update(source="x" * 91),
    "has 41 lines": lambda book: cell(book).update(source="x = 1\n" * 41),
    "4 code cells in a row": lambda book: book.cells.extend(v4.new_code_cell("1") for _ in range(2)),
    "it shows no picture": lambda book: cell(book).outputs.pop(),
    "after 43 visible lines": lambda book: cell(book, 3).update(source="x = 1\n" * 37),
    "of what is open is prose": lambda book: cell(book, 3).update(source="x = 1\n" * 400),
    "how many minutes": lambda book: book.cells[0].update(source="# A toy"),
    "asks 0 times to predict": lambda book: book.cells[0].update(source="minutes"),
    "in this order": lambda book: retag(book, 7, "idea"),
    "three exercises": lambda book: [retag(book, n, "idea") for n in range(6, 12)],
    "an untouched stub says": lambda book: cell(book, 7).outputs.clear(),
    "0 hints in <details> for 2": lambda book: [c.update(source=c.source.replace("<details>", "")) for c in book.cells],
    "alternative text is ''": lambda book: show(book, image_png="iVBOR"),
    "shows a path": lambda book: show(book, text_plain="saved in /home/ada/figures"),
    "/tmp/": lambda book: cell(book).outputs[0].update(text="see '/tmp/x.png'"),
    "no cell is tagged": lambda book: cell(book, 13).metadata.clear(),
    "would compare nothing": lambda book: cell(book, 13).outputs.clear(),
    "never calls study.verdict()": lambda book: cell(book, 12).update(source="study.summary()"),
}


@pytest.mark.parametrize("words", BREAKS)
def test_a_broken_copy_is_found(healthy, words):
    broken = copy.deepcopy(healthy)
    BREAKS[words](broken)
    found = complaints(saved(broken))
    assert any(words in wrong for wrong in found), found


@pytest.mark.parametrize(
    "presets, words",
    [("smoke: {size: 1}", "no preset of toy-paper 'paper'. Known: smoke"), ("smoke: {sise: 1}\npaper: {}", "'sise'"),
     ("smoke: {size: x}\npaper: {}", "is a int")],
)
def test_a_broken_preset_is_found(healthy, tree, presets, words):
    (tree / "data" / "presets" / "toy-paper.yaml").write_text(presets)
    assert any(words in wrong for wrong in complaints(saved(healthy)))


def test_a_picture_that_spells_a_path_is_no_complaint(healthy):
    show(healthy, image_png="iVBOR+/tmp/abc=", alt="A line that falls from left to right.")
    assert complaints(saved(healthy)) == []


# ---- which notebooks run by nbval -----------------------------------------------------------

PARTS = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "f": 3}
COMMITS = [f"{i:040x}" for i in range(40)]


def drawn(commit, stale=()):
    return set(notebooks.by_nbval(PARTS, stale, commit))


def test_one_notebook_of_each_part_runs_by_nbval():
    for commit in [None, *COMMITS]:
        assert sorted(PARTS[slug] for slug in drawn(commit)) == [1, 2, 3]


def test_the_commit_draws_and_in_time_draws_every_one():
    assert [drawn(c) for c in COMMITS] == [drawn(c) for c in COMMITS]
    assert set.union(*map(drawn, COMMITS)) == set(PARTS)
    assert drawn(None) == {"a", "d", "f"}  # without git the first


def test_what_is_stale_always_runs_by_nbval():
    for commit in [None, *COMMITS]:
        assert drawn(commit, "be") == drawn(commit) | {"b", "e"}
        assert "not of this code" in notebooks.by_nbval(PARTS, "be", commit)["b"]


@pytest.fixture
def committed(tree):  # noqa: F811
    """The notebook of the small tree, executed, with its result published."""
    runs.refresh("toy-paper")
    assert record.current("toy-paper")
    return papers.notebook("toy-paper")


def rewritten(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_broken_copy_fails_the_suite(committed, capfd):
    figures = {path: path.read_bytes() for path in committed.parents[1].glob("figures/*/*")}
    assert notebooks.main([]) == 0
    rewritten(committed, r'"C1 holds\n"', r'"C1 fails\n"')  # the output that nbval compares
    assert notebooks.main([]) == 1
    assert "failed: toy-paper" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in committed.parents[1].glob("figures/*/*")} == figures


def test_a_broken_copy_fails_its_smoke_run(committed, capfd):
    assert notebooks.run_all({"toy-paper": False}) == []
    rewritten(committed, "ax.plot(range(size))", "ax.plot(range(size) / 0)")
    assert not record.current("toy-paper")
    assert notebooks.run_all({"toy-paper": False}) == ["toy-paper"]
    assert "TypeError" in capfd.readouterr().out


# ---- nbval compares what deserves comparing -----------------------------------------------


def test_nbvals_kernels_speak_in_private(tmp_path):
    book = v4.new_notebook(cells=[v4.new_code_cell("assert get_ipython().kernel.parent.transport == 'ipc'")])
    nbformat.write(book, tmp_path / "book.ipynb")
    done = subprocess.run([*notebooks.BY_NBVAL, str(tmp_path / "book.ipynb")], cwd=papers.root(), capture_output=True, text=True)
    assert done.returncode == (0 if os.name == "posix" else 1) and "TCP" not in done.stderr, done.stdout


def test_nbval_fails_on_a_wrong_output_in_a_checked_cell_and_on_nothing_else(tmp_path):
    """Three notebooks that print "C1 holds", by nbval as the test command calls it."""
    checked = "nbval-check-output"
    for name, stored, tag in (("right", "C1", checked), ("wrong", "C2", checked), ("unchecked", "C2", "other")):
        output = v4.new_output("stream", name="stdout", text=f"{stored} holds\n")
        cell = v4.new_code_cell("print('C1 holds')", metadata={"tags": [tag]}, execution_count=1, outputs=[output])
        book = v4.new_notebook(cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    arguments = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-q", "-rA", "--rootdir", tmp_path]
    command = [sys.executable, "-m", "pytest", *map(str, arguments), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    found = {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) .*?(\w+)\.ipynb::", done.stdout, re.M)}
    assert found == {"right": "PASSED", "wrong": "FAILED", "unchecked": "PASSED"}, done.stdout
