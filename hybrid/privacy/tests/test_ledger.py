from __future__ import annotations

import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid.privacy.ledger
from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.privacy.accountant import GaussianEvent, MatrixEvent, epsilon
from hybrid.privacy.ledger import SHORTEST_ENTRY, Entry, Ledger, MatrixEntry, costs

DELTA = 1e-6
PLAIN = GaussianEvent(10.0)
TEN_PLAIN = epsilon([GaussianEvent(10.0, count=10)], DELTA).epsilon


def opened(folder: Path, budget: float = TEN_PLAIN) -> Ledger:
    """A ledger that can pay for ten releases of PLAIN, unless told otherwise."""
    return Ledger.open(folder, budget_epsilon=budget, delta=DELTA)


def spend(ledger: Ledger, round_number: int, event: GaussianEvent = PLAIN) -> None:
    ledger.spend(event, purpose="train", clip=0.5, round_number=round_number)


def test_what_is_spent_is_there_when_it_is_opened_again(tmp_path):
    """Two releases are read back with all they were made with, and cost the same."""
    with opened(tmp_path) as ledger:
        spend(ledger, 1)
        spend(ledger, 2)
        before = ledger.spent()
    with opened(tmp_path) as ledger:
        assert ledger.spent() == before == epsilon([GaussianEvent(10.0, count=2)], DELTA)
        assert [(e.purpose, e.round, e.attempt, e.clip, e.sampling) for e in ledger.entries] == [
            ("train", 1, 1, 0.5, 1.0),
            ("train", 2, 1, 0.5, 1.0),
        ]


def test_over_budget_is_refused_and_nothing_is_written(tmp_path):
    """The budget pays for ten releases: the eleventh raises, and the file stays as it is."""
    with opened(tmp_path) as ledger:
        for number in range(1, 11):
            spend(ledger, number)
        written = (tmp_path / "ledger.jsonl").read_bytes()
        with pytest.raises(BudgetExceeded, match=r"10 releases made .* would cost"):
            spend(ledger, 11)
    assert (tmp_path / "ledger.jsonl").read_bytes() == written


def test_a_whole_run_is_refused_at_its_start(tmp_path):
    """Eleven rounds are asked for, ten can be paid: not one of them is reserved."""
    with opened(tmp_path) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.reserve([GaussianEvent(10.0, count=11)])
        ledger.reserve([GaussianEvent(10.0, count=10)])


def test_what_is_reserved_cannot_be_spent_on_something_else(tmp_path):
    """Ten rounds are reserved: a query beside them would leave the run short, so it is refused."""
    with opened(tmp_path) as ledger:
        ledger.reserve([GaussianEvent(10.0, count=10)])
        with pytest.raises(BudgetExceeded):
            ledger.spend(GaussianEvent(50.0), purpose="query", clip=1.0, round_number=1)
        for number in range(1, 11):
            spend(ledger, number)


def test_reserved_releases_are_not_composed_one_by_one(tmp_path, monkeypatch):
    """A thousand reserved rounds call the accountant once, however many are spent."""
    calls = []
    monkeypatch.setattr(
        hybrid.privacy.ledger, "epsilon", lambda *args: [calls.append(args), epsilon([PLAIN], DELTA)][1]
    )
    sampled = GaussianEvent(2.0, sampling=0.01)
    with opened(tmp_path) as ledger:
        ledger.reserve([GaussianEvent(2.0, sampling=0.01, count=1000)])
        for number in range(1, 101):
            spend(ledger, number, sampled)
    assert len(calls) == 1


def test_a_reservation_ends_with_its_process_and_spends_do_not(tmp_path):
    """Ten reserved, three spent, opened again: seven can be reserved, eight cannot."""
    with opened(tmp_path) as ledger:
        ledger.reserve([GaussianEvent(10.0, count=10)])
        for number in (1, 2, 3):
            spend(ledger, number)
    with opened(tmp_path) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.reserve([GaussianEvent(10.0, count=8)])
        ledger.reserve([GaussianEvent(10.0, count=7)])


def test_an_attempt_is_spent_once(tmp_path):
    """A second release of the same attempt is refused, a new attempt is a new entry: no noise is used twice."""
    with opened(tmp_path) as ledger:
        spend(ledger, 1)
        with pytest.raises(ConfigError, match="attempt 1"):
            spend(ledger, 1)
        ledger.spend(PLAIN, purpose="train", clip=0.5, round_number=1, attempt=ledger.next_attempt("train", 1))
        assert [entry.attempt for entry in ledger.entries] == [1, 2]


