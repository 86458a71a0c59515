import asyncio
import json
import struct
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from hybrid.errors import BadRequest, Overloaded, ServingError, StaleFeatures, Unavailable
from hybrid.spec import Serving
from hybrid.tracing import Tracer, new_traceparent
from serving import grpc_gateway, oip
from serving.access import Access, ApiKey, ApiKeys, Buckets
from serving.deployments import Deployments
from serving.gateway import MAX_BODY_BYTES, Gateway
from serving.grpc_gateway import SERVICE, STATUS, Listen, decode, encode, listening
from serving.telemetry import Telemetry
from serving.testing import deployment

SHOP = deployment()
COLUMNS = {
    "entity": ["bakery", "kiosk"],
    "hour": ["2PM", "9PM"],
    "budget": [0.5, 20.0],
    "device_embedding": [1.0, 2.0, 3.0, 4.0],
}


def said(rows):
    """Status and fallback of rows that were merged from both sides."""
    return ["ok"] * rows, ["none"] * rows


def texts(values):
    return b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)


def floats(values):
    return np.array(values, "<f4").tobytes()


def question(raw=True, **changes):
    """Two rows; `changes` replaces an input's values, or leaves it out where None."""
    request = pb.ModelInferRequest(model_name="shop")
    for name, values in (COLUMNS | changes).items():
        if values is None:
            continue
        text = all(isinstance(value, str) for value in values)
        shape = [2, 2] if name == "device_embedding" else [2]
        tensor = request.inputs.add(name=name, datatype="BYTES" if text else "FP32", shape=shape)
        if raw:
            request.raw_input_contents.append(texts(values) if text else floats(values))
        elif text:
            tensor.contents.bytes_contents.extend(value.encode() for value in values)
        else:
            tensor.contents.fp32_contents.extend(values)
    return request


@pytest.mark.parametrize("raw", [True, False])
def test_tensors_become_rows(raw):
    """2PM is word 1, 9PM is unseen (2); Numeric() without constants clips at 10."""
    request = question(raw)
    request.id, request.parameters["timeout"].int64_param = "q1", 1_500_000
    asked = decode(request, SHOP)
    assert (asked.id, asked.timeout_s) == ("q1", 1.5)
    assert asked.rows.entity.tolist() == ["bakery", "kiosk"]
    assert asked.rows.request.tolist() == [[1.0, 0.5], [2.0, 10.0]]
    assert asked.rows.embedding.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert asked.outputs == dict.fromkeys(oip.outputs_of(SHOP), raw)


def changed(raw=True, **columns):
    return lambda: question(raw, **columns)


def with_input(change, raw=True):
    def build():
        request = question(raw)
        change(request)
        return request

    return build


