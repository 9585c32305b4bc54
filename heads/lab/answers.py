"""Answers: log-probability and hit of every token that should follow, for prompts, conditions and documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import nnsight
import torch
from torch.nn.functional import cross_entropy

from heads.lab.ablation import ablate


@dataclass(frozen=True)
class AnswerScore:
    """A gold answer under teacher forcing: per token, whether it is the arg max, and its log-probability."""

    correct: torch.Tensor  # [token], bool
    logprob: torch.Tensor  # [token], nats

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]



def examples(model, pairs, first: int | None = None, end: str = "") -> list[Example]:
    """(prompt, answer) texts as `Example`s: prompt and answer are tokenised together, as the model reads them.

    Args:
        pairs: texts; the answer with its leading space if it has one.
        first: keep only so many tokens of each answer (1: its first token).
        end: appended to every answer, for example the tokenizer's end of text, or a newline.

    Raises:
        ValueError: naming a pair whose answer is empty or melts into the prompt's last token.
    """
    if first is not None and first < 1:
        raise ValueError(f"first={first}: at least one token of each answer is kept")
    found = []
    for prompt, answer in pairs:
        ids = model.tokenizer(prompt).input_ids
        whole = model.tokenizer(prompt + answer + end).input_ids
        if not ids:
            raise ValueError(f"an empty prompt before {answer!r}: there is no token to read the answer's first one from")
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise ValueError(
                f"{answer + end!r} after {prompt[-40:]!r} is no continuation of its own in tokens: an answer must not be "
                "empty and usually begins with the space or newline that separates it from the prompt"
            )
        found.append(Example(tuple(ids), tuple(whole[len(ids) :][:first])))
    return found



def answer_loss(model, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens in nats: over the tokens of an answer, then over the batch.

    The prompts themselves are not trained on. Rows are padded on the right, with an attention mask, so that
    position 0 is every row's first token. Equals the same loss one by one, to float tolerance.

    Args:
        model: a loaded model, edited or not, or any module that is called like one of transformers (peft's, too).
    """
    fed = [[*example.prompt, *example.answer[:-1]] for example in batch]
    length, starts = max(map(len, fed)), [len(example.prompt) - 1 for example in batch]
    device = next(model.parameters()).device
    ids = torch.tensor([row + [0] * (length - len(row)) for row in fed], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in fed], device=device)
    # logits before the first answer are not needed; peft's virtual tokens stand in front of all
    keep = length - min(starts)
    last = torch.arange(-keep, 0, device=device)  # named one by one, the rows come contiguous: one product, not one a row
    logits = _logits(model, input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=last)[:, -keep:]
    losses = []
    for row, start, example in zip(logits, starts, batch):
        at = start - min(starts)
        target = torch.tensor(example.answer, device=logits.device)
        losses.append(cross_entropy(row[at : at + len(target)].float(), target))
    return torch.stack(losses).mean()



def _logits(model, **inputs) -> torch.Tensor:
    if isinstance(model, torch.nn.Module):
        return model(**inputs).logits
    if not model._edits:  # nothing to intervene in: the module itself, without a trace
        return model._module(**inputs).logits
    if any(getattr(layer._module, "gradient_checkpointing", False) for layer in model.layers):
        raise ValueError(
            "activation checkpointing recomputes layers after the trace is over, without the edits: "
            "use `with steering.hooks(model):` around loss and backward instead of an edited model"
        )
    with model.trace(**inputs):
        logits = model.logits.save()
    return logits


Batch = list[tuple[int, list[int]]]  # (number of the document in its window, token ids)


def token_losses(model, rows: list[list[int]]) -> list[torch.Tensor]:
    """Cross-entropy of every token but the first of each row, in nats: `[token - 1]` per row, float32 on the CPU.

    Args:
        model: a loaded decoder, edited or not.
        rows: token ids, of any lengths from two on; one forward pass for all, padded on the right.
    """
    return _forward(model, rows)[0]



def losses_under(model, rows: list[list[int]], conditions: Mapping, kind: str = "zero", tokens: int = 4096) -> dict:
    """`token_losses` of every row under every condition: name -> `[token - 1]` per row.

    A condition that is given as heads starts from the clean run at its first head's layer: with late heads that halves
    the work.

    Args:
        conditions, kind, tokens: as in `score_documents`.
    """
    models = {name: pair[0] for name, pair in prepared(model, conditions, kind).items()}
    found = {name: [None] * len(rows) for name in models}
    for batch in batches(list(enumerate(rows)), tokens):
        for name, losses in losses_of(model, models, [ids for _, ids in batch]).items():
            for (number, _), row in zip(batch, losses):
                found[name][number] = row
    return found



def prepared(model, conditions: Mapping, kind: str) -> dict[str, tuple]:
    """name -> ((edited model, its first layer that differs from the clean one or None), what to write about it)."""
    found = {}
    for name, heads in conditions.items():
        if hasattr(heads, "trace"):
            found[name] = (heads, 0), "a model"
        elif len(heads):
            chosen = [[int(layer), int(head)] for layer, head in heads]
            found[name] = (ablate(model, heads, kind), min(chosen)[0]), chosen
        else:
            found[name] = (model, None), []
    return found



def losses_of(model, models: dict, rows) -> dict[str, list[torch.Tensor]]:
    """One batch under all conditions, the clean run first."""
    keep = sorted({first for _, first in models.values() if first})
    clean, streams = _forward(model, rows, keep)
    found = {}
    for name, (edited, first) in models.items():
        resume = (first, streams[first]) if first else None
        found[name] = clean if first is None else _forward(edited, rows, resume=resume)[0]
    return found



@torch.no_grad()
def _forward(model, rows, keep=(), resume: tuple | None = None) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """Losses as `token_losses` gives them, and the residual stream entering the layers `keep`.

    `resume`, a layer and the stream that enters it in an unedited run, spares the layers below: an edit does not
    change them if it acts at that layer or above."""
    length, device = max(map(len, rows)), model.device
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    with model.trace(input_ids=ids, attention_mask=mask, use_cache=False):
        if resume is not None:
            for i in range(resume[0]):
                model.layers[i].skip(resume[1])
        kept = nnsight.save({})
        for i in keep:
            kept[i] = model.layers[i].input
        logits = model.logits.save()
    losses = []
    for row, target, tokens in zip(logits, ids, rows):
        parts = []
        for start in range(0, len(tokens) - 1, 512):  # float32 of a whole row of logits would be the largest tensor here
            stop = min(start + 512, len(tokens) - 1)
            part, gold = row[start:stop].float(), target[start + 1 : stop + 1].to(row.device)
            parts.append(part.logsumexp(-1) - part.gather(-1, gold[:, None])[:, 0])
        losses.append(torch.cat(parts).cpu())
    return losses, kept



def batches(pieces: Batch, tokens: int) -> Iterator[Batch]:
    """Pieces of similar length together, as many as fit into `tokens` with their padding; a longer one runs alone."""
    batch: Batch = []
    for piece in sorted(pieces, key=lambda piece: -len(piece[1])):
        if batch and len(batch[0][1]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
