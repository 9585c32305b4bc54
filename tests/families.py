"""Every architecture of the installed transformers that can be built small, tried: what is right here, what is refused.

    python -m tests.families              # all: writes the second table of figures/families.md (minutes)
    python -m tests.families granite opt  # some, printed

The second opinion is the same module with transformers' own eager attention and torch's hooks. One thing is shared with the
library: the place of the output projection, whose input is what a head is.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.utils import logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

import heads
from heads.model import tiny
from heads.model.checks import identities
from heads.model.families import FAMILIES
from heads.model.load import wrap
from heads.model.weights import input_norm, projection
from heads.tasks import Task

TABLE = Path(__file__).resolve().parents[1] / "figures" / "families.md"
MARK = "## All that this transformers has"
SECONDS, PARAMETERS = 90, 5_000_000
# Every name that configs have for the same few counts. A config takes those it knows.
SMALL = {
    "vocab_size": 261, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32,
    "word_embed_proj_dim": 32, "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48, "hidden_dim": 48, "n_inner": 48,
    "d_ff": 48, "ffn_hidden_size": 48, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512, "n_ctx": 512,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "sliding_window": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rotary_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "logit_scale": 0.25, "logits_scaling": 4.0,
    "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "vocab_size_per_layer_input": 261, "hidden_size_per_layer_input": 8,
}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 8, "depth": 1, "out_hidden_size": 32, "num_hidden_layers": 1, "deepstack_visual_indexes": [0]}
OWN = {  # what a few need beside
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    **{f"qwen{v}_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}} for v in ("2", "2_5", "3")},
    "phi": {"num_key_value_heads": 4},
    "roberta": {"max_position_embeddings": 514}, "xlm-roberta": {"max_position_embeddings": 514},
    "camembert": {"max_position_embeddings": 514},
}  # fmt: skip


def build(kind: str) -> torch.nn.Module:
    """A small random model of this type; weights as those of `heads.model.tiny`."""
    if kind in FAMILIES:
        return tiny.build(kind.removesuffix("_text").replace("_", "-"), whole=False)[0]
    config = small(type(AutoConfig.for_model(kind)), OWN.get(kind, {}))
    auto = AutoModelForMaskedLM if kind in ENCODERS and kind not in DECODERS else AutoModelForCausalLM
    auto = auto if type(config) in auto._model_mapping else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(x.numel() for x in auto.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters with the small config: its names are not known here")
    torch.manual_seed(0)
    return tiny.randomised(auto.from_config(config).eval())


def takes(config, key: str) -> bool:
    try:
        return hasattr(config, key)
    except RuntimeError:  # it has one for each layer
        return False


def small(kind: type, own: dict):
    """A small config of this class, and of the configs inside it."""
    known = kind()
    wanted = {key: value for key, value in {**SMALL, **own}.items() if takes(known, key)}
    for key, inner in known.sub_configs.items():
        if getattr(known, key, None) is not None and inner.__name__ != "AutoConfig":
            wanted[key] = small(inner, VISION if "vision" in key else own)
        elif getattr(known, key, None) is not None:
            wanted[key] = small(type(getattr(known, key)), VISION if "vision" in key else own)
    for _ in range(10):
        try:
            return kind(**wanted)
        except AttributeError as error:  # a name that can only be read
            wanted = {key: value for key, value in wanted.items() if repr(key) not in str(error)}
    return kind(**wanted)


# ------------------------------------------------------------------------------------------ the second opinion


@contextmanager
def eager(model):
    """The module itself, with transformers' eager attention."""
    model._module.set_attn_implementation("eager")
    try:
        yield model._module
    finally:
        model._module.set_attn_implementation("heads")


@contextmanager
def cut(model, layer: int, head: int):
    """One head zeroed by a hook of torch."""
    d = model.anatomy.d_head

    def zero(module, args):
        x = args[0].clone()
        x[..., head * d : (head + 1) * d] = 0
        return (x, *args[1:])

    handle = projection(model, layer).register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def plain(model, ids, **kwargs) -> torch.Tensor:
    with eager(model) as module, torch.no_grad():
        return module(input_ids=ids, **kwargs).logits


