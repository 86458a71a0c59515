import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import httpx
import numpy as np
import pytest

from hybrid import http as hybrid_http
from hybrid.bundle import trusted_key
from hybrid.errors import ConfigError, Halted
from hybrid.federation import checkin
from hybrid.federation.aggregator import Round
from hybrid.federation.checkin import HEALTH, MAX_CHECK_IN, Service, listening
from hybrid.federation.fleet_aggregator import Refused
from hybrid.federation.issuer import RemoteIssuer
from hybrid.federation.remote import RemoteAggregator
from hybrid.federation.tests.test_fleet_aggregator import FLAT, ROUND_S, SAID, body, built, name, plan_of, task
from hybrid.files import write_whole
from hybrid.plan import CHECK_IN, UPDATE, Halt, open_signed
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Ledger


@contextmanager
def opened(parameters=2):
    """An aggregator with an open round, its plan, and a client of its service."""
    aggregator, clock = built(parameters=parameters)
    with (
        clock.during(lambda: aggregator.run_round(1, np.zeros(parameters, np.float32)), ROUND_S) as release,
        listening(aggregator) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        yield aggregator, plan_of(aggregator)[0].id, client, release


def put(client, plan, upload, content):
    return client.put(UPDATE.format(plan=plan, upload=upload), content=content)


def test_a_device_checks_in_and_uploads():
    """The plan's bytes, then 200 twice for the same upload, counted once; no header is one device's."""
    with opened() as (aggregator, plan, client, release):
        answer = client.post(CHECK_IN, json=SAID.model_dump())
        assert (answer.status_code, answer.content) == (200, aggregator.check_in(SAID).body)
        assert set(answer.headers) == {"content-length", "content-type"}
        assert put(client, plan, name(1), body(3, 4)).status_code == 200
        again = put(client, plan, name(1), body(3, 4))
        assert (again.status_code, again.content, dict(again.headers)) == (200, b"", {"content-length": "0"})
        assert put(client, plan, name(1), body(3, 5)).status_code == 409
        assert client.get(HEALTH).status_code == 200
    np.testing.assert_array_equal(release.result().sum, [3, 4])


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", CHECK_IN, b"{}", 400),
        ("POST", CHECK_IN, b"[" * MAX_CHECK_IN, 400),
        ("POST", CHECK_IN, b" " * (MAX_CHECK_IN + 1), 413),
        ("POST", CHECK_IN, b'{"model":"kiosk","version":4,"runtime":1,"device":7}', 400),
        ("GET", CHECK_IN, None, 405),
        ("POST", UPDATE.format(plan=name(1), upload=name(2)), b"", 405),
        ("PUT", UPDATE.format(plan=name(1), upload=name(2)), body(1, 1), 404),
        ("PUT", UPDATE.format(plan=name(1), upload="x" * 32), body(1, 1), 404),
        ("PUT", UPDATE.format(plan=name(1), upload=name(2)[:-1] + "A"), body(1, 1), 404),
        ("GET", "/", None, 404),
        ("POST", HEALTH, b"", 405),
    ],
)
def test_what_is_no_check_in_and_no_upload_is_refused(method, path, content, status):
    with opened() as (_, _, client, _):
        assert client.request(method, path, content=content).status_code == status


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_its_length():
    """With and without a Content-Length; one byte more than the plan's, and a hundred megabytes that are cut short."""
    with opened() as (aggregator, plan, client, release):
        assert put(client, plan, name(1), body(1, 1) + b"\0").status_code == 413
        assert put(client, plan, name(1), iter([body(1, 1), b"\0"])).status_code == 413
        with suppress(httpx.WriteError):  # the answer may come while it is still sending
            assert put(client, plan, name(1), (bytes(1 << 20) for _ in range(100))).status_code == 413
        assert put(client, plan, name(1), body(1, 1)[:-1]).status_code == 400
        assert put(client, plan, name(1), body(1, 1)).status_code == 200
    assert aggregator.refused == {Refused.OVERSIZE: 3, Refused.MALFORMED: 1}
    assert release.result().received == 1


