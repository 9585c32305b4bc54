"""The README says what the results say, and its examples run."""

import re

from heads import cli
from heads.course.papers import root

README = (root() / "README.md").read_text(encoding="utf-8")
START, END = "<!-- papers: made by `heads list --markdown`; a test compares -->", "<!-- /papers -->"


def test_the_table_of_papers_is_made_from_the_results(monkeypatch):
    monkeypatch.delenv("HEADS_FIGURES", raising=False)
    table = README.split(START)[1].split(END)[0].strip()
    assert table == cli.papers_table(), "renew it with the output of: heads list --markdown"


def test_the_pictures_and_files_it_names_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root() / path).exists(), path


def test_torch_is_pinned_as_in_the_project():
    pin = re.search(r'"(torch==[\d.]+)"', (root() / "pyproject.toml").read_text()).group(1)
    assert pin in README


def test_the_example_runs(tmp_path):
    """As it stands, on smaller tasks."""
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    sizes = {"lengths=[500], depths=[0.1, 0.5, 0.9]": "lengths=[110], depths=[0.5]", "ioi(lm, 16)": "ioi(lm, 2)"}
    for size, smaller in sizes.items():
        assert size in example
        example = example.replace(size, smaller)
    script = tmp_path / "example.py"  # nnsight reads a trace's source from a file
    script.write_text(example + "\nassert logits.shape[-1] == 49152 and abs(float(pattern.sum(-1).mean()) - 1) < 1e-4\n")
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "example"})
