"""The instruction suite: tasks with a definition, examples and instances; their encodings, mixtures, splits and scores.

The schema is that of Mishra et al. (2022, arXiv 2104.08773), whose files can be read, too; the tasks are this project's
(data/instructions.md). Texts only: nothing here knows of a model, and a tokenizer is asked for its chat template alone.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from heads.names import data, known, root, whole

SPLITS, TAGS = ("train", "val", "test"), ("category", "source", "metric", "probe")
# Fields of an instruction in the paper's order, with the names under which its files have them.
FIELDS = {"definition": "Definition", "prompt": "Prompt", "things_to_avoid": "Things to Avoid", "emphasis": "Emphasis & Caution",
          "negative": "Negative Examples", "positive": "Positive Examples"}  # fmt: skip


class Instance(NamedTuple):
    """An input and the outputs that are right. `after`, if any, is said behind the input, next to the answer."""

    input: str
    outputs: tuple[str, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class Instruction:
    """One task. `source` is the kind of its inputs; `labels` are its answers where they are few and fixed; `probe` marks what
    is expected to be too hard or too easy for a default set. data/instructions.md says more of each."""

    id: str
    category: str
    source: str
    definition: str
    prompt: str | None = None
    things_to_avoid: str | None = None
    emphasis: str | None = None
    positive: tuple[Mapping[str, str], ...] = ()
    negative: tuple[Mapping[str, str], ...] = ()
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 32
    metric: str = "rougeL"
    probe: bool = False
    instances: Mapping[str, tuple[Instance, ...]] = field(default_factory=dict, repr=False)

    def take(self, split: str, n: int | None = None, seed: int = 0) -> list[Instance]:
        """`n` instances of a split, or all: the first of an order fixed by the seed, so that fewer are among more.

        Raises:
            LookupError: for an unknown split. ValueError: for more than there are.
        """
        found = self.instances.get(known("split", split, SPLITS), ())
        n = _few(f"{split} instances of {self.id}", n, len(found))
        return random.Random(f"{self.id}|{split}|{seed}").sample(found, len(found))[:n]

    def commonest(self, split: str = "test") -> tuple[str, float]:
        """The commonest answer of a split and its share: what a model that reads nothing can reach."""
        answers = Counter(sorted(x.outputs[0] for x in self.take(split)))
        return max(answers, key=answers.get), max(answers.values()) / answers.total()


def _few(what: str, n: int | None, available: int) -> int | None:
    if n is not None and whole(what, n, 1) > available:
        raise ValueError(f"{n} {what} asked for, but there are {available}")
    return n


def _key(salt: str) -> Callable[[str], float]:
    """A sort key that shuffles names: it depends on the name alone, not on what else is there."""
    return lambda name: random.Random(f"{salt}|{name}").random()


# ----------------------------------------------------------------------------------------- sets of tasks


class TaskSet(dict[str, Instruction]):
    """Tasks by id. LookupError for an unknown one; ValueError for an id that stands there twice."""

    def __init__(self, tasks: Iterable[Instruction]):
        for task in tasks:
            if task.id in self:
                raise ValueError(f"task {task.id!r} stands there twice")
            self[task.id] = task

    def __missing__(self, id: str):
        known("task", id, self)

    @classmethod
    def builtin(cls) -> TaskSet:
        """The project's 64 tasks."""
        names = sorted(path.name for path in (root() / "data" / "instructions").glob("*.jsonl"))
        return cls(_task(name, json.loads(row)) for name in names for row in data(f"instructions/{name}").splitlines())

    @classmethod
    def from_json(cls, folder: str | Path) -> TaskSet:
        """Tasks of a folder: .jsonl in the schema of data/instructions, .json as Natural Instructions 1 or 2 has it.

        Of the latter's instances 100 at even distances behind the first 60 are the test, as in the paper; the rest trains.

        Raises:
            FileNotFoundError: where no such file is. LookupError: for a field, split or metric that is none.
            ValueError: naming file and task, for what lacks a field or an output.
        """
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.json*"))}
        if not texts:
            raise FileNotFoundError(f"no .json or .jsonl file of tasks in {folder}")
        rows = ((n, row) for n, text in texts.items() for row in (text.splitlines() if n.endswith(".jsonl") else [text]))
        return cls(_task(name, json.loads(row)) for name, row in rows)

    def where(self, **tags: str | bool) -> TaskSet:
        """The tasks with these tags: category, source, metric, probe. LookupError for a tag, or a value, that none has."""
        for tag, value in tags.items():
            known(tag, value, dict.fromkeys(getattr(task, known("tag", tag, TAGS)) for task in self.values()))
        return TaskSet(task for task in self.values() if all(getattr(task, tag) == value for tag, value in tags.items()))

    def subset(self, n: int, seed: int = 0) -> TaskSet:
        """`n` tasks in an order fixed by the seed: one of each category, then a second of each, and so on. A smaller set is
        the beginning of a larger one. ValueError for more than there are."""
        rank, turn = _key(f"subset|{seed}"), Counter()
        order = {id: turn.update([self[id].category]) or turn[self[id].category] for id in sorted(self, key=rank)}
        order = sorted(order, key=lambda id: (order[id], rank(self[id].category)))
        return TaskSet(self[id] for id in order[: _few("tasks", n, len(self))])

    def without(self, ids: Iterable[str]) -> tuple[TaskSet, TaskSet]:
        """(seen, unseen): all tasks but these, and these. ValueError if one of the two would be empty."""
        held = {known("task", id, self) for id in ids}
        if not 0 < len(held) < len(self):
            raise ValueError(f"{len(held)} of {len(self)} tasks held out: some must be seen and some unseen")
        return TaskSet(self[id] for id in self if id not in held), TaskSet(self[id] for id in self if id in held)

    def random(self, k: int, seed: int = 0) -> tuple[TaskSet, TaskSet]:
        """(seen, unseen) with `k` unseen tasks, of as many categories as can be."""
        return self.without(self.subset(k, seed))

    def leave(self, **tags: str) -> tuple[TaskSet, TaskSet]:
        """(seen, unseen): leave(category="qa"), leave(source="words") or leave(task="qa-where") is unseen."""
        return self.without([tags["task"]] if tags.keys() == {"task"} else self.where(**tags))