@pytest.mark.parametrize(("budget", "delta", "setting"), [(2.0, DELTA, "budget_epsilon"), (1.0, 1e-5, "delta")])
def test_another_budget_is_refused(tmp_path, budget, delta, setting):
    """A ledger started with (1, 1e-6) opens with nothing else."""
    opened(tmp_path, 1.0).close()
    with pytest.raises(ConfigError, match=f"{setting} of run"):
        Ledger.open(tmp_path, budget_epsilon=budget, delta=delta)


@pytest.mark.parametrize(("budget", "delta"), [(0.0, 1e-6), (float("inf"), 1e-6), (1.0, 0.0), (1.0, 1.0)])
def test_a_budget_out_of_range_is_refused(tmp_path, budget, delta):
    """Epsilon must be finite and positive, delta strictly between 0 and 1."""
    with pytest.raises(ConfigError, match="must be"):
        Ledger.open(tmp_path, budget_epsilon=budget, delta=delta)


def test_a_line_cut_anywhere_is_never_taken_for_less(tmp_path):
    """Cut after any byte of the third spend, the ledger counts three releases; after none, two."""
    file = tmp_path / "ledger.jsonl"
    with opened(tmp_path) as ledger:
        ledger.reserve([GaussianEvent(10.0, count=10)])
        for number in (1, 2, 3):
            spend(ledger, number)
    content = file.read_bytes()
    third = content[:-1].rindex(b"\n") + 1
    for length in [third, third + 1, *range(third + 2, len(content), 11), len(content) - 1, len(content)]:
        file.write_bytes(content[:length])
        for _ in range(2):  # the second time it was mended
            with opened(tmp_path) as ledger:
                expected = 2 if length == third else 3
                assert ledger.spent() == epsilon([GaussianEvent(10.0, count=expected)], DELTA)


def test_a_mended_ledger_goes_on(tmp_path):
    """After a cut line the next spend is a line of its own, and both count."""
    file = tmp_path / "ledger.jsonl"
    with opened(tmp_path) as ledger:
        spend(ledger, 1)
    file.write_bytes(file.read_bytes()[:-5])
    with opened(tmp_path) as ledger:
        spend(ledger, 2)
    with opened(tmp_path) as ledger:
        assert [entry.round for entry in ledger.entries] == [2]
        assert ledger.spent() == epsilon([GaussianEvent(10.0, count=2)], DELTA)


def test_a_lost_line_counts_as_the_costliest_release(tmp_path):
    """z = 20 and z = 10 were reserved: the lost one may have been z = 10."""
    with opened(tmp_path) as ledger:
        ledger.reserve([GaussianEvent(20.0, count=2), GaussianEvent(10.0)])
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"kind":"spent","purp')
    with opened(tmp_path) as ledger:
        assert ledger.spent() == epsilon([GaussianEvent(10.0)], DELTA)


@pytest.mark.parametrize("damage", [lambda text: text.replace(b"\n", b" "), lambda text: bytes(len(text))])
def test_damage_across_lines_counts_each_line_that_it_may_have_held(tmp_path, damage):
    """Four of six releases run into one line, or are zeroed: never fewer than six are accounted for."""
    with opened(tmp_path) as ledger:
        for number in range(1, 7):
            spend(ledger, number)
    file = tmp_path / "ledger.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    entries = [place for place, line in enumerate(lines) if b'"spent"' in line][1:5]
    first, last = entries[0], entries[-1] + 1
    file.write_bytes(b"".join(lines[:first]) + damage(b"".join(lines[first:last])) + b"\n" + b"".join(lines[last:]))
    with opened(tmp_path) as ledger:
        assert ledger.spent().epsilon >= epsilon([GaussianEvent(10.0, count=6)], DELTA).epsilon


def test_no_entry_is_shorter_than_what_damage_is_divided_by():
    """One letter, one digit a number, a time in UTC without a fraction: the shortest line there can be."""
    time = datetime(2026, 1, 1, tzinfo=UTC)
    shortest = Entry(purpose="t", noise_multiplier=1.0, sampling=1.0, clip=1.0, round=1, attempt=1, time=time)
    assert len(shortest.model_dump_json()) + 1 == SHORTEST_ENTRY


