"""Examples of any lengths in rows without padding, and many answers to one prompt.

    heads.packed_loss(model, items)                     # heads.answer_loss, with no position spent on padding
    heads.candidate_scores(model, prompt, candidates)   # log P(answer | prompt) of each, the prompt read once
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from heads.lab.answers import AnswerScore, Example, answer_loss, examples, fed, read, score_answers
from heads.model.prefix import Prefix
from heads.model.weights import check_length, decoder_only
from heads.names import whole


def rows_of(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Indices of examples that stand in one row of at most `block` tokens: the longest first, each in the first row with
    room for it. One that is longer than a block stands alone."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((r for r, left in enumerate(room) if lengths[i] <= left), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(whole("block", block, 1))
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def packed_loss(model, items: Sequence[Example], block: int = 1024) -> torch.Tensor:
    """`heads.answer_loss` of examples that stand one behind the other, in rows of at most `block` tokens.

    Positions begin again with every example, and none attends to another: transformers reads that from the positions. Equal to
    the padded batch to float tolerance, which is tried once for each module. Logits are computed where an answer is.

    Args:
        model: a loaded model without edits, or any module that is called like one of transformers (peft's, too).

    Raises:
        ValueError: no examples; an encoder; an edited model, whose edits count positions from the ends of rows; a module that
            packs otherwise (no position ids, a window of its own, virtual tokens in front).
    """
    if not items:
        raise ValueError("there are no examples, and so no loss of their answers")
    if getattr(model, "_edits", None):
        raise ValueError("an edited model: its edits count positions in a row, and here several examples share one; heads.answer_loss")
    decoder_only(model)
    whole("block", block, 1)
    _agrees(model)
    lengths = [len(item.prompt) + len(item.answer) - 1 for item in items]
    check_length(model, max(lengths))
    losses = [-score.logprob.mean() for row in rows_of(lengths, block) for score in _row(model, [items[i] for i in row])]
    return torch.stack(losses).mean()


def _row(model, items: list[Example]) -> list[AnswerScore]:
    """Scores of the answers of one row."""
    module = getattr(model, "_module", model)
    ids, positions, keep, gold = [], [], [], []
    for item in items:
        row = (*item.prompt, *item.answer)[:-1]
        keep += range(len(ids) + len(item.prompt) - 1, len(ids) + len(row))
        ids += row
        positions += range(len(row))
        gold += item.answer
    device = next(module.parameters()).device
    ids, positions, keep, gold = (torch.tensor(x, device=device) for x in (ids, positions, keep, gold))
    logits = module(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep).logits
    return read(logits, gold[None]).split([len(item.answer) for item in items])


@torch.no_grad()
def _agrees(model) -> None:
    """Once for each module: the packed loss is the padded one. ValueError if not."""
    found = getattr(model, "_module", model).__dict__
    if "_packs" not in found:
        size = model.config.get_text_config().vocab_size
        ids = ((torch.arange(60) * (size // 7) + 5) % size).tolist()
        few = [Example(tuple(ids[:20]), tuple(ids[20:23])), Example(tuple(ids[30:33]), tuple(ids[33:40])), Example(tuple(ids[40:52]), (7,))]
        module = getattr(model, "_module", model)
        training = [m for m in module.modules() if m.training]
        module.eval()  # dropout would differ by itself
        try:
            ours = torch.stack([-score.logprob.mean() for score in _row(model, few)])
            theirs = torch.stack([answer_loss(model, [item]) for item in few])
            found["_packs"] = float((ours - theirs).abs().max())
        except (RuntimeError, TypeError, ValueError, IndexError):  # no position ids, or no choice of logits
            found["_packs"] = math.inf
        finally:
            for m in training:
                m.training = True
    if not found["_packs"] <= (1e-3 if next(getattr(model, "_module", model).parameters()).dtype == torch.float32 else 0.1):
        raise ValueError(f"a {model.config.model_type} module cannot be packed (its losses are off by {found['_packs']:.1e} nats): "
                         "train it on padded batches, heads.answer_loss")  # fmt: skip


@torch.no_grad()
def candidate_scores(model, prompt: str, candidates: Sequence[str], batch: int = 32) -> list[AnswerScore]:
    """The score of each answer to one prompt, which is read once.

    `.logprob.sum()` is log P(answer | prompt) in nats, `.logprob.mean()` that of a token of it: short answers win by the first,
    and the second makes up for it. An answer brings the space or newline that separates it from the prompt.

    Args:
        model: a loaded decoder; for an edited one every answer is read with its prompt.
        batch: so many answers in one pass.

    Raises:
        ValueError: no answers; two that are the same tokens, so that a choice between them means nothing; an answer that is
            empty or melts into the prompt's last token; an encoder.
    """
    if isinstance(candidates, str) or not len(candidates):
        raise ValueError(f"candidates are a list of answers, not {candidates!r}")
    size, items = whole("batch", batch, 1), examples(model, [(prompt, answer) for answer in candidates])
    for i, item in enumerate(items):
        if item in items[:i]:
            raise ValueError(f"candidates {candidates[items.index(item)]!r} and {candidates[i]!r} are the same tokens")
    ids = torch.tensor(items[0].prompt, device=model.device)[None]
    # edits may count positions from an answer's end; and nothing may stand before the token from which answers are read
    if model._edits or len(items[0].prompt) == 1:
        return score_answers(model, items, size)
    prefix, found = Prefix(model, ids[:, :-1]), []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        inputs, gold = fed([[item.prompt[-1], *item.answer] for item in part], [1] * len(part), model.device)
        with model.trace(inputs["input_ids"], past_key_values=prefix.cache(), use_cache=True):
            logits = model.logits.save()
        found += [score.cpu() for score in read(logits, gold).split([len(item.answer) for item in part])]
    return found
