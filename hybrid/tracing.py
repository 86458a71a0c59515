"""Traces of a request on its way from device to answer, over OpenTelemetry where it is installed and asked for.

A trace context travels as W3C text: `traceparent` in HTTP and gRPC, and a Kafka header
of that name for each traced request that shares the record. Attributes are counts,
names and codes: never a feature, an embedding, an entity or a device.

Source: W3C Trace Context, https://www.w3.org/TR/trace-context/; OpenTelemetry's
semantic conventions for messaging: the span of a batch has a link for each message.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanContext

TRACEPARENT = "traceparent"
MAX_TRACES = 64  # that one Kafka record carries: 4 kB of headers
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
Kind = Literal["INTERNAL", "SERVER", "CLIENT", "CONSUMER"]
Attributes = Mapping[str, str | int]
_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Span:
    """A span that has begun; `Tracer.begin` makes it."""

    def __init__(self, span: OtelSpan) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """The context of what it causes; None where it is not sampled: nobody need carry it."""
        context = self._span.get_span_context()
        return _format(context) if context.trace_flags.sampled else None

    def end(self, attributes: Attributes, error: str | None = None, end_ns: int | None = None) -> None:
        """Ends it; `error` is a code, where it failed."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(end_ns)


class Tracer:
    """Spans of one process. A context manager: what is not exported yet is, at its end.

    Args:
        provider: what samples, and exports in a thread of its own.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("hybrid")

    @classmethod
    def exporting(cls, service: str, exporter: SpanExporter) -> Self:
        """Exports in batches; when 2,048 spans wait, more are dropped. OTEL_TRACES_SAMPLER says which are kept."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._provider.shutdown()

    def begin(
        self,
        name: str,
        kind: Kind = "INTERNAL",
        *,
        parent: str | None = None,
        links: Sequence[str] = (),
        start_ns: int | None = None,
    ) -> Span:
        """Begins a span, now or at `start_ns`.

        Args:
            name: of the work, from a small set.
            kind: OpenTelemetry's.
            parent: a traceparent; one that cannot be read counts as none.
            links: traceparents of other causes.
            start_ns: Unix time.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, NonRecordingSpan, SpanKind, set_span_in_context

        above = _parse(parent)
        context = Context() if above is None else set_span_in_context(NonRecordingSpan(above), Context())
        linked = [Link(cause) for cause in map(_parse, links) if cause is not None]
        return Span(self._tracer.start_span(name, context, kind=SpanKind[kind], links=linked, start_time=start_ns))


def from_environment(service: str) -> Tracer | None:
    """A tracer that exports over OTLP (HTTP, protobuf), where OpenTelemetry's variables name an endpoint; else None.

    Args:
        service: what this process is; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before.

    Raises:
        ConfigError: an endpoint is set, and the packages are not installed or it is for another protocol.
    """
    asked = [name for name in ENDPOINTS if os.environ.get(name)]
    if not asked or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, got {protocol!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(f"{asked[0]} is set, which needs OpenTelemetry: install hybrid-towers[tracing]") from None
    return Tracer.exporting(os.environ.get("OTEL_SERVICE_NAME", service), OTLPSpanExporter())


def new_traceparent() -> str:
    """A sampled context of a new trace, random and of nobody."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def _format(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _parse(traceparent: str | None) -> SpanContext | None:
    """What a caller wrote, or None where the standard says to start anew."""
    from opentelemetry.trace import SpanContext, TraceFlags

    found = _FORMAT.fullmatch(traceparent or "")
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    context = SpanContext(
        int(found[2], 16), int(found[3], 16), True, TraceFlags(int(found[4], 16) & TraceFlags.SAMPLED)
    )
    return context if context.is_valid else None
