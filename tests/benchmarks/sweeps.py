"""Sweeps over all heads and path patching, against TransformerLens, the naive nnsight loop and the literal passes.

`sweep-end` cuts every head at the last position, `sweep-all` at all positions, `path` patches every head's path to the
logits. 32 prompts of indirect objects. The peers run one head after the other over whole prompts; what a head costs them
does not depend on which head it is, so they are timed on every fifth one and multiplied, and must agree with ours on
those. TransformerLens (the extra `bench`) runs its bridge on the same weights with attention that its hooks need (eager).

The lower bound of `sweep-all` is the arithmetic that exactness cannot avoid, at the matrix-multiply rate measured in the
same run: everything above the edited head's projection at every position, and in the last layer, where only the last
position is read, keys and values of all positions and the rest for one.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from tqdm import tqdm

import heads
from heads import metrics, plot
from heads.model import zoo as models
from tests.benchmarks.common import GB, fresh, median, ours, peak_above, row, timed, write

STRIDE = 5
GROWS = ("at END: layers^2 x heads x prompts, whatever the length; at all positions: times length; the literal loops: layers^2 x heads "
         "x prompts x length, with the unembedding of every position on top")  # fmt: skip


def task(model, n: int):
    return heads.tasks.ioi(model, n, seed=0)


def some(model, stride: int) -> list:
    every = [(layer, head) for layer in range(model.anatomy.n_layers) for head in range(model.anatomy.n_heads)]
    return every[stride // 2 :: stride]


def transformer_lens():
    """TransformerLens on the default model's weights, unchanged."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(models.fetch())
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return TransformerBridge.boot_transformers(
        folder, hf_model=module, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )


def difference(logits, prompts) -> torch.Tensor:
    """Logit difference at the last position of whole logits, `[prompt]`."""
    return metrics.logit_difference(metrics.logit_difference.pick(logits[:, -1], prompts), prompts)


