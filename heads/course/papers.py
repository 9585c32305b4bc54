"""What is known about each paper without running anything: its entry in data/papers.yaml,
its notebook's parameters, its presets and the result of its last run.

Light on purpose (no torch, no matplotlib): the command line answers from here.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import tokenize
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from heads.names import known, nearest, root

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times faster


@dataclass(frozen=True)
class Claim:
    """One testable statement of a paper; `holds` says, before measuring, what counts as holding."""

    id: str
    text: str
    paper: str
    where: str | None
    holds: str


@dataclass(frozen=True)
class Paper:
    """One paper of the course; `state` is 'ready' (it has a notebook) or 'planned'."""

    slug: str
    number: int
    part: int
    title: str
    authors: list[str]
    year: int
    arxiv: str | None
    venue: str | None
    question: str
    state: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    default: object
    comment: str


@lru_cache
def _read(folder):
    found = yaml.load((folder / "data" / "papers.yaml").read_text(encoding="utf-8"), _Loader)
    made = [Paper(**entry | {"claims": tuple(Claim(**claim) for claim in entry["claims"])}) for entry in found["papers"]]
    return found["parts"], made


def parts() -> dict[int, str]:
    """The parts of the course: number -> title."""
    return dict(_read(root())[0])


def papers() -> list[Paper]:
    """All papers, in the order of the course."""
    return list(_read(root())[1])


def paper(slug: str) -> Paper:
    """The paper with this slug. Raises LookupError with the nearest slugs."""
    found = {p.slug: p for p in papers()}
    if slug not in found:  # not all 34 in the message: `heads list` shows them better
        raise LookupError(f"no paper {slug!r}{nearest(slug, found)} `heads list` shows all {len(found)}.")
    return found[slug]


def notebook(slug: str) -> Path:
    """Where the paper's notebook is, or will be: notebooks/NN_slug_with_underscores.ipynb."""
    return root() / "notebooks" / f"{paper(slug).number}_{slug.replace('-', '_')}.ipynb"


def result(slug: str, folder: Path | None = None) -> dict | None:
    """The parsed result.json of a run's folder (figures/<slug>, the last default run), or None before the first."""
    path = (folder or figures_root() / paper(slug).slug) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def verdicts(slug: str, folder: Path | None = None) -> dict[str, str]:
    """Claim -> verdict of a run, see `result`; empty before the first."""
    return {claim["id"]: claim["verdict"] for claim in (result(slug, folder) or {"claims": []})["claims"]}


def prose(measured: object) -> str:
    """A measured value in words: a number, text, or a dict or list of them."""
    if isinstance(measured, dict):
        return ", ".join(f"{key} {prose(item)}" for key, item in measured.items())
    if isinstance(measured, list):
        return ", ".join(map(prose, measured))
    return "not a number" if measured is None else str(measured)


def figures_root() -> Path:
    """Where default runs publish: figures/ of the repository, or the variable HEADS_FIGURES."""
    return Path(os.environ.get("HEADS_FIGURES") or root() / "figures")


# ---- parameters ---------------------------------------------------------------------------


def parameters(slug: str) -> list[Parameter]:
    """What the notebook's parameters cell declares: a list of `Parameter`.

    Raises FileNotFoundError for a paper without a notebook, ValueError where the notebook has
    not exactly one cell tagged `parameters`, or where that cell is not plain literals.
    """
    path = notebook(slug)
    if not path.is_file():
        raise FileNotFoundError(f"{slug} has no notebook yet ({paper(slug).state}): expected {path.name}")
    return parameters_in(path)


