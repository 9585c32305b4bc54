"""Retrieval detection: `heads.retrieval_scores` against the way the paper's released code works.

The released code takes one prompt after the other: it prefills all but the last token with a fast kernel, then decodes
with the full attention weights of every layer returned at each step, and asks every head in a Python loop where it
looked. `released` is that, written here against plain transformers from its description. `eager` is what
`output_attentions=True` from the start means: the prompt too goes through eager attention and returns
`[head, position, position]` for every layer. `ours` prefills one prompt after the other as well, but decodes all of
them as one batch; `alone` is ours with `batch_tokens=0`, one by one.

Fair: the same weights, prompts and greedy choice; the paper's 50 new tokens for everybody, with the stop rule and the end
of text off, so that all decode the same number; all compute the logits of the last position only, which spares the peers
a matrix of prompt x vocabulary. There are as many samples as `retrieval_scores` takes into one batch by default (8192
tokens): a study has hundreds, so its batches are full. Times are means over samples and medians over repeats, the ways
taken in turn; eager runs one sample. Peak memory is that of all samples for ours and for `generate`, and of one for the
others, who hold one at a time; above the loaded model, each in a fresh process.

`generate` is the true bound: plain transformers' `generate` of the same batch and the same tokens, padded, through SDPA,
which scores nothing; `over_generate` is our time over its.

What cannot shrink: prefill is the same work for both and bound by arithmetic, so `ratio_limit`, the released way's total
over its prefill alone, is what a decoder that costs nothing would reach.
"""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import torch

import heads
from heads import plot
from heads.lab import decoding as decode
from tests.benchmarks.common import GB, fresh, median, ours, peak_above, plain, row, samples, timed, write

TOKENS = 50
WAYS = ("ours", "generate", "alone", "released", "eager")
LABELS = {"ours": "heads", "generate": "generate, no scores", "alone": "heads, one by one", "released": "released way", "eager": "eager everywhere"}
PEER = (
    "one prompt at a time, full attention weights returned at every decode step, after a prefill through SDPA, as the "
    "paper's released code does"
)
NOTE = (
    "Prefill is the same arithmetic for both and does not shrink: ratio_limit is the ratio if decoding cost nothing. "
    "Decoding gains decode_ratio, less than the number of samples: the weights are read once for all of them, but a product "
    "with a few rows costs the CPU more than one with a single row, and every sample's own keys and values are still read. "
    "Memory: ours holds the caches of all samples. Ours and alone run the very same prefill: where its times differ, that is "
    "noise."
)


def run_ours(model, prompts, batch_tokens: int = 8192) -> dict:
    """The library's detection, seconds per sample; prefill is timed where it happens."""
    spent, prefill = [], decode.prefill

    def watched(*args):
        seconds, cache = timed(prefill, *args)
        spent.append(seconds)
        return cache

    with mock.patch.object(decode, "prefill", watched):
        total, found = timed(heads.retrieval_scores, model, prompts, TOKENS, None, progress=False, batch_tokens=batch_tokens)
    n, scores, texts = len(prompts), [t.copies for t in found.trials], [t.response for t in found.trials]
    return {"prefill": sum(spent) / n, "decode": (total - sum(spent)) / n, "scores": scores, "texts": texts}


@torch.no_grad()
def run_generate(module, tokenizer, prompts) -> dict:
    """Plain `generate` of all prompts as one padded batch: what the same tokens cost without a score."""
    rows = [sample.ids[0] for sample in prompts]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    module.set_attn_implementation("sdpa")
    begin, stamps = time.perf_counter(), []

    def stamp(ids, scores, **_):
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    out = module.generate(input_ids=batch, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
                          pad_token_id=0, stopping_criteria=[stamp])  # fmt: skip
    n, texts = len(prompts), tokenizer.batch_decode(out[:, batch.shape[1] :])
    return {"prefill": (stamps[0] - begin) / n, "decode": (stamps[-1] - stamps[0]) / n, "scores": None, "texts": texts}


def run_peer(module, tokenizer, prompts, way: str) -> dict:
    """A peer, sample by sample."""
    runs = [one_by_peer(module, tokenizer, sample, way) for sample in prompts]
    times = {phase: float(np.mean([run[phase] for run in runs])) for phase in ("prefill", "decode")}
    return {**times, "scores": [run["scores"] for run in runs], "texts": [run["text"] for run in runs]}


@torch.no_grad()
def one_by_peer(module, tokenizer, sample, way: str) -> dict:
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
        written.append(token)
        for layer in range(layers):
            for head in range(n_heads):
                _, best = out.attentions[layer][0][head][-1].topk(1)
                for i in best:
                    if start <= i < end and token == ids[0, i].item():
                        scores[layer, head] += 1 / (end - start)
    seconds = {"prefill": prefilled - begin, "decode": time.perf_counter() - prefilled}
    return {**seconds, "scores": scores, "text": tokenizer.decode(written)}


def endless(model):
    """The model without an end of text: everybody decodes the same number of tokens."""
    model._module.generation_config.eos_token_id = None
    return model


