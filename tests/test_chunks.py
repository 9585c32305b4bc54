"""Reading in chunks: as the paper says it, in loops; as full attention where all is read; what is refused."""

import math

import pytest
import torch
from conftest import CORE, ids_of, logits_of, near, padded, plain_logits, tiny

import heads
from heads import ChunkCache, Reader
from heads.lab.chunks import Look, by_key
from heads.model.attention import attention

SIZE, LENGTH = 4, 23
ROTARY = [family for family in CORE if family in ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt-neox")] + ["phi", "cohere"]


def rotated(x, place: int, base: float):
    """One vector, by complex numbers: Llama turns the pairs (i, i + d/2)."""
    half = len(x) // 2
    pairs = torch.complex(x[:half].double(), x[half:].double())
    turned = pairs * torch.polar(torch.ones(half).double(), place * base ** (-torch.arange(half).double() / half))
    return torch.cat([turned.real, turned.imag])


def naive(q, k, v, at: int, count: int, base: float, first: bool = True, several: bool = False) -> torch.Tensor:
    """The paper for the query at one place, head after head, from what is not rotated: `[head, position, d_head]`."""
    out, scale, turn = [], q.shape[-1] ** -0.5, lambda x, place: rotated(x, place, base)
    for head in range(len(q)):
        kv = head * len(k) // len(q)
        complete, scores = at // SIZE, []
        for chunk in range(complete):
            places = range(chunk * SIZE, (chunk + 1) * SIZE)
            keys = torch.stack([turn(k[kv, p], p % SIZE) for p in places])
            mixed = [torch.softmax(keys @ turn(q[head, p], p % SIZE) * scale, 0) @ v[kv, list(places)].double() for p in places]
            pooled = torch.softmax(keys @ torch.stack(mixed).mean(0) * scale, 0) @ keys
            scores.append((q[head, at].double() @ pooled).item())
        forced = ([0] if first else []) + [complete - 1]
        others = sorted(range(1, complete - 1), key=lambda chunk: -scores[chunk])[: count - 1 - len(forced)]
        taken = sorted({*forced, *others}) if complete > count - 1 else list(range(0 if first else 1, complete))
        places = [p for chunk in taken for p in range(chunk * SIZE, (chunk + 1) * SIZE)] + list(range(complete * SIZE, at + 1))
        keys = [turn(k[kv, p], new) for new, p in enumerate(places)]
        asks, places, keys = turn(q[head, at], len(places) - 1), places[: len(places) - several], keys[: len(keys) - several]
        weights = torch.softmax(torch.stack(keys) @ asks * scale, 0)
        out.append(weights @ v[kv, places].double())
    return torch.stack(out)


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("parts", [[1, 1, 1, 1], [11], [3, 6, 1, 1]])
def test_reading_is_the_papers_in_loops(parts, first, quirk):
    torch.manual_seed(0)
    model, n, width = tiny("llama"), LENGTH + sum(parts), tiny("llama").anatomy.d_head
    base = model.config.rope_parameters["rope_theta"]
    q, k, v = (torch.randn(1, h, n, width) for h in (4, 2, 2))
    turned = [torch.stack([torch.stack([rotated(x[0, h, p], p, base) for p in range(n)]) for h in range(x.shape[1])])[None].float()
              for x in (q, k)]  # fmt: skip
    cache, at = ChunkCache(model, SIZE, [Reader(None), Reader(4, first=first)], quirk), 0
    layer, module = cache.layers[0], model.layers[0].attn._module
    for part in (LENGTH, *parts):
        rows, span = 1 if not at else 2, slice(at, at + part)
        marked, values = layer.update(turned[1][:, :, span].repeat(rows, 1, 1, 1), v[:, :, span].repeat(rows, 1, 1, 1))
        out = attention(module, turned[0][:, :, span].repeat(rows, 1, 1, 1), marked, values, None)[0]
        for place in range(at, at + part) if at else ():
            wanted = naive(q[0], k[0], v[0], place, 4, base, first, quirk and part > 1)
            near(out[1, place - at].double(), wanted)
        at += part
    assert [x.shape[2] for x in layer.picked] and len(layer.parts) == 1 + n // SIZE - LENGTH // SIZE


@pytest.mark.parametrize("family", ROTARY)
def test_all_chunks_in_their_places_are_full_attention(family):
    model = tiny(family)
    ids = ids_of(model, 40, 2)
    wanted = plain_logits(model, ids)
    for count, parts in ((None, [17]), (30, [1, 9, 1, 6]), (None, [1] * 17)):
        cache, at, found = ChunkCache(model, SIZE, Reader(count)), 0, []
        for part in (LENGTH, *parts):
            found.append(logits_of(model, ids[:, at : at + part], past_key_values=cache, use_cache=True))
            at += part
        near(torch.cat(found, 1), wanted)


def test_forks_read_as_caches_of_their_own(llama):
    ids, readers = ids_of(llama, 40, 2), [Reader(None), Reader(3), Reader(4, lambda look: -by_key(look)), Reader(4, first=False)]
    cache = ChunkCache(llama, SIZE)
    logits_of(llama, ids[:, :LENGTH], past_key_values=cache, use_cache=True)
    for _ in range(2):  # what a fork reads does not touch what it came from
        fork, found = cache.fork(readers), []
        for part in (ids[:, LENGTH:36], ids[:, 36:]):
            found.append(logits_of(llama, part.repeat(4, 1), past_key_values=fork, use_cache=True))
        for row, reader in zip(torch.cat(found, 1).split(2), readers):
            alone = ChunkCache(llama, SIZE, reader)
            logits_of(llama, ids[:, :LENGTH], past_key_values=alone, use_cache=True)
            near(row, logits_of(llama, ids[:, LENGTH:], past_key_values=alone, use_cache=True))
    for layer in fork.picked:
        assert [x.shape[2] for x in layer] == [4] and all((x[2:4].sum(-1) == 2).all() and x[2:4, ..., [0, -1]].all() for x in layer)
        assert not layer[0][6:, ..., 0].any() and (layer[0][6:].sum(-1) == 3).all() and layer[0][:2].all()


def test_ours_and_plain_transformers_generate_the_same(llama):
    ids, how = ids_of(llama, LENGTH), dict(max_new_tokens=12, do_sample=False)
    plain = llama._module.generate(ids, past_key_values=ChunkCache(llama, SIZE, Reader(3)), **how)
    with llama.generate(ids, past_key_values=ChunkCache(llama, SIZE, Reader(3)), **how) as generated:
        ours = generated.result.save()
    assert torch.equal(ours, plain)
    full = llama._module.generate(ids, past_key_values=ChunkCache(llama, SIZE, Reader(None)), **how)
    assert torch.equal(full, llama._module.generate(ids, **how)) and not torch.equal(full, plain)


def test_reset_serves_another_prompt_and_bytes_are_counted(llama):
    one, other = ids_of(llama, 30), ids_of(llama, 30, seed=7)
    cache, fresh = ChunkCache(llama, SIZE, Reader(3)), ChunkCache(llama, SIZE, Reader(3))
    for ids, into in ((one, cache), (other, fresh)):
        found = [logits_of(llama, part, past_key_values=into, use_cache=True) for part in (ids[:, :LENGTH], ids[:, LENGTH:])]
    cache.reset()
    again = [logits_of(llama, part, past_key_values=cache, use_cache=True) for part in (other[:, :LENGTH], other[:, LENGTH:])]
    near(again[1], found[1])
    rest, width = 30 % SIZE, llama.anatomy.d_head
    assert cache.nbytes() == 4 * 4 * width * (2 * 2 * 30 + 4 * rest + 2 * 4 * (30 // SIZE))


@pytest.mark.parametrize(
    ("family", "words"),
    [("gpt2", "gpt2 model has no single rotary"), ("opt", "opt model has no single rotary"), ("mistral", "sees a window only"),
     ("gemma2", "see a sliding window only"), ("gemma3", "see a sliding window only"), ("gpt-oss", "sliding window"),
     ("smollm3", "still depend on their position"), ("bert", "bert is an encoder")],
)  # fmt: skip
def test_models_whose_chunks_cannot_be_moved_are_refused(family, words):
    with pytest.raises(ValueError, match=words):
        ChunkCache(tiny(family), SIZE)


def read(model, ids, part=None, readers=(Reader(3),), size=SIZE, **how):
    cache = ChunkCache(model, size, readers)
    with torch.no_grad():
        model._module(ids, past_key_values=cache, use_cache=True)
        return cache if part is None else model._module(part, past_key_values=cache, use_cache=True, **how)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: ChunkCache(m, 1), ValueError, "size"),
        (lambda m: Reader(2), ValueError, "count"),
        (lambda m: Reader(2.5), TypeError, "count"),
        (lambda m: ChunkCache(m, 4, []), ValueError, "one or more"),
        (lambda m: ChunkCache(m, 4, [3]), ValueError, "readers are heads.Reader"),
        (lambda m: read(m, ids_of(m, 3)), ValueError, "has 3 tokens, less than a chunk of 4"),
        (lambda m: read(m, ids_of(m, 20), ids_of(m, 1, 2)), ValueError, "2 rows: expected 1, for each of 1 readers the 1 prompts"),
        (lambda m: read(m, ids_of(m, 20), ids_of(m, 1), Reader(3, lambda look: look.queries)), ValueError, "scores are .*head, query, chunk"),
        (lambda m: read(m, ids_of(m, 20)).crop(-1), NotImplementedError, "not cropped"),
        (lambda m: m._module.generate(ids_of(m, 9), past_key_values=ChunkCache(m, 4), num_beams=2, max_new_tokens=3),
         NotImplementedError, "reordered"),
        (lambda m: ChunkCache(m, 4).fork(Reader(3)), ValueError, "forked when its prompts were read"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(llama, make, error, words):
    with pytest.raises(error, match=words):
        make(llama)


def test_a_cache_that_went_on_is_not_forked(llama):
    cache = read(llama, ids_of(llama, 20))
    logits_of(llama, ids_of(llama, 1), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="nothing else yet"):
        cache.fork(Reader(3))


def test_padding_and_patterns_are_refused(llama):
    with pytest.raises(ValueError, match="hidden from a token"):
        llama._module(**padded(llama, ["a short one", "and a longer one, so that the first is padded"]), past_key_values=ChunkCache(llama, 4))
    cache = read(llama, ids_of(llama, 20))
    with pytest.raises(NotImplementedError, match="no pattern"), torch.no_grad(), llama.trace(ids_of(llama, 1), past_key_values=cache):
        llama.layers[1].attn.pattern.save()


def test_soft_caps_and_sinks_are_refused_where_they_appear(llama):
    layer, module = ChunkCache(llama, SIZE).layers[0], llama.layers[0].attn._module
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    for part, how in ((slice(8), {}), (slice(8, 9), {"softcap": 5.0})):
        marked, values = layer.update(k[:, :, part], k[:, :, part])
        if how:
            with pytest.raises(ValueError, match="layer 0 caps its attention"):
                attention(module, q[:, :, part], marked, values, None, **how)
        else:
            attention(module, q[:, :, part], marked, values, None)


def test_the_best_chunks_and_the_forced_ones():
    look = Look(0, torch.ones(1, 1, 1, 2), torch.tensor([9.0, 1, 5, 2, 4, 0])[None, None, :, None].expand(1, 1, 6, 2), torch.zeros(1, 1, 6, 2))
    read = {reader: reader.choose(look)[0, 0, 0].nonzero().flatten().tolist() for reader in (Reader(4), Reader(3), Reader(4, first=False), Reader(7), Reader(6))}
    assert list(read.values()) == [[0, 2, 5], [0, 5], [2, 4, 5], [0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5]]
    assert math.isclose(by_key(look)[0, 0, 0, 2].item(), 10) and heads.Reader is Reader


def test_the_last_complete_chunk_is_read_also_where_it_is_the_first(llama):
    for quirk in (False, True):
        cache = heads.ChunkCache(llama, 4, [heads.Reader(3), heads.Reader(3, first=False)], quirk=quirk)
        llama._module(ids_of(llama, 5), past_key_values=cache)
        found = llama._module(ids_of(llama, 3, 2), past_key_values=cache).logits
        assert found.isfinite().all()
    alone = heads.ChunkCache(llama, 4, heads.Reader(3, first=False))
    llama._module(ids_of(llama, 5), past_key_values=alone)
    assert llama._module(ids_of(llama, 3), past_key_values=alone).logits.isfinite().all()
