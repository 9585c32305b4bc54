"""Retrieval detection: `heads.retrieval_scores` against the way the paper's released code works.

The released code prefills the prompt but its last token with a fast kernel, then decodes with the full attention
weights of every layer returned at each step, and asks every head in a Python loop where it looked. `released` is
that, written here against plain transformers from its description. `eager` is what `output_attentions=True` from the
start means: the prompt too goes through eager attention and returns `[head, position, position]` for every layer.

Fair: the same weights, prompts, stop rule and greedy choice; all compute the logits of the last position only, which
spares the peers a matrix of prompt x vocabulary; times are interleaved, medians over repeats and samples. Peak memory is
that of one sample, above the loaded model, each in a fresh process.
"""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import torch

import heads
from heads import decode, plot
from tests.benchmarks.common import GB, fresh, median, ours, peak_above, plain, row, samples, timed, write

TOKENS = 20
WAYS = ("ours", "released", "eager")
LABELS = {"ours": "heads", "released": "released way", "eager": "eager everywhere"}
PEER = "full attention weights returned at every decode step, after a prefill through SDPA, as the paper's released code does"


def run_ours(model, sample) -> dict:
    """The library's detection; its prefill is timed where it happens."""
    seconds = []

    def prefill(*args):
        spent, cache = timed(decode.prefill.__wrapped__, *args)
        seconds.append(spent)
        return cache

    prefill.__wrapped__ = decode.prefill
    with mock.patch.object(decode, "prefill", prefill):
        total, found = timed(heads.retrieval_scores, model, [sample], TOKENS, progress=False)
    trial = found.trials[0]
    return {"prefill": seconds[0], "decode": total - seconds[0], "scores": trial.copies, "text": trial.response}


@torch.no_grad()
def run_peer(module, tokenizer, sample, way: str) -> dict:
    """The released way, or eager attention with returned weights from the start."""
    ids, (start, end) = sample.ids, sample.span
    layers, n_heads = module.config.num_hidden_layers, module.config.num_attention_heads
    scores, written = np.zeros((layers, n_heads)), []
    begin = time.perf_counter()
    module.set_attn_implementation("eager" if way == "eager" else "sdpa")
    out = module(ids[:, :-1], use_cache=True, logits_to_keep=1, output_attentions=way == "eager")
    prefilled = time.perf_counter()
    module.set_attn_implementation("eager")
    cache, last = out.past_key_values, ids[:, -1:]
    for _ in range(TOKENS):
        out = module(last, past_key_values=cache, use_cache=True, output_attentions=True)
        last = out.logits[:, -1:].argmax(-1)
        token = last.item()
        if token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]):
            break
        written.append(token)
        for layer in range(layers):
            for head in range(n_heads):
                _, best = out.attentions[layer][0][head][-1].topk(1)
                for i in best:
                    if start <= i < end and token == ids[0, i].item():
                        scores[layer, head] += 1 / (end - start)
    seconds = {"prefill": prefilled - begin, "decode": time.perf_counter() - prefilled}
    return {**seconds, "scores": scores, "text": tokenizer.decode(written), "tokens": len(written)}


