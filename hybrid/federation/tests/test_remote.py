import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import (
    AggregatorError,
    BudgetExceeded,
    CohortTooSmall,
    ConfigError,
    Halted,
    NotFound,
    RoundEnded,
    RoundStopped,
)
from hybrid.federation.remote import (
    Key,
    Order,
    RemoteAggregator,
    Rounds,
    StaleRound,
    Training,
    control_app,
    controlled,
)
from hybrid.plan import Halt
from hybrid.privacy.mechanisms import Release

TOKEN = "t" * 32
SIZE = 3
FLAT = np.array([1.0, -2.0, 0.1], dtype=np.float32)


class Doubling:
    """Releases twice the weights, and how often it was asked: no two releases are the same."""

    def __init__(self, error=None):
        self.runs, self.error = [], error
        self.let_go = threading.Event()
        self.let_go.set()

    def run_round(self, number, flat):
        self.runs.append(number)
        self.let_go.wait()
        if self.error is not None:
            raise self.error
        return Release(2.0 * flat.astype(np.float64) + 1e-12 * len(self.runs), received=7, clip=1.0)


class Switched:
    """A kill switch of "kiosk" that keeps what it is told; this plan is open."""

    def __init__(self, plan=None):
        self.told, self.plan = [], plan

    def halt(self, said):
        if said.model != "kiosk":
            raise ConfigError("model must be 'kiosk'")
        self.told.append(said)

    def training(self):
        return Training(model="kiosk", plan=self.plan, halted=None)

    def suspend(self, order):
        self.told.append(("suspend", order))

    def resume(self, order):
        self.told.append(("resume", order))

    def end(self, plan, order):
        if plan != self.plan:
            raise NotFound("no such plan")
        self.told.append((plan, order))


@contextmanager
def serving(aggregator, folder, port=0, switch=None):
    """Yields the port on which the control side answers."""
    app = control_app(aggregator, TOKEN, size=SIZE, folder=folder, switch=switch)
    with controlled(app, host="127.0.0.1", port=port) as bound:
        try:
            yield bound
        finally:
            aggregator.let_go.set()


def client(port, **changes):
    return RemoteAggregator(
        **{"url": f"http://127.0.0.1:{port}", "token": TOKEN, "run": "1", "timeout_s": 20} | changes
    )


def send(port, method="PUT", path="/rounds/1/1/1", token=TOKEN, **request):
    headers = {"authorization": f"Bearer {token}"}
    return httpx.request(method, f"http://127.0.0.1:{port}{path}", headers=headers, trust_env=False, **request)


def test_a_round_over_the_wire_is_the_aggregators_release_bit_for_bit(tmp_path):
    """1, -2 and 0.1 as float32, doubled in float64, plus 1e-12 of its first run."""
    with serving(Doubling(), tmp_path) as port:
        release = client(port).run_round(1, FLAT)
    assert release.sum.tolist() == [2.0 + 1e-12, -4.0 + 1e-12, 2.0 * float(np.float32(0.1)) + 1e-12]


def test_how_many_took_part_does_not_leave(tmp_path):
    """Seven did; what comes is 24 bytes, and the release says 0."""
    with serving(Doubling(), tmp_path) as port:
        assert client(port).run_round(1, FLAT).received == 0
        answer = send(port, "GET")
    assert len(answer.content) == 8 * SIZE
    assert not any("7" in value for name, value in answer.headers.items() if name.startswith("x-"))


def test_asked_again_it_gives_the_same_release_and_runs_no_round(tmp_path):
    """Five clients at once, and one later: one run, one sum."""
    aggregator, sums = Doubling(), []
    with serving(aggregator, tmp_path) as port:
        ask = [threading.Thread(target=lambda: sums.append(client(port).run_round(4, FLAT).sum)) for _ in range(5)]
        for one in ask:
            one.start()
        for one in ask:
            one.join()
        sums.append(client(port).run_round(4, FLAT).sum)
    assert aggregator.runs == [4]
    assert len({one.tobytes() for one in sums}) == 1


