"""Code that lives in a notebook and is tested (or timed) all the same: its tagged cells, run as they stand."""

import linecache
import math
from dataclasses import dataclass

import nbformat
import numpy as np
import torch
from tqdm import tqdm

from heads.course import papers

IMPORTS = {"math": math, "dataclass": dataclass, "np": np, "torch": torch, "tqdm": tqdm}


def run_cells(slug, tag, **names):
    """The names that the cells of a paper's notebook with this tag define, given `names`."""
    book = nbformat.read(papers.notebook(slug), as_version=4)
    cells = [cell.source for cell in book.cells if tag in cell.metadata.get("tags", [])]
    assert cells, f"no cell of {papers.notebook(slug).name} is tagged {tag!r}"
    space = {**IMPORTS, "__name__": slug.replace("-", "_"), **names}
    for number, source in enumerate(cells):
        name = f"<{slug}: {tag} {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # nnsight reads a trace's source
        exec(compile(source, name, "exec"), space)
    return space
