"""How long one waits before anything happens: `import heads`, `heads list`, and `heads.load` against plain transformers.

    import heads   a fresh interpreter that imports heads and ends          aim: below 0.3 s
    heads list     the command, as a fresh process                          aim: below 0.3 s
    from nothing   a fresh interpreter that imports and loads the default model and its tokenizer
    heads.load     the same load again in a process that has loaded it once: imports done, files in memory; aim: below 2.5 s

The peer is `AutoTokenizer.from_pretrained` and `AutoModelForCausalLM.from_pretrained` on the same folder, in float32 with
SDPA. It does less: `heads.load` also binds names and runs three identity checks, five forward passes of six tokens.

Fair: all processes read compiled bytecode from a folder of their own, filled by a first run that does not count; ways are
taken in turn. Times are medians of wall seconds, with the fastest and the CPU seconds beside them, which a busy machine
leaves nearly alone. Equal: the logits of one prompt.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import torch

from heads import plot
from tests.benchmarks.common import MODEL, THREADS, fresh, median, models, ours, plain, row, write

AIMS = {"import heads": 0.3, "heads list": 0.3, "heads.load": 2.5}
PEER = "plain transformers: AutoTokenizer and AutoModelForCausalLM.from_pretrained on the same folder"
OURS = f"import heads; heads.load({MODEL!r}, device='cpu', dtype='float32')"
THEIRS = (
    "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
    "AutoTokenizer.from_pretrained(sys.argv[1]); AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)"
)


def process(*words: str) -> tuple[float, float]:
    """(wall, CPU) seconds of python with these arguments, from start to end."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"python {' '.join(words)} ended with {child.returncode}")
    return seconds, used.ru_utime + used.ru_stime


def again(way: str) -> tuple[tuple[float, float], torch.Tensor]:
    """(wall, CPU) seconds of a second load in this process, and the logits `[position, vocabulary]` of one prompt."""
    from transformers import AutoTokenizer

    def load():
        return (ours() if way == "ours" else plain()), AutoTokenizer.from_pretrained(models.fetch(MODEL))

    load()
    wall, cpu = time.perf_counter(), time.process_time()
    model, tokenizer = load()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    module, ids = getattr(model, "_module", model), tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        return seconds, module(ids).logits[0]


def seconds(name: str, mine: list, theirs: list = (), difference: float | None = None) -> dict:
    """One row, from the (wall, CPU) of several runs."""
    more = {"runs": len(mine), "aim": AIMS.get(name)}
    for who, runs in (("ours", mine), ("peer", theirs)):
        if runs:
            more |= {f"{who}_fastest": min(w for w, _ in runs), f"{who}_cpu": median(c for _, c in runs)}
    return row(name, median(w for w, _ in mine), median(w for w, _ in theirs) if theirs else None, difference, **more)


def run(quick: bool = False) -> dict:
    repeats, folder = 1 if quick else 7, str(models.fetch(MODEL))
    commands = {
        "import heads": ("-c", "import heads"), "heads list": ("-m", "heads", "list"),
        "from nothing": ("-c", OURS), "peer": ("-c", THEIRS, folder),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as bytecode:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ |= {"PYTHONPYCACHEPREFIX": bytecode, "OMP_NUM_THREADS": str(THREADS)}
        for words in commands.values():
            process(*words)
        runs = [{name: process(*words) for name, words in commands.items()} for _ in range(repeats)]
        loads = [{way: fresh(again, way) for way in ("ours", "peer")} for _ in range(min(repeats, 3))]
    found = {name: [each[name] for each in runs] for name in commands}
    apart = max((each["ours"][1] - each["peer"][1]).abs().max().item() for each in loads)
    sizes = [
        seconds("import heads", found["import heads"]),
        seconds("heads list", found["heads list"]),
        seconds("from nothing", found["from nothing"], found["peer"]),
        seconds("heads.load", *([each[way][0] for each in loads] for way in ("ours", "peer")), apart),
    ]
    fig, data = draw(sizes)
    return write("startup", fig, data, quick, unit="seconds", peer_is=PEER, sizes=sizes, threads=THREADS,
                 equal_to="logits of one prompt")  # fmt: skip


def draw(sizes: list[dict]):
    """Wall seconds of each, on a logarithmic axis, with the aims."""
    plot.style()
    fig, ax = plot.plt.subplots(figsize=(8, 3.8))
    for i, size in enumerate(sizes[::-1]):
        if size["peer"]:
            ax.plot(size["peer"], i, "D", color=plot.GREY, ms=9, label=None if i else "plain transformers")
        ax.plot(size["ours"], i, "o", color=plot.COLORS["blue"], ms=9, label=None if i else "heads")
        if size["aim"]:
            ax.plot([size["aim"]] * 2, [i - 0.25, i + 0.25], color="black", lw=2, label=None if i else "aim")
    ax.set_yticks(range(len(sizes)), [size["size"] for size in sizes[::-1]])
    ax.set(xscale="log", xlabel="seconds", title="What one waits for", ylim=(-0.5, len(sizes) - 0.5))
    ax.xaxis.set_major_formatter("{x:g}")
    fig.legend(loc="outside lower center", ncols=3)
    return fig, plot.pd.DataFrame([{k: v for k, v in size.items() if k != "difference"} for size in sizes])
