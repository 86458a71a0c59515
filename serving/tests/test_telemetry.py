import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from hybrid.errors import BadRequest, ConfigError
from hybrid.messages import Predictions
from hybrid.tracing import Tracer, new_traceparent
from serving.telemetry import ArrayHistogram, Step, Telemetry, current_traceparent
from serving.testing import deployment


def predictions(statuses, ages_ms, model="shop", fallbacks=None):
    n = len(statuses)
    return Predictions(
        model,
        1,
        0,
        request_id=np.zeros(n, "V16"),
        status=np.array(statuses, dtype=object),
        fallback=np.array(fallbacks or ["none"] * n, dtype=object),
        prediction=np.zeros(n, np.float32),
        feature_age_ms=np.array(ages_ms),
    )


class Traced(Telemetry):
    """With its spans in memory."""

    def __init__(self):
        self.exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        super().__init__(Tracer(provider))

    def spans(self, name):
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


def trace_of(span):
    return f"{span.context.trace_id:032x}"


PAIR = {"model": "shop", "version": "1"}


def test_a_request_is_counted_by_what_came_of_it():
    """One is answered, one is malformed, one names no model of ours, one fails as nobody foresaw, one is given up."""
    telemetry = Telemetry()
    with telemetry.request(None) as asking:
        asking.about(deployment())
        asking.rows = 3
        with asking.stage("decode"):
            pass
    for known, error in ((True, BadRequest("x")), (False, BadRequest("x")), (True, KeyError("x"))):
        with suppress(BadRequest, KeyError), telemetry.request(None) as asking:
            if known:
                asking.about(deployment())
            raise error
    with suppress(GeneratorExit), telemetry.request(None) as asking:
        raise GeneratorExit
    value = telemetry.registry.get_sample_value
    for labels in (PAIR | {"code": "ok"}, PAIR | {"code": "bad_request"}, PAIR | {"code": "internal"}):
        assert value("hybrid_gateway_requests_total", labels) == 1
    nobody = {"model": "", "version": ""}
    assert value("hybrid_gateway_requests_total", nobody | {"code": "bad_request"}) == 1
    assert value("hybrid_gateway_requests_total", nobody | {"code": "cancelled"}) == 1
    assert value("hybrid_gateway_request_seconds_count", PAIR) == 3
    assert value("hybrid_gateway_request_rows_sum") == 3
    assert value("hybrid_gateway_stage_seconds_count", {"stage": "decode"}) == 1


def test_rows_are_counted_by_their_status_and_the_age_of_their_features():
    """Two are ok, 1 s and 90 s old; one is unknown, which has no age."""
    telemetry = Telemetry()
    telemetry.answered(predictions(["ok", "unknown_entity", "ok"], [1_000, -1, 90_000]))
    value = telemetry.registry.get_sample_value
    assert value("hybrid_merge_rows_total", PAIR | {"code": "ok"}) == 2
    assert value("hybrid_merge_rows_total", PAIR | {"code": "unknown_entity"}) == 1
    buckets = {
        le: value("hybrid_merge_feature_age_seconds_bucket", PAIR | {"le": le}) for le in ("1.0", "60.0", "+Inf")
    }
    assert buckets == {"1.0": 1, "60.0": 1, "+Inf": 2}
    assert value("hybrid_merge_feature_age_seconds_sum", PAIR) == 91


def test_predictions_are_counted_by_where_they_lie_where_they_are_the_pairs_own():
    """Of 0.04, 0.25 and 0.97, and a fallback's 0.5, which is none of the pair's."""
    telemetry = Telemetry()
    message = predictions(["ok", "ok", "ok", "unavailable"], [1] * 4, fallbacks=["none"] * 3 + ["constant"])
    telemetry.answered(replace(message, prediction=np.array([0.04, 0.25, 0.97, 0.5], np.float32)))
    telemetry.answered(replace(message, prediction=np.full(4, np.nan, np.float32)))  # the device predicts
    value = telemetry.registry.get_sample_value
    buckets = {
        le: value("hybrid_merge_prediction_bucket", PAIR | {"le": le}) for le in ("0.05", "0.25", "0.95", "+Inf")
    }
    assert buckets == {"0.05": 1, "0.25": 2, "0.95": 2, "+Inf": 3}


