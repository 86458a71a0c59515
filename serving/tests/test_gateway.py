import asyncio
import json

import httpx
import numpy as np
import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from hybrid.errors import BodyTooLarge, Overloaded, Unavailable
from hybrid.http import read_body
from serving import gateway as gateway_module
from serving.access import Access, ApiKey, ApiKeys, Buckets
from serving.deployments import Deployments
from serving.gateway import Gateway, application
from serving.oip import Answers
from serving.telemetry import Telemetry
from serving.testing import deployment

INPUTS = [
    {"name": "entity", "datatype": "BYTES", "shape": [1], "data": ["bakery"]},
    {"name": "hour", "datatype": "BYTES", "shape": [1], "data": ["7AM"]},
    {"name": "budget", "datatype": "FP32", "shape": [1], "data": [2]},
    {"name": "device_embedding", "datatype": "FP32", "shape": [1, 2], "data": [3, 4]},
]
BODY = json.dumps({"inputs": INPUTS}).encode()


class Setup:
    """The HTTP side over an `ask` that adds up the request's slots and the embedding."""

    def __init__(self, folder, access=Access()):  # noqa: B008  nothing changes it
        deployment().write(folder)
        self.is_ready, self.error = True, None
        self.telemetry = Telemetry()
        gateway = Gateway(
            Deployments(folder), self.ask, lambda: self.is_ready, access, max_body_bytes=2_000, telemetry=self.telemetry
        )
        self.client = TestClient(application(gateway), raise_server_exceptions=False)

    async def ask(self, _, rows, timeout_s):
        self.timeout_s = timeout_s
        if self.error:
            raise self.error
        total = rows.request.sum(axis=1) + rows.embedding.sum(axis=1)
        return Answers(total.astype(np.float32), np.full(len(rows), 60_000), ["ok"] * len(rows), ["none"] * len(rows))

    def infer(self, body=BODY, path="/v2/models/shop/infer", **options):
        return self.client.post(path, content=body, **options)


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


@pytest.mark.parametrize("path", ["/v2/models/shop/infer", "/v2/models/shop/versions/1/infer"])
def test_a_request_is_answered_by_the_default_or_the_named_version(setup, path):
    """7AM is slot 0, the budget 2, the embedding 3 + 4: 9."""
    answer = setup.infer(path=path)
    assert answer.status_code == 200
    assert {o["name"]: o["data"] for o in answer.json()["outputs"]} == {
        "prediction": [9.0],
        "version": [1],
        "feature_age_ms": [60_000],
        "merged": ["server"],
        "transport": ["kafka"],
        "status": ["ok"],
        "fallback": ["none"],
    }


def test_health_follows_the_broker(setup):
    """Live at once; ready, and the model with it, once Kafka's two ends are there."""
    setup.is_ready = False
    status = {p: setup.client.get(f"/v2/{p}").status_code for p in ("health/live", "health/ready", "models/shop/ready")}
    assert status == {"health/live": 200, "health/ready": 503, "models/shop/ready": 503}
    setup.is_ready = True
    assert setup.client.get("/v2/health/ready").status_code == 200
    assert setup.client.get("/v2/models/shop/versions/1/ready").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/models/other", 404, "unknown_model"),
        ("GET", "/v2/models/shop/versions/2", 404, "unknown_model"),
        ("GET", "/v2/models/shop/versions/x/ready", 404, "unknown_model"),
        ("POST", "/v2/models/other/infer", 404, "unknown_model"),
        ("GET", "/v3", 404, "no_such_path"),
        ("GET", "/v2/models/shop/infer", 405, "no_such_path"),
    ],
)
def test_what_is_not_there_is_said_in_the_protocols_error_object(setup, method, path, status, code):
    """Every error has a text and a word."""
    answer = setup.client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_an_oversize_body_is_refused_while_it_is_read():
    """Of an endless body, 16 MiB are read and dropped, so that a client sees the answer; one more ends it."""
    chunks = []

    async def receive():
        chunks.append(1)
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    with pytest.raises(BodyTooLarge, match="at most 2000 bytes"):
        asyncio.run(read_body(Request({"type": "http"}, receive), 2_000, dropped=16 << 20))
    assert len(chunks) == 17


