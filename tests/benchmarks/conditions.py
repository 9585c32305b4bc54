"""Sixteen ablations of one prompt: `heads.Conditions` against running them one by one.

Conditions: none, the top 14 retrieval heads, and 14 random sets matched by layer, masked while decoding (kind
`uniform`). Each scores a gold answer and writes 20 tokens. The peers run `heads.ablate` with a plain KV cache and SDPA:

    alone    one condition at a time, each with a prefill of its own
    copied   one condition at a time; the prompt is prefilled once and its cache copied for each
    repeated all conditions as one batch; the prompt is prefilled once and its cache repeated for each row

Fair: the same model and edits; no way stops before 20 tokens unless the text ends; times are interleaved. `ours` and
`repeated` are medians of whole runs; one at a time every condition costs the same, so those are 16 times the
median condition (`alone` is timed on every fourth), plus the one prefill of `copied`. Peak memory is
above the loaded model, each way in a fresh process; one at a time the peak does not depend on how many follow, so two are run.
"""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache

import heads
from heads import plot
from tests.benchmarks.common import GB, fresh, median, ours, peak_above, row, samples, timed, write

TOKENS = 20
WAYS = ("ours", "copied", "alone", "repeated")
LABELS = {"ours": "heads", "copied": "one by one, prefix copied", "alone": "one by one", "repeated": "one batch, prefix repeated"}
PEER = "one by one with heads.ablate, each condition with a prefill of its own"


def choose(n_random: int) -> dict[str, list]:
    """The conditions: none, the top retrieval heads of two short samples, random sets matched by layer."""
    model = ours()
    top = heads.retrieval_scores(model, samples(2, 256), 12, progress=False).mean.top(14)
    shape = (model.anatomy.n_layers, model.anatomy.n_heads)
    controls = heads.random_heads(top, shape, match="near", n_sets=n_random)
    return {"none": [], "top": top, **{f"random {i}": chosen for i, chosen in enumerate(controls)}}


def batch(model, sample, sets: dict) -> dict:
    """The library's way: name -> (log-probabilities of the gold answer, text)."""
    conditions = heads.Conditions(model, sample.ids, sets)
    scores, texts = conditions.score(sample.answer_ids), conditions.generate(TOKENS, stop=None)
    return {name: (scores[name].logprob, texts[name]) for name in sets}


def by_hand(model, sample, sets: dict, prefix: DynamicCache | None = None) -> dict:
    """The same with a plain cache: one row for each set; without a prefix the prompt is prefilled by the edited model."""
    edited, n = heads.ablate(model, [list(s) for s in sets.values()], "uniform", phase="decode", prompt=sample.ids.shape[1]), len(sets)
    cache = DynamicCache() if prefix is None else copy.deepcopy(prefix)
    if n > 1:
        cache.batch_repeat_interleave(n)

    def forward(ids):
        with torch.no_grad(), edited.trace(input_ids=ids, past_key_values=cache, use_cache=True):
            logits = edited.logits.save()
        return logits

    prompt = sample.ids if prefix is None else sample.ids[:, -1:]
    with torch.no_grad(), edited.trace(input_ids=prompt.expand(n, -1), past_key_values=cache, use_cache=True, logits_to_keep=1):
        first = edited.logits.save()
    answer = sample.answer_ids
    logprobs = torch.cat([first, forward(answer[:-1].expand(n, -1))], 1).log_softmax(-1)
    gold = logprobs.gather(-1, answer.expand(n, -1)[..., None]).squeeze(-1)
    cache.crop(1 - len(answer))  # back to the end of the prompt
    last, eos = first.argmax(-1), model._module.generation_config.eos_token_id
    written, live = [[] for _ in sets], set(range(n))
    for i in range(TOKENS):
        live = {r for r in live if last[r].item() != eos}
        for r in live:
            written[r].append(last[r].item())
        if not live or i == TOKENS - 1:
            break
        last = forward(last)[:, -1:].argmax(-1)
    return {name: (gold[r], model.tokenizer.decode(written[r])) for r, name in enumerate(sets)}


def start(model, sample):
    return heads.prefill(model, sample.ids[:, :-1])


def repeated(model, sample, sets: dict) -> dict:
    return by_hand(model, sample, sets, start(model, sample))


