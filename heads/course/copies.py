"""A notebook to try things on: a copy of one's own, opened in JupyterLab, so that the committed one stays as it is."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from heads.course import papers, runs
from heads.names import replacing


def copied(slug: str, fresh: bool = False) -> Path:
    """The reader's copy of a paper's notebook, made where there is none.

    An earlier copy holds the reader's edits: it is kept, and with `fresh` put aside under a numbered name.

    Raises:
        LookupError: for an unknown paper. FileNotFoundError: for a planned one.
    """
    papers.parameters(papers.paper(slug).slug)
    source, folder = papers.notebook(slug), papers.opened().absolute()
    copy = folder / source.name
    folder.mkdir(parents=True, exist_ok=True)
    if copy.exists() and fresh:
        aside = next(p for n in count(1) if not (p := copy.with_stem(f"{copy.stem}-{n}")).exists())
        copy.rename(aside)
        print(f"heads: your earlier copy is now {aside.name}", file=sys.stderr)
    if not copy.exists():
        with replacing(copy) as new:
            shutil.copyfile(source, new)
    return copy


def lab(path: Path, options: list[str]) -> int:
    """JupyterLab on a notebook, with this interpreter as its kernel, until it ends: its exit status."""
    if find_spec("jupyterlab") is None:
        raise RuntimeError('JupyterLab is not installed: pip install -e ".[lab]", or say --no-lab')
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is Lab's, which asks whether to stop
    try:
        return subprocess.call([sys.executable, "-m", "jupyterlab", str(path), *options], env=runs.environment())
    finally:
        signal.signal(signal.SIGINT, before)
