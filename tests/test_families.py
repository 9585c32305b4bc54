"""What is read from weights, and what is replayed, is right in every listed family, or is refused by name."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import ENCODERS, fresh, ids_of, logits_of, near, plain, tiny
from families import CHECKS, OF_ENCODERS, build, task_of, tried
from toys import uniform
from transformers import AutoModelForCausalLM, GenerationConfig

import heads
import heads.model.tiny
from heads.model import offers, prefix
from heads.model.attention import plain_logits
from heads.model.checks import identities
from heads.model.families import FAMILIES, TINY, family_of
from heads.model.load import wrap

# family -> what it is refused, with words of the reason
REFUSED = {
    "granite": {"direct": "does not sum to the residual stream", "MLP 0": "what enters the first layer, against the embeddings"},
    "gpt-oss": {"direct": "puts out something else", "QK": "queries times keys of layer 0", "MLP 0": "puts out something else"},
    "opt": {"direct": "puts out something else", "MLP 0": "puts out something else"},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_listed_family_is_right_or_refused_as_the_table_says(kind):
    found, family = tried(kind), dict(zip(FAMILIES, TINY))[kind]
    expected = OF_ENCODERS if family in ENCODERS else CHECKS
    assert list(found) == list(expected)
    refused = {name: text for name, text in found.items() if text != "right"}
    assert refused.keys() == REFUSED.get(family, {}).keys(), refused
    for name, words in REFUSED.get(family, {}).items():
        assert refused[name].startswith("refused: ") and words in refused[name]


# ------------------------------------------------------------------------------- kinds of faults, each with its right value


def small(kind: str, **changes):
    """A small model of a type, its config changed: (loaded, plain)."""
    config = build(kind).config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    module = heads.model.tiny.randomised(AutoModelForCausalLM.from_config(config).eval())
    model = wrap(module, heads.model.tiny.tokenizer(whole=False))
    model.record = {"name": kind, "revision": None, "sha256": None}
    return model


@pytest.mark.parametrize("kind, scale", [("cohere", 0.25), ("cohere2", 0.25), ("granite", 1 / 4)])
def test_the_scale_of_logits_is_in_every_readout(kind, scale):
    """Held against the same weights with the scale in the config put to 1."""
    one = {"logit_scale": 1.0} if kind != "granite" else {"logits_scaling": 1.0}
    model, other = small(kind), small(kind, **one)
    for verb in (heads.logit_lens, lambda m, t: torch.as_tensor(heads.ablation_scores(m, t, "zero", "END", progress=False).samples)):
        ours, theirs = verb(model, task_of()), verb(other, task_of())
        torch.testing.assert_close(ours, theirs * scale, atol=1e-4, rtol=1e-3)
        assert theirs.abs().max() > 0.05


@pytest.mark.parametrize("family", ["stablelm", "phi", "gpt2", "llama"])
def test_layers_that_hand_on_no_keywords_keep_a_shared_beginning(family):
    ours, theirs = prefix.twice(tiny(family))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_shared_beginning_that_is_lost_is_refused(monkeypatch):
    """As if the attention never asked for what is kept once: every use of it says so."""
    model = small("llama")
    monkeypatch.setattr(prefix.SharedLayer, "logits", lambda self, q: torch.full((*q.shape[:3], self.prefix_keys.shape[2]), -1e9))
    for use in (lambda: heads.Prefix(model, ids_of(model)), lambda: heads.Conditions(model, ids_of(model), {"none": []}),
                lambda: heads.ablation_scores(model, task_of(), "zero", "END", progress=False)):  # fmt: skip
        with pytest.raises(ValueError, match="keeps the beginning of a prompt once is off by"):
            use()


def test_a_bidirectional_model_is_no_decoder(monkeypatch):
    module = heads.model.tiny.build("gemma3", whole=False)[0]
    for part in module.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = False
    module.config.use_bidirectional_attention = True
    model = wrap(module, heads.model.tiny.tokenizer(whole=False))
    with pytest.raises(ValueError, match="tokens see what follows them: a bidirectional model"):
        identities(model)


@pytest.mark.parametrize("kind, refused", [("bitnet", "what enters the output projection of layer 0, against pattern times values")])
def test_a_norm_between_heads_and_projection_is_named(kind, refused):
    with pytest.raises(ValueError, match=f"'ov' is not offered for this {kind} model: {refused}"):
        heads.ov(small(kind), 0, 0)


def test_norms_of_queries_and_keys_of_another_name_are_found_out():
    """HunYuan calls them query_layernorm and key_layernorm: its row would be read as having none."""
    with pytest.raises(ValueError, match="'qk' is not offered for this hunyuan_v1_dense model: queries times keys of layer 0"):
        heads.qk(small("hunyuan_v1_dense"), 0, 0)


def test_an_adapter_belongs_to_the_circuit():
    model = fresh("llama", seed=4)
    before = heads.ov(model, 1, 2).left.clone()
    with heads.lora(model, rank=2, parts="qkvo") as adapter, torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
        assert (heads.ov(model, 1, 2).left - before).abs().max() > 1e-2
        seen = offers._seen(model)
        assert not any(offers._why(check, model, seen) for check in offers.CHECKS.values())
    assert torch.equal(heads.ov(model, 1, 2).left, before)


@pytest.mark.parametrize("kind, words", [
    ("deepseek_v3", "one latent vector .MLA."), ("mamba", "no layers in a mamba model"), ("jetmoe", "no layer of this jetmoe model"),
    ("gptj", "computes its attention by itself"), ("falcon", "computes its attention by itself"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_reason(kind, words):
    with pytest.raises(ValueError, match=words):
        small(kind)


def test_a_family_without_a_row_says_what_was_checked(tmp_path):
    module = build("olmo")
    module.save_pretrained(tmp_path)
    heads.model.tiny.tokenizer(whole=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="olmo is not a listed family; it loads. Checked: heads, patterns, edits.*not offered: "):
        heads.load(str(tmp_path), device="cpu")


def test_a_hybrid_has_heads_where_it_has_attention():
    """Qwen3-Next: one layer of four. Reading, cutting and generating there are in tests/families.py."""
    model, task = small("qwen3_next"), task_of()
    assert model.anatomy.attention_layers == [3] and model.anatomy.n == 4 and "(heads in layers 3 only)" in str(model.anatomy)
    with pytest.raises(IndexError, match=r"layer 1 has no heads: only \[3\] are attention layers"):
        heads.ablate(model, [(1, 0)])
    for verb in (
        lambda: heads.ablation_scores(model, task), lambda: heads.path_scores(model, task), lambda: heads.attention_to(model, task),
        lambda: heads.direct_attribution(model, task), lambda: heads.attribution_patching(model, task),
        lambda: heads.head_means(model, ["a", "b"]), lambda: next(heads.decode_rows(model, task.ids[:1])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="only layers .3. of this qwen3_next model have heads|puts out something else"):
            verb()
    with pytest.raises(ValueError, match="keeps the beginning of a prompt once fails"):
        heads.Prefix(model, task.ids)


@pytest.mark.parametrize("phase, at", [("both", slice(None)), ("decode", [11])])
def test_uniform_attention_leaves_a_sink_its_share(phase, at):
    """gpt-oss: logits of zero, and beside them the sink's own."""
    model, chosen = tiny("gpt-oss"), [(0, 1), (1, 3), (2, 0), (3, 2)]
    ids = ids_of(model)
    with uniform(plain("gpt-oss"), chosen, at):
        near(logits_of(heads.ablate(model, chosen, "uniform", phase=phase), ids), plain("gpt-oss")(ids).logits)
    assert (logits_of(heads.ablate(model, chosen, "uniform", phase=phase), ids) - logits_of(model, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_model_of_images_and_text_is_read_by_its_text_model(kind, tmp_path):
    module = build(kind)
    module.save_pretrained(tmp_path)
    heads.model.tiny.tokenizer(whole=False).save_pretrained(tmp_path)
    model = heads.load(str(tmp_path), device="cpu")
    assert family_of(module.config).layers == "model.language_model.layers" and model.anatomy.n_layers == 4
    with torch.no_grad(), model.trace("a text"):
        z = model.layers[2].attn.heads.save()
    assert z.shape == (1, 6, 4, 8)


# ------------------------------------------------------------------------------------------ what checks alone would not see

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("kind, rope, context", [("phi3", LONG, 160), ("llama", DYNAMIC, 40)])
def test_rotary_positions_that_depend_on_the_length_are_not_kept_across_their_limit(kind, rope, context):
    """A short check cannot see it: what was kept of 36 tokens is not that of a run of 48."""
    model = small(kind, rope_parameters=rope, max_position_embeddings=context, original_max_position_embeddings=40)
    ids = torch.randint(5, 200, (1, 48), generator=torch.Generator().manual_seed(0))
    near(logits_of(model, ids[:, :38]), plain_of_module(model, ids[:, :38]))
    kept = heads.Prefix(model, ids[:, :36])
    with pytest.raises(Exception, match="rotary positions of this .* model change behind 40 tokens"):
        logits_of(model, ids[:, 36:], past_key_values=kept.cache(), use_cache=True)
    task = replace(task_of(), ids=ids.repeat(3, 1), corrupted=(ids + 1).repeat(3, 1), roles={"S": torch.full((3,), 38)})
    with pytest.raises(ValueError, match="rotary positions"):
        heads.ablation_scores(model, task, "zero", "S", progress=False)


def plain_of_module(model, ids):
    return plain_logits(model._module, ids)


def test_a_cache_of_another_model_or_of_other_edits_is_refused():
    model, other = tiny("llama"), fresh("llama", seed=5)
    ids = ids_of(model)
    with pytest.raises(Exception, match="keeps the prompts of another model"):
        logits_of(model, ids[:, -1:], past_key_values=heads.Prefix(other, ids[:, :-1]).cache(), use_cache=True)
    for wrong in (heads.Prefix(other, ids[:, :-1]), heads.Prefix(heads.ablate(model, [(1, 0)]), ids[:, :-1], ids.shape[1])):
        with pytest.raises(ValueError, match="read by another model, or with other edits"):
            heads.Conditions(model, ids, {"none": []}, prefix=wrong)


def test_a_mask_of_four_dimensions_cannot_tell_padding():
    model, ids = tiny("llama"), ids_of(tiny("llama"), 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with pytest.raises(Exception, match="which tokens are padding cannot be told"), torch.no_grad():
        with heads.ablate(model, [(1, 0)], positions=[0]).trace(input_ids=ids, attention_mask=mask):
            model.logits.save()
    near(logits_of(model, ids, attention_mask=mask), plain_logits(model._module, ids))


@pytest.mark.parametrize("family, length", [("gpt2", 513), ("roberta", 514), ("llama", 513)])
@pytest.mark.parametrize("run", [
    lambda m, ids: m(ids), logits_of, lambda m, ids: m.generate(ids[:, :510], max_length=520, do_sample=False),
    lambda m, ids: m.generate(ids[:, :510], generation_config=GenerationConfig(max_new_tokens=8)),
], ids=["called", "traced", "max_length", "generation_config"])  # fmt: skip
def test_a_run_beyond_the_context_is_said_first(family, length, run, request):
    """Learned positions end there; rotary ones go on, untrained."""
    if family == "roberta" and ("generation_config" in request.node.name or "max_length" in request.node.name):
        pytest.skip("an encoder writes nothing")
    told = pytest.warns(UserWarning, match="a run has more tokens than the 512") if family == "llama" else pytest.raises(
        Exception, match="are more than the 51[0-9] of this")  # fmt: skip
    with told:
        run(tiny(family), torch.full((1, length), 7))


def test_a_pattern_that_is_ours_in_all_layers_but_one_fails():
    model = small("llama")
    attn = model._module.model.layers[0].self_attn
    attn.config = copy.deepcopy(attn.config)
    attn.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="zeroing the patterns of all layers is not zeroing their heads"):
        identities(model)
