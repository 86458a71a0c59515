"""Flower's SuperExec, whose apps' processes end with it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

from hybrid.local.process import die_with


def superexec(words: list[str]) -> None:
    """Runs it; the kernel kills its apps when it dies, also of SIGKILL (Linux only).

    By themselves they look for it too, but then tell a SuperLink, and wait for an answer that may never come.

    Args:
        words: of its command line.
    """
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    bound = partial(subprocess.Popen, preexec_fn=die_with(os.getpid()))
    subprocess_executor.subprocess = SimpleNamespace(Popen=bound, DEVNULL=subprocess.DEVNULL)
    sys.argv[1:] = words
    flower_superexec()
