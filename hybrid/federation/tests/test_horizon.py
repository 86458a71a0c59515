import json
import shutil
import stat
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError, RoundStopped
from hybrid.federation import aggregator as mechanism_module
from hybrid.federation.aggregator import Round
from hybrid.federation.fleet_aggregator import FleetAggregator, Task
from hybrid.federation.horizon import Resumption, Standing
from hybrid.plan import CheckIn, Local, open_signed
from hybrid.privacy.ledger import Ledger, costs
from hybrid.privacy.matrix import Banded, Matrix, Participation, sensitivity
from hybrid.update import head

KEY = Ed25519PrivateKey.generate()
SAID = CheckIn(model="kiosk", version=4, runtime=1)
SIZE = 80  # at most so many draws are told apart


def matrix(rounds=40, separation=2):
    factor, people = Banded((1.0, 0.5)), Participation(rounds, separation)
    return Matrix(factor, people, sensitivity(factor, people))


def round_settings(**fields):
    about = {"sampling": 1.0, "clip": 5.0, "noise_multiplier": 2.0, "minimum": 0, "matrix": matrix()}
    return Round(**about | fields)


def task(size=SIZE):
    about = {"model": "kiosk", "version": 4, "definition_hash": "ab" * 32, "local": Local(steps=1, lr=0.1)}
    return Task(**about, parameters=size, round_s=60.0, wanted=10)


class Moment:
    """A clock by which a round ends as soon as what is to happen in it has."""

    def __init__(self):
        self.happens = lambda: None

    def now_ms(self):
        return 1_900_000_000_000

    def wait(self, stop, until_ms):
        self.happens()


class Fleet:
    """An aggregator, and its next process, and so on, over one folder.

    Attributes:
        turns: of the plans that devices were given, in order.
    """

    def __init__(self, folder, fleet_settings=None, budget=1e6):
        self.folder, self.settings, self.budget = folder, fleet_settings or round_settings(), budget
        self.turns = []
        self.start()

    def start(self):
        self.ledger = Ledger.open(self.folder / "run", budget_epsilon=self.budget, delta=1e-5)
        self.clock = Moment()
        try:
            self.aggregator = FleetAggregator(
                task(), self.settings, self.ledger, KEY, noise_state=self.state, clock=self.clock
            )
        except BaseException:
            self.ledger.close()
            raise

    @property
    def state(self):
        return self.folder / "noise.state"

    def restart(self):
        self.ledger.close()
        self.start()

    def run(self, number, uploads=1, then=lambda: None):
        def happens():
            plan, _ = open_signed(self.aggregator.check_in(SAID).body, KEY.public_key())
            self.turns.append(plan.turn)
            for upload in range(uploads):
                sent = head(SIZE, "float32") + np.zeros(SIZE, "<f4").tobytes()
                assert self.aggregator.upload(plan.id, f"{upload:032x}", sent).status == 200
            then()

        self.clock.happens = happens
        return self.aggregator.run_round(number, np.zeros(SIZE, np.float32)).sum


@pytest.fixture
def draws(monkeypatch):
    """Noise whose k-th draw is the k-th unit vector, so that every sum shows which draws are in it."""
    drawn = []

    class Unit:
        def gaussian(self, size, sd):
            drawn.append(sd)
            return np.eye(size)[len(drawn) - 1]

    monkeypatch.setattr(mechanism_module, "SystemNoise", Unit)
    return drawn


def test_a_plan_says_its_step_and_the_separation(tmp_path):
    """Each attempt is another step of one horizon, which a new process goes on with."""
    fleet = Fleet(tmp_path)
    fleet.run(1)
    fleet.run(1)
    fleet.restart()
    fleet.run(2)
    assert [(turn.first_step, turn.last_step, turn.separation) for turn in fleet.turns] == [
        (step, step, 2) for step in (1, 2, 3)
    ]
    assert len({turn.training for turn in fleet.turns}) == 1
    assert [(entry.round, entry.attempt, entry.step) for entry in fleet.ledger.entries] == [
        (1, 1, 1),
        (1, 2, 2),
        (2, 1, 3),
    ]
    assert len(costs(fleet.ledger.entries)) == 1


