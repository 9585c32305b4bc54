"""Names that a user gives: one way to be wrong, and a façade that hands out each when it is first used."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import heads
from heads import names


def test_a_known_name_is_returned():
    assert names.known("kind", "zero", ("zero", "mean")) == "zero"
    assert names.known("reference", None, (None, "mean")) is None
    assert names.known("template", 2, range(3)) == 2


@pytest.mark.parametrize("given, said", [
    ("zeroo", "no kind 'zeroo'. Did you mean 'zero'? Known: zero, mean, 3"),
    ("xyzzy", "no kind 'xyzzy'. Known: zero, mean, 3"),
    (7, "no kind 7. Known: zero, mean, 3"),
    (None, "no kind None. Known: zero, mean, 3"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest_and_all(given, said):
    with pytest.raises(LookupError) as refused:
        names.known("kind", given, iter(["zero", "mean", 3]))
    assert str(refused.value) == said


def test_a_whole_number_is_returned_as_one():
    for n in (3, np.int64(3), np.array(3), torch.tensor(3)):
        found = names.whole("n", n, 3)
        assert found == 3 and type(found) is int
    for wrong in (3.0, "3", None, True, np.bool_(True), torch.tensor(True), torch.tensor(3.0), [3]):
        with pytest.raises(TypeError, match="batch is a whole number, not "):
            names.whole("batch", wrong)
    with pytest.raises(ValueError, match="batch is at least 1, not 0"):
        names.whole("batch", 0, 1)
    assert names.whole("seed", -1) == -1


def test_a_file_takes_the_place_of_another_when_all_went_well(tmp_path):
    path = tmp_path / "some.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), names.replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    seen = set()
    for text in ("one", "two"):
        with names.replacing(path) as aside:
            seen.add(aside.name)
            aside.write_text(text)
            assert aside.parent == path.parent and aside.suffix == path.suffix
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]
    assert len(seen) == 2, "a name that can be guessed"


def test_every_name_of_the_facades_is_there():
    for facade in (heads, heads.tasks):
        assert facade.__all__ and set(facade.__all__) <= set(dir(facade))
        for name in facade.__all__:
            assert getattr(facade, name) is not None
    with pytest.raises(AttributeError, match="module 'heads' has no attribute 'ablat'. Did you mean 'ablate'"):
        _ = heads.ablat


def test_a_task_is_not_hidden_behind_its_file_and_the_facade_is_light():
    code = (
        "import sys, heads; assert not {'torch', 'transformers', 'heads.tasks.base'} & set(sys.modules);"
        "import heads.tasks.ioi;"
        "from heads.tasks import ioi; assert callable(ioi) and callable(heads.tasks.ioi); heads.tasks.words; heads.load"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