WRONG = {
    "a device feature": (changed(mood=[0.7, 0.9]), "unknown input 'mood'; shop takes"),
    "a missing input": (changed(hour=None), r"\['hour'\] are missing"),
    "nothing": (pb.ModelInferRequest, "are missing"),
    "an input twice": (with_input(lambda r: r.inputs.append(r.inputs[0]), raw=False), "distinct names"),
    "an output twice": (with_input(lambda r: [r.outputs.add(name="version") for _ in "ab"]), "distinct names"),
    "an unknown output": (with_input(lambda r: r.outputs.add(name="mood")), "unknown output 'mood'"),
    "too few raw tensors": (with_input(lambda r: r.raw_input_contents.pop()), "one entry for each of 4 inputs, got 3"),
    "values twice": (
        with_input(lambda r: r.inputs[2].contents.fp32_contents.extend([1, 2])),
        "'budget' must have its values in raw_input_contents alone",
    ),
    "values in another type's field": (
        with_input(lambda r: r.inputs[2].contents.int64_contents.extend([1, 2]), raw=False),
        "'budget' must have its values in fp32_contents alone",
    ),
    "a datatype that is none": (
        with_input(lambda r: setattr(r.inputs[2], "datatype", "FP99"), raw=False), "'budget' must have"),
    "another datatype": (with_input(lambda r: setattr(r.inputs[2], "datatype", "FP64")), "datatype FP32, got 'FP64'"),
    "a negative shape": (with_input(lambda r: r.inputs[0].shape.__setitem__(0, -1)), "1 <= n <= 1024, got"),
    "text that is not UTF-8": (
        with_input(lambda r: r.inputs[1].contents.bytes_contents.__setitem__(0, b"\xff"), raw=False), "UTF-8"),
    "an embedding of infinity": (changed(raw=False, device_embedding=[1.0, 2.0, 3.0, np.inf]), "must be finite"),
    "a negative timeout": (
        with_input(lambda r: setattr(r.parameters["timeout"], "int64_param", -1)), "timeout must"),
    "a timeout of no kind": (with_input(lambda r: r.parameters["timeout"]), "timeout must"),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_as_the_metadata_says_is_a_bad_request(request_, message):
    """The same as over HTTP, and what only gRPC can get wrong."""
    with pytest.raises(BadRequest, match=message):
        decode(request_(), SHOP)


words = st.text(alphabet=st.characters(codec="utf-8"), max_size=300)
numbers = st.floats(width=32)


@settings(max_examples=60)
@given(st.data())
def test_both_fronts_read_the_same_rows_or_refuse_with_the_same_words(data):
    """Random columns, right or wrong, as JSON, as raw tensors behind it, and as both kinds of gRPC message."""
    n, claimed = data.draw(st.integers(0, 3)), data.draw(st.integers(-1, 3))
    width, datatype = data.draw(st.sampled_from([2, 2, 1])), data.draw(st.sampled_from(["FP32", "FP32", "INT8"]))

    def column(values, size=n):
        return data.draw(st.lists(values, min_size=size, max_size=size))

    columns = {
        "entity": ("BYTES", [claimed], column(words)),
        "hour": ("BYTES", [n], column(words)),
        "budget": (datatype, [n], column(numbers)),
        "device_embedding": ("FP32", [n, 2], column(numbers, width * n)),
    }
    columns.pop(data.draw(st.sampled_from([None, None, None, *columns])), None)
    raw = outcome(http_raw, columns)
    assert outcome(grpc_raw, columns) == raw
    if datatype == "FP32":  # of another, gRPC has the values in another field
        typed = outcome(grpc_contents, columns)
        assert typed == without_bytes(raw, typed)
        if all(np.isfinite(values).all() for kind, _, values in columns.values() if kind == "FP32"):
            assert outcome(http_json, columns) == typed


def without_bytes(raw, typed):
    """Of a tensor of the wrong size, raw forms count the bytes and typed ones the values."""
    if isinstance(raw, str) and isinstance(typed, str) and ("bytes" in raw or "strings" in raw) and "values" in typed:
        return typed
    return raw


def outcome(form, columns):
    try:
        rows = form(columns).rows
    except BadRequest as error:
        return str(error)
    return rows.entity.tolist(), rows.request.tobytes(), rows.embedding.tobytes()


def raw_of(kind, values):
    return texts(values) if kind == "BYTES" else floats(values)


def http_raw(columns):
    chunks = {name: raw_of(kind, values) for name, (kind, _, values) in columns.items()}
    inputs = [
        {"name": n, "datatype": k, "shape": s, "parameters": {"binary_data_size": len(chunks[n])}}
        for n, (k, s, _) in columns.items()
    ]
    header = json.dumps({"inputs": inputs}).encode()
    return oip.decode(header + b"".join(chunks.values()), str(len(header)), SHOP)


def http_json(columns):
    inputs = [{"name": n, "datatype": k, "shape": s, "data": v} for n, (k, s, v) in columns.items()]
    return oip.decode(json.dumps({"inputs": inputs}).encode(), None, SHOP)


def grpc_raw(columns):
    request = pb.ModelInferRequest()
    for name, (kind, shape, values) in columns.items():
        request.inputs.add(name=name, datatype=kind, shape=shape)
        request.raw_input_contents.append(raw_of(kind, values))
    return decode(request, SHOP)


def grpc_contents(columns):
    request = pb.ModelInferRequest()
    for name, (kind, shape, values) in columns.items():
        contents = request.inputs.add(name=name, datatype=kind, shape=shape).contents
        if kind == "BYTES":
            contents.bytes_contents.extend(value.encode() for value in values)
        else:
            contents.fp32_contents.extend(values)
    return decode(request, SHOP)


def test_the_answer_comes_the_way_the_question_came():
    """Raw: 0.25 and 0.5 as 8 bytes, version 1 as 16, "server" behind its length; typed: each in its field."""
    answers = oip.Answers(np.array([0.25, 0.5], np.float32), np.array([7, 8]), *said(2))
    response = encode(decode(question(), SHOP), answers, SHOP)
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("prediction", "FP32", [2]),
        ("version", "INT64", [2]),
        ("feature_age_ms", "INT64", [2]),
        ("merged", "BYTES", [2]),
        ("transport", "BYTES", [2]),
        ("status", "BYTES", [2]),
        ("fallback", "BYTES", [2]),
    ]
    assert list(response.raw_output_contents) == [
        struct.pack("<2f", 0.25, 0.5), struct.pack("<2q", 1, 1), struct.pack("<2q", 7, 8),
        *(texts([word] * 2) for word in ("server", "kafka", "ok", "none")),
    ]  # fmt: skip
    request = question(raw=False)
    request.outputs.add(name="merged")
    request.outputs.add(name="prediction")
    typed = encode(decode(request, SHOP), answers, SHOP)
    assert [o.name for o in typed.outputs] == ["merged", "prediction"]
    assert list(typed.outputs[0].contents.bytes_contents) == [b"server", b"server"]
    assert list(typed.outputs[1].contents.fp32_contents) == [0.25, 0.5]
    assert not typed.raw_output_contents


