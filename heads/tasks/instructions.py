"""The instruction suite: tasks with a definition, examples and instances; their encodings, mixtures, splits and scores.

The schema is that of Mishra et al. (2022, arXiv 2104.08773), whose files can be read, too; the tasks are this project's
(data/instructions.md). Texts only: nothing here knows of a model, and a tokenizer is asked for its chat template alone.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heads.names import count, data, known, root, whole

SPLITS = ("train", "val", "test")
STYLES = ("ni", "box", "chat", "none", "id")
MODES = ("joint", "balanced", "sequential")
# Fields of an instruction in the paper's order, with the names under which its files have them.
FIELDS = {"definition": "Definition", "prompt": "Prompt", "things_to_avoid": "Things to Avoid", "emphasis": "Emphasis & Caution",
          "negative": "Negative Examples", "positive": "Positive Examples"}  # fmt: skip


class Instance(NamedTuple):
    """An input and the outputs that are right. `after`, if any, is what a chat message says behind the input."""

    input: str
    outputs: tuple[str, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class Instruction:
    """One task. `source` is the kind of its inputs, `labels` its answers where they are few and fixed, `number` one that
    means nothing; `probe` marks a task that is too hard or too easy for the default set. See data/instructions.md."""

    id: str
    category: str
    source: str
    definition: str
    prompt: str | None = None
    things_to_avoid: str | None = None
    emphasis: str | None = None
    positive: tuple[Mapping[str, str], ...] = ()
    negative: tuple[Mapping[str, str], ...] = ()
    labels: tuple[str, ...] | None = None
    max_new_tokens: int = 32
    metric: str = "rougeL"
    probe: bool = False
    instances: Mapping[str, tuple[Instance, ...]] = field(default_factory=dict, repr=False)
    number: int = 0

    def take(self, split: str, n: int | None = None, seed: int = 0) -> list[Instance]:
        """`n` instances of a split, or all: the first of an order fixed by the seed, so that fewer are among more.

        Raises:
            LookupError: for an unknown split. ValueError: for more than there are.
        """
        found = self.instances.get(known("split", split, SPLITS), ())
        count(f"{self.id}, {split}", n, len(found))
        return random.Random(f"{self.id}|{split}|{seed}").sample(found, len(found))[:n]

    def commonest(self, split: str = "test") -> tuple[str, float]:
        """The commonest answer of a split and its share, what a model that reads nothing can reach."""
        answers = Counter(x.outputs[0] for x in self.take(split))
        answer, times = min(answers.items(), key=lambda item: (-item[1], item[0]))
        return answer, times / answers.total()


class TaskSet(Mapping[str, Instruction]):
    """Tasks by id, in a fixed order. LookupError for an unknown id, category or source; ValueError for an id twice."""

    def __init__(self, tasks: Iterable[Instruction]):
        tasks = list(tasks)
        self._tasks = {task.id: task for task in tasks}
        if twice := [name for name, times in Counter(task.id for task in tasks).items() if times > 1]:
            raise ValueError(f"task {twice[0]!r} stands there twice")

    def __getitem__(self, id: str) -> Instruction:
        return self._tasks[known("task", id, self._tasks)]

    def __contains__(self, id: object) -> bool:
        return id in self._tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @classmethod
    def builtin(cls, probes: bool = True) -> TaskSet:
        """The project's 64 tasks; without those marked as probes if `probes` is False."""
        names = sorted(f"instructions/{path.name}" for path in (root() / "data" / "instructions").glob("*.jsonl"))
        rows = [(f"data/{name}", json.loads(line)) for name in names for line in data(name).splitlines()]
        return cls(task for task in _numbered(rows) if probes or not task.probe)

    @classmethod
    def from_json(cls, folder: str | Path) -> TaskSet:
        """Tasks of a folder: .jsonl in the schema of data/instructions, .json as Natural Instructions 1 or 2 has it.

        Of the latter's instances 100 at even distances behind the first 60 are the test, as in the paper; the rest trains.

        Raises:
            FileNotFoundError: where no such file is. ValueError: naming file and task, for what lacks a field or an output.
        """
        paths = sorted(path for path in Path(folder).glob("*.json*") if path.suffix in (".json", ".jsonl"))
        if not paths:
            raise FileNotFoundError(f"no .json or .jsonl file of tasks in {folder}")
        rows = []
        for path in paths:
            text = path.read_text(encoding="utf-8")
            for row in text.splitlines() if path.suffix == ".jsonl" else [text]:
                row = json.loads(row)
                rows.append((str(path), _natural(path.stem, row) if "Definition" in row else row))
        return cls(_numbered(rows))

    def where(self, category: str | None = None, source: str | None = None, probe: bool | None = None) -> TaskSet:
        """The tasks of a category, a source, or both; with `probe`, only those that are, or are not, probes."""
        for what, asked in (("category", category), ("source", source)):
            if asked is not None:
                known(what, asked, dict.fromkeys(getattr(task, what) for task in self.values()))
        wanted = {"category": category, "source": source, "probe": probe}.items()
        return TaskSet(t for t in self.values() if all(value in (None, getattr(t, what)) for what, value in wanted))

    def spread(self, seed: int = 0) -> list[str]:
        """All ids in an order fixed by the seed: one of each category, then a second of each, and so on."""
        rank, places = _key(f"spread|{seed}"), {}
        for id in sorted(self, key=rank):
            places[id] = sum(self[other].category == self[id].category for other in places)
        return sorted(self, key=lambda id: (places[id], rank(self[id].category)))

    def subset(self, n: int, seed: int = 0) -> TaskSet:
        """`n` tasks over as many categories as can be; a smaller set is part of a larger one."""
        if whole("tasks", n, 1) > len(self):
            raise ValueError(f"{n} tasks asked for, but there are {len(self)}")
        return TaskSet(self[id] for id in self.spread(seed)[:n])

    def without(self, ids: Iterable[str]) -> tuple[TaskSet, TaskSet]:
        """(seen, unseen): all tasks but these, and these. ValueError if one of the two would be empty."""
        held = {known("task", id, self._tasks) for id in ids}
        if not 0 < len(held) < len(self):
            raise ValueError(f"{len(held)} of {len(self)} tasks held out: some must be seen and some unseen")
        return TaskSet(self[id] for id in self if id not in held), TaskSet(self[id] for id in self if id in held)

    def random(self, k: int, seed: int = 0) -> tuple[TaskSet, TaskSet]:
        """(seen, unseen) with `k` unseen tasks, of as many categories as can be."""
        return self.without(self.subset(k, seed))

    def leave(self, category: str | None = None, source: str | None = None, task: str | None = None) -> tuple[TaskSet, TaskSet]:
        """(seen, unseen): a whole category, a whole source or a single task is unseen. TypeError unless one is named."""
        if sum(asked is not None for asked in (category, source, task)) != 1:
            raise TypeError("name one of category, source and task")
        return self.without([task] if task is not None else self.where(category, source))


