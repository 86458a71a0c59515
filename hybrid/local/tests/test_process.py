import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid.errors import StackError
from hybrid.local.process import Service, free_ports, is_running, log_has, running, started

READY_THEN_WAIT = "print('ready', flush=True); import time; time.sleep(60)"


def python(code: str, **settings) -> Service:
    return Service(name="fake", command=[sys.executable, "-c", code], ready=log_has("ready"), **settings)


def test_a_service_runs_for_the_length_of_the_block(tmp_path: Path):
    """Its process is there inside the block and gone after it; prepare and cleanup ran once each, in that order."""
    ran = []
    service = python(READY_THEN_WAIT, prepare=lambda: ran.append("prepare"), cleanup=lambda: ran.append("cleanup"))
    with running(service, tmp_path) as process:
        assert is_running(process.pid, process.started)
        assert ran == ["prepare"]
    assert not is_running(process.pid, process.started)
    assert ran == ["prepare", "cleanup"]


def test_what_a_service_started_ends_with_it(tmp_path: Path):
    """A grandchild that ignores SIGTERM is gone when the block ends."""
    grandchild = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    )
    popen = f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}])"
    code = f"import subprocess, sys; {popen}; print(p.pid, flush=True); p.wait()"
    with running(python(code), tmp_path) as process:
        pid = int(re.search(r"\d+", process.log.read_text())[0])
        since = started(pid)
    assert not is_running(pid, since)


def test_a_service_that_ignores_sigterm_is_killed(tmp_path: Path):
    """It has `stop_timeout_s` to end."""
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY_THEN_WAIT}"
    with running(python(code, stop_timeout_s=0.2), tmp_path) as process:
        pass
    assert process.exit_status() == -9


def test_a_service_that_ends_early_is_reported_with_its_log(tmp_path: Path):
    """The message has the service's name, its exit status and what it said last."""
    with (
        pytest.raises(StackError, match=r"fake ended with exit status 3; the last lines of .*fake\.log:\n  no disk"),
        running(python("import sys; print('no disk'); sys.exit(3)"), tmp_path),
    ):
        pass


def test_a_service_that_is_not_ready_in_time_is_stopped(tmp_path: Path):
    """The message says how long it had; nothing of it is left."""
    with (
        pytest.raises(StackError, match=r"fake was not ready within 0\.3 s"),
        running(python("import time; time.sleep(61.5)", start_timeout_s=0.3), tmp_path),
    ):
        pass
    assert "time.sleep(61.5)" not in subprocess.check_output(["ps", "-eo", "args"], text=True).replace("ps -eo", "")


def test_a_service_that_cannot_be_started_says_why(tmp_path: Path):
    """A program that is not there is an error of ours, not a traceback."""
    service = Service(name="fake", command=[str(tmp_path / "absent")], ready=log_has("ready"))
    with pytest.raises(StackError, match=r"fake could not be started: .*No such file"), running(service, tmp_path):
        pass


def test_a_process_that_took_over_a_pid_is_another():
    """Same pid, started an hour earlier: not the one that was meant."""
    assert is_running(os.getpid(), started(os.getpid()))
    assert not is_running(os.getpid(), started(os.getpid()) - 3600)


def test_free_ports_differ():
    """Sixteen asked for at once are sixteen."""
    assert len(set(free_ports(16))) == 16