@torch.no_grad()
def lens_loop(lens, prompts, chosen, positions) -> np.ndarray:
    """Zero ablation through TransformerLens's hooks: change of the logit difference, `[head]`."""
    at = slice(None) if positions == "all" else slice(-1, None)
    base, found = difference(lens(prompts.ids), prompts), []
    for layer, head in chosen:

        def cut(z, hook, head=head):
            z[:, at, head] = 0
            return z

        logits = lens.run_with_hooks(prompts.ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", cut)])
        found.append((difference(logits, prompts) - base).mean().item())
    return np.array(found)


@torch.no_grad()
def nnsight_loop(model, prompts, chosen, positions) -> np.ndarray:
    """The same as anyone would write it in nnsight."""
    at = slice(None) if positions == "all" else slice(-1, None)
    with model.trace(input_ids=prompts.ids):
        logits = model.logits.save()
    base, found = difference(logits, prompts), []
    for layer, head in chosen:
        with model.trace(input_ids=prompts.ids):
            model.layers[layer].attn.heads[:, at, head] = 0
            logits = model.logits.save()
        found.append((difference(logits, prompts) - base).mean().item())
    return np.array(found)


def _lens_run(n: int, stride: int, positions: str):
    lens, model = transformer_lens(), ours()
    prompts, chosen = task(model, n), some(model, stride)
    lens_loop(lens, prompts[:2], chosen[:1], positions)  # first calls fill tables and buffers
    seconds, found = timed(lens_loop, lens, prompts, chosen, positions)
    memory = peak_above(lens_loop, lens, prompts, chosen[:2], positions)[0]
    return {"seconds": seconds * model.anatomy.n / len(chosen), "values": found, "peak_memory_bytes": memory}


def _nnsight_run(n: int, stride: int, positions: str):
    model = ours()
    prompts, chosen = task(model, n), some(model, stride)
    nnsight_loop(model, prompts[:2], chosen[:1], positions)
    seconds, found = timed(nnsight_loop, model, prompts, chosen, positions)
    memory = peak_above(nnsight_loop, model, prompts, chosen[:2], positions)[0]
    return {"seconds": seconds * model.anatomy.n / len(chosen), "values": found, "peak_memory_bytes": memory}


def _our_run(n: int, stride: int, positions: str, repeats: int):
    model = ours()
    prompts, chosen = task(model, n), some(model, stride)
    sweep = lambda some_prompts: heads.ablation_scores(model, some_prompts, "zero", positions, progress=False)  # noqa: E731
    sweep(prompts[:2])
    runs = [timed(sweep, prompts) for _ in range(repeats)]
    memory = peak_above(sweep, prompts)[0]
    values = np.array([runs[0][1][head] for head in chosen])
    bound = unavoidable(model, prompts.ids.shape[1], n, positions) / rate(model)
    return {"seconds": median(s for s, _ in runs), "values": values, "peak_memory_bytes": memory, "bound_seconds": bound,
            "tokens": prompts.ids.shape[1]}  # fmt: skip


@torch.no_grad()
def rate(model, rows: int = 8192) -> float:
    """Floating-point operations a second of the multiplication that a pass spends most on, best of five."""
    weight, best = model.layers[0].mlp._module.down_proj.weight, 1e9
    x = torch.randn(rows, weight.shape[1])
    for _ in range(5):
        start = time.perf_counter()
        x @ weight.T
        best = min(best, time.perf_counter() - start)
    return 2 * rows * weight.numel() / best


def unavoidable(model, length: int, n: int, positions: str) -> float:
    """Floating-point operations of a zero sweep that no exact method avoids (Llama-shaped, without norms)."""
    anatomy, config = model.anatomy, model.config.get_text_config()
    d, width, kv = anatomy.d_model, anatomy.n_heads * anatomy.d_head, anatomy.n_kv_heads * anatomy.d_head
    project, key_value, query = d * width, 2 * d * kv, d * width
    mlp = 3 * d * config.intermediate_size
    edited = length if positions == "all" else 1
    attend = 2 * width * (length + 1) / 2 if positions == "all" else 2 * width * length  # causal: half of the pairs
    whole = edited * (query + key_value + attend + project + mlp)
    last = edited * key_value + query + 2 * width * length + project + mlp
    total = 0.0
    for layer in range(anatomy.n_layers):
        above = anatomy.n_layers - 1 - layer
        at_head = (edited if above else 1) * (project + mlp)
        total += at_head + max(above - 1, 0) * whole + (last if above else 0)
    return 2 * total * anatomy.n_heads * n


def _sweep(name: str, positions: str, quick: bool) -> dict:
    n, stride, repeats = (2, 90, 1) if quick else (32, STRIDE, 3 if positions == "END" else 1)
    mine = fresh(_our_run, n, stride, positions, repeats)
    peers = {"TransformerLens": fresh(_lens_run, n, stride, positions)}
    if positions == "END":
        peers["nnsight loop"] = fresh(_nnsight_run, n, stride, positions)
    lens = peers["TransformerLens"]
    differences = {peer: float(np.abs(mine["values"] - found["values"]).max()) for peer, found in peers.items()}
    ways = {"heads": mine, **peers}
    seen = {way: {k: v for k, v in found.items() if k != "values"} for way, found in ways.items()}
    size = row(n, mine["seconds"], lens["seconds"], max(differences.values()), ways=seen, differences=differences,
               times_lower_bound=mine["seconds"] / mine["bound_seconds"], tokens=mine["tokens"])  # fmt: skip
    fig, data = draw(name, ways, mine["bound_seconds"])
    return write(name, fig, data, quick, unit="seconds, all heads", sizes=[size], grows=GROWS, peer_timed_on=f"every {stride}th head",
                 peer_is="TransformerLens 4.3 hooks, one head after the other", equal_to="mean change of the logit difference, head by head")  # fmt: skip


def end(quick: bool = False) -> dict:
    return _sweep("sweep-end", "END", quick)


def everywhere(quick: bool = False) -> dict:
    return _sweep("sweep-all", "all", quick)


def _path_run(n: int, engine: str, stride: int):
    from heads.lab import paths

    model = ours()
    prompts, chosen = task(model, n), some(model, stride if engine == "literal" else 1)
    route, run, silent = paths.Route().check(model, prompts), getattr(paths, engine), tqdm(disable=True)

    def work(some_prompts, senders):
        parts = some_prompts.batches(16)
        return torch.cat([run(model, part, senders, route, metrics.logit_difference, None, silent)[2] for part in parts], -1)

    work(prompts[:2], chosen[:1])
    seconds, values = timed(work, prompts, chosen)
    memory = peak_above(work, prompts, chosen if engine == "fast" else chosen[:2])[0]
    values = {head: values[k].mean().item() for k, head in enumerate(chosen)}
    return {"seconds": seconds * model.anatomy.n / len(chosen), "values": values, "peak_memory_bytes": memory}


def path(quick: bool = False) -> dict:
    n, stride = (2, 90) if quick else (32, STRIDE)
    mine, peer = fresh(_path_run, n, "fast", stride), fresh(_path_run, n, "literal", stride)
    difference = max(abs(mine["values"][head] - value) for head, value in peer["values"].items())
    ways = {"heads": mine, "literal passes": peer}
    seen = {way: {k: v for k, v in found.items() if k != "values"} for way, found in ways.items()}
    fig, data = draw("path", ways)
    return write("path", fig, data, quick, unit="seconds, all heads to the logits", grows=GROWS, peer_timed_on=f"every {stride}th head",
                 sizes=[row(n, mine["seconds"], peer["seconds"], difference, ways=seen)],
                 peer_is="the passes of path patching as defined, one head after the other", equal_to="mean effect of every head")  # fmt: skip


def draw(name: str, ways: dict, bound: float | None = None):
    plot.style()
    fig, (left, right) = plot.plt.subplots(1, 2, figsize=(11, 3.2))
    colors = [plot.COLORS["blue"], plot.COLORS["orange"], plot.GREY]
    for i, (way, found) in enumerate(ways.items()):
        left.barh(i, found["seconds"], color=colors[i])
        left.text(found["seconds"], i, f" {found['seconds']:.3g} s", va="center")
        right.barh(i, found["peak_memory_bytes"] / GB, color=colors[i])
        right.text(found["peak_memory_bytes"] / GB, i, f" {found['peak_memory_bytes'] / GB:.2g} GB", va="center")
    if bound:
        left.axvline(bound, color="black", linestyle="--", linewidth=1.2, label="cannot be avoided")
        left.legend(loc="upper right")
    for ax, label in ((left, "seconds for all heads"), (right, "GB above the loaded model")):
        ax.set(xlabel=label, yticks=range(len(ways)), yticklabels=list(ways))
        ax.invert_yaxis()
        ax.margins(x=0.18)
        ax.grid(False, axis="y")
    left.set_title({"sweep-end": "Cutting each head at the last position", "sweep-all": "Cutting each head everywhere",
                    "path": "Patching each head's path to the logits"}[name])  # fmt: skip
    data = [{"way": way, "seconds": f["seconds"], "peak_memory_bytes": f["peak_memory_bytes"]} for way, f in ways.items()]
    return fig, plot.pd.DataFrame(data)
