"""pytest, with nbval's kernels on sockets in a private folder, as those of `heads run` are."""

import os
import sys
from functools import partial
from tempfile import TemporaryDirectory

import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager

if __name__ == "__main__":
    with TemporaryDirectory(prefix="heads-", ignore_cleanup_errors=True) as folder:
        if os.name == "posix" and len(folder) < 90:  # bytes of a socket's name: about a hundred
            nbval.kernel.KernelManager = partial(KernelManager, transport="ipc", ip=f"{folder}/k")
        sys.exit(pytest.main(sys.argv[1:]))
