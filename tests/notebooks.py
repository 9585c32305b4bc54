"""The notebooks' half of `make test`: `python -m tests.notebooks [--all]`.

A notebook is run in one of two ways. *By nbval*: its defaults, cell by cell, and every output that deserves comparing is
compared. *Drill*: its smoke preset, in which every exercise is answered wrongly and then by its solution: it shows that the
notebook runs, that a check says what is wrong, and that the solution passes it. By nbval go the papers whose committed
result is not of this code, and one paper of each part, drawn by the commit: the same for whoever tests that commit, and
in time every one (without git: the first of the part). `--all` takes every default by nbval.

Two run side by side, one thread each, the longest first. They draw into a folder that is thrown away, and what
`heads.kept` holds is not trusted. The exit status is 1 where any fails. `--drill SLUG` drills one paper, here.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path

import nbformat

from heads.course import papers, record, runs

SIDE_BY_SIDE = 2  # kernels: CI and many a laptop have two cores
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
BUDGET = 90  # seconds of a default run
LONGEST = 1800  # seconds: a kernel that hangs fails by name
BY_NBVAL = [
    sys.executable, str(Path(__file__).with_name("private_kernel.py")), "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600",
    "-p", "no:cacheprovider", "-q", "--tb=short",
]  # fmt: skip


def by_nbval(parts: dict[str, int], stale: Iterable[str], commit: str | None) -> dict[str, str]:
    """Which papers run by nbval, and why: `{slug: reason}`.

    Args:
        parts: the part of every ready paper, in the order of the course.
        stale: those whose committed result is not of this code.
        commit: what draws one paper of each part; None takes the first.
    """
    drawn = {}
    for part in dict.fromkeys(parts.values()):
        slugs = [slug for slug in parts if parts[slug] == part]
        ticket = {slug: sha256(f"{commit} {slug}".encode()).hexdigest() for slug in slugs}
        slug = min(slugs, key=ticket.get) if commit else slugs[0]
        drawn[slug] = f"drawn for part {part} by commit {commit[:10]}" if commit else f"the first of part {part}"
    return drawn | dict.fromkeys(stale, "its committed result is not of this code")


def head() -> str | None:
    """The commit that is checked out; None without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=papers.root(), capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def seconds(slug: str) -> float:
    """What the committed default run took; the budget where there is none yet."""
    path = papers.root() / "figures" / slug / "result.json"  # not papers.result: make test points HEADS_FIGURES elsewhere
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else BUDGET


def run(slug: str, nbval: bool, env: dict) -> tuple[bool, float, str]:
    """Run one notebook in a process of its own: whether it passed, its seconds, what it printed."""
    drilled = [sys.executable, __file__, "--drill", slug]
    command, start = [*BY_NBVAL, str(papers.notebook(slug))] if nbval else drilled, time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=papers.root(), env=env, timeout=LONGEST, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired:
        return False, LONGEST, f"{slug} was stopped after {LONGEST} s"
    return done.returncode == 0, time.monotonic() - start, done.stdout


WRONG_IS_SAID = """\
def _drill(answer, check, words):
    shell, shown = get_ipython(), get_ipython().showtraceback
    shell.showtraceback = lambda *args, **kwargs: None  # an error that is shown would stop the run
    try:
        shell.run_cell(answer)
        error = shell.run_cell(check).error_in_exec
    finally:
        shell.showtraceback = shown
    if not isinstance(error, AssertionError) or words not in str(error):
        raise RuntimeError(f"the check of a wrong answer said {{error!r}}, expected an AssertionError with the words {{words!r}}")

_drill({answer!r}, {check!r}, {words!r})
"""


def drill_of(slug: str) -> nbformat.NotebookNode:
    """A paper's notebook with more cells: after each check a wrong answer of tests/drills/<slug>.py (a list WRONG of
    `(code, words of the check)`, one for each exercise, in order), and after each solution the check again."""
    book = nbformat.read(papers.notebook(slug), as_version=4)
    path = papers.root() / "tests" / "drills" / f"{slug.replace('-', '_')}.py"
    wrong = runpy.run_path(str(path))["WRONG"] if path.is_file() else []
    cells, checks = [], []
    for cell in book.cells:
        cells.append(cell)
        tags = cell.metadata.get("tags", [])
        if "check" in tags:
            if len(checks) == len(wrong):
                raise ValueError(f"{path.name}: {len(wrong)} wrong answers, but there is another check")
            answer, words = wrong[len(checks)]
            checks.append(cell.source)
            drill = WRONG_IS_SAID.format(answer=answer, check=cell.source, words=words)
            cells.append(nbformat.v4.new_code_cell(drill))
        elif "solution" in tags and checks:
            cells.append(nbformat.v4.new_code_cell(checks[-1]))
    if len(checks) != len(wrong):
        raise ValueError(f"{path.name}: {len(wrong)} wrong answers for {len(checks)} checks")
    book.cells = cells
    return book


def drill(slug: str) -> None:
    """Run a paper's drill with its smoke preset. RuntimeError names the cell that failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / papers.notebook(slug).name
        nbformat.write(drill_of(slug), path)
        runs._execute(path, None, parameters=runs.plan(slug, "smoke"))


def run_all(ways: dict[str, bool]) -> list[str]:
    """Run `{slug: by nbval}` and print how each ended; the slugs that failed."""
    order = sorted(ways, key=lambda slug: (not ways[slug], -seconds(slug)))  # the quick ones fill the gaps at the end
    failed = []
    with tempfile.TemporaryDirectory() as figures, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        env = os.environ | ONE_THREAD | {"HEADS_FIGURES": figures, "HEADS_CACHE": "0"}
        started = {pool.submit(run, slug, ways[slug], env): slug for slug in order}
        try:
            for future in as_completed(started):
                slug, (passed, took, output) = started[future], future.result()
                print(f"{'passed' if passed else 'FAILED'} {took:6.0f} s  {slug}", flush=True)
                if not passed:
                    failed.append(slug)
                    print(output, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__.split("\n\n")[1])
    parser.add_argument("--all", action="store_true", help="every default by nbval")
    parser.add_argument("--drill", metavar="SLUG", help="only the drill of one paper")
    asked, start = parser.parse_args(arguments), time.monotonic()
    if asked.drill:
        drill(asked.drill)
        return 0
    everything = asked.all
    parts = {paper.slug: paper.part for paper in papers.papers() if paper.state == "ready"}
    chosen = by_nbval(parts, [slug for slug in parts if not record.current(slug)], head())
    for slug in parts:
        why = "asked for (--all)" if everything else chosen.get(slug, "its result is of this code, and another was drawn")
        print(f"{'nbval' if everything or slug in chosen else 'drill'}  {slug}: {why}", flush=True)
    failed = run_all({slug: everything or slug in chosen for slug in parts})
    minutes = (time.monotonic() - start) / 60
    print(f"{len(parts)} notebooks in {minutes:.1f} minutes; failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
