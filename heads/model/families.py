"""What differs between architectures, one row for each: paths, the layout of queries, keys and values, norms.

Light: no torch, so that the zoo and the command line may list what is supported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what the vocabulary names. Paths are dotted; the defaults are those of Llama.

    Attributes:
        layers, final_norm, unembed: below the model.
        attn, mlp: below a layer. call: below `attn`, the module whose forward makes the attention call ("": itself).
        proj: below `attn`, the output projection.
        qkv: below `call`, the matrices of queries, keys and values, or the one that holds all three.
        fused: how that one holds them: "blocks", all queries, then all keys, then all values; or "groups", one key-value
            head after the other, its queries, its key and its value.
        norms: below a layer, the norms before attention and before the MLP; "" where there is none.
        post_norms: the same of norms on what attention and MLP write, where there are any.
        qk_norms: below `call`, the norms of queries and keys, where there are any.
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
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    encoder: bool = False


_LLAMA = Family()
_GEMMA_2 = Family(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_OLMO_2 = replace(_GEMMA_2, norms=("", ""))
_BERT = Family(
    "bert.encoder.layer", "cls.predictions.transform", "cls.predictions.decoder", attn="attention", call="self",
    proj="output.dense", mlp="E_output.dense", qkv=("query", "key", "value"), norms=("", ""), encoder=True,
)  # fmt: skip
_ROBERTA = replace(_BERT, layers="roberta.encoder.layer", final_norm="lm_head.layer_norm", unembed="lm_head.decoder")
FAMILIES: dict[str, Family] = {  # by transformers' model_type
    "gpt2": Family(
        "transformer.h", "transformer.ln_f", attn="attn", proj="c_proj", qkv=("c_attn",), fused="blocks", norms=("ln_1", "ln_2")
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "olmo2": _OLMO_2,
    "olmo3": _OLMO_2,
    "gpt_oss": _LLAMA,
    "granite": _LLAMA,
    "cohere": replace(_LLAMA, norms=("input_layernorm", "input_layernorm")),
    "cohere2": replace(_LLAMA, norms=("input_layernorm", "input_layernorm")),
    "stablelm": replace(_LLAMA, qk_norms=("q_layernorm", "k_layernorm")),
    "phi": Family(
        final_norm="model.final_layernorm", proj="dense", norms=("input_layernorm", "input_layernorm"),
        qk_norms=("q_layernorm", "k_layernorm"),
    ),
    "phi3": Family(qkv=("qkv_proj",), fused="blocks"),
    "opt": Family(
        "model.decoder.layers", "model.decoder.final_layer_norm", mlp="fc2", proj="out_proj",
        norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    "gpt_neox": Family(
        "gpt_neox.layers", "gpt_neox.final_layer_norm", attn="attention", proj="dense", qkv=("query_key_value",), fused="groups"
    ),
    "bert": _BERT,
    "electra": replace(_BERT, layers="electra.encoder.layer", final_norm="generator_predictions", unembed="generator_lm_head"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        "distilbert.transformer.layer", "vocab_layer_norm", "vocab_projector", attn="attention", proj="out_lin", mlp="ffn",
        qkv=("q_lin", "k_lin", "v_lin"), norms=("", ""), encoder=True,
    ),
    "modernbert": Family(
        "model.layers", "model.final_norm", "decoder", attn="attn", proj="Wo", qkv=("Wqkv",), fused="blocks",
        norms=("attn_norm", "mlp_norm"), encoder=True,
    ),
}  # fmt: skip
# Every family has a tiny random model, `tiny-<name>`: tiny-gemma3, tiny-gpt-neox, ...
TINY = tuple(kind.removesuffix("_text").replace("_", "-") for kind in FAMILIES)


def family_of(config) -> Family:
    """The row of a model's config. Unknown decoders are read like Llama, which most of them copy; if that does not
    fit, `heads.model.anatomy.bind` says which part was not found. A model of images and text (Gemma 3, Mistral 3,
    Qwen-VL) holds a text model of some family, one floor down; an encoder saved without its word head (a `BertModel`, as
    sentence encoders are) has its layers one floor up, and neither unembedding nor, mostly, a final norm."""
    text = config.get_text_config()
    row = FAMILIES.get(text.model_type, _LLAMA)
    if row.encoder and (config.architectures or [""])[0].endswith("Model"):
        up = lambda path: path.partition(".")[2] if path.split(".")[0] == row.layers.split(".")[0] else ""  # noqa: E731
        return replace(row, layers=up(row.layers), final_norm=up(row.final_norm), unembed="")
    if text is config:
        return row
    below = lambda path: path.replace("model.", "model.language_model.", 1)  # noqa: E731
    return replace(row, layers=below(row.layers), final_norm=below(row.final_norm))


def windows(config, n_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
