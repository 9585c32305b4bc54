"""Loading: a model by name as an nnsight envoy with the standard names, built, bound and checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from threading import RLock, get_ident
from typing import Any

import torch
from nnsight import CONFIG, TransformersModel
from nnsight.intervention.eproperty import eproperty
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoTokenizer,
    PreTrainedTokenizerBase,
)  # fmt: skip

from heads.model import anatomy, attention, checks, folders, offers, zoo
from heads.model.families import FAMILIES, family_of
from heads.model.weights import check_length
from heads.names import known

SPARE = ("pooler.", "seq_relationship.", "masked_bias", "inv_freq", "position_ids")  # weights that some checkpoints carry beside the model, and that may be left out


class Model(TransformersModel):
    """An nnsight model with `layers`, `final_norm`, `unembed`, `logits`, `.anatomy` and `.record`."""

    anatomy: anatomy.Anatomy
    record: dict

    @eproperty(key="output", description="logits [batch, position, vocabulary]")
    def logits(self, value: Any) -> torch.Tensor:
        if "logits" not in value:
            raise ValueError(f"this {self.anatomy.family} encoder has no head that predicts words: read layers[-1].output, or heads.embed")
        return value.logits

    @logits.transform
    def logits(self, view: torch.Tensor, raw: Any) -> Any:
        raw.logits = view
        return raw

    @logits.postprocess
    def logits(self, value: torch.Tensor) -> Any:
        raw = anatomy.Mediator.value(f"{self.path}.output")
        raw.logits = value
        return raw

    def interleave(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        """nnsight's driver of every run; meanwhile, what the run was given stands on the module, for `heads.lab.places`."""

        @wraps(fn)
        def run(*inputs, **named):
            given, generates = {**({"input_ids": inputs[0]} if inputs else {}), **named}, fn.__name__ == "generate"
            self._fits(given, generates)
            self._module.__dict__["_run"] = {"given": given, "generates": generates}
            try:
                return fn(*inputs, **named)
            finally:
                del self._module.__dict__["_run"]

        # An edit holds for every forward of a run, so it always waits for one more when the run ends, and
        # nnsight warns about that. Quiet only where a stored edit is what waits.
        with warnings.catch_warnings():
            if self._edits:
                warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            return super().interleave(run, *args, **kwargs)

    def _fits(self, given: dict, generates: bool = False) -> None:
        """Refuse a run that is longer than the context, or that continues what another model has kept."""
        ids, past, config = given.get("input_ids", given.get("inputs_embeds")), given.get("past_key_values"), given.get("generation_config")
        if not isinstance(ids, torch.Tensor):
            return
        kept = past.get_seq_length() if past is not None and not generates else 0
        total, new = (given.get(key) or getattr(config, key, None) or 0 for key in ("max_length", "max_new_tokens"))
        check_length(self, max(ids.shape[1] + kept + new, total if generates else 0), kept)
        owner = getattr(past.layers[0], "model", None) if getattr(past, "layers", None) else None
        if owner is not None and owner() is not self._module:
            raise ValueError("this cache keeps the prompts of another model's heads.Prefix: make one of this model")

    @property
    def _batcher_class(self) -> type:
        """nnsight asks for this as every run begins: where a second thread is refused, before it disturbs the first."""
        self.interleaver.__dict__.get("begin", lambda: None)()
        return super()._batcher_class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, edits included."""
        if self.interleaver.interleaving:
            return super().__call__(*args, **kwargs)
        if not self._edits:
            self._fits({**({"input_ids": args[0]} if args else {}), **kwargs})
            return super().__call__(*args, **kwargs)
        with self.trace(*args, **kwargs):
            found = self.output.save()
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As calling the model."""
        return self(*args, **kwargs)

    def pipe(self, *inputs: Any, **kwargs: Any) -> Any:
        """nnsight's own. ValueError for an edited model: it does not say where the prompt ends, which edits count from."""
        if self._edits:
            raise ValueError("pipe does not say where the prompt of an edited model ends: use generate")
        return super().pipe(*inputs, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, of the weights. ValueError for an edited model: an edit is no weight."""
        if self._edits:
            raise ValueError("an edited model cannot be saved: its edits are not in its weights. Save what made them "
                             "(Steering.save, the list of heads) and the model without them")  # fmt: skip
        return self._module.save_pretrained(*args, **kwargs)

    def __getstate__(self) -> dict:
        raise TypeError("a model is neither copied nor pickled: load it a second time, by its name, in another process too; "
                        "ablate(...) and edit() leave it as it is")  # fmt: skip

    def ids(self, text: str) -> torch.Tensor:
        """Token ids of a text `[1, position]`, with the tokenizer's own special tokens."""
        return self.tokenizer(text, return_tensors="pt").input_ids.to(self.device)


class RemoteModel(Model):
    """A model whose traces run on NDIF unless a trace says otherwise."""

    __getstate__ = TransformersModel.__getstate__  # what is sent there

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("remote", True)
        return super().trace(*inputs, **kwargs)


def pick_device(device: str) -> str:
    """Where to load: "auto" becomes "cuda" or "cpu". ValueError for no device, RuntimeError for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "spread":
        return device
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device={device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps' or 'spread'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device={device!r}, but this torch ({torch.__version__}) sees no GPU: use device='auto'")
    return device


def pick_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """The type of weights: "auto" is bfloat16 on a GPU, float32 elsewhere. LookupError for what is no such type."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return torch.bfloat16 if device == "spread" or device.startswith("cuda") else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        known("dtype", dtype, ("auto", "float32", "bfloat16", "float16", "float64"))
    return found


@contextmanager
def _quietly():
    """No progress bars for a load of two seconds, no reports of what is refused here anyway, and none of nnsight's notes on
    names that we bind."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Module .* has a submodule named")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def wrap(module: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Model:
    """A transformers module that exists already, with the standard names; `load` also checks and records it.

    Raises:
        ValueError: for a model that computes its attention by itself; and as `heads.model.anatomy.bind`.
    """
    module.config.architectures = [type(module).__name__]  # as transformers writes when it saves: which parts there are
    with _quietly():
        module.set_attn_implementation(attention.NAME)
    if module.config.get_text_config()._attn_implementation != attention.NAME:
        raise ValueError(f"{type(module).__name__} computes its attention by itself and not through transformers' interface: "
                         "its heads cannot be read")  # fmt: skip
    if not family_of(module.config).encoder and not module.can_generate():
        raise ValueError(f"{type(module).__name__} cannot generate, and no encoder of this type is known: "
                         "add a row to heads.model.families.FAMILIES")  # fmt: skip
    with _quietly():
        return _frozen(Model(module, tokenizer=tokenizer, **anatomy.vocabulary(module.config)))


def _take_turns(interleaver: Any) -> None:
    """One thread at a time: from `begin`, as a run starts, to `cancel`, with which nnsight ends every run."""
    cancel, lock, owner = interleaver.cancel, RLock(), [None]

    def begin():
        with lock:
            if owner[0] not in (None, get_ident()):
                raise RuntimeError("another thread is running this model: let threads take turns (a lock around trace and "
                                   "generate), or load one model for each")  # fmt: skip
            owner[0] = get_ident()

    def end():
        with lock:
            if owner[0] in (None, get_ident()):  # not the run of another thread that has begun since
                cancel()
                owner[0] = None

    interleaver.begin, interleaver.cancel = begin, end


def _frozen(model: Model) -> Model:
    _take_turns(model.interleaver)
    model._module.eval().requires_grad_(False)
    model.anatomy = anatomy.bind(model)
    return model


def load_local(name: str, device: str, dtype: str, seed: int) -> Model:
    """`load` on this machine."""
    device = pick_device(device)
    kind = pick_dtype(dtype, device)
    if name.startswith("tiny-"):
        from heads.model import tiny  # of no other model

        module, tokenizer = tiny.build(name.removeprefix("tiny-"), seed)
        place = "cpu" if device == "spread" else device
        model = wrap(module.to(place, kind), tokenizer)
        record = {"name": name, "revision": f"seed {seed}", "sha256": tiny.sha256(module)}
    else:
        folder = Path(zoo.fetch(name) if name in zoo.ZOO else name).expanduser()
        source = folder.as_posix() if folder.is_dir() else name
        record = {"name": name, **(folders.provenance(name, folder) if folder.is_dir() else {})}
        module, tokenizer = _read(source, kind, "auto" if device == "spread" else {"": device})
        model = wrap(module, tokenizer)
        record = {"revision": getattr(module.config, "_commit_hash", None), "sha256": None, **record}
    model.record = {**record, "dtype": str(kind).removeprefix("torch."), "device": str(model.device)}
    checks.identities(model)
    if model.anatomy.family not in FAMILIES:
        warnings.warn(offers.summary(model), stacklevel=3)
    return model


def _read(source: str, dtype: torch.dtype, device_map: Any) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Module and tokenizer of a folder or a hub id: safetensors alone, every weight from the file, our attention whatever
    the config asks for, and no code that comes with them. ValueError says what is not so."""
    safe = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **safe)
        config._attn_implementation = attention.NAME  # of every config inside, too
        config.transformers_weights = None  # a config may name another file than the one that was hashed
        auto, row = AutoModelForCausalLM, family_of(config)
        if row.encoder:
            auto = AutoModelForMaskedLM if row.unembed else AutoModel
        if type(config) not in auto._model_mapping and config.get_text_config() is not config:
            auto = AutoModelForImageTextToText
        with _quietly():
            module, found = auto.from_pretrained(
                source, config=config, dtype=dtype, device_map=device_map, attn_implementation=attention.NAME,
                use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **safe, **_unpooled(auto, config),
            )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{source!r} needs code that comes with it (auto_map), which heads never runs: "
                         "take a model whose architecture transformers has itself") from None  # fmt: skip
    _whole(source, module, found)
    if len(tokenizer) < 2:
        raise ValueError(f"{source!r} has no tokenizer: save it there with tokenizer.save_pretrained(...)")
    return module, tokenizer


