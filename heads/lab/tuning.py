"""Fine-tuning only chosen heads, and the usual baselines: all weights, LoRA and prompt tuning through peft.

What a head owns: its rows of the query projection, its columns of the output projection, and the rows of the key
and value projections of its group, which under grouped queries it shares with other heads. Only these slices are
parameters; an optimiser never sees the rest of the tensor they are cut from, so weight decay cannot touch it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from heads.model.anatomy import Head
from heads.model.weights import parts as parts_of
from heads.model.weights import transposed

PARTS = "qkvo"


class _Slice(nn.Module):
    """Some rows or columns of a frozen tensor as a parameter of their own, kept in float32."""

    def __init__(self, whole: torch.Tensor, dim: int, index: torch.Tensor):
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index.to(whole.device), persistent=False)
        self.values = nn.Parameter(whole.detach().index_select(dim, self.index).float())

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.index_copy(self.dim, self.index, self.values.to(whole.dtype))


def _checked(parts: str) -> str:
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts={parts!r}: expected some of 'q', 'k', 'v' and 'o', such as 'qkvo' or 'vo'")
    return parts


class HeadWeights:
    """The weights of chosen heads as the only thing to train, `heads.head_weights`; inside `with` the model runs with them.

        tuned = heads.head_weights(model, [(3, 1), (5, 0)])
        with tuned:
            heads.fit(tuned, lambda batch: heads.answer_loss(model, batch), data, steps=50)
            ...                       # the model as tuned: trace, generate, ablate
        ...                           # the model as it was, to the bit
        with tuned: ...               # and tuned again

    Args:
        heads: (layer, head) pairs.
        parts: which of a head's weights: "q" rows of the query projection, "k" and "v" those of its key-value
            group, "o" columns of the output projection. Biases of q, k and v go with their rows.

    Attributes:
        heads: the chosen pairs, sorted.
        counts: part ("q", "k", "v", "o") -> numbers trained. `count` is their sum.

    Raises:
        IndexError: a head that does not exist. ValueError: no heads, unknown parts, an unknown layout, or weights
        that are being tuned already.
    """

    def __init__(self, model, heads: Iterable[Head], parts: str = PARTS):
        self.model, self.heads, self.parts = model, model.anatomy.check(heads), _checked(parts)
        if not self.heads:
            raise ValueError("no heads were chosen: there is nothing to tune")
        self.counts, self._places = dict.fromkeys(parts, 0), {}
        self._group = model.anatomy.n_heads // model.anatomy.n_kv_heads
        for layer in sorted({layer for layer, _ in self.heads}):
            self._add(layer, sorted(head for i, head in self.heads if i == layer))

    def _add(self, layer: int, chosen: list[int]) -> None:
        cut: dict[tuple, list[torch.Tensor]] = {}
        for part, (module, rows) in parts_of(self.model, layer).items():
            if part not in self.parts:
                continue
            index = rows[sorted({head // self._group for head in chosen}) if part in "kv" else chosen].flatten()
            dim = int((part != "o") == transposed(module))  # the weight's axis that tells heads apart
            cut.setdefault((module, "weight", dim), []).append(index)
            self.counts[part] += len(index) * module.weight.shape[1 - dim]
            if part != "o" and module.bias is not None:  # the bias of the output projection is no head's
                cut.setdefault((module, "bias", 0), []).append(index)
                self.counts[part] += len(index)
        names = {module: name for name, module in self.model._module.named_modules()}
        for (module, tensor, dim), index in cut.items():
            name = f"{names[module]}.{tensor}"
            if parametrize.is_parametrized(module, tensor):
                raise ValueError(f"{name} is being tuned already: leave that `with` block first")
            self._places[name] = (module, tensor, _Slice(getattr(module, tensor), dim, torch.cat(index)))

    @property
    def values(self) -> dict[str, nn.Parameter]:
        """The trained slices by the name of the tensor they are cut from."""
        return {name: piece.values for name, (_, _, piece) in self._places.items()}

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser gets."""
        return list(self.values.values())

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(self.counts.values())

    @property
    def shared(self) -> list[Head]:
        """Heads that were not chosen, but whose keys and values are trained with those of a chosen one."""
        if not set(self.parts) & set("kv"):
            return []
        groups = {(layer, head // self._group) for layer, head in self.heads}
        mates = [(layer, g * self._group + i) for layer, g in groups for i in range(self._group)]
        return sorted(set(mates) - set(self.heads))

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} {n:,}" for part, n in self.counts.items())
        mates = f"; keys and values shared with {len(self.shared)} other heads" if self.shared else ""
        return f"HeadWeights({len(self.heads)} heads, {self.count:,} parameters: {parts}{mates})"

    def __enter__(self) -> HeadWeights:
        self._order = {module: list(module._parameters) for module, _, _ in self._places.values()}
        for module, tensor, piece in self._places.values():
            parametrize.register_parametrization(module, tensor, piece)
        return self

    def __exit__(self, *_) -> None:
        for module, tensor, _ in self._places.values():
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        for module, order in self._order.items():  # as it was: a state dict keeps the order of its names
            module._parameters = {name: module._parameters[name] for name in order}


@dataclass(frozen=True)
class Adapter:
    """A peft model around a loaded one. `module` is called like a transformers model, `count` parameters are trained."""

    module: nn.Module
    name: str

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser gets."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def __repr__(self) -> str:
        return f"Adapter({self.name}, {self.count:,} parameters)"


@contextmanager
def lora(model, rank: int = 8, parts: str = "qv", layers: Iterable[int] | None = None, seed: int = 0) -> Iterator[Adapter]:
    """LoRA (Hu et al. 2022) for as long as the `with` block lasts; inside it the model itself runs with it. The update
    is 2 B A (alpha is twice the rank).

    Args:
        parts: projections to adapt, of "qkvo". Where queries, keys and values are one fused matrix, any of them
            means the whole of it.
        layers: indices; all if None.

    Yields:
        An `Adapter`: hand it to `fit`, use the model (or `adapter.module`) as before, save it with
        `adapter.module.save_pretrained(folder)`.
    """
    from peft import LoraConfig

    chosen = model.anatomy.check((i, 0) for i in (model.anatomy.attention_layers if layers is None else layers))
    wanted = {parts_of(model, i)[part][0] for i, _ in chosen for part in _checked(parts)}
    if not wanted:
        raise ValueError("no layers were chosen: there is nothing to adapt")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[name for name, module in model._module.named_modules() if module in wanted],
        fan_in_fan_out=any(map(transposed, wanted)),
    )
    wrapped = _wrapped(model, config, seed)
    try:
        model._update(model._module)  # nnsight reads and edits at the adapters, not at the projections inside them
        yield Adapter(wrapped, f"LoRA of rank {rank} on {parts}")
    finally:
        wrapped.unload()
        model._update(model._module)