@pytest.mark.parametrize("keep", [1, 30])
def test_a_ledger_that_says_nothing_is_not_a_fresh_one(tmp_path, keep):
    """Cut within its first line it is refused: an account that was lost is not an empty one."""
    opened(tmp_path).close()
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="damaged"):
        opened(tmp_path)


def test_a_ledger_is_read_while_another_has_it_open(tmp_path):
    """Without a lock and without a byte written: what was spent so far, and the budget, at each reading."""
    with opened(tmp_path) as ledger:
        ledger.reserve([GaussianEvent(10.0, count=3)])
        assert Ledger.read(tmp_path).spent().epsilon == 0
        spend(ledger, 1)
        spend(ledger, 2)
        written = (tmp_path / "ledger.jsonl").read_bytes()
        account = Ledger.read(tmp_path)
        assert (account.budget_epsilon, account.delta) == (TEN_PLAIN, DELTA)
        assert [entry.round for entry in account.entries] == [1, 2]
        assert account.spent() == ledger.spent()
        assert (tmp_path / "ledger.jsonl").read_bytes() == written
        spend(ledger, 3)


def test_reading_counts_damage_as_opening_does_and_mends_nothing(tmp_path):
    """Cut within the third of three releases it shows two and counts three; so does opening it afterwards."""
    with opened(tmp_path) as ledger:
        for number in (1, 2, 3):
            spend(ledger, number)
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    cut = file.read_bytes()
    account = Ledger.read(tmp_path)
    assert file.read_bytes() == cut
    assert (len(account.entries), account.lost) == (2, (PLAIN,))
    with opened(tmp_path) as ledger:
        assert account.spent() == ledger.spent() == epsilon([GaussianEvent(10.0, count=3)], DELTA)


def test_what_cannot_be_read_is_not_an_empty_account(tmp_path):
    """No file and an empty one: no ledger. Cut in its first line, or with a second one that tells nothing: refused."""
    for folder in (tmp_path, tmp_path / "no such run"):
        with pytest.raises(NotFound, match="has no ledger"):
            Ledger.read(folder)
    file = tmp_path / "ledger.jsonl"
    file.touch()
    with pytest.raises(NotFound, match="has no ledger"):
        Ledger.read(tmp_path)
    file.unlink()
    opened(tmp_path).close()
    first = file.read_bytes()
    for damaged in (first[:-5], first + b"?"):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="damaged"):
            Ledger.read(tmp_path)


CHILD = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import SHORTEST_ENTRY, Entry, Ledger, MatrixEntry, costs

ledger = Ledger.open(Path(sys.argv[1]), budget_epsilon=float(sys.argv[2]), delta=float(sys.argv[3]))
ledger.reserve([GaussianEvent(10.0, count=5)])
ledger.spend(GaussianEvent(10.0), purpose="train", clip=0.5, round_number=1)
print("spent", flush=True)
sys.stdin.readline()
print("released", flush=True)
"""


def test_a_killed_process_has_spent_and_keeps_nobody_out(tmp_path):
    """Its ledger is closed to others while it lives; killed between spend and release, the spend counts."""
    command = [sys.executable, "-c", CHILD, str(tmp_path), repr(TEN_PLAIN), repr(DELTA)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "spent\n"
        with pytest.raises(ConfigError, match="another process"):
            opened(tmp_path)
        child.send_signal(signal.SIGKILL)
        assert child.stdout.read() == ""
    with opened(tmp_path) as ledger:
        assert ledger.spent() == epsilon([PLAIN], DELTA)
        assert ledger.next_attempt("train", 1) == 2


FULL_DISK = """
import os, resource, sys
from pathlib import Path
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import SHORTEST_ENTRY, Entry, Ledger, MatrixEntry, costs

