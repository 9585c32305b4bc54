"""Steering: add a vector to what heads write, scale it, or put another in its place, by as much as a gate says.

    steering = heads.Steering(model, vectors, gates, how="mix", positions=[-1], decode=False)
    model_with_it = steering.edited       # an edited model: trace and generate as usual
    steering.save("antonyms.safetensors", recipe={"prompts": 50})
    again = heads.Steering.load("antonyms.safetensors", model)

Vectors and gates may be tensors that require gradients, or functions that return them, so that the same object
that is trained is the one that is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import torch
from nnsight.intervention.envoy import Envoy
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from heads.lab.places import Places, Positions, head_mask, layers_of, named_inputs
from heads.lab.replay import swapped
from heads.model.weights import hooked, projection
from heads.names import known, wholes

HOW = ("add", "scale", "mix", "replace")
FORMAT = "heads steering 1"
Values = torch.Tensor | float | Callable[[], torch.Tensor]


class Steering:
    """What steering does to a model; `edited` is the model it is done to.

    With z what a head writes, v its vector and g its gate:

        add       z + g v             (an offset: LoFiT, ITI, function vectors)
        scale     (1 + g v) z         (entry by entry: LoFiT's first step)
        mix       (1 - g) z + g v     (g in [0, 1]: soft injection)
        replace   v where g is 1, z where it is 0

    Args:
        vectors: `[layer, head, d_head]`; with `heads`, `[len(heads), d_head]` in their order. A tensor, or a
            function without arguments that returns one and is called in every forward pass.
        gates: a number, `[layer, head]`, or `[len(heads)]` with `heads`; or a function.
        heads: (layer, head) pairs that are steered; all if None. The others are never touched.
        positions, decode, prompt: which tokens of the prompt, which generated ones (all, none, or those of these
            numbers), and where the prompt ends in a trace that also holds what follows; see `heads.lab.places.Places`.

    Raises:
        ValueError: a vector of another model or width, a gate outside its range, values that are not finite.
        LookupError: an unknown `how`. IndexError: a head that does not exist.
    """

    def __init__(self, model, vectors: Values, gates: Values = 1.0, how: str = "add", *, heads=None,
                 positions: Positions = None, decode=True, prompt: int | None = None):  # fmt: skip
        self.model, self.vectors, self.gates, self.how = model, vectors, gates, known("way to steer", how, HOW)
        self.places = Places(positions=positions, decode=decode, prompt=prompt)
        self.heads = None if heads is None else [wholes("a layer or head", head) for head in heads]
        if self.heads is not None and len(model.anatomy.check(self.heads)) != len(self.heads):
            raise ValueError("a head is listed twice: its vector would be ambiguous")
        every = product(model.anatomy.attention_layers, range(model.anatomy.n_heads))
        self.mask = head_mask(model, [every if self.heads is None else self.heads])[0]  # [layer, head]
        self.tables()  # refuses what does not fit, before anything runs

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[layer, head, d_head]` and gates `[layer, head, 1]` as they are now, checked."""
        anatomy, n = self.model.anatomy, len(self.heads or [])
        vectors, gates = (torch.as_tensor(x() if callable(x) else x) for x in (self.vectors, self.gates))
        full, table = (anatomy.n_layers, anatomy.n_heads, anatomy.d_head), (anatomy.n_layers, anatomy.n_heads)
        if vectors.shape not in ((full,) if self.heads is None else (full, (n, anatomy.d_head))):
            listed = f" or [{n}, {anatomy.d_head}] for the listed heads" if self.heads is not None else ""
            raise ValueError(
                f"the vectors are {list(vectors.shape)}, this model ({self.model.record['name']}) has {list(full)} "
                f"[layer, head, d_head]{listed}: they belong to another model"
            )
        if gates.shape not in (((), table) if self.heads is None else ((), table, (n,))):
            raise ValueError(f"the gates are {list(gates.shape)}, expected a number or {list(table)} [layer, head]")
        _in_range(self.how, vectors.detach(), gates.detach())
        if vectors.dim() == 2:
            vectors = self._spread(vectors, full)
        if gates.dim() == 1:
            gates = self._spread(gates, table)
        return vectors, gates.to(vectors.device).expand(table)[..., None]

    def _spread(self, values: torch.Tensor, shape) -> torch.Tensor:
        index = tuple(torch.tensor(part, dtype=torch.long, device=values.device) for part in zip(*self.heads))
        return values.new_zeros(shape).index_put(index, values) if self.heads else values.new_zeros(shape)

    def change(self, z: torch.Tensor, layer: int, tables: tuple, at: torch.Tensor) -> torch.Tensor:
        """The steered z, `[row, position, head, d_head]`; `at` is `[row or 1, position]`."""
        vector, gate = (table[layer].to(z.device) for table in tables)
        x = z.to(torch.promote_types(z.dtype, vector.dtype))
        if self.how == "add":
            new = x + gate * vector
        elif self.how == "scale":
            new = x + gate * vector * x
        elif self.how == "mix":
            new = (1 - gate) * x + gate * vector
        else:
            new = torch.where(gate > 0.5, vector, x)
        chosen = self.mask[layer][:, None] & at[:, :, None, None]
        return new.to(z.dtype) if chosen.all() else torch.where(chosen.to(z.device), new.to(z.dtype), z)

    @property
    def edited(self) -> Envoy:
        """The steered model; the model itself is unchanged, and edits stack."""
        steering = self
        with self.model.edit() as (tracer, edited):
            for _ in tracer.iter[:]:
                steering.apply(edited)
        return edited

    def apply(self, model) -> None:
        """Steer the pass that is running. Call inside a trace, once per forward."""
        at = self.places.now(model).at
        tables = self.tables() if at.any() else None
        for i in layers_of(self.mask) if at.any() else ():
            attn = model.layers[i].attn
            attn.heads = self.change(attn.heads, i, tables, at)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The same by plain torch hooks on the loaded module, for as long as the `with` block lasts: for training.

        Every forward counts as a trace of its own, but those of a `generate` as one run. Backward belongs into the block,
        too: where layers are recomputed then (transformers' activation checkpointing), they have to be steered once more.
        """
        if self.model._edits:
            raise ValueError("hooks act on the loaded module, where the edits of this model are not: use `edited`")
        now, module = {}, self.model._module

        def start(_, args, kwargs):
            at = self.places.of(named_inputs(args, kwargs), **vars(module).get("_run", {})).at
            now.update(at=at, tables=self.tables())

        def generate(*args, **kwargs):
            given = named_inputs(args, kwargs)
            if kwargs.get("cache_implementation") and given.get("attention_mask") is None:
                raise ValueError("with a cache_implementation, padding can be told from an attention_mask alone: give one")
            with swapped(module, {"given": given, "generates": True}, "_run"):
                return type(module).generate(module, *args, **kwargs)

        def edit(layer, _, args):
            z = args[0].unflatten(-1, (self.model.anatomy.n_heads, -1))
            return (self.change(z, layer, now["tables"], now["at"]).flatten(-2), *args[1:])

        hooks = [(module.register_forward_pre_hook, start, {"with_kwargs": True})]
        for i in layers_of(self.mask):
            hooks.append((projection(self.model, i).register_forward_pre_hook, partial(edit, i), {}))
        with hooked(*hooks), swapped(module, generate, "generate"):
            yield

    def save(self, path: str | Path, recipe: dict | None = None) -> Path:
        """Write vectors and gates as safetensors, with the model they were learnt on and how.

        Args:
            recipe: how they were made (data, steps, seed, ...), anything that JSON can hold.
        """
        if isinstance(self.places.positions, torch.Tensor):
            raise ValueError("positions [row, position] belong to one batch and cannot be saved: give a list of positions")
        vectors, gates = (table.detach().cpu().float().contiguous() for table in self.tables())
        about = {
            "format": FORMAT, "model": _identity(self.model), "how": self.how, "heads": self.heads,
            **{key: getattr(self.places, key) for key in ("positions", "decode", "prompt")}, "recipe": recipe or {},
        }  # fmt: skip
        save_file({"vectors": vectors, "gates": gates.squeeze(-1).clone()}, path, {"heads": json.dumps(about)})
        return Path(path)

    @staticmethod
    def load(path: str | Path, model) -> Steering:
        """A saved steering for the model it was learnt on; `recipe` is what was said of it.

        Raises:
            ValueError: if the file is no steering, or was learnt on another model; the message names both.
        """
        return _loaded(path, model)

    def __repr__(self) -> str:
        count, at = "all heads" if self.heads is None else f"{len(self.heads)} heads", self.places.positions
        where = f"at positions {list(at)}" if isinstance(at, tuple) else "everywhere" if at is None else "at given positions"
        return f"Steering({self.how}, {count} of {self.model.record['name']}, {where}, decode={self.places.decode})"


def _in_range(how: str, vectors: torch.Tensor, gates: torch.Tensor) -> None:
    """Refuse values that are not finite, and gates that `how` cannot take."""
    for what, values in (("vectors", vectors), ("gates", gates)):
        if not values.isfinite().all():
            raise ValueError(f"{int((~values.isfinite()).sum())} of the {what}' numbers are not finite")
    low, high = (gates.min().item(), gates.max().item()) if gates.numel() else (0, 0)
    if how == "mix" and not 0 <= low <= high <= 1:
        raise ValueError(f"how='mix' takes gates from 0 to 1, got {low:.4g} to {high:.4g}: pass them through a sigmoid")
    if how == "replace" and not ((gates == 0) | (gates == 1)).all():
        raise ValueError(f"how='replace' takes gates of 0 or 1, got {low:.4g} to {high:.4g}: use how='mix'")


def _identity(model) -> dict:
    """What says whether two models are the same one, whatever they are stored in."""
    anatomy, record = model.anatomy, model.record
    named = {key: record.get(key) for key in ("name", "revision", "sha256")}
    return named | {"family": anatomy.family, "layers": anatomy.n_layers, "heads": anatomy.n_heads, "d_head": anatomy.d_head}


def _loaded(path, model) -> Steering:
    """What `Steering.load` returns."""
    tensors, about = _read(path)
    saved, here = about["model"], _identity(model)
    # the weights decide, whatever the model is called here; without their digest, name and revision do
    same = ("sha256",) if saved["sha256"] and here["sha256"] else ("name", "revision")
    if wrong := [key for key in (*same, "family", "layers", "heads", "d_head") if saved[key] != here[key]]:
        raise ValueError(
            f"{Path(path).name} was learnt on {saved['name']} and does not fit {here['name']}: they differ in "
            + ", ".join(f"{key} ({saved[key]} there, {here[key]} here)" for key in wrong)
        )
    vectors, gates = (tensors[key].to(model.device) for key in ("vectors", "gates"))
    where = {key: about.get(key) for key in ("heads", "positions", "decode", "prompt")}  # the last one is not in older files
    found = Steering(model, vectors, gates, about["how"], **where)
    found.recipe = about["recipe"]
    return found


def _read(path) -> tuple[dict, dict]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("heads", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{Path(path).name} is no safetensors file: {error}") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{Path(path).name} was not written by Steering.save: it lacks the mark {FORMAT!r}")
    return tensors, about
