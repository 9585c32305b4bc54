"""Decoding from a cache that forgets by heads, against caches that keep everything and against kvpress.

    DynamicCache, StaticCache    plain transformers with SDPA, nothing forgotten
    all kept                     heads.HeadCache that keeps everything: what the storage alone costs
    razor, adakv, snapkv         heads.HeadCache at a third (0.33) of the bytes, room for new tokens included
    kvpress ...                  its presses at the same share, where kvpress is installed

Fair: the same weights, prompts and steps. Decoding takes turns step by step, so that a busy moment meets every way, and a
multiple is the median over the steps of the quotient of two neighbours. Some ways read each prompt once more in a process of
their own, for seconds and peak. `ratio` is the decoding speed of razor over that of DynamicCache. Set before it was measured:
all kept at least 0.95 of DynamicCache at every length; a third kept at the longest at least 1.5 of DynamicCache and 1.2 of
StaticCache; bytes within 2 % of the share with its room.

kvpress needs an older transformers: `python -m tests.benchmarks caches` in an environment with kvpress 0.5.4, transformers
below 5.3 and this package writes a record of its own, `caches-kvpress`, in which ours ran under that transformers, too.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import nullcontext

import torch
from transformers import DynamicCache, StaticCache

import heads
from heads import plot
from tests.benchmarks.common import fresh, median, ours, peak_above, row, samples, timed, write

STEPS, ROOM, SHARE = 32, 64, 0.33
READ = ("DynamicCache", "StaticCache", "all kept", "razor", "kvpress AdaKV")  # in a process of its own each
PRESSES = {"kvpress StreamingLLM": "StreamingLLMPress", "kvpress SnapKV": "SnapKVPress", "kvpress AdaKV": "AdaKVPress",
           "kvpress CriticalAdaKV": "CriticalAdaKVPress", "kvpress KVzip": "KVzipPress"}  # fmt: skip


def policies(model) -> dict:
    """Name -> (policy, share)."""
    echo, induction = heads.echo_and_induction(model)
    groups = [heads.by_kv_head(scores, model) for scores in (induction, echo)]
    full = {*groups[0].top(round(0.14 * len(groups[0]))), *groups[1].top(1)}
    given = heads.policies
    return {"all kept": (given.everything, 1.0), "razor": (given.razor(full), SHARE), "snapkv": (given.observed(), SHARE),
            "adakv": (given.observed(shared=True), SHARE), "recent": (given.recent(), SHARE)}  # fmt: skip


def press(name: str):
    """A press of kvpress that drops what a share of SHARE leaves to drop."""
    kvpress = importlib.import_module("kvpress")  # in an environment of its own
    snap = kvpress.SnapKVPress(compression_ratio=1 - SHARE, window_size=32, kernel_size=7)
    if name.startswith(("Ada", "CriticalAda")):
        return getattr(kvpress, name)(snap)
    return snap if name == "SnapKVPress" else getattr(kvpress, name)(compression_ratio=1 - SHARE)


def ways() -> list[str]:
    names = ["DynamicCache", "StaticCache", "all kept", "razor", "snapkv", "adakv", "recent"]
    return names + (list(PRESSES) if importlib.util.find_spec("kvpress") else [])


class Way:
    """How one way reads a prompt and goes on."""

    def __init__(self, model, name: str, chosen: dict):
        self.module, self.name, self.model, self.policy = model._module, name, model, chosen.get(name)

    def cache(self, length: int):
        if self.policy:
            return heads.HeadCache(self.model, *self.policy, room=ROOM)
        if self.name == "StaticCache":
            return StaticCache(self.module.config, max_cache_len=length + ROOM)
        return DynamicCache()

    def turn(self):
        """Its attention is the model's from now on; no part of what is timed in decoding."""
        self.module.set_attn_implementation("heads" if self.policy else "sdpa")

    @torch.no_grad()
    def read(self, ids):
        self.turn()
        cache = self.cache(ids.shape[1])
        with press(PRESSES[self.name])(self.module) if self.name in PRESSES else nullcontext():
            logits = self.module(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return cache, logits, ids.shape[1]

    @torch.no_grad()
    def go_on(self, state, ids=None):
        """(cache, logits, length) after these tokens, or after the likeliest one; positions count from the prompt's length."""
        cache, logits, length = state
        part = logits[:, -1:].argmax(-1) if ids is None else ids
        at = torch.arange(length, length + part.shape[1])[None]
        return cache, self.module(part, past_key_values=cache, position_ids=at, use_cache=True).logits, length + part.shape[1]


def held(cache) -> int:
    """Bytes of keys and values."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def times(length: int) -> dict:
    """Seconds of every step of every way, in turns, and the bytes that each holds when the prompt is read."""
    model, ids = ours(), samples(1, length)[0].ids[:, :length]
    chosen = policies(model)
    found = {name: Way(model, name, chosen) for name in ways()}
    states = {name: way.read(ids) for name, way in found.items()}
    size, seconds = {name: held(state[0]) for name, state in states.items()}, {name: [] for name in found}
    for i in range(STEPS + 2):
        for name, way in found.items():
            way.turn()
            took, states[name] = timed(way.go_on, states[name])
            if i > 1:  # the first two warm up
                seconds[name].append(took)
    return {name: {"seconds": seconds[name], "bytes": size[name]} for name in found} | {"tokens": ids.shape[1]}


def times_of(ways: dict, peer: str) -> dict:
    """How many times as fast as the peer each way decodes: median over the steps of the quotient in one turn."""
    return {n: median([p / own for p, own in zip(ways[peer]["seconds"], way["seconds"])]) for n, way in ways.items()}


def reading(length: int, name: str) -> tuple[int, float]:
    """Peak of reading the prompt, above the loaded model, and its seconds."""
    model, ids = ours(), samples(1, length)[0].ids[:, :length]
    way, short = Way(model, name, policies(model)), samples(1, 600)[0].ids
    way.read(short)
    top, (seconds, _) = peak_above(timed, way.read, ids)
    return top, seconds


def accuracy(prompts: int, length: int) -> dict:
    """Share of the gold answer's tokens that are right and its NLL, the context cut before the question is known."""
    model, needles = ours(), samples(prompts, length)
    found, chosen = {}, policies(model)
    for name in ways():
        way, right, losses = Way(model, name, chosen), [], []
        for sample in needles:
            split, answer = sample.ids.shape[1] - 24, sample.answer_ids
            rest = torch.cat([sample.ids[:, split:], answer[None, :-1]], 1)
            logits = way.go_on(way.read(sample.ids[:, :split]), rest)[1][0, -len(answer) :]
            right.append((logits.argmax(-1) == answer).float().mean().item())
            losses.append(-logits.log_softmax(-1).gather(1, answer[:, None]).mean().item())
        found[name] = {"token_accuracy": sum(right) / prompts, "nll": sum(losses) / prompts}
    return found


def agree(length: int) -> float:
    """Largest difference of the logits from their masked twins, over policies, for 24 tokens at once."""
    model, ids = ours(), samples(1, length)[0].ids
    chosen = policies(model)
    masked = heads.MaskedPrefix(model, ids[:, :-24], *zip(*chosen.values()), room=ROOM)
    model._module.set_attn_implementation("heads")
    with torch.no_grad():
        twin = model._module(ids[:, -24:].repeat(len(chosen), 1), past_key_values=masked.cache()).logits
    differences = []
    for name, theirs in zip(chosen, twin):
        way = Way(model, name, chosen)
        differences.append((way.go_on(way.read(ids[:, :-24]), ids[:, -24:])[1] - theirs).abs().max().item())
    return max(differences)


def run(quick: bool = False) -> dict:
    lengths, prompts = ((600, 700), 1) if quick else ((1000, 2000, 4000, 8000), 12)
    sizes, difference = [], fresh(agree, 700)
    for length in lengths:
        found = fresh(times, length)
        tokens = found.pop("tokens")
        dynamic, static = times_of(found, "DynamicCache"), times_of(found, "StaticCache")
        for name, way in found.items():
            way["prefill_peak_bytes"], seconds = fresh(reading, length, name) if name in READ else (None, None)
            way |= {"prefill_tokens_per_second": tokens / seconds if seconds else None,
                    "decode_tokens_per_second": 1 / median(way.pop("seconds")),
                    "share_of_bytes": way["bytes"] / (found["DynamicCache"]["bytes"] * (tokens + ROOM) / tokens)}  # fmt: skip
        step = 1 / found["DynamicCache"]["decode_tokens_per_second"]
        sizes.append(row(tokens, step / dynamic["razor"], step, difference if length == lengths[0] else None,
                         ways=found, times_dynamic=dynamic, times_static=static))  # fmt: skip
    fig, data = draw(sizes)
    name = "caches-kvpress" if importlib.util.find_spec("kvpress") else "caches"
    return write(name, fig, data, quick, unit="seconds for a token", peer_is="DynamicCache with SDPA in plain transformers",
                 equal_to="the logits of the masked twins", sizes=sizes, accuracy=fresh(accuracy, prompts, 600))  # fmt: skip


def draw(sizes: list[dict]):
    """Decoding speed as a multiple of DynamicCache, and bytes held, by length."""
    plot.style()
    fig, axes = plot.plt.subplots(1, 2, figsize=(11, 4.6))
    names = list(sizes[0]["ways"])
    colors = dict(zip(names, [plot.GREY, "#333333", *plot.COLORS.values(), *plot.COLORS.values()]))
    tokens = [size["size"] for size in sizes]
    for name in names:
        style = dict(color=colors[name], marker="o", label=name, ls="--" if name in PRESSES else "-")
        axes[0].plot(tokens, [size["times_dynamic"][name] for size in sizes], **style)
        axes[1].plot(tokens, [size["ways"][name]["share_of_bytes"] for size in sizes], **style)
    axes[0].set(title="Decoding speed", xlabel="prompt (tokens)", ylabel="times DynamicCache", ylim=(0, None))
    axes[1].set(title="Bytes held, room included", xlabel="prompt (tokens)", ylabel="share of a whole cache", ylim=(0, 1.1))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    data = [{"tokens": s["size"], "way": n, "times_dynamic": s["times_dynamic"][n], **s["ways"][n]} for s in sizes for n in names]
    return fig, plot.pd.DataFrame(data)
