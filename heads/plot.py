"""The house style, and the few figures that several papers share.

Colour-blind safe, readable at slide size, and the same bytes on every run: a figure
that has not changed makes no difference in git.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image

# Okabe and Ito (2008), without yellow, which vanishes on white; black comes last.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "black": "#000000",
}
GREY = "#8A8A8A"
FRAME = COLORS["green"]  # seen on every colour of both maps
SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"  # both light at zero: most heads do nothing
AREA = 12  # pixels of one colour that are more than the edge of a letter
TOLERANCE = 2  # levels of 255 by which a colour that covers an area may be off
LARGEST = 120_000  # bytes of a picture that moves: it goes into a notebook, which may hold 300 kB


def style() -> None:
    """Apply the house style to matplotlib; `Study` calls it once."""
    plt.style.use("heads.house")  # the style sheet house.mplstyle, beside this file
    plt.rcParams.update({"axes.prop_cycle": cycler(color=COLORS.values()), "image.cmap": SEQUENTIAL})


def heatmap(values: ArrayLike, ax: plt.Axes | None = None, *, label: str = "score", center: int | None = None,
            vmin: float | None = None, vmax: float | None = None, highlight: Iterable[tuple[int, int]] = (),
            title: str | None = None) -> plt.Axes:  # fmt: skip
    """Draw a layer x head map and return its axes.

    values: array or HeadScores [layer, head]; NaN is drawn grey. Layer 0 is the top row, as in a printed
    matrix. The map is sequential for values of one sign; it diverges symmetrically about
    zero where a value is negative or `center=0`. highlight: (layer, head) pairs to frame.
    label names the quantity (with its unit) on the colour bar.

    Raises ValueError for a shape that is not [layer, head], for `center` other than None or 0,
    and for a head outside the map.
    """
    values = _values(values)
    if values.ndim != 2:
        raise ValueError(f"a heat map needs values [layer, head], not an array of shape {values.shape}")
    if center not in (None, 0):
        raise ValueError(f"center is None or 0, not {center!r}: maps are symmetric about zero or not at all")
    layers, heads = values.shape
    if ax is None:
        height = min(max(2.2, 0.24 * layers + 1.0), 7.5)
        _, ax = plt.subplots(figsize=(min(max(4.0, 0.3 * heads + 2.2), 11.0), height))
    cmap, (low, high) = _scale(values, center, vmin, vmax)
    image = ax.imshow(np.ma.masked_invalid(values), cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    for layer, head in highlight:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(f"head ({layer}, {head}) is outside a map of {layers} layers x {heads} heads")
        ax.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, lw=2.2, ec=FRAME))
    ax.set(xlabel="head", ylabel="layer", title=title or "")
    ax.grid(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def _values(scores):
    """A HeadScores or what numpy takes, as floats."""
    return np.asarray(getattr(scores, "values", scores), dtype=float)


def _scale(values, center, vmin, vmax):
    """The colour map and its limits: symmetric about zero as soon as a value is negative."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    diverges, top = center == 0 or low < 0, high if vmax is None else vmax
    reach = max(abs(low if vmin is None else vmin), abs(top)) or 1.0
    limits = (-reach, reach) if diverges else (vmin or 0.0, top or 1.0)
    return plt.get_cmap(DIVERGING if diverges else SEQUENTIAL).with_extremes(bad="#D9D9D9"), limits


def head_label(head: tuple[int, int]) -> str:
    """A head as the field writes it: (23, 3) is L23.H3."""
    return f"L{head[0]}.H{head[1]}"


def maps(tables: Mapping[str, ArrayLike], *, label: str = "score", highlight: Iterable[tuple[int, int]] | Mapping = (),
         center: int | None = None, vmin: float | None = None, vmax: float | None = None,
         figsize: tuple[float, float] | None = None) -> plt.Figure:  # fmt: skip
    """Draw layer x head maps in a row, on one scale with one colour bar: `{title: values or HeadScores}`.

    highlight: the heads to frame in every map, or `{title: heads}`. The rest is as for `heatmap`.
    Raises ValueError without a map, and what `heatmap` raises.
    """
    arrays = [_values(table) for table in tables.values()]
    if not arrays:
        raise ValueError("maps needs one map or more, as {title: values}")
    every = np.concatenate([array.ravel() for array in arrays])
    _, (low, high) = _scale(every, center, vmin, vmax)
    size = figsize or (2.9 * len(arrays) + 1.0, min(max(2.4, 0.17 * len(arrays[0]) + 1.0), 6.5))
    fig, axes = plt.subplots(1, len(arrays), figsize=size, sharey=True, squeeze=False)
    for ax, (title, array) in zip(axes[0], zip(tables, arrays)):
        framed = highlight.get(title, ()) if isinstance(highlight, Mapping) else highlight
        heatmap(array, ax, label=label, center=0 if low < 0 else None, vmin=low, vmax=high, highlight=framed, title=title)
        if ax is not axes[0, -1]:
            ax.images[0].colorbar.remove()
        if ax is not axes[0, 0]:
            ax.set_ylabel("")
    return fig