def test_a_model_that_a_record_makes_up_is_no_label():
    """Whoever may write to the topic could fill the memory with labels."""
    telemetry = Telemetry()
    for number in range(3):
        telemetry.answered(predictions(["unknown_model"], [-1], model=f"made-up-{number}"))
    none = {"model": "", "version": "", "code": "unknown_model"}
    assert telemetry.registry.get_sample_value("hybrid_merge_rows_total", none) == 3
    assert b"made-up" not in generate_latest(telemetry.registry)


def test_fallbacks_and_dead_letters_are_counted_by_kind():
    """Of four rows, two were answered by the device side alone and one by a constant."""
    telemetry = Telemetry()
    statuses = ["unknown_entity", "ok", "unavailable", "stale_features"]
    kinds = ["device-only", "none", "constant", "device-only"]
    telemetry.answered(predictions(statuses, [-1] * 4, fallbacks=kinds))
    telemetry.dead_letter("unreadable")
    value = telemetry.registry.get_sample_value
    assert value("hybrid_fallbacks_total", PAIR | {"kind": "device-only"}) == 2
    assert value("hybrid_fallbacks_total", PAIR | {"kind": "constant"}) == 1
    assert value("hybrid_dead_letters_total", {"code": "unreadable"}) == 1


def test_a_histogram_of_arrays_counts_like_prometheus_own():
    """A bucket holds its upper edge: of 1, 2, 2.5 and 9, edges 1 and 2 hold 1 and 2, infinity all four."""
    histogram = ArrayHistogram("x", "y", (1, 2), ("model",))
    histogram.observe(np.array([1.0, 2.0]), ("shop",))
    histogram.observe(np.array([2.5, 9.0]), ("shop",))
    (family,) = histogram.collect()
    assert {s.labels["le"]: s.value for s in family.samples if "le" in s.labels} == {"1.0": 1, "2.0": 2, "+Inf": 4}
    assert {s.name: s.value for s in family.samples if s.name in ("x_sum", "x_count")} == {"x_sum": 14.5, "x_count": 4}


def test_live_numbers_and_versions_are_read_when_somebody_looks():
    """None, a number that is not known yet, shows nothing."""
    lag, served = [None], [("shop", 1)]
    telemetry = Telemetry(served=lambda: served)
    telemetry.watch("hybrid_worker_lag_records", lambda: lag[0])
    value = telemetry.registry.get_sample_value
    assert value("hybrid_worker_lag_records") is None
    lag[0], served[:] = 7, [("shop", 2)]
    assert value("hybrid_worker_lag_records") == 7
    assert value("hybrid_served_version", {"model": "shop", "version": "2"}) == 1
    assert value("hybrid_served_version", PAIR) is None


def test_a_cache_is_read_when_somebody_looks():
    """Three found, one not, 64 bytes; the features of two versions are added up."""
    telemetry = Telemetry()
    telemetry.watch_cache("embeddings", SimpleNamespace(hits=3, misses=1, bytes=64))
    for version in (1, 2):
        telemetry.watch_cache("features", SimpleNamespace(hits=version, misses=10 * version, bytes=100 * version))
    names = ("hybrid_cache_hits_total", "hybrid_cache_misses_total", "hybrid_cache_bytes")
    for cache, expected in (("embeddings", [3, 1, 64]), ("features", [3, 30, 300])):
        assert [telemetry.registry.get_sample_value(name, {"cache": cache}) for name in names] == expected