def _task(file: str, row: dict) -> Instruction:
    """A row of a file, checked."""
    row = _natural(file, row) if "Definition" in row else row
    where = f"in {file}, task {row.get('id')!r}"
    if lacking := [name for name in ("id", "category", "source", "definition", "instances") if not row.get(name)]:
        raise ValueError(f"no {lacking[0]} {where}")
    known("metric", row.get("metric", "em"), SCORES)
    row = {known("field", name, Instruction.__dataclass_fields__): value for name, value in row.items()}
    parts = {known("split", k, SPLITS): tuple(Instance(x[0], tuple(x[1:])) for x in v) for k, v in row["instances"].items()}
    if empty := [f"{split} instance {i}" for split in parts for i, x in enumerate(parts[split]) if not any(x.outputs)]:
        raise ValueError(f"{empty[0]} without output {where}")
    return Instruction(**row | {k: tuple(row.get(k) or ()) for k in ("labels", "positive", "negative")} | {"instances": parts})


def _natural(file: str, row: dict) -> dict:
    """A file of Natural Instructions in our schema: version 1 has texts, version 2 lists of them; "-" is nothing."""
    many = lambda value: [value] if isinstance(value, str) else value or []
    one = lambda value: " ".join(many(value)).strip(" -") or None
    found = {name: one(row.get(theirs)) for name, theirs in FIELDS.items() if name not in ("negative", "positive")}
    for name in ("negative", "positive"):
        examples = [e for e in row.get("Examples", row).get(FIELDS[name], ()) if e != "-"]
        found[name] = [{"reason": e.get("explanation"), **e, "output": one(e["output"])} for e in examples]
    every = [[x["input"], *many(x["output"])] for x in row.get("Instances", ())]
    first = min(60, len(every) // 2)
    test = range(first, len(every), max(1, (len(every) - first) // 100))[:100]
    parts = {"train": [x for i, x in enumerate(every) if i not in test], "test": [every[i] for i in test]}
    tags = {tag: one(row.get(theirs)) or "none" for tag, theirs in (("category", "Categories"), ("source", "Source"))}
    return {"id": Path(file).stem, **tags, **found, "instances": every and parts}


# --------------------------------------------------------------------------------------------- encodings


def encode(task: Instruction, x: Instance | str, fields: Iterable[str] | None = None, style: str = "ni", shots: int = 2,
           reasons: bool = True, tokenizer=None) -> tuple[str, str, str]:  # fmt: skip
    """(prefix, body, target): what all instances of a task share, the instance up to its answer, and the answer.

    The three are cut where the default model's tokenizer cuts, so that a prefix can be kept as a cache.

    Args:
        x: an instance, or an input alone: then the target is empty.
        fields: of the instruction, put in the paper's order; the definition if None. What a task lacks is left out.
        style: "ni" (fields in lines), "box" (one line, as In-BoXBART), "chat" (the tokenizer's template), "none" (the input
            alone), "id" (a number of four digits that means nothing and is the task's own: a control).
        shots: examples of each kind; where the positive ones are fewer, instances of the training split follow.
        reasons: say why an example is right or wrong; without them examples have no heading either.

    Raises:
        LookupError: for an unknown field or style. TypeError: for "chat" without a tokenizer.
        ValueError: for fields of the styles that have none, or more shots than there are.
    """
    bare = known("style", style, ("ni", "box", "chat", "none", "id")) in ("none", "id")
    fields = [known("field", name, FIELDS) for name in ((() if bare else ("definition",)) if fields is None else fields)]
    if bare and fields:
        raise ValueError(f"style {style!r} has no fields, not {', '.join(fields)}")
    parts = [part for name in FIELDS if name in fields for part in _part(task, name, style, whole("shots", shots, 0), reasons)]
    parts += [f"Task {zlib.crc32(task.id.encode()) % 9000 + 1000}"] * (style == "id")
    x = Instance(x) if isinstance(x, str) else x
    said, target = f"{x.input} {x.after}".rstrip(), x.outputs[0] if x.outputs else ""
    if style == "box":
        return f"Instruction: {', '.join(parts)}; Instance:", f" input: {said}, output:", target and f" {target}\n"
    prefix = "".join(f"{part}\n" for part in parts)
    if style != "chat":
        return prefix, f"input: {said}\noutput:", target and f" {target}\n"
    if tokenizer is None:
        raise TypeError("style 'chat' asks for a tokenizer")
    message = [{"role": "user", "content": "<<here>>"}]  # to see what the template writes around a message
    before, behind = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split("<<here>>")
    return before + prefix, said + behind, target and target + tokenizer.eos_token


def _part(task: Instruction, name: str, style: str, shots: int, reasons: bool) -> list[str]:
    """A field as text: nothing where the task lacks it."""
    found = getattr(task, name)
    if name not in ("negative", "positive"):
        return [f"{FIELDS[name]}: {found}"] if found else []
    more = task.instances.get("train", ()) if name == "positive" else ()
    rows = [*found, *({"input": x.input, "output": x.outputs[0]} for x in more)][:shots]
    if name == "positive" and len(rows) < shots:
        raise ValueError(f"{shots} shots of {task.id} asked for, but there are {len(rows)}")
    keys = ("input", "output", "reason", "suggestion")[: 4 if reasons else 2]
    lines = [[f"{key}: {row[key]}" for key in keys if row.get(key)] for row in rows]
    if style != "box":
        return ["\n".join([f"{FIELDS[name][:-1]}{k}-"] * reasons + row) for k, row in enumerate(lines, 1)]
    boxes = " ".join(f"[{', '.join(row)}]" for row in lines).replace(", reason: ", ", explanation: ")
    return [f"{FIELDS[name]}: [{boxes}]"] * bool(lines)


# ---------------------------------------------------------------------------------------------- mixtures


class Group(NamedTuple):
    """Instances of one task in one step, which share its instruction; `part` says of which part of the mixture."""

    task: Instruction
    instances: tuple[Instance, ...]
    part: int


def mixture(parts: Sequence[tuple[Iterable[Instruction], int]], mode: str = "joint", steps: int | None = None, groups: int = 8,
            each: int = 2, seed: int = 0) -> list[list[Group]]:  # fmt: skip
    """Training rows as steps of `groups` tasks with `each` instances.

    The order depends on the seed, the tasks' names and n alone: two mixtures have what they share in the same order.

    Args:
        parts: tasks (of a `TaskSet`: `.values()`) and how many training instances n of each.
        mode: "joint" shuffles all parts together, "balanced" takes groups of each part in turn and repeats the shorter ones,
            "sequential" ends one part before the next.
        steps: so many (if sequential, of each part), by repeating or cutting. None: all rows once.

    Raises:
        LookupError: for an unknown mode. TypeError, ValueError: for what is no count, or too many, or no tasks.
    """
    known("mode", mode, ("joint", "balanced", "sequential"))
    whole("groups", groups, 1), whole("each", each, 1)
    stages = [_groups(k, list(tasks), n, each, seed) for k, (tasks, n) in enumerate(parts)]
    if not stages or not all(stages):
        raise ValueError("a mixture needs at least one part, and a part at least one task")
    if mode == "balanced":
        stages = [[part[k % len(part)] for k in range(max(map(len, stages))) for part in stages]]
    if mode == "joint":
        stages = [sorted(sum(stages, []), key=lambda row: row[0])]
    sizes = [len(stage) if steps is None else whole("steps", steps, 1) * groups for stage in stages]
    rows = [[stage[k % len(stage)][1] for k in range(n)] for stage, n in zip(stages, sizes)]
    return [stage[k : k + groups] for stage in rows for k in range(0, len(stage), groups)]


def _groups(part: int, tasks: list[Instruction], n: int, each: int, seed: int) -> list[tuple[float, Group]]:
    """(place between 0 and 1, group), sorted: the groups of a task are spread evenly, whatever else is trained."""
    starts = range(0, whole("n", n, 1), each)
    place = lambda task, k: (k + _key(f"mixture|{seed}|{k}")(task.id)) / len(starts)
    rows = [(task, task.take("train", n, seed)) for task in tasks]
    found = [(place(t, k), Group(t, tuple(row[i : i + each]), part)) for t, row in rows for k, i in enumerate(starts)]
    return sorted(found, key=lambda row: row[0])


# ------------------------------------------------------------------------------------------------ scores


def normalised(text: str) -> str:
    """As SQuAD's scorer: small letters, without ASCII punctuation and articles, one blank between words."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())).split())


def rouge_l(prediction: str, outputs: Sequence[str]) -> float:
    """F of the longest common subsequence of stemmed words, from 0 to 1: the best over the outputs that are right."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True).score_multi(list(outputs), prediction)["rougeL"].fmeasure


SCORES = {"em": lambda said, outputs: float(normalised(said) in map(normalised, outputs)),
          "raw": lambda said, outputs: float(said.strip() in outputs), "rougeL": rouge_l}  # fmt: skip


def score(predictions: Sequence[str], instances: Sequence[Instance], metric: str = "rougeL") -> np.ndarray:
    """`[instance]`, from 0 to 1: "rougeL", "em" (equal after SQuAD's normalisation) or "raw" (equal as it stands).

    Raises:
        LookupError: for an unknown metric. ValueError: for unequal lengths, or an instance without output.
    """
    compare = SCORES[known("metric", metric, SCORES)]
    if len(predictions) != len(instances) or not all(x.outputs for x in instances):
        raise ValueError(f"{len(predictions)} predictions for {len(instances)} instances: expected one of each, with outputs")
    return np.array([compare(said, x.outputs) for said, x in zip(predictions, instances)])


def macro(scores: Mapping[str, Sequence[float]], draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, ...]:
    """(mean, low, high) of the mean over tasks of the mean over instances; the bootstrap draws tasks, then their instances.

    Args:
        scores: task -> `[instance]`; for two arms, the differences on the same instances.

    Raises:
        ValueError: for no scores, a task without instances, or a level outside 0 to 1.
    """
    rows = [np.asarray(row, float) for row in scores.values()]
    if not rows or not all(map(len, rows)) or not 0 < level < 1:
        raise ValueError(f"scores of at least one instance a task, and a level between 0 and 1, not {level!r}")
    rng, means = np.random.default_rng(seed), np.empty((whole("draws", draws, 1), len(rows)))
    drawn = rng.integers(len(rows), size=means.shape)
    for t, row in enumerate(rows):
        here = drawn == t
        means[here] = row[rng.integers(len(row), size=(here.sum(), len(row)))].mean(1)
    ends = np.quantile(means.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([row.mean() for row in rows])), *ends.tolist()