def bars(ax: plt.Axes, names: Sequence[str], series: Mapping[str, Sequence[ArrayLike]], *,
         colors: Sequence[str] | None = None) -> plt.Axes:  # fmt: skip
    """Draw grouped bars: for each name a bar of every series, at the mean of its samples, which are the dots on it.

    series: `{label: [samples of each name]}`; a number is one sample and has no dot.
    Raises ValueError where a series has not one entry for each name.
    """
    colors, width = colors or list(COLORS.values()), 0.8 / max(1, len(series))
    for number, (label, values) in enumerate(series.items()):
        if len(values) != len(names):
            raise ValueError(f"series {label!r} has {len(values)} entries, expected one for each of {len(names)} names")
        samples = [np.ravel(value) for value in values]
        at = np.arange(len(names)) + width * (number - (len(series) - 1) / 2)
        ax.bar(at, [np.mean(each) for each in samples], 0.92 * width, label=label, color=colors[number % len(colors)])
        for x, each in zip(at, samples):
            if len(each) > 1:
                ax.plot(np.full(len(each), x), each, "o", color="#333333", ms=3.5, alpha=0.7)
    ax.set_xticks(range(len(names)), names)
    return ax


def histogram(ax: plt.Axes, scores: ArrayLike, *, null: ArrayLike = (), line: float | None = None,
              mark: Iterable[tuple[int, int]] = (), bins: int = 50, names: Sequence[str] = ("all heads", "null", "criterion"),
              ) -> plt.Axes:  # fmt: skip
    """Draw how the scores `[layer, head]` of all heads are spread, on a logarithmic count, with the heads in `mark` named.

    null: what chance gave, beside them. line: a threshold. names: of the heads, the null and the line, for the legend.
    """
    values, null = _values(scores), np.ravel(null)
    finite = values[np.isfinite(values)]
    edges = np.histogram_bin_edges(np.concatenate([finite, null]), bins)
    ax.hist(finite, edges, color=GREY, label=names[0])
    if len(null):
        ax.hist(null, edges, color=COLORS["orange"], label=names[1])
    if line is not None:
        ax.axvline(line, color="#4D4D4D", ls=":", lw=1.5, label=names[2])
    for number, head in enumerate(sorted(mark, key=lambda head: values[head])):  # neighbours at different heights
        height = 4.0 * 2 ** (number % 4)
        ax.annotate(head_label(head), (values[head], 1), (values[head], height), ha="center", arrowprops={"arrowstyle": "->"})
    ax.set(yscale="log", ylabel="heads (log scale)")
    ax.legend()
    return ax


def ranked(k: int = 10, **scores: ArrayLike) -> pd.DataFrame:
    """The table of the best `k` heads of the first scores, with what the others give the same heads: `ranked(5, ov=a, qk=b)`.

    Raises ValueError without scores.
    """
    if not scores:
        raise ValueError("ranked needs scores by name, such as ranked(10, ablation=scores)")
    tables = {name: _values(table) for name, table in scores.items()}
    first = next(iter(tables.values()))
    order = [np.unravel_index(i, first.shape) for i in np.argsort(-first, axis=None, kind="stable")[:k]]
    columns = {name: [float(f"{table[head]:.3g}") for head in order] for name, table in tables.items()}
    return pd.DataFrame({"head": [head_label(head) for head in order], **columns}, index=range(1, len(order) + 1))


def band(ax: plt.Axes, x: ArrayLike, samples: ArrayLike, label: str | None = None,
         color: str | None = None) -> Line2D:  # fmt: skip
    """Draw the mean of several sets as a line, with the interval that holds 95 % of the sets.

    samples: array [set, x]. The band is the spread of the sets (2.5 to 97.5 percentile), not the
    error of their mean: a line outside it differs from nearly every set. One set has no band.
    Raises ValueError where samples and x do not fit. Returns the line.
    """
    x, samples = np.asarray(x), np.atleast_2d(np.asarray(samples, dtype=float))
    if samples.shape[1:] != x.shape:
        raise ValueError(f"samples are [set, x]: expected [any, {x.size}], got {list(samples.shape)}")
    (line,) = ax.plot(x, np.nanmean(samples, axis=0), label=label, color=color, marker="o")
    if len(samples) > 1:
        low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    return line


