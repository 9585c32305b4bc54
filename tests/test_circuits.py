"""Weight circuits equal what plain transformers compute, and scores equal slow loops."""

import pytest
import torch
from conftest import fresh, ids_of, near, plain_of, tiny

from heads.lab.circuits import (
    KINDS,
    copying_score,
    effective_embedding,
    input_norm,
    ov,
    ov_logits,
    qk,
    successor_score,
)  # fmt: skip
from heads.model.weights import norm

HEADS = [(0, 0), (1, 3), (3, 2)]


def random_streams(model, n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, model.anatomy.d_model, generator=torch.Generator().manual_seed(seed)) * 2


# ----------------------------------------------------------------------------------------- norms


def test_a_norm_taken_apart_is_the_norm(decoder):
    plain, x = plain_of(decoder), random_streams(decoder)
    for module in (*plain.norms(1), plain.norm):
        near(norm(module)(x), module(x))
        u, parts = random_streams(decoder, seed=1), norm(module)
        bias = 0 if parts.bias is None else u @ parts.bias
        near((x * parts.back(u)).sum(-1) / parts.scale(x).squeeze(-1) + bias, (module(x) * u).sum(-1))


def test_a_norm_with_one_large_weight_is_still_told_from_the_same_norm_of_one_more():
    """Within 2 % of its largest number, w and 1 + w are both near where a weight is 162, as in Gemma 3 270M."""
    module = tiny("gemma3").layers[0].input_layernorm._module
    x = random_streams(tiny("gemma3"))
    kept = module.weight.detach().clone()
    with torch.no_grad():
        try:
            module.weight.copy_(torch.linspace(0, 1, len(kept))).put_(torch.tensor([-1]), torch.tensor([162.0]))
            near(norm(module)(x), module(x))
        finally:
            module.weight.copy_(kept)


def test_a_module_that_is_no_norm_is_refused():
    class Odd(torch.nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) ** 2

    module = Odd(8, eps=1e-6)
    with pytest.raises(ValueError, match="Odd is no layer or RMS norm"):
        norm(module)


# ------------------------------------------------------------------------------------ OV and QK


def test_ov_is_what_a_head_writes_about_a_token_alone(decoder):
    """A token alone can attend to itself only: its z is its value, and the stream that entered is known."""
    plain, ids = plain_of(decoder), ids_of(decoder, length=1, rows=6)
    z, entered = plain.z(ids), [x[:, -1] for x in plain.streams(ids)]
    for layer, head in HEADS:
        written = z[layer][:, 0, head] @ plain.slices(layer)[head]
        circuit = ov(decoder, layer, head)
        near(circuit(input_norm(decoder, layer)(entered[layer])), written, scale=2)
        assert circuit.left.shape == (decoder.anatomy.d_model, decoder.anatomy.d_head)
        x = random_streams(decoder)
        near(circuit(x) - circuit(0 * x), x @ circuit.left @ circuit.right, scale=2)


def test_heads_of_a_group_share_values_but_not_outputs(llama):
    first, second, other = ov(llama, 1, 0), ov(llama, 1, 1), ov(llama, 1, 2)
    assert torch.equal(first.left, second.left) and not torch.equal(first.right, second.right)
    assert not torch.equal(second.left, other.left)


