"""Sweeps and path patching on an 8B-shaped Llama with random weights, in bfloat16 on a GPU.

64 prompts of 64 tokens, 32 layers x 32 heads (8 key-value heads), built in code: what is measured is time, memory and the
share of the matrix-multiply rate, none of which depends on what the weights have learned. There is no peer; `agree` is the
largest difference to the same sweep in smaller forwards, beside the size of the effects, because in bfloat16 the order
of sums shows. Refused without a GPU; `--quick` takes a small model on any device, to see that it works.
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import heads
from heads import plot
from heads.model import load, tiny
from heads.tasks import Task
from tests.benchmarks.common import GB, row, timed, write
from tests.benchmarks.sweeps import unavoidable

SHAPE = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
             vocab_size=128256, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)  # fmt: skip
SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512}  # fmt: skip


def build(shape: dict, device: str):
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(kind)
    try:
        with torch.device(device):
            module = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(torch.float32)
    return load.wrap(module, tiny.tokenizer())


def prompts(n: int, length: int, vocabulary: int) -> Task:
    ids = torch.randint(5, vocabulary - 50, (n, length), generator=torch.Generator().manual_seed(0))
    twin = ids.clone()
    twin[:, length // 2] += 1
    return Task("random", ids, ids[:, 0] + 1, ids[:, 1:2] + 40, twin)


def synced(device: str, function, *args, **kwargs):
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    seconds, result = timed(lambda: (function(*args, **kwargs), torch.cuda.synchronize() if device == "cuda" else None)[0])
    return seconds, result, torch.cuda.max_memory_allocated() - held if device == "cuda" else 0


def rate(model) -> float:
    """Operations a second of a large square multiplication, best of ten."""
    size, best = (8192 if model.device.type == "cuda" else 512), 1e9
    a = torch.randn(size, size, device=model.device, dtype=model._module.dtype)
    for _ in range(10):
        if a.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _record(name: str, quick: bool, work, positions: str) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not quick:
        raise SystemExit(f"{name} needs a GPU, and this torch sees none; --quick runs a small model here")
    model, task = (
        build(SMALL if quick else SHAPE, device),
        prompts(*((4, 8) if quick else (64, 64)), (SMALL if quick else SHAPE)["vocab_size"]),
    )
    work(model, task[:2], None)
    seconds, found, memory = synced(device, work, model, task, None)
    smaller = work(model, task[:8], 2048)
    peak, length = rate(model), task.ids.shape[1]
    flops = unavoidable(model, length, len(task), positions)
    agree = float(abs(found.samples[: len(smaller.samples)] - smaller.samples).max())
    size = row(len(task), seconds, None, agree, peak_memory_bytes=memory, tokens=length, largest_effect=float(abs(found.samples).max()),
               share_of_matmul_peak=flops / seconds / peak, matmul_tflops=peak / 1e12)  # fmt: skip
    plot.style()
    fig, ax = plot.plt.subplots(figsize=(7, 2.4))
    ax.barh(["measured", "at the multiply rate"], [seconds, flops / peak], color=[plot.COLORS["blue"], plot.GREY])
    ax.set(xlabel=f"seconds for all heads; peak {memory / GB:.1f} GB above the model", title=name)
    return write(name, fig, {"seconds": [seconds], "bound": [flops / peak]}, quick, unit="seconds, all heads", sizes=[size],
                 peer_is="none: seconds, memory and the share of the multiply rate", equal_to="the same sweep in smaller forwards",
                 device=torch.cuda.get_device_name() if device == "cuda" else "cpu", shape=SMALL if quick else SHAPE)  # fmt: skip


def end(quick: bool = False) -> dict:
    return _record("gpu-sweep-end", quick, lambda m, t, tokens: heads.ablation_scores(
        m, t, "zero", "END", batch=64, tokens=tokens, progress=False), "END")  # fmt: skip


def everywhere(quick: bool = False) -> dict:
    return _record("gpu-sweep-all", quick, lambda m, t, tokens: heads.ablation_scores(
        m, t, "zero", batch=16, tokens=tokens, progress=False), "all")  # fmt: skip


def path(quick: bool = False) -> dict:
    return _record(
        "gpu-path", quick, lambda m, t, tokens: heads.path_scores(m, t, batch=64, tokens=tokens, progress=False), "END"
    )
