"""Document scores: the loss of every document under any ablation, streamed, in batches by length, resumable.

    conditions = {"base": [], "retrieval": scores.top(0.05)}
    done = heads.score_documents(model, "corpus.jsonl", "scores.jsonl", conditions, kind="uniform")

One line of output per document, in the order of the input. A document that cannot be scored has its line, too, with
the reason. Memory does not grow with the corpus: a window of documents is held at a time.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from heads.lab.answers import FULL, batches, losses_in, prepared
from heads.model.weights import decoder_only
from heads.model.zoo import sha256
from heads.names import replacing
from heads.scores import HeadScores, random_heads

WINDOW = 128  # characters of a window for each token of a pass: enough for full batches, little to lose to a kill
HALF = re.compile("[\ud800-\udfff]")

_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

Source = str | Path | Iterable  # a JSON Lines file, or texts and mappings


@dataclass
class Summary:
    """What became of the documents: read = scored + the skipped ones. `split` were longer than the context."""

    read: int = 0
    scored: int = 0
    split: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, record: dict) -> None:
        self.read += 1
        if "skipped" in record:
            self.skipped[record["skipped"]] = self.skipped.get(record["skipped"], 0) + 1
        else:
            self.scored += 1
            self.tokens += record["tokens"]
            self.split += record["pieces"] > 1

    def __str__(self) -> str:
        lost = sum(self.skipped.values())
        why = f" ({', '.join(f'{reason}: {n}' for reason, n in sorted(self.skipped.items()))})" if lost else ""
        split = f" ({self.split} longer than the context: split)" if self.split else ""
        return f"{self.read} documents: {self.scored} scored{split}, {lost} skipped{why}; {self.tokens:,} tokens"


def score_documents(model, documents: Source, out: str | Path, conditions: Mapping, kind: str = "zero", *,
                    text: str = "text", length: int | None = None, tokens: int = 4096, window: int = 8192,
                    shard: tuple[int, int] = (0, 1), progress: bool = True) -> Summary:  # fmt: skip
    """Mean loss per token of every document under every condition, as JSON Lines.

    Each line holds `index` (number of the document in the input), `id` (the document's own, if it has one), `tokens`
    (that were predicted), `pieces` (more than one: it was longer than the context and was split; the pieces are scored
    without each other) and `loss_<condition>` in nats. A document that is empty, unreadable or of one token has
    `skipped` with the reason instead.

    A run that was stopped goes on where it was if it is started again with the same arguments, and leaves the same
    file as one that was not: until it is complete it is called `<out>.partial`.

    Args:
        documents: a path of a JSON Lines file (also .gz), or an iterable of texts or mappings, such as a stream of
            `datasets`. To be resumed it has to come in the same order.
        out: the file to write.
        conditions: name -> heads to ablate (none: the model as it is), or name -> a model, edited as you like.
        kind: of the ablations, as in `heads.ablate`: "zero" or "uniform".
        text: the field that holds the text.
        length: tokens of the longest piece; at most the model's context, 2048 if None.
        tokens: of one forward pass, padding included (memory for logits is tokens times vocabulary).
        window: documents held at once, at most (long ones: fewer, see `WINDOW`); those of similar length are run together.
        shard: (i, n): only documents whose index is i modulo n. The n files together hold every document once.

    Raises:
        LookupError: an unknown kind.
        ValueError: for no documents, an encoder, a bad shard, a length beyond the context; if another process writes to
            `out`; or if `out` or what is left of an earlier run was made with other arguments, from other documents, or is damaged.
        FileNotFoundError: if there is no such file of documents, or no folder to write to.
        OSError: if a compressed file is broken or ends too early.
    """
    length = _checked(model, conditions, length, tokens, window, shard)
    source, out = source_of(documents, out), Path(out)
    models, chosen = prepared(model, conditions, kind)
    run = {
        "model": model.record["name"], "sha256": model.record.get("sha256"), "conditions": chosen, "kind": kind,
        "documents": source and {"name": source.name, "sha256": sha256(source)},
        "text": text, "length": length, "tokens": tokens, "window": window, "shard": list(shard),
    }  # fmt: skip
    partial, about = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.about.json")
    items = _stream(_read_lines(source) if source is not None else documents, text)
    mine = ((i, *item) for i, item in enumerate(items) if i % shard[1] == shard[0])
    with _alone(out):
        if finished := _earlier(out, partial, about, run):
            return finished
        summary = Summary()
        with partial.open("r+b") as file, tqdm(desc="documents", unit="document", disable=not progress or None) as bar:
            for group in _windows(mine, window, WINDOW * tokens):
                records, *found = _cut(model, group, length)
                if not _kept(file, records, summary):
                    for record in _score(model, models, records, *found, tokens):
                        summary.add(record)
                        file.write(_line(record))
                    file.flush()
                bar.update(len(group))
        if not summary.read and shard[1] == 1:
            partial.unlink(), about.unlink()
            raise ValueError("there are no documents: expected a text, or an object that holds one, in each line or item")
        _count(partial, summary.read)
        _write_about(about, {"run": run, "summary": asdict(summary)})
        partial.rename(out)
    return summary


def source_of(documents: Source, out: str | Path) -> Path | None:
    """The path of the documents, None if they are no file, once it can be read from and `out` written to."""
    source, out = Path(documents) if isinstance(documents, (str, Path)) else None, Path(out)
    if isinstance(documents, Mapping) or not isinstance(documents, Iterable | str | Path):
        raise TypeError(f"documents are a file or a list of texts or mappings, not {type(documents).__name__}")
    if source is not None and not source.is_file():
        what = "is a folder, not a file of documents" if source.is_dir() else "does not exist: there is no file of documents"
        raise FileNotFoundError(f"{source} {what}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the file to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} to: create it first")
    if source is not None and out.exists() and out.samefile(source):
        raise ValueError(f"{out} holds the documents themselves: write the scores to another file")
    return source


def masks(path: str | Path, top: float, controls: int) -> tuple[HeadScores, dict[str, list]]:
    """The scores that `HeadScores.save` wrote to `path`, and conditions of them: "base", "masked" (the best, a count or a share
    below 1) and "random 0", ... (heads of the same layers).

    Raises:
        ValueError: for a file that holds no scores.
    """
    try:
        table = HeadScores.load(path)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no head scores: expected a file that HeadScores.save wrote") from None
    best = table.top(top if top < 1 else int(top))
    sets = random_heads(best, table.shape, match="near", n_sets=controls, exclude=table.top(0.2)) if controls else []
    return table, {"base": [], "masked": best, **{f"random {k}": heads for k, heads in enumerate(sets)}}


def _checked(model, conditions, length, tokens, window, shard) -> int:
    """The length of the longest piece, once the arguments make sense."""
    decoder_only(model)
    if any(type(n) is not int for n in (*shard, tokens, window, length or 2)):
        raise TypeError(f"length={length}, tokens={tokens}, window={window}, shard={shard}: expected whole numbers")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard {shard[0]}/{shard[1]}: shards of n are numbered from 0 to n - 1")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length is not None and not 2 <= length <= context:
        raise ValueError(f"length={length}: pieces have from 2 tokens to the {context} of this model's context")
    if min(tokens, window) < 1:
        raise ValueError(f"tokens={tokens} and window={window} must be at least 1")
    return int(min(context, 2048)) if length is None else length


def _alone(out: Path):
    """The lock on `out`, held until the `with` block ends; the system lets go of it when a process is killed."""
    try:
        return FileLock(out.with_name(f".{out.name}.lock")).acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another process is writing {out}: wait for it, or write to another file") from None


def _earlier(out: Path, partial: Path, about: Path, run: dict) -> Summary | None:
    """What a finished run with the same arguments has done; None where there is something left to do."""
    kept = ", ".join(path.name for path in (out, partial, about) if path.exists())
    if not (out.exists() or partial.exists()):
        _write_about(about, {"run": run})
        partial.touch()
        return None
    try:
        record = json.loads(about.read_text(encoding="utf-8"))
        earlier, done = record["run"], Summary(**record["summary"]) if out.exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out}: there is no record of how {kept} was made; write to another file") from None
    if differ := [key for key in run if earlier.get(key) != run[key]]:
        raise ValueError(
            f"{out} was made by a run that differs in: {', '.join(differ)}. Write to another file, or delete it ({kept})"
        )
    if done:
        _count(out, done.read)
    return done


def _count(path: Path, documents: int) -> None:
    with path.open("rb") as file:
        found = sum(1 for _ in file)
    if found != documents:
        raise ValueError(f"{path} holds {found} lines for {documents} documents: delete it and its record, and start again")


def _kept(file, records: list[dict], summary: Summary) -> bool:
    """Whether an earlier run has written the lines of a window, which the summary then counts.

    Only whole windows are kept, so that the batches of the rest are those of an undisturbed run: else the file ends here."""
    start, lines = file.tell(), list(islice(file, len(records)))
    if len(lines) < len(records) or not lines[-1].endswith(b"\n"):
        file.seek(start)
        file.truncate()
        return False
    for n, (line, record) in enumerate(zip(lines, records), summary.read + 1):
        try:
            found = json.loads(line)
            if any(found.get(key, value) != value for key, value in record.items()):
                raise ValueError("of another document")
            summary.add(found)
        except (ValueError, KeyError, TypeError, AttributeError):
            path = Path(file.name)
            raise ValueError(f"{path}, line {n}, is damaged: delete {path.name}, {path.stem}.about.json and start again, "
                             "unless the documents are not those of the first run") from None  # fmt: skip
    return True


def _line(record: dict) -> bytes:
    # an id may hold half a surrogate pair, which JSON can write and UTF-8 cannot: escaped, it is valid JSON again
    return (_json(record) + "\n").encode("utf-8", errors="backslashreplace")


def _write_about(path: Path, record: dict) -> None:
    """In one step: a kill leaves the old record or the new one."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _read_lines(path) -> Iterator:
    """Documents of a JSON Lines file; a line that cannot be read is an error object in their place."""
    path, n = Path(path), 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            for n, line in enumerate(file, 1):
                yield _parsed(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(f"{path} cannot be decompressed after {n} lines ({error}): is it complete? Bring the whole "
                          "file, delete what was written, and start again") from None  # fmt: skip


def _parsed(line: bytes):
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    except (ValueError, RecursionError):  # the latter of brackets without end
        return ValueError("not JSON")


def _stream(documents: Iterable, name: str) -> Iterator[tuple]:
    """(id, text, None) of every document, or (id, None, why not)."""
    for item in documents:
        own = item.get("id") if isinstance(item, Mapping) else None
        found = item.get(name) if isinstance(item, Mapping) else item
        if isinstance(item, ValueError):
            yield None, None, str(item)
        elif not _is_json(own):
            yield None, None, "its id is no JSON"
        elif isinstance(item, Mapping) and name not in item:
            yield own, None, f"no field {name!r}"
        elif not isinstance(found, str):
            yield own, None, f"the text is {type(found).__name__}"
        elif not found.strip():
            yield own, None, "empty"
        elif HALF.search(found):
            yield own, None, "half a surrogate pair"
        else:
            yield own, found, None


def _is_json(item) -> bool:
    try:
        return item is None or isinstance(item, str) or bool(_json(item))
    except (TypeError, ValueError, RecursionError):  # an object; NaN, which Python's JSON can write and nobody else read
        return False


def _windows(items: Iterable[tuple], documents: int, characters: int) -> Iterator[list[tuple]]:
    """Documents in order, so many at a time, or fewer once their texts have so many characters."""
    group, held = [], 0
    for item in items:
        group.append(item)
        held += len(item[2] or "")
        if len(group) == documents or held >= characters:
            yield group
            group, held = [], 0
    if group:
        yield group


def _cut(model, group: list[tuple], length: int) -> tuple[list[dict], list[list[int]], list[int]]:
    """Records of a window of documents, in order, as yet without losses; their pieces, and whose each piece is."""
    texts = [text for _, _, text, reason in group if reason is None]
    some = (texts[start : start + 256] for start in range(0, len(texts), 256))  # a tokenizer notes much about each token
    tokenised = chain.from_iterable(model.tokenizer(part, return_attention_mask=False, verbose=False).input_ids
                                    for part in some)  # fmt: skip
    records, pieces, owners = [], [], []
    for number, (index, own, _, reason) in enumerate(group):
        ids = next(tokenised) if reason is None else []
        parts = [ids[i : i + length] for i in range(0, len(ids), length)]
        parts = [part for part in parts if len(part) > 1]  # a single token at the end has nothing that predicts it
        reason = reason or (None if parts else "one token")
        found = {"skipped": reason} if reason else {"tokens": sum(map(len, parts)) - len(parts), "pieces": len(parts)}
        records.append({"index": index, "id": own} | found)
        pieces += parts
        owners += [number] * len(parts)
    return records, pieces, owners


def _score(model, models: dict, records: list[dict], pieces: list, owners: list[int], tokens: int) -> list[dict]:
    """The records with their losses."""
    totals = {name: torch.zeros(len(records), dtype=torch.float64) for name in models}
    for batch in batches(list(map(len, pieces)), tokens, FULL):
        rows = [pieces[i] for i in batch]
        owner = torch.tensor([owners[i] for i in batch]).repeat_interleave(torch.tensor([len(row) - 1 for row in rows]))
        for name, losses in losses_in(model, models, rows).items():
            totals[name].index_add_(0, owner, losses.double())
    for name, total in totals.items():
        for number, (record, loss) in enumerate(zip(records, total.tolist())):
            if "tokens" in record and math.isfinite(loss):
                record[f"loss_{name}"] = round(loss / record["tokens"], 6)
            elif "tokens" in record:
                why = f"the loss of {name} is not finite"
                records[number] = {"index": record["index"], "id": record["id"], "skipped": why}
    return records
