"""What is known about each paper without running anything: its entry in data/papers.yaml,
its notebook's parameters, its presets and the result of its last run.

Light on purpose (no torch, no matplotlib): the command line answers from here.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import re
import tokenize
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import yaml

from heads.names import known, nearest, root

_yaml = partial(yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C parser is ten times faster
# Scalars stay text, to be read as a parameter's default is: YAML 1.1 takes 010 for 8, 1:30 for 90 and no for False.
texts = partial(yaml.load, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
MOST = 2**32 - 1  # the largest seed that numpy takes
ELSEWHERE = "elsewhere.json"  # in a paper's folder of figures


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


def parsed(path: Path, parse: Callable = json.loads) -> object:
    """What a file holds, by default JSON. ValueError names the file and the line where it is broken."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from None


@lru_cache
def _read(folder):
    found = parsed(folder / "data" / "papers.yaml", _yaml)
    made = [Paper(**entry | {"claims": tuple(Claim(**claim) for claim in entry["claims"])}) for entry in found["papers"]]
    return found["parts"], made


def parts() -> dict[int, str]:
    """The parts of the course: number -> title."""
    return dict(_read(root())[0])


def papers() -> list[Paper]:
    """All papers, in the order of the course."""
    return list(_read(root())[1])


def paper(slug: str) -> Paper:
    """The paper with this slug or number ("42"). Raises LookupError with the nearest slugs or numbers."""
    found = {p.slug: p for p in papers()}
    numbers = {str(p.number): p for p in found.values()}
    if slug in numbers or slug in found:
        return numbers.get(slug) or found[slug]
    end = f"`heads list` shows all {len(found)}."  # not here: it shows them better
    if slug.isdecimal():
        near = sorted(sorted(numbers, key=lambda number: abs(int(number) - int(slug)))[:2])
        raise LookupError(f"no paper {slug}. The nearest: {', '.join(f'{n} {numbers[n].slug}' for n in near)}. {end}")
    raise LookupError(f"no paper {slug!r}{nearest(slug, found)} {end}")


def notebook(slug: str) -> Path:
    """Where the paper's notebook is, or will be: notebooks/NN_slug_with_underscores.ipynb."""
    found = paper(slug)
    return root() / "notebooks" / f"{found.number}_{found.slug.replace('-', '_')}.ipynb"


def result(slug: str, folder: Path | None = None) -> dict | None:
    """The parsed result.json of a run's folder (figures/<slug>, the last default run), or None before the first."""
    path = (folder or figures_root() / paper(slug).slug) / "result.json"
    return parsed(path) if path.is_file() else None


def verdicts(slug: str, folder: Path | None = None) -> dict[str, str]:
    """Claim -> verdict of a run, see `result`; empty before the first. ValueError for what no study has written."""
    record = result(slug, folder)
    try:
        return {} if record is None else {claim["id"]: claim["verdict"] for claim in record["claims"]}
    except (LookupError, TypeError):
        raise ValueError(f"the result.json of {slug} is not what a study writes: run heads run {slug}") from None


def elsewhere(slug: str) -> list[dict]:
    """What `heads run --elsewhere` kept beside the committed result: of each run, the parameters that were not the
    defaults, its verdicts, seconds and the digest of its code. ValueError for a file that is broken."""
    path = root() / "figures" / paper(slug).slug / ELSEWHERE
    return parsed(path) if path.is_file() else []


def prose(measured: object) -> str:
    """A measured value in words: a number, text, or a dict or list of them."""
    if isinstance(measured, dict):
        return ", ".join(f"{key} {prose(item)}" for key, item in measured.items())
    if isinstance(measured, list):
        return ", ".join(map(prose, measured))
    return "not a number" if measured is None else str(measured)


def cell(text: object) -> str:
    """Text for a cell of a Markdown table: no bar ends it, no line break, and it holds no HTML."""
    return " ".join(str(text).split("\n")).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


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
    cells = parsed(Path(path))["cells"]
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


def read(slug: str, written: Mapping[str, object]) -> dict:
    """Parameters as a command line or a YAML file writes them: {name: text or list of texts} -> {name: value}.

    Each is read as its default is: text as it stands, numbers and the like as literals of Python or JSON, lists with
    or without brackets (`2,5,10`). What cannot be read so stays text, for `check_parameters` to refuse.
    """
    if not isinstance(written, Mapping):
        raise ValueError(f"parameters are written as name: value, not as {written!r}")
    defaults = {p.name: p.default for p in parameters(slug)}
    return {name: _value(text, defaults.get(name)) for name, text in written.items()}


def _value(text, default):
    found = text
    for parse in (json.loads, ast.literal_eval) if isinstance(text, str) else ():
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = parse(text)
    if not isinstance(default, (list, tuple)):
        return text if isinstance(default, str) and not isinstance(found, str) else found
    if not isinstance(found, (list, tuple)):
        if text.count("[") != text.count("]"):
            return text
        found = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    return [_value(part, default[0] if default else None) for part in found]


