import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hybrid.errors import ConfigError
from hybrid.tracing import Tracer, from_environment, new_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # the standard's own example


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(provider)


def finished(tracer, exporter, **begin):
    span = tracer.begin("work", **begin)
    traceparent = span.traceparent
    span.end({})
    *_, found = exporter.get_finished_spans() or [None]
    return traceparent, found


def test_a_span_goes_on_with_the_callers_trace(tracer, exporter):
    """Its trace id is the caller's, its parent the caller's span, and what it hands on names itself."""
    traceparent, span = finished(tracer, exporter, parent=f"00-{TRACE}-{SPAN}-01")
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == SPAN
    assert traceparent == f"00-{TRACE}-{span.context.span_id:016x}-01"


def test_what_the_caller_did_not_sample_is_not_recorded_nor_handed_on(tracer, exporter):
    """Flag 00: no span is exported, and no header is sent."""
    assert finished(tracer, exporter, parent=f"00-{TRACE}-{SPAN}-00") == (None, None)


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        "",
        "nonsense",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_a_context_that_cannot_be_read_begins_a_new_trace(tracer, exporter, traceparent):
    """As the standard says, the request is not refused for it."""
    _, span = finished(tracer, exporter, parent=traceparent)
    assert span.parent is None


def test_a_context_of_a_later_version_is_read_as_far_as_it_is_known(tracer, exporter):
    """Version 01 may have more fields behind the flags."""
    _, span = finished(tracer, exporter, parent=f"01-{TRACE}-{SPAN}-03-later")
    assert f"{span.parent.span_id:016x}" == SPAN


@given(st.text(max_size=80))
def test_no_text_of_a_caller_breaks_it(text):
    """Whatever stands in the header."""
    Tracer(TracerProvider()).begin("work", parent=text, links=[text]).end({})


def test_a_device_makes_a_new_sampled_context_each_time(tracer, exporter):
    """It can be read, and no two have a part in common."""
    first, second = new_traceparent(), new_traceparent()
    _, span = finished(tracer, exporter, parent=first)
    assert f"{span.context.trace_id:032x}" == first.split("-")[1]
    assert not set(first.split("-")[1:3]) & set(second.split("-")[1:3])


def test_it_is_off_unless_an_endpoint_is_set(monkeypatch):
    """No endpoint: nothing, and OpenTelemetry is not even imported."""
    code = "import sys; from hybrid.tracing import from_environment as f; print(f('x'), 'opentelemetry' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], env={}, text=True).split() == ["None", "False"]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert from_environment("x") is None


def test_an_endpoint_without_the_packages_or_of_another_protocol_is_an_error(monkeypatch):
    """Silence would look like traces that nobody made."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="must be http/protobuf, got 'grpc'"):
        from_environment("x")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"install hybrid-towers\[tracing\]"):
        from_environment("x")
