"""Builds the instruction suite: 64 tasks in 16 categories, the same bytes every time.

    python data/instructions.py           write data/instructions/<category>.jsonl
    python data/instructions.py --check   write nothing; exit 1 if a file differs

A task is an answer to one kind of input (its *source*), and every source has at least three tasks, so that the input alone
does not say what to do. Words are cut into the pools of four splits once; the instances of a split are drawn from its own.
Nothing is imported from `heads`; tests/test_instructions.py solves every task by rules that know nothing of this file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "instructions"
SEED = 0
SIZES = {"train": 40, "val": 10, "test": 24, "example": 6}  # the last are the positive and negative examples
POSITIVE = 4
CITY = "Lima"  # what "swap the city" writes: no pool holds it
Parts = dict[str, Any]

# ---------------------------------------------------------------------------------------------------- pools

KINDS = {
    "animal": "cat dog horse cow sheep goat pig rabbit mouse fox wolf bear lion tiger camel donkey frog snake otter badger",
    "fruit": "apple pear plum peach cherry lemon lime grape mango melon banana fig date kiwi apricot papaya berry raisin "
             "guava nectarine",
    "tool": "hammer hacksaw drill axe wrench chisel shovel rake pliers spanner screwdriver hoe pickaxe trowel sickle crowbar "
            "mallet clamp anvil spade",
    "clothing": "shirt coat hat glove sock shoe boot scarf dress skirt jacket sweater belt trousers vest cap blouse gown "
                "mitten sandal",
    "furniture": "chair table bed sofa desk shelf stool bench cabinet wardrobe couch dresser cupboard bookcase armchair crib "
                 "cot hammock sideboard footstool",
    "vehicle": "car bus truck train tram taxi van bicycle boat ship ferry plane jet rocket canoe sled wagon scooter lorry yacht",
    "body": "arm leg hand foot head nose ear eye mouth knee elbow finger toe neck back chin shoulder wrist ankle tongue",
    "colour": "red blue green yellow black white brown purple grey pink gold silver violet crimson beige turquoise maroon teal "
              "indigo scarlet",
}  # fmt: skip
WORDS = {
    "verbnoun": "walk talk call help cook look jump play work paint plant rest smile cry try dance plan drop stop step trip hug "
                "wish kiss touch watch match laugh kick push pull cough sneeze shout scream whisper climb guess search answer "
                "question order visit cover crash drift farm film fix float frown gain glance grip "
                "guard hope joke judge land lock love mark mix move nap need notice offer pass pack park pat "
                "phone point pray press print promise race rain reply roar roll rub sail score scratch shop slip snack snow",
    "name": "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Nora Oscar Paula Quinn Rosa Simon Tina "
            "Ursula Victor Wanda Yusuf Zoe Adam Bella Carl Diana Erik Fiona George Helen Ivan Julia Kevin Laura Martin Nina "
            "Olga Peter Ruth Sara Tom Vera Walter Alice Boris Cora Dennis Elsa Frank Greta Hugo Irene Jonas Kate Lukas Mona Nils",
    "city": "Oslo Rome Paris London Berlin Madrid Vienna Dublin Athens Prague Warsaw Lisbon Cairo Delhi Tokyo Seoul Sydney "
            "Boston Chicago Toronto Milan Naples Geneva Zurich Munich Hamburg Glasgow Bergen Helsinki Riga Krakow Seville "
            "Porto Lyon Nairobi Lagos Tunis Havana Bogota Quito Denver Dallas Miami Seattle Perth Osaka Kyoto Hanoi",
    "object": "lamps books cups pens bags boxes bottles plates knives spoons forks bowls candles cards coins clocks combs "
              "brushes mirrors pillows blankets towels carpets baskets buckets ropes ladders tents maps letters stamps "
              "tickets toys dolls kites drums flutes violins guitars radios phones cameras pictures vases keys rings pots pans",
    "pet": "cats dogs horses cows goats pigs rabbits mice parrots ducks hens geese turtles lizards frogs ponies hamsters "
           "ferrets canaries pigeons donkeys lambs snakes snails",
    "adjective": "old new big small red blue green round square heavy light soft hard wooden broken clean dirty cheap dry wet "
                 "thin thick long short dark bright plain pretty yellow black white brown",
    "good": "lovely wonderful great excellent fantastic perfect brilliant superb amazing pleasant delightful marvellous "
            "splendid charming terrific fabulous magnificent glorious outstanding impressive",
    "bad": "awful terrible horrible dreadful disgusting useless nasty annoying boring ghastly rotten disappointing dismal "
           "poor unpleasant miserable hopeless lousy ugly appalling",
    "drug": "Zorvalin Mentaprol Kelodine Brevitol Osanil Tarqueline Vispidol Lumerax Norvadine Calpremin Duvoxil Fentorel "
            "Galavine Hexoprim Ivanol Jularene Kopadril Lorimide Maxotrine Nebulix Orvedol Pirasone Quentaril Ristavol",
    "surname": "Hill Wood Stone Brook Field Marsh Lane Ford Reed Frost Snow Winter Summers Banks Rivers Forest Moor Dale "
               "Heath Glen Knight Baker Mason Cooper Taylor Weaver Potter Fisher",
    "doers": "dogs cats birds children boys girls farmers sailors teachers doctors nurses soldiers lions bears foxes wolves "
             "monkeys rabbits horses elephants tigers students players singers",
    "doing": "sleep run sing dance walk swim sit stand wait eat play work shout hide rest meet jump laugh talk wander drink "
             "dream march camp",
    "place": "rivers trees houses hills lakes gardens bridges walls roads shops schools farms tents mountains castles barns "
             "fences caves towers ponds fields gates stables harbours",
}  # fmt: skip
TRIPLES = [  # a word, one of the same meaning, its opposite; the field keeps what is close in meaning out of a list
    (field, *triple.split()) for field, triples in {
        "size": "small little large, great huge tiny, thick fat thin, broad wide narrow, lean slim plump",
        "feeling": "cool chilly warm, cold freezing hot, dark dim sunny, pale light vivid, glad happy sad, mad angry calm, "
                   "jolly cheerful gloomy, merry joyful miserable, kind friendly cruel, brave bold cowardly, "
                   "proud boastful humble, loud noisy quiet, still silent blaring, sleepy drowsy awake, shy timid outgoing, "
                   "rude impolite courteous, mean nasty pleasant",
        "pace": "fast quick slow, swift rapid sluggish, clever brainy stupid, wise sensible foolish, smart intelligent dumb, "
                "old ancient new, young youthful elderly, late tardy early, fresh recent stale, short brief lengthy",
        "worth": "rich wealthy poor, cheap inexpensive costly, easy simple difficult, plain unadorned fancy, odd strange normal, "
                 "rare uncommon usual",
        "matter": "strong powerful weak, tough sturdy fragile, firm solid loose, rough bumpy smooth, clean spotless dirty, "
                  "neat tidy messy, shiny polished tarnished, damp moist dry, wet soaked arid, safe secure dangerous, "
                  "full packed empty, tight snug baggy, sick ill healthy, hungry starving fed",
    }.items() for triple in triples.split(", ")
]  # fmt: skip
VERBS = [tuple(v.split()) for v in (
    "buy bought", "sell sold", "find found", "lose lost", "see saw", "make made", "bring brought", "send sent", "keep kept",
    "hide hid", "draw drew", "break broke", "steal stole", "choose chose", "paint painted", "clean cleaned", "count counted",
    "pack packed", "drop dropped", "carry carried", "wash washed", "open opened", "check checked", "lift lifted",
    "mend mended", "collect collected", "order ordered", "store stored")]  # fmt: skip
ACTIONS = ["call the bank", "order paper", "book a room", "send the report", "clean the office", "print the posters",
           "fix the door", "pay the bill", "write the minutes", "update the website", "test the alarm", "water the plants",
           "move the desks", "invite the guests", "buy the tickets", "check the budget", "paint the wall", "sign the letter",
           "train the team", "pack the boxes", "plan the trip", "read the draft", "choose a logo", "meet the client",
           "open the shop", "feed the fish", "sort the files", "empty the bins"]  # fmt: skip
FORMAL = ["Dear Sir,", "Dear Madam,", "Good morning, Professor,", "With all due respect,", "Ladies and gentlemen,",
          "To whom it may concern,", "Dear colleagues,", "I beg your pardon, but", "Esteemed guests,", "Dear members,"]
CASUAL = ["Hey,", "Yo,", "Hi guys,", "Dude,", "Omg,", "Hiya,", "Oi mate,", "Sup,", "Lol,", "Wow folks,"]
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CLOSED = {"month": MONTHS, "day": DAYS}  # closed classes: the same in every split


def pools() -> dict[str, dict[str, list]]:
    """split -> pool -> its own part of the pool."""
    every = {name: text.split() for name, text in (KINDS | WORDS).items()}
    every |= {"triple": TRIPLES, "verb": VERBS, "action": ACTIONS, "formal": FORMAL, "casual": CASUAL,
              "number": [*range(2, 100)], "date": [*range(1, 29)]}  # fmt: skip
    cuts: dict[str, dict[str, list]] = {split: dict(CLOSED) for split in SIZES}
    for name, items in every.items():
        if len(set(items)) < len(items):
            raise ValueError(f"pool {name}: an item stands there twice")
        items = random.Random(f"pool|{name}|{SEED}").sample(items, len(items))
        # at least this many in the small parts; the rest goes to training and test, two to one
        small = 6 if name in ("verbnoun", "name", "city", "number", "object") else 4 if len(items) > 20 else 3
        small = 16 if name == "number" else small
        val = 12 if name == "verbnoun" else small
        val, small = (1, 1) if len(items) <= 10 else (val, small)
        test = (len(items) - val - small) * 36 // 100
        for split, size in (("example", small), ("val", val), ("test", test), ("train", len(items))):
            cuts[split][name], items = items[:size], items[size:]
    return cuts


# ---------------------------------------------------------------------------------------------------- sources


def words(r: random.Random, p: Parts) -> tuple[str, Parts]:
    most, other = r.sample(sorted(KINDS), 2)
    n = min(r.choice([3, 4]), len(p[most]))
    items = [*r.sample(p[most], n), odd := r.choice(p[other])]
    r.shuffle(items)
    return " ".join(items), {"items": items, "kind": most, "odd": odd}


def phrase(r, p):
    items = [*r.sample(p["adjective"], 2), r.choice(p[r.choice(["tool", "furniture", "clothing", "vehicle"])])]
    items = [r.choice([str.upper, str.lower, str.title])(item) for item in items]
    return " ".join(items), {"items": items}


def word(r, p):
    found = r.choice(p["verbnoun"])
    return found, {"word": found}


def choice(r, p):
    field, asked, same, opposite = r.choice(p["triple"])
    filler = r.choice([w for f, *ws in p["triple"] for w in ws[1:] if f != field])
    items = r.sample([same, opposite, filler], 3)
    return f"{asked}: {', '.join(items)}", {"word": asked, "same": same, "opposite": opposite}


def remark(r, p):
    tone, topic, mood = r.choice(["formal", "casual"]), r.choice(["animal", "thing"]), r.choice(["good", "bad"])
    noun = r.choice(p["animal"] if topic == "animal" else p["tool"] + p["furniture"])
    base, past = r.choice(p["verb"])
    asks = r.choice(["place", "time", "person", "number"])
    question = {"place": f"Where did you {base} it?", "time": f"When did you {base} it?", "person": f"Who {past} it?",
                "number": f"How many did you {base}?"}[asks]  # fmt: skip
    verb = "are" if noun in ("pliers",) else "is"
    text = f"{r.choice(p[tone])} the {noun} {verb} {r.choice(p[mood])}. {question}"
    return text, {"tone": tone, "topic": topic, "mood": {"good": "positive", "bad": "negative"}[mood], "asks": asks}


def report(r, p):
    x = {"name": r.choice(p["name"]), "city": r.choice(p["city"]), "object": r.choice(p["object"]), "n": r.choice(p["number"])}
    x["base"], x["past"] = r.choice(p["verb"])
    x["text"] = "{name} {past} {n} {object} in {city}.".format(**x)
    return x["text"], x


def expense(r, p):
    x = {"name": r.choice(p["name"]), "object": r.choice(p["object"]), "n": r.choice(p["number"]), "d": r.choice(p["date"]),
         "month": r.choice(p["month"]), "year": r.randint(2015, 2025)}  # fmt: skip
    x["date"] = "{d} {month} {year}".format(**x)
    form = r.choice(["{name} paid {n} euros for {object} on {date}.", "On {date} {name} paid {n} euros for {object}."])
    return form.format(**x), x


def note(r, p):
    x = {"person": f"{r.choice(['Mr', 'Mrs'])} {r.choice(p['surname'])}", "drug": r.choice(p["drug"]),
         "dose": f"{r.choice(p['number'])} mg", "date": f"{r.choice(p['date'])} {r.choice(p['month'])}"}  # fmt: skip
    x["missing"] = r.choice(["person", "drug", "dose", "date", "none"])
    form = {"person": "{dose} of {drug} was given on {date}.", "drug": "{person} took {dose} of a drug on {date}.",
            "dose": "{person} took some {drug} on {date}.", "date": "{person} took {dose} of {drug}.",
            "none": "{person} took {dose} of {drug} on {date}."}[x["missing"]]  # fmt: skip
    x["text"] = form.format(**x)
    return x["text"], x


def passage(r, p):
    names, cities, pets, counts = (r.sample(p[k], 3) for k in ("name", "city", "pet", "number"))
    i, asks = r.randrange(2), r.choice(["where", "who", "how many", "whether"])
    here = r.random() < 0.75  # else somebody, or somewhere, of whom the passage does not speak
    k = i if here else 2
    x = {"asks": asks, "here": here, "order": [0, 1]}
    values = {"where": cities, "who": names, "how many": counts}.get(asks)
    said = r.random() < 0.5
    question = {"where": f"Where does {names[k]} live?", "who": f"Who lives in {cities[k]}?",
                "how many": f"How many {pets[i]} does {names[k]} have?",
                "whether": f"Does {names[k]} live in {cities[i] if said else cities[1 - i]}?"}[asks]  # fmt: skip
    x["right"] = values[i] if values else "yes" if said else "no"
    x["wrong"], x["both"] = (values[1 - i], values[:2]) if values else (None, None)
    facts = [f"{names[j]} lives in {cities[j]} with {counts[j]} {pets[j]}." for j in range(2)]
    return " ".join([*facts, question]), x


def plan(r, p):
    x = {"name": r.choice(p["name"]), "action": r.choice(p["action"]), "day": r.choice(p["day"])}
    return "{name} will {action} on {day}.".format(**x), x


def doubled(r, p):
    items = [r.choice(p["doers"]), r.choice(p["doing"]), r.choice(["near", "under", "behind", "beside"]), r.choice(p["place"])]
    if r.random() < 0.5:
        items.insert(0, r.choice(p["adjective"]))
    if r.random() < 0.5:
        items.insert(-1, r.choice([a for a in p["adjective"] if a not in items]))
    k = r.randrange(1, len(items))  # the first word is never the doubled one
    return " ".join([*items[: k + 1], *items[k:]]), {"items": items}


def lists(r, p):
    nouns = [w for kind in sorted(KINDS) for w in p[kind]]
    left = r.sample(nouns, r.choice([2, 3]))
    others = [w for w in nouns if w not in left]
    how = r.choice(["same", "part", "part", "none"])
    keep = len(left) if how == "same" else r.randrange(1, len(left)) if how == "part" else 0
    right = r.sample(left, keep) + r.sample(others, len(left) - keep)
    r.shuffle(right)
    if r.random() < 0.4:
        left.sort()
    return f"{' '.join(left)} | {' '.join(right)}", {"left": left, "right": right}


def numbers(r, p):
    if r.random() < 0.5:
        start, step = r.choice(p["number"]), r.choice([1, 2, 3, 4, 5, 10])
        items, after = [start, start + step, start + 2 * step], start + 3 * step
        items = items if r.random() < 0.5 else r.sample(items, 3)
    else:
        items, after = r.sample(p["number"], 3), None
    ordered = items == sorted(items)
    return " ".join(map(str, items)), {"items": items, "next": after if ordered else None, "pool": set(p["number"])}


# ---------------------------------------------------------------------------------------------------- tasks

TASKS: list[dict] = []
# One sentence for each kind of output: true of every task of that kind, and of use to a model that does not know the kind.
AVOID = {
    "label": "Do not answer with a word of the input or with a whole sentence.",
    "em": "Do not write a sentence and do not repeat the question.",
    "raw": "Do not leave a sign out and do not add one.",
    "typed": "Do not put anything between a text and its type but one blank.",
    "text": "Do not answer with a single word and do not explain.",
}
EMPHASIS = {
    "label": "Only the words that the definition allows are answers.",
    "em": "Write nothing but the answer.",
    "raw": "Capital letters, blanks and signs count.",
    "typed": "Each part of the answer has the form text <TYPE>.",
    "text": "The answer is one line.",
}


def task(id: str, source: Callable, definition: str, prompt: str, answer: Callable, why: str, bad: Callable, fault: str,
         labels: str | None = None, tokens: int = 12, metric: str = "em", probe: bool = False) -> None:  # fmt: skip
    """A task of the category that its id starts with; `answer` of the parts of an input, None where it has none."""
    TASKS.append(locals() | {"labels": labels.split() if labels else None})


def joined(form: str, between: str = " ") -> Callable:
    return lambda x: between.join(form.format(k, item) for k, item in enumerate(x["items"], 1))


def longest(x: Parts) -> str | None:
    sizes = sorted(map(len, x["items"]))
    return max(x["items"], key=len) if sizes[-1] > sizes[-2] else None


def rotated(x: Parts, by: int) -> str:
    items = x["text"].split()
    return " ".join(items[by:] + items[:by])


def changed(form: Callable) -> Callable:
    """Of the items, joined by blanks; None where nothing changes."""
    return lambda x: new if (new := " ".join(map(form, x["items"]))) != " ".join(x["items"]) else None


task("select-first", words, "You are given a few words with blanks between them. Write only the first of them.",
     "Which word comes first?", lambda x: x["items"][0], "It is the first word of the input.",
     lambda x: x["items"][-1], "This is the last word, not the first.", tokens=6)
task("select-last", words, "You are given a few words with blanks between them. Write only the last of them.",
     "Which word comes last?", lambda x: x["items"][-1], "No word comes after it.",
     lambda x: x["items"][0], "This is the first word, not the last.", tokens=6)
task("select-second", words, "You are given a few words with blanks between them. Write only the second of them.",
     "Which word comes second?", lambda x: x["items"][1], "Exactly one word stands before it.",
     lambda x: x["items"][2], "This is the third word; two words stand before it.", tokens=6)
task("select-longest", words, "You are given a few words with blanks between them. Write the one that has the most letters.",
     "Which word is the longest?", longest, "Every other word has fewer letters.",
     lambda x: min(x["items"], key=len), "This is the shortest word.", tokens=6)

task("case-upper", phrase, "Write the phrase again with every letter as a capital letter. Keep the words and their order.",
     "Write it in capital letters.", changed(str.upper), "All letters are capitals and the words are the same.",
     lambda x: " ".join(x["items"]).lower(), "There are small letters.", metric="raw")
task("case-lower", phrase, "Write the phrase again without any capital letter. Keep the words and their order.",
     "Write it in small letters.", changed(str.lower), "All letters are small and the words are the same.",
     lambda x: " ".join(x["items"]).upper(), "There are capital letters.", metric="raw")
task("case-title", phrase, "Write the phrase as a title: every word starts with a capital letter and all its other letters are "
     "small.", "Write it as a title.", changed(str.title), "Each word has one capital letter, its first.",
     lambda x: " ".join(x["items"]).upper(), "Only the first letter of a word may be a capital.", metric="raw")
task("case-dash", phrase, "Join the words of the phrase with dashes in place of the blanks. Leave every letter as it is.",
     "Put dashes between the words.", lambda x: "-".join(x["items"]), "Dashes stand where the blanks were.",
     lambda x: "".join(x["items"]), "The words are joined, but without dashes.", metric="raw")

task("lists-comma", words, "Write the words as a list with a comma and a blank between them. Do not put anything at the end.",
     "Put commas between the words.", joined("{1}", ", "), "A comma follows each word but the last.",
     lambda x: " ".join(x["items"]), "The commas are missing.", tokens=24, metric="raw")
task("lists-numbered", words, "Number the words in one line: before each word write its number, a full stop and a blank.",
     "Number the words.", joined("{}. {}"), "Each word follows its number.",
     lambda x: " ".join(f"- {w}" for w in x["items"]), "There are dashes where numbers should stand.", tokens=32, metric="raw")
task("lists-bullets", words, "Write the words in one line and put a star and a blank before each of them.",
     "Put a star before each word.", joined("* {1}"), "A star stands before each word.",
     lambda x: "* " + " ".join(x["items"]), "Only the first word has a star.", tokens=28, metric="raw")
task("lists-semicolon", words, "Write the words as a list with a semicolon and a blank between them. Do not put anything at the "
     "end.", "Put semicolons between the words.", joined("{1}", "; "), "A semicolon follows each word but the last.",
     lambda x: ", ".join(x["items"]), "There are commas in place of semicolons.", tokens=24, metric="raw")


def doubles(w: str) -> bool:
    """Whether the last letter is written twice before an ending: stop, stopped."""
    one = sum(c in "aeiou" for c in w) == 1
    return one and len(w) > 2 and w[-1] not in "aeiouwxy" and w[-2] in "aeiou" and w[-3] not in "aeiou"


def plural(w: str) -> str:
    return w[:-1] + "ies" if w[-1] == "y" and w[-2] not in "aeiou" else w + ("es" if w.endswith(("s", "x", "sh", "ch")) else "s")


def past(w: str) -> str:
    if w[-1] == "e":
        return w + "d"
    return w[:-1] + "ied" if w[-1] == "y" and w[-2] not in "aeiou" else w + w[-1] * doubles(w) + "ed"


def ing(w: str) -> str:
    return w[:-1] + "ing" if w[-1] == "e" else w + w[-1] * doubles(w) + "ing"


def comparative(w: str) -> str:
    if w[-1] == "e":
        return w + "r"
    return w[:-1] + "ier" if w[-1] == "y" else w + w[-1] * doubles(w) + "er"


task("morphology-plural", word, "The word can be used as a noun. Write its plural.", "What is the plural?",
     lambda x: plural(x["word"]), "This is the noun for more than one.", lambda x: past(x["word"]),
     "This is the past tense of the verb.", tokens=8)
task("morphology-past", word, "The word can be used as a verb. Write its simple past tense.", "What is the past tense?",
     lambda x: past(x["word"]), "This form tells of yesterday.", lambda x: ing(x["word"]), "This is the form with -ing.",
     tokens=8)
task("morphology-ing", word, "The word can be used as a verb. Write its form that ends in -ing.", "What is the -ing form?",
     lambda x: ing(x["word"]), "This form follows 'is' or 'was'.", lambda x: past(x["word"]), "This is the past tense.", tokens=8)
task("morphology-comparative", choice, "An adjective stands before the colon. Write the form of it that compares two things and "
     "ends in -er. Ignore the words after the colon.", "What is the comparative of the word before the colon?",
     lambda x: comparative(x["word"]), "One thing can be this, compared with another.", lambda x: "most " + x["word"],
     "This form compares more than two things.", tokens=8)

task("lexical-antonym", choice, "A word stands before the colon and three words after it. Write the one of the three that means "
     "the opposite.", "Which word is the opposite?", lambda x: x["opposite"], "The two words exclude each other.",
     lambda x: x["same"], "This word means the same.", tokens=8)
task("lexical-synonym", choice, "A word stands before the colon and three words after it. Write the one of the three that means "
     "nearly the same.", "Which word means the same?", lambda x: x["same"], "One word can stand for the other.",
     lambda x: x["opposite"], "This word means the opposite.", tokens=8)
task("lexical-category", words, "All words but one are of the same kind. Say which kind: animal, fruit, tool, clothing, "
     "furniture, vehicle, body or colour.", "Which kind are most of the words?", lambda x: x["kind"],
     "All words but one are of this kind.", lambda x: x["odd"], "This is one of the words, not their kind.",
     labels="animal fruit tool clothing furniture vehicle body colour", tokens=6)
task("lexical-odd", words, "All words but one are of the same kind. Write the one that is not.", "Which word does not belong?",
     lambda x: x["odd"], "The others are all of one kind.", lambda x: next(w for w in x["items"] if w != x["odd"]),
     "This word is of the same kind as the others.", tokens=6)

task("classify-sentiment", remark, "Say whether the writer likes what the message is about. Answer positive or negative.",
     "Is the message positive or negative?", lambda x: x["mood"], "The adjective shows what the writer feels.",
     lambda x: {"positive": "negative", "negative": "positive"}[x["mood"]], "The adjective says the contrary.",
     labels="positive negative", tokens=6)
task("classify-topic", remark, "Say whether the message is about an animal or about a thing. Answer animal or thing.",
     "Is it about an animal or a thing?", lambda x: x["topic"], "The noun of the first sentence names one.",
     lambda x: {"animal": "thing", "thing": "animal"}[x["topic"]], "The noun names the other.", labels="animal thing", tokens=6)
task("classify-question", remark, "The message ends with a question. Say what the question asks for: place, time, person or "
     "number.", "What does the question ask for?", lambda x: x["asks"], "The question word asks for it.",
     lambda x: "time" if x["asks"] != "time" else "place", "The question word does not ask for that.",
     labels="place time person number", tokens=6)
task("classify-formality", remark, "Say how the message speaks to its readers. Answer formal if it is polite and stiff, and "
     "casual if it sounds like a chat among friends.", "Is the message formal or casual?", lambda x: x["tone"],
     "The words at the beginning set the tone.", lambda x: {"formal": "casual", "casual": "formal"}[x["tone"]],
     "The words at the beginning sound the other way.", labels="formal casual", tokens=6)

task("extract-person", report, "Write the name of the person that the sentence speaks of.", "Who is it?", lambda x: x["name"],
     "This is the only person in the sentence.", lambda x: x["city"], "This is a city.", tokens=8)
task("extract-city", report, "Write the name of the city that the sentence speaks of.", "Which city is it?", lambda x: x["city"],
     "This is the only city in the sentence.", lambda x: x["name"], "This is a person.", tokens=8)
task("extract-object", report, "Write the one word of the sentence that names the objects.", "Which objects are they?",
     lambda x: x["object"], "These are the objects of the sentence.", lambda x: x["city"], "This is a city.", tokens=8)
task("extract-number", report, "Write the number that stands in the sentence. Use digits.", "Which number is it?",
     lambda x: str(x["n"]), "This is the only number in the sentence.", lambda x: x["object"], "This is no number.", tokens=6)

task("typed-person-city", report, "Write the person and the city of the sentence, in this order, with a comma between them. "
     "After each write its type in angle brackets: PERSON or CITY.", "Write person and city with their types.",
     lambda x: f"{x['name']} <PERSON>, {x['city']} <CITY>", "Both are there, each with its type.",
     lambda x: f"{x['name']}, {x['city']}", "The types are missing.", tokens=24)
task("typed-date-amount", expense, "Write the date and the amount of money, in this order, with a comma between them. After each "
     "write its type in angle brackets: DATE or AMOUNT.", "Write date and amount with their types.",
     lambda x: f"{x['date']} <DATE>, {x['n']} euros <AMOUNT>", "Both are there, each with its type.",
     lambda x: f"{x['n']} euros <AMOUNT>", "The date is missing.", tokens=28)
task("typed-drug-dose", note, "Write the drug and the dose of the note, in this order, with a comma between them. After each "
     "write its type in angle brackets: DRUG or DOSE.", "Write drug and dose with their types.",
     lambda x: f"{x['drug']} <DRUG>, {x['dose']} <DOSE>" if x["missing"] not in ("drug", "dose") else None,
     "Both are there, each with its type.", lambda x: f"{x['drug']} <DOSE>, {x['dose']} <DRUG>",
     "The types are exchanged.", tokens=28)
task("typed-all", note, "Write everything of type PERSON, DOSE, DRUG and DATE that the note names, in the order of the note, "
     "with commas between. After each write its type in angle brackets.", "Write all with their types.",
     lambda x: ", ".join(f"{x[k]} <{k.upper()}>" for k in sorted(("person", "dose", "drug", "date"), key=lambda k: x["text"].find(
         x[k])) if x[k] in x["text"]), "Nothing is left out and each has its type.",
     lambda x: ", ".join(x[k] for k in ("person", "dose", "drug", "date") if x[k] in x["text"]), "The types are missing.",
     tokens=48)  # fmt: skip


def asked(kind: str, key: str = "right") -> Callable:
    return lambda x: str(x[key]) if x["asks"] == kind and x["here"] else None


task("qa-where", passage, "Read the text and answer the question at its end with the name of a city.", "Where is it?",
     asked("where"), "The text says so.", asked("where", "wrong"), "In this city lives the other person.", tokens=8)
task("qa-who", passage, "Read the text and answer the question at its end with the name of a person.", "Who is it?",
     asked("who"), "The text says so.", asked("who", "wrong"), "This person lives in the other city.", tokens=8)
task("qa-how-many", passage, "Read the text and answer the question at its end with a number in digits.", "How many are there?",
     asked("how many"), "The text says so.", asked("how many", "wrong"), "So many animals has the other person.", tokens=6)
task("qa-yes-no", passage, "Read the text and answer the question at its end with yes or no.", "Is it so?", asked("whether"),
     "This is what the text says.", lambda x: {"yes": "no", "no": "yes"}[x["right"]], "The text says the contrary.",
     labels="yes no", tokens=4)

task("wrong-where", passage, "The text ends with a question. Give a wrong answer on purpose: write the city of the text that is "
     "not the right answer.", "Which city is the wrong answer?", asked("where", "wrong"), "The text names this city, but it is "
     "not the answer.", asked("where"), "This answer is right, and a wrong one is asked for.", tokens=8)
task("wrong-who", passage, "The text ends with a question. Give a wrong answer on purpose: write the person of the text who is "
     "not the right answer.", "Which person is the wrong answer?", asked("who", "wrong"), "The text names this person, but it is "
     "not the answer.", asked("who"), "This answer is right, and a wrong one is asked for.", tokens=8)
task("wrong-number", passage, "The text ends with a question. Give a wrong answer on purpose: write the number of the text that "
     "is not the right answer.", "Which number is the wrong answer?", asked("how many", "wrong"), "The text has this number, but "
     "it is not the answer.", asked("how many"), "This answer is right, and a wrong one is asked for.", tokens=6)
task("wrong-options", passage, "The text ends with a question. Make a choice of it: write the right answer and the wrong one of "
     "the same type, in the order of the text, with the word or between them.", "Which two answers could one choose from?",
     lambda x: " or ".join(map(str, x["both"])) if x["here"] and x["both"] else None, "One answer is right, and the other has "
     "its type.", lambda x: str(x["right"]), "A choice needs two answers.", tokens=12)

task("questions-where", report, "Write a question about the sentence that is answered by the city. Start with Where and end with "
     "a question mark.", "Ask for the city.", lambda x: "Where did {name} {base} {n} {object}?".format(**x),
     "The answer to it is the city.", lambda x: "Did {name} {base} {n} {object} in {city}?".format(**x),
     "The question gives the city away.", tokens=20, metric="rougeL")
task("questions-who", report, "Write a question about the sentence that is answered by the person. Start with Who and end with a "
     "question mark.", "Ask for the person.", lambda x: "Who {past} {n} {object} in {city}?".format(**x),
     "The answer to it is the person.", lambda x: "Where did {name} {base} {n} {object}?".format(**x),
     "The answer to it is the city.", tokens=20, metric="rougeL")
task("questions-how-many", report, "Write a question about the sentence that is answered by the number. Start with How many and "
     "end with a question mark.", "Ask for the number.", lambda x: "How many {object} did {name} {base} in {city}?".format(**x),
     "The answer to it is the number.", lambda x: "Who {past} {n} {object} in {city}?".format(**x),
     "The answer to it is the person.", tokens=20, metric="rougeL")
task("questions-yes-no", plan, "Turn the sentence into a question that is answered by yes. Start with Will, keep all other words "
     "in their order and end with a question mark.", "Ask whether it is so.",
     lambda x: "Will {name} {action} on {day}?".format(**x),
     "The answer to it is yes, and no word is lost.", lambda x: "{name} will {action} on {day}?".format(**x),
     "The order of the words is that of a statement.", tokens=20, metric="rougeL")

task("edit-negate", plan, "Write the sentence again so that it says the contrary: put the word not after will. Change nothing "
     "else.", "Say that it will not happen.", lambda x: "{name} will not {action} on {day}.".format(**x),
     "One word is new, and it negates.", lambda x: "{name} did not {action} on {day}.".format(**x), "The tense was changed, too.",
     tokens=20, metric="rougeL")
task("edit-city", report, f"Write the sentence again with the city replaced by {CITY}. Change nothing else.",
     f"Let it happen in {CITY}.", lambda x: x["text"].replace(x["city"], CITY), "Only the city is another.",
     lambda x: x["text"].replace(x["name"], CITY), "The name of the person was replaced.", tokens=20, metric="rougeL")
task("edit-tense", report, "The sentence tells of the past. Write it again so that it tells of the future: use will and the verb "
     "without an ending. Change nothing else.", "Let it happen in the future.",
     lambda x: "{name} will {base} {n} {object} in {city}.".format(**x), "Only the tense is another.",
     lambda x: x["text"], "The sentence still tells of the past.",
     tokens=20, metric="rougeL")  # fmt: skip
task("edit-repeat", doubled, "By mistake a word was written twice in a row. Write the text again with that word only once. "
     "Change nothing else.", "Take out the repeated word.", lambda x: " ".join(x["items"]), "No word stands twice in a row.",
     lambda x: " ".join(x["items"][1:]), "Another word is missing, too.", tokens=20, metric="rougeL")

task("verify-contained", lists, "Two lists of words are given with a bar between them. Does the first word of the left list "
     "stand in the right list? Answer yes or no.", "Is the first word on both sides?",
     lambda x: "yes" if x["left"][0] in x["right"] else "no", "One finds out by looking for the first word.",
     lambda x: "no" if x["left"][0] in x["right"] else "yes", "Look for the first word on the right.", labels="yes no", tokens=4)
task("verify-same", lists, "Two lists of words are given with a bar between them. Do they hold the same words, in whatever "
     "order? Answer yes or no.", "Do both lists hold the same words?",
     lambda x: "yes" if set(x["left"]) == set(x["right"]) else "no", "One finds out by comparing word by word.",
     lambda x: "no" if set(x["left"]) == set(x["right"]) else "yes", "Compare the lists word by word.", labels="yes no", tokens=4,
     probe=True)  # fmt: skip
task("verify-sorted", lists, "Two lists of words are given with a bar between them. Is the left list in the order of the "
     "alphabet? Answer yes or no.", "Is the left list in alphabetical order?",
     lambda x: "yes" if x["left"] == sorted(x["left"]) else "no", "One finds out from the first letters on the left.",
     lambda x: "no" if x["left"] == sorted(x["left"]) else "yes", "Compare the first letters on the left.", labels="yes no",
     tokens=4, probe=True)  # fmt: skip
task("verify-answerable", passage, "The text ends with a question. Can it be answered from the text, which names everybody it "
     "asks about? Answer yes or no.", "Does the text hold the answer?", lambda x: "yes" if x["here"] else "no",
     "One finds out by looking for the name of the question.", lambda x: "no" if x["here"] else "yes",
     "Look for the name of the question in the text.", labels="yes no", tokens=4)

task("number-largest", numbers, "Write the largest of the numbers.", "Which number is the largest?",
     lambda x: str(max(x["items"])) if max(x["items"]) in x["pool"] else None, "No number is above it.",
     lambda x: str(min(x["items"])), "This is the smallest.", tokens=6, probe=True)
task("number-words", doubled, "Count all words of the text, also those that stand there twice. Write the number in digits.",
     "How many words are there?", lambda x: str(len(x["items"]) + 1), "So many words stand there.",
     lambda x: str(len(x["items"])), "The repeated word counts twice.", labels="5 6 7", tokens=4, probe=True)
task("number-next", numbers, "The numbers grow by the same step. Write the number that comes next.", "Which number comes next?",
     lambda x: str(x["next"]) if x["next"] in x["pool"] else None, "It follows by one more step.",
     lambda x: str(x["items"][-1]), "This number stands there already.", tokens=6, probe=True)
task("number-even", numbers, "Say whether the last of the numbers is even or odd. Answer even or odd.",
     "Is the last number even or odd?",
     lambda x: (["even", "odd"][x["items"][-1] % 2]) if x["items"][-1] in x["pool"] else None, "Its last digit decides.",
     lambda x: ["odd", "even"][x["items"][-1] % 2], "Look at the last digit.", labels="even odd", tokens=4)

task("order-swap", lists, "Two lists of words are given with a bar between them. Write the right list first, then the bar, then "
     "the left list.", "Let the two lists change places.", lambda x: f"{' '.join(x['right'])} | {' '.join(x['left'])}"
     if x["left"] != x["right"] else None, "The lists have changed places.",
     lambda x: f"{' '.join(x['left'])} {' '.join(x['right'])}", "The lists are where they were and the bar is gone.",
     tokens=28, metric="raw")
task("order-alphabet", words, "Write the words again in the order of the alphabet, with blanks between them.",
     "Sort the words by the alphabet.", lambda x: " ".join(sorted(x["items"])) if x["items"] != sorted(x["items"]) else None,
     "Each word comes before the next in the alphabet.", lambda x: " ".join(sorted(x["items"], reverse=True)),
     "This order goes from the end of the alphabet.", tokens=20)
task("order-number", numbers, "Write the numbers again from the smallest to the largest, with blanks between them.",
     "Sort the numbers.", lambda x: " ".join(map(str, sorted(x["items"]))) if x["items"] != sorted(x["items"])
     and set(x["items"]) <= x["pool"] else None, "Each number is below the next.",
     lambda x: " ".join(map(str, sorted(x["items"], reverse=True))), "This order goes from the largest down.", tokens=14)
task("order-rotate", doubled, "Move the first word of the text to its end. Leave all other words as they are.",
     "Put the first word last.", lambda x: rotated(x, 1), "The first word stands last now.", lambda x: rotated(x, -1),
     "The last word was moved instead.", tokens=20)  # fmt: skip

task("records-action", plan, "Write the sentence as an entry of a list of tasks: the person, a colon, what is to be done, and "
     "the day in brackets.", "Make an entry of it.", lambda x: "{name}: {action} ({day})".format(**x),
     "Person, task and day are there.",
     lambda x: "{action}: {name} ({day})".format(**x), "The person has to stand first.", tokens=20, metric="raw")
task("records-expense", expense, "Write the sentence as a line of a bill: what was bought, a colon, and the amount of money.",
     "Make a line of a bill of it.", lambda x: "{object}: {n} euros".format(**x), "It names what was bought and its price.",
     lambda x: "{name}: {n} euros".format(**x), "This names who paid, not for what.", tokens=14, metric="raw")
task("records-iso", expense, "Write the date of the sentence as YYYY-MM-DD: four digits of the year, two of the month and two of "
     "the day, with dashes between.", "Which date is it, as YYYY-MM-DD?",
     lambda x: f"{x['year']}-{MONTHS.index(x['month']) + 1:02}-{x['d']:02}", "Year, month and day stand in this order.",
     lambda x: f"{x['d']:02}-{MONTHS.index(x['month']) + 1:02}-{x['year']}", "The day has to come last.", tokens=16, metric="raw")
task("records-missing", note, "A complete note names a person, a drug, a dose and a date. Say which of them is missing: person, "
     "drug, dose or date. Answer none if nothing is missing.", "What is missing?", lambda x: x["missing"],
     "The other fields can be found in the note.", lambda x: "none" if x["missing"] != "none" else "date",
     "Look for all four fields in the note.", labels="person drug dose date none", tokens=6)


# ---------------------------------------------------------------------------------------------------- instances


def draw(spec: dict, split: str, pool: Parts) -> list[tuple[str, str, Parts]]:
    """Different inputs with their answers, equally many of each label. ValueError where the pool is too small."""
    r = random.Random(f"{spec['id']}|{split}|{SEED}")
    labels, found, n = spec["labels"], {}, SIZES[split]
    for k in range(n):
        for _ in range(4000):
            text, x = spec["source"](r, pool)
            answer = spec["answer"](x | {"text": text})
            if answer is not None and text not in found and (not labels or answer == labels[k % len(labels)]):
                found[text] = (text, answer, x | {"text": text})
                break
        else:
            raise ValueError(f"{spec['id']}, {split}: the pool is too small for {n} instances, only {len(found)} were found")
    rows = list(found.values())
    r.shuffle(rows)
    return rows


def built(spec: dict, cuts: dict[str, Parts]) -> dict:
    rows = {split: draw(spec, split, cuts[split]) for split in SIZES}
    examples = rows.pop("example")
    (text, answer, x), (other, right, _) = examples[POSITIVE:]
    negative = [
        {"input": text, "output": spec["bad"](x), "reason": spec["fault"], "suggestion": f"Write: {answer}"},
        {"input": other, "output": f"The answer is {right}", "reason": "The answer has to stand alone.",
         "suggestion": f"Leave out 'The answer is' and write: {right}"},
    ]  # fmt: skip
    kind = "label" if spec["labels"] else {"rougeL": "text", "raw": "raw"}.get(spec["metric"], "em")
    kind = "typed" if spec["id"].startswith("typed") else kind
    return {
        "id": spec["id"], "category": spec["id"].split("-")[0], "source": spec["source"].__name__,
        "definition": spec["definition"], "prompt": spec["prompt"], "things_to_avoid": AVOID[kind], "emphasis": EMPHASIS[kind],
        "positive": [{"input": t, "output": a, "reason": spec["why"]} for t, a, _ in examples[:POSITIVE]],
        "negative": negative, "labels": spec["labels"], "max_new_tokens": spec["tokens"], "metric": spec["metric"],
        "probe": spec["probe"], "instances": {split: [[t, a] for t, a, _ in found] for split, found in rows.items()},
    }  # fmt: skip


def files() -> dict[str, str]:
    """category -> the text of its file, one task a line."""
    cuts, found = pools(), {}
    for spec in TASKS:
        row = built(spec, cuts)
        found[row["category"]] = found.get(row["category"], "") + json.dumps(row, ensure_ascii=True) + "\n"
    return found


def main() -> int:
    made = files()
    if "--check" in sys.argv[1:]:
        there = {path.stem: path.read_text(encoding="ascii") for path in HERE.glob("*.jsonl")}
        wrong = [c for c in made | there if made.get(c) != there.get(c)]
        print(f"differ: {', '.join(wrong)}" if wrong else f"same: {len(made)} files")
        return bool(wrong)
    HERE.mkdir(exist_ok=True)
    for category, text in made.items():
        (HERE / f"{category}.jsonl").write_text(text, encoding="ascii", newline="\n")
    print(f"{len(TASKS)} tasks in {len(made)} categories, {sum(map(len, made.values()))} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