def test_an_upload_that_breaks_off_leaves_nothing():
    """Its sender dies after half of its body; sent again as a whole it counts."""
    with opened() as (_, plan, client, release):
        with closing(socket.create_connection(("127.0.0.1", client.base_url.port))) as dying:
            head = f"PUT {UPDATE.format(plan=plan, upload=name(1))} HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n"
            dying.sendall(head.encode() + body(1, 1)[:8])
        assert put(client, plan, name(1), body(2, 2)).status_code == 200
    np.testing.assert_array_equal(release.result().sum, [2, 2])


def test_a_large_update_is_summed_beside_the_loop():
    """Of 300,000 weights, 1.2 MB; both of (3, 4, 0, ...) are counted."""
    values = np.zeros(300_000, np.float32)
    values[:2] = 3, 4
    assert 4 * len(values) > checkin.LARGE
    with opened(len(values)) as (_, plan, client, release):
        assert [put(client, plan, name(number), body(*values)).status_code for number in (1, 2, 2)] == [200] * 3
    np.testing.assert_array_equal(release.result().sum, 2 * values)


def test_who_is_slow_is_cut_off(monkeypatch):
    """After so many seconds in all, however steadily its bytes drip."""
    monkeypatch.setattr(hybrid_http, "CONNECTION_S", 0.5)
    with opened() as (_, _, client, _), socket.create_connection(("127.0.0.1", client.base_url.port)) as slow:
        begun = time.monotonic()
        head = itertools.chain(b"GET /", itertools.repeat(ord("a")))
        until(lambda: cut(slow, bytes([next(head)])))
        assert 0.4 < time.monotonic() - begun < 5


def cut(connection, byte):
    """Sends it; whether the other side is gone."""
    connection.settimeout(0.05)
    try:
        connection.sendall(byte)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("limit", ["IN_FLIGHT", "IN_FLIGHT_BYTES"])
def test_more_than_it_can_hold_are_told_to_come_again(monkeypatch, limit):
    """One upload stands half-sent in the only place there is; a second is answered 503, and 200 once it is gone."""
    monkeypatch.setattr(checkin, limit, {"IN_FLIGHT": 1, "IN_FLIGHT_BYTES": MAX_CHECK_IN}[limit])
    parameters = MAX_CHECK_IN // 4 - 2  # its update fills MAX_CHECK_IN bytes
    flat = np.zeros(parameters, np.float32)
    with opened(parameters) as (_, plan, client, _):
        first = socket.create_connection(("127.0.0.1", client.base_url.port))
        head = f"PUT {UPDATE.format(plan=plan, upload=name(1))} HTTP/1.1\r\nHost: a\r\n"
        first.sendall(head.encode() + f"Content-Length: {MAX_CHECK_IN}\r\n\r\n".encode() + bytes(10))
        until(lambda: put(client, plan, name(2), body(*flat)).status_code == 503)
        busy = put(client, plan, name(2), body(*flat))
        assert 1 <= int(busy.headers["retry-after"]) <= 10
        assert client.post(CHECK_IN, json=SAID.model_dump()).status_code == 200
        first.close()
        until(lambda: put(client, plan, name(2), body(*flat)).status_code == 200)


def until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline


def test_nothing_of_a_device_is_logged(caplog):
    """At no level: no id of an upload, no address, no weight; nor who sent what is not finite, or how many came."""
    caplog.set_level(0)
    with opened() as (_, plan, client, release):
        client.post(CHECK_IN, json=SAID.model_dump())
        for number, values in enumerate([(0.8125, 1), (float("nan"), 1)]):
            assert put(client, plan, f"{number:031x}e", body(*values)).status_code == 200
        assert put(client, plan, name(3), b"bad").status_code == 400
    release.result()
    said = [record.getMessage() for record in caplog.records if record.name.split(".")[0] in ("hybrid", "uvicorn")]
    port = str(client.base_url.port)
    assert not [line for line in said if any(word in line for word in ("127.0.0.1:", "e " * 8, "0.8125", "nan"))], port
    assert "round 1, attempt 1: released" in said


