"""The house style, and the few figures that several papers share.

Colour-blind safe, readable at slide size, and the same bytes on every run: a figure
that has not changed makes no difference in git.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    values = np.asarray(getattr(values, "values", values), dtype=float)
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


def _scale(values, center, vmin, vmax):
    """The colour map and its limits: symmetric about zero as soon as a value is negative."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    diverges, top = center == 0 or low < 0, high if vmax is None else vmax
    reach = max(abs(low if vmin is None else vmin), abs(top)) or 1.0
    limits = (-reach, reach) if diverges else (vmin or 0.0, top or 1.0)
    return plt.get_cmap(DIVERGING if diverges else SEQUENTIAL).with_extremes(bad="#D9D9D9"), limits


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
    # 128 colours are enough for any of our figures, and keep a notebook with six of them small
    with Image.open(png) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(png, optimize=True)
    fig.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg, *_table(stem, data)]


def animation(fig: plt.Figure, draw: Callable[[object], object], frames: Iterable, stem: str | Path,
              data: Mapping | pd.DataFrame | None = None, *, seconds: float = 5.0, hold: float = 1.5,
              dpi: int = 80) -> list[Path]:  # fmt: skip
    """Write a figure that moves as `stem`.png and `stem`.gif and, with data, `stem`.csv; return the paths.

    draw(frame) changes the figure, once for each of `frames`. They take `seconds` together; then the last one
    stays for `hold` seconds more. The layout is that of the first frame, so that nothing jumps.

    The png, for a page, is an animated one: a browser plays it, and whatever cannot (paper, LaTeX) shows the last
    frame. The gif, larger, is for slides. Neither holds a date or a version: the same frames give the same bytes.

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
    png, gif = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.gif")
    png.write_bytes(moving.getvalue())
    pictures[0].save(gif, append_images=pictures[1:], optimize=False, **film)
    return [png, gif, *_table(stem, data)]


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
    colors[colors.min(1) > 248] = 255  # the paper stays white
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
