"""Needle in a haystack: a fact hidden in unrelated text, and a question that only it answers.

The task of Kamradt (2023) as Wu et al. (2024, arXiv 2404.15574) use it: the haystack is cut to length,
the needle goes in at a depth, after a full stop, and the answer's place among the tokens is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from heads.names import count, data, known

FORMATS = ("stem", "chat")


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer.

    `ids[0, span[0]:span[1]]` are the tokens of the answer where it stands in the prompt; `answer_ids` are
    the tokens that continue the prompt if the answer is given.
    """

    ids: torch.Tensor  # [1, position]
    span: tuple[int, int]
    answer: str
    answer_ids: torch.Tensor  # [token]
    name: str
    form: str
    length: int  # tokens asked for
    depth: float  # share of the haystack before the needle

    @property
    def copied(self) -> torch.Tensor:
        """Token ids of the answer as they stand in the prompt, `[token]`."""
        return self.ids[0, self.span[0] : self.span[1]]


@cache
def needles(which: str | None = None) -> tuple[dict, ...]:
    """The needles written for this project (data/needles.md): "detect", "evaluate", or all."""
    rows = tuple(json.loads(line) for line in data("needles.jsonl").splitlines() if line)
    if which is not None:
        known("set of needles", which, sorted({row["set"] for row in rows}))
    return tuple(row for row in rows if which in (None, row["set"]))


def haystack(source: str | Path | Iterable[str] | None = None) -> str:
    """Text to hide a needle in, white space folded.

    Args:
        source: None for Python's own help topics (`pydoc_data.topics`, text that is on every machine), a
            file's path, or an iterable of texts.
    """
    if source is None:
        from pydoc_data.topics import topics

        source = (topics[name] for name in sorted(topics))
    elif isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"haystack {str(source)!r} is not a file: give a path, a list of texts, or None")
        source = [path.read_text(encoding="utf-8")]
    elif not isinstance(source, Iterable):
        raise TypeError(f"a haystack is a path, an iterable of texts, or None, got {type(source).__name__}")
    return re.sub(r"\s+", " ", " ".join(source)).strip()


def needle(model, lengths: Sequence[int] = (500,), depths: Sequence[float] = (0.1, 0.5, 0.9), which: str = "detect",
           form: str = "stem", source: str | Path | Iterable[str] | None = None, buffer: int = 60,
           chosen: Iterable[dict] | None = None, limit: int | None = None, seed: int = 0) -> list[Sample]:  # fmt: skip
    """Needle prompts, lengths x depths, cycling through the needles.

    Args:
        model: a loaded model (for its tokenizer).
        lengths: tokens of the whole prompt, about.
        depths: where the needle stands, 0 (start) to 1 (end).
        which: the set of needles; evaluation must not use the needles of detection.
        form: "stem" ends the prompt with the start of the needle's sentence, which a small base-like model
            can continue; "chat" asks the question through the model's chat template.
        source: as in `haystack`.
        buffer: tokens kept free for question and answer (200 in the paper, at 1k to 50k tokens).
        chosen: needles (dicts with needle, stem, answer, question, id) instead of the project's.
        limit: at most so many samples, taken evenly over lengths x depths.
        seed: where in the haystack each sample starts.

    Raises:
        LookupError: an unknown form or set. ValueError: a depth or length that cannot be met, or nothing asked for.
    """
    known("form of a needle prompt", form, FORMATS)
    count("needle", limit)
    tokenizer = model.tokenizer
    if form == "chat" and not tokenizer.chat_template:
        raise ValueError(f"{model.record['name']} has no chat template: use form='stem'")
    grid = [(length, depth) for length in lengths for depth in depths]
    if bad := [depth for _, depth in grid if not 0 <= depth <= 1]:
        raise ValueError(f"depth {bad[0]} is not between 0 and 1")
    if limit is not None and limit < len(grid):
        grid = [grid[round(i * (len(grid) - 1) / max(limit - 1, 1))] for i in range(limit)]
    rows = list(chosen) if chosen is not None else list(needles(which))
    if not (grid and rows):
        raise ValueError("no needle prompts: give at least one of lengths, of depths and of chosen needles")
    hay = tokenizer(haystack(source), add_special_tokens=False, verbose=False).input_ids
    starts = torch.randint(len(hay), (len(grid),), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        _sample(tokenizer, rows[i % len(rows)], hay, start, length, depth, form, buffer)
        for i, ((length, depth), start) in enumerate(zip(grid, starts))
    ]


