import asyncio
import gzip
import json
import logging
import math
import re
import socket
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from device_runtime.answers import Answer, Results, read_answer
from device_runtime.client import InferenceClient, RetryBudget
from device_runtime.program import EmbedProgram
from device_runtime.store import Rows
from hybrid import Noised
from hybrid.bundle import Bundle, Manifest
from hybrid.errors import BadRequest, ConfigError, Unauthenticated
from hybrid.tracing import Tracer

OK = {"prediction": 0.25, "version": 7, "feature_age_ms": 1200, "merged": "server"}


def answer(**changes) -> tuple[int, bytes]:
    outputs = [{"name": name, "shape": [1], "data": [value]} for name, value in (OK | changes).items()]
    return 200, json.dumps({"outputs": outputs}).encode()


def error(status: int, code: str) -> tuple[int, bytes]:
    return status, json.dumps({"error": f"because of {code}", "code": code}).encode()


@dataclass
class Gateway:
    """An HTTP server at a free port that keeps every byte it gets and answers each request with `respond`."""

    respond: Callable[[int], tuple[int, bytes]]
    delay: asyncio.Event | asyncio.Barrier | None = None
    received: bytearray = field(default_factory=bytearray)
    requests: list[tuple[str, bytes, bytes]] = field(default_factory=list)  # path, JSON, raw bytes
    traces: list[bytes] = field(default_factory=list)
    location: str = ""
    in_flight: int = 0
    most_in_flight: int = 0

    async def __aenter__(self) -> "Gateway":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1]))
                self.received += head + body
                self.traces += re.findall(rb"(?i)\r\ntraceparent: ([^\r]*)", head)
                split = int(re.search(rb"(?i)inference-header-content-length: (\d+)", head)[1])
                self.requests.append((head.split()[1].decode(), body[:split], body[split:]))
                await self._answer(len(self.requests) - 1, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.delay:
            await self.delay.wait()
        self.in_flight -= 1
        status, body = self.respond(number)
        location = f"Location: {self.location}\r\n" if self.location else ""
        writer.write(f"HTTP/1.1 {status} X\r\n{location}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


@pytest.fixture(scope="module")
def program(bundle: Bundle) -> EmbedProgram:
    return EmbedProgram(bundle)


async def ask(gateway: Gateway, manifest: Manifest, program: EmbedProgram, rows: Rows, **settings) -> list[Answer]:
    """The answers to `rows`, by device and row."""
    concurrency = settings.pop("concurrency", 1)
    answers: list[Answer] = []
    async with gateway, InferenceClient(manifest, program, gateway.url, **settings) as client:
        await client.run(iter([rows]), answers.append, concurrency=concurrency)
    return sorted(answers, key=lambda a: (a.device, a.row))


def test_every_row_is_asked_once_and_answered_once(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Three rows are three requests of the bundle's version, and three predictions with age and latency."""
    gateway = Gateway(lambda _: answer())
    answers = asyncio.run(ask(gateway, manifest, program, rows, concurrency=2))
    assert [(a.device, a.row, a.status) for a in answers] == [(4, 0, "ok"), (4, 1, "ok"), (9, 0, "ok")]
    assert {(a.prediction, a.version, a.feature_age_ms, a.merged) for a in answers} == {(0.25, 7, 1200, "server")}
    assert all(a.latency_ms > 0 and a.attempts == 1 and a.http_status == 200 for a in answers)
    assert [path for path, *_ in gateway.requests] == ["/v2/models/meals/versions/7/infer"] * 3


def test_a_request_is_the_open_inference_protocol_s(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Entity and request features in JSON, null where missing; the embedding behind it, as little-endian float32."""
    gateway = Gateway(lambda _: answer())
    asyncio.run(ask(gateway, manifest, program, rows))
    embedding = {"name": "device_embedding", "datatype": "FP32", "shape": [1, 4]}
    for number, (entity, time, distance) in enumerate(
        [("shop-1", "7AM", 1.5), ("shop-2", "2PM", 2), ("shop-1",) + (None,) * 2]
    ):
        _, document, raw = gateway.requests[number]
        assert json.loads(document) == {
            "inputs": [
                {"name": "entity", "datatype": "BYTES", "shape": [1], "data": [entity]},
                {"name": "time", "datatype": "BYTES", "shape": [1], "data": [time]},
                {"name": "distance", "datatype": "FP32", "shape": [1], "data": [distance]},
                embedding | {"parameters": {"binary_data_size": 16}},
            ]
        }
        inputs = program.inputs(rows.features)[number : number + 1]
        assert struct.unpack("<4f", raw) == tuple(program.embed(inputs)[0].tolist())


def test_no_raw_device_feature_leaves_the_process(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """A session's bytes hold no feature's name, text or table index, and no number in text or binary form."""
    gateway = Gateway(lambda _: answer())
    asyncio.run(ask(gateway, manifest, program, rows))
    session = bytes(gateway.received)
    assert b"shop-2" in session  # what may leave is in what was captured
    assert len(session) > 500
    secrets = [b"mood", b"steps", b"temperature", b"Glasklar", b"Vertrackt", b"Zufrieden", b"Missmutig"]
    for number in (7319.0, 10543.0, 83.4375, 71.8125):
        secrets += [f"{number:g}".encode(), repr(number).encode()]
        secrets += [struct.pack(form, number) for form in ("<f", ">f", "<d", ">d")]
        slot = manifest.features.slots(np.full((1, 3), number, np.float32))[0, 1:]
        secrets += [struct.pack("<f", value) for value in slot]
        secrets += [struct.pack(form, int(number)) for form in ("<i", ">i", "<q", ">q")]
    assert [secret for secret in secrets if secret in session] == []


def test_a_clear_release_is_the_embedding_and_a_noised_one_is_not(manifest: Manifest, program: EmbedProgram):
    """Noised clips to 2 and adds noise of 0.5 x 2: over 20,000 zeros its standard deviation is 1 within 3 %."""
    embedding = np.array([[3.0, 4.0, 0.0, 0.0]], np.float32)
    clear = InferenceClient(manifest, program, "http://gateway")
    np.testing.assert_array_equal(clear.release(embedding), embedding)
    noised = manifest.model_copy(update={"release": Noised(clip=2.0, sigma=0.5)})

    released = InferenceClient(noised, program, "http://gateway", noise=Silence()).release(embedding)
    np.testing.assert_allclose(released, [[1.2, 1.6, 0, 0]], rtol=1e-6)
    noise = InferenceClient(noised, program, "http://gateway").release(np.zeros((5000, 4), np.float32))
    assert noise.std() == pytest.approx(1.0, rel=0.03)


class Silence:
    def gaussian(self, size: int, sd: float) -> np.ndarray:
        return np.zeros(size)


def test_a_retry_sends_the_same_release_again(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Fresh noise for each attempt would be more releases than were counted: three attempts, one body."""
    noised = manifest.model_copy(update={"release": Noised(clip=1.0, sigma=2.0)})
    gateway = Gateway(lambda number: error(503, "unavailable") if number < 2 else answer())
    answers = asyncio.run(ask(gateway, noised, program, head(rows, 1)))
    assert [(a.status, a.attempts, a.http_status) for a in answers] == [("ok", 3, 200)]
    assert len({raw for _, _, raw in gateway.requests}) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "unknown_entity"),
        (503, "stale_features"),
        (503, "schema_drift"),
        (400, "bad_request"),
        (500, "internal"),
        (429, "rate_limited"),
        (403, "forbidden"),
    ],
)
def test_an_explained_error_is_an_answer(manifest: Manifest, program: EmbedProgram, rows: Rows, status: int, code: str):
    """Its code and sentence are kept, and it is not asked again: it would be the same."""
    gateway = Gateway(lambda _: error(status, code))
    (got,) = asyncio.run(ask(gateway, manifest, program, head(rows, 1)))
    assert (got.status, got.http_status, got.error, got.attempts) == (code, status, f"because of {code}", 1)
    assert math.isnan(got.prediction)
    assert len(gateway.requests) == 1


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, b"garbage"),
        (200, b"[]"),
        (200, b'{"outputs": []}'),
        answer(prediction=1.5),
        answer(prediction=math.nan),
        answer(prediction=None),
        answer(version=6),
        (502, b"<html>proxy</html>"),
        (500, b'{"detail": "no error field"}'),
    ],
)
def test_an_answer_that_cannot_be_used_is_said_to_be_bad(manifest: Manifest, status: int, content: bytes):
    """No JSON, no outputs, no probability, another version: never a prediction, never an exception."""
    assert read_answer(status, content, manifest)["status"] == "bad_answer"


