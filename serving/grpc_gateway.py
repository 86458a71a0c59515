"""The Open Inference Protocol v2 over gRPC, beside HTTP on the gateway's event loop.

The same checks, answers and errors: an error's status says whose fault it is,
and the trailing metadata `code` holds the same stable word as HTTP's `code`.

Source: https://github.com/kserve/open-inference-protocol (inference_grpc.md); the
messages are those that tritonclient ships. Its field `timeout` is Triton's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from hybrid.deployment import Deployment
from hybrid.errors import BadRequest, ConfigError, ServingError
from hybrid.http import BODY_S
from hybrid.protocol import OUTPUTS
from hybrid.tracing import TRACEPARENT
from serving import oip
from serving.access import error_headers
from serving.gateway import MAX_BODY_BYTES, SERVER, Gateway, explained

SERVICE = "inference.GRPCInferenceService"
CODE = "code"  # of the trailing metadata
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    410: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
CONTENTS = {"FP32": "fp32_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}
MAX_METADATA_BYTES = 16 << 10
MAX_CONNECTIONS = 512
OPTIONS = {
    "grpc.max_receive_message_length": MAX_BODY_BYTES,
    "grpc.max_metadata_size": MAX_METADATA_BYTES,
    "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
    "grpc.compression_enabled_algorithms_bitset": 1,  # none: a compressed message could unpack to any size
    # A client that went away without a word is noticed within 80 s; one that pings more often than each 10 s is let go.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,
    # Nor does one that says nothing stay: its place is another's.
    "grpc.server_handshake_timeout_ms": 20_000,
    "grpc.max_connection_idle_ms": 300_000,
    # A balancer sees connections, not calls: an old one is opened anew, perhaps elsewhere.
    "grpc.max_connection_age_ms": 1_800_000,
    "grpc.max_connection_age_grace_ms": 30_000,
}
Context = Any  # grpc.aio.ServicerContext; grpc ships no types


@dataclass(frozen=True)
class Listen:
    """Where and how gRPC is served.

    Attributes:
        address: HOST:PORT.
        calls: at once; more are refused as RESOURCE_EXHAUSTED.
        drain_s: for calls to end in when the gateway does.
        certificate: PEM of its private key and of its certificate chain; None: plaintext.
        client_ca: PEM of those who sign clients' certificates; None: clients show none.
        reuse_port: whether other processes may listen there too.
        connections: at once; more are ended.
    """

    address: str
    calls: int
    drain_s: float
    certificate: tuple[bytes, bytes] | None = None
    client_ca: bytes | None = None
    reuse_port: bool = False
    connections: int = MAX_CONNECTIONS


@asynccontextmanager
async def listening(gateway: Gateway, listen: Listen) -> AsyncIterator[int]:
    """Serves while entered; gives the port. At the end running calls have `drain_s` to finish.

    Raises:
        ConfigError: the address is taken, or the certificate does not hold.
    """
    options = [*OPTIONS.items(), ("grpc.so_reuseport", int(listen.reuse_port))]
    options.append(("grpc.max_allowed_incoming_connections", listen.connections))
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=listen.calls)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(gateway)),))
    try:
        if listen.certificate is None:
            port = server.add_insecure_port(listen.address)
        else:
            ca = listen.client_ca
            credentials = grpc.ssl_server_credentials([listen.certificate], ca, require_client_auth=ca is not None)
            port = server.add_secure_port(listen.address, credentials)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"gRPC cannot listen on {listen.address}: {error}") from None
    await server.start()
    try:
        yield port
    finally:
        await server.stop(listen.drain_s)


def handlers(gateway: Gateway) -> dict[str, grpc.RpcMethodHandler]:
    """The protocol's six methods; the library refuses others as UNIMPLEMENTED."""
    answers = _Answers(gateway)
    return {
        "ServerLive": _method(gateway, answers.server_live, pb.ServerLiveRequest, is_open=True),
        "ServerReady": _method(gateway, answers.server_ready, pb.ServerReadyRequest, is_open=True),
        "ServerMetadata": _method(gateway, answers.server_metadata, pb.ServerMetadataRequest),
        "ModelReady": _method(gateway, answers.model_ready, pb.ModelReadyRequest),
        "ModelMetadata": _method(gateway, answers.model_metadata, pb.ModelMetadataRequest),
        "ModelInfer": _method(gateway, answers.model_infer, pb.ModelInferRequest),
    }


def decode(request: Any, deployment: Deployment) -> oip.Infer:
    """Reads an inference request.

    Tensors lie in `raw_input_contents`, or each in its `contents`; `binary` of
    the outputs says which of the two the answer has, the same as the question.

    Args:
        request: a `ModelInferRequest`.
        deployment: the model that is asked.

    Raises:
        BadRequest: see `oip.decode`.
    """
    raw = [memoryview(chunk) for chunk in request.raw_input_contents]
    names = [tensor.name for tensor in request.inputs]
    if len(set(names)) < len(names):
        raise BadRequest("inputs must have distinct names")
    if raw and len(raw) != len(names):
        raise BadRequest(f"raw_input_contents must have one entry for each of {len(names)} inputs, got {len(raw)}")
    inputs = {tensor.name: _tensor(tensor, with_data=not raw) for tensor in request.inputs}
    chunks = dict(zip(names, raw, strict=True)) if raw else dict.fromkeys(names)
    wanted = oip.wanted((output.name for output in request.outputs), deployment)
    if len(set(wanted)) < len(wanted):
        raise BadRequest("outputs must have distinct names")
    rows = oip.read(inputs, chunks, wanted, deployment)
    return oip.Infer(request.id or None, rows, dict.fromkeys(wanted, bool(raw)), _timeout_s(request.parameters))


