"""One notebook through papermill: checked before, executed aside, reported after."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
from nbformat import NotebookNode

from heads.course import papers
from heads.names import replacing

# What a code cell is for, its first tag: a reader sees it open, or folded and one click away.
OPEN = ("parameters", "idea", "exercise")
FOLDED = ("setup", "plot", "verdict", "check", "solution", "gpu", "helper")
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
    TypeError for an unknown or ill-typed parameter, ValueError for a senseless one and a device that is not there.
    """
    from heads.model import zoo

    chosen = {**({} if preset is None else papers.preset(slug, preset)), **(values or {})}
    papers.check_parameters(slug, chosen)
    if "model" in chosen and zoo.check_name(chosen["model"]) not in zoo.ZOO:
        folder = Path(chosen["model"]).expanduser()
        chosen["model"] = str(folder.absolute()) if folder.is_dir() else chosen["model"]  # the kernel runs elsewhere
    _check_device(chosen.get("device", "auto"))
    return json.loads(json.dumps(chosen))  # a tuple as a list: papermill would make a text of it


def _check_device(device: str) -> None:
    """Refuse a device that is not here; torch is asked only where another than the usual is named."""
    if device not in ("auto", "cpu", "spread"):
        import torch

        here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        kind, _, number = device.partition(":")
        if not (number or "0").isdecimal() or int(number or 0) >= here.get(kind, 0):
            known = f"'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or 'spread'; this torch sees {here['cuda']} GPUs"
            raise ValueError(f"device={device!r}: expected {known}")


def run(slug: str, preset: str | None = None, values: dict | None = None) -> Outcome:
    """Execute a paper's notebook with papermill and return an `Outcome`.

    The executed copy goes to runs/<run name>/notebook.ipynb; figures are replaced by the notebook's
    study.verdict(), which it reaches only if everything before went well.

    Raises what `plan` raises, and RuntimeError where a cell fails.
    """
    chosen = plan(slug, preset, values)
    out, start = papers.run_folder(slug, chosen).absolute() / "notebook.ipynb", time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = None
    for left in out.parent.glob(f".*.{out.name}"):  # of a run that was killed; one that still runs writes it again
        left.unlink(missing_ok=True)
    with replacing(out) as aside:
        try:
            _execute(papers.notebook(slug), aside, parameters=chosen)
        except RuntimeError as error:
            failed = error
    if failed:
        raise RuntimeError(f"{failed}\nThe executed copy, up to there, is {os.path.relpath(out)}")
    return Outcome(time.monotonic() - start, out, papers.verdicts(slug, _published(slug, chosen)))


def _published(slug: str, chosen: dict) -> Path:
    """Where the kernel of a run, which works in the folder of the notebook, has put its result."""
    return papers.figures_folder(slug, chosen, papers.notebook(slug).parent)


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
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def elsewhere(slug: str, values: dict) -> Path:
    """Run a paper with other parameters and keep the verdicts beside the committed result, in elsewhere.json.

    Raises what `run` raises, and ValueError where the parameters are the defaults.
    """
    if papers.preset_of(slug, chosen := plan(slug, None, values)) != "custom":
        raise ValueError(f"{slug}: --elsewhere keeps the verdicts of another run; name what differs, such as -p seed=1")
    done, found = run(slug, None, chosen), papers.result(slug, _published(slug, chosen))
    new = {"parameters": values, "model": found["model"], "seconds": found["seconds"], "code": found["code"]["sha256"],
           "verdicts": done.verdicts}  # fmt: skip
    kept = [old for old in papers.elsewhere(slug) if old["parameters"] != values] + [new]
    path = papers.root() / "figures" / slug / papers.ELSEWHERE
    with replacing(path) as aside:
        aside.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _execute(source: Path, out: Path | None, **options) -> NotebookNode:
    """The notebook as papermill executed it, beside its source. RuntimeError says which cell failed."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    where = f"executed copy in {os.path.relpath(out.parent)}" if out else "in a fresh kernel"
    print(f"{source.stem}: {len(papers.code_cells(source))} cells, {where}", file=sys.stderr)
    bar = {"desc": source.stem, "dynamic_ncols": True, "bar_format": "{desc}{n_fmt}/{total_fmt} [{elapsed}] {bar:12}"}
    try:
        with patch.dict(os.environ, environment()), _private() as manager, _told(source.stem):
            return papermill.execute_notebook(
                source.absolute(), out, cwd=source.absolute().parent, kernel_name="python3", coalesce_streams=True,
                log_output=False, progress_bar=sys.stderr.isatty() and bar, kernel_manager_class=manager,
                extra_arguments=["--log-level=CRITICAL"], **options,
            )  # fmt: skip
    except papermill.PapermillExecutionError as failed:
        raise RuntimeError(f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}") from None
    except DeadKernelError:
        raise RuntimeError("the kernel died, most often for want of memory: try smaller sizes or a smaller model") from None


def environment() -> dict[str, str]:
    """The environment of a kernel, which runs in the folder of its notebook: folders by their whole names, and python3 is
    this interpreter, whatever lies in the user's home."""
    path = os.pathsep.join(filter(None, [str(Path(sys.prefix) / "share" / "jupyter"), os.environ.get("JUPYTER_PATH")]))
    folders = (name for name in ("HEADS_ROOT", "HEADS_HOME", "HEADS_FIGURES", "HEADS_RUNS") if os.environ.get(name))
    whole = {name: str(Path(os.environ[name]).expanduser().absolute()) for name in folders}
    return os.environ | whole | {"JUPYTER_PATH": path}


