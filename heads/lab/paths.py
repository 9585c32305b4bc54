"""Path patching: what a sender does to a receiver along the direct path, other heads held still.

The semantics of Wang et al. 2022 (arXiv 2211.00593, section 3.1). Base x, source x':

    A   run x', keep what the senders write
    B   run x, keep what every head writes
    C   run x with every head held at its value of B, senders at their value of A; read the receivers' inputs
    D   run x with only the receivers' inputs forced to what C read, everything else recomputed; read the metric

For the logits as receiver, C is the end. MLPs and norms are recomputed ("recompute": a path may pass MLPs) or held
too ("freeze": the skip connection alone).

Two engines, equal to float tolerance. "literal" runs the passes as they stand. "fast" uses that with all heads held
still, positions no longer interact: pass C is a single column of the residual stream, replayed upwards from the sender,
and pass D restarts at the first receiver with everything before it from a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import nnsight
import torch
from tqdm import tqdm

from heads.lab.attribution import activations
from heads.lab.replay import Replay, ReplayError, chunks, room, swapped
from heads.metrics import Metric, logit_difference, named
from heads.model.offers import require
from heads.model.weights import decoder_only, hooked, output_projection
from heads.names import known, whole
from heads.scores import Effects, Head
from heads.tasks.base import Task

COMPONENTS = ("q", "k", "v")
ENGINES = ("auto", "fast", "literal")
Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # base [prompt], source [prompt], change [set, prompt]
MLP = "mlp"  # a sender (layer, MLP) is that layer's MLP


@dataclass(frozen=True)
class Route:
    """Which way an effect may go.

    Args:
        receivers: heads that read the effect; none: the logits.
        component: which of their inputs. Under grouped queries a key or value belongs to a group of heads, and
            the whole group receives.
        position: the role where senders write and receivers read. With other heads held still nothing moves between
            positions, so it is one role: "END" for the logits and for queries at END, the key's own role for k and v.
        mlps: "recompute" or "freeze".
    """

    receivers: tuple[tuple[int, int], ...] = ()
    component: str = "q"
    position: str = "END"
    mlps: str = "recompute"

    def check(self, model, task: Task) -> Route:
        """The route itself, if such an effect can be: ValueError and LookupError say why not."""
        known("component", self.component, COMPONENTS)
        known("way to treat MLPs", self.mlps, ("recompute", "freeze"))
        if not isinstance(self.position, str) or self.position not in task.roles:
            task.at(self.position)  # raises, naming the roles
            raise ValueError(f"path patching acts at one position per prompt: a role, not {self.position!r}")
        if not self.receivers and self.position != "END":
            raise ValueError(
                f"with all heads held still, nothing written at {self.position} reaches the logits at END: "
                "use position='END', or give receivers that carry it there"
            )
        decoder_only(model)
        return self

    def units(self, model, layer: int) -> list[int]:
        """Which heads, or for keys and values which groups, of a layer receive."""
        group = 1 if self.component == "q" else model.anatomy.n_heads // model.anatomy.n_kv_heads
        return sorted({head // group for at, head in self.receivers if at == layer})

    @property
    def layers(self) -> list[int]:
        """Layers with receivers, in order."""
        return sorted({layer for layer, _ in self.receivers})


def path_scores(model, task: Task, receivers: Iterable[Head] = (), component: str = "q", *, position: str = "END",
                mlps: str = "recompute", scan: str = "earliest", mlp_senders: bool = False,
                metric: str | Metric = logit_difference, engine: str = "auto", batch: int = 16,
                tokens: int | None = None, progress: bool = True) -> Effects:  # fmt: skip
    """Path patching with every head, one at a time, as the sender.

    Args:
        receivers, component, position, mlps: as in `Route`.
        scan: "earliest": senders below the first receiver layer only, as the code of Merullo et al. does. "last": all
            below the last one. Heads that are no senders score 0, receivers among them.
        mlp_senders: MLPs send as well; they come as `Effects.mlps`.
        engine: "fast", "literal", or "auto": fast, and literal for a model that the fast one refuses.
        batch: prompts at a time; tokens: rows in one forward.

    Returns:
        Effects: metric after patching minus metric of the base run; `source` is the metric on the corrupted prompts, so
        that `normalised()` is the score of Wang et al.

    Raises:
        ValueError, LookupError, IndexError: for what cannot be meant, before any forward pass.
    """
    known("scan", scan, ("earliest", "last"))
    known("engine", engine, ENGINES)
    route = Route(tuple(model.anatomy.check(receivers)), component, position, mlps).check(model, task)
    top = model.anatomy.n_layers
    if route.receivers:
        top = route.layers[0] if scan == "earliest" else route.layers[-1]
    kinds = [*range(model.anatomy.n_heads), *([MLP] if mlp_senders else [])]
    senders = [(layer, head) for layer in range(top) for head in kinds if (layer, head) not in route.receivers]
    if not senders:
        raise ValueError(f"no sender lies below the receivers in layer {top}: a path goes upwards")
    read, found, parts = named(metric), [], task.batches(batch)
    whole("tokens", 1 if tokens is None else tokens, 1)
    require(model, "mlp")
    bar = tqdm(total=len(task) * len(senders), desc="path patching", unit="path", disable=None if progress else True)
    for part in parts:
        try:
            run = literal if engine == "literal" else fast
            found.append(run(model, part, senders, route, read, tokens, bar))
        except ReplayError as error:
            if engine == "fast":
                raise
            tqdm.write(f"{error}; this takes longer")
            engine = "literal"
            found.append(literal(model, part, senders, route, read, tokens, bar))
    bar.close()
    base, source, values = (torch.cat([x[k] for x in found], -1).float().cpu() for k in range(3))
    table = torch.zeros(len(task), model.anatomy.n_layers, model.anatomy.n_heads + 1)  # the last column is the MLPs'
    for (layer, head), change in zip(senders, values):
        table[:, layer, -1 if head == MLP else head] = change
    mlps = table[..., -1] if mlp_senders else None
    return Effects(table[..., :-1], base, source, f"change of {read.name}", mlps=mlps, model=model)


# ---- the fast engine ----------------------------------------------------------------------


class _Stop(Exception):
    """The receivers' inputs have been read: the rest of the attention is not needed."""


