import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from serving import processes

PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from serving import processes

def child(folder, number):
    import signal, os
    signal.signal(signal.SIGTERM, lambda *_: (Path(folder, f"ended-{number}").touch(), sys.exit(0)))
    processes.end_with_parent()
    Path(folder, f"{number}-{os.getpid()}").touch()
    while True:
        signal.pause()

def start(number):
    process = multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1], number))
    process.start()
    return process

if __name__ == "__main__":
    processes.FIRST_DELAY_S = 0.1
    processes.supervise(start, 2, drain_s=10)
"""


class Family:
    """A parent with two children, as processes; a child writes its number and process id when it runs."""

    def __init__(self, folder):
        self.folder, script = folder / "children", folder / "parent.py"
        self.folder.mkdir()
        script.write_text(PARENT)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        self.parent = subprocess.Popen([sys.executable, str(script), str(self.folder)], env=environment)

    def wait_for(self, what, holds):
        for _ in range(600):
            if found := holds():
                return found
            threading.Event().wait(0.05)
        raise AssertionError(what)

    def children(self, number):
        return [int(file.name.split("-")[1]) for file in self.folder.glob(f"{number}-*")]

    def running(self):
        return self.wait_for(
            "children",
            lambda: [c for n in (0, 1) for c in self.children(n)[:1]][:2] if all(map(self.children, (0, 1))) else None,
        )


def lives(pid):
    """Whether it runs: one that ended and that nobody waited for, as a container's first process may not, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def family(tmp_path):
    started = Family(tmp_path)
    yield started
    if started.parent.poll() is None:
        started.parent.kill()
    started.parent.wait()
    started.wait_for("no child is left", lambda: not any(map(lives, [*started.children(0), *started.children(1)])))


def test_a_killed_child_is_started_again_with_its_number(family):
    """kill -9 of child 1: another child 1 comes, child 0 stays."""
    first, second = family.running()
    os.kill(second, signal.SIGKILL)
    family.wait_for("another", lambda: len(family.children(1)) == 2)
    assert family.children(0) == [first]
    assert lives(first)


def test_a_signal_ends_all_children_in_order_and_then_the_parent(family):
    """SIGTERM to the parent: both children run their own end, and the parent exits with 0."""
    family.running()
    family.parent.terminate()
    assert family.parent.wait(30) == 0
    assert sorted(file.name for file in family.folder.glob("ended-*")) == ["ended-0", "ended-1"]


def test_children_end_when_their_parent_is_killed(family):
    """kill -9 of the parent: each child gets SIGTERM from itself."""
    family.running()
    family.parent.kill()
    family.wait_for("both ends", lambda: len(list(family.folder.glob("ended-*"))) == 2)


class Mortal:
    """A process that has ended with 1."""

    sentinel, exitcode = 0, 1

    def close(self):
        pass


def test_a_child_that_dies_young_waits_twice_as_long_each_time(monkeypatch):
    """Started at 0, 1, 3, 7, 15, 31, then each 30 s: 61. One that lived a minute starts again at once."""
    now, starts = [0.0], []
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    child = processes._Child(lambda number: starts.append(now[0]) or Mortal(), 0)
    for second in range(70):
        now[0] = float(second)
        child.keep()
    assert starts == [0, 1, 3, 7, 15, 31, 61]
    now[0] = 61 + processes.OLD_S
    child.keep()
    assert starts[-1] == 121


def test_the_main_process_has_no_parent_to_end_with():
    """`end_with_parent` is for children; elsewhere it does nothing."""
    before = threading.active_count()
    assert multiprocessing.parent_process() is None
    processes.end_with_parent()
    assert threading.active_count() == before