def section(cells: list, index: int, columns: int = 36) -> str:
    """The nearest heading at or above a cell, cut to some columns; "" where there is none."""
    above = "\n".join(cell["source"] for cell in cells[: index + 1] if cell["cell_type"] == "markdown")
    found = ["", *re.findall(r"^#+ +(.+?)\s*$", above, re.M)][-1]
    return found if len(found) <= columns else found[: columns - 1].rstrip() + "…"


@contextmanager
def _told(name: str) -> Iterator[None]:
    """While the block lasts, papermill's bar says which notebook and which section runs."""
    from papermill.engines import NotebookExecutionManager as Manager

    start = Manager.cell_start

    def told(self, cell, cell_index=None, **more):
        if self.pbar is not None and cell_index is not None:
            self.pbar.set_description_str(f"{name}  {section(self.nb.cells, cell_index)}  ")
        return start(self, cell, cell_index, **more)

    with patch.object(Manager, "cell_start", told):
        yield


def sockets(folder: str) -> dict[str, str]:
    """How a kernel's manager is told to speak over sockets in a folder; as it does by itself where the system has none, or the
    folder's name is too long for one."""
    short = os.name == "posix" and len(folder) < 90  # bytes of a socket's name: about a hundred
    return {"transport": "ipc", "ip": f"{folder}/k"} if short else {}


@contextmanager
def _private() -> Iterator[type]:
    """A kernel's manager that speaks over sockets in a folder of ours, where the system has them: nobody else can listen.
    A kernel that is left when the block ends, because the run was stopped, ends, too."""
    from jupyter_client import AsyncKernelManager

    with TemporaryDirectory(prefix="heads-", ignore_cleanup_errors=True) as folder:
        made = []

        class Private(AsyncKernelManager):
            def __init__(self, **options):
                super().__init__(**options, **sockets(folder))
                made.append(self)

        try:
            yield Private
        finally:
            for process in (getattr(manager.provisioner, "process", None) for manager in made):
                process and process.kill()


def tidy(notebook: NotebookNode) -> NotebookNode:
    """A notebook as it is committed, and as JupyterLab saves it: stable cell ids, cells folded by their tags, no timings,
    no widget state."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{number} {cell.source[:60]}".encode()).hexdigest()[:8]
        cell.metadata = nbformat.from_dict(folded(cell.metadata.get("tags", [])))
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = notebook.metadata.get("language_info", {"name": "python"})  # as the kernel told it
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": language})
    nbformat.validate(notebook)
    return notebook


def folded(tags: Iterable[str]) -> dict:
    """A cell's metadata, made of its tags: what is hidden in JupyterLab, and by the tags hide-... on a site."""
    tags = [tag for tag in tags if not tag.startswith("hide-")]
    if not set(tags) & set(FOLDED):
        return {"tags": tags} if tags else {}
    hidden = {"source_hidden": True}
    if "solution" not in tags:
        return {"jupyter": hidden, "tags": [*tags, "hide-input"]}
    return {"collapsed": True, "jupyter": {"outputs_hidden": True, **hidden}, "tags": [*tags, "hide-input", "hide-output"]}
