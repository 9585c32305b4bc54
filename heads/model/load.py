"""Loading: a model by name as an nnsight envoy with the standard names, built, bound and checked."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from nnsight import CONFIG, TransformersModel
from nnsight.intervention.eproperty import eproperty
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from heads.model import anatomy, attention, checks, zoo
from heads.names import known


class Model(TransformersModel):
    """An nnsight model with `layers`, `final_norm`, `unembed`, `logits`, `.anatomy` and `.record`."""

    anatomy: anatomy.Anatomy
    record: dict

    @eproperty(key="output", description="logits [batch, position, vocabulary]")
    def logits(self, value: Any) -> torch.Tensor:
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
            ids, padding = given.get("input_ids"), getattr(self.tokenizer, "pad_token_id", None)
            if generates and given.get("attention_mask") is None and ids is not None and padding is not None:
                given["attention_mask"] = ids.ne(padding)  # as `generate` itself takes it
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

    def ids(self, text: str) -> torch.Tensor:
        """Token ids of a text `[1, position]`, with the tokenizer's own special tokens."""
        return self.tokenizer(text, return_tensors="pt").input_ids.to(self.device)


class RemoteModel(Model):
    """A model whose traces run on NDIF unless a trace says otherwise."""

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


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """The type of weights: "auto" is bfloat16 on a GPU, float32 elsewhere. LookupError for what is no such type."""
    if dtype == "auto":
        return torch.bfloat16 if device == "spread" or device.startswith("cuda") else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        known("dtype", dtype, ("auto", "float32", "bfloat16", "float16", "float64"))
    return found


@contextmanager
def _quietly():
    """No progress bars for a load of two seconds, and none of nnsight's notes on names that we bind."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Module .* has a submodule named")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def wrap(module: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Model:
    """A transformers module that exists already, with the standard names; `load` also checks and records it."""
    module.set_attn_implementation(attention.NAME)
    with _quietly():
        return _frozen(Model(module, tokenizer=tokenizer, **anatomy.vocabulary(module.config)))


def _frozen(model: Model) -> Model:
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
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{name!r} holds no weights as safetensors, and pickled ones are not read because they can run code: "
                "save the model again with save_pretrained(...)"
            )
        source = folder.as_posix()  # of a hub id: itself
        place = {"device_map": "auto"} if device == "spread" else {"device": device}
        config = AutoConfig.from_pretrained(source).get_text_config()
        with _quietly():
            # safetensors: pickled weights can run code when they are opened
            model = _frozen(Model(source, dispatch=True, dtype=kind, attn_implementation=attention.NAME,
                                  use_safetensors=True, **place, **anatomy.vocabulary(config)))  # fmt: skip
        record = {"name": name, **_provenance(folder, model.config)}
    model.record = {**record, "dtype": str(kind).removeprefix("torch."), "device": str(model.device)}
    checks.identities(model)
    return model


def _provenance(path: Path, config) -> dict:
    """Revision and SHA-256 of the weights: from the record of a zoo model, computed for a folder, and
    for a hub id the commit, which names its weights."""
    if (path / zoo.RECORD).exists():
        record = json.loads((path / zoo.RECORD).read_text())
        return {"revision": record["revision"], "sha256": record["sha256"]}
    if path.is_dir():
        digests = "".join(zoo.sha256(file) for file in sorted(path.glob("*.safetensors")))
        return {"revision": None, "sha256": hashlib.sha256(digests.encode()).hexdigest()}
    return {"revision": getattr(config, "_commit_hash", None), "sha256": None}


def load_remote(name: str) -> RemoteModel:
    """`load` on NDIF: RuntimeError without a key, ValueError for a model that only this machine has."""
    if name in zoo.ZOO or name.startswith("tiny-"):
        raise ValueError(f"{name!r} is not served by NDIF: where='remote' takes the hub id of a hosted model")
    if not (CONFIG.API.APIKEY or os.environ.get("NDIF_API_KEY")):
        raise RuntimeError(
            "where='remote' needs an NDIF key: get one at https://login.ndif.us and set NDIF_API_KEY "
            "(or nnsight.CONFIG.set_default_api_key(...)); where='local' runs on this machine"
        )
    config = AutoConfig.from_pretrained(name).get_text_config()
    # the tokenizer is given, because nnsight 0.8.1 does not find it for a model without weights
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = RemoteModel(name, tokenizer=tokenizer, **anatomy.vocabulary(config))
    model.anatomy = anatomy.bind(model)
    model.record = {"name": name, "revision": getattr(config, "_commit_hash", None), "sha256": None, "where": "remote"}
    return model


def load(name: str = zoo.DEFAULT, device: str = "auto", dtype: str = "auto", where: str = "local", seed: int = 0) -> Model:
    """A model as an nnsight envoy with the standard names, checked.

    Args:
        name: a zoo name (`heads.model.zoo.ZOO`), `tiny-<family>` (small, random weights from `seed`), a hub
            id (`owner/name`) or a folder with safetensors.
        device: "auto" (a GPU if there is one), any torch device, or "spread" (over all GPUs).
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), or a torch dtype's name.
        where: "local", or "remote": traces then run on NDIF, and no weights are loaded here.
        seed: of the random weights of a `tiny-` model.

    Returns:
        `heads.anatomy`'s vocabulary on an `nnsight.TransformersModel`, with `.anatomy` and `.record`
        (name, revision, SHA-256 of the weights, dtype, device).

    Raises:
        LookupError: for an unknown name, with the nearest one.
        FetchError: if a zoo model cannot be fetched.
        ValueError: for an unknown device, dtype or place, or if the model fails the identity checks of
            `heads.checks`.
        RuntimeError: for a GPU that is not there, or a remote model without a key.
    """
    zoo.check_name(name)
    known("place to run", where, ("local", "remote"))
    if where == "remote":
        return load_remote(name)
    return load_local(name, device, dtype, seed)
