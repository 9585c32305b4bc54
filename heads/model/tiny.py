"""Small random models of every supported family, built in code: for tests, and for teaching shapes."""

from __future__ import annotations

import hashlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from heads.model.families import FAMILIES, TINY
from heads.names import data, known

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
_VOCAB = 256 + len(SPECIAL)
# Four layers of width 32. Head counts are chosen so that a wrong reshape cannot pass unnoticed: grouped
# queries where the family has them, and head_dim * n_heads != hidden_size where the family allows it.
_LLAMA = dict(vocab_size=_VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
_UNGROUPED = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GEMMA_2 = {**_LLAMA, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROBERTA = {**_UNGROUPED, "max_position_embeddings": 514, "type_vocab_size": 1}
_CONFIGS = {
    "gpt2": dict(
        vocab_size=_VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8, "head_dim": 8},
    "ministral": {**_LLAMA, "sliding_window": 8, "head_dim": 16},
    "mixtral": {**_LLAMA, **_EXPERTS},
    "smollm3": {**_LLAMA, "no_rope_layer_interval": 2},
    "qwen2": _LLAMA,
    "qwen2_moe": {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {**_LLAMA, "head_dim": 16},
    "qwen3_moe": {**_LLAMA, **_EXPERTS, "head_dim": 16},
    "gemma": {**_LLAMA, "head_dim": 16},
    # soft caps low, so that forgetting one shows
    "gemma2": {**_GEMMA_2, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_GEMMA_2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, "sliding_window": 8},
    "gpt_oss": {**_LLAMA, **_EXPERTS, "head_dim": 16, "sliding_window": 8},
    # factors far from 1, so that forgetting one shows
    "granite": {**_LLAMA, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "cohere": {**_LLAMA, "logit_scale": 0.25},
    "cohere2": {**_LLAMA, "logit_scale": 0.25, "sliding_window": 8},
    "stablelm": _LLAMA,
    "phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "phi3": _LLAMA,
    "opt": {**_UNGROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {**_UNGROUPED, "rotary_pct": 0.5, "use_parallel_residual": True},
    "bert": _UNGROUPED,
    "electra": {**_UNGROUPED, "embedding_size": 24},
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": dict(vocab_size=_VOCAB, dim=32, hidden_dim=48, n_layers=4, n_heads=4, pad_token_id=0),
    "modernbert": {
        **_UNGROUPED, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip


def tokenizer(whole: bool = True) -> PreTrainedTokenizerFast:
    """Every text can be written.

    Args:
        whole: the words of the tasks (data/tiny.txt) are one token each, everything else is written byte by byte; False: one
            token a byte, so that lengths are plain to see.
    """
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [word.replace(" ", "Ġ") for word in data("tiny.txt").splitlines()] if whole else []
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(level.alphabet()), *words])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", ignore_merges=True))  # a word that is there is taken whole
    inner.pre_tokenizer = level
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def build(family: str, seed: int = 0, whole: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random model and its tokenizer. The weights are larger than a fresh initialisation's, so
    that attention is not uniform and an edit shows in the logits.

    Args:
        whole: as in `tokenizer`.

    Raises:
        LookupError: for an unknown family, naming the nearest.
    """
    kind = dict(zip(TINY, FAMILIES))[known("tiny model of family", family, TINY)]
    auto = AutoModelForMaskedLM if FAMILIES[kind].encoder else AutoModelForCausalLM
    found = tokenizer(whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **_CONFIGS[kind] | {"vocab_size": len(found)})
        return randomised(auto.from_config(config).eval()), found


@torch.no_grad()
def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights of torch's generator."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.25)
        else:  # biases and norms: away from 0 and 1, so that forgetting one shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sha256(module: torch.nn.Module) -> str:
    """Digest of a model's parameters, in order of their names."""
    tensors = sorted(module.state_dict().items())
    whole = b"".join(name.encode() + tensor.detach().float().cpu().numpy().tobytes() for name, tensor in tensors)
    return hashlib.sha256(whole).hexdigest()