def test_a_service_that_ends_leaves_no_thread():
    before = threading.active_count()
    with opened():
        assert threading.active_count() > before
    assert threading.active_count() <= before


TOKEN = "t" * 32
SERVICE = {
    "task": task().model_dump(),
    "sampling": 0.5,
    "clip": 5.0,
    "noise_multiplier": 2.0,
    "rounds": 3,
    "epsilon": 8.0,
    "delta": 1e-5,
}


def test_the_rounds_of_a_process_are_reserved_and_what_an_earlier_one_spent_is_among_them(tmp_path):
    """Three rounds cost less than 8; a second process, after one of them, may spend two more, and no fourth."""
    service = Service.model_validate(SERVICE)
    for _ in range(2):
        with service.aggregator(tmp_path / "run", tmp_path / "keys"):
            pass
    event = Round(0.5, 5.0, 2.0, minimum=0).event
    with Ledger.open(tmp_path / "run", budget_epsilon=8.0, delta=1e-5) as ledger:
        ledger.spend(event, purpose="train", clip=5.0, round_number=1)
    with service.aggregator(tmp_path / "run", tmp_path / "keys") as aggregator:
        assert aggregator.check_in(SAID).status == 204
    reserved = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    counts = [line["events"][0]["count"] for line in reserved if line["kind"] == "reserved"]
    assert counts == [3, 3, 1, 2]  # the third: of the entry that was written by hand


