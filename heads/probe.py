"""Probes: what can be read from each head by a linear classifier, and the directions it reads (ITI, Li et al. 2023)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from heads.names import known
from heads.scores import HeadScores

DIRECTIONS = ("mean", "probe")


@dataclass(frozen=True)
class Probes:
    """One probe for each head.

    Attributes:
        accuracy: share of held-out examples that the head's probe gets right, by cross-validation.
        directions: `[layer, head, d_head]`, unit vectors that point to the examples labelled 1.
        std: `[layer, head]`, standard deviation of the activations along them.
    """

    accuracy: HeadScores
    directions: torch.Tensor
    std: torch.Tensor

    @property
    def vectors(self) -> torch.Tensor:
        """One standard deviation along each direction, `[layer, head, d_head]`: what ITI adds, times its strength.

        `heads.Steering(model, probes.vectors, strength, heads=probes.accuracy.top(k))`
        """
        return self.directions * self.std[..., None]


def fit_probes(z: torch.Tensor, labels, kind: str = "mean", folds: int = 5, seed: int = 0, progress: bool = True) -> Probes:
    """A logistic regression on every head, and a direction from it.

    Args:
        z: `[example, layer, head, d_head]`, for example of `heads.head_activations`.
        labels: 0 or 1 for each example.
        kind: of direction. "mean": from the mean of the examples labelled 0 to that of those labelled 1 (the better
            one in the paper). "probe": the weights of the regression.
        folds: of the cross-validation, stratified and shuffled by `seed`.

    Raises:
        ValueError: labels other than 0 and 1, or fewer than `folds` of one of them; an unknown kind.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    known("direction", kind, DIRECTIONS)
    labels, z = np.asarray(labels), z.detach().float().cpu()
    if z.dim() != 4 or not z.isfinite().all():
        raise ValueError(f"expected finite activations [example, layer, head, d_head], got {list(z.shape)}")
    if len(labels) != len(z) or set(labels.tolist()) - {0, 1}:
        found = sorted(set(labels.tolist()))[:5]
        raise ValueError(f"expected a label, 0 or 1, for each of {len(z)} examples; got {len(labels)}: {found}")
    counts = np.bincount(labels.astype(int), minlength=2)
    if counts.min() < folds:
        raise ValueError(f"{folds} folds need {folds} examples of each label, got {counts.tolist()}")
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    table, directions = np.zeros(z.shape[1:3]), torch.zeros(z.shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        every = list(np.ndindex(*table.shape))
        for layer, head in tqdm(every, desc="probes", unit="head", disable=None if progress else True):
            x = z[:, layer, head].numpy()
            table[layer, head] = cross_val_score(LogisticRegression(), x, labels, cv=splits).mean()
            if kind == "probe":
                directions[layer, head] = torch.tensor(LogisticRegression().fit(x, labels).coef_[0], dtype=torch.float32)
    if kind == "mean":
        directions = z[labels == 1].mean(0) - z[labels == 0].mean(0)
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    std = torch.einsum("nlhd,lhd->nlh", z, directions).std(0)
    return Probes(HeadScores(table, "probe accuracy"), directions, std)