def times(length: int, n: int, repeats: int) -> dict:
    """Seconds per sample of every way on the same prompts, in turn; the largest difference of scores."""
    model, module, prompts = endless(ours()), plain(), samples(n, length)
    ways = {
        "ours": lambda prompts: run_ours(model, prompts),
        "generate": lambda prompts: run_generate(module, model.tokenizer, prompts),
        "alone": lambda prompts: run_ours(model, prompts, 0),
        "released": lambda prompts: run_peer(module, model.tokenizer, prompts, "released"),
        "eager": lambda prompts: run_peer(module, model.tokenizer, prompts[:1], "eager"),
    }
    for way in ways.values():  # first calls fill tables and buffers
        way(samples(1, 200))
    runs = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            if name in ("ours", "generate", "released") or repeat == 0:
                runs[name].append(way(prompts))
    mine, others = runs["ours"][0], [run for name in ways for run in runs[name]]
    return {
        "samples": n,
        "prompt_tokens": median(s.ids.shape[1] for s in prompts),
        "new_tokens": TOKENS,
        "difference": max(float(np.abs(a - b).max()) for run in others if run["scores"] for a, b in zip(mine["scores"], run["scores"])),
        "same_text": all(a == b for run in others for a, b in zip(mine["texts"], run["texts"])),
        "heads_above_zero": int((np.mean(mine["scores"], 0) > 0).sum()),
        "ways": {
            name: {
                "seconds": median(r["prefill"] + r["decode"] for r in runs[name]),
                "prefill_seconds": median(r["prefill"] for r in runs[name]),
                "decode_seconds": (seconds := median(r["decode"] for r in runs[name])),
                "decode_tokens_per_second": TOKENS / seconds,
                "runs": len(runs[name]),
                "samples": len(runs[name][0]["texts"]),
            }
            for name in ways
        },
    }


def peak(length: int, n: int, way: str) -> int:
    """Peak memory of one way in this process, above the loaded model."""
    prompts = samples(n, length)
    if way in ("ours", "alone"):
        model = endless(ours())
        work = lambda prompts: run_ours(model, prompts, 8192 if way == "ours" else 0)
    else:
        from transformers import AutoTokenizer

        from heads.model import zoo

        module, tokenizer = plain(), AutoTokenizer.from_pretrained(zoo.fetch())
        work = lambda prompts: (run_generate(module, tokenizer, prompts) if way == "generate"
                                else run_peer(module, tokenizer, prompts, way))  # fmt: skip
    work(samples(1, 200))
    return peak_above(work, prompts if way in ("ours", "generate") else prompts[:1])[0]


def run(quick: bool = False) -> dict:
    counts, repeats = ({200: 2, 300: 2}, 1) if quick else ({512: 16, 1024: 8}, 2)  # samples of a full batch
    sizes = []
    for length, n in counts.items():
        found = fresh(times, length, n, repeats)
        for way in WAYS:
            found["ways"][way]["peak_memory_bytes"] = fresh(peak, length, n, way)
        mine, released = found["ways"]["ours"], found["ways"]["released"]
        for way in ("alone", "eager"):
            found[f"{way}_ratio"] = found["ways"][way]["seconds"] / mine["seconds"]
        for phase in ("prefill", "decode"):
            found[f"{phase}_ratio"] = released[f"{phase}_seconds"] / mine[f"{phase}_seconds"]
        found["over_generate"] = mine["seconds"] / found["ways"]["generate"]["seconds"]
        found["ratio_limit"] = released["seconds"] / released["prefill_seconds"]
        sizes.append(row(length, mine["seconds"], released["seconds"], **found))
    fig, data = draw(sizes)
    return write("detect", fig, data, quick, unit="seconds per sample", peer_is=PEER, sizes=sizes, note=NOTE,
                 equal_to="retrieval scores of every head, sample by sample, by all other ways")  # fmt: skip


def draw(sizes: list[dict]):
    """Seconds per sample by phase, and peak memory."""
    plot.style()
    fig, (left, right) = plot.plt.subplots(1, 2, figsize=(11, 4.8))
    blue, orange = plot.COLORS["blue"], plot.COLORS["orange"]
    colors = dict(zip(WAYS, (blue, plot.COLORS["green"], plot.COLORS["sky"], orange, plot.GREY)))
    data = []
    for i, size in enumerate(sizes):
        for j, way in enumerate(WAYS):
            this, x = size["ways"][way], i + (j - 2) * 0.17
            left.bar(x, this["prefill_seconds"], 0.15, color=colors[way], alpha=0.45)
            left.bar(x, this["decode_seconds"], 0.15, bottom=this["prefill_seconds"], color=colors[way])
            left.text(x, this["seconds"], f"{this['seconds']:.1f}", ha="center", va="bottom", fontsize=10)
            memory = this["peak_memory_bytes"] / GB
            right.bar(x, memory, 0.15, color=colors[way], label=None if i else LABELS[way])
            right.text(x, memory, f"{memory:.2g}", ha="center", va="bottom", fontsize=10)
            data.append({"tokens": size["size"], "way": LABELS[way], **this})
    for ax, label in ((left, "seconds per sample"), (right, "GB above the loaded model")):
        ax.set_xticks(range(len(sizes)), [f"{size['size']} ({size['samples']} samples)" for size in sizes])
        ax.set(xlabel="prompt (tokens)", ylabel=label)
        ax.grid(False, axis="x")
    left.set_title("Time: pale prefill, full colour decoding")
    right.set_title(f"Peak memory ({LABELS['ours']}: all samples at once)")
    fig.legend(loc="outside lower center", ncols=len(WAYS))
    return fig, plot.pd.DataFrame(data)