def times(length: int, n: int, repeats: int) -> dict:
    """Seconds of every way on the same prompts, interleaved; the largest difference of scores."""
    model, module, prompts = ours(), plain(), samples(n, length)
    ways = {
        "ours": lambda sample: run_ours(model, sample),
        "released": lambda sample: run_peer(module, model.tokenizer, sample, "released"),
        "eager": lambda sample: run_peer(module, model.tokenizer, sample, "eager"),
    }
    for way in ways.values():  # first calls fill tables and buffers
        way(samples(1, 200)[0])
    runs = {name: [] for name in ways}
    for repeat in range(repeats):
        for sample in prompts:
            for name, way in ways.items():
                if name != "eager" or repeat == 0:
                    runs[name].append(way(sample))
    differences = {
        name: max(float(np.abs(a["scores"] - b["scores"]).max()) for a, b in zip(runs["ours"], runs[name]))
        for name in ways if name != "ours"
    }  # fmt: skip
    same = all(a["text"] == b["text"] for name in differences for a, b in zip(runs["ours"], runs[name]))
    tokens, prompt = median(r["tokens"] for r in runs["released"]), median(s.ids.shape[1] for s in prompts)
    return {
        "prompt_tokens": prompt,
        "new_tokens": tokens,
        "difference": max(differences.values()),
        "same_text": same,
        "heads_above_zero": int((np.mean([r["scores"] for r in runs["ours"]], 0) > 0).sum()),
        "ways": {
            name: {
                "seconds": median(r["prefill"] + r["decode"] for r in runs[name]),
                "prefill_seconds": (first := median(r["prefill"] for r in runs[name])),
                "decode_seconds": (second := median(r["decode"] for r in runs[name])),
                "prefill_tokens_per_second": prompt / first,
                "decode_tokens_per_second": tokens / second,
                "runs": len(runs[name]),
            }
            for name in ways
        },
    }


def peak(length: int, way: str) -> int:
    """Peak memory of one sample in this process, above the loaded model."""
    sample, short = samples(1, length)[0], samples(1, 200)[0]
    if way == "ours":
        model = ours()
        work = lambda s: run_ours(model, s)  # noqa: E731
    else:
        from transformers import AutoTokenizer

        from heads import models

        module, tokenizer = plain(), AutoTokenizer.from_pretrained(models.fetch())
        work = lambda s: run_peer(module, tokenizer, s, way)  # noqa: E731
    work(short)
    return peak_above(work, sample)[0]


def run(quick: bool = False) -> dict:
    lengths, n, repeats = ((200, 300), 1, 1) if quick else ((512, 1024), 1, 2)
    sizes = []
    for length in lengths:
        found = fresh(times, length, n, repeats)
        for way in WAYS:
            found["ways"][way]["peak_memory_bytes"] = fresh(peak, length, way)
        ways = found["ways"]
        found["eager_ratio"] = ways["eager"]["seconds"] / ways["ours"]["seconds"]
        for phase in ("prefill", "decode"):
            found[f"{phase}_ratio"] = ways["released"][f"{phase}_seconds"] / ways["ours"][f"{phase}_seconds"]
        sizes.append(row(length, ways["ours"]["seconds"], ways["released"]["seconds"], **found))
    fig, data = draw(sizes)
    return write("detect", fig, data, quick, unit="seconds per sample", peer_is=PEER, sizes=sizes,
                 equal_to="retrieval scores of every head, sample by sample, by both peers")  # fmt: skip


def draw(sizes: list[dict]):
    """Seconds per sample by phase, and peak memory."""
    plot.style()
    fig, (left, right) = plot.plt.subplots(1, 2, figsize=(11, 4.4))
    colors = dict(zip(WAYS, (plot.COLORS["blue"], plot.COLORS["orange"], plot.GREY)))
    data = []
    for i, size in enumerate(sizes):
        for j, way in enumerate(WAYS):
            this, x = size["ways"][way], i + (j - 1) * 0.27
            left.bar(x, this["prefill_seconds"], 0.25, color=colors[way], alpha=0.45)
            left.bar(x, this["decode_seconds"], 0.25, bottom=this["prefill_seconds"], color=colors[way])
            right.bar(x, this["peak_memory_bytes"] / GB, 0.25, color=colors[way], label=None if i else LABELS[way])
            memory = this["peak_memory_bytes"] / GB
            right.text(x, memory, f"{memory:.2g}", ha="center", va="bottom", fontsize=10)
            data.append({"tokens": size["size"], "way": LABELS[way], **this})
    for ax, label in ((left, "seconds per sample"), (right, "GB above the loaded model")):
        ax.set_xticks(range(len(sizes)), [size["size"] for size in sizes])
        ax.set(xlabel="prompt (tokens)", ylabel=label)
        ax.grid(False, axis="x")
    left.set_title("Time: pale prefill, full colour decoding")
    right.set_title("Peak memory")
    right.legend(loc="upper left")
    return fig, plot.pd.DataFrame(data)