def test_a_server_embedding_is_answered_either_way():
    """(2, 2) numbers row by row: 16 raw bytes, or four floats in their field; a device's embedding is refused."""
    served = SHOP.model_copy(update={"merge": "device"})
    server = np.array([[1.5, -2.0], [0.25, 4.0]], np.float32)
    answers = oip.Answers(np.full(2, np.nan), np.array([7, 8]), *said(2), np.array([90, 91]), server)
    with pytest.raises(BadRequest, match="must not be sent: shop merges on the device"):
        decode(question(), served)
    for raw in (True, False):
        asked = decode(question(raw, device_embedding=None), served)
        assert (asked.rows.embedding.shape, asked.rows.contribution) == ((2, 0), 2)
        response = encode(asked, answers, served)
        found = {output.name: (output, place) for place, output in enumerate(response.outputs)}
        assert "prediction" not in found
        output, place = found["server_embedding"]
        assert list(output.shape) == [2, 2]
        if raw:
            assert response.raw_output_contents[place] == server.tobytes()
        else:
            assert list(output.contents.fp32_contents) == [1.5, -2.0, 0.25, 4.0]
        assert ("expires_ms" in found, found["merged"][0].datatype) == (True, "BYTES")


def test_slots_are_answered_either_way():
    """(2, 3) numbers row by row, NaN where a value is missing."""
    served = SHOP.model_copy(update={"serving": Serving(contribution=True), "contributes": "slots"})
    slots = np.array([[1, 0, np.nan], [2, 1, -0.5]], np.float32)
    answers = oip.Answers(np.full(2, 0.5), np.array([7, 8]), *said(2), None, None, slots)
    for raw in (True, False):
        asking = question(raw)
        asking.outputs.add(name="server_slots")
        asked = decode(asking, served)
        assert (asked.rows.slots, asked.rows.contribution) == (3, 0)
        response = encode(asked, answers, served)
        (output,) = response.outputs
        assert (output.name, list(output.shape)) == ("server_slots", [2, 3])
        values = np.frombuffer(response.raw_output_contents[0], "<f4") if raw else output.contents.fp32_contents
        np.testing.assert_array_equal(np.array(values, np.float32), slots.ravel())


class Front:
    """A gateway over an `ask` that adds up the request's slots and the embedding, and its gRPC port."""

    def __init__(self, folder, access):
        deployment().write(folder)
        self.is_ready, self.error, self.timeout_s = True, None, None
        self.spans, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.telemetry = Telemetry(Tracer(provider))
        self.gateway = Gateway(Deployments(folder), self.ask, lambda: self.is_ready, access, telemetry=self.telemetry)

    async def ask(self, _, rows, timeout_s):
        self.timeout_s = timeout_s
        if self.error:
            raise self.error
        return oip.Answers(
            rows.request.sum(axis=1) + rows.embedding.sum(axis=1), np.full(len(rows), 60_000), *said(len(rows))
        )


