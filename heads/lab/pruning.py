"""Heads removed for good: a checkpoint that plain transformers loads, equal to the ablated model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from heads.lab.ablation import ablate
from heads.lab.places import head_mask
from heads.model.weights import heads_everywhere, kv_head, parts, projection, transposed


@dataclass(frozen=True)
class Pruned:
    """A model without some of its heads.

    Attributes:
        module: of plain transformers, with weights of its own.
        removed: (layer, head) whose weights are gone; zeroed: those whose weights in the output projection are zero.
        difference: the largest difference of its logits from those of the ablated model, as a share of the largest logit.
    """

    module: nn.Module
    tokenizer: object
    removed: list[tuple[int, int]]
    zeroed: list[tuple[int, int]]
    difference: float

    def save(self, folder: str | Path) -> Path:
        """Config, safetensors and tokenizer: what `from_pretrained` and `heads.load` take. FileExistsError if there is something."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: a pruned model gets a folder of its own")
        self.module.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


def prune(model, heads: Iterable[tuple[int, int]]) -> Pruned:
    """The model without these heads, as weights: zero ablation for good (asked for since transformers #27044).

    The formats of transformers know one number of heads for all layers. So as many key-value heads with all their queries
    as every layer loses are really removed, where the config can say it, and the model gets smaller; of what else is asked
    for, the rows of the output projection become zero, which changes the logits in the same way and frees nothing.

    Args:
        model: a loaded model, which stays as it is.
        heads: (layer, head).

    Raises:
        ValueError: no heads; an edited model (its edits are no weights); layers without heads; a family whose copy does
            not give the logits of the ablated model.
    """
    heads_everywhere(model)
    if model._edits:
        raise ValueError("an edited model: its edits are no weights and cannot be saved; prune the model that was loaded")
    gone = sorted(set(model.anatomy.check(heads)))
    if not gone:
        raise ValueError("no heads to remove")
    difference, why = math.inf, None
    for removed in (_alike(model, gone), []):  # smaller, if the family can; of the same shape otherwise
        try:
            module = _copy(model, gone, removed)
        except (RuntimeError, AttributeError, ValueError, LookupError) as error:  # a norm as wide as all heads, a config without d_head
            why = error
            continue
        difference = _difference(model, module, gone)
        if difference <= (1e-4 if module.dtype == torch.float32 else 5e-2):
            return Pruned(module, model.tokenizer, removed, [head for head in gone if head not in removed], difference)
    raise ValueError(f"a {model.anatomy.family} model without these heads is not the ablated one (off by {difference:.1e} of its "
                     "logits): this family cannot be pruned") from why  # fmt: skip


def _alike(model, gone: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The heads to take out so that every layer keeps equally many: whole groups of a key-value head, and never all."""
    anatomy, groups = model.anatomy, []
    per = anatomy.n_heads // anatomy.n_kv_heads
    for layer in range(anatomy.n_layers):
        reading = [kv_head(model, head) for at, head in gone if at == layer]
        groups.append([group for group in range(anatomy.n_kv_heads) if reading.count(group) == per])
    number = min(min(map(len, groups)), anatomy.n_kv_heads - 1)
    return [(layer, group * per + i) for layer, found in enumerate(groups) for group in found[:number] for i in range(per)]


def _copy(model, gone: list, removed: list) -> nn.Module:
    """A module of plain transformers with the weights that stay. RuntimeError where its shapes are not those of its config."""
    anatomy, old = model.anatomy, model._module
    config, per = deepcopy(old.config), anatomy.n_heads // anatomy.n_kv_heads
    config._attn_implementation = "eager"  # which every family has
    text = config.get_text_config()
    if removed:
        fewer = len(removed) // anatomy.n_layers
        text.head_dim, text.num_attention_heads = anatomy.d_head, anatomy.n_heads - fewer
        if per > 1 or getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = anatomy.n_kv_heads - fewer // per
    state, names = {name: x.clone() for name, x in old.state_dict().items()}, {id(m): name for name, m in old.named_modules()}
    for layer in range(anatomy.n_layers):
        zero = [head for at, head in gone if at == layer]
        taken = [head for at, head in removed if at == layer]
        module, features = projection(model, layer), torch.arange(anatomy.n_heads * anatomy.d_head).view(anatomy.n_heads, -1)
        weight = state[f"{names[id(module)]}.weight"]
        (weight if transposed(module) else weight.T)[features[zero].flatten()] = 0
        if taken:
            _slice(state, names, module, features[[h for h in range(anatomy.n_heads) if h not in taken]].flatten(), entering=True)
            left = {"q": [h for h in range(anatomy.n_heads) if h not in taken]}
            left["k"] = left["v"] = [g for g in range(anatomy.n_kv_heads) if g * per not in taken]
            kept: dict = {}
            for part, of in left.items():
                module, features = parts(model, layer)[part]
                kept.setdefault(module, []).append(features[of].flatten())
            for module, rows in kept.items():
                _slice(state, names, module, torch.cat(rows).sort().values)
    new = type(old)(config).to(old.device)
    kept = [x for name, x in (*new.named_parameters(), *new.named_buffers()) if name in state]  # rotary frequencies are not, and stay
    for tensor in kept:
        tensor.data = tensor.data.to(old.dtype) if tensor.is_floating_point() else tensor.data
    new.load_state_dict(state)
    if getattr(old, "generation_config", None) is not None:
        new.generation_config = deepcopy(old.generation_config)
    return new.eval()


def _slice(state: dict, names: dict, module: nn.Module, rows: torch.Tensor, entering: bool = False) -> None:
    """Keeps these features of what a projection gives, or of what enters it."""
    name = names[id(module)]
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    state[f"{name}.weight"] = weight.index_select(int(transposed(module) != entering), rows.to(weight.device))
    if bias is not None and not entering:
        state[f"{name}.bias"] = bias[rows.to(bias.device)]


def _difference(model, module: nn.Module, gone: list) -> float:
    size = model.config.get_text_config().vocab_size
    ids = ((torch.arange(24, device=model.device) * (size // 7) + 5) % size)[None]
    with torch.no_grad(), ablate(model, gone).trace(ids):
        wanted = model.output[0].save()
    with torch.no_grad():
        ours = module(input_ids=ids)[0]
    return float((ours - wanted).abs().max() / wanted.abs().max())