def _unpooled(auto: type, config) -> dict:
    """What keeps transformers from making the pooler that an encoder without a head may have: nothing here reads it."""
    made = auto._model_mapping.get(type(config), None) if auto is AutoModel else None
    return {"add_pooling_layer": False} if made and "add_pooling_layer" in signature(made).parameters else {}


def _whole(source: str, module: torch.nn.Module, found: dict) -> None:
    """Refuse weights that were not in the file, and a file that holds those of another model."""
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "unknown to this architecture": sorted(key for key in found["unexpected_keys"] if not any(part in key for part in SPARE)),
        "of another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if keys[5:] else ''}"
                           for what, keys in wrong.items() if keys)  # fmt: skip
        raise ValueError(f"{source!r} does not hold the weights of a {type(module).__name__} ({listed}): what is missing "
                         "would be random. Save the whole model with its own class")  # fmt: skip


def load_remote(name: str) -> RemoteModel:
    """`load` on NDIF: RuntimeError without a key, ValueError for a model that only this machine has."""
    if name in zoo.ZOO or name.startswith("tiny-"):
        raise ValueError(f"{name!r} is not served by NDIF: where='remote' takes the hub id of a hosted model")
    if not (CONFIG.API.APIKEY or os.environ.get("NDIF_API_KEY")):
        raise RuntimeError(
            "where='remote' needs an NDIF key: get one at https://login.ndif.us and set NDIF_API_KEY "
            "(or nnsight.CONFIG.set_default_api_key(...)); where='local' runs on this machine"
        )
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # the tokenizer is given, because nnsight 0.8.1 does not find it for a model without weights
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model = RemoteModel(name, tokenizer=tokenizer, **anatomy.vocabulary(config))
    model.anatomy = anatomy.bind(model)
    model.record = {"name": name, "revision": getattr(config, "_commit_hash", None), "sha256": None, "where": "remote"}
    return model


