"""Study: what a notebook declares, draws and concludes, kept as one record.

    study = heads.Study("retrieval-head", globals())    # takes what the parameters cell declares
    lm = study.uses(heads.load(model, device=device))
    study.figure(fig, "1-bands", data=frame, caption="...")
    study.claim("C1", measured="8.9 %", holds=share <= 0.1, why="...")
    study.verdict()     # publishes figures/retrieval-head/ with result.json, all or nothing
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from pandas import DataFrame

from heads import plot
from heads.course import papers, record
from heads.course.papers import cell, prose
from heads.names import known

if TYPE_CHECKING:
    from heads.scores import HeadScores  # not imported: a study that has none does not depend on them

M = TypeVar("M")


class Shown:
    """Text for a terminal and Markdown for a notebook; a picture has a PNG, with `alt`, what it says in words, as well."""

    def __init__(self, text: str, markdown: str | None = None, png: bytes | None = None, html: str | None = None, alt: str = ""):
        self._mimes = {"text/plain": text, "text/markdown": markdown, "image/png": png, "text/html": html}
        self._about = {"image/png": {"alt": alt}} if png else {}

    def __repr__(self):
        return self._mimes["text/plain"]

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {mime: data for mime, data in self._mimes.items() if data is not None}, self._about


class Study:
    """One run of a paper's notebook: seed, clock, model, figures, scores, claims, verdict.

    slug names the paper. Its parameters are taken from `names`, such as the notebook's `globals()`: what the
    parameters cell declares and nothing else. A script gives them as keywords, all of them and no other.
    Seeds python, numpy and torch with `seed` and applies the house style. Nothing is published
    before `verdict()`: a run that dies earlier leaves the last good figures as they were.

    Raises LookupError for an unknown paper and TypeError for a missing, unknown or ill-typed
    parameter.
    """

    def __init__(self, slug: str, names: Mapping[str, object] | None = None, /, **parameters):
        self.paper = papers.paper(slug)
        if names is not None:
            parameters |= {p.name: names[p.name] for p in papers.parameters(slug) if p.name in names}
        self.parameters = parameters
        self.seed = parameters.get("seed", 0)
        if papers.notebook(slug).is_file():  # a planned paper takes any
            papers.check_parameters(slug, parameters, complete=True)
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        plot.style()
        self.preset = papers.preset_of(slug, parameters)
        self._smoke = " (smoke: too small to mean anything)" * papers.is_smoke(slug, parameters)
        self._output = record.Folder(papers.figures_folder(slug, parameters))
        self._models, self._figures, self._scores, self._claims, self._timed = [], {}, {}, {}, set()
        self._start = time.monotonic()

    def claims(self) -> Shown:
        """The paper's claims, with its own numbers and what will count as *holds* here."""
        head = ("", "claim", "the paper", "where", "holds here if")
        rows = [(c.id, c.text, c.paper, c.where or "", c.holds) for c in self.paper.claims]
        return Shown("\n".join(f"{id} {text} Holds if: {holds}" for id, text, _, _, holds in rows), _table(head, rows))

    def uses(self, model: M) -> M:
        """Record a model that `heads.load` returned (name, revision, SHA-256 of its weights); returns it."""
        about = getattr(model, "record", None)
        if not isinstance(about, dict):
            raise TypeError(f"uses() takes what heads.load() returned, not {type(model).__name__}: it has no record")
        kept = {key: about.get(key) for key in ("name", "revision", "sha256")}
        self._models = [m for m in self._models if m != kept] + [kept]
        return model

    def figure(self, fig: Figure, name: str, data: Mapping | DataFrame | None = None, caption: str = "") -> None:
        """Keep a matplotlib figure as png, svg and (the numbers in data) csv, and show it once.

        name is the file's stem, such as '1-bands'. In a notebook the picture and its caption
        appear here, and the figure is closed so that it does not appear again.
        """
        self._keep(name, caption, fig, lambda stem: plot.save(fig, stem, data))

    def animation(self, fig: Figure, draw: Callable[[object], object], frames: Iterable, name: str,
                  data: Mapping | DataFrame | None = None, caption: str = "", **timing: float) -> None:  # fmt: skip
        """Keep a figure that moves, and show its last frame: `draw(frame)` changes it, once for each of `frames`.

        In a notebook the film is below the still picture, folded away: opening it plays, closing it stops.
        Kept as png (the last frame), film.png (it plays in a browser), gif (for slides) and, with data, csv.
        timing: `seconds`, `hold` and `dpi` of `heads.plot.animation`, which says what is refused.
        """
        files = self._keep(name, caption, fig, lambda stem: plot.animation(fig, draw, frames, stem, data, **timing))
        if get_ipython():
            display(_film(files[1].read_bytes(), caption))

    def _keep(self, name, caption, fig, write):
        """Write a figure's files, list them in the record, close it and show the first of them with its caption; the files."""
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"a figure's name is a file stem of letters, digits, '-' and '.', not {name!r}")
        files = write(self._output.work / name)
        plot.plt.close(fig)
        self._figures[name] = {"name": name, "caption": caption, "files": [f.name for f in files]}
        if get_ipython():
            picture = Shown(f"<figure {name}>", png=files[0].read_bytes(), alt=caption or name)
            display(picture, *[Shown(c, f"*{cell(c)}*") for c in [caption] if c])
        return files

    def scores(self, name: str, scores: HeadScores) -> None:
        """Keep a HeadScores, as data, in result.json under this name."""
        self._scores[name] = plain(scores.to_dict())

    def claim(self, id: str, *, measured: object, holds: bool | None, partly: bool = False, why: str = "",
              timed: bool = False) -> Shown:  # fmt: skip
        """Judge one claim; shows and keeps the measured value and the verdict.

        measured: text, a number, or a dict of them (4 digits are kept). holds: True, False, or
        None where it was not tested here. partly: what the verdict is called when holds is False.
        why: one sentence, required unless the claim holds. Judging a claim again replaces it.
        timed: the verdict rests on wall-clock time, so that a busy machine can turn it: `summary` leaves it out.

        Raises LookupError for an unknown id, TypeError for a verdict that is not a bool,
        ValueError where why is missing.
        """
        claims = {c.id: c for c in self.paper.claims}
        claim = claims[known(f"claim of {self.paper.slug}", id, claims)]
        verdict = _verdict(id, holds, partly)
        if verdict != "holds" and not why.strip():
            raise ValueError(f"claim {id}: a verdict of {verdict!r} needs why=, the reason in one sentence")
        said, here = {"id": id, "text": claim.text, "paper": claim.paper}, plain(measured)
        self._claims[id] = {**said, "measured": here, "verdict": verdict, "why": why}
        (self._timed.add if timed else self._timed.discard)(id)
        judged = f"{id} {verdict}{self._smoke}"
        markdown = f"**{judged}.** " + cell(f"Here: {prose(here)}. The paper: {claim.paper}. {why}".rstrip())
        return Shown(f"{judged}: {prose(here)}", markdown)

    def summary(self) -> None:
        """Print one line for each claim, `C1 holds`, and nothing that differs between machines.

        This is the cell to tag `nbval-check-output`: `verdict()` shows measured numbers, whose
        last digit may differ, and nbval knows no tolerance. Raises ValueError for claims not judged.
        """
        rows = [(row["id"], "timed" if row["id"] in self._timed else row["verdict"]) for row in self._judged()]
        print("\n".join(f"{id} {verdict}" for id, verdict in rows))

    def verdict(self) -> Shown:
        """Publish figures and result.json in one step, and return the closing table.

        Raises ValueError where a claim of the paper was never judged, naming it.
        """
        rows = self._judged()
        text = json.dumps(self._record(rows), indent=1, allow_nan=False, ensure_ascii=False)
        (self._output.work / "result.json").write_text(text + "\n", encoding="utf-8")
        if (others := self._output.target / papers.ELSEWHERE).is_file():  # of other runs, kept beside this one
            shutil.copy(others, self._output.work)
        self._output.publish()
        head = ("", "claim", "the paper", "here", f"verdict{self._smoke}", "why")
        cells = [(r["id"], r["text"], r["paper"], prose(r["measured"]), f"**{r['verdict']}**", r["why"]) for r in rows]
        return Shown("\n".join(f"{r['id']} {r['verdict']}" for r in rows), _table(head, cells))

    def elsewhere(self) -> Shown:
        """Does it hold elsewhere? The verdicts of other models and seeds that `heads run --elsewhere` kept, a row a run."""
        return _others(self.paper, papers.elsewhere(self.paper.slug))

    def _judged(self):
        if missing := [c.id for c in self.paper.claims if c.id not in self._claims]:
            raise ValueError(
                f"{self.paper.slug}: no verdict on {', '.join(missing)}. Judge each claim with study.claim(id, ...); "
                "holds=None says that it was not tested here."
            )
        return [self._claims[c.id] for c in self.paper.claims]

    def _record(self, rows):
        """What result.json holds."""
        return {
            "paper": self.paper.slug,
            "arxiv": self.paper.arxiv,
            "preset": self.preset,
            "parameters": self.parameters,
            "seed": self.seed,
            "model": self._models[0] if self._models else None,
            "versions": record.versions(),
            "hardware": record.hardware(),
            "seconds": round(time.monotonic() - self._start, 1),
            "peak_memory_bytes": record.peak_memory_bytes(),
            "code": record.code(self.paper.slug),
            "claims": rows,
            "scores": self._scores,
            "figures": list(self._figures.values()),
        } | ({"other_models": self._models[1:]} if self._models[1:] else {})