def encode(infer: oip.Infer, answers: oip.Answers, deployment: Deployment) -> Any:
    """The answer, a `ModelInferResponse`."""
    response = pb.ModelInferResponse(
        model_name=deployment.model, model_version=str(deployment.version), id=infer.id or ""
    )
    values = oip.columns(len(infer.rows), answers, deployment)
    for name, binary in infer.outputs.items():
        datatype = OUTPUTS[name]
        output = response.outputs.add(name=name, datatype=datatype, shape=oip.shape(name, len(infer.rows), deployment))
        if binary:
            response.raw_output_contents.append(oip.to_binary(values[name], datatype))
        else:
            column = [text.encode() for text in values[name]] if datatype == "BYTES" else values[name].tolist()
            getattr(output.contents, CONTENTS[datatype]).extend(column)
    return response


@dataclass(frozen=True)
class _Answers:
    """(request, call, its client) -> response, for each method."""

    gateway: Gateway

    async def server_live(self, _: Any, __: Context, ___: str) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: Any, __: Context, ___: str) -> Any:
        return pb.ServerReadyResponse(ready=self.gateway.ready())

    async def server_metadata(self, _: Any, __: Context, ___: str) -> Any:
        return pb.ServerMetadataResponse(**SERVER)

    async def model_ready(self, request: Any, _: Context, __: str) -> Any:
        self._served(request.name, request.version)
        return pb.ModelReadyResponse(ready=self.gateway.ready())

    async def model_metadata(self, request: Any, _: Context, __: str) -> Any:
        served = self._served(request.name, request.version)
        return pb.ModelMetadataResponse(**oip.model_metadata(served, self.gateway.deployments.versions(served.model)))

    async def model_infer(self, request: Any, context: Context, client: str) -> Any:
        (traceparent,) = _metadata(context, TRACEPARENT)[:1] or (None,)
        with self.gateway.telemetry.request(traceparent) as asking:
            deployment = self._served(request.model_name, request.model_version)
            asking.about(deployment)
            with asking.stage("decode"):
                asked = decode(request, deployment)
            # The client's deadline, and the parameter: the sooner one.
            given = [limit for limit in (asked.timeout_s, context.time_remaining()) if limit is not None]
            asked = replace(asked, timeout_s=min(given, default=None))
            answers = await self.gateway.predict(deployment, asked, client, asking)
            with asking.stage("encode"):
                return encode(asked, answers, deployment)

    def _served(self, model: str, version: str) -> Deployment:
        return self.gateway.deployments.served(model, version or None)


def _method(
    gateway: Gateway,
    answer: Callable[[Any, Context, str], Awaitable[Any]],
    message: Any,
    *,
    is_open: bool = False,
) -> grpc.RpcMethodHandler:
    """The method, behind the access control unless `is_open`, with its errors as statuses.

    To the library a call is a stream of one message, so that `call` begins before the message is there. Else calls
    without one, from peers without a key, could be all that there may be.
    """

    async def call(messages: AsyncIterator[bytes], context: Context) -> Any:
        try:
            if is_open:  # what is asked is empty
                return await answer(None, context, "")
            client = await gateway.access.admit(_metadata(context, "authorization"))
            return await answer(message.FromString(await _first(messages)), context, client)
        except DecodeError:
            refused: ServingError = BadRequest(f"the message must be a {message.DESCRIPTOR.name}, and is not")
        except Exception as error:
            refused = explained(error)
        extra = {name.lower(): value for name, value in error_headers(refused).items()}
        status = STATUS.get(refused.status, grpc.StatusCode.INTERNAL)
        return await context.abort(status, str(refused), tuple({CODE: refused.code, **extra}.items()))  # raises

    # The message is parsed in `call`: after the caller is known, and with an error of ours.
    return grpc.stream_unary_rpc_method_handler(call, response_serializer=lambda response: response.SerializeToString())


async def _first(messages: AsyncIterator[bytes]) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            async for message in messages:
                return message
    except TimeoutError:
        raise BadRequest(f"the message must arrive within {BODY_S:g} s") from None
    raise BadRequest("a call must have a message")


def _metadata(context: Context, name: str) -> list[str]:
    """All that the call says under a name."""
    return [str(value) for key, value in context.invocation_metadata() or () if key == name]


def _tensor(tensor: Any, *, with_data: bool) -> Mapping[str, Any]:
    """The tensor object that HTTP would have; its data from the field of `contents` that fits its datatype."""
    given = [field.name for field, _ in tensor.contents.ListFields()]
    field = CONTENTS.get(tensor.datatype) if with_data else None
    if given and given != [field]:
        where = f"in {field} alone" if field else "in raw_input_contents alone, or all in contents"
        raise BadRequest(f"input {tensor.name!r} must have its values {where}, got {given}"[:200])
    found = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    values = list(getattr(tensor.contents, field)) if field else []
    if tensor.datatype == "BYTES":
        values = [oip.text(tensor.name, value) for value in values]
    return found | {"data": values}


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    if "timeout" not in parameters:
        return None
    given = parameters["timeout"]
    value = getattr(given, given.WhichOneof("parameter_choice") or "", math.nan)
    return oip.timeout_s(value)