def code_cells(path: Path) -> list[dict]:
    """The code cells of the notebook file at `path`, as JSON has them."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def parameters_in(path: Path) -> list[Parameter]:
    """The parameters that the notebook file at `path` declares; see `parameters`."""
    tagged = [cell["source"] for cell in code_cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{Path(path).name} has {len(tagged)} cells tagged 'parameters', expected exactly one")
    try:
        statements = ast.parse(tagged[0]).body
        tokens = tokenize.generate_tokens(io.StringIO(tagged[0]).readline)
        comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        return [Parameter(*_declared(s), comments.get(s.end_lineno, "")) for s in statements]
    except SyntaxError as error:
        text = tagged[0].splitlines()[error.lineno - 1].strip()
        raise ValueError(
            f"{Path(path).name}, parameters cell, line {error.lineno}: {text!r} is not `name = literal  # comment`"
        ) from None


def _declared(statement: ast.stmt) -> tuple[str, object]:
    """Name and value of `name = literal`. SyntaxError for anything else: papermill would not see it."""
    match statement:
        # nor does it see `n: int | None = 3`, so an annotation is a single name
        case ast.Assign([ast.Name(name)]) | ast.AnnAssign(ast.Name(name), ast.Name()):
            with suppress(ValueError, TypeError):
                return name, ast.literal_eval(statement.value)
    raise SyntaxError("no literal", ("", statement.lineno, 0, ""))


def check_parameters(slug: str, values: dict, complete: bool = False) -> None:
    """Refuse what the notebook would not understand: {name: value} against its declarations, all of them if `complete`.

    An int passes for a float, a bool never for a number; a default of None takes anything; list
    elements must be like those of the default. Raises TypeError that names the parameter, what
    was expected, and the nearest name.
    """
    declared = {p.name: p for p in parameters(slug)}
    for name, value in values.items():
        if name not in declared:
            raise TypeError(f"{slug} has no parameter {name!r}{nearest(name, declared)} It has: {', '.join(declared)}.")
        default = declared[name].default
        if not _fits(value, default):
            elements = sorted({type(d).__name__ for d in default}) if isinstance(default, (list, tuple)) else []
            kind = f"list of {' or '.join(elements)}" if elements else type(default).__name__
            raise TypeError(f"parameter {name!r} of {slug} is a {kind} (default {default!r}), not {value!r}")
    if complete and (missing := [name for name in declared if name not in values]):
        raise TypeError(
            f"Study({slug!r}) lacks {', '.join(missing)}: pass every name of the notebook's parameters cell, by keyword"
        )


def _fits(value, default):
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and (not default or all(any(_fits(v, d) for d in default) for v in value))
    return default is None or type(value) in ((int, float) if type(default) is float else (type(default),))


# ---- presets and the name of a run --------------------------------------------------------


def presets(slug: str) -> dict[str, dict]:
    """{preset: {parameter: value}} from data/presets/<slug>.yaml; empty without that file."""
    path = root() / "data" / "presets" / f"{paper(slug).slug}.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {} if path.is_file() else {}


def preset(slug: str, name: str) -> dict:
    """The parameters of one preset. Raises LookupError with the nearest name."""
    found = presets(slug)
    return found[known(f"preset of {slug}", name, found)]


def preset_of(slug: str, values: dict) -> str:
    """Which preset these parameters are: 'default', a preset's name, or 'custom'.

    A paper without a notebook has no defaults to differ from: 'default'.
    """
    if not notebook(slug).is_file():
        return "default"
    named, ours = {"default": {}, **presets(slug)}, _complete(slug, values)
    return next((name for name, changes in named.items() if _complete(slug, changes) == ours), "custom")


def _complete(slug, values):
    """The defaults with these values in their place, through JSON so that a tuple equals a list."""
    return json.loads(json.dumps({**{p.name: p.default for p in parameters(slug)}, **values}))


def run_name(slug: str, values: dict) -> str:
    """The name of a run's folder: slug-preset, or slug-digest for parameters of one's own."""
    name = preset_of(slug, values)
    if name == "custom":
        canonical = json.dumps(_complete(slug, values), sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()[:10]
    return f"{slug}-{name}"


def run_folder(slug: str, values: dict) -> Path:
    """The ignored folder runs/<run name> of the repository, for the executed copy of a notebook."""
    return root() / "runs" / run_name(slug, values)


def figures_folder(slug: str, values: dict) -> Path:
    """Where a run with these parameters publishes its figures and result.json.

    Only a default run goes to figures/<slug>; any other stays in its run folder, or, where
    HEADS_FIGURES is set, in a folder of its own below that.
    """
    if preset_of(slug, values) == "default":
        return figures_root() / slug
    aside = os.environ.get("HEADS_FIGURES")
    return figures_root() / run_name(slug, values) if aside else run_folder(slug, values) / "figures"