def save(fig: plt.Figure, stem: str | Path, data: Mapping | pd.DataFrame | None = None) -> list[Path]:
    """Write `stem`.png, `stem`.svg and, with data, `stem`.csv; return the paths.

    data: a DataFrame or a mapping of columns, the numbers behind the picture (4 digits: a fifth differs between machines).
    The files hold no date and no software version.
    """
    stem = Path(stem)
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    fig.savefig(png, metadata={"Software": None})
    with Image.open(png) as image:
        _palette(image).save(png, optimize=True)
    fig.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg, *_table(stem, data)]


def _palette(image: Image.Image) -> Image.Image:
    """The picture in 256 colours, which keep a notebook with six of them small.

    The next one taken is always the colour that is farthest from all taken before, first among those that cover `AREA`
    pixels, then among the edges of letters. A palette by area would be spent on paper and ink, and leave a map few steps.
    """
    rgb = np.asarray(image.convert("RGB"))
    colors, where, counts = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    colors, chosen, nearest = colors.astype(int), [counts.argmax()], np.zeros(len(colors), np.uint8)
    off = np.abs(colors - colors[chosen[0]]).max(1)  # levels to the nearest chosen colour
    for part in (np.flatnonzero(counts >= AREA), np.arange(len(colors))):
        while len(part) and len(chosen) < 256 and off[part].max() > TOLERANCE:
            chosen.append(part[off[part].argmax()])
            new = np.abs(colors - colors[chosen[-1]]).max(1)
            nearest[new < off], off = len(chosen) - 1, np.minimum(off, new)
    picture = Image.fromarray(nearest[where.ravel()].reshape(rgb.shape[:2]))
    picture.putpalette(colors[chosen].ravel().tolist())
    return picture


def animation(fig: plt.Figure, draw: Callable[[object], object], frames: Iterable, stem: str | Path,
              data: Mapping | pd.DataFrame | None = None, *, seconds: float = 5.0, hold: float = 1.5,
              dpi: int = 80) -> list[Path]:  # fmt: skip
    """Write a figure that moves as `stem`.png, `stem`.film.png, `stem`.gif and, with data, `stem`.csv; return the paths.

    draw(frame) changes the figure, once for each of `frames`. They take `seconds` together; then the last one
    stays for `hold` seconds more. The layout is that of the first frame, so that nothing jumps.

    The png is the last frame, for paper and for a first look. The film, an animated png, is for a page: a browser plays
    it. The gif, larger, is for slides. None holds a date or a version: the same frames give the same bytes.

    Raises ValueError for fewer than two frames and for a png that is too large for a notebook.
    """
    frames = list(frames)
    if len(frames) < 2:
        raise ValueError(f"an animation needs two frames or more, got {len(frames)}: use save() for a figure that stands")
    pictures = _pictures(fig, draw, frames, dpi)
    times = [round(1000 * seconds / len(pictures))] * len(pictures)
    times[-1] += round(1000 * hold)
    stem, moving = Path(stem), BytesIO()
    last, film = pictures[-1], {"save_all": True, "duration": times, "loop": 0}
    last.save(moving, "PNG", append_images=pictures, default_image=True, optimize=True, **film)
    if moving.tell() > LARGEST:
        raise ValueError(
            f"{stem.name}: {moving.tell() // 1000} kB in {len(pictures)} frames, at most {LARGEST // 1000} kB: "
            "take fewer frames or draw a smaller figure"
        )
    still, moves, gif = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "film.png", "gif"))
    last.save(still, "PNG", optimize=True)
    moves.write_bytes(moving.getvalue())
    pictures[0].save(gif, append_images=pictures[1:], optimize=False, **film)
    return [still, moves, gif, *_table(stem, data)]


def _pictures(fig, draw, frames, dpi):
    """One palette picture for each frame, all with the same 64 colours."""
    fig.set_dpi(dpi)
    drawn = []
    for frame in frames:
        draw(frame)
        if not drawn:
            fig.canvas.draw()  # equal aspects take a second pass to settle
            fig.canvas.draw()
            fig.set_layout_engine("none")
        fig.canvas.draw()
        drawn.append(Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy()))
    # the colours of six frames spread over the whole, so that the first ones do not decide
    chosen = [drawn[i] for i in np.linspace(0, len(drawn) - 1, 6).astype(int)]
    palette = Image.fromarray(np.vstack([np.asarray(picture) for picture in chosen])).quantize(64, dither=Image.Dither.NONE)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    colors[colors.min(1) > 244] = 255  # the paper stays white
    palette.putpalette(colors.ravel().tolist())
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in drawn]


def _table(stem, data):
    """`stem`.csv in a list, or an empty list where there are no data."""
    if data is None:
        return []
    frame, table = pd.DataFrame(data), stem.with_name(f"{stem.name}.csv")
    named = not isinstance(frame.index, pd.RangeIndex)
    frame.to_csv(table, index=named, float_format=lambda x: f"{x:.{6 if x == round(x, 0) else 4}g}", lineterminator="\n")
    return [table]
