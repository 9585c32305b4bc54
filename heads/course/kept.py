"""Results that several notebooks share: computed once, kept by content, believed only if every byte is right.

    found = heads.kept(heads.retrieval_scores, lm, samples, 20)   # heads.retrieval_scores(lm, samples, 20)

The key is the SHA-256 of the function, its arguments, the weights, the code of heads and the versions of what decides a
number, so that nothing has to be declared out of date. Files lie in the folder `kept` of the cache (`heads doctor` says
how much it holds): a SHA-256, then safetensors with arrays and JSON, no pickle.
"""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from heads.course import record
from heads.model import zoo

PACKAGE = Path(__file__).parents[1]


def kept(function: Callable, *args, **kwargs) -> Any:
    """`function(*args, **kwargs)`, or what it returned before for the same arguments, weights and code.

    HEADS_CACHE=0 computes always: `make test` and `make refresh` believe nothing that was kept. So does a cache folder
    that cannot be written. Two processes that ask for the same result compute it once.

    Args:
        function: one of heads whose result depends on its arguments alone: no random state, no other file.
        args, kwargs: models as loaded, and what is made of numbers, text, arrays, lists, dicts and objects of heads. So is
            the result; in one that was read, tensors are on the CPU, tuples are lists and the keys of dicts text.

    Raises:
        TypeError: for an argument or a result of another kind, or an edited model: nothing names its edits.
    """
    bound, folder = inspect.signature(function).bind(*args, **kwargs), zoo.home() / "kept"
    bound.apply_defaults()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.environ.get("HEADS_CACHE") == "0" or not os.access(folder, os.W_OK):
        return function(*args, **kwargs)
    code = [(path.name, sha256(path.read_bytes()).hexdigest()) for path in sorted(PACKAGE.rglob("*.py"))]
    key = [function.__module__, function.__qualname__, code, record.versions(), bound.arguments]
    path = folder / f"{function.__name__}-{sha256(_bytes(key)).hexdigest()[:32]}.kept"
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            digest, payload = (whole := path.read_bytes())[:32], whole[32:]
            if sha256(payload).digest() == digest:
                return _value(payload)
            print(f"heads.kept: {path.name} is damaged and is computed again", file=sys.stderr)
        result = function(*args, **kwargs)
        payload, aside = _bytes(result), path.with_suffix(".tmp")
        aside.write_bytes(sha256(payload).digest() + payload)
        os.replace(aside, path)
        return result


def _bytes(value) -> bytes:
    """A value as one safetensors file: its arrays, and JSON that says where each belongs."""
    import numpy as np
    import torch
    from safetensors.torch import save

    arrays = {}

    def plain(item):
        if isinstance(item, (np.ndarray, torch.Tensor)):
            arrays[name := str(len(arrays))] = torch.as_tensor(item).detach().cpu().clone().contiguous()
            return {"__array__": name, "numpy": isinstance(item, np.ndarray)}
        if hasattr(item, "_module"):
            if item._edits:
                raise TypeError("heads.kept: an edited model has no name to keep a result by: call the function itself")
            weights = [torch.hash_tensor(p).view(torch.int64).item() for p in item._module.parameters() if not p.is_meta]
            return {"model": item.record, "weights": weights}  # what was loaded, and whether it was trained since
        if type(item).__module__.startswith("heads."):
            return {"__module__": type(item).__module__, "class": type(item).__qualname__, "state": vars(item)}
        raise TypeError(f"heads.kept: {type(item).__name__} is no number, text, array, list, dict, model or object of heads")

    text = json.dumps(value, default=plain).encode()
    return save({**arrays, "json": torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def _value(payload: bytes) -> Any:
    """The value that became these bytes."""
    from safetensors.torch import load

    arrays = load(payload)

    def made(found):
        if "__array__" in found:
            return arrays[found["__array__"]].numpy() if found["numpy"] else arrays[found["__array__"]]
        if "__module__" in found:
            new = object.__new__(getattr(importlib.import_module(found["__module__"]), found["class"]))
            vars(new).update(found["state"])
            return new
        return found

    return json.loads(arrays["json"].numpy().tobytes(), object_hook=made)