folder = Path(sys.argv[1])
ledger = Ledger.open(folder, budget_epsilon=float(sys.argv[2]), delta=float(sys.argv[3]))
ledger.reserve([GaussianEvent(10.0, count=5)])
size = (folder / "ledger.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
for attempt in (1, 2):
    try:
        ledger.spend(GaussianEvent(10.0), purpose="train", clip=0.5, round_number=1, attempt=attempt)
    except OSError:
        print("refused")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_half_a_line_on_a_full_disk_stops_the_ledger(tmp_path):
    """The spend raises, so does the next on the same object, and the half line counts as one release."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), repr(TEN_PLAIN), repr(DELTA)]
    assert subprocess.check_output(command, text=True) == "refused\nrefused\n"
    with opened(tmp_path) as ledger:
        assert ledger.spent() == epsilon([PLAIN], DELTA)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("reserve"), st.sampled_from([5.0, 10.0, 30.0]), st.integers(1, 8)),
            st.tuples(st.just("spend"), st.sampled_from([5.0, 10.0, 30.0]), st.just(1)),
            st.tuples(st.just("reopen"), st.just(0.0), st.just(0)),
        ),
        max_size=15,
    )
)
def test_no_history_passes_the_budget_or_is_forgotten(tmp_path_factory, steps):
    """Whatever is reserved, spent, refused and reopened: every release counts, and all stay within budget."""
    folder = tmp_path_factory.mktemp("run")
    ledger, released = opened(folder), []
    for kind, noise_multiplier, count in steps:
        try:
            if kind == "reserve":
                ledger.reserve([GaussianEvent(noise_multiplier, count=count)])
            elif kind == "spend":
                spend(ledger, len(released) + 1, GaussianEvent(noise_multiplier))
                released.append(GaussianEvent(noise_multiplier))
            else:
                ledger.close()
                ledger = opened(folder)
        except BudgetExceeded:
            pass
        assert ledger.spent() == epsilon(released, DELTA)
        assert ledger.spent().epsilon <= TEN_PLAIN
    ledger.close()


MATRIX = MatrixEvent(noise_multiplier=15.0, sensitivity=3.0, rounds=40, separation=5)  # as four of PLAIN


def step(ledger, number, attempt=1, *, place=None, event=MATRIX):
    ledger.spend(
        event, purpose="train", clip=0.5, round_number=number, attempt=attempt, step=number if place is None else place
    )


def fours(count):
    """What so many whole matrix mechanisms cost."""
    return epsilon([MATRIX] * count, DELTA)


def test_a_matrix_mechanism_is_charged_whole_with_its_first_step(tmp_path):
    """After one step of forty as after twenty: 3 / 15 is mu = 1/5, as four releases of z = 10."""
    with opened(tmp_path) as ledger:
        ledger.reserve([MATRIX])
        assert ledger.spent().epsilon == 0
        for number in range(1, 21):
            step(ledger, number)
            assert ledger.spent() == fours(1)
        assert fours(1).epsilon == pytest.approx(epsilon([GaussianEvent(10.0, count=4)], DELTA).epsilon)
    account = Ledger.read(tmp_path)
    assert account.spent() == fours(1)
    assert [(e.mechanism, e.step, e.event) for e in account.entries] == [("matrix", s, MATRIX) for s in range(1, 21)]


def test_its_later_steps_go_on_after_it_was_closed(tmp_path):
    """Two processes, one mechanism: it is charged once, and reserved no more."""
    with opened(tmp_path, fours(1).epsilon) as ledger:
        ledger.reserve([MATRIX])
        step(ledger, 1)
    with opened(tmp_path, fours(1).epsilon) as ledger:
        step(ledger, 2)
        step(ledger, 7)
        assert ledger.spent() == fours(1)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_step_that_is_made_again_is_charged_for_all(tmp_path, place):
    """Steps 1 to 3, then one of them once more: its noise may be other, so it costs as a mechanism of its own."""
    with opened(tmp_path) as ledger:
        for number in (1, 2, 3):
            step(ledger, number)
        step(ledger, place, attempt=2)
        assert ledger.spent() == fours(2)
        step(ledger, 4)
        assert ledger.spent() == fours(2)
    assert Ledger.read(tmp_path).spent() == fours(2)


def test_an_attempt_that_uses_up_a_step_of_its_own_costs_nothing_more(tmp_path):
    """Round 2 failed after its step was written: its second attempt is step 3, within the horizon that is paid for."""
    with opened(tmp_path, fours(1).epsilon) as ledger:
        step(ledger, 1)
        step(ledger, 2)
        step(ledger, 2, attempt=2, place=3)
        assert ledger.spent() == fours(1)


def test_a_second_mechanism_is_refused_where_the_budget_is_of_one(tmp_path):
    """Reserved whole or not at all: nothing is written."""
    with opened(tmp_path, 1.01 * fours(1).epsilon) as ledger:
        ledger.reserve([MATRIX])
        step(ledger, 1)
        written = (tmp_path / "ledger.jsonl").read_bytes()
        with pytest.raises(BudgetExceeded):
            ledger.reserve([MATRIX])
        with pytest.raises(BudgetExceeded):
            step(ledger, 1, attempt=2)
        with pytest.raises(BudgetExceeded):
            spend(ledger, 9)
        assert (tmp_path / "ledger.jsonl").read_bytes() == written


def test_what_is_reserved_for_a_matrix_mechanism_is_its_own(tmp_path):
    """A budget of ten plain releases: with the four it costs reserved, six are left."""
    with opened(tmp_path) as ledger:
        ledger.reserve([MATRIX])
        for number in range(1, 7):
            spend(ledger, number)
        with pytest.raises(BudgetExceeded):
            spend(ledger, 7)
        step(ledger, 8, place=1)


def test_another_horizon_of_one_mechanism_is_charged_whatever_its_first_written_step_is(tmp_path):
    """Step 1 of the second was never written. In what order their steps come says nothing of either; nor a restart."""
    with opened(tmp_path, fours(2).epsilon + 1e-9) as ledger:
        for number, (horizon, place) in enumerate([("a", 1), ("b", 2), ("a", 2), ("b", 3)], 1):
            ledger.spend(MATRIX, purpose="train", clip=0.5, round_number=number, step=place, horizon=horizon)
        assert costs(ledger.entries) == [MATRIX] * 2
    with opened(tmp_path, fours(2).epsilon + 1e-9) as ledger:
        ledger.spend(MATRIX, purpose="train", clip=0.5, round_number=5, step=3, horizon="a")
        with pytest.raises(BudgetExceeded):
            ledger.spend(MATRIX, purpose="train", clip=0.5, round_number=6, step=4, horizon="c")


@pytest.mark.parametrize("place", [0, 41, None])
def test_a_step_outside_the_horizon_is_refused(tmp_path, place):
    """Forty are paid for: they are 1 to 40."""
    with opened(tmp_path) as ledger, pytest.raises(ConfigError, match=r"step must be in \[1, 40\]"):
        ledger.spend(MATRIX, purpose="train", clip=0.5, round_number=1, step=place)


def test_a_lost_line_beside_a_matrix_mechanism_counts_as_all_of_it(tmp_path):
    """It may have been the first of another one."""
    with opened(tmp_path, 10.0) as ledger:
        step(ledger, 1)
        step(ledger, 2)
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    with opened(tmp_path, 10.0) as ledger:
        assert ledger.spent().epsilon == pytest.approx(fours(2).epsilon)


def test_one_torn_line_of_a_matrix_mechanism_is_one_loss():
    """The longest that is likely, with 17 digits a number, is shorter than what counts as two."""
    time = datetime(2026, 1, 1, 1, 1, 1, 123456, tzinfo=UTC)
    digits = 12.345678901234567
    about = {"purpose": "train", "noise_multiplier": digits, "sensitivity": digits, "rounds": 10_000, "separation": 100}
    about |= {"step": 9999, "clip": digits, "horizon": "f" * 32, "round": 9999, "attempt": 11, "time": time}
    longest = MatrixEntry(**about)
    assert SHORTEST_ENTRY < len(longest.model_dump_json()) < 2 * SHORTEST_ENTRY


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 6)), max_size=12))
def test_no_step_is_ever_drawn_twice_for_one_charge(steps):
    """Whatever the order of two purposes' steps: each step was written at most as often as its purpose is charged."""
    time = datetime(2026, 1, 1, tzinfo=UTC)
    about = {"noise_multiplier": 15.0, "sensitivity": 3.0, "rounds": 40, "separation": 5, "clip": 1.0, "time": time}
    entries = [MatrixEntry(purpose=purpose, step=place, round=1, attempt=1, **about) for purpose, place in steps]
    for purpose in ("a", "b"):
        own = [entry for entry in entries if entry.purpose == purpose]
        written = [entry.step for entry in own]
        assert len(costs(own)) >= max((written.count(place) for place in written), default=0)
    assert len(costs(entries)) == sum(len(costs([e for e in entries if e.purpose == p])) for p in ("a", "b"))