def _sample(tokenizer, row, hay, start, length, depth, form, buffer) -> Sample:
    room = length - buffer - len(tokenizer(row["needle"]).input_ids)
    if room < 20:
        raise ValueError(f"a prompt of {length} tokens leaves {room} for the haystack: ask for at least {length - room + 20}")
    if room > len(hay):
        raise ValueError(f"the haystack holds {len(hay)} tokens, {room} are needed: give a longer source or shorter length")
    start = min(start, len(hay) - room)
    cut = _full_stop(tokenizer, hay[start : start + room], depth)
    before = tokenizer.decode(hay[start : start + cut]).strip()
    after = tokenizer.decode(hay[start + cut : start + room]).strip()
    context = " ".join(part for part in (before, row["needle"], after) if part)
    if form == "stem":
        prompt, lead = f"{context} {row['stem']}", " "
    else:
        message = [{"role": "user", "content": f"{context}\n\nAnswer from the text above. {row['question']}"}]
        prompt, lead = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), ""
    ids, answer_ids = continuation(tokenizer, prompt, lead + row["answer"], special=form == "stem")
    ahead = prompt[: prompt.find(context) + len(f"{before} " if before else "")].rstrip()  # the haystack may hold the answer, too
    span = find_span(tokenizer, ids[0].tolist(), row["answer"], ahead, special=form == "stem")
    return Sample(ids, span, row["answer"], answer_ids, row["id"], form, length, depth)


def _full_stop(tokenizer, hay: list[int], depth: float) -> int:
    """Insertion point at a depth, walked back to after the previous full stop (0 if there is none)."""
    cut = round(len(hay) * depth)
    texts = tokenizer.batch_decode([[token] for token in hay[:cut]])
    return next((i + 1 for i in range(cut - 1, -1, -1) if texts[i].endswith(".")), 0)


def continuation(tokenizer, prompt: str, answer: str, special: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a prompt `[1, position]` and of the answer that continues it `[token]`."""
    ids = tokenizer(prompt, add_special_tokens=special, verbose=False).input_ids
    if special and ids and ids[-1] in tokenizer.all_special_ids:  # some tokenizers close the text
        ids = ids[:-1]
    return torch.tensor([ids]), torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids)


def find_span(tokenizer, ids: list[int], answer: str, ahead: str = "", special: bool = True) -> tuple[int, int]:
    """Where the answer's tokens stand in a prompt: the first exact match, with or without a leading space;
    else the released code's rule, the first window of the answer's length that holds over 90 % of its
    distinct tokens.

    Args:
        ahead: the text before the sentence that holds the answer: what stands there does not count.
        special: whether the prompt begins with the tokenizer's special tokens.

    Raises:
        ValueError: if neither finds it.
    """
    forms = [tokenizer(text, add_special_tokens=False).input_ids for text in (f" {answer}", answer)]
    start = continuation(tokenizer, ahead, answer, special)[0].shape[1] if ahead else 0
    for form in forms:
        for i in range(start, len(ids) - len(form) + 1):
            if ids[i : i + len(form)] == form:
                return i, i + len(form)
    wanted, n = set(forms[0]), len(forms[0])
    for i in range(start, len(ids) - n + 1):
        if len(wanted & set(ids[i : i + n])) / len(wanted) > 0.9:
            return i, i + n
    raise ValueError(f"the answer {answer!r} was not found among the prompt's tokens")
