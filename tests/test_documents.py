"""Document scores: the same losses as one by one, nothing lost, nothing held, the same file after a kill."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import near, plain_of, tiny
from torch.nn.functional import cross_entropy

import heads
from heads import cli
from heads.lab import documents
from heads.lab.answers import FULL, batches, token_losses
from heads.lab.documents import Summary, score_documents

CHOSEN = [(2, 3), (0, 1), (2, 0)]
CONDITIONS = {"base": [], "masked": CHOSEN}
WORDS = "owls lamps brown grey seven doors under a slow river and back again".split()


def corpus(n: int, seed: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    texts = [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (3 + k % 9,), generator=draw)) for k in range(n)]
    return [{"id": f"d{k}", "text": text} for k, text in enumerate(texts)]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, items) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def plain_loss(model, ids: list[int]) -> torch.Tensor:
    row = torch.tensor([ids])
    return cross_entropy(plain_of(model)(row).logits[0, :-1], row[0, 1:], reduction="none")


# --------------------------------------------------------------------------------------- losses


def test_batched_losses_equal_plain_ones_one_by_one(decoder):
    rows = [decoder.tokenizer(item["text"]).input_ids for item in corpus(5)]
    for ids, found in zip(rows, token_losses(decoder, rows)):
        near(found, plain_loss(decoder, ids))


def test_scores_equal_one_by_one_losses_under_every_condition(decoder, tmp_path):
    items = corpus(11)
    done = score_documents(decoder, items, tmp_path / "s", CONDITIONS, "uniform", tokens=150, window=4)
    masked = heads.ablate(decoder, CHOSEN, "uniform")
    for item, record in zip(items, lines(tmp_path / "s"), strict=True):
        ids = decoder.tokenizer(item["text"]).input_ids
        assert record["id"] == item["id"] and record["tokens"] == len(ids) - 1 and record["pieces"] == 1
        near(torch.tensor(record["loss_base"]), plain_loss(decoder, ids).mean())
        near(torch.tensor(record["loss_masked"]), token_losses(masked, [ids])[0].mean())
    assert done.read == done.scored == 11 and not done.skipped and "11 scored" in str(done)


@pytest.mark.parametrize("kind", ["zero", "uniform"])
def test_starting_at_the_first_edited_layer_changes_nothing(decoder, tmp_path, kind):
    """Conditions as lists of heads resume from the clean run; the same as edited models run from the start."""
    sets = {"low": [(0, 1), (3, 2)], "middle": [(1, 0), (2, 3)], "high": [(3, 0), (3, 3)]}
    score_documents(decoder, corpus(4), tmp_path / "a", sets, kind)
    score_documents(decoder, corpus(4), tmp_path / "b", {name: heads.ablate(decoder, s, kind) for name, s in sets.items()})
    for ours, theirs in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        for name in sets:
            assert ours[f"loss_{name}"] == pytest.approx(theirs[f"loss_{name}"], abs=2e-5)


def test_a_condition_may_be_any_edited_model(llama, tmp_path):
    edited = heads.ablate(llama, CHOSEN)
    score_documents(llama, corpus(3), tmp_path / "a", {"x": edited})
    score_documents(llama, corpus(3), tmp_path / "b", {"x": CHOSEN}, "zero")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_a_long_document_is_split_and_says_so(llama, tmp_path):
    (item,) = corpus(1)
    ids = llama.tokenizer(item["text"]).input_ids
    done = score_documents(llama, [item["text"], "ab"], tmp_path / "s", {"base": []}, length=7)
    record = lines(tmp_path / "s")[0]
    pieces = [ids[i : i + 7] for i in range(0, len(ids), 7)]
    expected = torch.cat([plain_loss(llama, piece) for piece in pieces if len(piece) > 1])
    assert record["pieces"] == len(pieces) > 1 and record["tokens"] == len(expected) and record["id"] is None
    near(torch.tensor(record["loss_base"]), expected.mean())
    assert done.split == 1 and "1 longer than the context: split" in str(done)


def test_batches_respect_the_budget_and_hold_everything():
    rows = [[0] * n for n in (5, 40, 7, 7, 100, 1, 12)]
    found = batches([len(row) for row in rows], 30, FULL)
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert all(len(batch) == 1 or max(len(rows[i]) for i in batch) * len(batch) <= 30 for batch in found)
    assert len(found) < 7


def test_windows_end_at_so_many_documents_or_characters():
    items = [(i, None, None if i == 1 else "x" * n, None) for i, n in enumerate((3, 0, 9, 30, 2, 2, 2, 2))]
    found = [[item[0] for item in window] for window in documents._windows(items, 3, 20)]
    assert found == [[0, 1, 2], [3], [4, 5, 6], [7]]


def test_a_condition_on_an_edited_model_keeps_its_edits(llama, tmp_path):
    """Those below the condition's first layer, too, which a clean start there would spare."""
    edited, late = heads.ablate(llama, [(0, 1)]), torch.tensor([[3, 0]])
    score_documents(edited, corpus(3), tmp_path / "a", {"base": [], "late": late})
    score_documents(llama, corpus(3), tmp_path / "b", {"base": edited, "late": heads.ablate(edited, [(3, 0)])})
    for ours, theirs in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        for name in ("base", "late"):
            assert ours[f"loss_{name}"] == pytest.approx(theirs[f"loss_{name}"], abs=2e-5)


