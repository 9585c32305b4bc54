"""What differs between architectures, one row for each: paths, the layout of queries, keys and values, norms.

Light: no torch, so that the zoo and the command line may list what is supported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what the vocabulary names. Paths are dotted; the defaults are those of Llama.

    Attributes:
        layers, final_norm, unembed: below the model.
        attn, mlp: below a layer. call: below `attn`, the module whose forward makes the attention call ("": itself).
        proj: below `attn`, the output projection.
        qkv: below `call`, the matrices of queries, keys and values, or the one that holds all three.
        fused: how that one holds them: "blocks", all queries, then all keys, then all values; or "heads", head by
            head its query, its key and its value.
        norms: below a layer, the norms before attention and before the MLP; "" where there is none.
        post_norms: the same of norms on what attention and MLP write, where there are any.
    """

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    unembed: str = "lm_head"
    attn: str = "self_attn"
    mlp: str = "mlp"
    call: str = ""
    proj: str = "o_proj"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: str = ""
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, str] | None = None
    encoder: bool = False


_LLAMA = Family()
_GEMMA_2 = Family(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
FAMILIES: dict[str, Family] = {  # by transformers' model_type
    "gpt2": Family(
        "transformer.h", "transformer.ln_f", attn="attn", proj="c_proj", qkv=("c_attn",), fused="blocks", norms=("ln_1", "ln_2")
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "phi3": Family(qkv=("qkv_proj",), fused="blocks"),
    "gpt_neox": Family(
        "gpt_neox.layers", "gpt_neox.final_layer_norm", attn="attention", proj="dense", qkv=("query_key_value",), fused="heads"
    ),
    "bert": Family(
        "bert.encoder.layer", "cls.predictions.transform", "cls.predictions.decoder", attn="attention", call="self",
        proj="output.dense", mlp="E_output.dense", qkv=("query", "key", "value"), norms=("", ""), encoder=True,
    ),
    "modernbert": Family(
        "model.layers", "model.final_norm", "decoder", attn="attn", proj="Wo", qkv=("Wqkv",), fused="blocks",
        norms=("attn_norm", "mlp_norm"), encoder=True,
    ),
}  # fmt: skip
# Every family has a tiny random model, `tiny-<name>`: tiny-gemma3, tiny-gpt-neox, ...
TINY = tuple(kind.removesuffix("_text").replace("_", "-") for kind in FAMILIES)


def family_of(config) -> Family:
    """The row of a text config. Unknown decoders are read like Llama, which most of them copy; if that does not
    fit, `heads.model.anatomy.bind` says which part was not found."""
    return FAMILIES.get(config.model_type, _LLAMA)


def windows(config, n_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
