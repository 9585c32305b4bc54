"""Decoding with open eyes: read attention rows as tokens are written, of many prompts or under many conditions at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import nnsight
import torch
from transformers.cache_utils import Cache

from heads.lab.ablation import ablate
from heads.lab.answers import AnswerScore, read
from heads.model.prefix import Prefix, join, prefill
from heads.model.weights import decoder_only, heads_everywhere
from heads.names import whole


@dataclass(frozen=True)
class Step:
    """One decoded token. `rows` is `[layer, head, key]`: where each head looked while writing it."""

    token: int
    rows: torch.Tensor


def _stops(model, stop: str | None) -> set[int]:
    """Token ids that end an answer: end of text, and every token that contains `stop`."""
    eos = model._module.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos]) - {None}
    if stop:
        cached = model.__dict__.setdefault("_stop_tokens", {})
        if stop not in cached:
            texts = model.tokenizer.batch_decode([[i] for i in range(len(model.tokenizer))])
            cached[stop] = {i for i, text in enumerate(texts) if stop in text}
        ids |= cached[stop]
    return ids


def _check(model, ids: torch.Tensor, name: str) -> None:
    decoder_only(model)
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"{name} has the shape {list(ids.shape)}: expected one prompt, [1, position], two tokens or more")


def decode_batch(
    model, prompts: list[torch.Tensor], max_new_tokens: int = 50, stop: str | None = "\n"
) -> Iterator[dict[int, Step]]:
    """Greedy decoding of several prompts at once that shows, token by token, each head's attention row.

    Every prompt but its last token is prefilled by itself, through SDPA. Then each forward takes one token of every
    prompt that still writes, and reads one row per head: the weights are read once for all prompts, and memory
    grows with the context, never with its square.

    Args:
        prompts: ids, `[1, position]` each, of any lengths from two tokens on.
        stop: a prompt's decoding ends before a token that contains this text, or at the end of text.

    Yields:
        Per forward, the steps of the prompts that still write: index in `prompts` -> `Step`, without padding.

    Raises:
        ValueError: a prompt that is not `[1, position]` with two tokens or more.
    """
    heads_everywhere(model)
    whole("max_new_tokens", max_new_tokens, 0)
    for i, ids in enumerate(prompts):
        _check(model, ids, f"prompt {i}")
    if not prompts:
        return
    prompts, stops = [ids.to(model.device) for ids in prompts], _stops(model, stop)
    longest = max(ids.shape[1] for ids in prompts)
    live, padding = list(range(len(prompts))), [longest - ids.shape[1] for ids in prompts]
    cache = join([prefill(model, ids[:, :-1], ids.shape[1]) for ids in prompts], max_new_tokens)
    cache.prompt = longest
    last = torch.cat([ids[:, -1:] for ids in prompts])
    for length in range(longest, longest + max_new_tokens):
        left = torch.tensor([padding[i] for i in live], device=model.device)[:, None]
        logits, rows = _step(model, cache, last, torch.arange(length, device=model.device) >= left, length - 1 - left)
        last = logits[:, -1:].argmax(-1)
        tokens = last.flatten().tolist()
        going = [row for row, token in enumerate(tokens) if token not in stops]
        if not going:
            return
        yield {live[row]: Step(tokens[row], rows[row, :, :, padding[live[row]] :]) for row in going}
        if len(going) < len(live):
            last, live = last[going], [live[row] for row in going]
            cache.batch_select_indices(going)


def _step(model, cache, ids, mask, positions) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward: logits `[row, 1, vocabulary]` and attention rows `[row, layer, head, key]`."""
    with (
        torch.no_grad(),
        model.trace(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True),
    ):
        rows = nnsight.save([])
        for layer in model.layers:
            weights = layer.attn.pattern
            rows.append(weights[:, :, -1])
            layer.attn.pattern = weights  # mixed as they are: SDPA would only compute them again
        logits = model.logits.save()
    return logits, torch.stack([row.to(logits.device) for row in rows], dim=1)


def decode_rows(model, ids: torch.Tensor, max_new_tokens: int = 50, stop: str | None = "\n") -> Iterator[Step]:
    """`decode_batch` of a single prompt, `[1, position]`: one `Step` per token."""
    for steps in decode_batch(model, [ids], max_new_tokens, stop):
        yield steps[0]


