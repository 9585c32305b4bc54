"""What is read from the logits at the last position (logit difference, accuracy, probability, KL), and from a ranking.

A metric names the columns of the vocabulary that it needs, so that a sweep computes only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from heads.names import known, wholes
from heads.tasks.base import Task


@dataclass(frozen=True)
class Metric:
    """A number per prompt, from logits at END.

    Args:
        name: for labels, with its unit.
        read: (logits `[..., prompt, column]` float32, answers `[prompt]`, the base run's logits or None) -> `[..., prompt]`.
        gradient: whether it has a useful gradient at the base run (accuracies and KL have none there).
        whole: whether it needs the whole vocabulary; else the answer's column comes first, then the others.
        options: token ids of the other columns; none: the task's foils.
    """

    name: str
    read: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    gradient: bool = True
    whole: bool = False
    options: tuple[int, ...] = ()

    def columns(self, task: Task) -> torch.Tensor | None:
        """Token ids that the metric reads, `[prompt, column]`, the answer first; None for all."""
        others = torch.tensor(self.options).expand(len(task), -1) if self.options else task.foils
        return None if self.whole else torch.cat([task.answers[:, None], others], 1)

    def pick(self, logits: torch.Tensor, task: Task) -> torch.Tensor:
        """`[prompt, vocabulary]` logits -> the columns that the metric reads, `[prompt, column]`."""
        columns = self.columns(task)
        return logits if columns is None else logits.gather(-1, columns.to(logits.device))

    def __call__(self, logits: torch.Tensor, task: Task, base: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., prompt, column]` logits -> `[..., prompt]`. `base` are the base run's logits, for KL."""
        return self.read(logits.float(), task.answers.to(logits.device), base)


def _lead(logits, answers, base):
    """Answer's logit minus the mean of the other columns."""
    return logits[..., 0] - logits[..., 1:].mean(-1)


def _of(values, answers):
    """The answers' entries of whole-vocabulary values."""
    return values.gather(-1, answers.expand(values.shape[:-1])[..., None]).squeeze(-1)


def _divergence(logits, answers, base):
    """KL(base || run)."""
    p = base.float().log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)


# Answer's logit minus the mean foil's (Wang et al. 2022 for one foil).
logit_difference = Metric("logit difference", _lead)
# The answer's logit alone: swamped by a common offset in some models; for comparison.
answer_logit = Metric("answer logit", lambda logits, answers, base: logits[..., 0])
# 1 where the answer beats every foil.
option_accuracy = Metric(
    "accuracy among options", lambda logits, answers, base: (logits[..., :1] > logits[..., 1:]).all(-1).float(), False
)
# 1 where the answer is the arg max over the vocabulary.
accuracy = Metric(
    "accuracy", lambda logits, answers, base: (logits.argmax(-1) == answers).float(), gradient=False, whole=True
)
probability = Metric("probability", lambda logits, answers, base: _of(logits.softmax(-1), answers), whole=True)
log_probability = Metric(
    "log-probability (nats)", lambda logits, answers, base: _of(logits.log_softmax(-1), answers), whole=True
)
kl = Metric("KL from the base run (nats)", _divergence, gradient=False, whole=True)
KNOWN = {m.name.partition(" (")[0]: m for m in
         (logit_difference, answer_logit, option_accuracy, accuracy, probability, log_probability, kl)}  # fmt: skip


def contrast(options: Iterable[int], name: str = "answer minus mean of options") -> Metric:
    """Answer's logit minus the mean over `options` (token ids, which may hold the answer): removes a common offset.

    Zhang et al.'s (2024) effect needs it, over digits.

    Raises:
        ValueError: for fewer than two options.
    """
    options = wholes("a token id", options)
    if len(options) < 2:
        raise ValueError(f"a contrast needs at least two options, got {len(options)}")
    return Metric(name, _lead, options=options)


def named(metric: str | Metric) -> Metric:
    """A metric by name; a metric itself passes. LookupError names the nearest."""
    return metric if isinstance(metric, Metric) else KNOWN[known("metric", metric, KNOWN)]


@torch.no_grad()
def evaluate(model, task: Task, metric: str | Metric = logit_difference, batch: int = 64) -> torch.Tensor:
    """A metric of a model, edited or not, on every prompt of a task: `[prompt]`, float32 on the CPU.

    Raises:
        ValueError: for KL, which compares with a base run: use a sweep's `metric=`; for an encoder.
    """
    read = named(metric)
    if model.anatomy.encoder:
        raise ValueError(f"{model.anatomy.family} is an encoder: its END predicts nothing. Use a decoder")
    if read is kl:
        raise ValueError("KL compares two runs: give it as the metric of a sweep, or compare two models' logits")
    values = []
    for part in task.batches(batch):
        with model.trace(input_ids=part.ids.to(model.device), logits_to_keep=1, use_cache=False):
            logits = model.logits.save()
        values.append(read(read.pick(logits[:, -1], part), part).cpu())
    return torch.cat(values)


@dataclass(frozen=True)
class _Ranked:
    """Rankings of all queries at once, `[query, item]`: scores (what is not ranked has none, -inf), relevant, kept."""

    scores: np.ndarray
    relevant: np.ndarray
    kept: np.ndarray

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
    "hit@1": lambda found: (found.ahead() == 0).astype(float),
    "MRR": lambda found: 1 / (1 + found.ahead()),
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
