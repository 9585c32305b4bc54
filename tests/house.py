"""Who imports whom: the house of `heads/` as a drawing. `python -m tests.house [NAME [REVISION]]`.

Writes figures/house/NAME.svg (and .png), "now" from the working tree, or that of a git revision. A wing is a room; an arrow
that is part of a circle is red. The rule that arrows obey is in tests/test_house.py.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINGS = {"model": "blue", "lab": "green", "tasks": "orange", "course": "purple"}
# left end, floor, width and storeys of each wing's room; of the flat house; and what stands by itself
ROOMS = {"model": (0.5, 1, 0.5, 3), "tasks": (0.2, 2.2, 0.27, 3), "lab": (0.2, 6, 0.8, 3), "course": (0, 4, 0.15, 4),
         "heads": (0.2, 0, 0.8, 1)}  # fmt: skip
FLAT = {"heads": (0, 1, 0.7, 7), "tasks": (0.74, 2, 0.26, 4)}
ALONE = {"names": (0.3, 0), "plot": (0.1, 0), "scores": (0.1, 2), "metrics": (0.33, 5.2), "cli": (0.08, 9)}


def sources(revision: str | None = None) -> dict[str, str]:
    """Dotted module below `heads` ("lab.paths") -> its source, of the working tree or of a revision."""
    if revision is None:
        files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "heads").rglob("*.py")}
    else:
        archive = subprocess.run(["git", "archive", revision, "heads"], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            files = {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers() if m.name.endswith(".py")}
    names = {name: name.removeprefix("heads/").removesuffix(".py").replace("/", ".") for name in files}
    return {names[name]: text for name, text in sorted(files.items()) if not names[name].endswith(("__init__", "__main__"))}


def imports(modules: dict[str, str]) -> set[tuple[str, str]]:
    """(importer, imported) pairs, those inside functions included."""
    found = set()
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            wanted = {full.removeprefix("heads.") for full in wanted if full.startswith("heads")}
            found |= {(name, other) for other in wanted & modules.keys() - {name}}
    return found


def below(arrows: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Everything that a module reaches, step by step."""
    reach = defaultdict(set)
    for a, b in arrows:
        reach[a].add(b)
    while True:
        more = {a: found | {c for b in found for c in reach[b]} for a, found in list(reach.items())}
        if all(more[a] == reach[a] for a in more):
            return reach
        reach.update(more)


def heights(modules, arrows, reach) -> dict[str, int]:
    """Longest way down; the modules of a circle stand at one height."""
    circle = {a: {b for b in reach[a] if a in reach[b]} | {a} for a in modules}
    down = {a: {b for x in circle[a] for y, b in arrows if y == x} - circle[a] for a in modules}

    def height(a, seen=()):
        return 1 + max((height(b) for b in down[a]), default=-1)

    return {a: height(a) for a in modules}


def rooms(modules, level) -> dict[str, tuple[float, float]]:
    """Where each module stands: a room for each wing, the lower ones further down; before there were wings, one room."""
    found, wings = {}, sorted({m.split(".")[0] for m in modules if "." in m})
    for wing in [*wings, "heads"]:
        inside = sorted((m for m in modules if (m.split(".")[0] if "." in m else "heads") == wing), key=lambda m: (level[m], m))
        x, y, width, depth = ROOMS[wing] if len(wings) > 1 else FLAT[wing]
        across = -(-len(inside) // depth)
        for i, module in enumerate(inside):
            column, row = i % across, i // across
            found[module] = (x + width * (column + 0.5 + 0.2 * (row % 2)) / across, y + row)
    return found | ({m: at for m, at in ALONE.items() if m in found} if len(wings) > 1 else {})


def draw(name: str, revision: str | None = None) -> list[Path]:
    """Draw the house; returns the files."""
    from heads import plot

    modules = sources(revision)
    arrows = imports(modules)
    reach = below(arrows)
    place = rooms(modules, heights(modules, arrows, reach))
    round_trip = {(a, b) for a, b in arrows if a in reach[b]}
    plot.style()
    fig, ax = plot.plt.subplots(figsize=(13, 8))
    for a, b in sorted(arrows):
        red = (a, b) in round_trip
        ax.annotate("", place[b], place[a], arrowprops={
            "arrowstyle": "-|>", "color": plot.COLORS["vermillion"] if red else "#BBBBBB", "lw": 2.5 if red else 0.7,
            "shrinkA": 9, "shrinkB": 9, "connectionstyle": "arc3,rad=0.06"})  # fmt: skip
    for module, (x, y) in place.items():
        colour = plot.COLORS[WINGS.get(module.split(".")[0], "black") if "." in module else "black"]
        ax.text(x, y, module.split(".")[-1], ha="center", va="center", color="white", fontsize=11,
                bbox={"boxstyle": "round,pad=0.35", "fc": colour, "ec": "none"})  # fmt: skip
    for i, wing in enumerate(w for w in WINGS if any(m.startswith(f"{w}.") for m in modules)):
        ax.text(0.1 * i, 9.6, wing, color=plot.COLORS[WINGS[wing]], fontsize=14, weight="bold")
    circles = f"{len(round_trip)} of them in circles (red)" if round_trip else "no circle"
    ax.set(xlim=(-0.02, 1.04), ylim=(-0.6, 10), title=f"{len(modules)} modules, {len(arrows)} arrows, {circles}")
    ax.axis("off")
    folder = ROOT / "figures" / "house"
    folder.mkdir(exist_ok=True)
    files = plot.save(fig, folder / name)
    plot.plt.close(fig)
    return files


if __name__ == "__main__":
    print(*draw(*(sys.argv[1:] or ["now"])), sep="\n")