def test_metrics_are_answered_on_loopback_until_the_process_ends():
    """The port is free again afterwards; one that is taken is an error that names the option."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port must be a free port, got {port}"):
            Telemetry().exposed(port).__enter__()
    with Telemetry().exposed(port):
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
    assert b"hybrid_build_info{" in page
    with Telemetry().exposed(port):
        pass


def test_who_asks_for_metrics_and_says_nothing_costs_no_thread():
    """Twenty connections with half a head each: as many threads as with none; the last one asks, and is answered."""
    with Telemetry().exposed(0) as port, ExitStack() as opened:
        before = threading.active_count()
        connections = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(20)]
        for connection in connections:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        connections[-1].sendall(b"Connection: close\r\n\r\n")
        assert connections[-1].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert threading.active_count() == before


def test_a_requests_span_goes_on_with_the_callers_trace_and_holds_its_stages():
    """Device -> infer -> decode; outside of a request there is no context."""
    telemetry, device = Traced(), new_traceparent()
    with telemetry.request(device) as asking:
        asking.about(deployment())
        asking.rows = 2
        with asking.stage("decode"):
            within = current_traceparent()
    assert current_traceparent() is None
    (infer,), (decode,) = telemetry.spans("infer"), telemetry.spans("decode")
    assert trace_of(infer) == trace_of(decode) == device.split("-")[1]
    assert f"{infer.parent.span_id:016x}" == device.split("-")[2]
    assert decode.parent.span_id == infer.context.span_id
    assert within.split("-")[1:3] == [trace_of(infer), f"{infer.context.span_id:016x}"]
    assert dict(infer.attributes) == {
        "hybrid.code": "ok",
        "hybrid.rows": 2,
        "hybrid.model": "shop",
        "hybrid.version": "1",
    }


def test_a_request_that_fails_says_its_code_and_nothing_of_its_text():
    """The text of an error may name what the caller sent."""
    telemetry = Traced()
    with suppress(BadRequest), telemetry.request(None):
        raise BadRequest("secret")
    (infer,) = telemetry.spans("infer")
    assert (infer.attributes["error.type"], infer.status.is_ok, infer.events) == ("bad_request", False, ())
    assert "secret" not in infer.to_json()


def stepped(telemetry, traces):
    step = Step()
    for name in ("poll", "decode"):
        with step.stage(name):
            pass
    part = step.part(deployment(), 5, traces)
    for name in ("features", "forward", "encode"):
        with part.stage(name):
            pass
    with step.stage("send"):
        pass
    telemetry.stepped(step, 2)


def test_a_steps_stages_are_timed_once_however_many_requests_share_it():
    """Two records, a batch of 5 rows, six stages."""
    telemetry = Traced()
    stepped(telemetry, [new_traceparent() for _ in range(3)])
    value = telemetry.registry.get_sample_value
    for stage in ("poll", "decode", "features", "forward", "encode", "send"):
        assert value("hybrid_merge_stage_seconds_count", {"stage": stage}) == 1
    assert (value("hybrid_merge_poll_records_sum"), value("hybrid_merge_batch_rows_sum")) == (2, 5)


def test_each_traced_request_of_a_batch_has_the_workers_spans_in_its_own_trace():
    """Three requests: three spans `process`, each below its request's, with five stages; the links join them."""
    telemetry, asked = Traced(), [new_traceparent() for _ in range(3)]
    stepped(telemetry, asked)
    processes = telemetry.spans("process hybrid.device-embeddings.v1")
    assert [trace_of(span) for span in processes] == [traceparent.split("-")[1] for traceparent in asked]
    assert [f"{span.parent.span_id:016x}" for span in processes] == [each.split("-")[2] for each in asked]
    first, second, third = ([f"{link.context.span_id:016x}" for link in span.links] for span in processes)
    assert first == [each.split("-")[2] for each in asked[1:]]
    assert second == third == [f"{processes[0].context.span_id:016x}"]
    for stage in ("decode", "features", "forward", "encode", "send"):
        assert [span.parent.span_id for span in telemetry.spans(stage)] == [s.context.span_id for s in processes]
    assert telemetry.spans("poll") == []
    begun = min(span.start_time for span in telemetry.exporter.get_finished_spans())
    assert all(span.start_time == begun for span in processes)


def test_without_traced_requests_a_step_makes_no_span():
    """What nobody sampled costs nothing."""
    telemetry = Traced()
    stepped(telemetry, ())
    assert telemetry.exporter.get_finished_spans() == ()


def test_a_registry_counts_alone_though_feast_was_imported_first():
    """Feast 0.67 sets PROMETHEUS_MULTIPROC_DIR, by which every counter of a name would be one file's."""
    code = (
        "import feast.metrics; from serving.telemetry import Telemetry; Telemetry().dead_letter('unreadable'); "
        "other = Telemetry(); other.dead_letter('unreadable'); "
        "print(other.registry.get_sample_value('hybrid_dead_letters_total', {'code': 'unreadable'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1.0"
