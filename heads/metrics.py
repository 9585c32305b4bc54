"""What is read from the logits at the last position: logit difference, accuracy, probability, KL.

A metric names the columns of the vocabulary that it needs, so that a sweep computes only those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heads.names import known
from heads.tasks.base import Task


@dataclass(frozen=True)
class Metric:
    """A number per prompt, from logits at END.

    Args:
        name: for labels, with its unit.
        gradient: whether it has a useful gradient at the base run (accuracies and KL have none there).
        whole: whether it needs the whole vocabulary.
    """

    name: str
    gradient: bool = True
    whole: bool = False

    def columns(self, task: Task) -> torch.Tensor | None:
        """Token ids that the metric reads, `[prompt, column]`, the answer first; None for all."""
        return None if self.whole else torch.cat([task.answers[:, None], task.foils], 1)

    def pick(self, logits: torch.Tensor, task: Task) -> torch.Tensor:
        """`[prompt, vocabulary]` logits -> the columns that the metric reads, `[prompt, column]`."""
        columns = self.columns(task)
        return logits if columns is None else logits.gather(-1, columns.to(logits.device))

    def __call__(self, logits: torch.Tensor, task: Task, base: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., prompt, column]` logits -> `[..., prompt]`. `base` are the base run's logits, for KL."""
        return self.read(logits.float(), task.answers.to(logits.device), base)

    def read(self, logits, answers, base):
        raise NotImplementedError

    @staticmethod
    def _of(values, answers):
        """The answers' entries of whole-vocabulary values."""
        return values.gather(-1, answers.expand(values.shape[:-1])[..., None]).squeeze(-1)


class LogitDifference(Metric):
    """Answer's logit minus the mean foil's (Wang et al. 2022 for one foil)."""

    def read(self, logits, answers, base):
        return logits[..., 0] - logits[..., 1:].mean(-1)


@dataclass(frozen=True)
class Contrast(Metric):
    """Answer's logit minus the mean over an answer set (which may hold the answer): removes a common offset."""

    options: tuple[int, ...] = ()

    def columns(self, task: Task) -> torch.Tensor:
        return torch.cat([task.answers[:, None], torch.tensor(self.options).expand(len(task), -1)], 1)

    def read(self, logits, answers, base):
        return logits[..., 0] - logits[..., 1:].mean(-1)


class AnswerLogit(Metric):
    """The answer's logit alone: swamped by a common offset in some models; for comparison."""

    def read(self, logits, answers, base):
        return logits[..., 0]


class OptionAccuracy(Metric):
    """1 where the answer beats every foil."""

    def read(self, logits, answers, base):
        return (logits[..., :1] > logits[..., 1:]).all(-1).float()


class Accuracy(Metric):
    """1 where the answer is the arg max over the vocabulary."""

    def read(self, logits, answers, base):
        return (logits.argmax(-1) == answers).float()


class Probability(Metric):
    """The answer's probability."""

    def read(self, logits, answers, base):
        return self._of(logits.softmax(-1), answers)


class LogProbability(Metric):
    """The answer's log-probability, in nats."""

    def read(self, logits, answers, base):
        return self._of(logits.log_softmax(-1), answers)


class KL(Metric):
    """KL divergence of the run from the base run, KL(base || run), in nats."""

    def read(self, logits, answers, base):
        p = base.float().log_softmax(-1)
        return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)


logit_difference = LogitDifference("logit difference")
answer_logit = AnswerLogit("answer logit")
option_accuracy = OptionAccuracy("accuracy among options", gradient=False)
accuracy = Accuracy("accuracy", gradient=False, whole=True)
probability = Probability("probability", whole=True)
log_probability = LogProbability("log-probability (nats)", whole=True)
kl = KL("KL from the base run (nats)", gradient=False, whole=True)
KNOWN = {m.name.partition(" (")[0]: m for m in
         (logit_difference, answer_logit, option_accuracy, accuracy, probability, log_probability, kl)}  # fmt: skip


def contrast(options, name: str = "answer minus mean of options") -> Contrast:
    """Answer minus the mean logit over `options` (token ids): Zhang et al.'s effect needs it (digits)."""
    options = tuple(int(i) for i in options)
    if len(options) < 2:
        raise ValueError(f"a contrast needs at least two options, got {len(options)}")
    return Contrast(name, options=options)


def named(metric: str | Metric) -> Metric:
    """A metric by name; a metric itself passes. LookupError names the nearest."""
    return metric if isinstance(metric, Metric) else KNOWN[known("metric", metric, KNOWN)]


@torch.no_grad()
def evaluate(model, task: Task, metric: str | Metric = logit_difference, batch: int = 64) -> torch.Tensor:
    """A metric of a model, edited or not, on every prompt of a task: `[prompt]`, float32 on the CPU.

    Raises:
        ValueError: for KL, which compares with a base run: use a sweep's `metric=`.
    """
    read = named(metric)
    if isinstance(read, KL):
        raise ValueError("KL compares two runs: give it as the metric of a sweep, or compare two models' logits")
    values = []
    for part in task.batches(batch):
        with model.trace(input_ids=part.ids.to(model.device), logits_to_keep=1, use_cache=False):
            logits = model.logits.save()
        values.append(read(read.pick(logits[:, -1], part), part).cpu())
    return torch.cat(values)