def near(ours, theirs, tolerance: float = 2e-4) -> None:
    error = ((ours.float() - theirs.float()).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()
    assert error <= tolerance, f"off by {error:.1e}"


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def task_of() -> Task:
    ids = ids_of(3, 10, seed=1)
    twin = ids.clone()
    twin[:, 4] = (twin[:, 4] + 3) % 250 + 5
    return Task("toy", ids, ids[:, 0] % 100 + 5, (ids[:, 1:3] % 100) + 110, twin, {"S": torch.full((3,), 4)})


def difference(logits, task) -> torch.Tensor:
    last = logits[:, -1].float()
    return last.gather(1, task.answers[:, None])[:, 0] - last.gather(1, task.foils).mean(1)


# ------------------------------------------------------------------------------- checks of what is offered


def attention_layer(model) -> int:
    """One that has heads, not the first if there are more."""
    return model.anatomy.attention_layers[:2][-1]


def edits(model):
    """Zeroing a head, in a trace and by a hook."""
    ids, layer, head = ids_of(), attention_layer(model), model.anatomy.n_heads - 1
    with model.trace(ids):
        model.layers[layer].attn.heads[:, :, head] = 0
        ours = model.logits.save()
    with cut(model, layer, head):
        near(ours, plain(model, ids))


def pattern(model):
    """Patterns are those of eager attention."""
    ids, layer = ids_of(), attention_layer(model)
    with model.trace(ids):
        ours = model.layers[layer].attn.pattern.save()
    with eager(model) as module, torch.no_grad():
        theirs = [x for x in module(input_ids=ids, output_attentions=True).attentions if x is not None]
    theirs = theirs[model.anatomy.attention_layers.index(layer)]
    if hasattr(model.layers[layer].attn._module, "sinks") and theirs.sum(-1).min() > 0.99:
        ours = ours / ours.sum(-1, keepdim=True)  # Granite's with windows shows its rows before the sink takes its share
    near(ours, theirs)


def padding(model):
    """A padded row gives the logits of the row alone."""
    ids = ids_of(1)
    both = torch.cat([torch.nn.functional.pad(ids[:, 4:], (4, 0)), ids])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    with model.trace(input_ids=both, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)):
        ours = model.logits.save()
    near(ours[0, -1], plain(model, ids[:, 4:])[0, -1])


def generate(model):
    """Greedy tokens with a head cut, cached, against a plain model that reads everything again."""
    ids, layer = ids_of(1), attention_layer(model)
    cached = heads.ablate(model, [(layer, 0)])
    with cached.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0) as tracer:
        ours = tracer.result.save()
    theirs = ids
    with cut(model, layer, 0):
        for _ in range(5):
            theirs = torch.cat([theirs, plain(model, theirs)[:, -1:].argmax(-1)], 1)
    assert ours[0].tolist() == theirs[0].tolist(), "other tokens"


def sweep(model):
    """A sweep of zeroed heads, against one hook after the other."""
    task, found = task_of(), None
    found = heads.ablation_scores(model, task, "zero", "END", progress=False).samples
    base, where = difference(plain(model, task.ids), task), torch.zeros_like(task.ids, dtype=torch.bool)
    where[:, -1] = True
    d = model.anatomy.d_head
    for layer, head in ((0, 0), (1, 3), (2, 1), (3, 2)):

        def zero(module, args, head=head):
            x = args[0].clone()
            x[:, -1, head * d : (head + 1) * d] = 0
            return (x, *args[1:])

        handle = projection(model, layer).register_forward_pre_hook(zero)
        try:
            change = difference(plain(model, task.ids), task) - base
        finally:
            handle.remove()
        near(torch.as_tensor(found)[:, layer, head], change, 2e-3)


def prefix(model):
    """A prompt whose beginning is kept once, against one plain forward."""
    ids = ids_of(1, 20)
    kept = heads.Prefix(model, ids[:, :13])
    with torch.no_grad(), model.trace(input_ids=ids[:, 13:], past_key_values=kept.cache(), use_cache=True):
        ours = model.logits.save()
    near(ours, plain(model, ids)[:, 13:])