# ------------------------------------------------------------------------------ nothing is lost


def test_what_cannot_be_scored_has_its_line_and_its_count(llama, tmp_path):
    good = json.dumps({"id": 1, "text": "two owls"}).encode()
    bad = [b"{", b'{"text": ""}', b'{"text": "  \\n"}', b'{"id": 9}', b'{"text": 7}', b'{"text": "a"}',
           b'{"text": "\xff\xfe"}', b"", b"[1]"]  # fmt: skip
    (tmp_path / "in").write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    done = score_documents(llama, tmp_path / "in", tmp_path / "s", CONDITIONS)
    found = lines(tmp_path / "s")
    assert [record["index"] for record in found] == list(range(11))
    assert [record.get("skipped") for record in found] == [
        None, "not JSON", "empty", "empty", "no field 'text'", "the text is int", "one token", "not UTF-8", "not JSON",
        "the text is list", None,
    ]  # fmt: skip
    reasons = {"not JSON": 2, "empty": 2} | dict.fromkeys(
        ["no field 'text'", "the text is int", "one token", "not UTF-8", "the text is list"], 1
    )
    assert done == Summary(11, 2, 0, 14, reasons)
    assert "9 skipped" in str(done) and "empty: 2" in str(done)


def test_a_loss_that_is_not_finite_is_a_reason_too(llama, tmp_path):
    broken = heads.Steering(llama, torch.full((4, 4, 8), 1e38)).edited
    done = score_documents(llama, corpus(2), tmp_path / "s", {"base": [], "broken": broken})
    assert done.scored == 0 and done.skipped == {"the loss of broken is not finite": 2}