def test_a_process_that_takes_over_gives_the_release_that_was_kept(tmp_path):
    """The second aggregator runs nothing for round 1, and runs round 2."""
    first, second = Doubling(), Doubling()
    with serving(first, tmp_path) as port:
        before = client(port).run_round(1, FLAT).sum
    with serving(second, tmp_path) as port:
        np.testing.assert_array_equal(client(port).run_round(1, FLAT).sum, before)
        assert second.runs == []
        client(port).run_round(2, FLAT)
    assert second.runs == [2]


@given(steps=st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)))))
@settings(deadline=None, max_examples=60)
def test_whatever_is_asked_in_whatever_order_a_round_has_one_release(tmp_path_factory, steps):
    """None stands for a process that died and was started again."""
    folder, aggregator, seen = tmp_path_factory.mktemp("rounds"), Doubling(), {}
    rounds = Rounds(aggregator, folder)
    for step in steps:
        if step is None:
            rounds.close()
            rounds = Rounds(aggregator, folder)
            continue
        key = Key(f"run{step[0]}", *step[1:])
        try:
            rounds.open(key, FLAT)
        except StaleRound:
            continue
        released = rounds.answer(key).result()
        assert seen.setdefault(key, released) == released
        if len(seen) > 1:
            assert len(set(seen.values())) == len(seen)
    rounds.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CohortTooSmall("round 1: 3 answered, at least 5 must"), "fewer answered than may be released together"),
        (BudgetExceeded("no budget left"), "no budget left"),
        (Halted("version 4 was halted"), "version 4 was halted"),
    ],
)
def test_what_the_aggregator_refuses_is_the_same_error_at_the_client(tmp_path, error, told):
    """How many answered is not told; asked again, it is not tried again."""
    aggregator = Doubling(error)
    with serving(aggregator, tmp_path) as port:
        for _ in range(2):
            with pytest.raises(type(error), match=f"^{told}$"):
                client(port).run_round(1, FLAT)
    assert aggregator.runs == [1]


def test_another_failure_says_its_kind_and_not_its_text(tmp_path, caplog):
    """A library's message may hold values: neither who asks nor the log is told it."""
    aggregator = Doubling(ValueError("the update was 0.731"))
    told = pytest.raises(AggregatorError, match="the round failed with ValueError")
    with serving(aggregator, tmp_path) as port, told as refused:
        client(port).run_round(1, FLAT)
    gc.collect()  # of futures whose exception nobody asked for, which asyncio would log
    assert "0.731" not in str(refused.value) + caplog.text


@pytest.mark.parametrize(
    ("later", "earlier"),
    [
        ({"run": "1", "number": 3}, {"run": "1", "number": 2}),
        ({"run": "1", "number": 3, "attempt": 2}, {"run": "1", "number": 3, "attempt": 1}),
    ],
)
def test_a_round_that_is_over_is_not_run_again(tmp_path, later, earlier):
    """A message that comes late spends nothing."""
    aggregator = Doubling()
    with serving(aggregator, tmp_path) as port:
        ask = {"attempt": 1} | later
        client(port, run=ask["run"], attempt=ask["attempt"]).run_round(ask["number"], FLAT)
        ask = {"attempt": 1} | earlier
        with pytest.raises(StaleRound):
            client(port, run=ask["run"], attempt=ask["attempt"]).run_round(ask["number"], FLAT)
    assert aggregator.runs == [later["number"]]


def test_a_run_that_gave_way_to_another_is_over(tmp_path):
    """Run a, then b: a's next round is stale, b's is not."""
    aggregator = Doubling()
    with serving(aggregator, tmp_path) as port:
        client(port, run="a").run_round(5, FLAT)
        client(port, run="b").run_round(1, FLAT)
        with pytest.raises(StaleRound):
            client(port, run="a").run_round(6, FLAT)
        client(port, run="b").run_round(2, FLAT)
    assert aggregator.runs == [5, 1, 2]