def lens(model):
    """The last row of the lens is the model's own metric."""
    task = task_of()
    near(heads.logit_lens(model, task)[-1], difference(plain(model, task.ids), task))


def direct(model):
    """What heads, MLPs, embedding and biases write sums to the metric."""
    task = task_of()
    found = heads.direct_attribution(model, task)
    parts = (found.samples.sum((1, 2)), found.mlp_samples.sum(1), found.embedding, found.biases)
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        return  # linearised at the run: parts of it, not the whole (tests/test_attribute.py)
    near(sum(torch.as_tensor(x) for x in parts), difference(plain(model, task.ids), task), 2e-3)


def ov(model):
    """What a head writes of one token, from weights, against what its layer puts out less what it puts out without it."""
    ids = ids_of(5, 1)
    for layer, head in {(attention_layer(model), 1), (model.anatomy.attention_layers[-1], 3)}:
        seen = []
        handles = [
            model.layers[layer]._module.register_forward_pre_hook(
                lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True),
            projection(model, layer).register_forward_hook(lambda m, a, out: seen.append(out)),
        ]  # fmt: skip
        try:
            plain(model, ids)
            with cut(model, layer, head):
                plain(model, ids)
        finally:
            [handle.remove() for handle in handles]
        x, whole, _, without = seen
        with model.trace(ids):  # a sink takes its share of the one token's attention
            share = model.layers[layer].attn.pattern[:, head, 0].save()
        wrote = (whole - without).reshape(5, -1)
        near(share * heads.ov(model, layer, head)(input_norm(model, layer)(x.reshape(5, -1))), wrote, 1e-3)


def qk(model):
    """The order of what one query gives two keys, from weights, is that of the attention call's own queries and keys."""
    ids, layer = ids_of(6, 1), attention_layer(model)
    with model.trace(ids):
        x = model.layers[layer].input.save()
        q, k = model.layers[layer].attn.q.save(), model.layers[layer].attn.k.save()
    x = input_norm(model, layer)(x[:, 0])
    for head in range(model.anatomy.n_heads):
        circuit = heads.qk(model, layer, head)
        theirs = q[:, 0, head] @ k[:, 0, head * k.shape[2] // model.anatomy.n_heads].T
        ours = circuit(x) @ x.T
        ours, theirs = ours - ours[:, :1], theirs - theirs[:, :1]
        if not hasattr(model.layers[layer].attn._module, "q_norm"):
            scale = (ours * theirs).sum() / (theirs * theirs).sum()
            near(ours, theirs * scale, 1e-3)


def mlp0(model):
    """The first MLP of an embedding: what the first block adds to a token whose attention is cut away."""
    ids = ids_of(5, 1)
    found = heads.effective_embedding(model, ids[:, 0], "mlp0")
    block, embedded = model.layers[0], model._module.get_input_embeddings()(ids)
    seen = []
    put = block._module.register_forward_pre_hook(
        lambda m, a, k: ((embedded, *a[1:]), k) if a else (a, {**k, "hidden_states": embedded}), with_kwargs=True)  # fmt: skip
    silent = block.attn._module.register_forward_hook(
        lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out))
    see = block._module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        plain(model, ids)
    finally:
        [handle.remove() for handle in (put, silent, see)]
    near(found, (seen[0].reshape(5, -1) - embedded[:, 0]), 1e-3)


CHECKS: dict[str, Callable] = {
    "edits": edits, "pattern": pattern, "padding": padding, "generate": generate, "sweep": sweep, "prefix": prefix, "lens": lens,
    "direct": direct, "OV": ov, "QK": qk, "MLP 0": mlp0,
}  # fmt: skip
OF_ENCODERS = ("edits", "pattern")
WRAPPERS = ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # of images and text


