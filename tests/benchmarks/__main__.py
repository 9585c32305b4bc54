"""Run benchmarks: `python -m tests.benchmarks [--quick] [NAME ...]`; no name means all but those for a GPU.

Each writes figures/benchmarks/NAME.json with a figure. `--quick` takes tiny sizes, to see that it works, and
writes below runs/ instead. For numbers worth keeping, let the machine do nothing else.
"""

import argparse
import importlib

from rich.console import Console
from rich.table import Table

# name -> module, or module:function where a module holds several
BENCHMARKS = {
    "detect": "detect", "conditions": "conditions", "memory": "memory", "batched": "batched",
    "sweep-end": "sweeps:end", "sweep-all": "sweeps:everywhere", "path": "sweeps:path",
    "documents": "documents", "caches": "caches", "startup": "startup", "yardstick": "yardstick",
    "gpu-sweep-end": "gpu:end", "gpu-sweep-all": "gpu:everywhere", "gpu-path": "gpu:path",
}  # fmt: skip
NAMES = tuple(BENCHMARKS)


def table(records: list[dict]) -> Table:
    columns = Table(title="ratio: how many times better than the peer; difference: largest between the two results")
    for column in ("benchmark", "size", "ours", "peer", "unit", "ratio", "difference"):
        columns.add_column(column, justify="left" if column in ("benchmark", "unit") else "right")
    for record in records:
        for row in record["sizes"]:
            peer, ratio = ("not run", "") if row["peer"] is None else (f"{row['peer']:.4g}", f"{row['ratio']:.2f}")
            difference = "" if row["difference"] is None else f"{row['difference']:.1g}"
            columns.add_row(record["name"], str(row["size"]), f"{row['ours']:.4g}", peer, record["unit"], ratio, difference)
    return columns


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n\n")[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, written below runs/")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    names = chosen.names or [name for name in NAMES if not name.startswith("gpu-")]
    records = []
    for name in names:
        module, _, function = BENCHMARKS[name].partition(":")
        records.append(getattr(importlib.import_module(f"tests.benchmarks.{module}"), function or "run")(chosen.quick))
    Console().print(table(records))


if __name__ == "__main__":
    main()