class Columns:
    """The column of the residual stream at one position per prompt, with all heads held still.

    Caches `[prompt, ...]` at that position from the clean run and from the corrupted one.
    """

    def __init__(self, clean: Replay, source: Replay, at: torch.Tensor, route: Route):
        self.clean, self.route, self.at = clean, route, at
        pick = lambda parts: [x[torch.arange(len(at)), at] for x in parts]  # noqa: E731
        self.resid, self.attn, self.mlp = pick(clean.resid), pick(clean.attn), pick(clean.mlp)
        self.change = [b - a for a, b in zip(pick(clean.z), pick(source.z))]  # z' - z, [prompt, head, d_head]
        self.other_mlp = pick(source.mlp)

    def attention_output(self, layer: int, senders: list) -> torch.Tensor:
        """What the layer's attention puts out for each sender, `[sender, prompt, d_model]`."""
        anatomy = self.clean.model.anatomy
        weight = output_projection(self.clean.model, layer).view(anatomy.n_heads, anatomy.d_head, -1)
        out = self.attn[layer].expand(len(senders), *self.attn[layer].shape).clone()
        for row, (at, head) in enumerate(senders):
            if at == layer and head != MLP:
                out[row] += self.change[layer][:, head] @ weight[head]
        return out

    def climb(self, senders: list, top: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Pass C for many senders, sorted by layer.

        Returns:
            The column leaving layer `top` - 1, `[sender * prompt, d_model]`, and for each receiver layer what C reads:
            `[sender, prompt, unit, d_head]` for the senders below it (they come first).
        """
        starts = [layer for layer, _ in senders]
        n, hidden, inputs = len(self.at), self.resid[0][:0, None], {}
        for i in range(starts[0], top):
            new = starts.count(i)
            hidden = torch.cat([hidden.to(self.resid[i].device), self.resid[i].repeat(new, 1)[:, None]])
            if i in self.route.layers and len(hidden) > new * n:
                inputs[i] = self._receive(i, hidden[: len(hidden) - new * n])
            hidden = self._layer(i, hidden, senders[: len(hidden) // n])
        if top in self.route.layers:
            inputs[top] = self._receive(top, hidden)
        return hidden[:, 0], inputs

    def _layer(self, i: int, hidden: torch.Tensor, senders: list) -> torch.Tensor:
        """One layer with its attention held at what each sender makes of it; MLP recomputed or held."""
        layer = self.clean.model.layers[i]
        attn = self.attention_output(i, senders).flatten(0, 1)[:, None]
        own = [row for row, sender in enumerate(senders) if sender == (i, MLP)]

        def put(out):
            out = out.view(len(senders), *self.mlp[i].shape).clone()
            out[own] = self.other_mlp[i]
            return out.view(attn.shape)

        with ExitStack() as stack:
            stack.enter_context(swapped(layer.attn._module, lambda *args, **kwargs: (attn, None)))
            if self.route.mlps == "freeze":
                held = put(self.mlp[i].repeat(len(senders), 1))
                stack.enter_context(swapped(layer.mlp._module, lambda *args, **kwargs: held))
            elif own:
                stack.enter_context(hooked((layer.mlp._module.register_forward_hook, lambda m, a, out: put(out), {})))
            return self.clean.layer(i, hidden, {})

    def _receive(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """The receivers' queries, keys or values in a column: `[sender, prompt, unit, d_head]`."""
        component, units, kept = COMPONENTS.index(self.route.component), self.route.units(self.clean.model, i), []

        def keep(*qkv):
            kept.append(qkv[component][:, units, 0])  # [row, unit, d_head]
            raise _Stop

        args, kwargs = self.clean.calls[i]
        n = len(hidden) // len(self.at)
        if tables := kwargs.get("position_embeddings"):  # rotary tables of each prompt's own position
            kwargs = kwargs | {"position_embeddings": tuple(x[0, self.at].repeat(n, 1)[:, None] for x in tables)}
        try:
            self.clean.layer(i, hidden, {}, call=(args, kwargs), edit=keep)
        except _Stop:
            return kept[0].view(n, len(self.at), *kept[0].shape[1:])
        raise ReplayError(f"layer {i} never called its attention")


def fast(model, part: Task, senders: list, route: Route, metric: Metric, tokens: int | None, bar: tqdm) -> Values:
    """The column engine for one batch of prompts."""
    positions = part.roles[route.position]
    start = int(positions.min())
    clean = Replay(model, part.ids, start, keep_parts=True)
    source = Replay(model, part.corrupted, start, keep_parts=True, check=False)
    columns = metric.columns(part)
    reference = metric.pick(clean.logits, part)
    base = metric(reference, part, reference).cpu()
    column, values = Columns(clean, source, (positions - start).to(model.device), route), []
    for chosen in chunks(senders, room(model, 1, len(part), tokens)):
        if route.receivers:
            hidden = _receive_and_run(clean, column, column.climb(chosen, route.layers[-1])[1], len(chosen), route, tokens)
        else:
            hidden = column.climb(chosen, model.anatomy.n_layers)[0]
        values.append(metric(clean.read(hidden, columns), part, reference).cpu() - base)
        bar.update(len(chosen) * len(part))
    return base, metric(metric.pick(source.logits, part), part, reference).cpu(), torch.cat(values)


def _receive_and_run(clean: Replay, column: Columns, inputs: dict, n: int, route: Route, tokens) -> torch.Tensor:
    """Pass D: from the first receiver layer up, with the receivers' inputs forced. `[sender * prompt, d_model]` at END."""
    first, last, which = route.layers[0], clean.n_layers, COMPONENTS.index(route.component)
    prompts, found = torch.arange(clean.n_prompts, device=column.at.device), []

    def forcing(i: int, forced: torch.Tensor) -> Callable:
        """Put `forced`, `[sender, prompt, unit, d_head]`, into its first rows."""
        units = torch.tensor(route.units(clean.model, i), device=column.at.device)

        def edit(*qkv):
            x = qkv[which].clone()
            rows = x.view(-1, clean.n_prompts, *x.shape[1:])[: len(forced)]  # [sender, prompt, unit, position, d_head]
            rows[:, prompts[:, None], units[None], column.at[:, None]] = forced
            return (*qkv[:which], x, *qkv[which + 1 :])

        return edit

    size = room(clean.model, clean.resid[0].shape[1], clean.n_prompts, tokens)
    for chosen in chunks(list(range(n)), size):
        hidden, cache = clean.rows(first, len(chosen)), clean.cache()
        for i in range(first, last):
            forced = inputs[i][chosen[0] : chosen[-1] + 1] if i in inputs else ()
            hidden = clean.layer(i, hidden, cache, **({"edit": forcing(i, forced)} if len(forced) else {}))
        found.append(hidden[:, -1])
    return torch.cat(found)


# ---- the literal engine -------------------------------------------------------------------


def literal(model, part: Task, senders: list, route: Route, metric: Metric, tokens: int | None, bar: tqdm) -> Values:
    """Passes A to D as they are defined, one sender at a time, through nnsight: the oracle."""
    ids, rows, at = part.ids.to(model.device), torch.arange(len(part)), part.roles[route.position]
    z_source, mlp_source, logits_source = activations(model, part.corrupted)
    z_base, mlp_base, logits_base = activations(model, ids)
    reference = metric.pick(logits_base, part)
    base, values = metric(reference, part, reference).cpu(), []
    for layer, head in senders:
        z, m = [x.clone() for x in z_base], [x.clone() for x in mlp_base]
        if head == MLP:
            m[layer][rows, at] = mlp_source[layer][rows, at]
        else:
            z[layer][rows, at, head] = z_source[layer][rows, at, head]
        held = range(model.anatomy.n_layers) if route.mlps == "freeze" else [layer] if head == MLP else []
        logits = _pass_c(model, ids, z, m, held, route, rows, at)
        values.append(metric(metric.pick(logits, part), part, reference).cpu() - base)
        bar.update(len(part))
    return base, metric(metric.pick(logits_source, part), part, reference).cpu(), torch.stack(values)


def _pass_c(model, ids, z, mlp, held, route, rows, at):
    """Everything forced to `z` (and MLPs in `held` to `mlp`); for receivers, pass D on what they read."""
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        read = nnsight.save([])
        for i, layer in enumerate(model.layers):
            if i in route.layers:  # before the heads are forced
                read.append(getattr(layer.attn, route.component).clone())
            layer.attn.heads = z[i]
            if i in held:
                layer.mlp.output[rows, at] = mlp[i][rows, at]
        logits = model.logits[:, -1].save()
    if not route.receivers:
        return logits
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        for i, new in zip(route.layers, read):
            view, units = getattr(model.layers[i].attn, route.component), route.units(model, i)
            view[rows[:, None], at[:, None], torch.tensor(units)] = new[rows[:, None], at[:, None], torch.tensor(units)]
            if route.component != "q":
                setattr(model.layers[i].attn, route.component, view)
        logits = model.logits[:, -1].save()
    return logits
