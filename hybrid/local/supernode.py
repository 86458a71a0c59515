"""Flower's SuperNode, which is started again until the SuperLink takes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from hybrid.local.process import die_with

PAUSE_S = 3.0


def supernode(words: list[str]) -> int:
    """Runs it until SIGTERM, and returns the status with which it then ended.

    By itself it gives up after three seconds where its key is not registered yet, where the SuperLink still takes one
    that was killed for alive, or is away. A pod that ends so is started again later each time, up to five minutes, for
    which a ServerApp that waits for its SuperNodes does not wait.

    Args:
        words: of its command line.
    """
    over, status = threading.Event(), 0
    running: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        over.set()
        for child in running:
            child.terminate()

    signal.signal(signal.SIGTERM, end)
    while not over.is_set():
        command = [str(Path(sys.executable).with_name("flower-supernode")), *words]
        running[:] = [subprocess.Popen(command, preexec_fn=die_with(os.getpid()))]  # noqa: PLW1509
        if over.is_set():  # told to end while it was started
            end()
        status = running[0].wait()
        over.wait(PAUSE_S)
    return status