def times(length: int, sets: dict) -> dict:
    """Seconds of every way, interleaved, and how far their results are apart."""
    model, sample, short = ours(), samples(1, length)[0], samples(1, 200)[0]
    two = dict(list(sets.items())[:2])
    batch(model, short, two), repeated(model, short, two)  # warm up
    seconds, results = {name: [] for name in (*WAYS, "prefill")}, {name: {} for name in WAYS}

    def clock(way, function, *args):
        spent, result = timed(function, model, sample, *args)
        seconds[way].append(spent)
        return result

    prefix = None
    for i, (name, chosen) in enumerate(sets.items()):
        if i % (len(sets) // 2) == 0:
            results["ours"] = clock("ours", batch, sets)
            results["repeated"] = clock("repeated", repeated, sets)
            prefix = clock("prefill", start)
        results["copied"] |= clock("copied", by_hand, {name: chosen}, prefix)
        if i % 4 == 0:
            results["alone"] |= clock("alone", by_hand, {name: chosen})
    clock("ours", batch, sets)
    total = {way: median(seconds[way]) for way in WAYS}
    total["alone"] *= len(sets)
    total["copied"] = total["copied"] * len(sets) + median(seconds["prefill"])
    tokens = len(sets) * (TOKENS + len(sample.answer_ids))
    return {
        "conditions": len(sets),
        "prompt_tokens": sample.ids.shape[1],
        "difference": max(apart(results["ours"], results[way]) for way in WAYS[1:]),
        "same_text": all(results["ours"][n][1] == text for way in WAYS[1:] for n, (_, text) in results[way].items()),
        "ways": {way: {"seconds": total[way], "tokens_per_second": tokens / total[way], "runs": len(seconds[way])} for way in WAYS},
    }


def apart(ours: dict, theirs: dict) -> float:
    """Largest difference of a log-probability, in nats."""
    return max((ours[name][0] - logprobs).abs().max().item() for name, (logprobs, _) in theirs.items())


def peak(length: int, sets: dict, way: str) -> int:
    """Peak memory in this process, above the loaded model."""
    model, sample, short = ours(), samples(1, length)[0], samples(1, 200)[0]
    two = dict(list(sets.items())[:2])

    def work(sample):
        if way in ("ours", "repeated"):
            (batch if way == "ours" else repeated)(model, sample, sets)
            return
        prefix = start(model, sample) if way == "copied" else None
        for name, chosen in two.items():
            by_hand(model, sample, {name: chosen}, prefix)

    batch(model, short, two)
    return peak_above(work, sample)[0]


def run(quick: bool = False) -> dict:
    lengths, n_random = ((200, 300), 2) if quick else ((512, 1024), 14)
    sets, sizes = fresh(choose, n_random), []
    for length in lengths:
        found = fresh(times, length, sets)
        for way in WAYS:
            found["ways"][way]["peak_memory_bytes"] = fresh(peak, length, sets, way)
        seconds = {way: found["ways"][way]["seconds"] for way in WAYS}
        found["copied_ratio"] = seconds["copied"] / seconds["ours"]
        found["repeated_ratio"] = seconds["repeated"] / seconds["ours"]
        sizes.append(row(length, seconds["ours"], seconds["alone"], **found))
    fig, data = draw(sizes)
    return write("conditions", fig, data, quick, unit=f"seconds for {len(sets)} conditions", peer_is=PEER, sizes=sizes,
                 equal_to="log-probabilities of the gold answer in every condition, by all peers")  # fmt: skip


def draw(sizes: list[dict]):
    """Seconds for all conditions, and peak memory, by length."""
    plot.style()
    fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4.6))
    colors = dict(zip(WAYS, (plot.COLORS["blue"], plot.COLORS["orange"], plot.GREY, plot.COLORS["purple"])))
    tokens = [size["size"] for size in sizes]
    for ax, key, unit in ((axes[0], "seconds", 1), (axes[1], "peak_memory_bytes", GB)):
        for way, marker in zip(WAYS, "osD^"):
            values = [size["ways"][way][key] / unit for size in sizes]
            ax.plot(tokens, values, color=colors[way], marker=marker, label=LABELS[way], zorder=3 if way == "ours" else 2)
        ax.set(xlabel="prompt (tokens)", ylim=(0, None), xticks=tokens)
    axes[0].set(title="Time", ylabel=f"seconds for {sizes[0]['conditions']} conditions")
    axes[1].set(title="Peak memory", ylabel="GB above the loaded model")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    data = [{"tokens": s["size"], "way": LABELS[way], **s["ways"][way]} for s in sizes for way in WAYS]
    return fig, plot.pd.DataFrame(data)
