"""Names and numbers that a user gives, said in one way when they are wrong; and where the root of the project is.

Light: everything may use it, and the command line answers from here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path


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


def nearest(name, known: Iterable) -> str:
    """The end of an error's first sentence: '. Did you mean ...?', or '.' where no name is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=2, cutoff=0.6)
    return f". Did you mean {' or '.join(repr(c) for c in close)}?" if close else "."


def known(what: str, name, names: Iterable):
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