def test_qk_gives_the_attention_of_tokens_at_one_position(decoder):
    """All tokens at position 0: rotations cancel, and the pattern is the softmax of the weights' bilinear form."""
    plain, n = plain_of(decoder), 6
    ids, raw, handles = ids_of(decoder, length=n), {}, []
    if plain.family in ("qwen3", "gemma3"):
        for i, block in enumerate(plain.blocks):
            for which in "qk":
                module = getattr(block.self_attn, f"{which}_proj")
                handles.append(module.register_forward_hook(
                    lambda _, args, out, key=(i, which): raw.update({key: out[0].unflatten(-1, (-1, 16))})))  # fmt: skip
    same = {"attention_mask": torch.ones(1, n, dtype=torch.long), "position_ids": torch.zeros(1, n, dtype=torch.long)}
    if plain.family == "gpt2":  # its positions are embedded: there is nothing to cancel
        del same["position_ids"]
    patterns = plain(ids, output_attentions=True, **same).attentions
    entered = [x[0] for x in plain.streams(ids, **same)]
    [handle.remove() for handle in handles]
    future = torch.ones(n, n).triu(1).bool()
    for layer, head in HEADS:
        x, circuit = input_norm(decoder, layer)(entered[layer]), qk(decoder, layer, head)
        logits = plain.capped(circuit(x) @ x.T, "attn")
        if raw:  # what the docstring leaves out: one factor for each query and each key
            group = decoder.anatomy.n_heads // decoder.anatomy.n_kv_heads
            scale = lambda y: (y.pow(2).mean(-1) + 1e-6).sqrt()  # noqa: E731
            logits = logits / scale(raw[layer, "q"][:, head])[:, None] / scale(raw[layer, "k"][:, head // group])[None]
        near(logits.masked_fill(future, -torch.inf).softmax(-1), patterns[layer][0, head], scale=5)


def test_a_head_that_does_not_exist_is_named(llama):
    for circuit in (ov, qk):
        with pytest.raises(IndexError, match=r"head \(1, 9\) does not exist"):
            circuit(llama, 1, 9)
        with pytest.raises(ValueError, match="encoder"):
            circuit(tiny("bert"), 0, 0)


# ------------------------------------------------------------------------- effective embeddings


def embedded(plain, ids):
    """Embeddings as they enter the first block, position embeddings aside."""
    return plain.module.get_input_embeddings()(ids)


def first_mlp(plain, x):
    out = plain.blocks[0].mlp(plain.norms(0)[1](x))
    return plain.blocks[0].post_feedforward_layernorm(out) if plain.post_normed else out


def test_effective_embeddings_equal_their_definitions(decoder):
    plain, ids = plain_of(decoder), ids_of(decoder, length=7)[0]
    e, bos = embedded(plain, ids), decoder.tokenizer.bos_token_id
    near(effective_embedding(decoder, ids, "mlp0", batch=3), first_mlp(plain, e))
    near(effective_embedding(decoder, ids, "e+mlp0", batch=3), e + first_mlp(plain, e))
    pairs = torch.stack([torch.full_like(ids, bos), ids], 1)
    alone = plain(ids[:, None], output_hidden_states=True).hidden_states
    after = plain(pairs, output_hidden_states=True).hidden_states
    near(effective_embedding(decoder, ids, "block0", batch=3), alone[1][:, 0])
    found = effective_embedding(decoder, ids, "resid", batch=3)
    assert found.shape == (4, 7, decoder.anatomy.d_model)
    near(found, torch.stack([x[:, 1] for x in after[:4]]))
    if plain.family != "gpt2":  # which adds positions; elsewhere this is what enters the first block, Gemma's scale included
        near(e, alone[0][:, 0])
    if plain.family.startswith("gemma"):
        assert e.abs().mean() > 4 * plain.module.get_input_embeddings().weight[ids].abs().mean()


def test_a_kind_is_named_if_unknown(llama):
    with pytest.raises(LookupError, match="'mlp1'. Did you mean 'mlp0' .*Known: mlp0, e.mlp0, block0, resid"):
        effective_embedding(llama, torch.tensor([5]), "mlp1")
    with pytest.raises(ValueError, match="at least one token"):
        effective_embedding(llama, torch.tensor([], dtype=torch.long))


# --------------------------------------------------------------------------------------- scores


LISTS = {
    "open": (torch.tensor([10, 17, 31, 42, 55, 61]), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]])),
    "cyclic": (torch.tensor([77, 80, 91, 103]), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])),
}


def slow_hits(model, ids, pairs, effective: str, with_input: bool = True) -> torch.Tensor:
    """Literally: each head, each pair, one token at a time, in the weights of plain transformers `[pair, layer, head]`."""
    plain = plain_of(model)
    blocks, n, final, unembed = plain.blocks, plain.n_heads, plain.norm, plain.unembed.weight
    hits = torch.zeros(len(pairs), plain.n_layers, n)
    for p, (source, target) in enumerate(pairs.tolist()):
        streams = effective_embedding(model, ids[source : source + 1], effective)
        for layer in range(plain.n_layers):
            x = streams[layer] if effective == "resid" else streams
            seen = {}
            handle = plain.projections[layer].register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
            hook = blocks[layer].register_forward_pre_hook(swap(x), with_kwargs=True)
            plain(ids[source].view(1, 1))  # a token alone: z is the value of what enters the block
            handle.remove(), hook.remove()
            for head in range(n):
                written = seen["z"].view(n, -1)[head] @ plain.slices(layer)[head]
                if plain.post_normed:
                    written = blocks[layer].post_attention_layernorm(written * 1e3)
                logits = (final(written) - final(0 * written)) @ unembed[ids].T
                if not with_input:
                    logits[source] = -torch.inf
                hits[p, layer, head] = logits.argmax() == target
    return hits


def swap(x):
    def hook(_, args, kwargs):
        return ((x[None], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x[None]})

    return hook