@pytest.mark.parametrize(
    ("request_", "status", "error"),
    [
        ({"token": "x" * 32}, 401, "unauthenticated"),
        ({"token": "x"}, 401, "unauthenticated"),
        ({"content": b"\0" * (4 * SIZE + 1)}, 413, "body_too_large"),
        ({"content": iter([b"\0" * 1_000_000] * 4)}, 413, "body_too_large"),
        ({"content": b"\0" * (4 * SIZE - 1)}, 400, "bad_request"),
        ({"content": np.array([np.nan] * SIZE, "<f4").tobytes()}, 400, "bad_request"),
        ({"path": "/rounds/1/0/1"}, 400, "bad_request"),
        ({"path": "/rounds/1/1/-1"}, 400, "bad_request"),
        ({"path": "/rounds/..%2f/1/1"}, 404, None),
        ({"method": "GET", "path": "/rounds/1/1/1?wait_s=31"}, 400, "bad_request"),
        ({"method": "GET", "path": "/rounds/1/1/1?wait_s=nan"}, 400, "bad_request"),
        ({"method": "GET"}, 404, "unknown_round"),
        ({"method": "DELETE"}, 405, None),
        ({"method": "POST", "path": "/halt", "content": b"{}"}, 404, "no_devices"),
    ],
)
def test_a_wrong_request_is_refused_and_opens_nothing(tmp_path, request_, status, error):
    """One word says why."""
    aggregator = Doubling()
    with serving(aggregator, tmp_path) as port:
        answer = send(port, **request_)
    assert answer.status_code == status
    if error is not None:
        assert answer.json()["error"] == error
    assert aggregator.runs == []


def test_a_waiting_request_is_answered_when_the_round_is_over(tmp_path):
    """202 while it runs; then the one that waits up to 30 s is answered at once."""
    aggregator = Doubling()
    aggregator.let_go.clear()
    with serving(aggregator, tmp_path) as port:
        assert send(port, content=FLAT.tobytes()).status_code == 202
        assert send(port, "GET").status_code == 202
        threading.Timer(0.2, aggregator.let_go.set).start()
        answer = send(port, "GET", "/rounds/1/1/1?wait_s=30", timeout=25)
    assert answer.status_code == 200


def test_a_client_outlives_its_aggregators_restart(tmp_path):
    """It asks while the first server goes away; the second gives it the round."""
    first, second, found = Doubling(), Doubling(), []
    first.let_go.clear()
    with serving(first, tmp_path / "first") as port:
        asking = threading.Thread(target=lambda: found.append(client(port).run_round(1, FLAT)))
        asking.start()
        while not first.runs:
            pass
    with serving(second, tmp_path / "second", port):
        asking.join()
    assert len(found) == 1


def test_a_client_waits_for_who_takes_over_from_an_aggregator_that_ends(tmp_path):
    """The first is told to stop in the round; the second, on its port, runs it."""
    first, second = Doubling(RoundStopped("its process ends")), Doubling()
    first.let_go.clear()
    with ThreadPoolExecutor(1) as thread:
        with serving(first, tmp_path) as port:
            asked = thread.submit(client(port).run_round, 1, FLAT)
            while not first.runs:
                pass
            first.let_go.set()
            until(lambda: send(port, "GET").status_code == 503)
        with serving(second, tmp_path, port):
            np.testing.assert_allclose(asked.result(20).sum, 2 * FLAT, atol=1e-9)
    assert (set(first.runs), second.runs) == ({1}, [1])


def until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline


def test_a_halt_reaches_the_kill_switch_of_who_holds_the_token(tmp_path):
    """Word for word; a body that is none, another token, and what the switch refuses are refused."""
    switch, halt = Switched(), Halt(model="kiosk", versions=(3, 4), reason="it is wrong")
    with serving(Doubling(), tmp_path, switch=switch) as port:
        client(port).halt(halt)
        with pytest.raises(AggregatorError, match="model must be 'kiosk'"):
            client(port).halt(halt.model_copy(update={"model": "other"}))
        with pytest.raises(AggregatorError, match="show the aggregator's token"):
            client(port, token="x" * 32).halt(halt)
        answer = send(port, "POST", "/halt", content=b'{"model": "kiosk", "versions": [], "reason": "7.25"}')
        assert (answer.status_code, answer.json()["message"]) == (
            400,
            "the body must be a Halt as JSON; wrong: versions",
        )
        assert send(port, "POST", "/halt", content=b" " * (1 << 17)).status_code == 413
    assert switch.told == [halt]
    with pytest.raises(AggregatorError, match="did not take it"):
        client(port).halt(halt)


