"""Whether Kafka and Triton take what is shown to them, asked once at the start; if not, why, by the options' names.

kafka-python and gRPC try again for ever, and say only that there is no connection: that is right for an outage, and
of no use where a setting is wrong.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import time
from contextlib import ExitStack, suppress

from hybrid.errors import ConfigError, Unavailable
from serving.connection import Broker, TritonAddress

log = logging.getLogger(__name__)

REACH_S = 30.0  # for a broker to be there; it may be starting
TRY_S, PAUSE_S = 5.0, 0.5
ALERT = b"\x15\x03"  # a TLS record that ends a connection begins so
LARGEST = 4096  # bytes of an answer to `_HANDSHAKE`
UNSUPPORTED, ILLEGAL = 33, 34  # UNSUPPORTED_SASL_MECHANISM, ILLEGAL_SASL_STATE
_HANDSHAKE = 17  # SaslHandshake; version 1


def check_kafka(broker: Broker, within_s: float = REACH_S) -> None:
    """Returns once one of its addresses is a broker that takes certificates and mechanism; a password is not tried.

    Raises:
        ConfigError: it does not.
        Unavailable: none answers in time.
    """
    deadline, context = time.monotonic() + within_s, broker.context() if broker.tls else None
    while True:
        for host, port in broker.addresses:
            try:
                with ExitStack() as stack:
                    _check_broker(broker, _connected(stack, "--kafka", host, port, context), f"{host}:{port}")
                return
            except OSError as error:
                why = f"Kafka does not answer at {host}:{port}: {_why(error)}"
        if time.monotonic() >= deadline:
            missing = "cert" if broker.tls else "tls"
            raise Unavailable(f"{why} (does it ask for --kafka-{missing}?)")
        time.sleep(PAUSE_S)


def check_triton(triton: TritonAddress) -> None:
    """Returns unless its certificate is not one of --triton-ca, or ours is none for it: one that is away may come.

    Raises:
        ConfigError: so it is.
    """
    if triton.ca is None:  # what gRPC trusts cannot be asked for
        return
    context = triton.context()
    context.set_alpn_protocols(["h2"])
    try:
        with ExitStack() as stack:
            connection = _connected(stack, "--triton", *triton.place, context)
            try:
                _received(connection, 1, "--triton")  # a server speaks first
            except ConnectionError:  # gRPC says no more to whose certificate it does not take
                raise _other_certificate("--triton", "it ends the connection") from None
    except OSError as error:
        log.warning("Triton does not answer at %s yet: %s", triton.address, _why(error))


def _connected(stack: ExitStack, option: str, host: str, port: int, context: ssl.SSLContext | None) -> socket.socket:
    """Raises: ConfigError: the peer's certificate, or ours, is refused. OSError: it is not there."""
    raw = stack.enter_context(socket.create_connection((host, port), timeout=TRY_S))
    if context is None:
        return raw
    try:
        return stack.enter_context(context.wrap_socket(raw, server_hostname=host))
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{option} {host}:{port} shows a certificate that is not accepted: {error.verify_message.rstrip('.')}. "
            f"{option}-ca must hold its authority, and {option} the name that the certificate has"
        ) from None
    except ssl.SSLError as error:
        raise _refused(option, error) from None


def _refused(option: str, error: ssl.SSLError) -> Exception:
    """The error to raise for one of TLS: ours, where the peer wants another certificate of us."""
    alert = (error.reason or "").rpartition("ALERT_")[2]
    if any(word in alert for word in ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE")):  # the last with TLS 1.2
        return _other_certificate(option, alert.lower().replace("_", " "))
    return error


def _other_certificate(option: str, why: str) -> ConfigError:
    return ConfigError(f"{option}-cert and {option}-key must be a certificate that the other side takes: {why}")


def _received(connection: socket.socket, size: int, option: str) -> bytes:
    """Exactly so many bytes. Raises: ConfigError: our certificate is refused. OSError: they do not come."""
    data = b""
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except ssl.SSLError as error:  # with TLS 1.3 a server says so only now
            raise _refused(option, error) from None
        if not part:
            raise ConnectionError("the connection was ended")
        data += part
    return data


def _check_broker(broker: Broker, connection: socket.socket, place: str) -> None:
    """Asks for a mechanism, which every listener answers: with those that it has, or that it asks for no password."""
    mechanism = (broker.sasl or "PLAIN").encode()
    request = struct.pack(">hhih", _HANDSHAKE, 1, 0, -1) + struct.pack(">h", len(mechanism)) + mechanism
    with suppress(OSError):  # who has refused us already says why where we read
        connection.sendall(struct.pack(">i", len(request)) + request)
    head = _received(connection, 4, "--kafka")
    if head.startswith(ALERT):
        raise ConfigError(f"--kafka-tls must be given: {place} speaks TLS alone")
    (size,) = struct.unpack(">i", head)
    if not 10 <= size <= LARGEST:
        raise ConfigError(f"--kafka must name a Kafka broker: {place} is none")
    answer = _received(connection, size, "--kafka")
    (code,) = struct.unpack_from(">h", answer, 4)
    if code == ILLEGAL and broker.sasl is not None:
        raise ConfigError(f"--kafka-sasl must be left out, or --kafka be another port: {place} asks for no password")
    if code == UNSUPPORTED or (code == 0 and broker.sasl is None):
        known = ", ".join(_mechanisms(answer[6:]))
        got = "none" if broker.sasl is None else broker.sasl
        raise ConfigError(f"--kafka-sasl must be a mechanism that {place} has ({known}), got {got}")


def _mechanisms(data: bytes) -> list[str]:
    (count,), names, at = struct.unpack_from(">i", data), [], 4
    for _ in range(count):
        (length,) = struct.unpack_from(">h", data, at)
        names.append(data[at + 2 : at + 2 + length].decode("ascii", "replace"))
        at += 2 + length
    return names


def _why(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