def check_parameters(slug: str, values: dict, complete: bool = False) -> None:
    """Refuse what the notebook would not understand: {name: value} against its declarations, all of them if `complete`.

    An int passes for a float, a bool never for a number; a default of None takes a whole number; list
    elements must be like those of the default. Raises TypeError that names the parameter, what
    was expected, and the nearest name; ValueError for a number or a text that means nothing (see `_senseless`).
    """
    declared = {p.name: p for p in parameters(slug)}
    for name, value in values.items():
        if name not in declared:
            raise TypeError(f"{slug} has no parameter {name!r}{nearest(name, declared)} It has: {', '.join(declared)}.")
        default = declared[name].default
        if not _fits(value, default):
            elements = sorted({type(d).__name__ for d in default}) if isinstance(default, (list, tuple)) else []
            kind = f"list of {' or '.join(elements)}" if elements else "int" if default is None else type(default).__name__
            raise TypeError(f"parameter {name!r} of {slug} is a {kind} (default {default!r}), not {value!r}")
        if wrong := _senseless(declared[name], value):
            raise ValueError(f"parameter {name!r} of {slug} {wrong} (default {default!r}), not {value!r}")
    if complete and (missing := [name for name in declared if name not in values]):
        raise TypeError(
            f"Study({slug!r}) lacks {', '.join(missing)}: pass every name of the notebook's parameters cell, by keyword"
        )


def _fits(value, default):
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and (not default or all(any(_fits(v, d) for d in default) for v in value))
    if default is None:
        return value is None or type(value) is int
    return type(value) in ((int, float) if type(default) is float else (type(default),))


def _senseless(parameter, value) -> str | None:
    """What a value of the right type must be and is not: finite; not empty; a whole number from 1, or from 0 where the
    default or the comment says what 0 does; a seed that numpy takes, too."""
    default, name = parameter.default, parameter.name
    if isinstance(value, str):
        return "must not be empty" if default and not value.strip() else None
    whole = [d for d in (default if isinstance(default, (list, tuple)) else [default]) if type(d) is int]
    least = min([0 if name == "seed" or re.search(r"\b0\b", parameter.comment) else 1, *whole])
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            return "must be finite"
        if type(each) is int and (whole or default is None) and not least <= each <= (MOST if name == "seed" else math.inf):
            return f"is a whole number from {least}" + f" to {MOST}" * (name == "seed")
    return None


# ---- presets and the name of a run --------------------------------------------------------


def presets(slug: str) -> dict[str, dict]:
    """{preset: {parameter: value}} from data/presets/<slug>.yaml; empty without that file."""
    path = root() / "data" / "presets" / f"{paper(slug).slug}.yaml"
    found = parsed(path, texts) if path.is_file() else None
    return {name: read(slug, changes or {}) for name, changes in (found or {}).items()}


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


def is_smoke(slug: str, values: dict) -> bool:
    """Whether these are the sizes of the smoke preset, whatever the model, the device and the seed."""
    free = {"model", "device", "seed"}
    return preset_of(slug, {name: value for name, value in values.items() if name not in free}) == "smoke"


def _complete(slug, values):
    """The defaults with these values in their place, through JSON so that a tuple equals a list."""
    return json.loads(json.dumps({**{p.name: p.default for p in parameters(slug)}, **values}))


def run_name(slug: str, values: dict) -> str:
    """The name of a run's folder: slug-preset, or slug-digest for parameters of one's own."""
    name = preset_of(slug, values)
    if name == "custom":
        canonical = json.dumps(_complete(slug, values), sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()[:10]
    return f"{paper(slug).slug}-{name}"


def run_folder(slug: str, values: dict) -> Path:
    """The folder runs/<run name> for the executed copy of a notebook."""
    return runs_root() / run_name(slug, values)


def runs_root() -> Path:
    """Where executed and opened copies are: the ignored runs/ of the repository, or the variable HEADS_RUNS."""
    return Path(os.environ.get("HEADS_RUNS") or root() / "runs")


def opened() -> Path:
    """The folder of the copies that `heads open` makes."""
    return runs_root() / "open"


def figures_folder(slug: str, values: dict, where: Path | None = None) -> Path:
    """Where a run with these parameters publishes its figures and result.json.

    Only a default run goes to figures/<slug>; any other stays in its run folder. Where HEADS_FIGURES is set, each has
    a folder below that; and so, below figures/ beside it, has a copy that `heads open` made, whoever opens it.

    Args:
        where: the folder in which the notebook runs, by default that of this process.
    """
    copy = (where or Path.cwd()).resolve() == opened().resolve()
    aside = Path(os.environ.get("HEADS_FIGURES") or opened() / "figures")
    if preset_of(slug, values) == "default":
        return (aside if copy else figures_root()) / paper(slug).slug
    apart = copy or os.environ.get("HEADS_FIGURES")
    return aside / run_name(slug, values) if apart else run_folder(slug, values) / "figures"