def tried(kind: str) -> dict[str, str]:
    """check -> "right", "refused: why", or "WRONG: how"; "built" or "loads" alone where it ends there."""
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    signal.alarm(SECONDS)
    try:
        try:
            module = build(kind)
        except Exception as error:  # noqa: BLE001 - whatever stops it is the answer
            return {"built": _words(error)}
        try:
            model = wrap(module, tiny.tokenizer(whole=False))
            model.record = {"name": f"small {kind}", "revision": None, "sha256": None}
            identities(model)
        except Exception as error:  # noqa: BLE001
            return {"loads": _words(error)}
        found = {}
        for name, check in CHECKS.items():
            if model.anatomy.encoder and name not in OF_ENCODERS:
                continue
            try:
                check(model)
                found[name] = "right"
            except AssertionError as error:
                found[name] = f"WRONG: {_words(error)}"
            except (ValueError, NotImplementedError, LookupError) as error:
                found[name] = f"refused: {_words(error)}"
            except Exception as error:  # noqa: BLE001
                refused = type(error).__name__ == "ReplayError"
                found[name] = f"{'refused' if refused else 'WRONG'}: {_words(error)}"
        return found
    except TimeoutError as error:
        return {"built": str(error)}
    finally:
        signal.alarm(0)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    last = lines[-1] if type(error).__name__.startswith("NNsight") else lines[0]
    named = "" if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__}: "
    return (named + last)[:200]


def table(kinds: list[str]) -> str:
    """The second table of figures/families.md."""
    import transformers

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        outcomes = dict(zip(kinds, tqdm(pool.map(tried, kinds), total=len(kinds), unit="type")))
    sign = lambda text: {"r": "✓", "W": "✗"}.get(text[:1], "") if not text.startswith("refused") else "–"  # noqa: E731
    whole = {kind: found for kind, found in outcomes.items() if "built" not in found and "loads" not in found}
    lines = [
        f"{MARK}", "",
        f"What `python -m tests.families` found with transformers {transformers.__version__}: one small random model of each type, with the "
        "same weights in transformers' own eager attention as the second opinion. ✓ right, – refused (the reason below), "
        "✗ wrong, empty: does not apply. *Listed*: has a row in `heads/model/families.py`. *Passes here*: loads, and all that "
        "it does not refuse is right.", "",
        "| type | listed | passes here | " + " | ".join(CHECKS) + " |", "|---|:-:|:-:|" + ":-:|" * len(CHECKS),
    ]  # fmt: skip
    for kind, found in whole.items():
        right = "" if any(text.startswith("W") for text in found.values()) else "✓"
        lines.append(f"| {kind} | {'✓' if kind in FAMILIES else ''} | {right} | " + " | ".join(sign(found.get(c, "")) for c in CHECKS) + " |")
    for title, keep in (("Refused or wrong in part", whole), ("Refused when loaded", [k for k in outcomes if "loads" in outcomes[k]]),
                        ("Not built", [k for k in outcomes if "built" in outcomes[k]])):  # fmt: skip
        lines += ["", f"### {title}", ""]
        for kind in keep:
            why = [f"{name}: {text.removeprefix('refused: ')}" for name, text in outcomes[kind].items() if text != "right"]
            lines += [f"- **{kind}** {'; '.join(why)}"] if why else []
    counts = f"{len(whole)} load, {sum('loads' in x for x in outcomes.values())} are refused, {sum('built' in x for x in outcomes.values())} were not built."
    return "\n".join([*lines[:3], counts, "", *lines[3:]]) + "\n"


def main() -> None:
    """`python -m tests.families [TYPE ...]`."""
    if sys.argv[1:]:
        for kind in sys.argv[1:]:
            print(kind)
            for name, text in tried(kind).items():
                print(f"  {name:10} {text}")
        return
    above = TABLE.read_text(encoding="utf-8").split(MARK)[0].rstrip()
    kinds = sorted({*DECODERS, *ENCODERS, *FAMILIES, *WRAPPERS})
    found = table(kinds)
    TABLE.write_text(f"{above}\n\n{found}", encoding="utf-8")
    if "WRONG" in found:
        sys.exit(f"something is wrong, and not refused: {TABLE}")


if __name__ == "__main__":
    main()
