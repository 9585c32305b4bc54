"""One notebook through papermill: checked before, executed aside, reported after."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from heads.course import papers

KERNEL = "python3"  # of this interpreter's own environment: see `_own_kernel`
VOLATILE = ("papermill", "execution", "collapsed", "scrolled")
DIED = "the kernel died, most often for want of memory: try smaller sizes, or a smaller model"
LARGEST = 300_000  # bytes of a committed notebook


@dataclass(frozen=True)
class Outcome:
    """How one run ended; `verdicts` is {claim id: verdict}, `error` what to tell the user."""

    slug: str
    ok: bool
    seconds: float
    notebook: Path
    verdicts: dict[str, str]
    error: str = ""


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
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    chosen = plan(slug, preset, values)
    source, folder = papers.notebook(slug), papers.run_folder(slug, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    out, start, error = folder / "notebook.ipynb", time.monotonic(), ""
    cells = sum(cell.cell_type == "code" for cell in nbformat.read(source, as_version=4).cells)
    print(f"{slug}: {cells} cells, executed copy in {os.path.relpath(out)}", file=sys.stderr)
    try:
        with _own_kernel():
            papermill.execute_notebook(
                str(source), str(out), parameters=chosen, kernel_name=KERNEL, cwd=str(source.parent),
                progress_bar=sys.stderr.isatty() and {"desc": slug}, log_output=False,
            )  # fmt: skip
    except papermill.PapermillExecutionError as failed:
        error = f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}\nThe executed copy is {os.path.relpath(out)}"
    except DeadKernelError:
        error = f"{DIED}\nThe executed copy, up to there, is {os.path.relpath(out)}"
    verdicts = {} if error else papers.verdicts(slug, papers.figures_folder(slug, chosen))
    return Outcome(slug, not error, time.monotonic() - start, out, verdicts, error)


def refresh(slug: str) -> Path:
    """Execute the committed notebook with its defaults and replace it: fresh kernel, in order, no timings.

    Raises RuntimeError where a cell fails or the result is too large; the committed file is then as it was.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    path = papers.notebook(slug)
    papers.parameters(slug)
    notebook = nbformat.read(path, as_version=4)
    try:
        with _own_kernel():
            client = NotebookClient(
                notebook, kernel_name=KERNEL, timeout=None, resources={"metadata": {"path": str(path.parent)}}
            )
            client.execute(env=os.environ | {"HEADS_CACHE": "0"})  # what is committed was computed, and its seconds count
    except CellExecutionError as failed:
        raise RuntimeError(f"{path.name} was left as it is: {failed.ename}: {failed.evalue}") from None
    except DeadKernelError:
        raise RuntimeError(f"{path.name} was left as it is: {DIED}") from None
    aside = path.with_suffix(".tmp")
    nbformat.write(tidy(notebook), aside)
    if (size := aside.stat().st_size) > LARGEST:
        aside.unlink()
        raise RuntimeError(f"{path.name} was left as it is: executed, {size // 1000} kB; 300 kB are allowed. Draw less")
    os.replace(aside, path)
    return path


def tidy(notebook: NotebookNode) -> NotebookNode:
    """A notebook as it is committed: stable cell ids, no timings, no widget state, one stdout per cell."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{number} {cell.source[:60]}".encode()).hexdigest()[:8]
        for key in VOLATILE:
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
    for key in ("widgets", "papermill"):
        notebook.metadata.pop(key, None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.validate(notebook)
    return notebook


def _merged(outputs):
    """Consecutive prints to one stream in one piece: where a kernel cuts them depends on the clock."""
    kept = []
    for output in outputs:
        last = kept[-1] if kept else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            kept.append(output)
    return kept


@contextmanager
def _own_kernel() -> Iterator[None]:
    """Make `python3` this interpreter: its own kernelspec before any in the user's home."""
    before, own = os.environ.get("JUPYTER_PATH"), str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [own, before]))
    try:
        yield
    finally:
        del os.environ["JUPYTER_PATH"]
        if before is not None:
            os.environ["JUPYTER_PATH"] = before
