import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hybrid import gates
from hybrid.console.health import LAST_S, Pulse
from hybrid.errors import StackError


class Process(ThreadingHTTPServer):
    """A gateway or worker, as far as its metrics go."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.text, self.url = "", f"http://127.0.0.1:{self.server_port}/metrics"


class _Handler(BaseHTTPRequestHandler):
    server: Process

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def process() -> Iterator[Process]:
    with Process() as process:
        thread = threading.Thread(target=process.serve_forever, args=(0.01,))
        thread.start()
        yield process
        process.shutdown()
        thread.join()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def gateway(ok: int, failed: int, fast: int, *, lag: int | None = None) -> str:
    """Requests of version 2 of the shop, of which so many took at most 10 ms; another model's beside them."""
    pair = 'model="shop",version="2"'
    lines = [
        f'hybrid_gateway_requests_total{{{pair},code="ok"}} {ok}',
        f'hybrid_gateway_requests_total{{{pair},code="unavailable"}} {failed}',
        f'hybrid_gateway_request_seconds_bucket{{{pair},le="0.01"}} {fast}',
        f'hybrid_gateway_request_seconds_bucket{{{pair},le="+Inf"}} {ok + failed}',
        'hybrid_gateway_requests_total{model="other",version="1",code="ok"} 7',
        *([] if lag is None else [f"hybrid_worker_lag_records {lag}"]),
    ]
    return "\n".join(lines) + "\n"


def test_health_is_what_was_counted_between_the_first_and_the_last_look(process: Process):
    """100 requests in 50 s, of which 4 without an answer; what was counted before the console came is left out."""
    clock = Clock()
    pulse = Pulse(lambda: [process.url], clock=clock)
    for now, text in ((100, gateway(1000, 50, 1000)), (125, gateway(1040, 52, 1040)), (150, gateway(1096, 54, 1095))):
        clock.now, process.text = now, text
        pulse.look()
    found = pulse.health("shop")
    assert (found.seconds, found.read, found.unread, found.lag) == (50, 1, (), None)
    assert (found.versions[2].requests, found.versions[2].failed) == (100, 4)
    assert found.versions[2].seconds == {0.01: 95, math.inf: 100}
    assert pulse.health("other").versions == {}


def test_a_process_that_was_started_anew_counts_from_zero(process: Process):
    """10 before it died, and 30 after: 40, not the 20 between first and last look."""
    clock = Clock()
    pulse = Pulse(lambda: [process.url], clock=clock)
    for now, ok in ((100, 10), (110, 20), (120, 5), (130, 30)):
        clock.now, process.text = now, gateway(ok, 0, 0)
        pulse.look()
    assert pulse.health("shop").versions[2].requests == 40


def test_only_the_last_minutes_count(process: Process):
    """A look of longer ago than five minutes is forgotten, and so is what was counted until the next."""
    clock = Clock()
    pulse = Pulse(lambda: [process.url], clock=clock)
    for now, ok in ((0, 0), (50, 900), (LAST_S + 10, 910)):
        clock.now, process.text = now, gateway(ok, 0, 0)
        pulse.look()
    assert pulse.health("shop").versions[2].requests == 10


def test_lags_of_workers_are_added(process: Process):
    """Two of 3 records: the same process by two names."""
    process.text = gateway(1, 0, 1, lag=3)
    pulse = Pulse(lambda: [process.url, process.url.replace("127.0.0.1", "localhost")])
    pulse.look()
    assert (pulse.health("shop").lag, pulse.health("shop").read) == (6, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [("not metrics at all {", "Prometheus' text format"), ("# x\n" * 50, "more than 100 bytes")],
)
def test_what_is_no_process_is_said_in_words(process: Process, monkeypatch, text, said):
    """With its address; its numbers are not shown any more."""
    monkeypatch.setattr(gates, "MOST_BYTES", 100)
    pulse = Pulse(lambda: [process.url])
    process.text = text
    pulse.look()
    (why,) = pulse.health("shop").unread
    assert process.url in why
    assert said in why


def test_a_process_that_is_gone_is_said_and_its_numbers_go(process: Process):
    """It was read before; now nobody listens there."""
    urls = [process.url]
    pulse = Pulse(lambda: urls)
    process.text = gateway(5, 0, 5)
    pulse.look()
    urls[0] = "http://127.0.0.1:9/metrics"
    pulse.look()
    found = pulse.health("shop")
    assert (found.read, found.versions) == (0, {})
    assert found.unread == ("http://127.0.0.1:9/metrics cannot be read: ConnectError",)


def test_a_stack_that_is_down_is_said_and_looking_goes_on(process: Process):
    """As the command says it; once it is up, it is read."""
    up, seen = threading.Event(), threading.Event()

    def processes() -> list[str]:
        if not up.is_set():
            raise StackError("the local stack is not up: `hybrid up`")
        seen.set()
        return [process.url]

    process.text = gateway(5, 0, 5)
    with Pulse(processes, every_s=0.01) as pulse:
        while not pulse.health("shop").unread:
            pass
        assert pulse.health("shop").unread == ("the local stack is not up: `hybrid up`",)
        up.set()
        assert seen.wait(10)
    assert pulse.health("shop").unread == ()