def test_a_new_process_takes_back_the_noise_of_the_one_before(tmp_path, draws):
    """C of 1 and 1/2: the rows of its inverse are (1), (-1/2, 1), (1/4, -1/2, 1)."""
    fleet = Fleet(tmp_path)
    rows = [fleet.run(1), fleet.run(2)]
    fleet.restart()
    rows.append(fleet.run(3))
    assert np.round(rows, 6)[:, :3].tolist() == [[1, 0, 0], [-0.5, 1, 0], [0.25, -0.5, 1]]
    assert draws == [10.0] * 3


@pytest.mark.parametrize("how", ["too few", "stopped", "over budget"])
def test_an_attempt_that_is_not_released_uses_its_step_up(tmp_path, draws, how):
    """Its devices have had their turn. Its noise is drawn and not shown; where it was the first, nothing is spent."""
    fleet = Fleet(tmp_path, round_settings(minimum=1), budget=1e-3 if how == "over budget" else 1e6)
    with pytest.raises({"too few": CohortTooSmall, "stopped": RoundStopped, "over budget": BudgetExceeded}[how]):
        fleet.run(
            1, uploads=0 if how == "too few" else 1, then=lambda: how == "stopped" and fleet.aggregator.stop("end")
        )
    assert fleet.ledger.entries == []
    assert len(draws) == 1
    if how == "over budget":
        return
    fleet.restart()
    row = fleet.run(1)
    assert (fleet.turns[-1].first_step, row[:2].tolist()) == (2, [-0.5, 1])
    assert [entry.step for entry in fleet.ledger.entries] == [2]


def test_a_round_that_never_opened_uses_no_step(tmp_path):
    """Weights that are none; a round within a round."""
    fleet = Fleet(tmp_path)
    with pytest.raises(Exception, match="finite weights"):
        fleet.aggregator.run_round(1, np.zeros(3, np.float32))

    def again():
        with pytest.raises(ConfigError, match="open already"):
            fleet.aggregator.run_round(1, np.zeros(SIZE, np.float32))

    fleet.run(1, then=again)
    assert [entry.step for entry in fleet.ledger.entries] == [1]
    assert Standing.read(fleet.state).step == 1


def test_after_the_horizon_nothing_is_released_and_no_noise_is_kept(tmp_path):
    fleet = Fleet(tmp_path, round_settings(matrix=matrix(rounds=2)))
    fleet.run(1)
    assert Standing.read(fleet.state).buffers.any()
    fleet.run(2)
    assert not Standing.read(fleet.state).buffers.any()
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            fleet.run(3)
        fleet.restart()
    assert len(fleet.turns) == 2


def test_the_state_is_its_owners_alone_also_where_others_left_a_draft(tmp_path):
    """Decision 20: secret. Nor is it written where a link points, or read by who had the draft open before."""
    draft, elsewhere = tmp_path / ".noise.state", tmp_path / "elsewhere"
    draft.touch()
    draft.chmod(0o666)
    with draft.open("rb") as others:
        fleet = Fleet(tmp_path)
        elsewhere.touch()
        draft.symlink_to(elsewhere)
        fleet.run(1)
        assert others.read() == elsewhere.read_bytes() == b""
    assert stat.S_IMODE(fleet.state.stat().st_mode) == 0o600
    assert not fleet.state.is_symlink()
    assert not draft.exists()


def test_a_state_of_other_settings_is_refused(tmp_path):
    """Other noise would not be what later steps take back; nor is a damaged one taken for none."""
    Fleet(tmp_path).ledger.close()
    for fields in ({"clip": 4.0}, {"noise_multiplier": 3.0}, {"matrix": matrix(rounds=41)}):
        with pytest.raises(ConfigError, match="must be of this clip"):
            Fleet(tmp_path, round_settings(**fields))
    state = tmp_path / "noise.state"
    state.write_bytes(state.read_bytes()[:-1] + b"\0")
    with pytest.raises(ConfigError, match="damaged"):
        Fleet(tmp_path)


@pytest.mark.parametrize(
    ("fields", "state", "why"),
    [({"sampling": 0.5}, True, "sampling must be 1"), ({}, False, "noise_state must be a file")],
)
def test_what_a_matrix_needs_is_asked_for(tmp_path, fields, state, why):
    with (
        Ledger.open(tmp_path, budget_epsilon=1e6, delta=1e-5) as ledger,
        pytest.raises(ConfigError, match=why),
    ):
        FleetAggregator(
            task(), round_settings(**fields), ledger, KEY, noise_state=tmp_path / "noise.state" if state else None
        )


