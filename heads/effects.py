"""Effects: what cutting or patching each head does to a metric, prompt by prompt."""

from __future__ import annotations

import numpy as np

from heads.scores import HeadScores


def _array(x) -> np.ndarray | None:
    return None if x is None else np.asarray(x.detach().cpu().float() if hasattr(x, "detach") else x, float)


class Effects(HeadScores):
    """Head scores that remember their prompts. The score is the mean change of the metric.

    Args:
        samples: `[prompt, layer, head]`, metric of the edited run minus metric of the base run.
        base, source: `[prompt]`, the metric of the base run and, where there is one, of the run that the
            replacements come from.
        mlps: `[prompt, layer]`, the same for MLPs, where they were senders.

    Raises:
        ValueError: if shapes disagree.
    """

    def __init__(self, samples, base, source=None, name: str = "change of logit difference", mlps=None):
        self.samples, self.base, self.source, self.mlp_samples = map(_array, (samples, base, source, mlps))
        if self.samples.ndim != 3 or self.base.shape != self.samples.shape[:1]:
            raise ValueError(
                "effects are [prompt, layer, head] with a base for each prompt, "
                f"got {self.samples.shape} and {self.base.shape}"
            )
        super().__init__(self.samples.mean(0), name)

    @property
    def mlps(self) -> np.ndarray:
        """Mean change for each layer's MLP, `[layer]`. ValueError if MLPs were not senders."""
        if self.mlp_samples is None:
            raise ValueError("MLPs were not among the senders: ask for senders='heads and mlps'")
        return self.mlp_samples.mean(0)

    def gap(self, floor: float = 1.0) -> float:
        """Mean metric of the source run minus that of the base run.

        Raises:
            ValueError: if it is smaller than `floor`, because dividing by it would manufacture effects.
        """
        if self.source is None:
            raise ValueError("nothing to normalise by: this sweep has no source run")
        gap = float(self.source.mean() - self.base.mean())
        if abs(gap) < floor:
            raise ValueError(
                f"base and source differ by {gap:.2g} in {self.name.removeprefix('change of ')}, below the floor of "
                f"{floor:g}: a share of nearly nothing means nothing. Use the raw effects, other prompts, or a lower floor"
            )
        return gap

    def normalised(self, floor: float = 1.0) -> HeadScores:
        """Effect as a share of the gap between source and base: 1 means as if all were patched.

        The ratio of batch means, never a mean of ratios (primitive of Wang et al. 2022 and Merullo et al. 2024).
        """
        return HeadScores(self.values / self.gap(floor), f"{self.name}, share of the gap")

    def relative(self) -> HeadScores:
        """Effect as a share of the base run's mean metric (Zhang et al. 2024)."""
        base = float(self.base.mean())
        if abs(base) < 1e-6:
            raise ValueError("the base run's metric is zero on average: a relative effect is undefined")
        return HeadScores(self.values / base, f"{self.name}, share of the base")

    def magnitude(self) -> HeadScores:
        """The effect without its sign: negative heads belong to a circuit, too."""
        return HeadScores(np.abs(self.values), f"|{self.name}|")

    def interval(self, level: float = 0.95, n: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval of the mean over prompts, `([layer, head], [layer, head])`."""
        rng, prompts = np.random.default_rng(seed), len(self.samples)
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=n) / prompts
        means = np.tensordot(weights, self.samples, axes=1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def halves(self, seed: int = 0) -> tuple[HeadScores, HeadScores]:
        """Scores from two disjoint random halves of the prompts: the ceiling of any comparison."""
        order = np.random.default_rng(seed).permutation(len(self.samples))
        middle = len(order) // 2
        if not middle:
            raise ValueError("one prompt has no halves")
        return tuple(HeadScores(self.samples[part].mean(0), self.name) for part in (order[:middle], order[middle:]))
