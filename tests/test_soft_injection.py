"""Notebook 21: asking remembered prompts is the same as reading them in full, injected or not."""

import types
from os.path import commonprefix

import pytest
import torch
from cells import run_cells
from conftest import tiny
from torch.nn.functional import pad
from transformers import DynamicCache

import heads
from heads.model.weights import hooked, projection

TEXTS = ["Q: up\nA: down\n\nQ: hot\nA:", "Q: up\nA: down\n\nQ: enormous\nA:", "Q: up\nA: down\n\nQ: a\nA:"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3", "mistral", "gemma3"])
def book(request):
    lm = tiny(request.param)
    names = {"lm": lm, "module": lm._module, "n_layers": lm.anatomy.n_layers, "n_heads": lm.anatomy.n_heads,
             "DynamicCache": DynamicCache, "commonprefix": commonprefix, "pad": pad, "hooked": hooked,
             "projection": projection}  # fmt: skip
    return types.SimpleNamespace(**run_cells("soft-injection", "shortcut", **names))


def in_full(lm, text):
    with torch.no_grad():
        return lm._module(input_ids=lm.ids(text)).logits[0, -1]


def injection(lm, rows):
    shape, generator = (rows, lm.anatomy.n_layers, lm.anatomy.n_heads), torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator), torch.randn(*shape, lm.anatomy.d_head, generator=generator)


def test_a_shared_beginning_and_other_lengths_change_nothing(book):
    rows = [*book.remember(TEXTS), *book.remember(["Q: hot\nA:"])]
    with torch.no_grad():
        found = book.ask(rows)[0]
    expected = torch.stack([in_full(book.lm, text) for text in [*TEXTS, "Q: hot\nA:"]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_row_is_injected_with_its_own_gates_and_vectors(book):
    gates, vectors = injection(book.lm, len(TEXTS))
    with torch.no_grad():
        found = book.ask(book.remember(TEXTS), gates, vectors)[0]
    for row, text in enumerate(TEXTS):
        with heads.Steering(book.lm, vectors[row], gates[row], "mix", positions=[-1]).hooks():
            torch.testing.assert_close(found[row], in_full(book.lm, text), rtol=1e-4, atol=1e-4)


def test_closed_gates_change_nothing_and_heads_are_kept_before_the_edit(book):
    gates, vectors = injection(book.lm, len(TEXTS))
    rows, kept = book.remember(TEXTS), []
    with torch.no_grad():
        plain = book.ask(rows, keep=kept)[0]
        torch.testing.assert_close(book.ask(rows, 0 * gates, vectors)[0], plain)
    wanted = heads.head_activations(book.lm, TEXTS)  # [text, layer, head, d_head]
    torch.testing.assert_close(torch.stack(kept, 1), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_gates_and_rows_do_not_mix(book):
    gates, vectors = injection(book.lm, len(TEXTS))
    gates.requires_grad_()
    book.ask(book.remember(TEXTS), gates, vectors)[0][0].sum().backward()
    assert gates.grad[0].abs().min() > 0
    assert (gates.grad[1:] == 0).all()