def test_queries_in_the_ledger_are_none_of_a_training_s_rounds(tmp_path):
    """One was asked: all three rounds are still to be reserved."""
    service = Service.model_validate(SERVICE)
    with Ledger.open(tmp_path / "run", budget_epsilon=8.0, delta=1e-5) as ledger:
        ledger.spend(GaussianEvent(9.0), purpose="analyze", clip=1.0, round_number=1)
    with service.aggregator(tmp_path / "run", tmp_path / "keys"):
        pass
    last = json.loads((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[-1])
    assert [event["count"] for event in last["events"]] == [3]


NOISELESS = {"noise_multiplier": 0, "epsilon": None, "delta": None}


@contextmanager
def process(tmp_path, port=0, **changes):
    """An aggregator's process, its devices' port, and a ClientApp's way to it."""
    settings, token = tmp_path / "settings.json", tmp_path / "token"
    settings.write_text(json.dumps(SERVICE | changes))
    write_whole(token, TOKEN.encode(), private=True)
    words = [sys.executable, "-m", "hybrid.federation.checkin", "--settings", settings, "--token", token]
    words += ["--folder", tmp_path / "run", "--keys", tmp_path / "keys", "--port", "0", "--control-port", port]
    pipe = subprocess.PIPE
    with subprocess.Popen([*map(str, words)], stdout=pipe, stderr=pipe, text=True) as started:
        try:
            ports = re.findall(r"port (\d+)", started.stdout.readline())
            assert len(ports) == 2, started.communicate()
            url = f"http://127.0.0.1:{ports[1]}"
            yield started, int(ports[0]), RemoteAggregator(url=url, token=TOKEN, run="7", timeout_s=30)
        finally:
            started.kill()


TOKENS = {"name": "issuer.example", "url": "https://issuer.internal:8093", "scope": "kiosk"}


def test_an_issuer_and_its_token_go_together(tmp_path):
    """With both, plans will ask for tokens; neither is left unused."""
    with_tokens, without = (Service.model_validate(SERVICE | NOISELESS | {"tokens": found}) for found in (TOKENS, None))
    for service, token in ((with_tokens, None), (without, "c" * 40)):
        with (
            pytest.raises(ConfigError, match="must be given where the settings have tokens"),
            service.aggregator(tmp_path, tmp_path / "keys", issuer_token=token),
        ):
            pass
    with with_tokens.aggregator(tmp_path, tmp_path / "keys", issuer_token="c" * 40) as aggregator:
        assert aggregator._windows == RemoteIssuer(
            name="issuer.example", url="https://issuer.internal:8093", token="c" * 40, scope="kiosk"
        )
    assert Service.model_validate_json(with_tokens.model_dump_json()) == with_tokens


def checked_in(port, said=SAID):
    return httpx.post(f"http://127.0.0.1:{port}{CHECK_IN}", json=said.model_dump(), trust_env=False)


def end(started):
    """As whoever runs it ends it."""
    started.terminate()
    said, logged = started.communicate(timeout=30)
    assert (started.returncode, said) == (0, "")
    lines = [line.split(" ", maxsplit=2)[2] for line in logged.splitlines()]
    assert [line for line in lines if not re.fullmatch(r"round \d+, attempt \d+: released", line)] == [
        "uploads not taken: none"
    ]


def test_a_process_opens_rounds_for_its_client_and_ends_when_it_is_told_to(tmp_path):
    """Between rounds devices are told when to come; one that comes is in the sum. Without noise there is no ledger."""
    with process(tmp_path, task=SERVICE["task"] | {"round_s": 1}, **NOISELESS) as (started, port, client):
        assert checked_in(port).status_code == 204
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(client.run_round, 1, FLAT)
            until(lambda: checked_in(port).status_code == 200)
            plan, weights = open_signed(checked_in(port).content, trusted_key(tmp_path / "keys" / "bundle-signing.pub"))
            np.testing.assert_array_equal(weights, FLAT)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as device:
                assert put(device, plan.id, name(1), body(3, 4)).status_code == 200
            np.testing.assert_allclose(coming.result(20).sum, [3, 4])
        end(started)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_settings_that_are_wrong_are_one_sentence(tmp_path):
    """Out of range, or noise without a budget."""
    for wrong, told in (
        ({"sampling": 2}, "aggregator: Service.sampling: Input should be less than or equal to 1, got 2"),
        ({"epsilon": None}, "aggregator: Service: epsilon and delta must be given with noise"),
        ({"noise_multiplier": 0}, "aggregator: Service: epsilon and delta must be given with noise"),
    ):
        with pytest.raises(AssertionError) as failed, process(tmp_path, **wrong):
            pass
        assert told in str(failed.value)


def test_an_aggregator_killed_in_a_round_runs_it_again_for_the_client_that_waits(tmp_path):
    """Another plan, one release, one entry: what was lost had not been paid for."""
    task_of_two_seconds = SERVICE["task"] | {"round_s": 2}
    with ThreadPoolExecutor(1) as thread:
        with process(tmp_path, task=task_of_two_seconds) as (killed, port, client):
            coming = thread.submit(client.run_round, 1, FLAT)
            until(lambda: checked_in(port).status_code == 200)
            first = checked_in(port).content
            killed.kill()
            killed.wait()
        control = int(client.url.split(":")[-1])
        with process(tmp_path, control, task=task_of_two_seconds) as (started, port, _):
            until(lambda: checked_in(port).status_code == 200)
            assert checked_in(port).content != first
            assert np.isfinite(coming.result(20).sum).all()
            end(started)
    entries = Ledger.read(tmp_path / "run").entries
    assert [(entry.round, entry.attempt) for entry in entries] == [(1, 1)]


def test_a_halt_ends_the_open_round_reaches_devices_and_survives_kill_9(tmp_path):
    """No round of the version is run any more, and devices get the signed halt."""
    halt, trust = Halt(model="kiosk", versions=(4,), reason="it is wrong"), tmp_path / "keys" / "bundle-signing.pub"
    with process(tmp_path, **NOISELESS) as (killed, port, client), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(client.run_round, 1, FLAT)
        until(lambda: checked_in(port).status_code == 200)
        client.halt(halt)
        with pytest.raises(Halted, match="the round was stopped: version 4 was halted"):
            coming.result(20)
        killed.kill()
    with process(tmp_path, **NOISELESS) as (started, port, client):
        with pytest.raises(Halted, match="no round is opened now: version 4 was halted"):
            client.run_round(1, FLAT)
        assert open_signed(checked_in(port).content, trusted_key(trust))[0] == halt
        end(started)