@asynccontextmanager
async def opened(folder, access=Access(), **changes):  # noqa: B008  nothing changes it
    front = Front(folder, access)
    async with listening(front.gateway, Listen("127.0.0.1:0", calls=8, drain_s=1, **changes)) as port:
        unlimited = [("grpc.max_send_message_length", -1)]
        front.address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(front.address, unlimited) as channel:
            front.channel, front.stub = channel, service_pb2_grpc.GRPCInferenceServiceStub(channel)
            yield front


async def refusal(call):
    """(status, code, trailing metadata) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    trailing = {key: value for key, value in refused.value.trailing_metadata() or ()}  # noqa: C416
    return refused.value.code(), trailing.get("code"), trailing, refused.value.details()


def test_the_six_methods_answer(tmp_path):
    """Health, metadata and readiness of server and model, and two predictions: 1 + 0.5 + 3 and 2 + 10 + 7."""

    async def scenario():
        async with opened(tmp_path) as front:
            stub = front.stub
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "hybrid-gateway"
            assert (await stub.ModelReady(pb.ModelReadyRequest(name="shop", version="1"))).ready
            found = await stub.ModelMetadata(pb.ModelMetadataRequest(name="shop"))
            assert [(t.name, t.datatype, list(t.shape)) for t in found.inputs][-1] == (
                "device_embedding",
                "FP32",
                [-1, 2],
            )
            answer = await stub.ModelInfer(question(raw=False))
            assert list(answer.outputs[0].contents.fp32_contents) == [4.5, 19.0]
            front.is_ready = False
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await stub.ModelReady(pb.ModelReadyRequest(name="shop"))).ready
            assert (await refusal(stub.ModelInfer(question())))[:2] == (grpc.StatusCode.UNAVAILABLE, "unavailable")

    asyncio.run(scenario())


def test_an_error_has_the_status_of_its_fault_and_the_word_that_http_has(tmp_path, caplog):
    """One of each kind; an error nobody foresaw is told without its text."""

    async def scenario():
        async with opened(tmp_path) as front:

            async def refused(error):
                front.error = error
                return await refusal(front.stub.ModelInfer(question()))

            status, code, _, _ = await refused(StaleFeatures("row 1 of 2: old"))
            assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "stale_features")
            status, code, trailing, _ = await refused(Overloaded("too much waits"))
            assert (status, code, trailing["retry-after"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", "1")
            status, code, _, details = await refused(KeyError("bakery"))
            assert (status, code, details) == (grpc.StatusCode.INTERNAL, "internal", "internal error")
            for request in (pb.ModelMetadataRequest(name="other"), pb.ModelMetadataRequest(name="shop", version="9")):
                found = await refusal(front.stub.ModelMetadata(request))
                assert found[:2] == (grpc.StatusCode.NOT_FOUND, "unknown_model")
            found = await refusal(front.stub.ModelInfer(question(mood=[1.0, 2.0])))
            assert found[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "bad_request")

    asyncio.run(scenario())
    assert "internal error: KeyError in predict" in caplog.text or "internal error: KeyError in ask" in caplog.text
    assert "bakery" not in caplog.text


def test_calls_are_counted_and_traced_as_http_requests_are(tmp_path):
    """One is predicted, in the trace that its metadata name; one is malformed, one of no model, one unavailable."""

    async def scenario():
        async with opened(tmp_path) as front:
            parent = new_traceparent()
            await front.stub.ModelInfer(question(), metadata=[("traceparent", parent)])
            await refusal(front.stub.ModelInfer(question(mood=[1.0, 2.0])))
            await refusal(front.stub.ModelInfer(pb.ModelInferRequest(model_name="other")))
            front.error = StaleFeatures("old")
            await refusal(front.stub.ModelInfer(question()))
            return front, parent

    front, parent = asyncio.run(scenario())
    count = front.telemetry.registry.get_sample_value
    for model, code in (("shop", "ok"), ("shop", "bad_request"), ("", "unknown_model"), ("shop", "stale_features")):
        labels = {"model": model, "version": "1" if model else "", "code": code}
        assert count("hybrid_gateway_requests_total", labels) == 1
    stages = {s: count("hybrid_gateway_stage_seconds_count", {"stage": s}) for s in ("decode", "wait", "encode")}
    assert stages == {"decode": 3, "wait": 2, "encode": 1}
    assert count("hybrid_gateway_request_rows_sum") == 4
    first = next(span for span in front.spans.get_finished_spans() if span.name == "infer")
    assert f"{first.context.trace_id:032x}" == parent.split("-")[1]


def test_every_error_of_serving_has_a_status():
    """Only those that are our own fault are INTERNAL. Issuer and aggregator, with errors of their own, speak HTTP."""
    found = [error for error in ServingError.__subclasses__() if error.__module__.startswith("hybrid.errors")]
    assert {error.status for error in found if error.status != 500} <= set(STATUS)


def test_what_is_no_message_is_a_bad_request_and_an_unknown_method_unimplemented(tmp_path):
    """Neither reaches a handler."""

    async def scenario():
        async with opened(tmp_path) as front:
            infer = front.channel.unary_unary(f"/{SERVICE}/ModelInfer")
            found = await refusal(infer(b"\xff\xff garbage"))
            assert found[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "bad_request")
            found = await refusal(front.stub.RepositoryIndex(pb.RepositoryIndexRequest()))
            assert found[0] == grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())


def test_a_message_or_metadata_that_is_too_large_is_refused_and_serving_goes_on(tmp_path):
    """A megabyte is the most of a message, 16 KiB of metadata; a compressed message could unpack to more."""

    async def scenario():
        async with opened(tmp_path) as front:
            large = question()
            large.parameters["x"].string_param = "x" * MAX_BODY_BYTES
            assert (await refusal(front.stub.ModelInfer(large)))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
            extra = (("x", "x" * (32 << 10)),)
            status = (await refusal(front.stub.ModelInfer(question(), metadata=extra)))[0]
            assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
            large.parameters["x"].string_param = "x" * (MAX_BODY_BYTES // 2)
            packed = front.stub.ModelInfer(large, compression=grpc.Compression.Gzip)
            assert (await refusal(packed))[0] == grpc.StatusCode.UNIMPLEMENTED
            assert (await front.stub.ModelInfer(question())).model_version == "1"

    asyncio.run(scenario())


def test_the_deadline_of_the_call_reaches_the_exchange(tmp_path):
    """The sooner of the call's own and the parameter's; none where there is neither."""

    async def scenario():
        async with opened(tmp_path) as front:
            await front.stub.ModelInfer(question())
            assert front.timeout_s is None
            await front.stub.ModelInfer(question(), timeout=1_000)
            assert 900 < front.timeout_s < 1_020  # on the wire it is rounded up, by a hundredth at most
            request = question()
            request.parameters["timeout"].int64_param = 2_500_000
            await front.stub.ModelInfer(request, timeout=1_000)
            assert front.timeout_s == 2.5

    asyncio.run(scenario())


def test_only_health_is_open(tmp_path):
    """Every other method asks for the key; a key twice is none; the rows count for its client."""
    key, text = ApiKey.issue("shop-app")
    (tmp_path / "keys").write_text(f"{key}\n")
    access = Access(ApiKeys(tmp_path / "keys"), rows=Buckets(1, 3))
    shown = ("authorization", f"Bearer {text}")

    async def scenario():
        async with opened(tmp_path, access) as front:
            stub = front.stub
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
            closed = [
                (stub.ServerMetadata, pb.ServerMetadataRequest()),
                (stub.ModelReady, pb.ModelReadyRequest(name="shop")),
                (stub.ModelMetadata, pb.ModelMetadataRequest(name="shop")),
                (stub.ModelInfer, question()),
            ]
            for method, request in closed:
                status, code, trailing, _ = await refusal(method(request))
                assert (status, code) == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
                assert trailing["www-authenticate"] == 'Bearer realm="hybrid"'
                assert isinstance(await method(request, metadata=(shown,)), Message)
            assert (await refusal(stub.ModelInfer(question(), metadata=(shown, shown))))[1] == "unauthenticated"
            status, code, trailing, _ = await refusal(stub.ModelInfer(question(), metadata=(shown,)))
            assert (status, code, trailing["retry-after"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited", "1")

    asyncio.run(scenario())


def test_a_call_that_runs_is_answered_when_the_gateway_ends(tmp_path):
    """It has the drain's time; new calls are refused meanwhile."""

    async def scenario():
        entered, go = asyncio.Event(), asyncio.Event()

        async def ask(_, rows, __):
            entered.set()
            await go.wait()
            return oip.Answers(np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64), *said(len(rows)))

        deployment().write(tmp_path)
        served = listening(Gateway(Deployments(tmp_path), ask, lambda: True), Listen("127.0.0.1:0", 8, drain_s=10))
        port = await served.__aenter__()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            running = asyncio.ensure_future(stub.ModelInfer(question()))
            await entered.wait()
            ending = asyncio.create_task(served.__aexit__(None, None, None))
            await asyncio.sleep(0)
            go.set()
            assert (await running).model_name == "shop"
            await ending
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ModelInfer(question())

    asyncio.run(scenario())