def test_what_a_new_process_does_follows_from_what_the_ledger_has():
    """Written after step 4, of which three were paid for, at rest or about to pay for the fifth.

    The entry of a later step is of a process that had gone on already.
    """
    rest, drawing = (Standing("5" * 32, "", 4, 3, drawing, np.zeros((1, 2))) for drawing in (False, True))
    ledgers = ([1, 2], [1, 2, 4], [1, 2, 4, 5], [1, 2, 4, 6], [1, 2, 4, 5, 6])
    ways = [[state.resumption(steps) for steps in ledgers] for state in (rest, drawing)]
    anew, go_on, over = Resumption.ANEW, Resumption.GO_ON, Resumption.WALK_OVER
    assert ways == [[anew, go_on, anew, anew, anew], [anew, over, over, anew, anew]]


class Crash(BaseException):
    """The process is gone."""


class Story:
    """What befalls a fleet, its n-th draw of noise being the n-th unit vector.

    Attributes:
        shown: the turn and the sum of each round that was released.
    """

    def __init__(self, folder, patch):
        self._patch, self._backup, self._crashed = patch, folder / "backup", folder / "crashed"
        self._drawn, self._number = 0, 0
        self.shown, self.crashes = [], ""
        patch.setattr(mechanism_module, "SystemNoise", lambda: self)
        write = Standing.write
        patch.setattr(Standing, "write", lambda state, file: self._write(write, state, file))
        self.fleet = Fleet(folder, round_settings(minimum=1))

    def gaussian(self, size, sd):
        if self.crashes in ("spent", "marked"):
            raise Crash
        self._drawn += 1
        return np.eye(size)[self._drawn - 1]

    def _write(self, write, state, file):
        if self.crashes == "drawn" and not state.drawing:
            raise Crash
        write(state, file)
        if self.crashes == "marked" and state.drawing:
            raise Crash

    def round(self, uploads=1):
        self._number += 1
        row = self.fleet.run(self._number, uploads)
        self.shown.append((self.fleet.turns[-1], row))

    def few(self):
        with pytest.raises(CohortTooSmall):
            self.round(uploads=0)

    def spent(self, when="spent"):
        """A crash once the ledger has it; nothing that the process would do after it happens."""
        self.crashes = when
        with pytest.raises(Crash):
            self.round()
        self.crashes = ""
        shutil.copy(self.fleet.state, self._crashed)
        self.fleet.restart()

    def drawn(self):
        self.spent("drawn")

    def marked(self):
        """A crash before the ledger has it."""
        self.spent("marked")

    def restart(self):
        self.fleet.restart()

    def backup(self):
        shutil.copy(self.fleet.state, self._backup)

    def restored(self, backup=None):
        if (backup := backup or self._backup).exists():
            shutil.copy(backup, self.fleet.state)
            self.fleet.restart()

    def restored_crash(self):
        """A copy that was made after the last crash, before a new process had it."""
        self.restored(self._crashed)

    def lost(self):
        self.fleet.state.unlink()
        self.fleet.restart()