@pytest.mark.parametrize("effective", KINDS)
def test_successor_score_equals_a_slow_loop(decoder, effective):
    found = successor_score(decoder, LISTS, effective, batch=3)
    slow = {name: slow_hits(decoder, *lists, effective) for name, lists in LISTS.items()}
    near(torch.tensor(found.values).float(), torch.cat(list(slow.values())).mean(0))
    for name, hits in slow.items():
        near(torch.tensor(found.lists[name].values).float(), hits.mean(0))
    assert found.pairs == {"open": 5, "cyclic": 4} and abs(found.chance - (5 / 6 + 4 / 4) / 9) < 1e-9


@pytest.mark.parametrize("effective", KINDS)
def test_effective_embeddings_may_be_handed_over(llama, effective):
    x = effective_embedding(llama, torch.cat([ids for ids, _ in LISTS.values()]), effective)
    assert (successor_score(llama, LISTS, x).values == successor_score(llama, LISTS, effective).values).all()
    with pytest.raises(ValueError, match=f"of {x.shape[-2] - 1} tokens, but the lists with pairs hold {x.shape[-2]} items"):
        successor_score(llama, LISTS, x[..., 1:, :])


def test_the_input_token_may_be_left_out(llama):
    found = successor_score(llama, LISTS, with_input=False)
    slow = torch.cat([slow_hits(llama, *lists, "mlp0", with_input=False) for lists in LISTS.values()])
    near(torch.tensor(found.values).float(), slow.mean(0))
    assert (found.values >= successor_score(llama, LISTS).values).all()
    assert abs(found.chance - (5 / 5 + 4 / 3) / 9) < 1e-9


def test_copying_is_the_same_score_with_each_token_as_its_own_target(decoder):
    ids = torch.tensor([10, 17, 31, 42])
    every = torch.arange(4)[:, None].expand(-1, 2)
    near(torch.tensor(copying_score(decoder, ids).values).float(), slow_hits(decoder, ids, every, "mlp0").mean(0))
    pooled = copying_score(decoder, LISTS)
    assert pooled.name == "copying score" and pooled.pairs == {"open": 5, "cyclic": 4}


def test_ov_logits_rank_as_the_score_does(decoder):
    ids, pairs = LISTS["open"]
    x = effective_embedding(decoder, ids, "e+mlp0")
    found = successor_score(decoder, {"open": (ids, pairs)}, "e+mlp0")
    for layer, head in HEADS:
        logits = ov_logits(decoder, layer, head, x, ids)
        assert logits.shape == (6, 6)
        assert found[layer, head] == pytest.approx((logits.argmax(-1)[pairs[:, 0]] == pairs[:, 1]).float().mean().item())


def test_a_planted_successor_head_is_found():
    """Write a head that maps each item's input to its successor: the score sees it, copying and predecessors do not."""
    import heads

    model = fresh("llama")
    ids, pairs = torch.tensor([77, 80, 91, 103, 120, 130]), torch.tensor([[i, (i + 1) % 6] for i in range(6)])
    x = input_norm(model, 2)(effective_embedding(model, ids))
    unembed = model.unembed._module.weight[ids].float() * norm(model.final_norm._module).weight
    with torch.no_grad():
        kv, d = 0, model.anatomy.d_head
        model.layers[2].attn._module.v_proj.weight[kv * d : kv * d + 6] = torch.linalg.pinv(x)[:, :6].T
        output = heads.output_projection(model, 2)[d : d + d]  # head 1 reads group 0
        output.zero_()[:6] = torch.linalg.pinv(unembed).T[pairs[:, 1]]
    lists = {"planted": (ids, pairs)}
    assert successor_score(model, lists).top(1) == [(2, 1)] and successor_score(model, lists)[2, 1] == 1
    assert copying_score(model, lists)[2, 1] == 0
    assert successor_score(model, {"turned round": (ids, pairs.flip(1))})[2, 1] == 0


@pytest.mark.parametrize(
    "lists, words",
    [
        ({}, "no list has a pair"),
        ({"x": (torch.tensor([5, 6]), torch.zeros(0, 2))}, "no list has a pair"),
        ({"x": (torch.tensor([5, 6]), torch.tensor([[0, 2]]))}, "'x'.*item 2.*0 to 1"),
        ({"x": (torch.tensor([5, 6]), torch.tensor([0, 1]))}, "'x'.*expected ids"),
        ({"x": (torch.tensor([5, 5]), torch.tensor([[0, 1]]))}, "'x' holds a token twice"),
    ],
)
def test_bad_lists_are_refused(llama, lists, words):
    with pytest.raises(ValueError, match=words):
        successor_score(llama, lists)


def test_bad_maps_are_refused(llama):
    with pytest.raises(ValueError, match="maps a token to itself"):
        successor_score(llama, {"copy": (torch.arange(5, 9), torch.arange(4)[:, None].expand(-1, 2))}, with_input=False)
