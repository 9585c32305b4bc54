"""Answers: log-probability and hit of every token that should follow, for prompts, conditions and documents.

    items = heads.examples(model, [("Q: big\\nA:", " small"), ...])
    heads.score_answers(model, items)[0].logprob    # of each token of the first answer, nats
    heads.answer_loss(model, items)                 # minus their mean, to train on

A document is an answer to its own first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import nnsight
import torch
from torch.nn.functional import cross_entropy

from heads.lab.ablation import ablate
from heads.model.weights import check_length, decoder_only
from heads.names import whole

NOTHING = -100  # a target where there is nothing to read: torch's own number for it
CHUNK = 512  # positions whose logits are float32 at once: those of all would be the largest tensor of a run
FULL = 0.7  # of its tokens: a batch so full takes no longer rows, and has no padding to mask


@dataclass(frozen=True)
class AnswerScore:
    """A gold answer under teacher forcing: per token, whether it is the arg max, and its log-probability."""

    correct: torch.Tensor  # [token], bool
    logprob: torch.Tensor  # [token], nats

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()

    def split(self, lengths: Sequence[int]) -> list[AnswerScore]:
        """The scores of several answers, read as one, as one each."""
        return [AnswerScore(*pair) for pair in zip(self.correct.split(lengths), self.logprob.split(lengths))]

    def cpu(self) -> AnswerScore:
        return AnswerScore(self.correct.cpu(), self.logprob.cpu())


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def examples(model, pairs: Iterable[tuple[str, str]], first: int | None = None, end: str = "") -> list[Example]:
    """(prompt, answer) texts as `Example`s: prompt and answer are tokenised together, as the model reads them.

    Args:
        pairs: texts; the answer with its leading space if it has one.
        first: keep only so many tokens of each answer (1: its first token).
        end: appended to every answer, for example the tokenizer's end of text, or a newline.

    Raises:
        ValueError: naming a pair whose answer is empty or melts into the prompt's last token.
    """
    if first is not None:
        whole("first", first, 1)
    found = []
    for prompt, answer in pairs:
        ids = model.tokenizer(prompt).input_ids
        both = model.tokenizer(prompt + answer + end).input_ids
        if not ids:
            raise ValueError(f"an empty prompt before {answer!r}: there is no token to read the answer's first one from")
        if both[: len(ids)] != ids or len(both) == len(ids):
            raise ValueError(
                f"{answer + end!r} after {prompt[-40:]!r} is no continuation of its own in tokens: an answer must not be "
                "empty and usually begins with the space or newline that separates it from the prompt"
            )
        found.append(Example(tuple(ids), tuple(both[len(ids) :][:first])))
    return found


@torch.no_grad()
def score_answers(model, items: Sequence[Example], batch: int = 32) -> list[AnswerScore]:
    """Teacher-forced score of each answer, on the CPU; so many of them in one pass, in their order.

    Args:
        model: a loaded model, edited or not, or any module that is called like one of transformers (peft's, too).

    Raises:
        ValueError: for an encoder; an example without a prompt or an answer.
    """
    parts = [items[start : start + batch] for start in range(0, len(items), whole("batch", batch, 1))]
    return [score.cpu() for part in parts for score in _scores(model, part)]


def answer_loss(model, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens in nats: over the tokens of an answer, then over the batch.

    The prompts themselves are not trained on. Equals the same loss one by one, to float tolerance.

    Args:
        model: as in `score_answers`; gradients reach whatever in it requires one.
    """
    if not batch:
        raise ValueError("there are no examples, and so no loss of their answers")
    return -torch.stack([score.logprob.mean() for score in _scores(model, batch)]).mean()


def token_losses(model, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Cross-entropy of every token but the first of each row, in nats: `[token - 1]` per row, float32 on the CPU.

    Args:
        model: as in `score_answers`.
        rows: token ids, of any lengths from two on; one forward pass for all. The last one of a row is not fed.
    """
    return [-score.logprob for score in score_answers(model, [Example(row[:1], row[1:]) for row in rows], len(rows) or 1)]


def prepared(model, conditions: Mapping, kind: str) -> tuple[dict[str, tuple], dict]:
    """name -> (edited model, its first layer that differs from the clean run or None), and name -> what to write of it."""
    decoder_only(model)
    if not isinstance(conditions, Mapping) or not conditions:
        raise ValueError("no conditions: give a dict of name -> heads, for example {'base': [], 'top': scores.top(0.05)}")
    models, written = {}, {}
    for name, heads in conditions.items():
        if hasattr(heads, "_edits"):
            models[name], written[name] = (heads, 0), "a model"
        elif chosen := [list(head) for head in model.anatomy.check(heads)]:
            # the layers below are spared only where they hold no edits, which would be lost with them
            models[name] = ablate(model, chosen, kind), 0 if model._edits else min(chosen)[0]
            written[name] = chosen
        else:
            models[name], written[name] = (model, None), []
    return models, written


def losses_in(model, models: dict, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """One batch under all conditions: the losses of every row's tokens but the first, row after row, on the CPU."""
    inputs, targets = fed(rows, [1] * len(rows), model.device)
    first_layers = {first for _, first in models.values()}
    keep, found = sorted(filter(None, first_layers)), {}
    if keep or None in first_layers:
        clean, streams = _forward(model, inputs, targets, keep)
    for name, (edited, first) in models.items():
        resume = (first, streams[first]) if first else None
        found[name] = clean if first is None else _forward(edited, inputs, targets, resume=resume)[0]
    return found


@torch.no_grad()
def _forward(model, inputs: dict, targets, keep=(), resume: tuple | None = None) -> tuple[torch.Tensor, dict]:
    """Losses of the targets, and the residual stream entering the layers `keep`.

    `resume`, a layer and the stream that enters it in an unedited run, spares the layers below: an edit does not
    change them if it acts at that layer or above."""
    kept = {}
    if not keep and resume is None:
        logits = logits_of(model, **inputs)
    else:
        with model.trace(**inputs):
            for i in range(resume[0] if resume else 0):
                model.layers[i].skip(resume[1])
            kept = nnsight.save({})
            for i in keep:
                kept[i] = model.layers[i].input
            logits = model.logits.save()
    return losses_of(logits, targets).cpu(), kept


def batches(lengths: Sequence[int], tokens: int, full: float = 1.0) -> list[list[int]]:
    """Indices of rows to run together: neighbours in length, at most `tokens` with padding; a longer one runs alone.

    Args:
        full: a batch that holds this share of its tokens takes rows of its own length alone, which need no mask.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        same = found and lengths[i] == lengths[found[-1][0]]
        if found and (len(found[-1]) + 1) * lengths[i] <= tokens * (1 if same else full):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _scores(model, items: Sequence[Example]) -> list[AnswerScore]:
    """Scores of answers in one pass, where the model is."""
    decoder_only(model)
    prompts = [len(item.prompt) for item in items]
    inputs, targets = fed([[*item.prompt, *item.answer] for item in items], prompts, next(model.parameters()).device)
    # logits before the first answer are not needed; peft's virtual tokens stand in front of all
    keep = targets.shape[1] - (min(prompts) - 1)
    last = torch.arange(-keep, 0, device=targets.device)  # named one by one, the rows come contiguous: one product for all
    logits = logits_of(model, **inputs, logits_to_keep=last)[:, -keep:]
    return read(logits, targets[:, -keep:]).split([len(item.answer) for item in items])


def fed(rows: Sequence[Sequence[int]], prompts: Sequence[int], device: torch.device) -> tuple[dict, torch.Tensor]:
    """What a model is given to predict rows of token ids, and the token that should follow at each `[row, position]`.

    Rows are padded on the right, with an attention mask, so that position 0 is every row's first token. The last
    token of a row is not fed, only predicted. The target is `NOTHING` in a prompt (of so many tokens) and in padding.
    """
    for row, n in zip(rows, prompts):
        if not 0 < n < len(row):
            raise ValueError(f"a row of {len(row)} tokens, a prompt of {n} among them: it needs at least one, and one to predict after it")
    lengths, prompts = (torch.tensor(numbers)[:, None] for numbers in (list(map(len, rows)), prompts))
    position = torch.arange(int(lengths.max()))
    ids = torch.zeros(len(rows), len(position), dtype=torch.long)
    ids[position < lengths] = torch.tensor(list(chain.from_iterable(rows)))
    inside, position = position[1:] < lengths, position[1:]  # of the targets
    targets = ids[:, 1:].where(inside & (position >= prompts), NOTHING).to(device)
    inputs = {"input_ids": ids[:, :-1].to(device), "attention_mask": inside.long().to(device), "use_cache": False}
    return inputs, targets


def read(logits: torch.Tensor, targets: torch.Tensor) -> AnswerScore:
    """The score of every target, row after row.

    Args:
        logits: `[row, position, vocabulary]`, of any dtype.
        targets: `[row, position]`, `NOTHING` where there is none.
    """
    hits = [part.argmax(-1) == gold for part, gold in _parts(logits, targets)]
    return AnswerScore(torch.cat(hits), -losses_of(logits, targets))


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`read` without the hits: the cross-entropy of every target in nats, `[target]`."""
    return torch.cat([cross_entropy(part.float(), gold, reduction="none") for part, gold in _parts(logits, targets)])


def _parts(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits that have a target, `[at most CHUNK, vocabulary]`, and those targets."""
    logits, gold = logits.flatten(0, 1), targets.flatten().to(logits.device)
    at = (gold != NOTHING).nonzero()[:, 0]
    if len(at) == len(gold):  # without padding: views of the logits, no copies
        yield from zip(logits.split(CHUNK), gold.split(CHUNK))
    else:
        yield from ((logits[part], gold[part]) for part in at.split(CHUNK))


def logits_of(model, **inputs: Any) -> torch.Tensor:
    """Logits of a loaded model with its edits, or of any module that is called like one of transformers."""
    if isinstance(model, torch.nn.Module) or not model._edits:  # nothing to intervene in: the module itself, without a trace
        check_length(model, inputs["input_ids"].shape[1])
        return getattr(model, "_module", model)(**inputs).logits
    with model.trace(**inputs):
        logits = model.logits.save()
    return logits
