"""The data files: well formed, consistent with each other, and fit for what they are used for."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

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
        prefixes = {re.fullmatch(r"([A-Z]+)\d+", i).group(1) for i in ids}
        assert len(prefixes) == 1, p["slug"]
        assert ids == [f"{min(prefixes)}{n}" for n in range(1, len(ids) + 1)], p["slug"]
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
