"""A benchmark must run, and what it holds against each other must agree: the shortest of those that compare."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_fast_paths_and_literal_passes_agree_in_the_benchmark():
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "path"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((ROOT / "runs" / "benchmarks" / "path.json").read_text(encoding="utf-8"))  # where --quick writes
    assert record["name"] == "path" and record["sizes"][0]["difference"] < 1e-3
