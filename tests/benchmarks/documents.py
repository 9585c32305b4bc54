"""Losses of many short documents: `heads.score_documents` against one at a time, and against one list of all.

There is one condition, the model as it is: with more, `score_documents` shares the layers below the first edit, and plain
transformers has no such thing. The peers run the same weights:

    loop     one document at a time, streamed from the file: little memory, a forward pass for each
    list     all texts read, tokenised and sorted by length, then batches of as many tokens: fast, and holds everything

Fair: the same file and tokenizer, SDPA, float32, the same budget of tokens in a pass; every way writes a JSON line for each
document. On tiny-llama a pass costs next to nothing, so that reading, batching and writing are what is measured; the
default model shows what is left of it in real use. The loop is timed on the first 1000 documents. Peak memory is above the
loaded model; each way and size has a fresh process.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import heads
from heads import plot
from tests.benchmarks.common import MODEL, fresh, peak_above, row, timed, write

WORDS = "owls lamps brown grey seven doors under a slow river and back again the mill stands still".split()
PEER = "plain transformers, one document at a time"
TOKENS = 4096
LOOP = 1000  # documents that the loop is timed on, at most


def corpus(path: Path, n: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for k in range(n):
            file.write(json.dumps({"id": k, "text": " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))}) + "\n")


@torch.no_grad()
def losses(module, rows: list) -> list[float]:
    """Mean loss of each row of token ids, in one pass padded on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [cross_entropy(logit[: len(row) - 1], torch.tensor(row[1:])).item() for row, logit in zip(rows, logits)]


def loop(module, tokenizer, source, out):
    with open(source) as file, open(out, "w") as written:
        for line in file:
            found = losses(module, [tokenizer(json.loads(line)["text"]).input_ids])
            written.write(json.dumps({"loss_base": found[0]}) + "\n")


def listed(module, tokenizer, source, out):
    rows = [tokenizer(json.loads(line)["text"]).input_ids for line in open(source)]
    order, found, start = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [0.0] * len(rows), 0
    while start < len(order):
        batch = order[start : start + max(1, TOKENS // len(rows[order[start]]))]
        for i, loss in zip(batch, losses(module, [rows[i] for i in batch])):
            found[i] = loss
        start += len(batch)
    Path(out).write_text("".join(json.dumps({"loss_base": loss}) + "\n" for loss in found))


def measured(name: str, n: int, way: str) -> tuple[float, int, list[float]]:
    """(documents per second, peak bytes above the loaded model, the first losses) of one way in this process."""
    lm = heads.load(name, device="cpu", dtype="float32")
    module, tokenizer = lm._module, lm.tokenizer  # the loaded model is transformers' own; a plain call goes past nnsight
    with tempfile.TemporaryDirectory() as folder:
        for count in (8, min(n, LOOP) if way == "loop" else n):  # the first is a warm-up
            source, out = Path(folder) / f"{count}.jsonl", Path(folder) / f"{count}"
            corpus(source, count)
            if way == "ours":
                call = (heads.score_documents, lm, source, out, {"base": []})
                peak, (seconds, _) = peak_above(partial(timed, *call, tokens=TOKENS, progress=False))
            else:
                peak, (seconds, _) = peak_above(timed, {"loop": loop, "list": listed}[way], module, tokenizer, source, out)
        with out.open() as file:
            return count / seconds, peak, [json.loads(line)["loss_base"] for line in islice(file, LOOP)]


def run(quick: bool = False) -> dict:
    plans = [("tiny-llama", 1000), ("tiny-llama", 100_000), (MODEL, 300)]
    plans = [("tiny-llama", 100), ("tiny-llama", 500)] if quick else plans
    sizes = []
    for name, n in plans:
        found = {way: fresh(measured, name, n, way) for way in ("ours", "loop", "list")}
        difference = max(abs(a - b) for way in ("loop", "list") for a, b in zip(found["ours"][2], found[way][2]))
        if difference > 1e-4:
            raise RuntimeError(f"{name}, {n} documents: the losses differ by {difference:.1g}")
        one = row(n, 1000 / found["ours"][0], 1000 / found["loop"][0], difference, model=name)
        for way, (rate, peak, _) in found.items():
            one |= {f"{way}_documents_per_second": rate, f"{way}_peak_bytes": peak}
        sizes.append(one)
    fig, data = draw(sizes)
    return write("documents", fig, data, quick, unit="ms per document", peer_is=PEER, sizes=sizes, tokens_of_a_pass=TOKENS,
                 equal_to="losses of the documents that every way has scored", model="tiny-llama (by size)")  # fmt: skip


def draw(sizes: list[dict]):
    """Documents per second and peak memory, one group of bars for each size."""
    plot.style()
    fig, axes = plot.plt.subplots(1, 2, figsize=(10.5, 4))
    ways = {"ours": ("heads.score_documents", plot.COLORS["blue"]), "list": ("plain, list everything then batch", plot.GREY),
            "loop": ("plain, one at a time", "#D9D9D9")}  # fmt: skip
    x = range(len(sizes))
    for ax, quantity, scale in zip(axes, ("documents_per_second", "peak_bytes"), (1, 1e-6)):
        for k, (way, (label, color)) in enumerate(ways.items()):
            heights = [max(s[f"{way}_{quantity}"] * scale, 1e-3) for s in sizes]
            bars = ax.bar([i + 0.28 * (k - 1) for i in x], heights, 0.26, color=color, label=label)
            ax.bar_label(bars, [f"{h:,.0f}" for h in heights], fontsize=8, padding=2)
        ax.set_xticks(x, [f"{s['size']:,}\n{s['model']}" for s in sizes])
        ax.margins(y=0.12)
    axes[0].set(yscale="log", ylabel="documents per second", title="Speed")
    axes[1].set(ylabel="MB above the loaded model", title="Peak memory")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig, plot.pd.DataFrame(sizes)
