"""Decoding with open eyes: read attention rows as tokens are written, or run many conditions at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import nnsight
import torch
from transformers.cache_utils import DynamicCache

from heads.ablation import ablate
from heads.attention import SharedPrefix


def prefill(model, ids: torch.Tensor) -> DynamicCache:
    """KV cache of a prompt, through SDPA: no pattern is materialised, no logits but the last.

    Layers with a sliding window keep all their keys here (the mask still hides them), so that a key's
    index is its position in every layer.

    Args:
        ids: `[batch, position]`; a batch of one if the cache is to be shared.
    """
    cache = DynamicCache()
    with torch.no_grad(), model.trace(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1):
        pass
    return cache


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


def decode_rows(model, ids: torch.Tensor, max_new_tokens: int = 50, stop: str | None = "\n") -> Iterator[Step]:
    """Greedy decoding that shows, token by token, each head's attention row.

    The prompt but its last token is prefilled through SDPA. Then each forward takes one token and reads
    one row per head: memory grows with the context, never with its square.

    Args:
        ids: `[1, position]`.
        stop: decoding ends before a token that contains this text, or at the end of text.
    """
    cache, last, stops = prefill(model, ids[:, :-1]), ids[:, -1:], _stops(model, stop)
    for _ in range(max_new_tokens):
        with torch.no_grad(), model.trace(input_ids=last, past_key_values=cache, use_cache=True):
            rows = nnsight.save([])
            for layer in model.layers:
                rows.append(layer.attn.pattern[0, :, -1])
            logits = model.logits.save()
        last = logits[:, -1:].argmax(-1)
        if last.item() in stops:
            return
        yield Step(last.item(), torch.stack([row.to(last.device) for row in rows]))


@dataclass(frozen=True)
class AnswerScore:
    """A gold answer under teacher forcing: per token, whether it is the arg max, and its log-probability."""

    correct: torch.Tensor  # [token], bool
    logprob: torch.Tensor  # [token], nats

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


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
        prefix: `prefill(model, ids[:, :-1])`, if several batches of conditions share one prompt.

    Raises:
        ValueError: no conditions, a phase that leaves decoding clean, or a prefix of another length.
    """

    def __init__(self, model, ids, sets: dict[str, list], kind: str = "uniform", phase: str = "decode", values=None,
                 rows: int = 32, prefix: DynamicCache | None = None):  # fmt: skip
        if phase == "prefill":
            raise ValueError("phase='prefill' leaves decoding clean: use heads.ablate(...) for one condition at a time")
        if not sets:
            raise ValueError("no conditions: give a dict of name -> heads, for example {'none': [], 'top': scores.top(5)}")
        self.model, self.ids, self.names, self.phase = model, ids.to(model.device), list(sets), phase
        chunks = [self.names[i : i + rows] for i in range(0, len(self.names), rows)]
        # an empty set still needs its row, so rows are given as lists
        self.chunks = [(c, ablate(model, [list(sets[n]) for n in c], kind, phase=phase, values=values)) for c in chunks]
        if prefix is not None and prefix.get_seq_length() != ids.shape[1] - 1:
            raise ValueError(f"the prefix holds {prefix.get_seq_length()} positions, the prompt needs {ids.shape[1] - 1}: all but its last")
        self.prefix = (prefix or prefill(model, self.ids[:, :-1])) if phase == "decode" else None

    def _start(self, edited, n: int):
        """A cache to continue from, and what every forward must be told about it."""
        if self.prefix is None:
            return {"past_key_values": prefill(edited, self.ids[:, :-1].expand(n, -1))}
        shared = SharedPrefix(self.prefix)
        return {"past_key_values": shared, "shared_prefix": shared}

    def generate(self, max_new_tokens: int = 50, stop: str | None = "\n") -> dict[str, str]:
        """Greedy answer of each condition, up to `stop` or the end of text."""
        stops, answers = _stops(self.model, stop), {}
        for names, edited in self.chunks:
            state, last = self._start(edited, len(names)), self.ids[:, -1:].expand(len(names), 1)
            written: list[list[int]] = [[] for _ in names]
            live = set(range(len(names)))
            for _ in range(max_new_tokens):
                with torch.no_grad(), edited.trace(input_ids=last, use_cache=True, **state):
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
        for names, edited in self.chunks:
            state = self._start(edited, len(names))
            fed = torch.cat([self.ids[0, -1:], answer[:-1]]).expand(len(names), -1)
            with torch.no_grad(), edited.trace(input_ids=fed, use_cache=True, **state):
                logits = edited.logits.save()
            logprobs = logits.float().log_softmax(-1)
            gold = logprobs.gather(-1, answer.expand(len(names), -1)[..., None]).squeeze(-1)
            hits = logits.argmax(-1) == answer
            scores |= {name: AnswerScore(hits[i].cpu(), gold[i].cpu()) for i, name in enumerate(names)}
        return scores
