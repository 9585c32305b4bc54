"""HeadScores: one number per head, labelled, that can rank, compare, draw and save itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from heads.names import known, whole, wholes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Head = tuple[int, int]


@dataclass(frozen=True)
class Overlap:
    """How many heads two top-k sets share, beside what chance gives.

    `expected` is the hypergeometric mean k * k / N. Important heads cluster in a few layers, which
    raises the overlap of unrelated tasks: `null` is the mean over shuffles of heads within their layers,
    `high` their 95th percentile, and `p` the share of shuffles that reach the overlap found.
    """

    k: int
    shared: int
    expected: float
    null: float
    p: float
    high: float

    @property
    def share(self) -> float:
        """Shared heads as a share of k."""
        return self.shared / self.k


class HeadScores:
    """A `[layer, head]` table of scores with a name.

    Args:
        values: `[layer, head]`, finite numbers.
        name: what the numbers are, with their unit; used as the label of figures.
        model: whose heads they are, a loaded model or its identity: kept as {"name", "sha256"}. None: not known, not checked.

    Raises:
        ValueError: if the table is not two-dimensional or holds NaN.
    """

    def __init__(self, values: ArrayLike, name: str = "score", model: Any = None):
        self.values, self.name, self.model = _array(values), name, identity(model)
        if self.values.ndim != 2 or not self.values.size:
            raise ValueError(f"head scores are a [layer, head] table, got shape {self.values.shape}")
        if not np.isfinite(self.values).all():
            raise ValueError(f"{np.size(self.values) - np.isfinite(self.values).sum()} head scores are not finite")

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.values.shape

    def __len__(self) -> int:
        return self.values.size

    def __iter__(self):
        raise TypeError("scores are a table, not a list of heads: choose some, with .top(k) or .above(threshold)")

    def __getitem__(self, head: Head) -> float:
        return float(self.values[head])

    def __repr__(self) -> str:
        best = ", ".join(f"({layer}, {head}) {self[layer, head]:.2f}" for layer, head in self.rank()[:3])
        return f"HeadScores({self.name!r}, {self.shape[0]} layers x {self.shape[1]} heads; top {best})"

    def rank(self) -> list[Head]:
        """All heads, best first; ties in order of layer and head."""
        order = np.argsort(-self.values, axis=None, kind="stable")
        return [(int(i) // self.shape[1], int(i) % self.shape[1]) for i in order]

    def top(self, k: int | float) -> list[Head]:
        """The k best heads; a float below 1 is a share of all heads, rounded up.

        Raises:
            ValueError: if k is negative or above the number of heads.
        """
        if isinstance(k, Real) and 0 < k < 1:
            k = int(np.ceil(round(k * len(self), 6)))
        if not 0 <= k <= len(self) or k != int(k):
            raise ValueError(f"top({k}): expected a count from 0 to {len(self)}, or a share between 0 and 1")
        return self.rank()[: int(k)]

    def above(self, threshold: float) -> list[Head]:
        """Heads with a score above the threshold, best first."""
        return [head for head in self.rank() if self[head] > threshold]

    def _same_heads(self, other: HeadScores) -> None:
        if self.shape != other.shape:
            raise ValueError(f"cannot compare {self.shape} heads with {other.shape}: scores of one model only")
        if _differ(self.model, other.model):
            raise ValueError(f"cannot compare heads of {_said(self.model)} with those of {_said(other.model)}: scores of one "
                             "model only; HeadScores(scores.values, scores.name) forgets where they come from")  # fmt: skip

    def belongs_to(self, model, derivative: bool = False) -> None:
        """Refuse to use these heads in another model than they were found in; scores that do not say where are not checked.

        Args:
            derivative: allow a model with other weights, such as one fine-tuned from it, if it has as many heads.

        Raises:
            ValueError: naming both models.
        """
        here, shape = identity(model), (model.anatomy.n_layers, model.anatomy.n_heads)
        if self.shape != shape:
            raise ValueError(f"{self.name!r} is of a model with {self.shape} (layers, heads), but {_said(here)} has {shape}")
        if not derivative and _differ(self.model, here):
            raise ValueError(f"{self.name!r} was found in {_said(self.model)}, not in {_said(here)}: compute it for this model, or "
                             "say that one is a derivative of the other (derivative=True)")  # fmt: skip

    def overlap(self, other: HeadScores, k: int | float, n_shuffles: int = 1000, seed: int = 0) -> Overlap:
        """Overlap of the two top-k sets, with the chance expectation and a within-layer shuffle null."""
        self._same_heads(other)
        ours, theirs = set(self.top(k)), set(other.top(k))
        k, rng = len(ours), np.random.default_rng(seed)
        if not k:
            raise ValueError("the overlap of two empty sets means nothing: k must be at least 1")
        mine, other = np.zeros((2, *self.shape), dtype=bool)
        mine[tuple(zip(*ours))] = other[tuple(zip(*theirs))] = True
        null = np.array([(mine & rng.permuted(other, axis=1)).sum() for _ in range(whole("n_shuffles", n_shuffles, 1))])
        shared = len(ours & theirs)
        high, p = np.quantile(null, 0.95), (null >= shared).mean()
        return Overlap(k, shared, k * k / len(self), float(null.mean()), float(p), float(high))

    def correlate(self, other: HeadScores, method: str = "pearson") -> float:
        """Correlation over heads ("pearson" or "spearman"). A constant table has none: ValueError."""
        from scipy import stats

        self._same_heads(other)
        known("method", method, ("pearson", "spearman"))
        if np.ptp(self.values) == 0 or np.ptp(other.values) == 0:
            raise ValueError("a table with one value for all heads has no correlation")
        return float(getattr(stats, f"{method}r")(self.values.ravel(), other.values.ravel())[0])

    def heatmap(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the table, layer by head; keywords go to `heads.plot.heatmap`."""
        from heads import plot

        return plot.heatmap(self.values, ax=ax, **{"label": self.name, **kwargs})

    def to_frame(self) -> DataFrame:
        """One row per head: layer, head, and the score in a column with the table's name."""
        import pandas as pd

        layer, head = np.indices(self.shape).reshape(2, -1)
        return pd.DataFrame({"layer": layer, "head": head, self.name: self.values.ravel()})

    def to_dict(self) -> dict:
        """What JSON can hold; `from_dict` reads it."""
        found = {"layers": self.shape[0], "heads": self.shape[1], "values": self.values.tolist()}
        return found | ({"model": self.model} if self.model else {})

    @classmethod
    def from_dict(cls, data: dict, name: str = "score") -> HeadScores:
        """What `to_dict` wrote. ValueError where its shape is not that of its values."""
        scores = cls(data["values"], name, data.get("model"))
        if scores.shape != (data["layers"], data["heads"]):
            raise ValueError(f"the record says {data['layers']} x {data['heads']} heads, its values are {scores.shape}")
        return scores

    def save(self, path: str | Path) -> Path:
        """Write name and values as JSON."""
        path = Path(path)
        path.write_text(json.dumps({"name": self.name, **self.to_dict()}) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """What `save` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls.from_dict(data, data["name"])


def random_heads(like: Iterable[Head], shape: tuple[int, int], match: str = "layer", n_sets: int = 5,
                 exclude: Iterable[Head] = (), seed: int = 0) -> list[list[Head]]:  # fmt: skip
    """Control sets: as many random heads as `like`, none of them in `like` or `exclude`.

    Args:
        like: heads to be matched.
        shape: (layers, heads) of the model.
        match: "layer": as many heads in every layer as `like` has there. "near": the same, but where a layer has
            too few left, the nearest layers lend some. "none": anywhere.
        exclude: heads that a control must not hold, for example `scores.top(0.2)`.

    Returns:
        `n_sets` sorted lists of (layer, head).

    Raises:
        ValueError: if too few heads are left, in a layer or in all. TypeError: a layer or head that is no whole number.
    """
    known("match", match, ("layer", "near", "none"))
    like, exclude = ([wholes("a layer or head", (layer, head)) for layer, head in some] for some in (like, exclude))
    if outside := [pair for pair in like if not (0 <= pair[0] < shape[0] and 0 <= pair[1] < shape[1])]:
        raise ValueError(f"head {outside[0]} does not exist in {shape[0]} layers of {shape[1]} heads: it has no controls")
    barred = {*like, *exclude}
    free = [(layer, head) for layer in range(shape[0]) for head in range(shape[1]) if (layer, head) not in barred]
    if len(free) < len(like):
        raise ValueError(f"{len(like)} random heads asked for, but only {len(free)} heads are not excluded")
    wanted, available = (Counter(layer for layer, _ in some) for some in (like, free))
    if match == "layer" and (short := [layer for layer in wanted if wanted[layer] > available[layer]]):
        raise ValueError(
            f"layer {short[0]} has {available[short[0]]} heads left for a control of {wanted[short[0]]}: "
            "exclude fewer heads, or use match='near' to borrow from the nearest layers"
        )
    rng = np.random.default_rng(seed)
    return [_draw(like, list(free), match, rng) for _ in range(whole("n_sets", n_sets, 1))]


def _draw(like: list[Head], left: list[Head], match: str, rng) -> list[Head]:
    """One control set; `left` is used up."""
    drawn = []
    # rich layers first, so that a poor one borrows only after its neighbours took what is theirs
    free = Counter(layer for layer, _ in left)
    for layer, _ in sorted(like, key=lambda pair: -free[pair[0]]):
        distance = np.array([0 if match == "none" else abs(other - layer) for other, _ in left])
        drawn.append(left.pop(rng.choice(np.flatnonzero(distance == distance.min()))))
    return sorted(drawn)


def identity(model: Any) -> dict | None:
    """{"name", "sha256"} of a loaded model's weights, or of what says it already; None where nothing does."""
    record = model if isinstance(model, dict) else getattr(model, "record", None)
    return {key: record.get(key) for key in ("name", "sha256")} if record else None


def _differ(one: dict | None, other: dict | None) -> bool:
    """Whether two models are known to differ: by their weights, or by name where one has no digest."""
    key = "sha256" if one and other and one["sha256"] and other["sha256"] else "name"
    return bool(one and other) and one[key] != other[key]


def _said(model: dict | None) -> str:
    return f"{model['name']} ({(model['sha256'] or 'no digest')[:12]})" if model else "this model"


def _array(x) -> np.ndarray | None:
    return None if x is None else np.asarray(x.detach().cpu().double() if hasattr(x, "detach") else x, float)


class Effects(HeadScores):
    """Head scores that remember their prompts. The score is the mean change of the metric.

    Args:
        samples: `[prompt, layer, head]`, metric of the edited run minus metric of the base run.
        base, source: `[prompt]`, the metric of the base run and, where there is one, of the run that the
            replacements come from.
        mlps: `[prompt, layer]`, the same for MLPs, where they were senders.

    Raises:
        ValueError: if shapes disagree.
    """

    def __init__(self, samples: ArrayLike, base: ArrayLike, source: ArrayLike | None = None,
                 name: str = "change of logit difference", mlps: ArrayLike | None = None,
                 model: Any = None):  # fmt: skip
        self.samples, self.base, self.source, self.mlp_samples = map(_array, (samples, base, source, mlps))
        if self.samples.ndim != 3 or self.base.shape != self.samples.shape[:1]:
            found = f"{self.samples.shape} and {self.base.shape}"
            raise ValueError(f"effects are [prompt, layer, head] with a base for each prompt, got {found}")
        super().__init__(self.samples.mean(0), name, model)

    @property
    def mlps(self) -> np.ndarray:
        """Mean change for each layer's MLP, `[layer]`. ValueError if MLPs were not senders."""
        if self.mlp_samples is None:
            raise ValueError("MLPs were not among the senders: ask for mlp_senders=True")
        return self.mlp_samples.mean(0)

    def gap(self, floor: float = 1.0) -> float:
        """Mean metric of the source run minus that of the base run.

        Raises:
            ValueError: if it is smaller than `floor`, because dividing by it would manufacture effects.
        """
        if self.source is None:
            raise ValueError("nothing to normalise by: this sweep has no source run")
        gap = float(self.source.mean() - self.base.mean())
        if abs(gap) < floor:
            raise ValueError(
                f"base and source differ by {gap:.2g} in {self.name.removeprefix('change of ')}, below the floor of "
                f"{floor:g}: a share of nearly nothing means nothing. Use the raw effects, other prompts, or a lower floor"
            )
        return gap

    def normalised(self, floor: float = 1.0) -> HeadScores:
        """Effect as a share of the gap between source and base: 1 means as if all were patched.

        The ratio of batch means, never a mean of ratios (primitive of Wang et al. 2022 and Merullo et al. 2024).
        """
        return HeadScores(self.values / self.gap(floor), f"{self.name}, share of the gap", self.model)

    def relative(self) -> HeadScores:
        """Effect as a share of the base run's mean metric (Zhang et al. 2024)."""
        base = float(self.base.mean())
        if abs(base) < 1e-6:
            raise ValueError("the base run's metric is zero on average: a relative effect is undefined")
        return HeadScores(self.values / base, f"{self.name}, share of the base", self.model)

    def magnitude(self) -> HeadScores:
        """The effect without its sign: negative heads belong to a circuit, too."""
        return HeadScores(np.abs(self.values), f"|{self.name}|", self.model)

    def interval(self, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval of the mean over prompts, `([layer, head], [layer, head])`."""
        if not 0 < level < 1:
            raise ValueError(f"level={level}: expected a share between 0 and 1")
        rng, prompts, n = np.random.default_rng(seed), len(self.samples), whole("n", n, 1)
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=n) / prompts
        means = np.tensordot(weights, self.samples, axes=1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def halves(self, seed: int = 0) -> tuple[HeadScores, HeadScores]:
        """Scores from two disjoint random halves of the prompts: the ceiling of any comparison."""
        order = np.random.default_rng(seed).permutation(len(self.samples))
        middle = len(order) // 2
        if not middle:
            raise ValueError("one prompt has no halves")
        parts = order[:middle], order[middle:]
        return tuple(HeadScores(self.samples[part].mean(0), self.name, self.model) for part in parts)
