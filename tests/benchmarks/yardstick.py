"""How fast this machine is: what the seconds of the notebooks are held against.

Machines of one kind differ (two runs of one commit, on two machines of two cores each, took 13 and 22 minutes), so a budget
in seconds says nothing unless it says on which. This is one forward of plain transformers over 512 tokens of the default
model, float32 on two threads: nothing of heads, as much a part of every notebook on a language model as arithmetic can be.
`tests/test_notebooks.py` divides by it. Run it on the machine that ran `make refresh`, with nothing else running.
"""

from __future__ import annotations

import torch

from heads import plot
from tests.benchmarks.common import THREADS, fresh, median, plain, row, timed, write

TOKENS = 512


@torch.no_grad()
def forward(repeats: int) -> list[float]:
    """Seconds of each of so many forwards, after two that do not count."""
    module, ids = plain(), torch.randint(5, 40_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return [timed(module, input_ids=ids, use_cache=False, logits_to_keep=1)[0] for _ in range(repeats + 2)][2:]


def run(quick: bool = False) -> dict:
    seconds = fresh(forward, 3 if quick else 25)
    plot.style()
    fig, ax = plot.plt.subplots(figsize=(6, 3))
    ax.plot(range(1, len(seconds) + 1), seconds, "o", color=plot.COLORS["blue"])
    ax.axhline(median(seconds), color=plot.GREY, lw=1)
    ax.set(xlabel="forward", ylabel=f"seconds for {TOKENS} tokens", ylim=(0, None), title=f"median {median(seconds):.3f} s")
    return write("yardstick", fig, {"forward": range(1, len(seconds) + 1), "seconds": seconds}, quick, unit="seconds",
                 peer_is="nobody: plain transformers alone", equal_to="itself", threads=THREADS,
                 sizes=[row(TOKENS, median(seconds), None, 0.0, fastest=min(seconds), slowest=max(seconds))])  # fmt: skip