def load(name: str = zoo.DEFAULT, device: str = "auto", dtype: str | torch.dtype = "auto", where: str = "local", seed: int = 0) -> Model:
    """A model as an nnsight envoy with the standard names, checked.

    Args:
        name: a zoo name (`heads.model.zoo.ZOO`), `tiny-<family>` (small, random weights from `seed`), a hub
            id (`owner/name`) or a folder with safetensors.
        device: "auto" (a GPU if there is one), any torch device, or "spread" (over all GPUs).
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), or a torch dtype or its name.
        where: "local", or "remote": traces then run on NDIF, and no weights are loaded here.
        seed: of the random weights of a `tiny-` model.

    Returns:
        `heads.anatomy`'s vocabulary on an `nnsight.TransformersModel`, with `.anatomy` and `.record`
        (name, revision, SHA-256 of the weights, dtype, device).

    Raises:
        LookupError: for an unknown name, with the nearest one.
        FetchError: if a zoo model cannot be fetched.
        ValueError: for an unknown device, for weights that are missing, unknown or not safetensors, for a model that
            needs code of its own, or fails the identities of `heads.model.checks`.
        RuntimeError: for a GPU that is not there, or a remote model without a key.
    """
    zoo.check_name(name)
    known("place to run", where, ("local", "remote"))
    if where == "remote":
        return load_remote(name)
    return load_local(name, device, dtype, seed)
