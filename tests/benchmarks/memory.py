"""Reading attention while decoding: `heads.decode_rows` against eager attention that returns all weights.

The peer is plain transformers with `output_attentions=True` from the start, which materialises
`[head, position, position]` in every layer; it runs where that fits into 8 GB, and elsewhere the record says what it would
need. Fair: the same weights, tokens and greedy choice, 8 tokens; both compute the logits of the last position only. Peak
memory is above the loaded model, each size in a fresh process.
"""

from __future__ import annotations

import numpy as np
import torch

import heads
from heads import plot
from tests.benchmarks.common import GB, eager_weights_bytes, exponent, fresh, ours, peak_above, plain, row, samples, write

TOKENS = 8
LIMIT = 8 * GB
PEER = "plain transformers, eager attention with the weights of all layers returned"


def prompt(length: int) -> torch.Tensor:
    """Exactly `length` tokens of a haystack."""
    return samples(1, length + 200)[0].ids[:, :length]


def read_rows(model, ids):
    """The library's way: the last token and its rows `[layer, head, key]`."""
    for step in heads.decode_rows(model, ids, TOKENS, stop=None):
        pass
    return step.token, step.rows


@torch.no_grad()
def eager_rows(module, ids):
    """The peer's way, to the same result."""
    out = module(ids, use_cache=True, logits_to_keep=1, output_attentions=True)
    for _ in range(TOKENS - 1):
        last = out.logits[:, -1:].argmax(-1)
        out = module(last, past_key_values=out.past_key_values, use_cache=True, output_attentions=True)
    return out.logits[:, -1:].argmax().item(), torch.stack([weights[0, :, -1] for weights in out.attentions])


def peak(length: int, way: str) -> tuple[int, int, np.ndarray]:
    """(bytes, last token, its attention rows) of one way in this process."""
    ids = prompt(length)
    if way == "ours":
        model, function = ours(), read_rows
    else:
        model, function = plain(), eager_rows
        model.set_attn_implementation("eager")
    function(model, ids[:, :64])
    size, (token, rows) = peak_above(function, model, ids)
    return size, token, rows.numpy()


def run(quick: bool = False) -> dict:
    lengths = (128, 256, 512) if quick else (1024, 2048, 4096, 8000)  # the model's context holds 8192
    sizes = []
    for length in lengths:
        size, token, rows = fresh(peak, length, "ours")
        needs = eager_weights_bytes(length)
        more = {"kv_cache_and_rest_bytes_per_token": size / length, "eager_weights_bytes": needs}
        if needs > LIMIT:
            sizes.append(row(length, size, None, None, **more, peer_state=f"not run: would need {needs / GB:.1f} GB"))
            continue
        other, other_token, other_rows = fresh(peak, length, "eager")
        difference = float(np.abs(rows - other_rows).max())
        sizes.append(row(length, size, other, difference, **more, same_token=token == other_token, peer_state="run"))
    both = [s for s in sizes if s["peer"]]
    growth = {
        "ours": exponent([s["size"] for s in sizes], [s["ours"] for s in sizes]),
        "peer": exponent([s["size"] for s in both], [s["peer"] for s in both]),
    }
    fig, data = draw(sizes, growth)
    return write("memory", fig, data, quick, unit="bytes above the loaded model", peer_is=PEER, sizes=sizes, exponent=growth,
                 equal_to="attention rows of the last decoded token, every layer and head")  # fmt: skip


def draw(sizes: list[dict], growth: dict):
    """Peak memory over context, both axes logarithmic; open markers are what the peer would need at least."""
    plot.style()
    fig, ax = plot.plt.subplots(figsize=(8, 4.8))
    blue, grey = plot.COLORS["blue"], "#5F5F5F"
    run = [s for s in sizes if s["peer"]]
    ax.plot([s["size"] for s in sizes], [s["ours"] / GB for s in sizes], "o-", color=blue,
            label=f"heads: grows as n^{growth['ours']:.2f}")  # fmt: skip
    ax.plot([s["size"] for s in run], [s["peer"] / GB for s in run], "D-", color=grey,
            label=f"eager, weights returned: grows as n^{growth['peer']:.2f}")  # fmt: skip
    if len(run) < len(sizes):
        tail = sizes[len(run) - 1 :]
        needs = [run[-1]["peer"] / GB, *(s["eager_weights_bytes"] / GB for s in tail[1:])]
        ax.plot([s["size"] for s in tail], needs, "D:", color=grey, markerfacecolor="white", zorder=1,
                label="not run: its weights alone")  # fmt: skip
    fig.legend(loc="outside lower center", ncols=1)
    ax.set(xscale="log", yscale="log", xlabel="context n (tokens)", ylabel="GB above the loaded model",
           title="Peak memory of reading attention while decoding")  # fmt: skip
    ax.set_xticks([s["size"] for s in sizes], [f"{s['size']:,}" for s in sizes])
    ax.minorticks_off()
    data = [{"tokens": s["size"], "heads_bytes": s["ours"], "eager_bytes": s["peer"],
             "eager_weights_bytes": s["eager_weights_bytes"]} for s in sizes]  # fmt: skip
    return fig, plot.pd.DataFrame(data)