def _key(salt: str) -> Callable[[str], float]:
    """A sort key that shuffles names: it depends on the name alone, not on what else is there."""
    return lambda name: random.Random(f"{salt}|{name}").random()


def _natural(stem: str, row: Mapping[str, Any]) -> dict:
    """A file of Natural Instructions as a row of our schema: version 1 has text, version 2 lists; "-" is nothing."""
    one = lambda value: None if (text := " ".join([value] if isinstance(value, str) else value or [])) in ("", "-") else text
    found = {name: one(row.get(theirs)) for name, theirs in FIELDS.items() if name not in ("negative", "positive")}
    for name in ("negative", "positive"):
        examples = (row.get("Examples") or row).get(FIELDS[name]) or []
        found[name] = [{"reason": e.get("explanation", ""), **e, "output": one(e["output"]) or ""} for e in examples if e != "-"]
    instances = [[x["input"], *([x["output"]] if isinstance(x["output"], str) else x["output"])] for x in row.get("Instances", [])]
    first = min(60, len(instances) // 2)
    test = range(first, len(instances), max(1, (len(instances) - first) // 100))[:100]
    parts = {"train": [x for i, x in enumerate(instances) if i not in test], "test": [instances[i] for i in test]}
    tags = {"category": one(row.get("Categories")) or "none", "source": one(row.get("Source")) or "none"}
    return {"id": stem, **tags, **found, "instances": parts}


def _numbered(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Instruction]:
    tasks = [_task(*row) for row in rows]
    order = sorted((task.id for task in tasks), key=_key("number"))
    return [replace(task, number=order.index(task.id) + 1) for task in tasks]


def _task(file: str, row: Mapping[str, Any]) -> Instruction:
    where = f"{file}, task {row.get('id')!r}"
    for name in ("id", "category", "source", "definition", "instances"):
        if not row.get(name):
            raise ValueError(f"{where}: no {name}")
    for name in row:
        known(f"field in {where}:", name, [f.name for f in fields(Instruction)])
    known(f"metric in {where}:", row.get("metric", "em"), SCORES)
    parts = {known(f"split in {where}:", split, SPLITS): tuple(Instance(x[0], tuple(x[1:])) for x in found)
             for split, found in row["instances"].items()}  # fmt: skip
    for split, found in parts.items():
        for i, x in enumerate(found):
            if not all(x.outputs) or not x.outputs:
                raise ValueError(f"{where}: instance {i} of {split} has no output")
    lists = {name: tuple(row[name]) for name in ("positive", "negative", "labels") if row.get(name)}
    return Instruction(**{**row, **{"labels": None}, **lists, "instances": parts})


def encode(task: Instruction, x: Instance | str, fields: Iterable[str] | None = None, style: str = "ni", shots: int = 2,
           reasons: bool = True, tokenizer=None) -> tuple[str, str, str]:  # fmt: skip
    """(prefix, body, target): what all instances of a task share, the instance up to its answer, and the answer.

    Args:
        x: an instance, or an input alone: then the target is empty.
        fields: of the instruction, put in the paper's order; the definition if None. What a task lacks is left out.
        style: "ni" (fields in lines), "box" (one line, as In-BoXBART), "chat" (the tokenizer's template; what an instance
            says `after` its input stays behind it), "none" (the input alone), "id" (the number of the task, a control).
        shots: examples of each kind; where the positive ones are fewer, instances of the training split follow.
        reasons: say why an example is right or wrong; without them examples have no heading either.

    Raises:
        LookupError: for an unknown field or style. TypeError: for "chat" without a tokenizer.
        ValueError: for fields of the styles that have none, or more shots than there are.
    """
    known("style", style, STYLES)
    bare = style in ("none", "id")
    fields = [known("field", name, FIELDS) for name in ((() if bare else ("definition",)) if fields is None else fields)]
    if bare and fields:
        raise ValueError(f"style {style!r} has no fields, not {', '.join(fields)}")
    parts = [part for name in FIELDS if name in fields for part in _part(task, name, style, whole("shots", shots, 0), reasons)]
    x = Instance(x) if isinstance(x, str) else x
    said, target = f"{x.input} {x.after}".rstrip(), x.outputs[0] if x.outputs else ""
    if style == "box":
        return f"Instruction: {', '.join(parts)}; Instance: ", f"input: {said}, output:", target and f" {target}\n"
    if style == "chat":
        if tokenizer is None:
            raise TypeError("style 'chat' asks for a tokenizer")
        hole = "<<here>>"  # to see what the template writes around a message
        message = tokenizer.apply_chat_template([{"role": "user", "content": hole}], tokenize=False, add_generation_prompt=True)
        before, behind = message.split(hole)
        return before + "".join(f"{part}\n" for part in parts), said + behind, target and target + tokenizer.eos_token
    parts = [f"Task {task.number}"] if style == "id" else parts
    return "".join(f"{part}\n" for part in parts), f"input: {said}\noutput:", target and f" {target}\n"


def _part(task: Instruction, name: str, style: str, shots: int, reasons: bool) -> list[str]:
    """A field as text: nothing where the task lacks it."""
    found = getattr(task, name)
    if name not in ("negative", "positive"):
        return [f"{FIELDS[name]}: {found}"] if found else []
    rows = list(found[:shots])
    if name == "positive" and len(rows) < shots:
        more = task.instances.get("train", ())[: shots - len(rows)]
        rows += [{"input": x.input, "output": x.outputs[0]} for x in more]
        if len(rows) < shots:
            raise ValueError(f"{task.id}: {shots} shots asked for, but there are {len(rows)}")
    keys = ("input", "output", *(("reason", "suggestion") if reasons else ()))
    lines = [[f"{key}: {row[key]}" for key in keys if row.get(key)] for row in rows]
    if style == "box":
        lines = [f"[{', '.join(row)}]".replace(", reason: ", ", explanation: ") for row in lines]
        return [f"{FIELDS[name]}: [{' '.join(lines)}]"] if lines else []
    heading = [f"{FIELDS[name][:-1]}{k}-" for k in range(1, len(lines) + 1)]
    return ["\n".join([title, *row] if reasons else row) for title, row in zip(heading, lines)]


# ------------------------------------------------------------------------------------------------ mixtures


class Group(NamedTuple):
    """Instances of one task in one step, which share its instruction; `part` counts the parts of the mixture."""

    task: Instruction
    instances: tuple[Instance, ...]
    part: int


def mixture(parts: Sequence[tuple[Iterable[Instruction], int]], mode: str = "joint", steps: int | Sequence[int] | None = None,
            groups: int = 8, each: int = 2, seed: int = 0) -> list[list[Group]]:  # fmt: skip
    """Training rows as steps of `groups` tasks with `each` instances.

    The order depends on the seed, the tasks' names and n alone: two mixtures have what they share in the same order.

    Args:
        parts: tasks (of a `TaskSet`: `.values()`) and how many training instances n of each.
        mode: "joint" shuffles all parts together, "balanced" takes groups of each part in turn and repeats the shorter ones,
            "sequential" ends one part before the next.
        steps: so many, by repeating or cutting; one number for each part if sequential. None: all rows once.

    Raises:
        LookupError: for an unknown mode. TypeError, ValueError: for what is no count, or too many, or no tasks.
    """
    known("mode", mode, MODES)
    sizes = {"groups": whole("groups", groups, 1), "each": whole("each", each, 1), "seed": seed}
    if not parts:
        raise ValueError("a mixture needs at least one part")
    if mode == "sequential":
        stages = list(steps) if isinstance(steps, Sequence) else [steps] * len(parts)
        if len(stages) != len(parts):
            raise ValueError(f"{len(stages)} numbers of steps for {len(parts)} parts")
        one_by_one = [mixture([part], "joint", n, **sizes) for part, n in zip(parts, stages)]
        return [[group._replace(part=k) for group in step] for k, stage in enumerate(one_by_one) for step in stage]
    found = [_groups(k, tasks, n, each, seed) for k, (tasks, n) in enumerate(parts)]
    if mode == "balanced":
        rows = [part[k % len(part)][1] for k in range(max(map(len, found))) for part in found]
    else:
        rows = [group for _, group in sorted((row for part in found for row in part), key=lambda row: row[0])]
    if steps is not None:
        rows = [rows[k % len(rows)] for k in range(whole("steps", steps, 1) * groups)]
    return [rows[k : k + groups] for k in range(0, len(rows), groups)]


def _groups(part: int, tasks: Iterable[Instruction], n: int, each: int, seed: int) -> list[tuple[float, Group]]:
    """(place between 0 and 1, group), sorted: the groups of a task are spread evenly, whatever else is trained."""
    found = []
    for task in tasks:
        rows = task.take("train", whole("n", n, 1), seed)
        cuts = [tuple(rows[i : i + each]) for i in range(0, n, each)]
        places = [(k + _key(f"mixture|{seed}|{k}")(task.id)) / len(cuts) for k in range(len(cuts))]
        found += [(place, Group(task, cut, part)) for place, cut in zip(places, cuts)]
    if not found:
        raise ValueError("a part of a mixture has no tasks")
    return sorted(found, key=lambda row: row[0])


# ------------------------------------------------------------------------------------------------- scores


def normalised(text: str) -> str:
    """As SQuAD's scorer: small letters, without punctuation and articles, one blank between words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rouge_l(prediction: str, outputs: Sequence[str]) -> float:
    """F of the longest common subsequence of stemmed words, from 0 to 1: the best over the outputs that are right."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True).score_multi(list(outputs), prediction)["rougeL"].fmeasure


def set_f1(prediction: str, outputs: Sequence[str]) -> float:
    """F of the parts between commas or semicolons, in any order, as they stand: the best over the outputs."""
    cut = lambda text: {part.strip() for part in re.split("[,;]", text)} - {""}
    found = cut(prediction)
    return max(2 * len(found & cut(right)) / max(1, len(found) + len(cut(right))) for right in outputs)


SCORES = {
    "em": lambda said, outputs: float(normalised(said) in map(normalised, outputs)),
    "raw": lambda said, outputs: float(said.strip() in outputs),
    "rougeL": rouge_l, "set_f1": set_f1,
}  # fmt: skip


def score(predictions: Sequence[str], instances: Sequence[Instance], metric: str = "rougeL") -> np.ndarray:
    """`[instance]`, from 0 to 1: "rougeL", "em" (equal after SQuAD's normalisation), "raw" (equal) or "set_f1".

    Raises:
        LookupError: for an unknown metric. ValueError: for unequal lengths, or an instance without output.
    """
    compare = SCORES[known("metric", metric, SCORES)]
    if len(predictions) != len(instances) or not all(x.outputs for x in instances):
        raise ValueError(f"{len(predictions)} predictions for {len(instances)} instances, each with an output")
    return np.array([compare(said, x.outputs) for said, x in zip(predictions, instances)])


class Macro(NamedTuple):
    """A mean over tasks with its bootstrap interval."""

    mean: float
    low: float
    high: float


def macro(scores: Mapping[str, Sequence[float]], minus: Mapping[str, Sequence[float]] | None = None, draws: int = 2000,
          level: float = 0.95, seed: int = 0) -> Macro:  # fmt: skip
    """Mean over tasks of the mean over instances; the bootstrap draws tasks, then instances of each task drawn.

    Args:
        scores: task -> `[instance]`.
        minus: another arm's scores of the same instances: the mean and the interval are then of the paired differences.

    Raises:
        ValueError: for no scores, other tasks or numbers of instances in `minus`, or a level outside 0 to 1.
    """
    shape = lambda arm: {task: len(row) for task, row in arm.items()}
    if not scores or not all(shape(scores).values()) or (minus is not None and shape(minus) != shape(scores)):
        raise ValueError("scores of at least one instance a task, and the same tasks and instances in both arms")
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, not {level!r}")
    rows = [np.subtract(row, 0 if minus is None else minus[task]) for task, row in scores.items()]
    rng, n = np.random.default_rng(seed), whole("draws", draws, 1)
    drawn = rng.integers(len(rows), size=(n, len(rows)))
    means = np.empty(drawn.shape)
    for t, row in enumerate(rows):
        here = drawn == t
        means[here] = row[rng.integers(len(row), size=(here.sum(), len(row)))].mean(1)
    low, high = np.quantile(means.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Macro(float(np.mean([row.mean() for row in rows])), float(low), float(high))
