"""Training: one small loop for every trained intervention, and the loss of an answer.

    data = heads.examples(model, [("Q: big\\nA:", " small"), ...])
    with heads.head_weights(model, chosen) as tuned:
        done = heads.fit(tuned, lambda batch: heads.answer_loss(model, batch), data, steps=100, lr=1e-3)

The weights of a loaded model are frozen; only what is handed to `fit` is in the optimiser.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from heads.names import known

SCHEDULES = ("constant", "linear")


@contextmanager
def checkpointing(model) -> Iterator[None]:
    """Activation checkpointing for the loaded module: backward recomputes every layer instead of keeping it.

    For long prompts on a GPU: memory for activations falls from all layers to one, for one more forward in time.
    Use it with what changes weights (`head_weights`, `lora`) or with `Steering.hooks`; an nnsight edit would be
    missing when a layer is recomputed, which `answer_loss` refuses. Dropout stays off.
    """
    module, blocks = model._module, [layer._module for layer in model.layers]
    module.activation_checkpointing_enable({"use_reentrant": False})
    module.disable_input_require_grads()  # which it hooks to the embedding, for reentrant checkpoints only
    for block in blocks:
        block.training = True  # of the block alone: its dropouts are modules of their own and stay in eval mode
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        module.activation_checkpointing_disable()
        module.disable_input_require_grads()  # of an adapter that was put on meanwhile


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


def parameters_of(trained) -> list[torch.Tensor]:
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


def fit(trained, loss: Callable, data: Sequence, *, steps: int | None = None, epochs: int | None = None, batch: int = 8,
        accumulate: int = 1, lr: float = 1e-3, weight_decay: float = 0.0, schedule: str = "constant", warmup: int = 0,
        clip: float | None = None, validate: Callable[[], float] | None = None, every: int = 50,
        patience: int | None = None, bf16: bool = False, seed: int = 0, name: str = "training",
        progress: bool = True) -> Training:  # fmt: skip
    """Train a few tensors with AdamW (Adam, where weight_decay is 0) on shuffled batches.

    Args:
        trained: a tensor, a list or dict of them, or anything with `.parameters()`; nothing else is updated.
        loss: list of items -> scalar, a mean over the items. Penalties belong in it.
        data: the items, a sequence; an epoch shows each of them once, in an order drawn from `seed`.
        steps, epochs: how many updates; give one of the two.
        batch: items of one update. accumulate: parts in which they are run, to save memory; the update is the same.
        lr, weight_decay: as in torch. schedule: "constant", or "linear" to zero. warmup: updates of linear rise.
        clip: largest norm of the gradient.
        validate: () -> a number, smaller is better, asked `every` so many updates and at the end (under
            `no_grad`). The best state is the one that is kept.
        patience: stop after so many validations without a new best.
        bf16: run the loss in bfloat16 by autocast, for a float32 model on a GPU. (A model that was loaded on a GPU
            is in bfloat16 already; what is trained stays in its own dtype, float32 if you make it so.)

    Returns:
        A `Training`. A loss or a gradient that is not finite ends it with a warning that names the step; the
        tensors then hold the last state (the best one, with `validate`) whose loss and gradient were finite.

    Raises:
        ValueError: bad arguments, nothing to train on, a loss that does not depend on what is trained.
    """
    params = parameters_of(trained)
    total = _total(steps, epochs, len(data), batch, accumulate, schedule, patience, validate)
    many = sum(p.numel() for p in params) > 10**7  # all weights: a fused update goes through memory once, not ten times
    optimiser = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=many or None)
    pace = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: _rate(n, total, warmup, schedule))
    context = torch.autocast(params[0].device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    done, good, best = Training(), _copy(params), None
    order, quiet = _batches(data, batch, total, seed), None if progress else True
    bar = tqdm(order, total=total, desc=name, unit="step", disable=quiet)
    for step, items in enumerate(bar):
        optimiser.zero_grad(set_to_none=True)
        value, norm = _backward(loss, items, accumulate, params, clip, context)
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
        if validate and ((step + 1) % every == 0 or step + 1 == total):
            best = _validated(done, validate, params, best)
            if patience and sum(n > best[0] for n, _ in done.validation) >= patience:
                done.stopped = f"stopped after {step + 1} steps: no better validation since step {best[0]}"
                break
    bar.close()
    if best and best[1] is not None:
        done.kept = best[0]
        _put(params, best[1])
    done.stopped = done.stopped or "all steps done"
    return done


def _total(steps, epochs, n, batch, accumulate, schedule, patience, validate) -> int:
    """Number of updates, once the arguments make sense."""
    if not n:
        raise ValueError("there is nothing to train on: data is empty")
    if (steps is None) == (epochs is None):
        raise ValueError("say how long to train: steps= or epochs=, one of the two")
    known("schedule", schedule, SCHEDULES)
    if min(steps or epochs or 0, batch, accumulate) < 1:
        raise ValueError(f"steps or epochs, batch={batch} and accumulate={accumulate} must be at least 1")
    if patience and not validate:
        raise ValueError("early stopping (patience=) needs validate=, a function that returns the number to watch")
    return steps or epochs * math.ceil(n / batch)


def _rate(n: int, total: int, warmup: int, schedule: str) -> float:
    rise = min(1.0, (n + 1) / warmup) if warmup else 1.0
    return rise * (1.0 if schedule == "constant" else max(0.0, 1 - n / total))


def _batches(data: Sequence, size: int, total: int, seed: int) -> Iterator[list]:
    generator, given = torch.Generator().manual_seed(seed), 0
    while True:
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order), size):
            if given == total:
                return
            given += 1
            yield [data[i] for i in order[start : start + size]]


def _backward(loss, items, accumulate, params, clip, context) -> tuple[float, float]:
    """Loss of a batch and norm of its gradient (NaN where the loss is not finite: there is no backward then)."""
    size, value = math.ceil(len(items) / accumulate), 0.0
    for start in range(0, len(items), size):
        part = items[start : start + size]
        with context:
            found = loss(part) * (len(part) / len(items))
        value += float(found.detach())
        if not math.isfinite(value):
            return value, math.nan
        if not found.requires_grad:
            raise ValueError("the loss does not depend on what is trained: it carries no gradient")
        found.backward()
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise ValueError("the loss does not depend on what is trained: no gradient reached any of its tensors")
    return value, float(torch.nn.utils.clip_grad_norm_(params, math.inf if clip is None else clip))


def _validated(done: Training, validate, params, best) -> tuple:
    """Ask for the validation value; (updates, state) of the best so far."""
    with torch.no_grad():
        value = float(validate())
    earlier = [v for _, v in done.validation if math.isfinite(v)]
    done.validation.append((done.kept, value))
    if math.isfinite(value) and all(value < v for v in earlier):
        return done.kept, _copy(params)
    return best or (0, None)


def _fail(done: Training, params, good, value: float, norm: float, step: int) -> None:
    """Go back to the last state that was good: a bad loss condemns the update before it, a bad gradient does not."""
    bad = f"the loss is {value}" if not math.isfinite(value) else f"the norm of the gradient is {norm}"
    if not math.isfinite(value):
        _put(params, good)
        done.kept = max(step - 1, 0)
    done.failed, done.stopped = True, f"{bad} at step {step}, so training stopped and went back to the last good state"
    warnings.warn(f"{done.stopped}. A smaller learning rate or clip= may help", RuntimeWarning, stacklevel=3)


def _copy(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


@torch.no_grad()
def _put(params, values) -> None:
    for p, value in zip(params, values):
        p.copy_(value)
