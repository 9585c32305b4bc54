"""pytest, with nbval's kernels on sockets in a private folder, as those of `heads run` are."""

import sys
from functools import partial
from tempfile import TemporaryDirectory

import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager

from heads.course.runs import sockets

if __name__ == "__main__":
    with TemporaryDirectory(prefix="heads-", ignore_cleanup_errors=True) as folder:
        nbval.kernel.KernelManager = partial(KernelManager, **sockets(folder))
        sys.exit(pytest.main(sys.argv[1:]))
