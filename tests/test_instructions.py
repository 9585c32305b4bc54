"""The instruction suite: rules of the tests' own solve every task from its input alone; encodings, mixtures, splits, scores.

The rules share nothing with data/instructions.py, which made the texts: a task whose rule does not give its answers fails.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

import heads.model.zoo
from heads.tasks import Instance, Instruction, TaskSet, encode, macro, mixture, score
from heads.tasks.instructions import FIELDS, SPLITS, normalised, rouge_l

DATA = Path(__file__).resolve().parents[1] / "data"
TASKS = TaskSet.builtin()

# ------------------------------------------------------------------------------- what the rules know of words

KINDS = {
    "animal": "badger bear camel cat cow dog donkey fox frog goat horse lion mouse otter pig rabbit sheep snake tiger wolf",
    "fruit": "apple apricot banana berry cherry date fig grape guava kiwi lemon lime mango melon nectarine papaya peach pear "
             "plum raisin",
    "tool": "anvil axe chisel clamp crowbar drill hammer hoe hacksaw mallet pickaxe pliers rake screwdriver shovel sickle spade "
            "spanner trowel wrench",
    "clothing": "belt blouse boot cap coat dress glove gown hat jacket mitten sandal scarf shirt shoe skirt sock sweater "
                "trousers vest",
    "furniture": "armchair bed bench bookcase cabinet chair cot couch crib cupboard desk dresser footstool hammock shelf "
                 "sideboard sofa stool table wardrobe",
    "vehicle": "bicycle boat bus canoe car ferry jet lorry plane rocket scooter ship sled taxi train tram truck van wagon yacht",
    "body": "ankle arm back chin ear elbow eye finger foot hand head knee leg mouth neck nose shoulder toe tongue wrist",
    "colour": "beige black blue brown crimson gold green grey indigo maroon pink purple red scarlet silver teal turquoise "
              "violet white yellow",
}  # fmt: skip
KIND = {noun: kind for kind, nouns in KINDS.items() for noun in nouns.split()}
SAME = dict(pair.split("=") for pair in (
    "small=little great=huge thick=fat broad=wide lean=slim cool=chilly cold=freezing dark=dim pale=light glad=happy mad=angry "
    "jolly=cheerful merry=joyful kind=friendly brave=bold proud=boastful loud=noisy still=silent sleepy=drowsy shy=timid "
    "rude=impolite mean=nasty fast=quick swift=rapid clever=brainy wise=sensible smart=intelligent old=ancient young=youthful "
    "late=tardy fresh=recent short=brief rich=wealthy cheap=inexpensive easy=simple plain=unadorned odd=strange rare=uncommon "
    "strong=powerful tough=sturdy firm=solid rough=bumpy clean=spotless neat=tidy shiny=polished damp=moist wet=soaked "
    "safe=secure full=packed tight=snug sick=ill hungry=starving").split())  # fmt: skip
OPPOSITE = dict(pair.split("=") for pair in (
    "small=large great=tiny thick=thin broad=narrow lean=plump cool=warm cold=hot dark=sunny pale=vivid glad=sad mad=calm "
    "jolly=gloomy merry=miserable kind=cruel brave=cowardly proud=humble loud=quiet still=blaring sleepy=awake shy=outgoing "
    "rude=courteous mean=pleasant fast=slow swift=sluggish clever=stupid wise=foolish smart=dumb old=new young=elderly "
    "late=early fresh=stale short=lengthy rich=poor cheap=costly easy=difficult plain=fancy odd=normal rare=usual strong=weak "
    "tough=fragile firm=loose rough=smooth clean=dirty neat=messy shiny=tarnished damp=dry wet=arid safe=dangerous full=empty "
    "tight=baggy sick=healthy hungry=fed").split())  # fmt: skip
LIKED = set("amazing brilliant charming delightful excellent fabulous fantastic glorious great impressive lovely magnificent "
            "marvellous outstanding perfect pleasant splendid superb terrific wonderful".split())  # fmt: skip
DISLIKED = set("annoying appalling awful boring disappointing disgusting dismal dreadful ghastly hopeless horrible lousy "
               "miserable nasty poor rotten terrible ugly unpleasant useless".split())  # fmt: skip
STIFF = ("Dear ", "Good morning", "With all due", "Ladies and", "To whom", "I beg", "Esteemed")
LOOSE = ("Hey", "Yo,", "Hi guys", "Dude", "Omg", "Hiya", "Oi", "Sup", "Lol", "Wow")
IRREGULAR = dict(pair.split("=") for pair in (
    "bought=buy sold=sell found=find lost=lose saw=see made=make brought=bring sent=send kept=keep hid=hide drew=draw "
    "broke=break stole=steal chose=choose").split())  # fmt: skip
STORED = {"stored": "store"}  # the one regular verb here whose infinitive ends in -e
MONTHS = "January February March April May June July August September October November December".split()


def infinitive(past):
    if past in IRREGULAR | STORED:
        return (IRREGULAR | STORED)[past]
    stem = past.removesuffix("ed")
    assert stem != past, past
    return stem[:-1] + "y" if stem[-1] == "i" else stem[:-1] if stem[-1] == stem[-2] == "p" else stem


def ending(word, suffix):
    """A word with -ed, -ing or -er: silent e goes, y becomes i, the last of consonant, vowel, consonant is doubled."""
    if word[-1] == "e":
        return word[:-1] + suffix
    if re.search("[^aeiou]y$", word) and suffix != "ing":
        return word[:-1] + "i" + suffix
    return word + (word[-1] if re.fullmatch("[^aeiou]+[aeiou][^aeiouwxy]", word) else "") + suffix


def plural(word):
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|ch|sh)$", word) else "s")


# ------------------------------------------------------------------------------------- the rules, input -> output


def odd(x):
    kinds = Counter(KIND[w] for w in x.split())
    assert sorted(kinds.values()) == [1, len(x.split()) - 1] and len(x.split()) > 2
    return next(w for w in x.split() if kinds[KIND[w]] == 1), kinds.most_common(1)[0][0]


def longest(x):
    (found,) = [w for w in x.split() if all(len(w) > len(v) for v in x.split() if v != w)]
    return found


def choice(x, table):
    word, among = re.fullmatch(r"(\w+): (\w+, \w+, \w+)", x).groups()
    (found,) = [w for w in among.split(", ") if w == table[word]]
    return found


def remark(x):
    start, noun, mood, asks = re.fullmatch(r"(.+?) the (\w+) (?:is|are) (\w+)\. (Where|When|Who|How many) [^?]+\?", x).groups()
    assert start.startswith(STIFF) != start.startswith(LOOSE) and (mood in LIKED) != (mood in DISLIKED)
    return SimpleNamespace(tone="formal" if start.startswith(STIFF) else "casual",
                           mood="positive" if mood in LIKED else "negative",
                           topic="animal" if KIND[noun] == "animal" else "thing",
                           asks={"Where": "place", "When": "time", "Who": "person", "How many": "number"}[asks])  # fmt: skip


def report(x):
    form = r"(?P<who>[A-Z]\w+) (?P<did>\w+) (?P<n>\d+) (?P<what>\w+) in (?P<city>[A-Z]\w+)\."
    return SimpleNamespace(**re.fullmatch(form, x).groupdict())


def plan(x):
    return re.fullmatch(r"(\w+) will (.+) on (\w+day)\.", x).groups()


def expense(x):
    (who,), (n, what) = re.findall(r"(\w+) paid", x), re.search(r"paid (\d+) euros for (\w+)", x).groups()
    day, month, year = re.search(r"[Oo]n (\d+) (\w+) (\d{4})", x).groups()
    assert re.fullmatch(rf"{who} .* {year}\.|On .* {year} {who} .*\.", x)
    return SimpleNamespace(what=what, n=n, date=f"{day} {month} {year}", iso=f"{year}-{MONTHS.index(month) + 1:02}-{int(day):02}")


def note(x):
    """[(type, text)] in the order of the note."""
    kinds = {"PERSON": r"\bMrs? [A-Z]\w+", "DOSE": r"\d+ mg", "DATE": rf"\d+ (?:{'|'.join(MONTHS)})", "DRUG": r"\b[A-Z][a-z]{4,}"}
    pattern = "|".join(f"(?P<{kind}>{form})" for kind, form in kinds.items())
    return [(m.lastgroup, m.group()) for m in re.finditer(pattern, x)]


def typed(found):
    return ", ".join(f"{text} <{kind}>" for kind, text in found)


def passage(x):
    """(question word, what it names, the two facts, the place of the one that it is about or None)"""
    *facts, question = re.fullmatch(r"((?:\w+ ){3}\w+ with \d+ \w+\.) ((?:\w+ ){3}\w+ with \d+ \w+\.) (.+\?)", x).groups()
    facts = [re.fullmatch(r"(\w+) lives in (\w+) with (\d+) (\w+)\.", fact).groups() for fact in facts]
    for word, form, key in (("where", r"Where does (\w+) live\?", 0), ("who", r"Who lives in (\w+)\?", 1),
                            ("how many", r"How many \w+ does (\w+) have\?", 0),
                            ("whether", r"Does (\w+) live in \w+\?", 0)):  # fmt: skip
        if found := re.fullmatch(form, question):
            place = [i for i in (0, 1) if facts[i][key] == found[1]]
            return word, question, facts, place[0] if place else None
    raise AssertionError(x)


def answer(x, word, right=True):
    asked, question, facts, i = passage(x)
    assert asked == word and i is not None
    if word == "whether":
        return "yes" if question == f"Does {facts[i][0]} live in {facts[i][1]}?" else "no"
    return facts[i if right else 1 - i][{"where": 1, "who": 0, "how many": 2}[word]]


def options(x):
    asked, _, facts, i = passage(x)
    assert i is not None
    return " or ".join(fact[{"where": 1, "who": 0, "how many": 2}[asked]] for fact in facts)


def sides(x):
    left, right = x.split(" | ")
    return left.split(), right.split()


def once(x):
    words = x.split()
    (k,) = [i for i in range(1, len(words)) if words[i] == words[i - 1]]
    return " ".join(words[:k] + words[k + 1:])


def following(x):
    a, b, c = map(int, x.split())
    assert b - a == c - b > 0
    return str(c + c - b)


def ascending(x):
    return " ".join(sorted(x.split(), key=int))


def yes(truth):
    return "yes" if truth else "no"


def reworded(form):
    return lambda x: form.format(**vars(r := report(x)), base=infinitive(r.did))


def marked(form, between=" "):
    return lambda x: between.join(form.format(k, w) for k, w in enumerate(x.split(), 1))


RULES = {
    "select-first": lambda x: x.split()[0], "select-last": lambda x: x.split()[-1], "select-second": lambda x: x.split()[1],
    "select-longest": longest,
    "case-upper": str.upper, "case-lower": str.lower, "case-title": lambda x: " ".join(w.capitalize() for w in x.split()),
    "case-dash": lambda x: x.replace(" ", "-"),
    "lists-comma": marked("{1}", ", "), "lists-numbered": marked("{0}. {1}"), "lists-bullets": marked("* {1}"),
    "lists-semicolon": marked("{1}", "; "),
    "morphology-plural": plural, "morphology-past": lambda x: ending(x, "ed"), "morphology-ing": lambda x: ending(x, "ing"),
    "morphology-comparative": lambda x: ending(x.split(":")[0], "er"),
    "lexical-antonym": lambda x: choice(x, OPPOSITE), "lexical-synonym": lambda x: choice(x, SAME),
    "lexical-category": lambda x: odd(x)[1], "lexical-odd": lambda x: odd(x)[0],
    "classify-sentiment": lambda x: remark(x).mood, "classify-topic": lambda x: remark(x).topic,
    "classify-question": lambda x: remark(x).asks, "classify-formality": lambda x: remark(x).tone,
    "extract-person": lambda x: report(x).who, "extract-city": lambda x: report(x).city,
    "extract-object": lambda x: report(x).what, "extract-number": lambda x: report(x).n,
    "typed-person-city": reworded("{who} <PERSON>, {city} <CITY>"),
    "typed-date-amount": lambda x: f"{expense(x).date} <DATE>, {expense(x).n} euros <AMOUNT>",
    "typed-drug-dose": lambda x: typed((kind, dict(note(x))[kind]) for kind in ("DRUG", "DOSE")),
    "typed-all": lambda x: typed(note(x)),
    "qa-where": lambda x: answer(x, "where"), "qa-who": lambda x: answer(x, "who"),
    "qa-how-many": lambda x: answer(x, "how many"), "qa-yes-no": lambda x: answer(x, "whether"),
    "wrong-where": lambda x: answer(x, "where", False), "wrong-who": lambda x: answer(x, "who", False),
    "wrong-number": lambda x: answer(x, "how many", False), "wrong-options": options,
    "questions-where": reworded("Where did {who} {base} {n} {what}?"),
    "questions-who": reworded("Who {did} {n} {what} in {city}?"),
    "questions-how-many": reworded("How many {what} did {who} {base} in {city}?"),
    "questions-yes-no": lambda x: "Will {} {} on {}?".format(*plan(x)),
    "edit-negate": lambda x: "{} will not {} on {}.".format(*plan(x)), "edit-city": reworded("{who} {did} {n} {what} in Lima."),
    "edit-tense": reworded("{who} will {base} {n} {what} in {city}."), "edit-repeat": once,
    "verify-contained": lambda x: yes(sides(x)[0][0] in sides(x)[1]),
    "verify-same": lambda x: yes(Counter(sides(x)[0]) == Counter(sides(x)[1])),
    "verify-sorted": lambda x: yes(all(a < b for a, b in zip(sides(x)[0], sides(x)[0][1:]))),
    "verify-answerable": lambda x: yes(passage(x)[3] is not None),
    "number-largest": lambda x: max(x.split(), key=int), "number-words": lambda x: once(x) and str(len(x.split())),
    "number-next": following, "number-even": lambda x: "even" if x[-1] in "02468" else "odd",
    "order-swap": lambda x: " | ".join(reversed(x.split(" | "))), "order-alphabet": lambda x: " ".join(sorted(x.split())),
    "order-number": ascending, "order-rotate": lambda x: once(x) and re.sub(r"^(\w+) (.+)$", r"\2 \1", x),
    "records-action": lambda x: "{}: {} ({})".format(*plan(x)),
    "records-expense": lambda x: f"{expense(x).what}: {expense(x).n} euros",
    "records-iso": lambda x: expense(x).iso,
    "records-missing": lambda x: next((k for k in ("person", "drug", "dose", "date") if k.upper() not in dict(note(x))), "none"),
}  # fmt: skip


def solved(id, x):
    """What the rule of a task makes of an input; None where it is no input of that task."""
    try:
        return RULES[id](x)
    except (AssertionError, AttributeError, KeyError, ValueError, IndexError, StopIteration):
        return None


# --------------------------------------------------------------------------------------------------- the texts


def test_there_is_a_rule_for_every_task_and_nothing_else():
    assert set(RULES) == set(TASKS)


@pytest.mark.parametrize("id", TASKS)
def test_a_rule_solves_every_instance_and_example_and_no_negative_one(id):
    task = TASKS[id]
    given = [(x.input, *x.outputs) for split in SPLITS for x in task.instances[split]]
    given += [(e["input"], e["output"]) for e in task.positive]
    assert [row for row in given if (RULES[id](row[0]),) != row[1:]] == []
    for e in task.negative:
        right = RULES[id](e["input"])
        assert right != e["output"] and e["suggestion"].endswith(f": {right}")


def test_the_suite_is_as_large_as_the_datasheet_says():
    sheet = (DATA / "instructions.md").read_text(encoding="utf-8")
    assert len(TASKS) == 64 and set(Counter(t.category for t in TASKS.values()).values()) == {4}
    assert len({t.category for t in TASKS.values()}) == 16 and "64 tasks in 16 categories" in sheet
    for name, sources in Counter(t.source for t in TASKS.values()).items():
        assert sources >= 3 and f"| `{name}` | {sources} |" in sheet, name
    for t in TASKS.values():
        assert [len(t.instances[s]) for s in SPLITS] == [40, 10, 24] and len(t.positive) == 4 and len(t.negative) == 2
    for name, shown in re.findall(r"^\| `(\w+)` \| \d+ \| (.+) \|$", sheet, re.MULTILINE):
        inputs = {x.input for t in TASKS.where(source=name).values() for x in t.instances["test"]}
        assert shown.replace("\\|", "|") in inputs, name
    total = sum(len(found) for t in TASKS.values() for found in t.instances.values())
    assert f"{total} instances" in sheet and sum(p.stat().st_size for p in (DATA / "instructions").iterdir()) < 900_000
    probes = [id for id in TASKS if TASKS[id].probe]
    assert f"probes: {', '.join(f'`{id}`' for id in probes)}." in sheet


@pytest.mark.parametrize("id", TASKS)
def test_the_texts_of_a_task_are_fit_for_use(id):
    task = TASKS[id]
    assert id.startswith(f"{task.category}-")
    assert 1 <= len(re.findall(r"[.?](?= |$)", task.definition)) <= 4 and task.definition[-1] == "."
    assert task.prompt[-1] in ".?"
    texts = [task.definition, task.prompt, task.things_to_avoid, task.emphasis]
    texts += [text for e in (*task.positive, *task.negative) for text in e.values()]
    texts += [text for split in SPLITS for x in task.instances[split] for text in (x.input, *x.outputs)]
    assert all(text and text == text.strip() and text.isascii() and not re.search(r"\n|  ", text) for text in texts)
    assert not any(x.input in task.definition for x in task.instances["test"] if len(x.input) > 12), "no example in a definition"


@pytest.mark.parametrize("id", TASKS)
def test_labels_are_all_there_and_equally_often(id):
    task = TASKS[id]
    for split in SPLITS:
        counts = Counter(x.outputs[0] for x in task.instances[split])
        if task.labels:
            assert set(counts) == set(task.labels) and max(counts.values()) - min(counts.values()) <= 1
        else:
            assert max(counts.values()) <= len(task.instances[split]) / 2, "one answer would do"


# Words of the frames, which say nothing of an answer, and closed classes: months, days, question words, colons' words.
FRAME = set("the is are did it many lives in with live does have will on not paid euros for took of mg a drug was given some "
            "near under behind beside you it where when who how mr mrs".split()) | {m.lower() for m in MONTHS}  # fmt: skip
FRAME |= set("monday tuesday wednesday thursday friday saturday sunday".split())


@pytest.mark.parametrize("id", TASKS)
def test_splits_share_no_word_and_no_open_answer(id):
    task = TASKS[id]
    seen = {split: {w for x in task.instances[split] for w in re.findall("[a-z]+", x.input.lower())} - FRAME for split in SPLITS}
    seen["examples"] = {w for e in (*task.positive, *task.negative) for w in re.findall("[a-z]+", e["input"].lower())} - FRAME
    outputs = {split: {x.outputs[0] for x in task.instances[split]} for split in SPLITS}
    outputs["examples"] = {e["output"] for e in task.positive}
    inputs = [x.input for split in SPLITS for x in task.instances[split]]
    assert len(set(inputs)) == len(inputs)
    for one in seen:
        for other in seen:
            if one < other:
                assert seen[one] & seen[other] <= ALIKE.get(task.source, set())
                assert task.labels or not outputs[one] & outputs[other]


# Of several words, one may come again: "with all due respect" and "ladies and gentlemen" are cut as wholes, as are plans.
ALIKE = {"remark": {"dear"}, "plan": {"the"}}


# A question of yes or no fits one more task alone; of those that have no answer nothing else can be asked: see the datasheet.
ALONE = {"qa-yes-no", "verify-answerable"}


@pytest.mark.parametrize("source", dict.fromkeys(t.source for t in TASKS.values()))
def test_the_same_input_asks_for_different_outputs(source):
    """The inputs of a task are inputs of the other tasks of its source, too, and these give other answers."""
    ids = list(TASKS.where(source=source))
    for id in ids:
        inputs = [x.input for x in TASKS[id].instances["test"]]
        other = [[solved(i, x) for i in ids if i != id] for x in inputs]
        if id in ALONE:
            continue
        assert sum(any(o not in (None, RULES[id](x)) for o in row) for x, row in zip(inputs, other)) == len(inputs)
        assert np.mean([sum(o is not None for o in row) >= 2 for row in other]) >= 0.5, "two more tasks fit half of the inputs"


def test_the_script_makes_the_same_bytes():
    done = subprocess.run([sys.executable, str(DATA / "instructions.py"), "--check"], capture_output=True, text=True)
    assert not done.returncode and done.stdout == "same: 16 files\n", done.stdout + done.stderr


def test_the_script_refuses_a_pool_that_is_too_small():
    code = "import instructions as i; i.SIZES['val'] = 13; [i.draw(t, 'val', i.pools()['val']) for t in i.TASKS if t['id'] == '{}']"
    for id, found in (("morphology-past", 12), ("number-next", None)):
        done = subprocess.run([sys.executable, "-c", code.format(id)], capture_output=True, text=True, cwd=DATA)
        assert f"{id}, val: the pool is too small for 13 instances, only {found or ''}" in done.stderr


def test_answers_fit_their_limit_of_tokens():
    tokenizer = AutoTokenizer.from_pretrained(heads.models.fetch())
    for task in TASKS.values():
        texts = [f" {x.outputs[0]}\n" for split in SPLITS for x in task.instances[split]]
        assert max(map(len, tokenizer(texts).input_ids)) <= task.max_new_tokens, task.id


# ------------------------------------------------------------------------------------------------- encodings

TOY = Instruction("toy", "some", "words", "Say it again.", "Again?", None, "Only that.",
                  positive=({"input": "a", "output": "a", "reason": "Same."}, {"input": "b", "output": "b", "reason": "Same."}),
                  negative=({"input": "c", "output": "d", "reason": "Other.", "suggestion": "Write: c"},),
                  instances={"train": (Instance("e", ("e",)), Instance("f", ("f", "F")))})  # fmt: skip
X = Instance("owl", ("owl", "Owl"))
CHAT = SimpleNamespace(eos_token="<end>", apply_chat_template=lambda m, **_: f"<user>{m[0]['content']}<end>\n<bot>")
DEFINED = "Definition: Say it again.\n"


@pytest.mark.parametrize("style, fields, more, prefix, body, target", [
    ("ni", None, {}, DEFINED, "input: owl\noutput:", " owl\n"),
    ("ni", [], {}, "", "input: owl\noutput:", " owl\n"),
    ("ni", ["positive", "negative", "emphasis", "things_to_avoid", "prompt", "definition"], {"shots": 1},
     DEFINED + "Prompt: Again?\nEmphasis & Caution: Only that.\nNegative Example1-\ninput: c\noutput: d\nreason: Other.\n"
     "suggestion: Write: c\nPositive Example1-\ninput: a\noutput: a\nreason: Same.\n", "input: owl\noutput:", " owl\n"),
    ("ni", ["positive"], {"shots": 3, "reasons": False}, "input: a\noutput: a\ninput: b\noutput: b\ninput: e\noutput: e\n",
     "input: owl\noutput:", " owl\n"),
    ("ni", ["positive"], {"shots": 0}, "", "input: owl\noutput:", " owl\n"),
    ("box", ["definition", "positive"], {},
     "Instruction: Definition: Say it again., Positive Examples: [[input: a, output: a, explanation: Same.] "
     "[input: b, output: b, explanation: Same.]]; Instance:", " input: owl, output:", " owl\n"),
    ("chat", ["definition"], {"tokenizer": CHAT}, "<user>" + DEFINED, "owl<end>\n<bot>", "owl<end>"),
    ("none", None, {}, "", "input: owl\noutput:", " owl\n"),
    ("id", None, {}, "Task 1790\n", "input: owl\noutput:", " owl\n"),
])  # fmt: skip
def test_an_encoding_to_the_letter(style, fields, more, prefix, body, target):
    assert encode(TOY, X, fields, style, **more) == (prefix, body, target)
    assert encode(TOY, "owl", fields, style, **more) == (prefix, body, "")


def test_what_is_said_after_an_input_stands_next_to_the_answer():
    x = X._replace(after="Use capitals.")
    assert encode(TOY, x, style="chat", tokenizer=CHAT)[1] == "owl Use capitals.<end>\n<bot>"
    assert encode(TOY, x)[1] == "input: owl Use capitals.\noutput:"


def test_a_real_chat_template_is_put_together_again():
    tokenizer = AutoTokenizer.from_pretrained(heads.models.fetch())
    prefix, body, target = encode(TOY, X, style="chat", tokenizer=tokenizer)
    message = [{"role": "user", "content": DEFINED + "owl"}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert prefix + body == whole and target == "owl" + tokenizer.eos_token


@pytest.mark.parametrize("style", ["ni", "box", "chat", "none", "id"])
def test_the_parts_of_an_encoding_are_tokens_of_their_own(style):
    tokenizer = AutoTokenizer.from_pretrained(heads.models.fetch())
    fields = () if style in ("none", "id") else FIELDS
    for task in TASKS.values():
        for x in task.take("test", 2):
            parts = encode(task, x, fields, style, tokenizer=tokenizer)
            apart, whole = tokenizer([part for part in parts if part]).input_ids, tokenizer("".join(parts)).input_ids
            assert [i for part in apart for i in part] == whole, task.id


def test_the_numbers_of_tasks_say_nothing_and_differ():
    numbers = [encode(task, "x", style="id")[0] for task in TASKS.values()]
    assert len(set(numbers)) == 64 and all(re.fullmatch(r"Task \d{4}\n", n) for n in numbers) and numbers != sorted(numbers)


@pytest.mark.parametrize("id", TASKS)
def test_every_task_has_every_encoding(id):
    x = TASKS[id].take("test", 1)[0]
    prefix, body, target = encode(TASKS[id], x, FIELDS, shots=4)
    assert all(f"{name}: " in prefix for name in list(FIELDS.values())[:4]) and prefix.count("Example") == 6
    assert "\n" not in encode(TASKS[id], x, FIELDS, "box")[0] and target == f" {x.outputs[0]}\n" and x.input in body


# ---------------------------------------------------------------------------------------- sets and their splits


def test_a_split_of_tasks_keeps_each_once():
    for seen, unseen in (TASKS.random(12), TASKS.leave(category="qa"), TASKS.leave(source="words"), TASKS.leave(task="qa-where")):
        assert not seen.keys() & unseen.keys() and {**seen, **unseen} == TASKS and isinstance(unseen, TaskSet)
    assert list(TASKS.leave(task="qa-where")[1]) == ["qa-where"] and len(TASKS.leave(source="words")[1]) == 11
    assert {t.category for t in TASKS.leave(category="qa")[1].values()} == {"qa"}
    assert len(TASKS.where(source="passage", category="wrong")) == 4


def test_random_splits_are_spread_over_categories_and_subsets_are_nested():
    for seed in (0, 1):
        assert max(Counter(t.category for t in TASKS.random(16, seed)[1].values()).values()) == 1
        assert set(Counter(t.category for t in TASKS.subset(48, seed).values()).values()) == {3}
        orders = [list(TASKS.subset(n, seed)) for n in (1, 6, 22, 64)]
        assert all(large[: len(small)] == small for small, large in zip(orders, orders[1:]))
    assert list(TASKS.subset(6, 0)) != list(TASKS.subset(6, 1))
    assert len({id for seed in range(16) for id in TASKS.subset(16, seed)}) > 56, "any task of a category may be its first"


def test_fewer_instances_are_among_more():
    task = TASKS["qa-who"]
    assert task.take("train", 8, 3) == task.take("train", None, 3)[:8] != task.take("train", 8, 4)
    assert sorted(task.take("train")) == sorted(task.instances["train"])
    assert TASKS["verify-same"].commonest() == ("no", 0.5)


# ---------------------------------------------------------------------------------------------------- files

NI = {"input": "a b", "output": "a"}


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_natural_instructions_are_read(tmp_path, version):
    every = [{"input": f"x{i}", "output": [f"y{i}", "z"]} for i in range(260)]
    if version == 1:
        row = {"Title": "T", "Definition": "Do it.", "Prompt": "Now.", "Things to Avoid": "-", "Emphasis & Caution": "-",
               "Examples": {"Positive Examples": [{**NI, "reason": "r", "suggestion": "s"}], "Negative Examples": ["-"]},
               "Instances": every}  # fmt: skip
    else:
        row = {"Definition": ["Do it."], "Categories": ["Some"], "Source": ["one"],
               "Positive Examples": [{**NI, "explanation": "r"}], "Negative Examples": [], "Instances": every}  # fmt: skip
    (tmp_path / "task1_a.json").write_text(json.dumps(row), encoding="utf-8")
    (task,) = TaskSet.from_json(tmp_path).values()
    assert (task.id, task.definition, task.things_to_avoid, task.negative) == ("task1_a", "Do it.", None, ())
    assert (task.category, task.source) == (("none", "none") if version == 1 else ("Some", "one"))
    assert (task.prompt, task.positive[0]["reason"]) == ("Now." if version == 1 else None, "r")
    assert [x.input for x in task.instances["test"]] == [f"x{i}" for i in range(60, 260, 2)]
    assert len(task.instances["train"]) == 160
    assert task.instances["test"][0].outputs == ("y60", "z")
    assert encode(task, X, ["positive"], shots=1)[0].startswith("Positive Example1-\ninput: a b\noutput: a\nreason: r\n")


def test_a_folder_in_our_schema_is_read_as_the_suite_is():
    assert TaskSet.from_json(DATA / "instructions") == TASKS


ROW = {"id": "t", "category": "c", "source": "s", "definition": "Do.", "instances": {"train": [["a", "b"]]}}


@pytest.mark.parametrize("change, error, words", [
    ({"instances": {"test": [["a"]]}}, ValueError, "test instance 0 without output in x.jsonl, task 't'"),
    ({"instances": {"test": [["a", ""]]}}, ValueError, "test instance 0 without output"),
    ({"definition": ""}, ValueError, "no definition in x.jsonl, task 't'"), ({"id": None}, ValueError, "no id in x.jsonl"),
    ({"instances": {"tset": [["a", "b"]]}}, LookupError, "no split 'tset'. Did you mean 'test'"),
    ({"lables": ["a"]}, LookupError, "no field 'lables'. Did you mean 'labels'"),
    ({"metric": "bleu"}, LookupError, "no metric 'bleu'"),
])  # fmt: skip
def test_a_bad_file_is_refused_by_name(tmp_path, change, error, words):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW | change) + "\n", encoding="utf-8")
    with pytest.raises(error, match=words):
        TaskSet.from_json(tmp_path)


def test_files_without_tasks_or_with_one_twice_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .json or .jsonl file of tasks"):
        TaskSet.from_json(tmp_path)
    (tmp_path / "x.jsonl").write_text(2 * (json.dumps(ROW) + "\n"), encoding="utf-8")
    with pytest.raises(ValueError, match="task 't' stands there twice"):
        TaskSet.from_json(tmp_path)
    (tmp_path / "x.jsonl").unlink()
    row = {"Definition": "Do.", "Instances": [{"input": "a", "output": []}]}
    (tmp_path / "y.json").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match="test instance 0 without output in y.json, task 'y'"):
        TaskSet.from_json(tmp_path)


@pytest.mark.parametrize("call, error, words", [
    (lambda: TASKS["qa-were"], LookupError, "no task 'qa-were'. Did you mean 'qa-where'"),
    (lambda: TASKS.where(category="kase"), LookupError, "no category 'kase'. Did you mean 'case'"),
    (lambda: TASKS.where(source="word_"), LookupError, "no source 'word_'. Did you mean"),
    (lambda: TASKS.where(colour="red"), LookupError, "no tag 'colour'"),
    (lambda: TASKS.leave(), ValueError, "64 of 64 tasks held out"),
    (lambda: TASKS.leave(task="nonsense"), LookupError, "no task 'nonsense'"),
    (lambda: TASKS.without([]), ValueError, "0 of 64 tasks"),
    (lambda: TASKS.subset(65), ValueError, "65 tasks asked for, but there are 64"),
    (lambda: TASKS.subset(0), ValueError, "at least 1"), (lambda: TASKS.random(64), ValueError, "64 of 64"),
    (lambda: TASKS["qa-who"].take("tset"), LookupError, "no split 'tset'"),
    (lambda: TASKS["qa-who"].take("val", 11), ValueError, "11 val instances of qa-who asked for, but there are 10"),
    (lambda: TASKS["qa-who"].take("val", 1.5), TypeError, "whole number"),
    (lambda: encode(TOY, X, style="nl"), LookupError, "no style 'nl'"),
    (lambda: encode(TOY, X, ["definitions"]), LookupError, "no field 'definitions'. Did you mean 'definition'"),
    (lambda: encode(TOY, X, ["prompt"], "id"), ValueError, "style 'id' has no fields, not prompt"),
    (lambda: encode(TOY, X, ["positive"], shots=5), ValueError, "5 shots of toy asked for, but there are 4"),
    (lambda: encode(TOY, X, shots=-1), ValueError, "shots is at least 0"),
    (lambda: encode(TOY, X, style="chat"), TypeError, "tokenizer"),
    (lambda: mixture([]), ValueError, "at least one part"), (lambda: mixture([([], 2)]), ValueError, "at least one task"),
    (lambda: mixture([([TOY], 3)]), ValueError, "3 train instances of toy asked for, but there are 2"),
    (lambda: mixture([([TOY], 2)], "mixed"), LookupError, "no mode 'mixed'"),
    (lambda: mixture([([TOY], 2)], steps=0), ValueError, "steps is at least 1"),
    (lambda: mixture([([TOY], 2)], groups=0), ValueError, "groups is at least 1"),
    (lambda: score(["a"], [X], "bleu"), LookupError, "no metric 'bleu'"),
    (lambda: score(["a"], [X, X]), ValueError, "1 predictions for 2"),
    (lambda: score(["a"], [Instance("b")]), ValueError, "with outputs"),
    (lambda: macro({}), ValueError, "at least one instance"), (lambda: macro({"a": []}), ValueError, "at least one instance"),
    (lambda: macro({"a": [1]}, level=2), ValueError, "level"), (lambda: macro({"a": [1]}, draws=0), ValueError, "draws"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


# -------------------------------------------------------------------------------------------------- mixtures


def rows(steps):
    return [(group.task.id, x.input) for step in steps for group in step for x in group.instances]


def test_a_mixture_holds_every_row_once_in_steps_of_one_size():
    steps = mixture([(TASKS.subset(22).values(), 12)])
    assert [len(step) for step in steps] == [8] * 16 + [4] and {len(g.instances) for step in steps for g in step} == {2}
    assert len(set(rows(steps))) == len(rows(steps)) == 22 * 12
    assert Counter(id for id, _ in rows(steps)) == dict.fromkeys(TASKS.subset(22), 12)
    assert all(g.task.instances["train"].count(x) == 1 for step in steps for g in step for x in g.instances)
    same, other = (rows(mixture([(TASKS.subset(22).values(), 12)], seed=seed)) for seed in (0, 1))
    assert rows(steps) == same != other
    assert len({id for id, _ in rows(steps[:3])}) > 12, "no task is trained at one end only"


def test_arms_have_what_they_share_in_the_same_order():
    large, small = (rows(mixture([(TASKS.subset(n).values(), 12)])) for n in (22, 6))
    assert [row for row in large if row[0] in TASKS.subset(6)] == small
    general, special = TASKS.leave(category="qa")
    both = rows(mixture([(general.values(), 8), (special.values(), 4)]))
    assert [row for row in both if row[0] in special] == rows(mixture([(special.values(), 4)]))
    assert [row for row in both if row[0] in general] == rows(mixture([(general.values(), 8)]))
    assert {row[0] for row in both[-len(both) // 2 :]} >= set(special), "the few rows of a part are spread over all steps"


def test_every_round_has_an_order_of_its_own():
    order = [group.task.id for step in mixture([(TASKS.subset(22).values(), 4)]) for group in step]
    assert set(order[:22]) == set(order[22:]) and order[:22] != order[22:]


def test_equal_steps_repeat_or_cut():
    few, many = mixture([(TASKS.subset(2).values(), 4)], steps=5), mixture([(TASKS.values(), 12)], steps=5)
    assert [len(step) for step in few] == [len(step) for step in many] == [8] * 5
    assert rows(few)[:8] == rows(few)[8:16] and rows(many) == rows(mixture([(TASKS.values(), 12)]))[: 5 * 16]


def test_balanced_steps_hold_as_much_of_each_part():
    general, special = TASKS.leave(category="qa")
    steps = mixture([(general.values(), 4), (special.values(), 2)], "balanced")
    assert all(sum(group.part for group in step) == len(step) / 2 for step in steps)
    assert len(rows(steps)) == 2 * 60 * 4 and {g.task.category for step in steps for g in step if g.part} == {"qa"}


def test_sequential_parts_end_before_the_next():
    general, special = TASKS.leave(category="qa")
    steps = mixture([(general.values(), 4), (special.values(), 4)], "sequential")
    parts = [group.part for step in steps for group in step]
    assert parts == sorted(parts) and all(len({g.part for g in step}) == 1 for step in steps)
    assert rows(steps) == rows(mixture([(general.values(), 4)])) + rows(mixture([(special.values(), 4)]))
    steps = mixture([(general.values(), 4), (special.values(), 4)], "sequential", steps=3)
    assert [step[0].part for step in steps] == [0] * 3 + [1] * 3


# ---------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("said, outputs, expected", [
    ("the cat sat", ["the cat sat"], 1), ("CAT, the!", ["cat the"], 1), ("dogs running", ["dog run"], 1),  # stems, small letters
    ("a b c d", ["a x c"], 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)), ("c b a", ["a b c"], 1 / 3), ("", ["a"], 0), ("x", ["a"], 0),
    ("a b", ["c", "a", "a b c"], 0.8),
])  # fmt: skip
def test_rouge_l_by_hand(said, outputs, expected):
    assert rouge_l(said, outputs) == pytest.approx(expected)
    assert score([said], [Instance("?", tuple(outputs))])[0] == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence_of_words():
    """On words that are their own stems, against the textbook's table."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (list(map(str, rng.integers(1, 5, rng.integers(1, 9)))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in np.ndindex(len(a), len(b)):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(2 * table[-1, -1] / (len(a) + len(b)))


