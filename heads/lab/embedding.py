"""Texts as vectors, and the upper layers of a model as something to train on states that were computed once.

    vectors = heads.embed(model, ["a baker", "a brewer"]).pooled          # [text, d_model]
    stack = heads.upper_stack(model, texts, cut=4)
    weights = stack.fresh()                                               # a copy of layers 4 and 5, to train
    heads.fit(weights.values(), lambda rows: loss(stack.pooled(rows, weights)), rows, steps=100)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch.func import functional_call
from tqdm import tqdm

from heads.model.families import family_of
from heads.model.weights import check_length
from heads.names import known, whole

POOLS = ("mean", "cls")
TOLERANCE = 1e-5  # of the largest number: how near the upper layers come to the whole model


@dataclass(frozen=True)
class Embedded:
    """Vectors of texts, in the order of the texts.

    Attributes:
        pooled: `[text, d_model]`, float32 on the CPU, not normalised.
        tokens: for each text `[position, d_model]`, special tokens included.
    """

    pooled: torch.Tensor
    tokens: list[torch.Tensor]


def embed(model, texts: Sequence[str], pool: str = "mean", batch: int = 64) -> Embedded:
    """What a model makes of texts: its last hidden states, and one vector for each text. Edits of the model take part.

    Args:
        pool: "mean" over all tokens of a text, special ones included (Reimers and Gurevych 2019), or "cls", its first.
        batch: texts at a time, of like length.

    Raises:
        ValueError: no texts, an empty text, one that is longer than the model reads. TypeError: what is no text.
        LookupError: an unknown pool.
    """
    known("pool", pool, POOLS)
    ids, tokens = _tokenized(model, texts), [torch.empty(0)] * len(texts)
    envoy = reduce(getattr, filter(None, _path(model).split(".")), model)
    for rows in _like_lengths(ids, batch, "texts"):
        given = _padded([ids[row] for row in rows], model)
        with torch.no_grad(), model.trace(**given) as tracer:
            hidden = envoy.output[0].save()
            tracer.stop()  # a head behind it would only cost time
        for row, states in zip(rows, hidden.float().cpu()):
            tokens[row] = states[: len(ids[row])].clone()
    return Embedded(torch.stack([states.mean(0) if pool == "mean" else states[0] for states in tokens]), tokens)


class UpperStack:
    """The layers of a model from `cut` on, over hidden states before them that were computed once: `heads.upper_stack`.

    Attributes:
        cut: the first layer that is run.
        weights: name -> the model's own tensor, of the layers from `cut` on and of a final norm. They stay as they are.
        worst: how far the first texts are from the whole model, as a share of their largest number.
    """

    def __init__(self, model, texts: Sequence[str], cut: int, batch: int = 64):
        if model._edits:
            raise ValueError("an upper stack runs the model's own layers and would leave the edits out: take the unedited model")
        if not 0 < whole("cut", cut) < model.anatomy.n_layers:
            raise ValueError(f"cut={cut}: one layer at least below it and above it, so 1 to {model.anatomy.n_layers - 1}")
        self.model, self.cut, path = model, cut, _path(model)
        self._body = model._module.get_submodule(path)
        self._layers = model._module.get_submodule(family_of(model.config).layers)
        names = {id(p): name for name, p in self._body.named_parameters()}
        upper = [*self._layers[cut:], *([model.final_norm._module] if hasattr(model, "final_norm") else [])]
        self.weights = {names[id(p)]: p for module in upper for p in module.parameters() if id(p) in names}
        self._ids, self._states = _tokenized(model, texts), [torch.empty(0)] * len(texts)
        self.worst = 0.0
        for n, rows in enumerate(_like_lengths(self._ids, batch, f"texts below layer {cut}")):
            whole_model = self._below(rows)
            if n == 0:
                self._compare(rows, whole_model)

    def __len__(self) -> int:
        return len(self._ids)

    def fresh(self) -> dict[str, torch.Tensor]:
        """A copy of the weights, as leaves to train: hand its values to `heads.fit`."""
        return {name: weight.detach().clone().requires_grad_() for name, weight in self.weights.items()}

    def __call__(self, rows: Sequence[int], weights: Mapping[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states `[row, position, d_model]` of some of the texts, and a mask `[row, position]` of what is text.

        Args:
            rows: numbers of texts.
            weights: in place of the model's own, by name (some or all of them); gradients flow into them.

        Raises:
            ValueError: no rows. IndexError: a text that is not there. LookupError: an unknown weight.
        """
        rows = [int(row) for row in rows]
        if not rows:
            raise ValueError("there are no rows: name the texts to run")
        for name in weights or ():
            known("weight above the cut", name, self.weights)
        given = _padded([self._ids[row] for row in rows], self.model)
        mask, first = given["attention_mask"], self._states[rows[0]]
        states = first.new_zeros(*mask.shape, first.shape[-1])
        for i, row in enumerate(rows):
            states[i, : len(self._states[row])] = self._states[row]
        put = self._layers[self.cut].register_forward_pre_hook(lambda layer, args, kwargs: _instead(args, kwargs, states), with_kwargs=True)
        before = [layer.__dict__.get("forward") for layer in self._layers[: self.cut]]  # nnsight's own, once a trace has run
        try:
            for layer, kind in zip(self._layers[: self.cut], self._kinds):
                layer.forward = _passing(kind)
            return functional_call(self._body, dict(weights or {}), (), {**given, **self._plain})[0], mask
        finally:
            put.remove()
            for layer, forward in zip(self._layers[: self.cut], before):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def pooled(self, rows: Sequence[int], weights: Mapping[str, torch.Tensor] | None = None, pool: str = "mean") -> torch.Tensor:
        """One vector `[row, d_model]` for each of some of the texts, as `heads.embed`; arguments as for a call."""
        hidden, mask = self(rows, weights)
        if known("pool", pool, POOLS) == "cls":
            return hidden[:, 0]
        mask = mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    @property
    def _plain(self) -> dict:
        return {} if self.model.anatomy.encoder else {"use_cache": False}

    @torch.no_grad()
    def _below(self, rows: list[int]) -> torch.Tensor:
        """Keep the states before the cut; the last hidden states of the whole model."""
        seen, self._kinds, hooks = [], [], []
        for layer in self._layers[: self.cut]:
            hooks.append(layer.register_forward_hook(lambda layer, args, out: self._kinds.append(type(out))))
        hooks.append(self._layers[self.cut].register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True))  # fmt: skip
        try:
            out = self._body(**_padded([self._ids[row] for row in rows], self.model), **self._plain)[0]
        finally:
            for hook in hooks:
                hook.remove()
        for row, states in zip(rows, seen[0]):
            self._states[row] = states[: len(self._ids[row])].clone()
        return out

    @torch.no_grad()
    def _compare(self, rows: list[int], theirs: torch.Tensor) -> None:
        ours, mask = self(rows)
        text = mask.bool()
        self.worst = float((ours - theirs)[text].abs().max() / theirs[text].abs().max())
        limit = TOLERANCE if theirs.dtype == torch.float32 else 5e-2
        if not self.worst <= limit:
            raise ValueError(f"the layers from {self.cut} on do not give what this {self.model.anatomy.family} model gives "
                             f"(off by {self.worst:.1e} of the largest number): they take something that the layers below hand on")  # fmt: skip