def test_compressed_files_and_other_fields(llama, tmp_path):
    items = [{"content": item["text"]} for item in corpus(3)]
    with gzip.open(tmp_path / "in.gz", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    assert score_documents(llama, tmp_path / "in.gz", tmp_path / "s", CONDITIONS, text="content").scored == 3


def test_half_a_surrogate_pair_and_brackets_without_end(llama, tmp_path):
    """JSON can write both; UTF-8 cannot hold the first, nor Python read the second."""
    halves = ['{"id": "\\ud800", "text": "two \\ud800 owls"}', '{"id": "\\ud800", "text": "two owls"}']
    (tmp_path / "in").write_text("\n".join([*halves, "[" * 200_000]))
    done = score_documents(llama, tmp_path / "in", tmp_path / "s", CONDITIONS)
    assert done.scored == 1 and done.skipped == {"half a surrogate pair": 1, "not JSON": 1}
    assert [record["id"] for record in lines(tmp_path / "s")] == ["\ud800", "\ud800", None]


@pytest.mark.parametrize("n", [1, 3, 4])
def test_shards_partition_exactly(llama, tmp_path, n):
    items, found = corpus(10), []
    score_documents(llama, items, tmp_path / "all", CONDITIONS)
    for i in range(n):
        score_documents(llama, iter(items), tmp_path / f"{i}", CONDITIONS, shard=(i, n), window=2)
        found += lines(tmp_path / f"{i}")
    whole = lines(tmp_path / "all")
    found.sort(key=lambda record: record["index"])
    assert [(r["index"], r["id"], r["tokens"]) for r in found] == [(r["index"], r["id"], r["tokens"]) for r in whole]
    near(torch.tensor([r["loss_masked"] for r in found]), torch.tensor([r["loss_masked"] for r in whole]))


# ------------------------------------------------------------------------------ stopped and resumed


class Killed(Exception):
    pass


def killed_after(items, n: int):
    for i, item in enumerate(items):
        if i == n:
            raise Killed
        yield item


@pytest.mark.parametrize("after", [0, 3, 4, 9, 13])
@pytest.mark.parametrize("torn", [b"", b'{"index": 99, "id'])
def test_a_run_that_was_killed_leaves_the_same_file(llama, tmp_path, after, torn):
    items = [*corpus(6), {"text": ""}, *corpus(7, seed=1)]
    whole = score_documents(llama, items, tmp_path / "whole", CONDITIONS, window=3)
    out = tmp_path / "s"
    with pytest.raises(Killed):
        score_documents(llama, killed_after(items, after), out, CONDITIONS, window=3)
    partial = tmp_path / "s.partial"
    assert not out.exists() and partial.exists()
    with partial.open("ab") as file:
        file.write(torn)  # a line that was being written
    again = score_documents(llama, items, out, CONDITIONS, window=3)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and again == whole and not partial.exists()


def test_lines_beyond_the_last_whole_window_are_done_again(llama, tmp_path):
    items = corpus(7)
    score_documents(llama, items, tmp_path / "whole", CONDITIONS, window=3)
    kept = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    with pytest.raises(Killed):
        score_documents(llama, killed_after(items, 0), tmp_path / "s", CONDITIONS, window=3)
    (tmp_path / "s.partial").write_bytes(b"".join(kept[:5]))
    score_documents(llama, items, tmp_path / "s", CONDITIONS, window=3)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_run_is_not_done_again_and_another_one_is_refused(llama, tmp_path):
    items, out = corpus(4), tmp_path / "s"
    done = score_documents(llama, items, out, CONDITIONS)
    assert score_documents(llama, killed_after(items, 0), out, CONDITIONS) == done
    for change in ({"kind": "uniform"}, {"length": 9}, {"window": 7}, {"conditions": {"base": []}}, {"shard": (0, 2)}):
        with pytest.raises(ValueError, match=f"differs in: {next(iter(change))}"):
            score_documents(llama, items, out, **{"conditions": CONDITIONS} | change)
    with pytest.raises(ValueError, match="differs in: model"):
        score_documents(tiny("qwen3"), items, out, CONDITIONS)


def test_other_documents_are_another_run(llama, tmp_path):
    """Else the scores of one file would be taken for those of the other."""
    out = tmp_path / "s"
    write(tmp_path / "a", corpus(3))
    write(tmp_path / "b", corpus(3, seed=1))
    score_documents(llama, tmp_path / "a", out, CONDITIONS)
    for change in ("b", "a"):
        write(tmp_path / "a", corpus(4))
        with pytest.raises(ValueError, match="differs in: documents"):
            score_documents(llama, tmp_path / change, out, CONDITIONS)


def test_other_documents_of_the_same_name_and_size_are_another_run(llama, tmp_path):
    write(tmp_path / "in", corpus(3))
    size = (tmp_path / "in").stat().st_size
    score_documents(llama, tmp_path / "in", tmp_path / "s", CONDITIONS)
    (tmp_path / "in").write_text((tmp_path / "in").read_text().replace('"d1"', '"e1"'))
    assert (tmp_path / "in").stat().st_size == size
    with pytest.raises(ValueError, match="differs in: documents"):
        score_documents(llama, tmp_path / "in", tmp_path / "s", CONDITIONS)


def test_a_resumed_stream_of_other_documents_is_refused(llama, tmp_path):
    with pytest.raises(Killed):
        score_documents(llama, killed_after(corpus(7), 6), tmp_path / "s", CONDITIONS, window=3)
    others = [item | {"id": f"other {item['id']}"} for item in corpus(7)]
    with pytest.raises(ValueError, match="line 1, is damaged.* unless the documents are not those of the first run"):
        score_documents(llama, others, tmp_path / "s", CONDITIONS, window=3)


def test_a_resumed_stream_of_other_texts_without_ids_is_refused(llama, tmp_path):
    """How long each document is in tokens was written down."""
    first, other = ([item["text"] for item in corpus(7, seed)] for seed in (0, 2))
    with pytest.raises(Killed):
        score_documents(llama, killed_after(first, 6), tmp_path / "s", CONDITIONS, window=3)
    before = (tmp_path / "s.partial").read_bytes()
    with pytest.raises(ValueError, match="line [12], is damaged.* unless the documents are not those of the first run"):
        score_documents(llama, other, tmp_path / "s", CONDITIONS, window=3)
    assert (tmp_path / "s.partial").read_bytes() == before
    score_documents(llama, first, tmp_path / "s", CONDITIONS, window=3)
    score_documents(llama, first, tmp_path / "whole", CONDITIONS, window=3)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_id_that_is_no_json_is_a_reason(llama, tmp_path):
    """NaN is none, though Python reads and writes it."""
    (tmp_path / "in").write_text('{"id": NaN, "text": "two owls"}\n{"id": 2, "text": "two owls"}\n{"id": 3, "x": Infinity, '
                                 '"text": "two owls"}\n', encoding="utf-8")  # fmt: skip
    assert score_documents(llama, tmp_path / "in", tmp_path / "s", CONDITIONS).skipped == {"its id is no JSON": 1}
    items = [{"id": own, "text": "two owls"} for own in (float("nan"), [float("inf")], {1, 2}, object(), np.int64(3), 0, [1], "x")]
    assert score_documents(llama, items, tmp_path / "t", CONDITIONS).skipped == {"its id is no JSON": 5}

    def strict(name):
        raise AssertionError(name)

    for line in (tmp_path / "s").read_text(encoding="utf-8").splitlines() + (tmp_path / "t").read_text().splitlines():
        json.loads(line, parse_constant=strict)


def test_no_documents_are_refused_and_an_empty_shard_is_not(llama, tmp_path):
    (tmp_path / "in").touch()
    for empty in ([], iter(()), tmp_path / "in"):
        with pytest.raises(ValueError, match="there are no documents"):
            score_documents(llama, empty, tmp_path / "s", CONDITIONS)
    assert not list(tmp_path.glob("s*"))
    assert score_documents(llama, corpus(1), tmp_path / "s", CONDITIONS, shard=(1, 2)).read == 0
    assert (tmp_path / "s").read_bytes() == b""


def test_conditions_may_be_arrays_of_heads(llama, tmp_path):
    for n, given in enumerate((CHOSEN, np.array(CHOSEN), torch.tensor(CHOSEN), np.array(CHOSEN, dtype=np.uint8))):
        score_documents(llama, corpus(3), tmp_path / f"{n}", {"masked": given})
        assert (tmp_path / f"{n}").read_bytes() == (tmp_path / "0").read_bytes()
    for wrong in (np.array([2, 3]), torch.ones(4, 4).bool(), np.array([[0.5, 1.0]]), torch.rand(2, 2)):
        with pytest.raises(TypeError, match="a head is a pair of whole numbers"):
            score_documents(llama, corpus(3), tmp_path / "x", {"masked": wrong})
    assert not list(tmp_path.glob("x*"))


def test_a_second_process_on_the_same_output_is_refused(llama, tmp_path):
    write(tmp_path / "in", corpus(3))
    code = "import sys, heads; heads.score_documents(heads.load('tiny-llama', device='cpu'), *sys.argv[1:], {'base': []})"
    call = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "s")]

    def stream():
        yield from corpus(2)
        with pytest.raises(ValueError, match="another process is writing"):
            score_documents(llama, corpus(2), tmp_path / "s", CONDITIONS)
        found = subprocess.run(call, capture_output=True, text=True)
        assert found.returncode and "another process is writing" in found.stderr
        yield from corpus(1)

    assert score_documents(llama, stream(), tmp_path / "s", CONDITIONS, window=2).read == 3 == len(lines(tmp_path / "s"))
    assert score_documents(llama, corpus(3), tmp_path / "t", CONDITIONS).read == 3  # another output is free