@pytest.mark.parametrize("said, outputs, em, raw", [
    ("The Owl!", ["owl"], 1, 0), (" owl\n", ["owl"], 1, 1), ("an owl", ["the  owl"], 1, 0), ("owls", ["owl"], 0, 0),
    ("theory", ["ory"], 0, 0), ("b", ["a", "b"], 1, 1), ("STRONG", ["strong"], 1, 0), ("a-b", ["ab"], 1, 0),
])  # fmt: skip
def test_exact_match_by_hand(said, outputs, em, raw):
    x = Instance("?", tuple(outputs))
    assert score([said], [x], "em").tolist() == [em] and score([said], [x], "raw").tolist() == [raw]


def test_normalised_text():
    assert normalised("  The 2 'Owls', an end_of_it. ") == "2 owls endofit"


@pytest.mark.parametrize("id", TASKS)
def test_right_answers_score_one_and_wrong_ones_less_in_the_metric_of_the_task(id):
    task = TASKS[id]
    right = score([x.outputs[0] for x in task.take("test")], task.take("test"), task.metric)
    assert right.tolist() == [1.0] * 24
    negative = task.negative[0]
    assert score([negative["output"]], [Instance(negative["input"], (RULES[id](negative["input"]),))], task.metric)[0] < 1


def test_a_mean_over_tasks_counts_each_task_once():
    mean, low, high = macro({"a": [1.0] * 30, "b": [0.0]})
    assert mean == 0.5 and (low, high) == (0, 1)
    assert macro({"a": [0.25], "b": [0.25, 0.25]}) == (0.25, 0.25, 0.25)
    assert macro({"a": np.array([1.0, 0, 1]) - np.array([1.0, 0, 1])}) == (0, 0, 0)


def test_the_bootstrap_has_the_spread_of_both_draws():
    """Its variance is that of task means over tasks, and that of instances within tasks over all."""
    rng = np.random.default_rng(1)
    scores = {str(t): rng.random(12) + t / 8 for t in range(16)}
    means = np.array([row.mean() for row in scores.values()])
    within = np.mean([row.var() / 12 for row in scores.values()])
    _, low, high = macro(scores, draws=4000)
    assert (high - low) / 3.92 == pytest.approx(np.sqrt((means.var() + within) / 16), rel=0.06)
    even = macro({str(t): [0, 1] * 6 for t in range(16)}, draws=4000)
    assert (even[2] - even[1]) / 3.92 == pytest.approx(np.sqrt(0.25 / 12 / 16), rel=0.1)
    assert macro(scores, seed=3) == macro(scores, seed=3) != macro(scores, seed=4)


def test_a_task_of_ones_own_joins_the_suite():
    more = TaskSet([*TASKS.values(), replace(TOY, id="own")])
    assert len(more) == 65 and more["own"].definition == TOY.definition
    assert "own" in {g.task.id for step in mixture([(more.values(), 2)]) for g in step}
