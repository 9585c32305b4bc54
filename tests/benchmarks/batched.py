"""Many small attention layers trained as one tensor program, against a loop that trains one layer after the other.

Models: the one-layer attention models of notebook 41 (d = 5, 40 examples, 256 prompts a step), with 1, 2, 4 and 8 heads
for every stream of prompts. `ours` is the notebook's own code, taken from its cells. The peer is the usual way to write it:
one torch module of four linear layers for each model, with an Adam of its own. That code also computes keys and values that
the notebook never needs, so `same_code` is the notebook's code itself, called for one model at a time: batching alone.

Fair: both start from the same weights, see the same prompts (drawn beforehand, not timed), and take the same steps;
times are interleaved medians. Equal: every weight matrix after those steps.
"""

from __future__ import annotations

import sys
import types

import torch

from heads import plot
from tests.benchmarks.common import THREADS, fresh, median, row, timed, write
from tests.cells import run_cells

D, LENGTH, BATCH, SIZES, LR = 5, 40, 256, (1, 2, 4, 8), 0.01


class Layer(torch.nn.Module):
    """One model, as one writes it: four linear layers, and attention of the query to the examples."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads, width = n_heads, n_heads * (D + 1)
        self.K, self.Q, self.V = (torch.nn.Linear(D + 1, width, bias=False) for _ in range(3))
        self.O = torch.nn.Linear(width, 1, bias=False)

    def forward(self, examples, query):
        """[batch, position, d + 1] and [batch, d] -> [batch]."""
        query = torch.nn.functional.pad(query, (0, 1))
        k, v = (f(examples).unflatten(-1, (self.n_heads, D + 1)) for f in (self.K, self.V))
        q = self.Q(query).unflatten(-1, (self.n_heads, D + 1))
        rows = (torch.einsum("bhi,blhi->bhl", q, k) / (D + 1) ** 0.5).softmax(-1)
        return self.O(torch.einsum("bhl,blhi->bhi", rows, v).flatten(1))[:, 0]


def start(streams: int, steps: int):
    """The notebook's layers and prompts, and one plain module for each model with the same weights."""
    sys.modules.setdefault("icl_linear_regression", types.ModuleType("icl_linear_regression"))  # a dataclass asks for it
    book, generator = run_cells("icl-linear-regression", "batched"), torch.Generator().manual_seed(0)
    world = book["World"](torch.eye(D).repeat(streams, 1, 1), torch.full((D, 1), D**-0.5), torch.full((streams, 1), 0.1))
    batches = [book["prompts"](world, BATCH, LENGTH, generator) for _ in range(steps)]
    layers, plain = book["Layers"](streams, SIZES, D, 1, 0, LENGTH, generator), []
    with torch.no_grad():
        for stream in range(streams):
            for i, size in enumerate(SIZES):
                here, one = slice(sum(SIZES[:i]), sum(SIZES[: i + 1])), Layer(size)
                for name in "KQV":
                    getattr(one, name).weight.copy_(getattr(layers, name)[stream, here].flatten(0, 1))
                one.O.weight.copy_(layers.O[stream, here, 0].flatten()[None])
                plain.append((stream, here, one))
    return layers, plain, batches


def together(layers, batches) -> None:
    adam = torch.optim.Adam(layers.parameters(), lr=LR, fused=True)
    for examples, query, target in batches:
        loss = (layers(examples, query) - target[:, :, None]).square().mean((1, 3))
        adam.zero_grad()
        loss.sum().backward()
        adam.step()


def one_by_one(plain, batches) -> None:
    for stream, _, model in plain:
        adam = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
        for examples, query, target in batches:
            loss = (model(examples[stream], query[stream]) - target[stream, :, 0]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()


def alone(layers, plain) -> list:
    """The notebook's layers again, with one model in each: (stream, layers)."""
    singles = []
    for stream, here, one in plain:
        single = type(layers)(1, [one.n_heads], D, 1, 0, LENGTH, torch.Generator())
        with torch.no_grad():
            for name in "KQVO":
                getattr(single, name).copy_(getattr(layers, name)[stream : stream + 1, here])
        singles.append((stream, single))
    return singles


def each_alone(singles, batches) -> None:
    for stream, single in singles:
        together(single, [[part[stream : stream + 1] for part in batch] for batch in batches])


def apart(layers, plain) -> float:
    """Largest difference of a key, query or value weight, over all models."""
    return max((getattr(one, name).weight - getattr(layers, name)[stream, here].flatten(0, 1)).abs().max().item()
               for stream, here, one in plain for name in "KQV")  # fmt: skip


def race(streams: int, steps: int, repeats: int) -> dict:
    """Seconds for all models of both ways, and how far their weights are apart."""
    layers, plain, batches = start(1, 3)
    together(layers, batches), one_by_one(plain, batches)  # warm up
    seconds = {"ours": [], "peer": [], "same": []}
    for _ in range(repeats):
        layers, plain, batches = start(streams, steps)
        seconds["same"].append(timed(each_alone, alone(layers, plain), batches)[0])
        seconds["ours"].append(timed(together, layers, batches)[0])
        seconds["peer"].append(timed(one_by_one, plain, batches)[0])
    ours, peer, same = (median(seconds[way]) for way in ("ours", "peer", "same"))
    more = {"streams": streams, "steps": steps, "same_code": same, "same_code_ratio": same / ours}
    return row(len(plain), ours, peer, apart(layers, plain), **more)


def run(quick: bool = False) -> dict:
    streams, steps, repeats = ((1, 2), 5, 1) if quick else ((1, 2, 4, 8), 30, 3)
    sizes = [fresh(race, n, steps, repeats) for n in streams]
    fig, data = draw(sizes)
    unit = f"seconds for {sizes[0]['steps']} training steps of all models"
    return write("batched", fig, data, quick, unit=unit, sizes=sizes,
                 peer_is="one torch module and one Adam for each model, one after the other",
                 equal_to="key, query and value weights of every model after training", threads=THREADS,
                 model="one layer of attention, d = 5, 1 to 8 heads")  # fmt: skip


def draw(sizes: list[dict]):
    """Milliseconds for one step of one model, by the number of models."""
    plot.style()
    fig, ax = plot.plt.subplots(figsize=(7, 4.4))
    models = [size["size"] for size in sizes]
    ways = ("ours", "peer", "same_code")
    per_step = {way: [1000 * size[way] / size["size"] / size["steps"] for size in sizes] for way in ways}
    ax.plot(models, per_step["peer"], "D-", color=plot.GREY, label="plain modules, one after the other")
    ax.plot(models, per_step["same_code"], "s-", color=plot.COLORS["orange"], label="the same code, one after the other")
    ax.plot(models, per_step["ours"], "o-", color=plot.COLORS["blue"], label="all models as one program")
    ax.set(xscale="log", xlabel="models trained", ylabel="ms per step and model", ylim=(0, None))
    ax.set_title("Training small attention layers")
    ax.set_xticks(models, models)
    ax.minorticks_off()
    fig.legend(loc="outside lower center", ncols=1)
    return fig, plot.pd.DataFrame({"models": models, **{f"{way}_ms": values for way, values in per_step.items()}})