@contextmanager
def prompt_tuning(model, tokens: int = 10, text: str | None = None, seed: int = 0) -> Iterator[Adapter]:
    """Prompt tuning (Lester et al. 2021): `tokens` trained embeddings before every prompt.

    Args:
        text: the embeddings start as those of this text, repeated or cut; of random tokens if None.

    Yields:
        An `Adapter`; only `adapter.module` runs with the prompt, the model itself does not.
    """
    from peft import PromptTuningConfig

    if tokens < 1:
        raise ValueError(f"tokens={tokens}: a prompt has at least one")
    wrapped = _wrapped(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens), seed)
    table = model._module.get_input_embeddings().weight
    drawn = torch.randint(len(table), (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = model.tokenizer(text, add_special_tokens=False).input_ids if text else drawn
    with torch.no_grad():
        wrapped.prompt_encoder["default"].embedding.weight.copy_(table[[chosen[i % len(chosen)] for i in range(tokens)]])
    yield Adapter(wrapped, f"prompt tuning with {tokens} tokens")


@contextmanager
def all_weights(model) -> Iterator[list[nn.Parameter]]:
    """Every weight as something to train, inside a `with` block; after it the model is as before, to the bit.

    Yields:
        The parameters: hand them to `fit`.
    """
    weights = list(model._module.parameters())
    # a GPU needs its memory for the training
    kept = [(weight.requires_grad, weight.detach().to("cpu", copy=True)) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        with torch.no_grad():
            for weight, (trained, old) in zip(weights, kept):
                weight.requires_grad_(trained).copy_(old)
                weight.grad = None


def _wrapped(model, config, seed: int) -> nn.Module:
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 a question by its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        torch.manual_seed(seed)
        return get_peft_model(model._module, config).eval()