@pytest.mark.parametrize("name", ["s", "s.partial"])
def test_lines_are_counted_against_the_documents(llama, tmp_path, name):
    """A file that was doubled is not called complete."""
    items = corpus(4)
    score_documents(llama, items, tmp_path / "s", CONDITIONS, window=2)
    if name == "s.partial":  # as before the last step
        (tmp_path / "s").rename(tmp_path / "s.partial")
    doubled = (tmp_path / name).read_bytes() * 2
    (tmp_path / name).write_bytes(doubled)
    with pytest.raises(ValueError, match=f"{name} holds 8 lines for 4 documents"):
        score_documents(llama, items, tmp_path / "s", CONDITIONS, window=2)
    assert (tmp_path / name).read_bytes() == doubled


def test_files_that_are_not_its_own_stay_as_they_are(llama, tmp_path):
    write(tmp_path / "in", corpus(3))
    (tmp_path / "mine").write_text("precious")
    before = (tmp_path / "in").read_bytes()
    with pytest.raises(ValueError, match="holds the documents themselves"):
        score_documents(llama, tmp_path / "in", tmp_path / "in", CONDITIONS)
    with pytest.raises(ValueError, match="no record of how mine was made"):
        score_documents(llama, tmp_path / "in", tmp_path / "mine", CONDITIONS)
    (tmp_path / "mine.about.json").write_text('{"run": ')  # torn
    with pytest.raises(ValueError, match="no record of how mine, mine.about.json was made"):
        score_documents(llama, tmp_path / "in", tmp_path / "mine", CONDITIONS)
    assert (tmp_path / "in").read_bytes() == before and (tmp_path / "mine").read_text() == "precious"


