"""Results that several notebooks share: computed once, kept by content, believed only if every byte is right.

    found = heads.kept(heads.retrieval_scores, lm, samples, 20)   # heads.retrieval_scores(lm, samples, 20)

The key is the SHA-256 of the function, its arguments, the weights, the code of heads and the versions of what decides a
number, so that nothing has to be declared out of date. Files lie in the folder `kept` of the cache (`heads doctor` says
how much it holds): a SHA-256, then JSON, in which numbers keep every bit; no pickle.
"""

import inspect
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from heads.course import record
from heads.model import zoo


def kept(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, or what it returned before for the same arguments, weights and code.

    HEADS_CACHE=0 computes always: `make test` and `make refresh` believe nothing that was kept. So does a cache folder
    that cannot be written; what a full disk cannot take is returned with a warning. Two processes that ask for the same
    result compute it once.

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
    code = [path.read_text(encoding="utf-8") for path in sorted(record.PACKAGE.rglob("*.py"))]
    key = [function.__module__, function.__qualname__, code, record.versions(), bound.arguments]
    key = sha256(_text(key)).hexdigest()
    path = folder / f"{function.__name__}-{key[:32]}.kept"
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            digest, _, found = path.read_bytes().partition(b"\n")
            if digest == sha256(found).hexdigest().encode():
                return json.loads(found, object_hook=_made)
            print(f"heads.kept: {path.name} is damaged and is computed again", file=sys.stderr)
        result, aside = function(*args, **kwargs), path.with_suffix(".tmp")
        found = _text(result)
        try:
            aside.write_bytes(sha256(found).hexdigest().encode() + b"\n" + found)
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            warnings.warn(f"heads.kept: the result is not kept, {path.name} cannot be written ({error})", stacklevel=2)
        return result


def _text(item) -> bytes:
    """JSON of what is kept, or is part of a key. TypeError for what it cannot hold."""
    try:
        return json.dumps(item, default=_plain).encode()
    except TypeError as error:
        raise TypeError(f"heads.kept: {str(error).removeprefix('heads.kept: ')}") from None


def _plain(item) -> dict:
    """What JSON does not know, as a dict: an array, a model (to be recognised, never to be read), an object of heads."""
    if isinstance(item, (np.ndarray, np.generic, torch.Tensor)):
        return {"__array__": item.tolist(), "dtype": str(item.dtype), "shape": item.shape}
    if hasattr(item, "_module"):
        if item._edits:
            raise TypeError("heads.kept: an edited model has no name to keep a result by: call the function itself")
        named = item._module.state_dict().items()
        weights = {name: sha256(x.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest() for name, x in named}
        return {"model": item.record, "weights": weights}  # what was loaded, and whether it was trained since
    if type(item).__module__.startswith("heads."):
        return {"__class__": f"{type(item).__module__}:{type(item).__qualname__}", "state": vars(item)}
    raise TypeError(f"heads.kept: {type(item).__name__} is no number, text, array, list, dict, model or object of heads")


def _made(found: dict) -> Any:
    """The array or object that became this dict, or the dict itself."""
    if "__array__" in found:
        name = found["dtype"].removeprefix("torch.")  # of a tensor, else of numpy's
        array = np.array if name == found["dtype"] else torch.tensor
        dtype = name if array is np.array else getattr(torch, name)
        return array(found["__array__"], dtype=dtype).reshape(found["shape"])[()]  # a number of numpy's is one again
    if "__class__" in found:
        new = object.__new__(pkgutil.resolve_name(found["__class__"]))
        vars(new).update(found["state"])
        return new
    return found
