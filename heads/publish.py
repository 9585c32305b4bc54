"""What a run leaves behind: a folder that is replaced as a whole, and a record of where it ran."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement


class Folder:
    """A folder that is written aside (`work`) and takes its place by `publish()`, all or nothing.

    A folder aside that belongs to a process which has ended is removed at the next start.
    """

    def __init__(self, target):
        self.target = Path(target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.target.parent.glob(f".{self.target.name}.tmp-*"):
            if not _alive(int(stale.name.rsplit("-", 1)[-1])):
                shutil.rmtree(stale, ignore_errors=True)
        self.work = self.target.with_name(f".{self.target.name}.tmp-{os.getpid()}")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def publish(self):
        """Swap the written folder in; if that fails, the old one is put back."""
        old = self.target.with_name(f".{self.target.name}.old-{os.getpid()}")
        with FileLock(self.target.with_name(f".{self.target.name}.lock")):
            if self.target.exists():
                self.target.rename(old)
            try:
                shutil.copytree(self.work, self.target)
            except OSError:
                shutil.rmtree(self.target, ignore_errors=True)
                if old.exists():
                    old.rename(self.target)
                raise
            shutil.rmtree(old, ignore_errors=True)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def versions():
    """Versions of what decides a number."""
    found = {"python": platform.python_version()}
    for name in ("heads", "torch", "transformers", "nnsight", "numpy", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def pins():
    """What the installation asked for: (name, pinned version, installed version or None) of each dependency."""
    rows = []
    for requirement in map(Requirement, requires("heads") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            pin = next(iter(requirement.specifier)).version
            try:
                found = version(requirement.name).split("+")[0]  # torch adds its build: 2.13.0+cpu
            except PackageNotFoundError:
                found = None
            rows.append((requirement.name, pin, found))
    return rows


def hardware():
    """The machine in words; no host, user or path."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": gpu,
    }


def peak_memory_bytes():
    """Peak memory of this process: on the GPU where there is one, else resident."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
