"""Retrieval heads (Wu et al. 2024, arXiv 2404.15574, section 2): scored while the model copies a needle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from heads.lab.answers import batches
from heads.lab.decoding import Step, decode_batch
from heads.names import whole
from heads.scores import HeadScores, identity
from heads.tasks.needle import Sample

GATE = 50.0  # a sample counts if ROUGE-1 recall of the answer is above this (per cent)


def rouge1_recall(response: str, answer: str) -> float:
    """Per cent of the answer's words found in the response, stemmed (ROUGE-1 recall, Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    return 100 * RougeScorer(["rouge1"], use_stemmer=True).score(answer, response)["rouge1"].recall


@dataclass(frozen=True)
class Trial:
    """What every head did while one answer was written. Arrays are `[layer, head]`.

    `copies` is the retrieval score of this sample, `needle` and `first` the attention to the answer's
    tokens and to position 0, mean over decoded tokens.
    """

    sample: Sample
    response: str
    recall: float
    copies: np.ndarray
    needle: np.ndarray
    first: np.ndarray

    @property
    def success(self) -> bool:
        """Whether the answer was found, by ROUGE-1 recall above `GATE`."""
        return self.recall > GATE


@dataclass(frozen=True)
class Retrieval:
    """Trials of one model, and the scores that successful ones give."""

    trials: list[Trial]
    name: str = "retrieval score"
    model: Any = None  # as in `HeadScores`

    @property
    def successes(self) -> list[Trial]:
        """Trials that count."""
        return [trial for trial in self.trials if trial.success]

    @property
    def samples(self) -> np.ndarray:
        """Scores of the successful samples, `[sample, layer, head]`.

        Raises:
            ValueError: if no sample succeeded, because then there is nothing to score.
        """
        if not self.successes:
            raise ValueError(
                f"the model answered none of {len(self.trials)} samples (ROUGE-1 recall above {GATE:.0f}): retrieval scores "
                "are defined on successes only. Use shorter prompts, form='stem', or a stronger model"
            )
        return np.stack([trial.copies for trial in self.successes])

    @property
    def mean(self) -> HeadScores:
        """The retrieval score: mean over successful samples."""
        return HeadScores(self.samples.mean(0), self.name, self.model)

    @property
    def frequency(self) -> HeadScores:
        """Share of successful samples in which a head copies at all."""
        return HeadScores((self.samples > 0).mean(0), "activation frequency", self.model)


def copying(best: torch.Tensor, token: int, ids: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """Which heads copy in one decode step: `[layer, head]` booleans.

    A head copies if the position it attends to most, of all positions, lies in the answer's span and holds
    the token being written.

    Args:
        best: the position each head attends to most, `[layer, head]`.
        ids: the prompt, `[1, position]`.
    """
    inside = (best >= span[0]) & (best < span[1])
    return inside & (ids[0][best.clamp(max=ids.shape[1] - 1)] == token)


class Tally:
    """What the heads do while one sample is answered, added up step by step."""

    def __init__(self, model, sample: Sample):
        self.sample, self.ids, (self.start, self.end) = sample, sample.ids.to(model.device), sample.span
        shape, device = (model.anatomy.n_layers, model.anatomy.n_heads), self.ids.device
        self.counts = torch.zeros(*shape, self.end - self.start, device=device)  # copies of each answer token
        self.needle, self.first = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.tokens: list[int] = []

    def add(self, step: Step) -> None:
        """One decoded token, with the attention rows that wrote it."""
        best = step.rows.argmax(-1)
        hits = copying(best, step.token, self.ids, self.sample.span)
        offset = (best - self.start).clamp(0, self.end - self.start - 1)
        self.counts.scatter_add_(-1, offset[..., None], hits[..., None].float())
        self.needle += step.rows[..., self.start : self.end].float().sum(-1)
        self.first += step.rows[..., 0].float()
        self.tokens.append(step.token)

    def trial(self, model, dedup: bool) -> Trial:
        """The sums as shares; `dedup` as in `retrieval_scores`."""
        response, n = model.tokenizer.decode(self.tokens), max(len(self.tokens), 1)
        copies = (self.counts.clamp(max=1) if dedup else self.counts).sum(-1) / (self.end - self.start)
        tables = (table.cpu().numpy() for table in (copies, self.needle / n, self.first / n))
        return Trial(self.sample, response, rouge1_recall(response, self.sample.answer), *tables)


def retrieval_scores(model, samples: list[Sample], max_new_tokens: int = 50, stop: str | None = "\n",
                     dedup: bool = False, name: str = "retrieval score", progress: bool = True,
                     batch_tokens: int = 8192) -> Retrieval:  # fmt: skip
    """Let the model answer every sample, and watch its heads.

    Args:
        dedup: count a position copied twice once, as the paper's formula |g intersect k| / |k| reads. The
            released code counts every copy, so that a score can pass 1; so does the default here.
        batch_tokens: prompts are decoded together as long as they hold no more tokens than this; it bounds the
            memory of the KV cache and does not change the result. 0: one by one.
    """
    whole("max_new_tokens", max_new_tokens, 1), whole("batch_tokens", batch_tokens, 0)
    trials: dict[int, Trial] = {}
    with tqdm(total=len(samples), desc=name, unit="sample", disable=None if progress else True) as bar:
        for batch in batches([sample.ids.shape[1] for sample in samples], batch_tokens):
            tallies = [Tally(model, samples[i]) for i in batch]
            for steps in decode_batch(model, [samples[i].ids for i in batch], max_new_tokens, stop):
                for row, step in steps.items():
                    tallies[row].add(step)
            trials |= {i: tally.trial(model, dedup) for i, tally in zip(batch, tallies)}
            bar.update(len(batch))
    return Retrieval([trials[i] for i in range(len(samples))], name, identity(model))