def test_a_body_of_the_largest_size_is_taken(setup):
    """2,000 bytes are taken, 2,001 are not."""
    assert setup.infer(BODY.ljust(2_000)).status_code == 200
    assert setup.infer(BODY.ljust(2_001)).status_code == 413


def test_a_compressed_body_is_refused(setup):
    """It could unpack to any size."""
    answer = setup.infer(headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_unavailable_says_when_to_come_back(setup):
    """503 with Retry-After, in seconds."""
    setup.error = Unavailable("no answer in time (5 s)")
    answer = setup.infer()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json() == {"error": "no answer in time (5 s)", "code": "unavailable"}


def test_without_kafka_a_request_is_refused_at_once(setup):
    """A good one is told to come back; a bad one what is wrong with it."""
    setup.is_ready = False
    answer = setup.infer()
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "unavailable", "1")
    assert setup.infer(b"{").status_code == 400


def test_an_error_of_ours_is_said_in_the_protocols_error_object_without_its_text(setup, caplog):
    """500; what went wrong may hold a caller's values, so neither the answer nor the log repeats it."""
    setup.error = KeyError("bakery")
    answer = setup.infer()
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error", "code": "internal"})
    assert "internal error: KeyError in ask" in caplog.text
    assert "bakery" not in caplog.text


def test_only_health_is_open(tmp_path):
    """401 with a challenge, on paths that are not there too; with the key, answers; its rows are counted."""
    key, text = ApiKey.issue("shop-app")
    (tmp_path / "keys").write_text(f"{key}\n")
    setup = Setup(tmp_path / "deployments", Access(ApiKeys(tmp_path / "keys"), rows=Buckets(1, 1)))
    shown = {"Authorization": f"Bearer {text}"}
    assert setup.client.get("/v2/health/live").status_code == 200
    assert setup.client.get("/v2/health/ready").status_code == 200
    for path in ("/v2", "/v2/models/shop", "/openapi.json", "/nowhere", "/v2/health/live/", "//v2/health/live"):
        refused = setup.client.get(path, follow_redirects=False)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")
        assert refused.headers["WWW-Authenticate"] == 'Bearer realm="hybrid"'
    assert setup.client.get("/v2", headers=shown).status_code == 200
    assert setup.infer().status_code == 401
    twice = [("Authorization", shown["Authorization"])] * 2
    assert setup.infer(headers=twice).status_code == 401
    assert setup.infer(headers=shown).status_code == 200
    limited = setup.infer(headers=shown)
    assert (limited.status_code, limited.json()["code"], limited.headers["Retry-After"]) == (429, "rate_limited", "1")


def test_too_many_requests_are_refused_before_their_bodies_are_read(tmp_path):
    """2 at once; the third body is not even looked at."""
    setup = Setup(tmp_path, Access(requests=Buckets(0.5, 2)))
    assert [setup.infer().status_code for _ in range(2)] == [200, 200]
    refused = setup.infer(b"{")
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")


def test_overload_is_not_a_failure(setup):
    """429 with Retry-After, and a word of its own."""
    setup.error = Overloaded("too many rows wait")
    answer = setup.infer()
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (429, "overloaded", "1")


def test_the_callers_timeout_reaches_the_exchange(setup):
    """In microseconds, as Triton has it; 0 is none; what is no such number is refused."""
    for given, found in ((2_500_000, 2.5), (0, None), ("1000000", 1.0)):
        body = json.dumps({"inputs": INPUTS, "parameters": {"timeout": given}}).encode()
        assert setup.infer(body).status_code == 200
        assert setup.timeout_s == found
    for wrong in (-1, 1.5, True, "soon", [1]):
        body = json.dumps({"inputs": INPUTS, "parameters": {"timeout": wrong}}).encode()
        assert setup.infer(body).json()["code"] == "bad_request"


