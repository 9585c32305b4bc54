"""Document scores: the loss of every document under any ablation, streamed, in batches by length, resumable.

    conditions = {"base": [], "retrieval": scores.top(0.05)}
    done = heads.score_documents(model, "corpus.jsonl", "scores.jsonl", conditions, kind="uniform")

One line of output per document, in the order of the input. A document that cannot be scored has its line, too, with
the reason. Memory does not grow with the corpus: `window` documents are held at a time.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from heads.lab.answers import batches, losses_of, prepared


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


def score_documents(model, documents, out, conditions: Mapping, kind: str = "zero", *, text: str = "text",
                    length: int | None = None, tokens: int = 4096, window: int = 256, shard: tuple[int, int] = (0, 1),
                    progress: bool = True) -> Summary:  # fmt: skip
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
        window: documents held at once; those of similar length are run together.
        shard: (i, n): only documents whose index is i modulo n. The n files together hold every document once.

    Raises:
        ValueError: for an encoder, an unknown kind, a bad shard, a length beyond the context, or if `out` or
            what is left of an earlier run was made with other arguments or from another file of documents.
        FileNotFoundError: if there is no such file of documents, or no folder to write to.
        OSError: if a compressed file is broken or ends too early.
    """
    length = _checked(model, conditions, length, tokens, window, shard)
    source = source_of(documents, out)
    pairs = prepared(model, conditions, kind)
    models, chosen = ({name: pair[k] for name, pair in pairs.items()} for k in (0, 1))
    run = {
        "model": model.record["name"], "sha256": model.record.get("sha256"),
        "documents": None if source is None else {"name": source.name, "bytes": source.stat().st_size},
        "conditions": chosen, "kind": kind,
        "text": text, "length": length, "tokens": tokens, "window": window, "shard": list(shard),
    }  # fmt: skip
    out = Path(out)
    partial, about = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.about.json")
    summary, finished = _resume(out, partial, about, run, window)
    if finished:
        return summary
    items = _stream(_read_lines(source) if source is not None else documents, text)
    mine = islice(((i, *item) for i, item in enumerate(items) if i % shard[1] == shard[0]), summary.read, None)
    # an id may hold half a surrogate pair, which JSON can write and UTF-8 cannot: escaped, it is valid JSON again
    with partial.open("a", encoding="utf-8", errors="backslashreplace") as file, tqdm(
        initial=summary.read, desc="documents", unit="document", disable=None if progress else True
    ) as bar:
        while group := list(islice(mine, window)):
            for record in _score(model, models, group, length, tokens):
                summary.add(record)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(group))
    _write_about(about, {"run": run, "summary": asdict(summary)})
    partial.rename(out)
    return summary


def source_of(documents, out) -> Path | None:
    """The path of the documents, None if they are no file, once it can be read from and `out` written to."""
    source, out = Path(documents) if isinstance(documents, (str, Path)) else None, Path(out)
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


def _checked(model, conditions, length, tokens, window, shard) -> int:
    """The length of the longest piece, once the arguments make sense."""
    if model.anatomy.encoder:
        raise ValueError(f"{model.record['name']} is an encoder: it predicts no next token, so a document has no such loss")
    if not conditions:
        raise ValueError("no conditions: give a dict of name -> heads, for example {'base': [], 'top': scores.top(0.05)}")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard {shard[0]}/{shard[1]}: shards of n are numbered from 0 to n - 1")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length is not None and not 2 <= length <= context:
        raise ValueError(f"length={length}: pieces have from 2 tokens to the {context} of this model's context")
    if min(tokens, window) < 1:
        raise ValueError(f"tokens={tokens} and window={window} must be at least 1")
    return int(min(context, 2048)) if length is None else length


def _resume(out: Path, partial: Path, about: Path, run: dict, window: int) -> tuple[Summary, bool]:
    """What an earlier run with the same arguments has done, and whether it was all.

    Only whole windows count, so that the batches of the rest are those of an undisturbed run."""
    summary = Summary()
    if not (out.exists() or partial.exists()):
        _write_about(about, {"run": run})
        return summary, False
    kept = ", ".join(path.name for path in (out, partial, about) if path.exists())
    try:
        record = json.loads(about.read_text())
        earlier = record["run"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{out}: there is no record of how {kept} was made; write to another file") from None
    if differ := [key for key in run if earlier.get(key) != run[key]]:
        raise ValueError(
            f"{out} was made by a run that differs in: {', '.join(differ)}. Write to another file, or delete it ({kept})"
        )
    if out.exists():
        return Summary(**record["summary"]), True
    whole, end = 0, 0
    with partial.open("rb") as file:
        for n, line in enumerate(iter(file.readline, b""), 1):
            if n % window == 0 and line.endswith(b"\n"):
                whole, end = n, file.tell()
    with partial.open("rb+") as file:
        file.truncate(end)
        for n, line in enumerate(islice(file, whole), 1):
            try:
                summary.add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{partial}, line {n}, is damaged: delete {kept} and start again") from None
    return summary, False


def _write_about(path: Path, record: dict) -> None:
    """In one step: a kill leaves the old record or the new one."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(aside, path)


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
    except UnicodeDecodeError as error:
        return error
    except (ValueError, RecursionError):  # the latter of brackets without end
        return ValueError("not JSON")


def _stream(documents: Iterable, name: str) -> Iterator[tuple]:
    """(id, text, None) of every document, or (id, None, why not)."""
    for item in documents:
        own = item.get("id") if isinstance(item, Mapping) else None
        found = item.get(name) if isinstance(item, Mapping) else item
        if isinstance(item, UnicodeDecodeError):
            yield None, None, "not UTF-8"
        elif isinstance(item, ValueError):
            yield None, None, "not JSON"
        elif isinstance(item, Mapping) and name not in item:
            yield own, None, f"no field {name!r}"
        elif not isinstance(found, str):
            yield own, None, f"the text is {type(found).__name__}"
        elif not found.strip():
            yield own, None, "empty"
        elif any("\ud800" <= c <= "\udfff" for c in found):
            yield own, None, "half a surrogate pair"
        else:
            yield own, found, None


def _score(model, models: dict, group: list[tuple], length: int, tokens: int) -> list[dict]:
    """Records of a window of documents, in order."""
    records, pieces = [], []
    for number, (index, own, text, reason) in enumerate(group):
        ids = model.tokenizer(text, verbose=False).input_ids if reason is None else []
        reason = reason or ("one token" if len(ids) < 2 else None)
        parts = [ids[i : i + length] for i in range(0, len(ids), length)]
        parts = [part for part in parts if len(part) > 1]  # a single token at the end has nothing that predicts it
        record = {"index": index, "id": own} | ({"skipped": reason} if reason else {"tokens": 0, "pieces": len(parts)})
        records.append(record)
        pieces += [(number, part) for part in parts if not reason]
    totals = {name: Counter() for name in models}
    for batch in batches(pieces, tokens):
        for name, found in losses_of(model, models, [ids for _, ids in batch]).items():
            for (number, _), losses in zip(batch, found):
                totals[name][number] += losses.double().sum().item()
        for number, ids in batch:
            records[number]["tokens"] += len(ids) - 1
    for number, record in enumerate(records):
        means = {name: totals[name][number] / record["tokens"] for name in models} if record.get("tokens") else {}
        if bad := [name for name, mean in means.items() if not math.isfinite(mean)]:
            why = f"the loss of {bad[0]} is not finite"
            records[number] = {"index": record["index"], "id": record["id"], "skipped": why}
        else:
            record |= {f"loss_{name}": round(mean, 6) for name, mean in means.items()}
    return records
