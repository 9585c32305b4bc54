"""What is read from the logits at the last position: logit difference, accuracy, probability, KL.

A metric names the columns of the vocabulary that it needs, so that a sweep computes only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

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
