"""Steering equals plain hooks, changes nothing with gates of zero, trains only its own tensors, and fits one model."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import fresh, ids_of, logits_of, near, padded, plain_logits, plain_of, tiny
from safetensors import safe_open

import heads
from heads.lab.steering import HOW, Steering

CHOSEN = [(2, 3), (0, 1), (2, 0)]
TEXTS = ["ten brown owls on a roof", "a grey teapot", "the"]
PAIRS = [("Q: big\nA:", " small"), ("Q: light red\nA:", " d"), ("Q: up\nA:", " down")]


def steered(*args, **kwargs):
    """The model with its heads steered."""
    return Steering(*args, **kwargs).edited


def drawn(model, seed: int = 0):
    """Vectors `[layer, head, d_head]` and gates `[layer, head]` in (0, 1)."""
    a, generator = model.anatomy, torch.Generator().manual_seed(seed)
    vectors = torch.randn(a.n_layers, a.n_heads, a.d_head, generator=generator)
    return vectors, torch.rand(a.n_layers, a.n_heads, generator=generator)


def formula(how, z, vector, gate):
    gate = gate[:, None]
    if how == "replace":
        return torch.where(gate.bool(), vector, z)
    return {"add": z + gate * vector, "scale": (1 + gate * vector) * z, "mix": (1 - gate) * z + gate * vector}[how]


def by_hand(plain, how, vectors, gates, at=slice(None), heads=None):
    """Plain torch hooks; `at` is what of [row, position] is steered."""

    def change(layer, z):
        new, chosen = z.clone(), slice(None) if heads is None else [h for i, h in heads if i == layer]
        new[at] = formula(how, z, vectors[layer], gates[layer])[at]
        z[:, :, chosen] = new[:, :, chosen]
        return z

    return plain.edited(change)


# --------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chosen", [None, CHOSEN], ids=["all heads", "some"])
def test_steering_equals_plain_hooks(decoder, how, chosen):
    ids, plain, (vectors, gates) = ids_of(decoder, rows=2), plain_of(decoder), drawn(decoder)
    gates = gates.round() if how == "replace" else gates
    steering = Steering(decoder, vectors, gates, how, heads=chosen)
    found = logits_of(steering.edited, ids)
    with by_hand(plain, how, vectors, gates, heads=chosen):
        near(found, plain(ids).logits)
    assert (found - plain_logits(decoder, ids)).abs().max() > 1e-2, "nothing was steered"
    with steering.hooks():
        near(plain_logits(decoder, ids), found)
    assert torch.equal(plain_logits(decoder, ids), logits_of(decoder, ids))


@pytest.mark.parametrize("how", HOW)
def test_gates_of_zero_change_nothing_to_the_bit(decoder, how):
    ids, (vectors, _) = ids_of(decoder), drawn(decoder)
    clean = logits_of(decoder, ids)
    steering = Steering(decoder, vectors, 0.0, how)
    assert torch.equal(logits_of(steering.edited, ids), clean)
    with steering.hooks():
        assert torch.equal(plain_logits(decoder, ids), clean)
    assert torch.equal(logits_of(steered(decoder, vectors, 1.0, how, positions=[]), ids), clean)
    nothing = torch.zeros(0, decoder.anatomy.d_head)
    assert torch.equal(logits_of(steered(decoder, nothing, 1.0, how, heads=[]), ids), clean)


def test_gates_of_one_put_the_vector_in_place(llama):
    ids, (vectors, _) = ids_of(llama), drawn(llama)
    mixed, replaced = (logits_of(steered(llama, vectors, 1.0, how), ids) for how in ("mix", "replace"))
    assert torch.equal(mixed, replaced)
    near(mixed, logits_of(heads.ablate(llama, [(i, h) for i in range(4) for h in range(4)], "mean", values=vectors), ids))


def test_listed_values_go_to_their_heads_in_the_order_of_the_list(llama):
    ids, (vectors, gates) = ids_of(llama), drawn(llama)
    index = tuple(zip(*CHOSEN))
    listed = steered(llama, vectors[index], gates[index], "mix", heads=CHOSEN)
    assert torch.equal(logits_of(listed, ids), logits_of(steered(llama, vectors, gates, "mix", heads=CHOSEN), ids))


def test_edits_stack_and_the_model_stays(llama):
    ids, (vectors, gates) = ids_of(llama), drawn(llama)
    clean = logits_of(llama, ids)
    twice = heads.ablate(steered(llama, vectors, gates), CHOSEN)
    with plain_of(llama).edited(lambda layer, z: z + gates[layer][:, None] * vectors[layer] * keep(layer)) as plain:
        near(logits_of(steered(llama, vectors * mask_of(), gates), ids), plain(ids).logits)
    assert not torch.equal(logits_of(twice, ids), clean) and torch.equal(logits_of(llama, ids), clean)


def mask_of():
    mask = torch.ones(4, 4, 1)
    for head in CHOSEN:
        mask[head] = 0
    return mask


def keep(layer):
    return mask_of()[layer]


# ------------------------------------------------------------------------------- where and when


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [[-1], [0], [0, -2], [2]])
def test_positions_count_real_tokens_on_both_sides_of_padding(decoder, side, positions):
    vectors, gates = drawn(decoder)
    inputs = padded(decoder, TEXTS, side)
    edited = steered(decoder, vectors, gates, "mix", positions=positions)
    found = logits_of(edited, inputs.pop("input_ids"), **inputs)
    for row, text in enumerate(TEXTS):
        ids = decoder.ids(text)
        at = (slice(None), [p for p in positions if -ids.shape[1] <= p < ids.shape[1]])
        with by_hand(plain_of(decoder), "mix", vectors, gates, at) as plain:
            expected = plain(ids).logits[0]
        real = found[row, -len(expected) :] if side == "left" else found[row, : len(expected)]
        near(real, expected)


def test_positions_may_be_given_row_by_row(llama):
    ids, (vectors, gates) = ids_of(llama, rows=3), drawn(llama)
    at = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    found = logits_of(steered(llama, vectors, gates, positions=at), ids)
    with by_hand(plain_of(llama), "add", vectors, gates, at) as plain:
        near(found, plain(ids).logits)
    with pytest.raises(ValueError, match=r"\[row, position\]"):
        logits_of(steered(llama, vectors, gates, positions=at), ids[:2])


@pytest.mark.parametrize(
    "where, at",
    [
        ({}, lambda n: slice(None)),
        ({"positions": [-1], "decode": False}, lambda n: [9]),
        ({"positions": [-1]}, lambda n: slice(9, None)),
        ({"positions": [], "decode": [1, 3]}, lambda n: [p for p in (10, 12) if p < n]),
        ({"decode": False}, lambda n: slice(0, 10)),
    ],
    ids=["everywhere", "last prompt token", "and all that follow", "tokens one and three", "prompt"],
)
def test_generation_is_steered_where_it_is_told(decoder, where, at):
    """Against a plain model that reads everything again for each token, without a cache."""
    ids, (vectors, gates) = ids_of(decoder, length=10), drawn(decoder)
    edited = steered(decoder, 3 * vectors, gates, "mix", **where)
    with edited.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False) as tracer:
        found = tracer.result.save()
    grown, plain = ids, plain_of(decoder)
    for _ in range(5):
        with by_hand(plain, "mix", 3 * vectors, gates, (slice(None), at(grown.shape[1]))):
            logits = plain(grown).logits[:, -1:]
        logits[..., plain.module.config.eos_token_id] = -torch.inf  # min_new_tokens
        grown = torch.cat([grown, logits.argmax(-1)], 1)
    assert torch.equal(found, grown)


def test_a_cached_prefix_and_the_last_token_equal_the_whole_prompt(decoder):
    """What soft injection trains on: only the last token is steered, so its prefix can be kept."""
    ids, (vectors, gates) = ids_of(decoder), drawn(decoder)
    edited = steered(decoder, vectors, gates, "mix", positions=[-1], decode=False)
    cache = heads.prefill(decoder, ids[:, :-1])
    whole = logits_of(edited, ids)[:, -1]
    near(logits_of(edited, ids[:, -1:], past_key_values=cache)[:, -1], whole)


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_hooks_steer_a_generation_where_its_trace_does(family, how):
    """Whoever generates: the module, the loaded model without a trace, or in one."""
    model, options = tiny(family), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **how}
    ids, (vectors, gates) = ids_of(model, length=10), drawn(model)
    mask = torch.ones_like(ids)
    steering = Steering(model, 3 * vectors, gates, "mix", positions=[-1, 2], decode=[2])
    grown, plain = ids, plain_of(model)
    for _ in range(4):
        with by_hand(plain, "mix", 3 * vectors, gates, (slice(None), [p for p in (2, 9, 11) if p < grown.shape[1]])):
            logits = plain(grown).logits[:, -1:]
        logits[..., plain.module.config.eos_token_id] = -torch.inf  # min_new_tokens
        grown = torch.cat([grown, logits.argmax(-1)], 1)
    with steering.edited.generate(ids, **options) as tracer:
        traced = tracer.result.save()
    with steering.hooks():
        own = model._module.generate(ids, attention_mask=mask, **options)
        direct = model.generate(ids, **options)
        with model.generate(ids, **options) as tracer:
            inside = tracer.result.save()
    for found in (traced, own, direct, inside):
        assert torch.equal(found, grown)
    clean = model._module.generate(ids, attention_mask=mask, **options)
    assert torch.equal(clean, plain.module.generate(ids, attention_mask=mask, **{**options, "cache_implementation": None}))


def test_the_length_of_the_prompt_is_told_and_saved(llama, tmp_path):
    ids, (vectors, gates), plain = ids_of(llama), drawn(llama), plain_of(llama)
    made = Steering(llama, vectors, gates, positions=[-1], decode=[2], prompt=9)
    again = Steering.load(made.save(tmp_path / "x.safetensors"), llama)
    assert again.places == made.places and again.places.prompt == 9
    with by_hand(plain, "add", vectors, gates, (slice(None), [8, 10])):
        wanted = plain(ids).logits
    near(logits_of(made.edited, ids), wanted)
    with again.hooks():
        near(plain_logits(llama, ids), wanted)


def test_a_file_from_before_there_was_a_prompt_is_read(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    path = Steering(llama, drawn(llama)[0], positions=[2]).save(tmp_path / "x.safetensors")
    about = json.loads(safe_open(path, "pt").metadata()["heads"])
    assert about.pop("prompt") is None
    save_file(load_file(path), path, {"heads": json.dumps(about)})
    assert Steering.load(path, llama).places == Steering(llama, drawn(llama)[0], positions=[2]).places


@pytest.mark.parametrize("how", ["add", "scale", "mix"])
def test_gradients_flow_to_gates_and_vectors_only_and_equal_plain_ones(decoder, how):
    data, (vectors, gates) = heads.examples(decoder, PAIRS), drawn(decoder)
    vectors.requires_grad_(), gates.requires_grad_()
    found = []
    steering = Steering(decoder, vectors, gates, how, positions=[-1])
    heads.answer_loss(steering.edited, data).backward()
    found.append((vectors.grad.clone(), gates.grad.clone()))
    assert all(p.grad is None for p in decoder._module.parameters())
    vectors.grad = gates.grad = None
    with steering.hooks():
        heads.answer_loss(decoder, data).backward()
    for one, two in zip(found[0], (vectors.grad, gates.grad)):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


def test_gates_train_through_a_sigmoid_and_only_they(llama):
    before = {name: tensor.clone() for name, tensor in llama._module.state_dict().items()}
    data, (vectors, _) = heads.examples(llama, PAIRS, first=1), drawn(llama)
    w = torch.zeros(4, 4, requires_grad=True)
    edited = steered(llama, vectors, lambda: w.sigmoid(), "mix", positions=[-1], decode=False)
    done = heads.fit(w, lambda batch: heads.answer_loss(edited, batch), data, steps=15, lr=0.2)
    assert done.losses[-1] < done.losses[0] and w.abs().min() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama._module.state_dict().items())


def test_offsets_of_listed_heads_train(llama):
    data, v = heads.examples(llama, PAIRS), torch.zeros(len(CHOSEN), 8, requires_grad=True)
    edited = steered(llama, v, heads=CHOSEN)
    assert torch.equal(logits_of(edited, ids_of(llama)), logits_of(llama, ids_of(llama)))
    done = heads.fit(v, lambda batch: heads.answer_loss(edited, batch), data, steps=10, lr=0.1)
    assert done.losses[-1] < done.losses[0]


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("listed", [False, True])
def test_a_saved_steering_comes_back_and_acts_the_same(decoder, tmp_path, listed):
    ids, (vectors, gates) = ids_of(decoder), drawn(decoder)
    where = {"positions": [-1, 2], "decode": [1, 2]}
    if listed:
        index = tuple(zip(*CHOSEN))
        made = Steering(decoder, lambda: vectors[index], gates[index], "mix", heads=CHOSEN, **where)
    else:
        made = Steering(decoder, vectors, lambda: gates, "mix", **where)
    path = made.save(tmp_path / "x.safetensors", recipe={"steps": 3, "seed": 0})
    again = Steering.load(path, decoder)
    assert torch.equal(logits_of(again.edited, ids), logits_of(made.edited, ids))
    assert again.recipe == {"steps": 3, "seed": 0} and again.heads == made.heads
    assert (again.places, again.how) == (made.places, made.how)


def test_a_file_refuses_another_model(llama, tmp_path):
    path = Steering(llama, drawn(llama)[0]).save(tmp_path / "x.safetensors")
    for other in (tiny("mistral"), tiny("qwen3"), fresh("llama", seed=1)):
        with pytest.raises(ValueError, match="tiny-llama.*does not fit.*differ in (sha256|family)"):
            Steering.load(path, other)
    same = fresh("llama", dtype="bfloat16")
    same.record["sha256"] = llama.record["sha256"]  # the same weights, kept in another precision
    Steering.load(path, same)


def test_other_files_are_refused(llama, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "a").write_bytes(b"not safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b", {"heads": json.dumps({"format": "else"})})
    save_file({"x": torch.zeros(1)}, tmp_path / "c")
    for name, message in (("a", "no safetensors file"), ("b", "not written by"), ("c", "not written by")):
        with pytest.raises(ValueError, match=message):
            Steering.load(tmp_path / name, llama)
    with pytest.raises(FileNotFoundError):
        Steering.load(tmp_path / "nothing", llama)


# ------------------------------------------------------------------------------------ bad input


def test_vectors_and_gates_of_another_model_are_refused(llama):
    vectors, gates = drawn(llama)
    for bad in (vectors[:3], vectors[:, :, :4], drawn(tiny("qwen3"))[0], vectors[0], torch.zeros(2, 8)):
        with pytest.raises(ValueError, match="belong to another model"):
            steered(llama, bad)
    with pytest.raises(ValueError, match="the gates are"):
        steered(llama, vectors, gates[:3])
    with pytest.raises(ValueError, match=r"\[3, 8\] for the listed heads"):
        steered(llama, vectors[0, :2], heads=CHOSEN)


@pytest.mark.parametrize("how, gate, message", [
    ("mix", 1.1, "from 0 to 1"), ("mix", -0.1, "from 0 to 1"), ("replace", 0.5, "0 or 1"), ("add", math.nan, "not finite"),
])  # fmt: skip
def test_gates_outside_their_range_are_refused(llama, how, gate, message):
    with pytest.raises(ValueError, match=message):
        steered(llama, drawn(llama)[0], gate, how)


def test_gates_that_leave_their_range_while_training_are_refused(llama):
    vectors, gates = drawn(llama)
    edited = steered(llama, vectors, gates, "mix")
    gates[0, 0] = 2.0
    with pytest.raises(Exception, match="from 0 to 1"):
        logits_of(edited, ids_of(llama))


def test_other_mistakes_are_refused(llama):
    vectors, gates = drawn(llama)
    with pytest.raises(LookupError, match="no way to steer 'multiply'. Known: add, scale, mix, replace"):
        steered(llama, vectors, how="multiply")
    with pytest.raises(IndexError, match="does not exist"):
        steered(llama, vectors, heads=[(9, 0)])
    with pytest.raises(ValueError, match="listed twice"):
        steered(llama, vectors, heads=[(0, 0), (0, 0)])
    with pytest.raises(ValueError, match="not finite"):
        steered(llama, vectors / 0)
    with pytest.raises(TypeError, match="a layer or head is a whole number, not 1.9"):
        steered(llama, vectors, heads=[(1.9, 2.7)])
    with pytest.raises(ValueError, match="one batch"):
        Steering(llama, vectors, positions=torch.ones(1, 3, dtype=torch.bool)).save("never")


# ---------------------------------------------------------------------------------------- means


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_means_at_chosen_positions_in_batches(any_model, batch):
    plain = plain_of(any_model)
    z = [torch.stack(plain.z(any_model.ids(text)))[:, 0] for text in TEXTS]  # per text [layer, position, head, d_head]
    near(heads.head_means(any_model, iter(TEXTS), positions=[-1], batch=batch), torch.stack([x[:, -1] for x in z]).mean(0))
    both = torch.stack([x[:, [0, -2]] for x in z]).mean(0)
    near(heads.head_means(any_model, TEXTS, positions=[0, -2], per_position=True, batch=batch), both)
    near(heads.head_means(any_model, TEXTS, positions=[0, -2], batch=batch), both.mean(1))
    everything = torch.cat(z, 1).mean(1)
    near(heads.head_means(any_model, TEXTS, per_position=False, batch=batch), everything)
    near(heads.head_activations(any_model, TEXTS, -1, batch), torch.stack([x[:, -1] for x in z]))
    with pytest.raises(IndexError, match="position 3 of a text with 3 tokens"):
        heads.head_means(any_model, TEXTS, positions=[3], batch=batch)


def test_means_hold_one_batch_at_a_time(llama):
    taken = []

    def stream():
        for i in range(6):
            taken.append(i)
            yield ids_of(llama, seed=i)

    seen = []
    model_trace = llama.trace
    llama.__dict__["trace"] = lambda *args, **kwargs: seen.append(len(taken)) or model_trace(*args, **kwargs)
    try:
        heads.head_means(llama, stream(), positions=[-1], batch=2)
    finally:
        del llama.__dict__["trace"]
    assert seen == [2, 4, 6]


def test_hooks_of_an_edited_model_are_refused_and_arrays_are_taken(llama):
    """Hooks act on the module alone: the edits would be lost without a word."""
    with pytest.raises(ValueError, match="the edits of this model are not"), heads.Steering(
        heads.ablate(llama, [(0, 0)]), torch.zeros(4, 4, 8)
    ).hooks():
        pass
    vectors, gates, ids = np.ones((4, 4, 8), "float32"), np.full((4, 4), 0.5, "float32"), ids_of(llama)
    found = logits_of(steered(llama, vectors, gates), ids)
    assert torch.equal(found, logits_of(steered(llama, torch.tensor(vectors), torch.tensor(gates)), ids))
    with pytest.raises(ValueError, match="they belong to another model"):
        heads.Steering(llama, 0.5)