def _film(png, caption):
    """A picture that moves, folded: it plays while it is open."""
    image = f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{escape(caption)} (film)">'
    return Shown("<film>", html=f"<details><summary>Play</summary>{image}</details>")


def _others(paper, runs):
    """The table of runs that were kept beside the default's."""
    if not runs:
        return Shown(f"No other run was kept yet: heads run {paper.slug} -p seed=1 --elsewhere keeps one.")
    ids, now, rows = [c.id for c in paper.claims], record.code(paper.slug)["sha256"], []
    for run in runs:
        differs = prose(run["parameters"]) + " (earlier code)" * (run["code"] != now)
        rows.append((differs, f"{run['seconds']:.0f} s", *(run["verdicts"].get(id, "") for id in ids)))
    return Shown("\n".join(", ".join(row) for row in rows), _table(("run with", "", *ids), rows))


def plain(value: object) -> object:
    """A value as JSON data: numpy and torch become lists, floats keep four digits, NaN becomes None.

    Raises TypeError for what is no number, text, or collection of them.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):  # numpy's float64 as well
        return float(f"{value:.4g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a result is a number, text, or a list or dict of them, not {type(value).__name__}")


def _verdict(id, holds, partly):
    for name, value in (("holds", holds), ("partly", partly)):
        if not isinstance(value, (bool, np.bool_)) and not (name == "holds" and value is None):
            raise TypeError(f"claim {id}: {name} is True or False, not {value!r}; write the comparison out")
    if holds is None:
        return "not tested here"
    return "holds" if holds else "partly" if partly else "fails"


def _table(head, rows):
    """A Markdown table; what would end a cell, as in |r|, or be HTML is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
