"""Servers that are asked over HTTP or gRPC whether they are well, and what their clocks and certificates say."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from hybrid.doctor.findings import Finding
from hybrid.errors import ConfigError, HybridError
from hybrid.protocol import is_loopback
from hybrid.tracking import without_credentials

CALL_S = 5.0
MOST_BYTES = 1 << 16  # that are read of an answer
RENEW_S = 14 * 86_400.0  # a certificate that ends sooner is told
APART_S, TOO_FAR_S = 2.0, 30.0  # of two clocks
CLOCKS = "clocks"
TRUST = "give --ca the PEM file of who signed it, and ask by a name that it is for"
LOG, CORRECT = "look into SuperLink's log", "open the port for this machine, or correct --superlink"
SYNC = "run chrony or systemd-timesyncd on both machines, against the same servers"
SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse, status SERVING


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        status: of HTTP.
        body: the beginning of it.
        skew_s: its clock less ours, as closely as its `Date` tells; None: it has none.
        expires_s: when its certificate ends, in Unix seconds; None: it spoke without TLS.
    """

    status: int
    body: bytes
    skew_s: float | None
    expires_s: float | None


def ask(url: str, ca: Path | None = None, timeout_s: float = CALL_S) -> Answer:
    """One GET, through no proxy.

    Args:
        url: http:// or https://.
        ca: a PEM file of who signed the server's certificate; None: whom the machine trusts.
        timeout_s: of each step.

    Raises:
        ConfigError: the URL is none.
        OSError: it does not answer; ssl's errors are.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
        shown = without_credentials(url)
        raise ConfigError(f"a server's address must be http://HOST:PORT or https://HOST:PORT, got {shown!r}")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=trusting(ca))
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    with closing(connection):
        connection.connect()
        expires_s = _expires_s(connection.sock)
        asked_s = time.time()
        connection.request("GET", parts.path or "/", headers={"Connection": "close"})
        try:
            answer = connection.getresponse()
            body = answer.read(MOST_BYTES)
        except http.client.HTTPException as error:
            raise ConnectionError(f"no HTTP: {type(error).__name__}") from None
        return Answer(answer.status, body, skew_s(answer.headers.get("Date"), asked_s, time.time()), expires_s)


def trusting(ca: Path | None) -> ssl.SSLContext:
    """Raises: ConfigError: the file holds no certificates."""
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ca must be a PEM file with certificates, {ca}: {type(error).__name__}") from None


def skew_s(date: str | None, asked_s: float, answered_s: float) -> float | None:
    """A clock less ours: 0 wherever that cannot be told, since a `Date` has whole seconds and an answer takes time.

    Args:
        date: an HTTP `Date`, or None.
        asked_s: Unix time before it was asked for, by our clock.
        answered_s: and after.

    >>> skew_s("Thu, 01 Jan 1970 00:01:40 GMT", 99.5, 100.5), skew_s("Thu, 01 Jan 1970 00:01:40 GMT", 90.0, 91.0)
    (0.0, 9.0)
    """
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except (TypeError, ValueError):
        return None
    return max(theirs - answered_s, 0.0) + min(theirs + 1 - asked_s, 0.0)


def health(name: str, url: str, fix: str, ca: Path | None = None) -> Iterator[Finding]:
    """Asks one server's health endpoint.

    Args:
        name: of the check.
        url: of the endpoint.
        fix: what to do where it does not answer.
        ca: see `ask`.
    """
    shown = without_credentials(url)
    try:
        answer = ask(url, ca)
    except ssl.SSLCertVerificationError as error:
        yield Finding(name, "fail", f"{shown}: its certificate is not trusted: {error.verify_message}", TRUST)
        return
    except OSError as error:
        yield Finding(name, "fail", f"{shown} does not answer: {_why(error)}", fix)
        return
    if answer.status != 200:
        yield Finding(name, "fail", f"{shown} answers {answer.status}{_reason(answer.body)}", fix)
    else:
        yield Finding(name, "ok", f"{shown} answers 200")
    yield from certificate(name, shown, answer.expires_s)


def clocks(
    urls: Sequence[str], others: Sequence[Callable[[], tuple[str, float]]], ca: Path | None
) -> Iterator[Finding]:
    """Compares this machine's clock with those of servers.

    Args:
        urls: asked for the `Date` of their answer; those without one, and those that are away, are passed over.
        others: each gives a server's name and its clock less ours, in seconds; a HybridError passes it over.
        ca: see `ask`.
    """
    seen: dict[str, float] = {}
    for url in urls:
        with suppress(OSError):
            skew = ask(url, ca).skew_s
            if skew is not None:
                seen[f"the Date of {urlsplit(without_credentials(url)).netloc}"] = skew
    for other in others:
        with suppress(HybridError):
            name, skew = other()
            seen[name] = skew
    if not seen:
        yield Finding(CLOCKS, "skipped", "nothing that was asked tells the time (a gateway, MLflow's server, Kafka do)")
    for name, skew in seen.items():
        yield _clock(name, skew)


def _clock(name: str, skew: float) -> Finding:
    if abs(skew) <= APART_S:
        return Finding(CLOCKS, "ok", f"{name} and this machine's clock are within {APART_S:g} s")
    which = "ahead of" if skew > 0 else "behind"
    status = "fail" if abs(skew) > TOO_FAR_S else "warn"
    found = f"{name} is {abs(skew):.1f} s {which} this machine: ages of features, bundles and tokens are off by that"
    return Finding(CLOCKS, "fail" if status == "fail" else "warn", found, SYNC)


def superlink(name: str, address: str, ca: Path | None) -> Iterator[Finding]:
    """Reaches Flower's SuperLink by TCP and TLS, and asks how it is: by HTTP, or gRPC at its health server's port.

    Args:
        name: of the check.
        address: HOST:PORT.
        ca: a PEM file of who signed its certificate.

    Raises:
        ConfigError: the address or the file is none.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal():
        raise ConfigError(f"--superlink must be HOST:PORT, got {address!r}")
    context = trusting(ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        plain = socket.create_connection((host, int(port)), CALL_S)
    except OSError as error:
        yield Finding(name, "fail", f"{address} does not answer: {_why(error)}", f"start it; or {CORRECT}")
        return
    try:
        with plain, context.wrap_socket(plain, server_hostname=host) as wrapped:
            expires_s, spoken = _expires_s(wrapped), wrapped.selected_alpn_protocol()
    except ssl.SSLCertVerificationError as error:
        yield Finding(name, "fail", f"{address}: its certificate is not trusted: {error.verify_message}", TRUST)
    except OSError:
        yield _plaintext(name, address, host)
        yield from _health_in_plaintext(name, address)
    else:
        yield Finding(name, "ok", f"{address} speaks TLS")
        if spoken == "h2":
            yield from certificate(name, address, expires_s)
            yield from _grpc_health(name, address, b"" if ca is None else ca.read_bytes())
        else:
            yield from health(name, f"https://{address}/health", LOG, ca)


def _health_in_plaintext(name: str, address: str) -> Iterator[Finding]:
    url = f"http://{address}/health"
    try:
        ask(url)
    except OSError:  # so speaks what has gRPC alone
        yield from _grpc_health(name, address, None)
    else:
        yield from health(name, url, LOG)


def certificate(name: str, where: str, expires_s: float | None) -> Iterator[Finding]:
    """Says whether a certificate ends soon."""
    if expires_s is not None and expires_s - time.time() < RENEW_S:
        day = datetime.fromtimestamp(expires_s, UTC).date()
        yield Finding(name, "warn", f"{where}: its certificate ends on {day}", "renew it, and restart what uses it")


def _plaintext(name: str, address: str, host: str) -> Finding:
    if is_loopback(host):
        return Finding(name, "ok", f"{address} answers, in plaintext, on this machine alone")
    fix = "start it with --ssl-certfile, --ssl-keyfile and --ssl-ca-certfile: weights and sums travel there"
    return Finding(name, "warn", f"{address} answers, but not by TLS", fix)


def _grpc_health(name: str, address: str, roots: bytes | None) -> Iterator[Finding]:
    """Asks `grpc.health.v1.Health/Check` of the whole server. `roots` is None without TLS, empty for the machine's."""
    import grpc

    credentials = None if roots is None else grpc.ssl_channel_credentials(roots or None)
    channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    with channel:
        try:
            answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=CALL_S)
        except grpc.RpcError as error:
            code = error.code().name
            if code == "UNIMPLEMENTED":
                yield Finding(name, "skipped", f"{address} has no health service")
            else:
                yield Finding(name, "fail", f"{address} does not answer gRPC: {code}", LOG)
            return
    if answer == SERVING:
        yield Finding(name, "ok", f"{address} says that it serves")
    else:
        yield Finding(name, "fail", f"{address} says that it does not serve", LOG)


def _has_port(parts: SplitResult) -> bool:
    """Whether its port, if it has one, is one."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _expires_s(connection: object) -> float | None:
    if not isinstance(connection, ssl.SSLSocket):
        return None
    ends = (connection.getpeercert() or {}).get("notAfter")
    return ssl.cert_time_to_seconds(ends) if isinstance(ends, str) else None


def _reason(body: bytes) -> str:
    """What our own servers say as `error`, one line of it."""
    with suppress(ValueError, TypeError, KeyError):
        return f": {str(json.loads(body)['error']).splitlines()[0][:200]}"
    return ""


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
