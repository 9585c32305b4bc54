"""Random cases of everything at once, against torch's hooks on plain transformers, for a fixed number of seconds.

Families, heads, kinds of ablation and ways to steer, phases, positions, padding, beams, and the settings of `generate` are
drawn together. The second opinion reads one row at a time, without padding, without a cache, everything again for each token.
"""

import os
import random
import time
from functools import partial

import torch
from conftest import DECODERS, plain, tiny
from toys import replaced, uniform

import heads

SECONDS = float(os.environ.get("HEADS_DIFFERENTIAL_SECONDS", 12))
HOW, GATE = ("add", "scale", "mix", "replace"), 0.6
SETTINGS = ({}, {}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"})
NEW = 3


def case(draw: random.Random) -> dict:
    rows = draw.choice([1, 1, 2, 3])
    lengths = [draw.randint(4, 12) for _ in range(rows)]
    shortest, ways = min(lengths), draw.choice(["trace", "generate", "generate", "beams"])
    positions = draw.choice([None, None, [draw.randint(-shortest, shortest - 1) for _ in range(draw.randint(1, 3))]])
    # chunks are read without a mask of padding; sides: `generate` pads on the left
    setting = draw.choice(SETTINGS) if rows == 1 else draw.choice([x for x in SETTINGS if "prefill_chunk_size" not in x])
    if ways == "beams":
        setting = draw.choice([{}, {"use_cache": False}])
    return {
        "family": draw.choice(DECODERS), "lengths": lengths, "way": ways, "positions": positions, "setting": setting,
        "side": draw.choice(["left", "right"]) if ways == "trace" else "left", "phase": draw.choice(["both", "prefill", "decode"]),
        "kind": draw.choice(["zero", "uniform", "mean", "mean by position", "add", "scale", "mix", "replace"]),
        "decode": draw.choice([True, False, [1], [2, 3]]), "seed": draw.randint(0, 10**6),
        "heads": sorted({(draw.randrange(4), draw.randrange(4)) for _ in range(draw.randint(1, 6))}),
    }  # fmt: skip


def chosen(i: int, n: int, phase: str, positions, decode=None) -> bool:
    """Whether token number i is edited, of a prompt of n. `decode` is steering's: which generated ones."""
    if decode is not None:
        return (positions is None or i in positions or i - n in positions) if i < n else decode is True or decode and i - n + 1 in decode
    named = positions is None or i in positions or (i < n and i - n in positions)
    return named and {"both": True, "prefill": i < n - 1, "decode": i >= n - 1}[phase]


def steered(c: dict, vectors, at: list, layer: int, z: torch.Tensor) -> torch.Tensor:
    """Steering as its definition says, head by head and token by token."""
    for (i, head), v in zip(c["heads"], vectors):
        for t in at if i == layer else ():
            old = z[:, t, head].clone()
            z[:, t, head] = {"add": old + GATE * v, "scale": old + GATE * v * old, "mix": (1 - GATE) * old + GATE * v, "replace": v}[c["kind"]]
    return z


def by_hand(c: dict, ids: torch.Tensor, n: int, values) -> torch.Tensor:
    """Logits `[position, vocabulary]` of one row."""
    second, length = plain(c["family"]), ids.shape[1]
    at = [i for i in range(length) if chosen(i, n, c["phase"], c["positions"], c["decode"] if c["kind"] in HOW else None)]
    if c["kind"] in HOW:
        edit = second.edited(partial(steered, c, values, at))
    elif c["kind"] == "uniform":
        edit = uniform(second, c["heads"], at)
    else:
        edit = replaced(second, c["heads"], None if values is None else [v[:length] for v in values], at)
    with edit:
        return second(ids, use_cache=False).logits[0]


def difference(c: dict) -> float:
    """The largest difference of a logit, in units of the largest logit."""
    model, random_ = tiny(c["family"]), torch.Generator().manual_seed(c["seed"])
    a, longest = model.anatomy, max(c["lengths"])
    rows = [torch.randint(5, 250, (1, n), generator=random_) for n in c["lengths"]]
    pads = [(longest - n, 0) if c["side"] == "left" else (0, longest - n) for n in c["lengths"]]
    ids = torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads)])
    values, options = None, {"kind": c["kind"]}
    if c["kind"].startswith("mean"):
        shape = (a.n_layers, longest + NEW, a.n_heads, a.d_head)
        values = torch.randn(shape, generator=random_)
        values = values if c["kind"] == "mean by position" else values[:, :1].expand(shape)
        options = {"kind": "mean", "values": values if c["kind"] == "mean by position" else values[:, 0]}
    if c["kind"] in HOW:
        values, gate = torch.randn(len(c["heads"]), a.d_head, generator=random_), 1.0 if c["kind"] == "replace" else GATE
        where = {"positions": c["positions"], "decode": c["decode"]}
        edited = heads.Steering(model, values, gate, c["kind"], heads=c["heads"], **where).edited
    else:
        edited = heads.ablate(model, c["heads"], phase=c["phase"], positions=c["positions"], **options)
    inputs = {"input_ids": ids, "attention_mask": mask}
    found, worst = [], 0.0
    if c["way"] == "trace":
        with torch.no_grad(), edited.trace(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)):
            logits = edited.logits.save()
        found = [(row, len(row[0]), logits[i, mask[i].bool()]) for i, row in enumerate(rows)]
    else:
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **c["setting"]}
        beams = {"num_beams": 2, "output_scores": True} if c["way"] == "beams" else {"output_logits": True}
        with edited.generate(**inputs, **settings, **beams, return_dict_in_generate=True) as tracer:
            out = tracer.result.save()
        if c["way"] == "beams":  # the mean log-probability of what was written
            for row, whole, score in zip(rows, out.sequences, out.sequences_scores, strict=True):
                ids = torch.cat([row, whole[None, longest:]], 1)
                logprobs = by_hand(c, ids[:, :-1], len(row[0]), values)[-NEW:].log_softmax(-1)
                theirs = logprobs.gather(1, ids[0, -NEW:, None]).mean()
                worst = max(worst, (abs(score - theirs) / theirs.abs()).item())
            return worst
        for i, row in enumerate(rows):
            for step, logits in enumerate(out.logits):
                found.append((torch.cat([row, out.sequences[i : i + 1, longest : longest + step]], 1), len(row[0]), logits[i : i + 1]))
    for ids, n, ours in found:
        theirs = by_hand(c, ids, n, values)[-len(ours) :]
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


def test_random_cases_are_what_hooks_give(record_property):
    draw, end, worst, n = random.Random(20240607), time.monotonic() + SECONDS, (0.0, {}), 0
    while time.monotonic() < end:
        c = case(draw)
        try:
            found = difference(c)
        except Exception as error:
            raise AssertionError(f"case {n}: {c}") from error
        n, worst = n + 1, max(worst, (found, {**c, "number": n}), key=lambda pair: pair[0])
        assert found < 2e-4, (found, c)
    record_property("differential", f"{n} random cases in {SECONDS:.0f} s, the worst off by {worst[0]:.1e} of the largest logit: {worst[1]}")
    assert n > 20
