"""What a run leaves behind: a folder that is replaced as a whole, and a record of where it ran."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import platform
import secrets
import shutil
import sys
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from filelock import FileLock
from packaging.requirements import Requirement

import heads
from heads import names, tasks
from heads.course import papers

PACKAGE = Path(__file__).parents[1]


class Folder:
    """A folder that is written aside (`work`) and takes its place by `publish()`, all or nothing.

    A process that fails or is killed, at any moment, leaves the last good folder: what it left aside
    is removed, and a swap that it did not finish is undone, at the next start.
    """

    def __init__(self, target: str | Path):
        self.target = Path(target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._aside("lock"))
        # The machine is part of the name: on a shared disk, a process id of another machine says nothing.
        self._machine = sha256(platform.node().encode()).hexdigest()[:8]
        self._owner = f"{self._machine}-{os.getpid()}-{secrets.token_hex(8)}"  # and nobody can guess the whole of it
        self.work = self._aside(f"tmp-{self._owner}")
        self._recover()
        self.work.mkdir()
        atexit.register(shutil.rmtree, self.work, ignore_errors=True)

    def publish(self) -> None:
        """Swap a copy of `work` in, in one step where the system can, else by two renames; if that fails, the old folder
        is put back."""
        new, old = self._aside(f"new-{self._owner}"), self._aside(f"old-{self._owner}")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(self.work, new)
        with self._lock:
            if self.target.exists() and _exchanged(new, self.target):
                return shutil.rmtree(new, ignore_errors=True)
            if self.target.exists():
                self.target.rename(old)
            try:
                new.rename(self.target)
            finally:
                self._settle()

    def _aside(self, suffix):
        return self.target.with_name(f".{self.target.name}.{suffix}")

    def _recover(self):
        with self._lock:  # so no swap is under way
            self._settle()
            for left in self.target.parent.glob(self._aside(f"*-{self._machine}-*").name):
                process = int(left.name.rpartition(f"{self._machine}-")[2].partition("-")[0])
                if process == os.getpid() or not psutil.pid_exists(process):
                    shutil.rmtree(left, ignore_errors=True)

    def _settle(self):
        """Under the lock: an old folder goes, or goes back where nothing took its place."""
        for old in self.target.parent.glob(self._aside("old-*").name):
            if not self.target.exists():
                old.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two folders have changed names in one step, as Linux can: at no moment is there none."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at, swap = -100, 2  # relative to the working directory; RENAME_EXCHANGE
    return exchange is not None and exchange(at, os.fsencode(one), at, os.fsencode(other), swap) == 0


def code(slug: str) -> dict:
    """What a paper's result rests on: the modules of heads that this process has imported, the files of data/ that it
    has read, and one digest of them with the paper's entry and the code of its notebook (see `digest`)."""
    imported = [m for name, m in list(sys.modules.items()) if name.startswith("heads.")]
    files = [Path(module.__file__) for module in imported if getattr(module, "__file__", None)]
    files = [path.relative_to(PACKAGE).as_posix() for path in files if path.stem not in ("__init__", "__main__", "cli")]
    files += [path.name for path in PACKAGE.glob("*.mplstyle") if "heads.plot" in sys.modules]
    used = {"modules": sorted(files), "data": sorted(names.READ)}
    return {"sha256": digest(slug, **used), **used}


def digest(slug: str, modules: list[str], data: list[str]) -> str:
    """SHA-256 of these modules, the façade's rows that lead to them, these data, and the paper's claims and code cells.

    Outputs, prose and exercises do not enter, nor does any module that the notebook has not imported: adding a verb or
    editing another instrument leaves a result as current as it was.
    """
    book, homes = papers.notebook(slug), {f"heads.{name[:-3]}".replace("/", ".") for name in modules}
    paths = [*(PACKAGE / name for name in modules), *(names.root() / "data" / name for name in data)]
    covered = [
        [(path.name, path.read_text(encoding="utf-8") if path.is_file() else None) for path in paths],
        # a façade's row is a name in a module, or a module
        {name: row for name, row in {**heads.HOMES, **tasks.HOMES}.items() if homes & {row[0], ".".join(row)}},
        repr(papers.paper(slug).claims),
        [cell["source"] for cell in papers.code_cells(book) if not _practice(cell)] if book.is_file() else [],
    ]
    return sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _practice(cell):
    return bool({"exercise", "check", "solution"} & set(cell["metadata"].get("tags", [])))


def current(slug: str, folder: str | Path | None = None) -> bool:
    """Whether the result in a folder (figures/<slug> of the repository) is of this code and this notebook."""
    try:
        used = papers.result(slug, Path(folder or names.root() / "figures" / slug))["code"]
        return used["sha256"] == digest(slug, used["modules"], used["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of what decides a number."""
    packages = ("heads", "torch", "transformers", "nnsight", "numpy", "matplotlib")
    return {"python": platform.python_version(), **{name: _installed(name) for name in packages}}


def pins() -> list[tuple[str, str, str | None]]:
    """What the installation asked for: (name, pinned version, installed version or None) of each dependency."""
    rows = []
    for requirement in map(Requirement, requires("heads") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            pin, found = next(iter(requirement.specifier)).version, _installed(requirement.name)
            rows.append((requirement.name, pin, found and found.split("+")[0]))  # torch adds its build: 2.13.0+cpu
    return rows


def hardware() -> dict:
    """The machine in words; no host, user or path."""
    torch = sys.modules.get("torch")
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }


def peak_memory_bytes() -> int:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
