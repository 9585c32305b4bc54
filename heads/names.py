"""Names and numbers that a user gives, said in one way when they are wrong; and where the root of the project is.

Light: everything may use it, and the command line answers from here.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from operator import index
from pathlib import Path
from types import ModuleType
from typing import Any


def root() -> Path:
    """The folder that holds notebooks/, data/ and figures/; the variable HEADS_ROOT overrides it.

    Raises:
        FileNotFoundError: where it holds no data/papers.yaml.
    """
    folder = Path(os.environ.get("HEADS_ROOT") or Path(__file__).resolve().parents[1])
    if not (folder / "data" / "papers.yaml").is_file():
        raise FileNotFoundError(
            f"no data/papers.yaml in {folder}: the notebooks are not part of the wheel. "
            "Run from a clone, installed with `pip install -e .`, or point HEADS_ROOT at one."
        )
    return folder


def said(error: Exception) -> str:
    """An error in one sentence that names its cure."""
    # str() of a KeyError is a repr, and args[0] of an OSError from the system is a number
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return "out of memory: try smaller sizes or a smaller model"
    if type(error).__name__ == "SafetensorError":
        return f"a file of weights is damaged ({text}): fetch or copy the model again"
    if isinstance(error, OSError):
        folders = {name: os.environ.get(name) for name in ("HEADS_HOME", "HEADS_FIGURES", "HEADS_RUNS")}
        named = [f"{name} is {set_!r}" for name, set_ in folders.items() if set_ and set_ in str(error.filename)]
        if not named and {"runs", "figures"} & set(Path(str(error.filename)).parts):
            named = ["set HEADS_RUNS and HEADS_FIGURES"]
        return text + (f" ({named[0]}: name a folder that can be written)" if named else "")
    expected = isinstance(error, (LookupError, TypeError, ValueError, RuntimeError))
    return text if expected and text else f"{type(error).__name__}: {text} (--debug shows where)"


READ: set[str] = set()  # files of data/ that this process has read: a study's digest covers them


def data(name: str) -> str:
    """The text of a file in data/."""
    READ.add(name)
    return (root() / "data" / name).read_text(encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody can guess, for a file that takes its place when the block ends well.

    A kill at any moment leaves the old file or the new one; an error in the block, the old one.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def nearest(name: object, known: Iterable) -> str:
    """The end of an error's first sentence: '. Did you mean ...?', or '.' where no name is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=2, cutoff=0.6)
    return f". Did you mean {' or '.join(repr(c) for c in close)}?" if close else "."


def known(what: str, name: Any, names: Iterable) -> Any:
    """`name`, if it is among `names`.

    Args:
        what: the kind of thing, as the message should call it ("kind of ablation").

    Raises:
        LookupError: naming the nearest and listing all.
    """
    names = list(names)
    if name not in names:
        raise LookupError(f"no {what} {name!r}{nearest(name, names)} Known: {', '.join(map(str, names))}")
    return name


def whole(what: str, n: Any, least: int | None = None) -> int:
    """`n`, if it is a whole number, and not below `least`.

    Args:
        what: the kind of number, as the message should call it ("a position").

    Raises:
        TypeError: for what is none: a float is not cut, a boolean is no 0 or 1. ValueError: below `least`.
    """
    try:
        found = index(None if "bool" in str(getattr(n, "dtype", type(n))) else n)
    except TypeError:
        raise TypeError(f"{what} is a whole number, not {n!r}") from None
    if least is not None and found < least:
        raise ValueError(f"{what} is at least {least}, not {found}")
    return found


def wholes(what: str, values: Any, least: int | None = None) -> tuple[int, ...]:
    """Whole numbers, of a list or an array of them or of a single one; errors as in `whole`."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return tuple(whole(what, n, least) for n in (values if isinstance(values, Iterable) else [values]))


def count(name: str, n: int | None, available: int | None = None) -> int | None:
    """`n`, if so many prompts can be had.

    Raises:
        ValueError: for what is no whole number from 1, or more than there are.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n < 1):
        raise ValueError(f"{name}: n={n!r} prompts asked for: expected a whole number from 1")
    if available is not None and n is not None and n > available:
        raise ValueError(f"{name}: {n} prompts asked for, but there are {available}: ask for at most {available}")
    return n


def lazily(package: str, file: str) -> type[ModuleType]:
    """What makes a package hand out names that are imported when they are first used.

    The names are those that the package's own file imports under `if TYPE_CHECKING:`, where an editor sees them too, so
    that each stands once. `sys.modules[__name__].__class__ = lazily(__name__, __file__)`.
    """
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    block = next(node.body for node in tree.body if isinstance(node, ast.If))
    homes = {alias.asname or alias.name: (node.module, alias.name) for node in block for alias in node.names}

    class Lazy(ModuleType):
        HOMES = homes

        def __getattr__(self, name):
            if name not in homes:
                raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, homes)}")
            module, what = homes[name]
            found = vars(importlib.import_module(module)).get(what)
            found = importlib.import_module(f"{module}.{what}") if found is None else found
            super().__setattr__(name, found)
            return found

        def __setattr__(self, name, value):
            # importing heads.tasks.ioi would otherwise hide the function of that name behind its file
            if not (isinstance(value, ModuleType) and name in homes and homes[name][0] == f"{package}.{name}"):
                super().__setattr__(name, value)

        def __dir__(self):
            return sorted({*vars(self), *homes})

    return Lazy
