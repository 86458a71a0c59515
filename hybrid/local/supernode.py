"""Flower's SuperNode, which is started again until the SuperLink takes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from hybrid.local.process import die_with

FIRST_PAUSE_S, LONGEST_PAUSE_S = 3.0, 15.0  # between two starts
LONG_S = 60.0  # one that lived as long is started again after the first pause


def supernode(words: list[str]) -> int:
    """Runs it until SIGTERM, and returns the status with which it then ended; 0 where it did not run.

    By itself it gives up after three seconds where its key is not registered yet, where the SuperLink still takes one
    that was killed for alive, or is away. A pod that ends so is started again later each time, up to five minutes, for
    which a ServerApp that waits for its SuperNodes does not wait.

    Args:
        words: of its command line.
    """
    over, pause_s = threading.Event(), FIRST_PAUSE_S
    running: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        over.set()
        for child in running:
            child.terminate()

    signal.signal(signal.SIGTERM, end)
    while not over.is_set():
        command = [str(Path(sys.executable).with_name("flower-supernode")), *words]
        began = time.monotonic()
        running[:] = [subprocess.Popen(command, preexec_fn=die_with(os.getpid()))]  # noqa: PLW1509
        if over.is_set():  # told to end while it was started
            end()
        status = running[0].wait()
        if over.is_set():
            return status
        pause_s = FIRST_PAUSE_S if time.monotonic() - began > LONG_S else pause_s
        over.wait(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return 0
