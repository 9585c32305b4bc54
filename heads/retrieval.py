"""Retrieval heads (Wu et al. 2024, arXiv 2404.15574, section 2): scored while the model copies a needle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from heads.decode import decode_rows
from heads.scores import HeadScores
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
        return self.recall > GATE


@dataclass(frozen=True)
class Retrieval:
    """Trials of one model, and the scores that successful ones give."""

    trials: list[Trial]
    name: str = "retrieval score"

    @property
    def successes(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.success]

    @property
    def samples(self) -> np.ndarray:
        """Scores of the successful samples, `[sample, layer, head]`.

        Raises:
            ValueError: if no sample succeeded, because then there is nothing to score.
        """
        if not self.successes:
            raise ValueError(
                f"the model answered none of {len(self.trials)} samples (ROUGE-1 recall above {GATE:.0f}): retrieval scores are "
                "defined on successes only. Use shorter prompts, form='stem', or a stronger model"
            )
        return np.stack([trial.copies for trial in self.successes])

    @property
    def mean(self) -> HeadScores:
        """The retrieval score: mean over successful samples."""
        return HeadScores(self.samples.mean(0), self.name)

    @property
    def frequency(self) -> HeadScores:
        """Share of successful samples in which a head copies at all."""
        return HeadScores((self.samples > 0).mean(0), "activation frequency")


def copy_steps(rows: torch.Tensor, token: int, ids: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """Which heads copy in one decode step: `[layer, head]` booleans.

    A head copies if the position it attends to most, of all positions, lies in the answer's span and holds
    the token being written.

    Args:
        rows: attention rows, `[layer, head, key]`.
        ids: the prompt, `[1, position]`.
    """
    best = rows.argmax(-1)
    inside = (best >= span[0]) & (best < span[1])
    holds = ids[0].to(rows.device)[best.clamp(max=ids.shape[1] - 1)] == token
    return inside & holds


def trial(model, sample: Sample, max_new_tokens: int = 50, stop: str | None = "\n", dedup: bool = False) -> Trial:
    """Let the model answer one sample and watch its heads.

    Args:
        dedup: count a position copied twice once, as the paper's formula |g intersect k| / |k| reads. The
            released code counts every copy, so that a score can pass 1; so does the default here.
    """
    ids, span = sample.ids.to(model.device), sample.span
    shape = (model.anatomy.n_layers, model.anatomy.n_heads)
    length = span[1] - span[0]
    counts = torch.zeros(*shape, length)  # copies of each answer token
    needle, first, tokens = torch.zeros(shape), torch.zeros(shape), []
    for step in decode_rows(model, ids, max_new_tokens, stop):
        hits = copy_steps(step.rows, step.token, ids, span).cpu()
        offset = (step.rows.argmax(-1).cpu() - span[0]).clamp(0, length - 1)
        counts.scatter_add_(-1, offset[..., None], hits[..., None].float())
        needle += step.rows[..., span[0] : span[1]].sum(-1).float().cpu()
        first += step.rows[..., 0].float().cpu()
        tokens.append(step.token)
    response = model.tokenizer.decode(tokens)
    copies = (counts.clamp(max=1) if dedup else counts).sum(-1) / length
    n = max(len(tokens), 1)
    return Trial(sample, response, rouge1_recall(response, sample.answer), copies.numpy(), (needle / n).numpy(), (first / n).numpy())


def retrieval_scores(model, samples: list[Sample], max_new_tokens: int = 50, stop: str | None = "\n", dedup: bool = False,
                     name: str = "retrieval score", progress: bool = True) -> Retrieval:  # fmt: skip
    """Retrieval scores of every head over needle samples; see `trial` for the parameters."""
    bar = tqdm(samples, desc=name, unit="sample", disable=None if progress else True)
    return Retrieval([trial(model, sample, max_new_tokens, stop, dedup) for sample in bar], name)
