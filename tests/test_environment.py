"""One environment: the pins of pyproject.toml, what runs here, conda's file and the Makefile agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {extra: [Requirement(line) for line in lines] for extra, lines in {"": PROJECT["dependencies"], **EXTRAS}.items()}
OPTIONAL = {"lab", "bench", "data"}  # reading in JupyterLab, the peers of benchmarks, and what builds the data extracts
MAIN = {canonicalize_name(pin.name): pin for pin in PINS[""]}


@pytest.mark.parametrize("pin", [p for pins in PINS.values() for p in pins], ids=lambda p: p.name)
def test_every_pin_is_exact(pin):
    assert [s.operator for s in pin.specifier] == ["=="] and "*" not in str(pin.specifier)


@pytest.mark.parametrize("extra, pin", [(e, p) for e, pins in PINS.items() for p in pins], ids=lambda v: getattr(v, "name", v))
def test_every_pin_holds_here(extra, pin):
    try:
        found = version(pin.name)
    except PackageNotFoundError:
        if extra in OPTIONAL:
            pytest.skip(f"{pin.name} belongs to the extra {extra!r}, which make test does not install")
        raise
    # A build name does not matter: torch calls the same version 2.13.0, 2.13.0+cpu or 2.13.0+cu130.
    assert Version(found).public in pin.specifier, f"{pin.name} {found} is installed, {pin} is pinned: run make setup"


def test_python_is_one_that_the_project_supports():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert ".".join(map(str, sys.version_info[:3])) in supported
    named = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    assert named == {f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported}
    low, high = re.search(r"not \((3, \d+)\) <= sys.version_info < \((3, \d+)\)", (ROOT / "Makefile").read_text()).groups()
    assert SpecifierSet(f">={low.replace(', ', '.')},<{high.replace(', ', '.')}") == supported


def imported(folder):
    """Names of the top-level modules that the files of a folder import, anywhere in them."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.split(".")[0]


@pytest.mark.parametrize("folder, extras", [("heads", [""]), ("tests", ["", "test", "bench"])])
def test_whatever_is_imported_is_pinned(folder, extras):
    pinned = {canonicalize_name(pin.name) for extra in extras for pin in PINS[extra]}
    ours = {"heads", "tests", *(path.stem for path in (*(ROOT / "tests").rglob("*"), *(ROOT / "data").glob("*.py")))}
    owners = packages_distributions()
    foreign = {m: {canonicalize_name(d) for d in owners.get(m, [m])} for m in imported(folder) if m not in ours}
    missing = {m: d for m, d in foreign.items() if m not in sys.stdlib_module_names and not d & pinned}
    assert not missing, "imported, but not a dependency in pyproject.toml"


def test_conda_names_the_same_torch_and_takes_the_rest_from_here():
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = dict(line.split("=", 1) for line in wanted if isinstance(line, str) and "=" in line)
    assert conda["pytorch-cpu"] == str(MAIN["torch"].specifier).lstrip("=")
    assert f"{conda['python']}.0" in SpecifierSet(PROJECT["requires-python"])
    assert set(conda) == {"python", "pytorch-cpu"}, "any other pin belongs into pyproject.toml"
    (pip,) = (line["pip"] for line in wanted if isinstance(line, dict))
    assert pip == ["-e .[test,lab]"] and set(EXTRAS) >= {"test", "lab"}


def test_torch_has_one_version_everywhere():
    pin = str(MAIN["torch"].specifier).lstrip("=")
    for name in ("Makefile", ".ci/run", ".github/workflows/ci.yml"):
        assert pin not in (ROOT / name).read_text(), f"{name} should read torch's version from pyproject.toml"
    # The README spells the commands out for those without make.
    assert set(re.findall(r"torch==([\w.]+)", (ROOT / "README.md").read_text())) <= {pin}


def dry_run(*words):
    """What make would do, in a tree that is set up. Nothing runs."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}  # of a make around this test
    for name in ("VENV", "PAPER", "NAME", "ARGS", "TORCH_BACKEND"):
        clean.pop(name, None)
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
@pytest.mark.parametrize(
    "words, does",
    [
        (["figures"], "-m heads run --all"),
        (["figures", "PAPER=retrieval-head"], "-m heads run retrieval-head"),
        (["refresh"], "-m heads run --all --refresh"),
        (["test"], "-m pytest tests -n 2 --dist loadfile"),
        (["test"], "-m tests.notebooks  ||"),
        (["test-all"], "-m tests.notebooks --all ||"),
        (["lab"], "-m jupyterlab"),
        (["bench"], "-m tests.benchmarks"),
        (["clean"], "rm -rf runs"),
        (["help"], "sed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_make_has_the_promised_targets(words, does):
    assert does in dry_run(*words)


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
def test_make_sets_up_before_anything_else_and_only_once(tmp_path):
    cold = dry_run("test", f"VENV={tmp_path}")
    assert cold.index("-m venv") < cold.index("-e '.[test,lab]'") < cold.index("heads fetch") < cold.index("pytest tests")
    for stamp in (".ready-cpu", ".model"):
        (tmp_path / stamp).touch()
    warm = dry_run("test", f"VENV={tmp_path}")
    assert "pytest tests" in warm and "install" not in warm and "fetch" not in warm
    # The torch build is asked for once: with `auto` on record, plain `make` does not go back to cpu.
    (tmp_path / ".torch-backend").write_text("auto\n")
    assert "build: auto" in dry_run("test", f"VENV={tmp_path}")


def test_ci_calls_make_test_and_nothing_else():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    words = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert words == ["make test"]
    assert os.access(ROOT / ".ci/run", os.X_OK) or os.name == "nt"
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_what_runs_leave_behind_is_ignored():
    ignored = set((ROOT / ".gitignore").read_text().split())
    assert ignored >= {".venv/", "runs/", "__pycache__/", ".ipynb_checkpoints/", "*.egg-info/"}


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"] and citation["license"] == PROJECT["license"]
