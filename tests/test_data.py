"""The data files: well formed, consistent with each other, and fit for what they are used for."""

import hashlib
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from heads.model.zoo import home

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"

PAPER_KEYS = ["slug", "number", "part", "title", "authors", "year", "arxiv", "venue", "question", "state", "claims"]
CLAIM_KEYS = ["id", "text", "paper", "where", "holds"]
# Words that an answer may share with its question or stem without giving itself away.
SMALL_WORDS = set("a an the of to in on at by with from for under over behind beside near into out about after".split())


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def strings(node):
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)


@pytest.fixture(scope="module")
def catalogue():
    return yaml.safe_load((DATA / "papers.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def papers(catalogue):
    return catalogue["papers"]


@pytest.fixture(scope="module")
def needles():
    lines = (DATA / "needles.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def facts():
    return json.loads((DATA / "facts.json").read_text(encoding="ascii"))


# ---------------------------------------------------------------- papers.yaml

def test_every_paper_of_the_course_is_listed_once_and_in_order(catalogue, papers):
    assert len(papers) >= 34
    numbers = [p["number"] for p in papers]
    assert numbers == sorted(set(numbers))
    for key in ("slug", "title", "arxiv"):
        assert max(Counter(p[key] for p in papers if p[key]).values()) == 1, key
    parts = catalogue["parts"]
    assert list(parts) == list(range(1, len(parts) + 1))
    for part in parts:  # 11, 12, 13, ... without a gap
        inside = [p["number"] for p in papers if p["part"] == part]
        assert inside == list(range(10 * part + 1, 10 * part + 1 + len(inside))) and inside


def test_papers_have_every_field_in_the_documented_form(papers):
    for p in papers:
        assert list(p) == PAPER_KEYS, p["slug"]
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", p["slug"])
        assert p["number"] // 10 == p["part"]
        assert p["authors"] and all(isinstance(a, str) and a for a in p["authors"]), p["slug"]
        assert p["arxiv"] is None or re.fullmatch(r"\d{4}\.\d{5}", p["arxiv"]), p["slug"]
        assert p["arxiv"] is None or p["year"] == 2000 + int(p["arxiv"][:2]), p["slug"]
        assert p["venue"] is None or p["venue"]
        assert p["question"].endswith("?"), p["slug"]
        assert p["state"] in ("ready", "planned")


def test_claims_have_every_field_in_the_documented_form(papers):
    for p in papers:
        ids = [c["id"] for c in p["claims"]]
        assert ids, p["slug"]
        found = [re.fullmatch(r"([A-Z]+)(\d+)([a-z]?)", i).groups() for i in ids]  # C1, C1t, C1v: one claim on several data
        assert len({prefix for prefix, _, _ in found}) == 1 and len(set(ids)) == len(ids), p["slug"]
        numbers = [int(n) for _, n, _ in found]
        assert numbers == sorted(numbers) and set(numbers) == set(range(1, numbers[-1] + 1)), p["slug"]
        for c in p["claims"]:
            where = (p["slug"], c["id"])
            assert list(c) == CLAIM_KEYS, where
            assert c["text"].endswith(".") and isinstance(c["paper"], str) and c["paper"], where
            assert c["where"] is None or c["where"], where
            assert c["holds"] is None or c["holds"], where


def test_every_string_stays_on_one_line(catalogue):
    for text in strings(catalogue):
        assert text == text.strip() and "\n" not in text and "  " not in text, text


def test_ready_papers_say_when_each_claim_holds(papers):
    for p in papers:
        if p["state"] == "ready":
            assert all(c["holds"] for c in p["claims"]), p["slug"]


def test_notebooks_and_catalogue_agree(papers):
    expected = {f"{p['number']}_{p['slug'].replace('-', '_')}.ipynb": p for p in papers}
    found = {path.name for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert found <= set(expected), "a notebook without an entry in data/papers.yaml"
    assert {name for name, p in expected.items() if p["state"] == "ready"} == found


# ---------------------------------------------------------------- needles.jsonl

def test_needles_are_balanced_and_unique(needles):
    assert len(needles) >= 24
    sets = Counter(n["set"] for n in needles)
    assert set(sets) == {"detect", "evaluate"} and sets["detect"] == sets["evaluate"]
    for key in ("id", "needle", "stem", "answer", "question"):
        assert len({n[key] for n in needles}) == len(needles), key
    # A greedy first word never decides between two needles.
    assert len({words(n["answer"])[0] for n in needles}) == len(needles)


def test_a_needle_is_its_stem_and_its_answer(needles):
    for n in needles:
        assert list(n) == ["id", "set", "needle", "stem", "answer", "question"]
        assert n["needle"] == f"{n['stem']} {n['answer']}."
        assert n["question"].endswith("?") and n["question"].count("?") == 1


def test_answers_are_short_plain_and_without_repetition(needles):
    for n in needles:
        tokens = n["answer"].split(" ")
        assert 5 <= len(tokens) <= 9, n["id"]
        assert all(re.fullmatch(r"[a-z]+", t) for t in tokens), n["id"]
        assert len(set(tokens)) == len(tokens), n["id"]


def test_answers_cannot_be_read_off_the_question(needles):
    for n in needles:
        given = set(words(n["question"]) + words(n["stem"])) - SMALL_WORDS
        assert not given & set(words(n["answer"])), n["id"]


def names(needle):
    """Capitalised words that stand in the stem and in the question (so not the opening word of either)."""
    return {w for w in re.findall(r"[A-Z][a-z]+", needle["stem"])} & {
        w for w in re.findall(r"[A-Z][a-z]+", needle["question"])}


def test_no_two_needles_share_a_name(needles):
    seen = Counter(name for n in needles for name in names(n))
    assert all(names(n) for n in needles)
    assert [name for name, count in seen.items() if count > 1] == []


# ---------------------------------------------------------------- facts.json

def test_facts_are_large_enough_and_distinct(facts):
    assert list(facts) == ["people", "attributes"]
    assert len(facts["people"]) >= 40 and len(set(facts["people"])) == len(facts["people"])
    assert all(re.fullmatch(r"[A-Z][a-z]+", name) for name in facts["people"])
    assert len(facts["attributes"]) >= 8
    for key in ("name", "sentence", "question", "stem"):
        assert len({a[key] for a in facts["attributes"]}) == len(facts["attributes"]), key
    # No word stands in two values: token F1 between two different values is 0.
    counts = Counter(w for a in facts["attributes"] for v in a["values"] for w in v.split())
    assert [w for w, n in counts.items() if n > 1] == []


def test_fact_templates_fit_their_values(facts):
    for a in facts["attributes"]:
        assert list(a) == ["name", "sentence", "question", "stem", "values"]
        assert a["sentence"] == a["stem"] + " {value}."
        assert a["stem"].count("{person}") == a["question"].count("{person}") == 1
        assert a["question"].endswith("?") and "{value}" not in a["question"]
        assert len(a["values"]) >= 16
        for value in a["values"]:
            assert re.fullmatch(r"[a-z]+( [a-z]+){0,2}", value), value
            # Grammar: "a" needs a consonant after it, and no template asks for "an".
            assert not (a["stem"].endswith(" a") and value[0] in "aeiou"), value
        assert not a["stem"].endswith(" an")


def test_templates_do_not_contain_values(facts):
    values = {w for a in facts["attributes"] for v in a["values"] for w in v.split()}
    for a in facts["attributes"]:
        text = a["stem"].replace("{person}", "") + " " + a["question"].replace("{person}", "")
        assert not values & set(words(text)), a["name"]


def test_people_are_not_in_the_needles(facts, needles):
    assert not set(facts["people"]) & {name for n in needles for name in names(n)}

# ---------------------------------------------------------------- words.jsonl

@pytest.fixture(scope="module")
def word_rows():
    lines = (DATA / "words.jsonl").read_text(encoding="ascii").splitlines()
    return {row["task"]: row for row in map(json.loads, lines)}


def test_word_tasks_are_well_formed(word_rows):
    assert len(word_rows) >= 15
    for name, row in word_rows.items():
        assert list(row) == ["task", "family", "instruction", "pairs"] and re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
        assert re.fullmatch(r"[A-Z][^.]*\.", row["instruction"]), name
        assert len(row["pairs"]) >= 30, name
        questions = [x for x, _ in row["pairs"]]
        assert len(set(questions)) == len(questions), name
        assert all(word.isalpha() for pair in row["pairs"] for word in pair), name
        assert all(x != y for x, y in row["pairs"]), name


def test_word_tasks_and_their_datasheet_agree(word_rows):
    sheet = (DATA / "words.md").read_text(encoding="utf-8")
    assert f"{len(word_rows)} tasks" in sheet and f"{sum(len(r['pairs']) for r in word_rows.values())} pairs" in sheet
    for name, row in word_rows.items():
        answers = {y for _, y in row["pairs"]}
        assert f"| `{name}` | {row['family']} | {len(row['pairs'])} | {len(answers)} |" in sheet


@pytest.mark.parametrize("name", ["capitals", "country-adjective", "antonyms", "opposite-gender", "past-tense", "plurals",
                                  "comparatives", "superlatives", "adverbs", "agents", "capitalise", "lowercase",
                                  "element-symbols"])  # fmt: skip
def test_one_answer_belongs_to_one_question(word_rows, name):
    counts = Counter(y for _, y in word_rows[name]["pairs"])
    assert [y for y, k in counts.items() if k > 1] == []


def test_opposites_use_no_word_twice(word_rows):
    for name in ("antonyms", "opposite-gender"):
        counts = Counter(word for pair in word_rows[name]["pairs"] for word in pair)
        assert [word for word, k in counts.items() if k > 1] == []


def test_regular_forms_are_regular(word_rows):
    pairs = {name: row["pairs"] for name, row in word_rows.items()}
    assert all(y.endswith("ing") and y[0] == x[0] for x, y in pairs["present-participle"])
    assert all(y.endswith("s") and y[:2] == x[:2] for x, y in pairs["third-person"])
    irregular = [x for x, y in pairs["comparatives"] if not y.endswith("er") or y[:2] != x[:2]]
    assert irregular == ["good", "bad"]
    assert [x for x, y in pairs["superlatives"] if not y.endswith("est") or y[:2] != x[:2]] == ["good", "bad"]
    assert [x for x, y in pairs["adverbs"] if not y.endswith("ly") or y[:2] != x[:2]] == ["good"]
    assert all(y[-2:] in ("er", "or") and y[:2] == x[:2] for x, y in pairs["agents"])
    assert all(y == x.capitalize() for x, y in pairs["capitalise"]) and all(y == x.lower() for x, y in pairs["lowercase"])
    assert all(y == x[0] for x, y in pairs["first-letter"])


def test_countries_say_the_same_in_every_task(word_rows):
    """Language and adjective agree where the language has the country's adjective as its name."""
    language, adjective = dict(word_rows["country-language"]["pairs"]), dict(word_rows["country-adjective"]["pairs"])
    languages = set(language.values())
    wrong = {c for c in language.keys() & adjective.keys() if adjective[c] in languages and language[c] != adjective[c]}
    assert wrong == set()


# ---------------------------------------------------------------- extracts of public data (data/build.py)

BUILT = home() / "data"  # of those that are too large for the checkout; they are tested where a reader built them
SHEETS = {"ontologies": "ontologies.md", "labels": "labels.md", "esco.jsonl": "esco.md"}
LICENCES = {"ontologies/schema.jsonl": "CC BY-SA 3.0", "ontologies/edam.jsonl": "CC BY-SA 4.0", "labels/schema.jsonl": "CC BY-SA 3.0",
            "labels/tool.jsonl": "CC BY-SA 4.0", "labels/colour.jsonl": "CC0 1.0", "labels/continent.jsonl": "public domain",
            "ontologies/cell.jsonl": "CC BY 4.0", "labels/cell.jsonl": "CC BY 4.0", "labels/disease.jsonl": "CC BY 4.0",
            "labels/emoji.jsonl": "Unicode-3.0", "labels/sector.jsonl": "public domain", "esco.jsonl": "2011/833/EU"}  # fmt: skip
SUMS = dict(reversed(line.split("  ")) for line in (DATA / "extracts.sha256").read_text(encoding="ascii").splitlines())
GRAPHS = ["ontologies/schema.jsonl", "ontologies/edam.jsonl", "ontologies/cell.jsonl"]
LABELS = sorted(path for path in SUMS if path.startswith("labels/"))


def sheet(path):
    return (DATA / SHEETS[path.split("/")[0]]).read_text(encoding="utf-8")


def extract(path):
    file = DATA / path if path in LICENCES else BUILT / path
    if path not in LICENCES and not file.exists():
        pytest.skip(f"{path} is not built here: python data/build.py")
    return file.read_bytes()


def extract_rows(path):
    return [json.loads(line) for line in extract(path).decode("utf-8").splitlines()]


def test_every_extract_that_is_here_has_a_licence():
    here = {str(file.relative_to(DATA).as_posix()) for folder in ("ontologies", "labels") for file in (DATA / folder).iterdir()}
    here |= {path for path in SUMS if "/" not in path}
    assert here == set(LICENCES) and here < set(SUMS) and all((DATA / path).exists() for path in here)
    assert sum((DATA / path).stat().st_size for path in here) < 1_500_000


@pytest.mark.parametrize("path", sorted(SUMS))
def test_an_extract_is_what_the_script_made(path):
    assert hashlib.sha256(extract(path)).hexdigest() == SUMS[path], "python data/build.py makes it again"


@pytest.mark.parametrize("path", sorted(SUMS))
def test_an_extract_is_plain_text(path):
    text = extract(path).decode("utf-8")
    assert text.endswith("}\n") and "\r" not in text and text == unicodedata.normalize("NFC", text)
    for string in strings([json.loads(line) for line in text.splitlines()]):
        assert string == string.strip() and "  " not in string and not re.search(r"[\x00-\x1f\x7f\xa0]|</?[a-z]+>|\[\[", string), string


@pytest.mark.parametrize("path", sorted(LICENCES))
def test_a_datasheet_names_the_licence_of_each_file(path):
    if path == "esco.jsonl":
        said = sheet(path)
        assert LICENCES[path] in said and "This publication uses the ESCO classification of the European Commission" in said
        return
    (row,) = [line for line in sheet(path).split("**Licences.**")[1].splitlines() if line.startswith(f"| `{path}`")]
    assert LICENCES[path] in row and re.search(r"package `[\w-]+` [\d.]+|`matplotlib` [\d.]+", row)


@pytest.mark.parametrize("path", GRAPHS)
def test_ontologies_are_graphs_without_a_circle(path):
    rows = extract_rows(path)
    parents = {row["id"]: row["parents"] for row in rows}
    assert [row["id"] for row in rows] == sorted(parents), "sorted, and no id twice"
    for row in rows:
        assert list(row) == ["id", "name", "parents"] and row["name"] and len(row["name"]) <= 120, row
        assert "_" not in row["name"] and not row["name"].lower().startswith("obsolete"), row
        assert set(row["parents"]) <= set(parents) - {row["id"]} and row["parents"] == sorted(set(row["parents"])), row
    assert len(list(TopologicalSorter(parents).static_order())) == len(rows)


@pytest.mark.parametrize("path", GRAPHS)
def test_ontologies_and_their_datasheet_agree(path):
    rows = extract_rows(path)
    twice = sum(count > 1 for count in Counter(row["name"] for row in rows).values())
    several, roots = (sum(test(len(row["parents"])) for row in rows) for test in (lambda k: k > 1, lambda k: k == 0))
    found = f"| {len(rows)} | {sum(len(row['parents']) for row in rows)} | {roots} | {several} | {twice} |"
    assert [line for line in sheet(path).splitlines() if line.startswith(f"| `{path}`") and line.endswith(found)]


def test_known_pairs_are_there():
    names = {row["id"]: row["name"] for row in extract_rows("ontologies/schema.jsonl")}
    pairs = {(row["name"], names[p]) for row in extract_rows("ontologies/schema.jsonl") for p in row["parents"]}
    assert {("zoo", "civic structure"), ("bed and breakfast", "lodging business"), ("AM radio channel", "radio channel"),
            ("local business", "place"), ("local business", "organization")} <= pairs  # fmt: skip
    assert ("civic structure", "zoo") not in pairs and names["Thing"] == "thing"


@pytest.mark.parametrize("path", LABELS)
def test_label_tasks_are_well_formed(path):
    rows, task = extract_rows(path), Path(path).stem
    assert all(list(row) == ["task", "text", "label"] and row["task"] == task for row in rows)
    keys = [(row["label"], row["text"]) for row in rows]
    assert keys == sorted(keys)
    assert len({row["text"].lower() for row in rows}) == len(rows), "a text has one label, whatever its capitals"
    assert all(re.search("[a-z]", row["text"]) or row["text"].isascii() for row in rows)
    assert all(1 <= len(row["text"]) <= 114 and re.fullmatch("[A-Za-z]+", row["label"]) for row in rows)
    sizes = Counter(row["label"] for row in rows)
    assert len(rows) >= 400 and min(sizes.values()) >= 20 and len(sizes) >= 4


def gives_away(text, label):
    """The datasheet's sentence on class names in a text, written a second time."""
    beginning = re.escape(label if len(label) <= 4 else label[: max(4, len(label) - 3)])
    return re.search(rf"(?<![a-z]){beginning}" + (r"s?(?![a-z])" if len(label) <= 4 else ""), text, re.IGNORECASE) is not None


@pytest.mark.parametrize("path", LABELS)
def test_label_tasks_and_their_datasheet_agree(path):
    rows = extract_rows(path)
    sizes = Counter(row["label"] for row in rows).values()
    given = sum(gives_away(row["text"], row["label"]) for row in rows)
    found = f"| `{Path(path).stem}` | {len(rows)} | {len(sizes)} | " \
            f"{min(sizes)} to {max(sizes)} | {given} ({100 * given / len(rows):.0f} %) |"  # fmt: skip
    assert found in sheet(path)


def test_the_datasheet_adds_up():
    texts = [int(count) for count in re.findall(r"^\| `\w+` \| (\d+) \| \d+ \|", sheet("labels"), re.MULTILINE)]
    assert len(texts) == 8 and f"{sum(texts)} texts in all." in sheet("labels")


def test_texts_have_the_label_that_everyone_would_give():
    labels = {path: {row["text"]: row["label"] for row in extract_rows(path)} for path in LABELS}
    assert labels["labels/continent.jsonl"]["Paris"] == "Europe" and labels["labels/continent.jsonl"]["Dar es Salaam"] == "Africa"
    assert labels["labels/colour.jsonl"]["tangerine"] == "orange" and labels["labels/colour.jsonl"]["navy"] == "blue"
    assert labels["labels/schema.jsonl"]["borrow"] == "action" and labels["labels/schema.jsonl"]["tattoo parlor"] == "business"
    assert labels["labels/tool.jsonl"]["Physics"] == "topic" and labels["labels/tool.jsonl"]["SQL"] == "format"


def test_esco_is_a_graph_of_two_kinds():
    rows = extract_rows("esco.jsonl")
    jobs, skills = ([row for row in rows if row["kind"] == kind] for kind in ("occupation", "skill"))
    names = [row["name"] for row in skills]
    assert len(jobs) + len(skills) == len(rows) and len(set(names)) == len(names)
    assert all(row["skills"] and set(row["skills"]) <= set(names) and len(set(row["skills"])) == len(row["skills"]) for row in jobs)
    for row in rows:
        own = [alias.lower() for alias in row["aliases"]]
        assert row["name"].lower() not in own and len(set(own)) == len(own) and all(own), row["name"]
    said = sheet("esco.jsonl")
    assert f"{len(jobs)} occupations and {len(skills)} skills" in said
    assert f"{sum(len(j['aliases']) for j in jobs)} of occupations, {sum(len(s['aliases']) for s in skills)} of skills" in said
    assert f"{sum(len(j['skills']) for j in jobs)} relations" in said and f"of {sum(bool(s['description']) for s in skills)} skills" in said


@pytest.mark.skipif("HEADS_WHEELS" not in os.environ, reason="HEADS_WHEELS names no folder with the packages that data/build.py reads")
def test_the_script_makes_the_same_bytes():
    command = [sys.executable, str(DATA / "build.py"), "--check", "--wheels", os.environ["HEADS_WHEELS"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode and "same: " in done.stdout, done.stdout + done.stderr
