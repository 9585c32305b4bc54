"""How well scores rank items for queries: hit@1, MRR, R-precision, MAP, AUC and nDCG."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from heads.names import known


@dataclass(frozen=True)
class _Ranked:
    """Rankings of all queries at once, `[query, item]`: scores (what is not ranked has none, -inf), relevant, kept."""

    scores: np.ndarray
    relevant: np.ndarray
    kept: np.ndarray

    @cached_property
    def ahead(self) -> np.ndarray:
        """How many others stand before the first relevant item, `[query]`."""
        best = np.where(self.relevant, self.scores, -np.inf).max(1, keepdims=True)
        return ((self.scores >= best) & self.kept & ~self.relevant).sum(1)

    def precision(self) -> np.ndarray:
        """The share of relevant items among the first R, of R relevant ones, `[query]`."""
        first = self.relevant.argsort(1, kind="stable")  # what ties with a relevant item stands before it
        order = np.take_along_axis(first, np.take_along_axis(-self.scores, first, 1).argsort(1, kind="stable"), 1)
        ranked, n = np.take_along_axis(self.relevant, order, 1), self.relevant.sum(1)
        return (ranked & (np.arange(ranked.shape[1]) < n[:, None])).sum(1) / n

    def area(self) -> np.ndarray:
        """The area under the ROC curve by the sum of ranks (Mann and Whitney 1947), `[query]`; a tie counts half."""
        n, others, out = self.relevant.sum(1), (self.kept & ~self.relevant).sum(1), (~self.kept).sum(1)
        ranks = np.where(self.relevant, rankdata(self.scores, axis=1) - out[:, None], 0).sum(1)
        return (ranks - n * (n + 1) / 2) / (n * others)

    def each(self, name: str) -> np.ndarray:
        """A measure of scikit-learn, query by query."""
        import sklearn.metrics

        rows = zip(self.scores, self.relevant, self.kept)
        return np.array([getattr(sklearn.metrics, name)(right[keep][None], values[keep][None]) for values, right, keep in rows])


RANKINGS = {
    "hit@1": lambda found: (found.ahead == 0).astype(float),
    "MRR": lambda found: 1 / (1 + found.ahead),
    "R-precision": _Ranked.precision,
    "MAP": lambda found: found.each("label_ranking_average_precision_score"),
    "AUC": _Ranked.area,
    "nDCG": lambda found: found.each("ndcg_score"),
}


def ranking(scores: ArrayLike, relevant: ArrayLike, measures: Iterable[str] = ("hit@1", "MRR", "R-precision", "MAP"),
            excluded: ArrayLike | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    """How well scores rank items for queries: `{measure: [query]}`, from 0 to 1. What ties with a relevant item stands
    before it (in AUC it counts half; in nDCG both take their mean), so that a constant ranks nothing well.

    Args:
        scores: `[query, item]`, higher is better.
        relevant: `[query, item]`, true where an item answers a query.
        measures: names in `RANKINGS`: hit@1, MRR (1 / rank of the first relevant item), R-precision (the share of relevant
            items among the first R, of R relevant ones), MAP (mean average precision), AUC, nDCG.
        excluded: `[query, item]`, true for what is not ranked, such as the query itself.

    Raises:
        ValueError: shapes that differ, scores that are no numbers, a query without a relevant item (or, for AUC, with no
            other), after what is excluded. LookupError: an unknown measure.
    """
    scores, relevant = np.asarray(scores, float), np.asarray(relevant, bool)
    kept = np.ones(scores.shape, bool) if excluded is None else ~np.asarray(excluded, bool)
    if scores.ndim != 2 or not scores.shape == relevant.shape == kept.shape:
        raise ValueError(f"scores {scores.shape}, relevant {relevant.shape} and excluded {kept.shape} must all be [query, item]")
    names, relevant = [known("measure of a ranking", name, RANKINGS) for name in measures], relevant & kept
    if len(odd := np.flatnonzero((kept & ~np.isfinite(scores)).any(1))):
        raise ValueError(f"query {odd[0]} has a score that is no number")
    for what, answers in (("relevant", relevant), *([("irrelevant", kept & ~relevant)] if "AUC" in names else [])):
        if len(odd := np.flatnonzero(~answers.any(1))):
            raise ValueError(f"query {odd[0]} has no {what} item among the {kept[odd[0]].sum()} that are ranked: leave it out")
    found = _Ranked(np.where(kept, scores, -np.inf), relevant, kept)
    return {name: RANKINGS[name](found) for name in names}
