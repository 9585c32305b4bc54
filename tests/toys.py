"""What several tests share: a task without meaning, ablations done by hand, and a paper that is a toy."""

from contextlib import contextmanager

import torch
from conftest import plain_of
from nbformat import v4
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from heads import metrics
from heads.tasks import Task

# ------------------------------------------------------------------------------ tasks and sweeps


def toy(model, prompts: int = 5, length: int = 10, seed: int = 0) -> Task:
    """Random prompts whose twins differ at two positions, and a role that moves."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (prompts, length), generator=random)
    corrupted = ids.clone()
    corrupted[:, 4] += 3
    corrupted[:, 6] += 5
    role = torch.randint(4, 8, (prompts,), generator=random)
    return Task("toy", ids, ids[:, 0] + 1, torch.stack([ids[:, 1] + 40, ids[:, 2] + 45], 1), corrupted, {"S": role})


def naive(model, task, kind, positions, metric=metrics.logit_difference):
    """Every head by itself, whole prompts, whole vocabulary: `[prompt, layer, head]`, and the base `[prompt]`."""
    plain, where, twin = plain_of(model), task.at(positions), plain_of(model).z(task.corrupted)
    clean = plain(task.ids).logits

    def read(logits):
        last = logits[:, -1]
        return metric(last if metric.whole else last.gather(-1, metric.columns(task)), task, clean[:, -1])

    base, out = read(clean), torch.zeros(len(task), plain.n_layers, plain.n_heads)
    for layer in range(plain.n_layers):
        new = {"zero": torch.zeros_like(twin[layer]), "mean": twin[layer].mean(0, keepdim=True).expand_as(twin[layer]),
               "counterfactual": twin[layer]}[kind]  # fmt: skip
        for head in range(plain.n_heads):

            def cut(at, z):
                if at != layer:
                    return None
                z[..., head, :] = torch.where(where[..., None], new[..., head, :], z[..., head, :])
                return z

            with plain.edited(cut):
                out[:, layer, head] = read(plain(task.ids).logits) - base
    return out, base


# ------------------------------------------------------------------------------ edits by hand


def replaced(plain, chosen, new=None, at=slice(None)):
    """A plain module with heads replaced at some positions: by zero, or by `new[layer]` `[position, head, d_head]`."""

    def change(layer, z):
        for head in (h for i, h in chosen if i == layer):
            z[:, at, head] = 0 if new is None else new[layer].expand_as(z[0])[at, head]
        return z

    return plain.edited(change)


@contextmanager
def eager(plain, logits=None, rows=None):
    """A plain module whose attention is written out here. `logits(layer, x)` and `rows(layer, x)` may change
    `[batch, head, query, key]` in place: the logits before the mask is added, and the pattern."""

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        x = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        x = plain.capped(x, "attn")
        if logits is not None:
            logits(module.layer_idx, x)
        x = x + (0 if mask is None else mask)
        if (sinks := kwargs.get("s_aux")) is not None:
            x = torch.cat([x, sinks.view(1, -1, 1, 1).expand(*x.shape[:-1], 1)], -1)
        pattern = x.softmax(-1)[..., : key.shape[2]]
        if rows is not None:
            rows(module.layer_idx, pattern)
        return (pattern @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), pattern

    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", eager_mask)
    plain.module.set_attn_implementation("by_hand")
    try:
        yield plain
    finally:
        plain.module.set_attn_implementation("eager")


def uniform(plain, chosen, at=slice(None)):
    """The paper's masking by hand: chosen heads have all their logits set to 0 before the mask is added."""

    def zero(layer, x):
        for head in (h for i, h in chosen if i == layer):
            x[:, head, at] = 0

    return eager(plain, logits=zero)


def by_hand(kind, plain, chosen, at=slice(None)):
    return uniform(plain, chosen, at) if kind == "uniform" else replaced(plain, chosen, at=at)


# ------------------------------------------------------------------------------ a toy of a paper

PARAMETERS = """\
seed = 0  # where it all starts
size = 3  # how many samples
rate = 0.5  # between 0 and 1
names = ["a", "b"]  # of the sets
flag = False  # whether to
limit = None  # no limit by default
"""
STUDY = """\
import matplotlib.pyplot as plt
import heads
study = heads.Study("toy-paper", seed=seed, size=size, rate=rate, names=names, flag=flag, limit=limit)
study.claims()"""
FIGURE = """\
fig, ax = plt.subplots()
ax.plot(range(size))
study.figure(fig, "1-line", {"x": list(range(size))}, "A line.")"""
CLAIMS = """\
study.claim("C1", measured=rate, holds=rate > 0.1)
study.claim("C2", measured="nothing", holds=None, why="Not here.")"""


DEFAULTS = {"seed": 0, "size": 3, "rate": 0.5, "names": ["a", "b"], "flag": False, "limit": None}


def toy_notebook(*cells, parameters=PARAMETERS):
    """An unexecuted notebook: a title, the parameters cell, then the given sources and the verdict."""
    book = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells = [v4.new_markdown_cell("# A toy"), v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    for source in cells or (STUDY, FIGURE, CLAIMS):
        book.cells += [v4.new_markdown_cell("Prose."), v4.new_code_cell(source)]
    book.cells += [v4.new_markdown_cell("The verdict."), v4.new_code_cell("study.verdict()")]
    book.cells += [v4.new_code_cell("study.summary()", metadata={"tags": ["nbval-check-output"]})]
    return book


def toy_paper(slug, number, state):
    claim = {"paper": "0.9", "where": "Fig 1", "holds": "> 0.1"}
    claims = [{"id": id, "text": f"|r| of {id} is large", **claim} for id in ("C1", "C2")]
    return {
        "slug": slug, "number": number, "part": 1, "title": slug.title(), "authors": ["A. Author"], "year": 2024,
        "arxiv": "2401.00001", "venue": None, "question": "Does it?", "state": state, "claims": claims,
    }  # fmt: skip
