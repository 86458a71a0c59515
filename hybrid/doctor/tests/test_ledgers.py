"""Each fault of a ledger, planted in real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybrid.doctor.ledgers import ledgers
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import FILE, Ledger

EVENT = GaussianEvent(noise_multiplier=1.0, sampling=0.1)
HOLD = """
import sys
from pathlib import Path
from hybrid.privacy.ledger import Ledger
with Ledger.open(Path(sys.argv[1]), budget_epsilon=8.0, delta=1e-5):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, one of them a federation's with an aggregator's ledger below it; each made one release."""
    for folder in (tmp_path / "r1", tmp_path / "r2/aggregator-1"):
        with Ledger.open(folder, budget_epsilon=8.0, delta=1e-5) as ledger:
            ledger.spend(EVENT, purpose="train", clip=1.0, round_number=1)
    return tmp_path


@pytest.fixture
def held(runs: Path):
    """The first run's ledger, open in another process."""
    command = [sys.executable, "-c", HOLD, str(runs / "r1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield runs
        process.stdin.close()


def seen(found) -> list[tuple[str, str]]:
    return [(finding.status, finding.found.partition(":")[0]) for finding in found]


def test_whole_ledgers_are_well(runs: Path):
    """Those below a federation's run too; where there is none, nothing was looked at."""
    (found,) = ledgers(runs)
    assert (found.status, found.found[:6], found.fix) == ("ok", "2 of 2", "")
    assert seen(ledgers(runs / "none"))[0][0] == "skipped"


def test_a_damaged_line_is_told_with_what_it_counts_as(runs: Path):
    """One line of noise: one release; the other ledger is well."""
    with (runs / "r1" / FILE).open("a") as file:
        file.write("\x00\x00 half a line\n")
    first, second = ledgers(runs)
    assert first.status == "warn"
    assert first.found == "r1: it is damaged; what cannot be read counts as 1 releases, the costliest there are"
    assert "copy" in first.fix
    assert second.found.startswith("1 of 2")


def test_a_ledger_without_its_budget_is_lost(runs: Path):
    """Its first line is gone: the file says no more what may be spent."""
    file = runs / "r1" / FILE
    file.write_text(file.read_text().partition("\n")[2])
    first, _ = ledgers(runs)
    assert (first.status, first.found) == (
        "fail",
        "r1: the ledger of run 'r1' is damaged in its first line: start another run",
    )
    assert "put back the copy" in first.fix


def test_a_ledger_that_the_system_does_not_let_one_read_is_told(runs: Path):
    """Here it is no file; another account's would be refused alike, but not where tests run as root."""
    file = runs / "r1" / FILE
    file.unlink()
    file.mkdir()
    first, _ = ledgers(runs)
    assert (first.status, first.found) == ("fail", "r1: it cannot be read: IsADirectoryError")


def test_a_ledger_that_a_training_has_open_is_well(held: Path):
    """The process that has it is seen."""
    assert [finding.status for finding in ledgers(held)] == ["ok"]


def test_a_ledger_that_nobody_seen_holds_is_told_with_how_to_free_it(held: Path, tmp_path: Path):
    """As by a child in another container that outlived its training: the system shows no process that has it open."""
    (tmp_path / "proc").mkdir()
    first, second = ledgers(held, tmp_path / "proc")
    assert (first.status, first.found) == ("warn", "r1: it is locked by a process that is not seen here")
    assert f"fuser {held / 'r1' / FILE}" in first.fix
    assert second.found.startswith("1 of 2")
