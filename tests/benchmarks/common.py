"""What benchmarks share: fresh processes, peak memory, the two models, one kind of record."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import psutil
import torch

import heads
from heads import plot
from heads.course import papers, record
from heads.model import zoo as models

MODEL = models.DEFAULT
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
torch.set_num_threads(THREADS)  # here, so that every fresh process has it; 1 suffers least from a busy machine
GB = 1e9


def fresh(function, *args):
    """The function's result from a new interpreter: no memory of what was measured before."""
    print(f"{function.__module__.rpartition('.')[2]}: {function.__name__} {args}"[:120], file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def ours():
    """The default model as `heads.load` gives it, in float32 on the CPU."""
    return heads.load(MODEL, device="cpu", dtype="float32")


def plain():
    """The same weights in plain transformers: nothing of heads or nnsight is in it."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(models.fetch(MODEL), dtype=torch.float32, attn_implementation="sdpa")
    return module.eval().requires_grad_(False)


def samples(n: int, length: int) -> list:
    """Needle prompts of about `length` tokens, from the tokenizer alone."""
    from transformers import AutoTokenizer

    reader = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(models.fetch(MODEL)), record={"name": MODEL})
    return heads.tasks.needle(reader, lengths=[length], depths=[(i + 0.5) / n for i in range(n)])


def eager_weights_bytes(length: int, config=None) -> int:
    """What the returned weights of all layers take in float32: `[layer, head, position, position]`."""
    from transformers import AutoConfig

    config = config or AutoConfig.from_pretrained(models.fetch(MODEL))
    return config.num_hidden_layers * config.num_attention_heads * length**2 * 4


def timed(function, *args, **kwargs):
    """(seconds, result)."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def peak_above(function, *args):
    """(bytes, result): the largest resident memory while the function ran, above what was resident before.

    On Linux the kernel's own high-water mark is set back first, so that loading the model does not count.
    Elsewhere the mark cannot be set back, and the number is an upper bound.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # what loading freed goes back first, or a small need would fit into it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    result = function(*args)
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        peak = record.peak_memory_bytes()
    return max(peak - before, 0), result


def exponent(sizes, values) -> float | None:
    """Slope of log(value) over log(size): 1 grows like the context, 2 like its square."""
    if len(sizes) < 2:
        return None
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


def row(size: int, ours: float, peer: float | None, difference: float | None, **more) -> dict:
    """One size of a record. `ratio` is peer over ours: above 1, ours is better."""
    return {"size": size, "ours": ours, "peer": peer, "ratio": peer / ours if peer else None, "difference": difference, **more}


def write(name: str, fig, data, quick: bool, *, unit: str, peer_is: str, equal_to: str, sizes: list[dict], **more) -> dict:
    """Write figures/benchmarks/<name>.json with its figure, each file in one step, the JSON last; returns the record.

    `ours`, `peer` and `ratio` at the top are those of the largest size at which both ran.
    """
    head = max((row for row in sizes if row["peer"]), key=lambda row: row["size"], default=sizes[-1])
    found = {
        "name": name,
        "ours": head["ours"],
        "peer": head["peer"],
        "ratio": head["ratio"],
        "unit": unit,
        "size": head["size"],
        "peer_is": peer_is,
        "equal_to": {"what": equal_to, "max_abs_difference": max(r["difference"] for r in sizes if r["difference"] is not None)},
        "sizes": sizes,
        **more,
        "model": more.get("model", MODEL),
        "dtype": "float32",
        "load_average": psutil.getloadavg()[0],
        "hardware": record.hardware(),
        "versions": record.versions(),
    }
    folder = (papers.root() / "runs" if quick else papers.figures_root()) / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
        files = plot.save(fig, Path(aside) / name, data)
        text = json.dumps(found, indent=1, allow_nan=False, default=float)
        (Path(aside) / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for file in [*files, Path(aside) / f"{name}.json"]:
            os.replace(file, folder / file.name)
    plot.plt.close(fig)
    return found


__all__ = ["GB", "MODEL", "THREADS", "eager_weights_bytes", "exponent", "fresh", "median", "ours", "peak_above", "plain", "row",
           "samples", "timed", "write"]  # fmt: skip