def test_training_is_halted_and_resumed_and_a_round_ended_by_who_holds_the_token(tmp_path):
    """Each is said word for word; what is not open cannot be ended; where people are simulated there is no switch."""
    switch, order = Switched(plan="ab" * 16), Order(model="kiosk", reason="loss rose")
    with serving(Doubling(), tmp_path, switch=switch) as port:
        assert client(port).training() == Training(model="kiosk", plan="ab" * 16, halted=None)
        client(port).suspend(order)
        client(port).resume(order)
        client(port).end("ab" * 16, order)
        with pytest.raises(NotFound, match="no such plan"):
            client(port).end("cd" * 16, order)
        assert send(port, "POST", "/training/halt", content=b'{"model": "kiosk"}').json()["message"] == (
            "the body must be an Order as JSON; wrong: reason"
        )
        assert send(port, "GET", "/training", token="x" * 32).status_code == 401
    assert switch.told == [("suspend", order), ("resume", order), ("ab" * 16, order)]
    with serving(Doubling(), tmp_path) as port, pytest.raises(AggregatorError, match="simulates its people"):
        client(port).suspend(order)


def test_an_ended_round_is_ended_for_who_asks_again_also_after_a_restart(tmp_path):
    """The next one is run; ending the same plan again is taken, and ends nothing else."""
    order, plan = Order(model="kiosk", reason="wrong clip"), "ab" * 16
    aggregator = Doubling(RoundEnded("wrong clip"))
    with serving(aggregator, tmp_path, switch=Switched(plan)) as port:
        with pytest.raises(RoundEnded, match="wrong clip"):
            client(port).run_round(1, FLAT)
        client(port).end(plan, order)
        client(port).end(plan, order)
    second, switch = Doubling(), Switched()
    with serving(second, tmp_path, switch=switch) as port:
        client(port).end(plan, order)
        with pytest.raises(RoundEnded, match="wrong clip"):
            client(port).run_round(1, FLAT)
        client(port).run_round(2, FLAT)
    assert (second.runs, switch.told) == ([2], [])


def test_what_was_released_stays_so_where_its_plan_is_ended_later(tmp_path):
    """As with a buffer, whose plans go on: the sum that was kept is given again, also by the next process."""
    plan = "ab" * 16
    with serving(Doubling(), tmp_path, switch=Switched(plan)) as port:
        before = client(port).run_round(1, FLAT).sum
        client(port).end(plan, Order(model="kiosk", reason="wrong clip"))
    with serving(Doubling(), tmp_path) as port:
        np.testing.assert_array_equal(client(port).run_round(1, FLAT).sum, before)


def test_a_round_that_was_stopped_is_run_once_training_goes_on(tmp_path):
    """Who asked for it asks on."""
    aggregator = Doubling(RoundStopped("training is halted"))
    with serving(aggregator, tmp_path) as port, ThreadPoolExecutor(1) as thread:
        asked = thread.submit(client(port).run_round, 1, FLAT)
        until(lambda: len(aggregator.runs) > 1)
        aggregator.error = None
        np.testing.assert_allclose(asked.result(20).sum, 2 * FLAT, atol=1e-9)


def test_a_client_gives_up_in_time():
    """Nobody listens there."""
    from hybrid.local.process import free_ports

    with pytest.raises(AggregatorError, match=r"did not answer round 1 in 0\.1 s"):
        client(free_ports(1)[0], timeout_s=0.1).run_round(1, FLAT)


def test_elsewhere_only_with_certificates():
    """Weights and sums would cross a network in plain sight."""
    with pytest.raises(ConfigError, match="https"):
        client(1, url="http://aggregator.example:8443")
    with pytest.raises(ConfigError, match="certificate must be given"), controlled(None, host="0.0.0.0", port=0):
        pass
