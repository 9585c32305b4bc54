"""Places: where an edit acts, which positions of which rows, in the prompt or while generating."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import torch


def named_inputs(args, kwargs) -> dict:
    """What a model is called with, by name."""
    return {**({"input_ids": args[0]} if args else {}), **kwargs}



def token_numbers(inputs: dict) -> torch.Tensor:
    """Each position's number among the real tokens of its row, from 0 and cached ones included, in the pass that is
    called with `inputs`; -1 for padding. `[row or 1, position]`, on the CPU."""
    ids = inputs.get("input_ids")
    length = (ids if ids is not None else inputs["inputs_embeds"]).shape[1]
    mask, past = inputs.get("attention_mask"), inputs.get("past_key_values")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        mask = torch.ones(1, length + (past.get_seq_length() if past is not None else 0))
    mask = mask.cpu().long()
    return (mask.cumsum(-1) * mask - 1)[:, -length:]



def at_positions(number: torch.Tensor, positions: Iterable[int]) -> torch.Tensor:
    """Where `token_numbers` are among `positions`, of which negative ones count from a row's last token: booleans alike."""
    wanted = torch.tensor(list(positions), dtype=torch.long)
    from_end = number - number.amax(1, keepdim=True) - 1  # -1 for the last token
    return (number >= 0) & (torch.isin(number, wanted[wanted >= 0]) | torch.isin(from_end, wanted[wanted < 0]))



def head_mask(model, sets: list[Iterable]) -> torch.Tensor:
    """Sets of heads as `[set, layer, head]` booleans; checks that every head exists."""
    anatomy = model.anatomy
    mask = torch.zeros(len(sets), anatomy.n_layers, anatomy.n_heads, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        for layer, head in anatomy.check(chosen):
            mask[row, layer, head] = True
    return mask



def is_head(x) -> bool:
    try:
        return len([index(i) for i in x]) == 2
    except TypeError:
        return not isinstance(x, list)  # not a set of heads either: `check` names it
