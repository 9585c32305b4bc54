"""One notebook through papermill: checked before, executed aside, reported after."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbformat import NotebookNode

from heads.course import papers

VOLATILE = ("papermill", "execution", "collapsed", "scrolled")
LARGEST = 300_000  # bytes of a committed notebook


@dataclass(frozen=True)
class Outcome:
    """A run that went well: its seconds, the executed copy, and {claim id: verdict}."""

    seconds: float
    notebook: Path
    verdicts: dict[str, str]


def plan(slug: str, preset: str | None = None, values: dict | None = None) -> dict:
    """The parameters of a run, all checked: nothing has been loaded yet.

    Raises LookupError for an unknown paper, preset or model, FileNotFoundError for a planned paper,
    TypeError for an unknown or ill-typed parameter.
    """
    from heads.model import zoo

    chosen = {**(papers.preset(slug, preset) if preset else {}), **(values or {})}
    papers.check_parameters(slug, chosen)
    if "model" in chosen:
        zoo.check_name(chosen["model"])
    return chosen


def run(slug: str, preset: str | None = None, values: dict | None = None) -> Outcome:
    """Execute a paper's notebook with papermill and return an `Outcome`.

    The executed copy goes to runs/<run name>/notebook.ipynb; figures are replaced by the notebook's
    study.verdict(), which it reaches only if everything before went well.

    Raises what `plan` raises, and RuntimeError where a cell fails.
    """
    chosen = plan(slug, preset, values)
    out, start = papers.run_folder(slug, chosen) / "notebook.ipynb", time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _execute(papers.notebook(slug), out, parameters=chosen)
    except RuntimeError as failed:
        raise RuntimeError(f"{failed}\nThe executed copy, up to there, is {os.path.relpath(out)}") from None
    return Outcome(time.monotonic() - start, out, papers.verdicts(slug, papers.figures_folder(slug, chosen)))


def refresh(slug: str) -> Path:
    """Execute the committed notebook with its defaults and replace it: fresh kernel, in order, no timings.

    Raises RuntimeError where a cell fails or the result is too large; the committed file is then as it was.
    """
    path = papers.notebook(slug)
    papers.parameters(slug)
    try:
        with patch.dict(os.environ, HEADS_CACHE="0"):  # what is committed was computed, and its seconds count
            text = nbformat.writes(tidy(_execute(path, None))) + "\n"
        if (size := len(text.encode())) > LARGEST:
            raise RuntimeError(f"executed, {size // 1000} kB; 300 kB are allowed. Draw less")
    except RuntimeError as failed:
        raise RuntimeError(f"{path.name} was left as it is: {failed}") from None
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def _execute(source: Path, out: Path | None, **options) -> NotebookNode:
    """The notebook as papermill executed it, beside its source. RuntimeError says which cell failed."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    where = f"executed copy in {os.path.relpath(out)}" if out else "in a fresh kernel"
    print(f"{source.stem}: {len(papers.code_cells(source))} cells, {where}", file=sys.stderr)
    own = str(Path(sys.prefix) / "share" / "jupyter")  # python3 is this interpreter, whatever lies in the user's home
    path = os.pathsep.join(filter(None, [own, os.environ.get("JUPYTER_PATH")]))
    try:
        with patch.dict(os.environ, JUPYTER_PATH=path):
            return papermill.execute_notebook(
                source, out, cwd=source.parent, kernel_name="python3", coalesce_streams=True, log_output=False,
                progress_bar=sys.stderr.isatty() and {"desc": source.stem}, **options,
            )  # fmt: skip
    except papermill.PapermillExecutionError as failed:
        raise RuntimeError(f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}") from None
    except DeadKernelError:
        raise RuntimeError("the kernel died, most often for want of memory: try smaller sizes or a smaller model") from None


def tidy(notebook: NotebookNode) -> NotebookNode:
    """A notebook as it is committed: stable cell ids, no timings, no widget state."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{number} {cell.source[:60]}".encode()).hexdigest()[:8]
        for key in VOLATILE if cell.metadata.get("tags") else (*VOLATILE, "tags"):  # papermill adds empty ones
            cell.metadata.pop(key, None)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.validate(notebook)
    return notebook