def test_more_calls_than_may_run_are_refused_at_once(tmp_path):
    """Eight run; the ninth is told that there are too many."""

    async def scenario():
        async with opened(tmp_path) as front:
            go, entered = asyncio.Event(), []

            async def ask(_, rows, __):
                entered.append(1)
                await go.wait()
                return oip.Answers(np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64), *said(len(rows)))

            object.__setattr__(front.gateway, "ask", ask)
            running = [asyncio.ensure_future(front.stub.ModelInfer(question())) for _ in range(8)]
            while len(entered) < 8:
                await asyncio.sleep(0.01)
            assert (await refusal(front.stub.ModelInfer(question())))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
            go.set()
            assert len(await asyncio.gather(*running)) == 8

    asyncio.run(scenario())


def test_an_unavailable_answer_says_when_to_come_back(tmp_path):
    """As HTTP's Retry-After."""

    async def scenario():
        async with opened(tmp_path) as front:
            front.error = Unavailable("no answer in time (5 s)")
            status, code, trailing, details = await refusal(front.stub.ModelInfer(question()))
            assert (status, code, trailing["retry-after"]) == (grpc.StatusCode.UNAVAILABLE, "unavailable", "1")
            assert details == "no answer in time (5 s)"

    asyncio.run(scenario())


def test_a_call_without_its_message_is_not_waited_for(tmp_path, monkeypatch):
    """Who shows no key is refused before its message comes, and one that shows it after a while; so eight such calls,
    all that there may be, keep nobody out."""
    monkeypatch.setattr(grpc_gateway, "BODY_S", 0.3)
    key, text = ApiKey.issue("app")
    (tmp_path / "keys").write_text(f"{key}\n")

    async def scenario():
        async with opened(tmp_path / "deployments", Access(ApiKeys(tmp_path / "keys"))) as front:
            infer = front.channel.stream_unary(f"/{SERVICE}/ModelInfer")
            live = front.channel.stream_unary(f"/{SERVICE}/ServerLive")
            strangers = [infer() for _ in range(8)]
            assert {(await refusal(call))[1] for call in strangers} == {"unauthenticated"}
            assert await live()  # it needs none
            known = [infer(metadata=[("authorization", f"Bearer {text}")]) for _ in range(8)]
            assert {(await refusal(call))[1::2] for call in known} == {
                ("bad_request", "the message must arrive within 0.3 s")
            }
            assert (await front.stub.ServerLive(pb.ServerLiveRequest())).live

    asyncio.run(scenario())


def test_connections_past_the_most_are_ended(tmp_path):
    """Of a most of two the third has no answer; the second goes on."""

    async def scenario():
        async with opened(tmp_path, connections=2) as front:
            assert (await front.stub.ServerLive(pb.ServerLiveRequest())).live
            alone = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            async with (
                grpc.aio.insecure_channel(front.address, alone) as second,
                grpc.aio.insecure_channel(front.address, alone) as third,
            ):
                stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in (second, third)]
                assert (await stubs[0].ServerLive(pb.ServerLiveRequest())).live
                assert (await refusal(stubs[1].ServerLive(pb.ServerLiveRequest())))[0] == grpc.StatusCode.UNAVAILABLE
                assert (await stubs[0].ServerLive(pb.ServerLiveRequest())).live

    asyncio.run(scenario())