def test_an_error_of_ours_at_the_door_is_said_like_any_other(tmp_path, caplog):
    """500 without its text, not a connection that ends."""

    class Broken:
        async def client(self, token):
            raise KeyError(token)

    setup = Setup(tmp_path, Access(Broken()))
    answer = setup.client.get("/v2", headers={"Authorization": "Bearer secret"})
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error", "code": "internal"})
    assert "secret" not in caplog.text


def test_bodies_have_so_much_room_and_no_more(tmp_path):
    """Of 900 bytes, a body of 600 leaves 300: a second one is told to come back, while health answers."""

    async def scenario():
        entered, go = asyncio.Event(), asyncio.Event()

        async def ask(_, rows, __):
            entered.set()
            await go.wait()
            return Answers(np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64), ["ok"], ["none"])

        deployment().write(tmp_path)
        app = application(Gateway(Deployments(tmp_path), ask, lambda: True), held_bytes=900)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            body = BODY.ljust(600)
            first = asyncio.create_task(client.post("/v2/models/shop/infer", content=body))
            await entered.wait()
            second = await client.post("/v2/models/shop/infer", content=body)
            assert (second.status_code, second.json()["code"], second.headers["Retry-After"]) == (
                429,
                "overloaded",
                "1",
            )
            assert (await client.get("/v2/health/live")).status_code == 200
            go.set()
            assert (await first).status_code == 200
            assert (await client.post("/v2/models/shop/infer", content=body)).status_code == 200

    asyncio.run(scenario())


def test_a_body_that_is_too_large_takes_no_more_room_than_the_largest(setup):
    """A hundred of 1.6 MB are refused one by one, and the room is whole again."""
    assert {setup.infer(bytes(1_600_000)).status_code for _ in range(100)} == {413}
    assert setup.infer().status_code == 200


def test_requests_are_counted_by_their_codes(setup):
    """One is predicted, one malformed, one of no model, one unavailable; each stage begun is timed."""
    setup.infer()
    setup.infer(b"{")
    setup.infer(path="/v2/models/other/infer")
    setup.error = Unavailable("no")
    setup.infer()
    count = setup.telemetry.registry.get_sample_value
    for model, code in (("shop", "ok"), ("shop", "bad_request"), ("", "unknown_model"), ("shop", "unavailable")):
        labels = {"model": model, "version": "1" if model else "", "code": code}
        assert count("hybrid_gateway_requests_total", labels) == 1
    stages = {s: count("hybrid_gateway_stage_seconds_count", {"stage": s}) for s in ("decode", "wait", "encode")}
    assert stages == {"decode": 3, "wait": 2, "encode": 1}


def test_a_promotion_is_served_once_the_direct_transport_is_prepared_for_it(tmp_path, monkeypatch):
    """Version 2 is asked for only after its feature store is open; version 1 is served meanwhile."""
    monkeypatch.setattr(gateway_module, "REFRESH_S", 0.001)

    async def scenario():
        opening, opened = asyncio.Event(), asyncio.Event()

        class Preparing:
            async def prepare(self, deployments):
                if any(served.version == 2 for served in deployments):
                    opening.set()
                    await opened.wait()

        deployment(1).write(tmp_path)
        deployments = Deployments(tmp_path)
        refreshing = asyncio.create_task(gateway_module._refresh(deployments, Preparing()))
        await asyncio.sleep(0)
        deployment(2).write(tmp_path)
        await opening.wait()
        assert deployments.served("shop").version == 1
        opened.set()
        while deployments.served("shop").version != 2:
            await asyncio.sleep(0)
        refreshing.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 30))
