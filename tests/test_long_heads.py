"""Notebook 33: its readers choose as they say, and what heads have in common is what loops over pairs count."""

import types
from itertools import permutations

import pytest
import torch
from cells import run_cells

import heads
from heads.lab.chunks import Look, by_key


@pytest.fixture(scope="module")
def book():
    names = {"heads": heads, "by_key": by_key, "seed": 0, "count": 6, "draws": 2, "readers": {}}
    return types.SimpleNamespace(**run_cells("long-heads", "readers", **names))


def look(layer=0, seed=0, chunks=12):
    dice = torch.Generator().manual_seed(seed)
    return Look(layer, torch.randn(1, 3, 2, 8, generator=dice), *torch.randn(2, 1, 3, chunks, 8, generator=dice))


def test_heads_that_are_not_free_read_the_same(book):
    for name in ("one head's", "a vote"):
        chosen = book.readers[name].choose(look())
        assert (chosen == chosen[:, :1]).all() and (chosen.sum(-1) == 5).all()
    free = heads.Reader(6).choose(look())
    assert not (free == free[:, :1]).all() and (book.readers["one head's"].choose(look())[:, 0] == free[:, 0]).all()


def test_a_vote_counts_every_head(book):
    one = look()
    shares = torch.softmax(torch.einsum("bhqd,bhcd->bhqc", one.queries, one.pooled) / 8**0.5, -1)
    wanted = sum(shares[0, head] for head in range(3))[:, 1:-1].topk(3).indices + 1
    chosen = book.readers["a vote"].choose(one)[0, 0]
    assert all(set(row.tolist()) <= set(got.nonzero().flatten().tolist()) for row, got in zip(wanted, chosen))


def test_all_layers_read_what_the_first_one_chose(book):
    reader = book.readers["first layer's"]
    first = reader.choose(look(0))
    assert (reader.choose(look(3, seed=5)) == first).all() and (first == heads.Reader(6).choose(look(0))).all()
    assert (reader.choose(look(0, seed=5)) == heads.Reader(6).choose(look(0, seed=5))).all()  # and the next pass anew


def test_the_best_chunk_is_left_out_and_another_read(book):
    one = look()
    best = by_key(one)[..., 1:-1].argmax(-1, keepdim=True) + 1
    chosen, plain = book.readers["no best"].choose(one), heads.Reader(6).choose(one)
    assert plain.gather(-1, best).all() and not chosen.gather(-1, best).any() and (chosen.sum(-1) == 5).all()
    assert ((plain & ~chosen).sum(-1) == 1).all() and (torch.where(plain, 0, chosen.int()).sum(-1) == 1).all()


def test_random_readers_are_drawn_by_their_number(book):
    one, two = (book.readers[f"random {number}"].choose(look()) for number in (1, 2))
    assert not (one == two).all() and (heads.Reader(6, book.at_random(0)).choose(look()) == one).all()


def test_the_mean_of_turned_keys_is_of_its_own_row(book):
    one, row = look(), list(book.readers).index("mean keys, turned")
    dice = torch.Generator().manual_seed(7)
    held = torch.randn(1, 1, 8, 4, 8, generator=dice)  # [prompt, kv_head, chunk, token, d_head]: of the prompt
    later = torch.randn(len(book.readers), 1, 4, 4, 8, generator=dice)  # and since then, for every reader
    layer = types.SimpleNamespace(parts=[(held, None, None), (later, None, None)])
    book.now["cache"] = types.SimpleNamespace(layers=[layer])
    keys = [held[0, 0, c].mean(0) for c in range(8)] + [later[row, 0, c].mean(0) for c in range(4)]
    wanted = [[[float(one.queries[0, h, q] @ key) for key in keys] for q in range(2)] for h in range(3)]
    assert torch.allclose(book.turned_means(one), torch.tensor([wanted]), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_picks_in_common_are_counted_over_pairs(kv_heads):
    lm = types.SimpleNamespace(anatomy=types.SimpleNamespace(n_kv_heads=kv_heads))
    in_common = run_cells("long-heads", "agreeing", lm=lm)["in_common"]
    picks = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(1)).argsort(-1).argsort(-1).lt(4).numpy()
    for layer in range(2):
        shared = {True: [], False: []}
        for a, b in permutations(range(6), 2):
            shared[a * kv_heads // 6 == b * kv_heads // 6].append((picks[layer, a] & picks[layer, b]).sum() / 4)
        for found, pairs in zip(in_common(picks), (shared[False], shared[True])):
            assert found[layer] == pytest.approx(sum(pairs) / len(pairs)) if pairs else found[layer] != found[layer]