@pytest.mark.parametrize(("status", "code"), [(503, "unavailable"), (429, "overloaded")])
def test_a_gateway_that_fails_or_is_too_busy_is_asked_three_times(
    manifest: Manifest, program: EmbedProgram, rows: Rows, status: int, code: str
):
    """Both may pass; the third one is the answer."""
    gateway = Gateway(lambda _: error(status, code))
    (got,) = asyncio.run(ask(gateway, manifest, program, head(rows, 1)))
    assert (got.status, got.attempts, len(gateway.requests)) == (code, 3, 3)


def test_a_refused_connection_is_an_answer_too(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Nobody listens at a port just closed: each row is "unreachable", none is lost."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"

        async def session() -> list[Answer]:
            answers: list[Answer] = []
            async with InferenceClient(manifest, program, url) as client:
                await client.run(iter([rows]), answers.append)
            return answers

        answers = asyncio.run(session())
    assert [(a.status, a.http_status, a.attempts) for a in answers] == [("unreachable", 0, 3)] * 3


def test_a_silent_gateway_times_out_once(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """The request may have been read, so it is not sent again."""

    async def session() -> list[Answer]:
        gateway = Gateway(lambda _: answer(), delay=asyncio.Event())
        return await ask(gateway, manifest, program, head(rows, 1), timeout_s=0.05)

    (got,) = asyncio.run(session())
    assert (got.status, got.attempts) == ("timeout", 1)


@pytest.mark.parametrize(
    ("header", "piece", "pause_s", "status"),
    [
        (b"", b"X" * 65536, 0.0, "bad_answer"),
        (b"Content-Encoding: gzip\r\n", gzip.compress(bytes(64 << 20)), 0.0, "bad_answer"),
        (b"", b"X", 0.02, "timeout"),
    ],
    ids=["without end", "packed", "drop by drop"],
)
def test_an_answer_is_read_no_further_than_it_may_be_long_and_no_longer_than_it_may_take(
    manifest: Manifest, program: EmbedProgram, rows: Rows, header: bytes, piece: bytes, pause_s: float, status: str
):
    """What a gateway sends on and on, or packed though nobody asked for that, fills no device and holds none up."""

    one = head(rows, 1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert b"accept-encoding: identity\r\n" in asked
        writer.write(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n")
        with suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
        writer.close()

    async def session() -> Answer:
        answers: list[Answer] = []
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            timeout_s = 0.3 if pause_s else 30.0
            async with InferenceClient(manifest, program, url, timeout_s=timeout_s) as client:
                await client.run(iter([one]), answers.append)
        return answers[0]

    tracemalloc.start()
    try:
        got = asyncio.run(asyncio.wait_for(session(), 60))
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert got.status == status


def test_no_more_requests_are_in_flight_than_asked_for(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Ten rows, five at once: the gateway answers whenever five wait, and never has six."""

    async def session() -> tuple[int, int]:
        many = Rows(
            device=np.arange(10),
            row=np.zeros(10, np.int64),
            entity=["shop-1"] * 10,
            request={name: values[:1] * 10 for name, values in rows.request.items()},
            features={name: values[:1] * 10 for name, values in rows.features.items()},
        )
        gateway = Gateway(lambda _: answer(), delay=asyncio.Barrier(5))
        answers = await ask(gateway, manifest, program, many, concurrency=5)
        return gateway.most_in_flight, sum(a.status == "ok" for a in answers)

    assert asyncio.run(session()) == (5, 10)


def test_retries_have_a_budget():
    """Ten to start with, then one for every ten requests: an outage is not multiplied by three."""
    budget = RetryBudget()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(21):
        budget.sent()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def test_a_stored_value_of_the_wrong_type_stops_the_run(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """It is the store's fault, not one request's: one sentence names the feature."""
    wrong = replace(rows, features={**rows.features, "mood": [1, 2, 3]})
    with pytest.raises(BadRequest, match="feature 'mood': must be text, got int"):
        asyncio.run(ask(Gateway(lambda _: answer()), manifest, program, wrong, concurrency=4))


@pytest.mark.parametrize(
    ("update", "settings", "sentence"),
    [
        ({"merge": "device", "release": None}, {}, "program must be PredictProgram for merge='device', got Embed"),
        ({"release": None}, {}, "the bundle's release must be 'clear' or 'noised' for merge='server', got none"),
        ({}, {"gateway": "127.0.0.1:80"}, "gateway must be an http:// or https:// URL, got '127.0.0.1:80'"),
        ({}, {"timeout_s": 0}, "timeout_s must be > 0, got 0"),
    ],
)
def test_wrong_settings_are_refused(
    manifest: Manifest, program: EmbedProgram, update: dict, settings: dict, sentence: str
):
    """Before anything is sent."""
    with pytest.raises(ConfigError, match=sentence):
        InferenceClient(manifest.model_copy(update=update), program, **({"gateway": "http://gateway"} | settings))


def test_results_are_one_row_per_answer_and_a_summary(tmp_path: Path):
    """Two predictions, an explained error and a timeout: four requests, three answered, two predicted."""
    file = tmp_path / "results.parquet"
    with Results(file, batch=3) as results:
        results.add(Answer(1, 0, "ok", 200, 0.25, 7, 1200, "server", latency_ms=10.0, attempts=1))
        results.add(Answer(1, 1, "ok", 200, 0.75, 7, 1300, "server", latency_ms=20.0, attempts=2))
        results.add(Answer(2, 0, "unknown_entity", 404, latency_ms=30.0, attempts=1, error="no such shop"))
        results.add(Answer(3, 0, "timeout", latency_ms=5000.0, attempts=1, error="late"))
    table = pq.read_table(file)
    assert table["device"].to_pylist() == [1, 1, 2, 3]
    assert table["status"].to_pylist() == ["ok", "ok", "unknown_entity", "timeout"]
    assert table["prediction"].to_pylist()[:2] == [0.25, 0.75]
    assert table["latency_ms"].to_pylist() == [10, 20, 30, 5000]
    summary = results.summary()
    assert (summary["requests"], summary["answered"], summary["predicted"]) == (4, 3, 2)
    assert summary["latency_ms"]["p50"] == 25.0


def test_a_summary_has_latencies_to_the_microsecond(tmp_path: Path):
    """Of a third of a millisecond three digits."""
    with Results(tmp_path / "results.parquet") as results:
        results.add(Answer(1, 0, "ok", 200, 0.25, latency_ms=1 / 3))
    assert results.summary()["latency_ms"] == {"p50": 0.333, "p99": 0.333}


def test_results_that_cannot_be_written_are_refused_by_name(tmp_path: Path):
    """Into a folder that is not there, and in place of one."""
    with pytest.raises(ConfigError, match=r"results.parquet' cannot be written: FileNotFoundError"):
        Results(tmp_path / "missing" / "results.parquet")
    with pytest.raises(ConfigError, match="cannot be written: IsADirectoryError"):
        Results(tmp_path)


def test_results_are_complete_though_a_run_fails(tmp_path: Path):
    """What was answered before an error can be read after it."""

    def run() -> None:
        with Results(tmp_path / "results.parquet") as results:
            results.add(Answer(1, 0, "ok", 200, 0.25))
            raise RuntimeError("a device died")

    with pytest.raises(RuntimeError, match="a device died"):
        run()
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 1


KEY = "hybrid_0123456789abcdef_c2VjcmV0-_.~+/=="


def shown(gateway: Gateway) -> list[bytes]:
    return re.findall(rb"(?i)\r\nauthorization: ([^\r]*)", bytes(gateway.received))


def test_the_api_key_goes_with_every_request_and_into_no_log(
    manifest: Manifest, program: EmbedProgram, rows: Rows, caplog: pytest.LogCaptureFixture
):
    """Three requests and a retry show it as bearer, once each; no library writes it, at any level."""
    caplog.set_level(logging.DEBUG)
    gateway = Gateway(lambda number: error(503, "unavailable") if number == 0 else answer())
    answers = asyncio.run(ask(gateway, manifest, program, rows, api_key=KEY))
    assert [a.status for a in answers] == ["ok"] * 3
    assert shown(gateway) == [b"Bearer " + KEY.encode()] * 4
    assert caplog.records
    assert KEY not in caplog.text


def test_without_a_key_none_is_shown(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """The local stack asks for none."""
    gateway = Gateway(lambda _: answer())
    asyncio.run(ask(gateway, manifest, program, rows))
    assert shown(gateway) == []


@pytest.mark.parametrize(("api_key", "sentence"), [(KEY, "does not know the API key"), (None, "set HYBRID_API_KEY")])
def test_a_gateway_that_refuses_the_key_ends_the_run(
    manifest: Manifest, program: EmbedProgram, rows: Rows, api_key: str | None, sentence: str
):
    """One sentence says what to set; no other row is asked about, and whatever the gateway wrote is not repeated."""
    gateway = Gateway(lambda _: (401, b"<html>" + KEY.encode()))
    with pytest.raises(Unauthenticated, match=sentence) as raised:
        asyncio.run(ask(gateway, manifest, program, rows, api_key=api_key))
    assert KEY not in str(raised.value)
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(manifest: Manifest, program: EmbedProgram, rows: Rows, status: int):
    """Another host would be shown the key and the embedding: it gets nothing, and the answer is a bad one."""

    async def session() -> list[Answer]:
        async with other:
            gateway.location = f"{other.url}/v2/models/meals/versions/7/infer"
            return await ask(gateway, manifest, program, head(rows, 1), api_key=KEY)

    other, gateway = Gateway(lambda _: answer()), Gateway(lambda _: (status, b""))
    (got,) = asyncio.run(session())
    assert (got.status, got.http_status, got.attempts) == ("bad_answer", status, 1)
    assert (len(gateway.requests), bytes(other.received)) == (1, b"")


def head(rows: Rows, n: int) -> Rows:
    return Rows(
        device=rows.device[:n],
        row=rows.row[:n],
        entity=rows.entity[:n],
        request={name: values[:n] for name, values in rows.request.items()},
        features={name: values[:n] for name, values in rows.features.items()},
    )


def test_a_request_carries_no_trace_context_unless_told(manifest: Manifest, program: EmbedProgram, rows: Rows):
    """Three requests, no header: what would join them is not sent."""
    gateway = Gateway(lambda _: answer())
    asyncio.run(ask(gateway, manifest, program, rows))
    assert gateway.traces == []


def test_each_traced_request_has_a_context_of_its_own_and_its_retries_share_it(
    manifest: Manifest, program: EmbedProgram, rows: Rows
):
    """Three requests, of which the first is sent twice: four headers, three traces, which nothing joins."""
    gateway = Gateway(lambda number: error(503, "unavailable") if number == 0 else answer())
    asyncio.run(ask(gateway, manifest, program, rows, trace_share=1.0))
    assert all(re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace) for trace in gateway.traces)
    assert gateway.traces[0] == gateway.traces[1]
    assert len(set(gateway.traces)) == 3
    assert len({part for trace in set(gateway.traces) for part in trace.split(b"-")[1:3]}) == 6


def test_a_traced_requests_span_is_the_parent_of_what_the_gateway_does(
    manifest: Manifest, program: EmbedProgram, rows: Rows
):
    """Its attributes are model, version and what came of it: no device, entity or feature."""
    gateway, exporter, provider = Gateway(lambda _: answer()), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    asyncio.run(ask(gateway, manifest, program, rows, trace_share=1.0, tracer=Tracer(provider)))
    spans = exporter.get_finished_spans()
    sent = [tuple(trace.decode().split("-")[1:3]) for trace in gateway.traces]
    assert sent == [(f"{s.context.trace_id:032x}", f"{s.context.span_id:016x}") for s in spans]
    assert {(span.name, tuple(span.attributes.items())) for span in spans} == {
        ("ask", (("hybrid.model", "meals"), ("hybrid.version", "7"), ("hybrid.code", "ok")))
    }


def test_a_share_of_traces_that_is_none_is_refused(manifest: Manifest, program: EmbedProgram):
    """1.5 of the requests cannot be traced."""
    with pytest.raises(ConfigError, match=r"trace_share must be in \[0, 1\], got 1.5"):
        InferenceClient(manifest, program, "http://127.0.0.1:1", trace_share=1.5)