CRASHES, PUT_BACK = ("spent", "drawn", "marked"), ("restored", "restored_crash")
BEFALLS = ("round", "round", "few", *CRASHES, "restart", "backup", *PUT_BACK, "lost")


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from(BEFALLS), max_size=25))
@example(steps=["round", "lost", "few", "round"])  # the new horizon's first step is not written, its second is
@example(steps=["round", "marked", "round", "restored_crash", "round"])
@example(steps=["round", "spent", "round", "restored_crash", "round"])
@example(steps=["round", "backup", "few", "round", "restored", "round"])
def test_no_row_of_noise_is_ever_shown_twice_and_no_horizon_is_used_unpaid(tmp_path_factory, steps):
    """Rounds, attempts that are too small, crashes after a payment and after a draw, states put back or lost.

    Of each training the steps that were shown ascend, each with a draw of its own and with the right part of the one
    before; and the ledger was charged for as many horizons as trainings have shown something, at least.
    """
    with pytest.MonkeyPatch.context() as patch:
        story = Story(tmp_path_factory.mktemp("fleet"), patch)
        for step in steps:
            getattr(story, step)()
        entries = story.fleet.ledger.entries
        story.fleet.ledger.close()
    fresh = [int(np.flatnonzero(np.isclose(row, 1.0))[-1]) for _, row in story.shown]
    assert len(set(fresh)) == len(fresh)
    trainings = {}
    for (turn, row), new in zip(story.shown, fresh, strict=True):
        trainings.setdefault(turn.training, []).append((turn.first_step, new, row))
    assert len(costs(entries)) >= len(trainings)
    for own in trainings.values():
        for (earlier, one, _), (later, _, row) in pairwise(own):
            assert later > earlier
            assert row[one] == pytest.approx((-0.5) ** (later - earlier))


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from hybrid.federation import aggregator, fleet_aggregator, horizon
from hybrid.federation.tests.test_horizon import Fleet, matrix, round_settings
from hybrid.privacy import ledger, matrix as matrix_module

before = Path(sys.argv[1])
files = {module.__file__ for module in (aggregator, fleet_aggregator, horizon, matrix_module)}
settings = round_settings(matrix=matrix(rounds=100))


def rounds(folder, count, line=-1):
    left = line

    def lines(frame, event, _):
        nonlocal left
        code = frame.f_code
        writes = code.co_filename == ledger.__file__ and code.co_name in ("spend", "_append", "_write", "_write_all")
        if not writes and code.co_filename not in files:
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return lines

    sys.settrace(lines)
    fleet = Fleet(folder, settings, budget=25)  # one horizon costs 24.0, two 38.7
    for _ in range(count):
        number = fleet.ledger.next_attempt("train", 1)
        row = fleet.run(1)
        with (folder / "released").open("a") as released:
            released.write(json.dumps([fleet.turns[-1].training, fleet.turns[-1].first_step, row.tolist()]) + "\\n")


def status_of(*arguments):
    if (child := os.fork()) == 0:
        try:
            rounds(*arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


assert status_of(before, 2) == 0
for line in range(1, 10_000):
    folder = before.with_name(f"killed-{line}")
    shutil.copytree(before, folder)
    status = status_of(folder, 1, line)
    assert status in (0, signal.SIGKILL), status
    assert status_of(folder, 2) == 0  # and two that are not killed
    if status == 0:
        break
print(line)
"""


def test_a_kill_at_any_line_loses_no_noise_and_pays_for_one_horizon(tmp_path):
    """`kill -9` before each line of a process that goes on and runs a round; after each, two that are not killed.

    The budget is of one horizon: a second would be refused. All releases are of one training, with an entry each, and
    row t + 1/2 row t-1 of those shown one after another is N(0, 10^2), and no other's: what was lost of the noise would
    make it larger, by the root of 5/4.
    """
    before = tmp_path / "before"
    before.mkdir()
    lines = int(subprocess.check_output([sys.executable, "-c", KILLED, before], text=True, timeout=150))
    assert lines > 100
    drawn, ways = [], set()
    for line in range(1, lines + 1):
        folder = tmp_path / f"killed-{line}"
        found = [json.loads(line) for line in (folder / "released").read_text().splitlines()]
        entries = Ledger.read(folder / "run").entries
        assert len(costs(entries)) == 1
        assert {step for _, step, _ in found} <= {entry.step for entry in entries}
        assert len({training for training, *_ in found}) == 1
        assert all(later > earlier for (_, earlier, _), (_, later, _) in pairwise(found))
        drawn += [
            np.add(later, 0.5 * np.array(earlier)) / 10
            for (_, one, earlier), (_, two, later) in pairwise(found[1:])
            if two == one + 1
        ]
        ways.add(tuple(step for _, step, _ in found))
    assert ways == {(1, 2, 3, 4), (1, 2, 4, 5), (1, 2, 3, 4, 5)}  # it goes on; walks over a step; had not been killed
    together = np.stack(drawn)
    assert together.std() == pytest.approx(1, abs=5 / np.sqrt(2 * together.size))
    assert np.abs(np.corrcoef(together) - np.eye(len(together))).max() < 6.5 / np.sqrt(SIZE)
