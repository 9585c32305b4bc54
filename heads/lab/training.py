"""Training: one small loop for every trained intervention, and the loss of an answer.

    data = heads.examples(model, [("Q: big\\nA:", " small"), ...])
    with heads.head_weights(model, chosen) as tuned:
        done = heads.fit(tuned, lambda batch: heads.answer_loss(model, batch), data, steps=100, lr=1e-3)

The weights of a loaded model are frozen; only what is handed to `fit` is in the optimiser.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from tqdm import tqdm

from heads.names import known, whole

SCHEDULES = ("constant", "linear")
Trained = torch.Tensor | Iterable[torch.Tensor] | Mapping[str, torch.Tensor] | nn.Module  # or what has .parameters()


@dataclass
class Training:
    """What `fit` did.

    Attributes:
        losses: `[step]`, the training loss before each update.
        validation: (number of updates, value) of each validation.
        kept: after how many updates the state was reached that the tensors hold now.
        stopped: why it ended, in words.
        failed: whether that was a loss or gradient that is not finite.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    kept: int = 0
    stopped: str = ""
    failed: bool = False

    def __repr__(self) -> str:
        ends = f"loss {self.losses[0]:.3g} -> {self.losses[-1]:.3g}, " if self.losses else ""
        return f"Training({len(self.losses)} steps, {ends}kept the state after {self.kept} updates; {self.stopped})"


def parameters_of(trained: Trained) -> list[torch.Tensor]:
    """The tensors to train, of a tensor, a list or dict of them, or anything with `.parameters()`.

    Raises:
        ValueError: if there are none, or one is no leaf that requires a gradient.
    """
    if isinstance(trained, torch.Tensor):
        found = [trained]
    elif hasattr(trained, "parameters"):
        found = [p for p in trained.parameters() if p.requires_grad]
    else:
        found = list(trained.values() if isinstance(trained, Mapping) else trained)
    bad = [i for i, p in enumerate(found) if not (isinstance(p, torch.Tensor) and p.is_leaf and p.requires_grad)]
    if bad or not found:
        what = f"number {bad[0]} is not one" if bad else "there are none"
        raise ValueError(f"what is trained are leaf tensors that require a gradient (requires_grad=True): {what}")
    return found


def fit(trained: Trained, loss: Callable[[list], torch.Tensor], data: Sequence, *, steps: int, batch: int = 8,
        lr: float = 1e-3, weight_decay: float = 0.0, schedule: str = "constant",
        validate: Callable[[], float] | None = None, every: int = 50, seed: int = 0,
        name: str = "training") -> Training:  # fmt: skip
    """Train a few tensors with AdamW (Adam, where weight_decay is 0) on shuffled batches.

    Args:
        trained: a tensor, a list or dict of them, or anything with `.parameters()`; nothing else is updated.
        loss: list of items -> scalar, a mean over the items. Penalties belong in it, and autocast if you want it.
        data: the items, a sequence; an epoch shows each of them once, in an order drawn from `seed`.
        steps: how many updates. batch: items of one update.
        lr, weight_decay: as in torch. schedule: "constant", or "linear" to zero.
        validate: () -> a number, smaller is better, asked `every` so many updates and at the end (under
            `no_grad`). The best state is the one that is kept.
        name: of the progress bar.

    Returns:
        A `Training`. A loss or a gradient that is not finite ends it with a warning that names the step; the
        tensors then hold the last state (the best one, with `validate`) whose loss and gradient were finite.

    Raises:
        ValueError: bad arguments, nothing to train on, a loss that does not depend on what is trained.
        LookupError: an unknown schedule.
    """
    params = parameters_of(trained)
    if not len(data):
        raise ValueError("there is nothing to train on: data is empty")
    for what, n in (("steps", steps), ("batch", batch), ("every", every)):
        whole(what, n, 1)
    known("schedule", schedule, SCHEDULES)
    many = sum(p.numel() for p in params) > 10**7  # all weights: a fused update goes through memory once, not ten times
    optimiser = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=many or None)
    rate = {"constant": lambda n: 1.0, "linear": lambda n: 1 - n / steps}[schedule]
    pace = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    done, good, best = Training(), _copy(params), None
    bar = tqdm(islice(_batches(data, batch, seed), steps), total=steps, desc=name, unit="step", disable=None)
    for step, items in enumerate(bar):
        optimiser.zero_grad(set_to_none=True)
        value, norm = _backward(loss(items), params)
        if not math.isfinite(value + norm):
            _fail(done, params, good, value, norm, step)
            break
        done.losses.append(value)
        for kept, p in zip(good, params):
            kept.copy_(p.detach())
        optimiser.step()
        pace.step()
        done.kept = step + 1
        bar.set_postfix(loss=f"{value:.3g}", refresh=False)
        if validate and ((step + 1) % every == 0 or step + 1 == steps):
            best = _validated(done, validate, params, best)
    bar.close()
    if best:
        done.kept, state = best
        _put(params, state)
    done.stopped = done.stopped or "all steps done"
    return done


def _batches(data: Sequence, size: int, seed: int) -> Iterator[list]:
    """Batches without end, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [data[i] for i in order[start : start + size]]


def _backward(loss: torch.Tensor, params) -> tuple[float, float]:
    """Value of a loss and norm of its gradient (NaN where the loss is not finite: there is no backward then)."""
    value = float(loss.detach())
    if not math.isfinite(value):
        return value, math.nan
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on what is trained: it carries no gradient")
    loss.backward()
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise ValueError("the loss does not depend on what is trained: no gradient reached any of its tensors")
    return value, float(torch.nn.utils.get_total_norm(grads))


def _validated(done: Training, validate, params, best) -> tuple[int, list[torch.Tensor]] | None:
    """Ask for the validation value; (updates, state) of the best so far."""
    with torch.no_grad():
        value = float(validate())
    earlier = [v for _, v in done.validation if math.isfinite(v)]
    done.validation.append((done.kept, value))
    return (done.kept, _copy(params)) if math.isfinite(value) and all(value < v for v in earlier) else best


def _fail(done: Training, params, good, value: float, norm: float, step: int) -> None:
    """Go back to the last state that was good: a bad loss condemns the update before it, a bad gradient does not."""
    bad = f"the loss is {value}" if not math.isfinite(value) else f"the norm of the gradient is {norm}"
    if not math.isfinite(value):
        _put(params, good)
        done.kept = max(step - 1, 0)
    done.failed, done.stopped = True, f"{bad} at step {step}, so training stopped and went back to the last good state"
    warnings.warn(f"{done.stopped}. A smaller learning rate may help", RuntimeWarning, stacklevel=3)


def _copy(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


@torch.no_grad()
def _put(params, values) -> None:
    for p, value in zip(params, values):
        p.copy_(value)