upper_stack = UpperStack


def _path(model) -> str:
    """Where the model without its head is, below the module: "" if it has none."""
    row = family_of(model.config)
    return (row.layers.split(".")[0] if row.encoder else row.layers.rpartition(".")[0]) if row.unembed else ""


def _tokenized(model, texts: Sequence[str]) -> list[list[int]]:
    if isinstance(texts, str):
        raise TypeError(f"texts are a list of strings, got one string: [{texts[:20]!r}]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {type(text).__name__} and not a string")
        if not text.strip():
            raise ValueError(f"text {i} is empty: there is nothing to make a vector of")
    if not len(texts):
        raise ValueError("there are no texts")
    ids = model.tokenizer(list(texts)).input_ids
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    try:
        check_length(model, len(ids[longest]))
    except ValueError as error:
        raise ValueError(f"text {longest} ({texts[longest][:30]!r}...): {error}") from None
    return ids


def _like_lengths(ids: list[list[int]], batch: int, name: str) -> Iterator[list[int]]:
    """Rows in batches of like length, the longest first: that is the batch that does not fit, if one does not."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    size = whole("batch", batch, 1)
    for start in tqdm(range(0, len(order), size), desc=name, unit="batch", disable=None if len(order) > 10 * size else True):
        yield order[start : start + size]


def _padded(ids: list[list[int]], model) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[text, position]`, padded on the right."""
    longest = max(map(len, ids))
    pad = model.tokenizer.pad_token_id or 0
    filled = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=model.device)
    return {"input_ids": filled, "attention_mask": mask}


def _instead(args: tuple, kwargs: dict, states: torch.Tensor) -> tuple[tuple, dict]:
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def _passing(kind: type):
    """The forward of a layer that hands on what it was given, in the form (`kind`) in which that layer gives."""

    def forward(hidden_states, *args, **kwargs):
        return (hidden_states,) if issubclass(kind, tuple) else hidden_states

    return forward
