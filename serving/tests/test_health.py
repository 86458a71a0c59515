import asyncio
import urllib.error
import urllib.request

import pytest

from serving.health import STARTING_S, WITHIN_S, Health, with_health
from serving.telemetry import Telemetry


@pytest.fixture
def seconds():
    return [0.0]


def test_a_loop_that_does_not_go_round_is_stuck(seconds):
    """It may take 300 s to start and 60 s between two rounds; a process without a loop is alive as it answers."""
    health = Health(lambda: seconds[0])
    assert health.live() is None
    health.begin()
    seconds[0] = STARTING_S
    assert health.live() is None
    seconds[0] += 1
    assert health.live() == "stuck"
    health.beat()
    seconds[0] += WITHIN_S
    assert health.live() is None
    seconds[0] += 1
    assert health.live() == "stuck"


def test_a_process_is_ready_once_it_lacks_nothing():
    """It is starting until somebody knows better."""
    health, lacking = Health(), ["triton", None]
    assert health.ready() == "starting"
    health.watch(lambda: lacking.pop(0))
    assert [health.ready(), health.ready()] == ["triton", None]


def test_probes_are_answered_beside_the_metrics(seconds):
    """200 and 503, with a word; other paths are the metrics'."""

    def get(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    telemetry = Telemetry()
    telemetry.health = health = Health(lambda: seconds[0])
    with telemetry.exposed(0) as port:
        assert (get("/health/live"), get("/health/ready")) == ((200, b"ok\n"), (503, b"starting\n"))
        health.watch(lambda: None)
        health.begin()
        seconds[0] = STARTING_S + 1
        assert (get("/health/live"), get("/health/ready")) == ((503, b"stuck\n"), (200, b"ok\n"))
        assert get("/metrics")[0] == 200


def test_a_probe_that_takes_long_holds_up_no_other():
    """Readiness asks Triton, for up to 2 s; meanwhile liveness is answered."""
    health, answered = Health(), []

    async def scenario():
        loop, begun, release = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def lacking():
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)

        async def ask(path):
            async def send(message):
                pass

            await app({"type": "http", "path": path}, None, send)
            answered.append(path)

        health.watch(lacking)
        app = with_health(None, health)
        ready = asyncio.create_task(ask("/health/ready"))
        await begun.wait()
        await ask("/health/live")
        release.set()
        await ready

    asyncio.run(scenario())
    assert answered == ["/health/live", "/health/ready"]
