"""Checks are bounded, and none ends the others."""

from __future__ import annotations

import threading
import time

from hybrid.doctor.findings import Check, Finding, examine
from hybrid.errors import ConfigError

WELL = Finding("well", "ok", "it is well")


def check(name, look):
    return Check(name, look, f"mend {name}")


def test_a_check_that_raises_is_a_finding_and_the_next_is_run():
    """Our own error by its sentence, any other by its class alone: its text may hold a secret."""

    def ours():
        yield Finding("ours", "ok", "seen before it")
        raise ConfigError("epsilon must be > 0, got -1")

    def theirs():
        raise KeyError("hunter2")

    found = list(examine([check("ours", ours), check("theirs", theirs), check("well", lambda: [WELL])], 10))
    assert found == [
        Finding("ours", "ok", "seen before it"),
        Finding("ours", "fail", "epsilon must be > 0, got -1", "mend ours"),
        Finding("theirs", "fail", "it could not be looked at: KeyError", "mend theirs"),
        WELL,
    ]


def test_a_check_that_hangs_is_left_behind():
    """What it found before counts; the next one is run, and all of it takes no longer than its time."""
    over = threading.Event()

    def hangs():
        yield Finding("hangs", "ok", "seen before it")
        over.wait(60)

    began = time.monotonic()
    found = list(examine([check("hangs", hangs), check("well", lambda: [WELL])], 0.2))
    assert time.monotonic() - began < 10
    over.set()
    assert found == [
        Finding("hangs", "ok", "seen before it"),
        Finding("hangs", "fail", "it was not done within 0.2 s", "mend hangs; or give it longer with --timeout-s"),
        WELL,
    ]
