"""The house style: the same bytes on every run, maps that cannot mislead, bands that say what they are."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from heads import plot

DRAW = """
import sys
import numpy as np
from heads import plot
plot.style()
values = np.random.default_rng(0).normal(size=(6, 4))
fig, (left, right) = plot.plt.subplots(1, 2)
plot.heatmap(values, left, highlight=[(1, 2)], title="map")
plot.band(right, [1, 2, 3], values[:5, :3], "sets")
right.legend()
plot.save(fig, sys.argv[1], {"x": values.ravel()})
bar = right.axvline(1)
plot.animation(fig, lambda x: bar.set_xdata([x, x]), [1, 2, 3], sys.argv[1] + "-moving", {"x": [1, 2, 3]})
"""


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        plot.style()
        yield
    plt.close("all")


def drawn(ax):
    image = ax.get_images()[0]
    return image, image.get_clim(), image.get_cmap().name


def test_two_processes_write_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / run / "figure")], check=True)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    moving = ["figure-moving.csv", "figure-moving.film.png", "figure-moving.gif", "figure-moving.png"]
    assert names == [*moving, "figure.csv", "figure.png", "figure.svg"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_files_hold_no_date_and_no_version(tmp_path):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    for path in plot.save(fig, tmp_path / "f"):
        content = path.read_bytes()
        assert b"Software" not in content and b"<dc:date>" not in content and b"matplotlib.org" not in content


def test_the_data_behind_a_figure(tmp_path):
    fig, _ = plt.subplots()
    path = plot.save(fig, tmp_path / "1.5-dotted", {"k": [1, 2], "value": [1 / 3, 2.0]})[2]
    assert path.name == "1.5-dotted.csv"
    assert path.read_text() == "k,value\n1,0.3333\n2,2\n"
    named = pd.DataFrame({"r": [1.0]}, index=pd.Index(["stem"], name="form"))
    assert plot.save(fig, tmp_path / "named", named)[2].read_text() == "form,r\nstem,1\n"


def test_layer_zero_is_the_top_row():
    ax = plot.heatmap([[1, 0], [0, 0], [0, 0]])
    image, _, _ = drawn(ax)
    assert image.get_array()[0, 0] == 1
    bottom, top = ax.get_ylim()
    assert bottom > top and (ax.get_ylabel(), ax.get_xlabel()) == ("layer", "head")


def test_one_sign_is_sequential_from_zero():
    _, limits, name = drawn(plot.heatmap([[0.2, 0.8]]))
    assert limits == (0, 0.8) and name == plot.SEQUENTIAL
    assert drawn(plot.heatmap([[0.2, 0.8]], vmax=1))[1] == (0, 1)


@pytest.mark.parametrize("values, options, reach", [
    ([[-0.2, 0.8]], {}, 0.8), ([[-0.9, 0.8]], {}, 0.9), ([[-0.5, -0.1]], {}, 0.5), ([[0.2, 0.8]], {"center": 0}, 0.8),
    ([[-0.2, 0.8]], {"vmax": 2}, 2), ([[-0.2, 0.8]], {"vmin": -3, "vmax": 1}, 3), ([[0, 0]], {"center": 0}, 1),
])  # fmt: skip
def test_a_diverging_map_is_symmetric_about_zero(values, options, reach):
    _, limits, name = drawn(plot.heatmap(values, **options))
    assert limits == (-reach, reach) and name == plot.DIVERGING


def test_marked_heads_frame_their_cell():
    ax = plot.heatmap(np.zeros((3, 4)), highlight=[(2, 1)])
    (frame,) = ax.patches
    assert frame.get_xy() == (0.5, 1.5)
    with pytest.raises(ValueError, match=r"head \(3, 0\) is outside a map of 3 layers x 4 heads"):
        plot.heatmap(np.zeros((3, 4)), highlight=[(3, 0)])


def test_a_missing_value_is_not_a_zero():
    image, limits, _ = drawn(plot.heatmap([[np.nan, 0.5]]))
    assert image.get_array().mask[0, 0] and limits == (0, 0.5)
    grey, zero = image.cmap(np.ma.masked_invalid([np.nan, 0.0]))
    assert not np.allclose(grey, zero)


def test_what_is_no_map_is_refused():
    with pytest.raises(ValueError, match="layer, head"):
        plot.heatmap([1, 2, 3])
    with pytest.raises(ValueError, match="center is None or 0"):
        plot.heatmap([[1.0]], center=0.5)


def test_a_band_is_the_spread_of_the_sets():
    _, ax = plt.subplots()
    samples = np.array([[0.0, 10.0], [1.0, 20.0], [5.0, 30.0]])
    line = plot.band(ax, [1, 2], samples, "random")
    assert np.allclose(line.get_ydata(), [2, 20]) and line.get_label() == "random"
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(heights.min(), np.percentile(samples[:, 0], 2.5))
    assert np.isclose(heights.max(), np.percentile(samples[:, 1], 97.5))
    _, ax = plt.subplots()
    plot.band(ax, [1, 2], [[1, 2]])
    assert not ax.collections, "one set has no spread"
    with pytest.raises(ValueError, match=r"expected \[any, 2\]"):
        plot.band(ax, [1, 2], np.zeros((2, 3)))


# ---- what moves ---------------------------------------------------------------------------


def moving_bar():
    fig, ax = plt.subplots(figsize=(3, 2))
    (bar,) = ax.bar([0], [0], color="black")
    ax.set(xlim=(-1, 1), ylim=(0, 4))
    return fig, bar.set_height


def darkness(image):
    return (np.asarray(image.convert("L")) < 50).sum()


def test_an_animation_moves_rests_on_its_end_and_repeats(tmp_path):
    fig, draw = moving_bar()
    files = plot.animation(fig, draw, [1, 2, 3], tmp_path / "1.5-bar", {"height": [1, 2, 3]}, seconds=0.6, hold=2)
    assert [path.name for path in files] == ["1.5-bar.png", "1.5-bar.film.png", "1.5-bar.gif", "1.5-bar.csv"]
    still, png, gif, _ = files
    with Image.open(still) as picture:
        assert picture.format == "PNG" and getattr(picture, "n_frames", 1) == 1
        end = darkness(picture)
    with Image.open(gif) as film:
        dark, durations = [], []
        for frame in range(film.n_frames):
            film.seek(frame)
            dark.append(darkness(film))
            durations.append(film.info["duration"])
        assert dark == sorted(dark) and len(set(dark)) == 3
        assert durations == [200, 200, 2200] and film.info["loop"] == 0
    with Image.open(png) as film:
        assert film.format == "PNG" and film.n_frames == 4 and film.info["default_image"]
        assert darkness(film) == dark[-1] == end, "what cannot move shows the end"


def test_the_layout_of_an_animation_is_that_of_its_first_frame(tmp_path):
    fig, ax = plt.subplots()
    places = []

    def draw(top):
        ax.set(ylim=(0, top), ylabel="a label\non " + "several\n" * (top > 10) + "lines")
        places.append(ax.get_position().bounds)

    plot.animation(fig, draw, [1, 10_000, 100_000], tmp_path / "f", dpi=40)
    assert places[1] == places[2]


def test_a_large_or_single_frame_is_no_animation(tmp_path):
    fig, draw = moving_bar()
    for frames in ([], [1]):
        with pytest.raises(ValueError, match=f"two frames or more, got {len(frames)}"):
            plot.animation(fig, draw, frames, tmp_path / "f")
    image, rng = plt.figure().figimage(np.zeros((400, 600)), vmin=0, vmax=1), np.random.default_rng(0)
    with pytest.raises(ValueError, match="kB in 9 frames.*fewer frames or draw a smaller figure"):
        plot.animation(image.figure, lambda _: image.set_data(rng.random((400, 600))), range(9), tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_picture_keeps_its_colours(tmp_path):
    """Of a map with its bar, two colour maps and a frame: no area is off by more than a few of 255 levels."""
    fig, axes = plt.subplots(1, 2)
    values = np.random.default_rng(0).random((12, 9))
    plot.heatmap(values, axes[0], highlight=[(1, 2)])
    plot.heatmap(values - 0.5, axes[1])
    fig.canvas.draw()
    png, _ = plot.save(fig, tmp_path / "f")
    fig.savefig(tmp_path / "true.png")
    true, kept = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (tmp_path / "true.png", png))
    off = np.abs(true - kept).max(-1)
    _, where, counts = np.unique(true.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    assert off[(counts >= plot.AREA)[where.ravel()].reshape(off.shape)].max() <= 5
    assert off[(true == 255).all(-1)].max() == 0


def test_maps_share_one_scale_and_one_bar():
    fig = plot.maps({"a": np.zeros((3, 2)), "b": np.full((3, 2), -2.0)}, label="loss", highlight={"b": [(1, 1)]})
    axes = [ax for ax in fig.axes if ax.get_images()]
    assert {drawn(ax)[1] for ax in axes} == {(-2.0, 2.0)} and {drawn(ax)[2] for ax in axes} == {"RdBu_r"}
    assert len(fig.axes) == 3 and [len(ax.patches) for ax in axes] == [0, 1]
    with pytest.raises(ValueError, match="one map or more"):
        plot.maps({})


def test_bars_are_means_and_dots_are_samples():
    ax = plot.bars(plt.subplots()[1], ["x", "y"], {"ours": [[1, 3], [5]], "theirs": [4, 2.5]})
    assert [bar.get_height() for bar in ax.patches] == [2, 5, 4, 2.5]
    assert [list(line.get_ydata()) for line in ax.lines] == [[1, 3]]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["x", "y"]
    with pytest.raises(ValueError, match="series 'ours' has 1 entries, expected one for each of 2"):
        plot.bars(plt.subplots()[1], ["x", "y"], {"ours": [1]})


def test_a_histogram_counts_every_head_and_names_those_marked():
    scores = np.array([[0.0, 0.1], [0.9, np.nan]])
    ax = plot.histogram(plt.subplots()[1], scores, null=[0.2, 0.3], line=0.5, mark=[(1, 0)], bins=9)
    assert sum(bar.get_height() for bar in ax.containers[0]) == 3 and sum(b.get_height() for b in ax.containers[1]) == 2
    assert [text.get_text() for text in ax.texts] == ["L1.H0"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all heads", "null", "criterion"]


def test_ranked_lists_the_best_of_the_first_scores():
    table = plot.ranked(2, first=np.array([[0.1, 0.9], [0.5, 0.2]]), other=np.array([[1, 2], [3, 4]]))
    assert table.to_dict("list") == {"head": ["L0.H1", "L1.H0"], "first": [0.9, 0.5], "other": [2.0, 3.0]}
    with pytest.raises(ValueError, match="ranked needs scores"):
        plot.ranked(2)
