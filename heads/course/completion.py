"""What the shell may offer at TAB: papers, and the presets and parameters of those named before. Light, as `papers` is."""

from __future__ import annotations

import json
import os

from heads.course import papers

Words = list[tuple[str, str]]  # a word and what the shell shows beside it


def any_paper(incomplete: str) -> Words:
    """Slugs, or numbers where a digit was typed."""
    return [(str(p.number) if incomplete[:1].isdigit() else p.slug, p.title) for p in papers.papers()]


def ready_paper(incomplete: str) -> Words:
    """The same of papers that have a notebook."""
    return [row for row, p in zip(any_paper(incomplete), papers.papers()) if p.state == "ready"]


def preset() -> Words:
    """The presets of the papers on the line."""
    return [(name, f"of {slug}") for slug in _named() for name in papers.presets(slug)]


def parameter() -> Words:
    """`name=`, and `name=default`: the second shows the default, and keeps a shell from adding a space to the first."""
    found = [p for slug in _named() for p in papers.parameters(slug)]
    texts = [json.dumps(p.default, separators=(",", ":")).replace('"', "").strip("[]") for p in found]
    return [(p.name + end, p.comment) for p, text in zip(found, texts) for end in ("=", f"={text}")]


def _named():
    """The ready papers on the line so far, as typer's scripts for the shells hand it over."""
    line = (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()
    return [p.slug for p in papers.papers() if p.state == "ready" and {p.slug, str(p.number)} & set(line)]