class Conditions:
    """Many ablations of one prompt as one batch: the prefix is prefilled once and stored once.

    Each condition is a row of the batch with its own heads masked. It equals running
    `ablate(model, heads, kind, phase="decode")` on the prompt by itself, at a fraction of the time: weights
    and prefix are read once for all conditions.

    Args:
        model: a loaded model.
        ids: the prompt, `[1, position]`.
        sets: name -> heads; `{"none": []}` is the clean model.
        kind, values: as in `ablate`.
        phase: "decode", or "both": then nothing can be shared, and every row prefills its own prompt.
        rows: at most so many conditions in one forward (memory).
        prefix: `heads.Prefix(model, ids[:, :-1])`, if several batches of conditions share one prompt.

    Raises:
        ValueError: no conditions, a phase that leaves decoding clean, several prompts, a prefix of other tokens; an encoder.
    """

    def __init__(self, model, ids, sets: dict[str, list], kind: str = "uniform", phase: str = "decode", values=None,
                 rows: int = 32, prefix: Prefix | None = None):  # fmt: skip
        if phase == "prefill":
            raise ValueError("phase='prefill' leaves decoding clean: use heads.ablate(...) for one condition at a time")
        if not sets:
            raise ValueError("no conditions: give a dict of name -> heads, for example {'none': [], 'top': scores.top(5)}")
        _check(model, ids, "the prompt")
        self.model, self.ids, self.names, self.phase = model, ids.to(model.device), list(sets), phase
        chunks = [self.names[i : i + rows] for i in range(0, len(self.names), whole("rows", rows, 1))]
        # an empty set still needs its row, so rows are given as lists
        self.chunks = [(c, ablate(model, [list(sets[n]) for n in c], kind, phase=phase, values=values)) for c in chunks]
        if prefix is not None and (prefix._module is not model._module or prefix.edits != model._edits):
            raise ValueError("the prefix was read by another model, or with other edits")
        if prefix is not None and not torch.equal(prefix.ids.to(model.device), self.ids[:, :-1]):
            raise ValueError(f"the prefix holds {len(prefix)} other positions: the prompt needs all of its own but the last")
        self.prefix = (prefix or Prefix(model, self.ids[:, :-1], ids.shape[1])) if phase == "decode" else None

    def _start(self, edited, n: int) -> Cache:
        """A cache to continue from."""
        cache = self.prefix.cache() if self.prefix else prefill(edited, self.ids[:, :-1].expand(n, -1), self.ids.shape[1])
        cache.prompt = self.ids.shape[1]
        return cache

    def generate(self, max_new_tokens: int = 50, stop: str | None = "\n") -> dict[str, str]:
        """Greedy answer of each condition, up to `stop` or the end of text."""
        stops, answers = _stops(self.model, stop), {}
        for names, edited in self.chunks:
            cache, last = self._start(edited, len(names)), self.ids[:, -1:].expand(len(names), 1)
            written: list[list[int]] = [[] for _ in names]
            live = set(range(len(names)))
            for _ in range(max_new_tokens):
                with torch.no_grad(), edited.trace(input_ids=last, past_key_values=cache, use_cache=True):
                    logits = edited.logits.save()
                last = logits[:, -1:].argmax(-1)
                live = {i for i in live if last[i].item() not in stops}
                for i in live:
                    written[i].append(last[i].item())
                if not live:
                    break
            answers |= {name: self.model.tokenizer.decode(ids) for name, ids in zip(names, written)}
        return answers

    def score(self, answer_ids: torch.Tensor) -> dict[str, AnswerScore]:
        """Teacher-forced score of a gold answer, `[token]` ids that continue the prompt."""
        answer, scores = answer_ids.to(self.ids.device).flatten(), {}
        if not len(answer):
            raise ValueError("the answer has no token: there is nothing to score")
        for names, edited in self.chunks:
            cache = self._start(edited, len(names))
            fed = torch.cat([self.ids[0, -1:], answer[:-1]]).expand(len(names), -1)
            with torch.no_grad(), edited.trace(input_ids=fed, past_key_values=cache, use_cache=True):
                logits = edited.logits.save()
            found = read(logits, answer.expand(len(names), -1)).cpu()
            scores |= zip(names, found.split([len(answer)] * len(names)))
        return scores
