"""What a model's folder may hold, and what was read from it: safetensors inside the folder, and their digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from heads.model.zoo import RECORD, ZOO, home, sha256
from heads.names import replacing

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def weights(folder: Path) -> list[Path]:
    """The files of weights that will be read from a folder.

    Raises:
        ValueError: no safetensors (pickled weights can run code when they are opened), an adapter in place of a model, an
            index that leads out of the folder or to another kind of file. OSError: a file that is not there.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds an adapter, not a whole model: load its base, add it by peft, "
            "merge it (merge_and_unload) and save that"
        )
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{str(folder)!r} holds no weights as {WHOLE}, and pickled ones are not read because they can run code: "
            "save the model again with save_pretrained(...)"
        )
    names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} of {str(folder)!r} names {name!r}: only safetensors inside the folder are read")
        if not (folder / name).exists():
            raise FileNotFoundError(f"{INDEX} of {str(folder)!r} names {name!r}, which is not there: the folder is not whole")
    return [folder / name for name in names]


def digest(file: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder for as long as its size, its times and its inode are the same."""
    store, key, stat = home() / "digests.json", str(file.resolve()), file.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    try:
        found = dict(json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or broken: written anew
        found = {}
    *before, value = kept if isinstance(kept := found.get(key), list) and kept else [None]
    if before == state and isinstance(value, str):
        return value
    value = sha256(file)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        still = {file: kept for file, kept in found.items() if Path(file).exists()}
        with replacing(store) as aside:
            aside.write_text(json.dumps({**still, key: [*state, value]}), encoding="utf-8")
    except OSError:  # a cache that cannot be written: computed again next time
        pass
    return value


def provenance(name: str, folder: Path) -> dict:
    """Revision and SHA-256 of the weights in a folder; of a zoo model they are held against the record of its fetch.

    Raises:
        ValueError: weights of the zoo that are not what was fetched; and as `weights`.
    """
    digests = [digest(file) for file in weights(folder)]
    if name not in ZOO:
        whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return {"revision": None, "sha256": whole}
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if digests != [record["sha256"]]:
        raise ValueError(
            f"the weights of {name} in {str(folder)!r} are not those that were fetched (SHA-256 {digests[0]}, "
            f"recorded {record['sha256']}): delete that folder, then run: heads fetch {name}"
        )
    return {"revision": record["revision"], "sha256": record["sha256"]}