def test_a_damaged_partial_file_names_its_line(llama, tmp_path):
    items = corpus(7)
    with pytest.raises(Killed):
        score_documents(llama, killed_after(items, 6), tmp_path / "s", CONDITIONS, window=3)
    partial = tmp_path / "s.partial"
    kept = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([kept[0], b"\0\0\0\n", *kept[2:]]))  # what a power cut leaves on some file systems
    with pytest.raises(ValueError, match=r"s.partial, line 2, is damaged: delete s.partial, s.about.json"):
        score_documents(llama, items, tmp_path / "s", CONDITIONS, window=3)


def test_a_compressed_file_that_is_not_whole_is_named(llama, tmp_path):
    whole = gzip.compress("".join(json.dumps(item) + "\n" for item in corpus(60)).encode())
    for k, (part, why) in enumerate([(whole[: len(whole) // 2], "end-of-stream"), (b"no gzip at all", "after 0 lines")]):
        (tmp_path / "in.gz").write_bytes(part)
        with pytest.raises(OSError, match=f"in.gz cannot be decompressed .*{why}.*: is it complete"):
            score_documents(llama, tmp_path / "in.gz", tmp_path / f"{k}", {"base": []}, window=20)


def test_documents_are_never_all_held(llama, tmp_path, monkeypatch):
    given, lead = [0], []
    score = documents._score

    def stream():
        for item in corpus(40):
            given[0] += 1
            yield item

    def watched(*args):
        lead.append(given[0])
        return score(*args)

    monkeypatch.setattr(documents, "_score", watched)
    score_documents(llama, stream(), tmp_path / "s", CONDITIONS, window=4)
    assert lead == list(range(4, 41, 4)), "a window is scored before the next document is asked for"


# ------------------------------------------------------------------------------------ bad input


def test_bad_arguments_are_refused_before_anything_is_written(llama, tmp_path):
    for wrong, message in [
        ({"shard": (2, 2)}, "numbered from 0"), ({"length": 1}, "from 2"), ({"length": 9999}, "context"),
        ({"tokens": 0}, "at least 1"), ({"conditions": {}}, "no conditions"), ({"conditions": [(0, 1)]}, "no conditions"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            score_documents(llama, corpus(1), tmp_path / "s", **{"conditions": CONDITIONS} | wrong)
    for wrong in ({"tokens": 1.5}, {"window": None}, {"length": 8.0}, {"shard": (0, "2")}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*: expected whole numbers"):
            score_documents(llama, corpus(1), tmp_path / "s", CONDITIONS, **wrong)
    for wrong in (None, 3, {"text": "two owls"}):
        with pytest.raises(TypeError, match=f"documents are a file or a list .* not {type(wrong).__name__}"):
            score_documents(llama, wrong, tmp_path / "s", CONDITIONS)
    with pytest.raises(LookupError, match="no kind of ablation 'all'. Known: zero, mean, resample, uniform"):
        score_documents(llama, corpus(1), tmp_path / "s", CONDITIONS, kind="all")
    with pytest.raises(ValueError, match="encoder"):
        score_documents(tiny("bert"), corpus(1), tmp_path / "s", CONDITIONS)
    for documents_, out, message in [
        (tmp_path / "nothing", tmp_path / "s", "no file of documents"), (tmp_path, tmp_path / "s", "is a folder"),
        (corpus(1), tmp_path / "no" / "s", "no folder .*no to write s to"),
    ]:  # fmt: skip
        with pytest.raises(FileNotFoundError, match=message):
            score_documents(llama, documents_, out, CONDITIONS)
    with pytest.raises(ValueError, match="is a folder: name the file"):
        score_documents(llama, corpus(1), tmp_path, CONDITIONS)
    with pytest.raises(IndexError):
        score_documents(llama, corpus(1), tmp_path / "s", {"x": [(9, 9)]})
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in", corpus(5))
    heads.HeadScores(torch.rand(4, 4, generator=torch.Generator().manual_seed(0))).save(tmp_path / "scores.json")
    words = ["score-documents", str(tmp_path / "in"), str(tmp_path / "out"), "--scores", str(tmp_path / "scores.json")]
    words += ["--model", "tiny-llama", "--device", "cpu", "--top", "2", "--controls", "2", "--shard"]
    monkeypatch.setattr(sys, "argv", ["heads", *words, "1/2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "2 documents: 2 scored" in capsys.readouterr().out
    assert set(lines(tmp_path / "out")[0]) >= {"loss_base", "loss_masked", "loss_random 0", "loss_random 1"}


@pytest.mark.parametrize(
    "options, message",
    [
        ("--shard one", "expected i/n"), ("--shard 2/2", "numbered from 0"), ("--top 0", "--top 0"),
        ("--top 2.5", "--top 2.5"), ("--controls -1", "--controls -1"), ("--scores in", "in holds no head scores"),
        ("--scores no", "'no'"),
        ("--scores large", "(6, 9) (layers, heads), but tiny-llama"), ("--device cuda:9", "device='cuda:9'"),
        ("--scores other", "was found in tiny-gpt2"), ("--field body", "no field 'body': 2"), ("--model tiny-lama", "Did you mean 'tiny-llama'"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", corpus(2))
    for name, shape in (("scores", (4, 4)), ("large", (6, 9))):
        heads.HeadScores(torch.rand(*shape, generator=torch.Generator().manual_seed(0))).save(tmp_path / name)
    heads.HeadScores(torch.ones(4, 4), model={"name": "tiny-gpt2", "sha256": "0" * 64}).save(tmp_path / "other")
    words = "score-documents in out --scores scores --model tiny-llama --device cpu --top 2 " + options
    monkeypatch.setattr(sys, "argv", ["heads", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    found = capsys.readouterr()
    assert stop.value.code == 2 and message in found.out + found.err and "Traceback" not in found.err
    assert found.err.count("heads: ") == 1


def test_scores_of_a_model_serve_its_derivative_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", corpus(2))
    heads.HeadScores(torch.ones(4, 4), model={"name": "tiny-gpt2", "sha256": "0" * 64}).save(tmp_path / "other")
    words = "score-documents in out --scores other --model tiny-llama --device cpu --top 2 --derivative"
    monkeypatch.setattr(sys, "argv", ["heads", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and len(lines(tmp_path / "out")) == 2


def test_stopped_by_the_keyboard_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    write(tmp_path / "in", corpus(1))
    heads.HeadScores(torch.ones(4, 4)).save(tmp_path / "scores")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "score_documents", interrupted)
    words = "score-documents in out --scores scores --model tiny-llama --device cpu"
    monkeypatch.setattr(sys, "argv", ["heads", *words.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and "the same command goes on from out.partial" in capsys.readouterr().err
