"""Real servers on loopback: well, away, refusing, with certificates of nobody trusted, and with clocks that are off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import grpc
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hybrid.doctor.servers import SERVING, SYNC, ask, certificate, clocks, health, skew_s, superlink
from hybrid.errors import ConfigError
from hybrid.federation.checkin import HEALTH
from hybrid.federation.checkin import listening as aggregating
from hybrid.federation.tests.test_fleet_aggregator import built
from hybrid.http import listening
from hybrid.local.flower import _write_certificates
from hybrid.local.process import free_ports

FIX = "look into its log"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a certificate of it for loopback."""
    folder = tmp_path_factory.mktemp("keys")
    _write_certificates(folder)
    return folder


def app(status: int = 200, ahead_s: float = 0.0) -> Starlette:
    """Answers all with one status, and a `Date` that is off."""

    async def answer(_request) -> Response:
        headers = {"Date": formatdate(time.time() + ahead_s, usegmt=True)}
        return JSONResponse({"error": "Triton is not ready"} if status != 200 else {}, status, headers)

    return Starlette(routes=[Route("/{rest:path}", answer)])


@contextmanager
def speaking(keys: Path | None, *, well: bool = True, service: bool = True) -> Iterator[str]:
    """HOST:PORT of a gRPC server, by TLS where there are keys, with a health service or without."""
    server = grpc.server(ThreadPoolExecutor(1))
    if service:
        check = grpc.unary_unary_rpc_method_handler(lambda _request, _context: SERVING if well else b"\x08\x02")
        handler = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
        server.add_generic_rpc_handlers((handler,))
    if keys is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = ((keys / "server.key").read_bytes(), (keys / "server.pem").read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(10)


def asked(url: str, ca: Path | None = None) -> list[tuple[str, str]]:
    return [(finding.status, finding.found) for finding in health("gateway", url, FIX, ca)]


def test_an_aggregator_that_runs_is_well():
    """Ours, by HTTP; it says nothing of the time."""
    with aggregating(built()[0]) as port:
        url = f"http://127.0.0.1:{port}{HEALTH}"
        assert asked(url) == [("ok", f"{url} answers 200")]
        assert ask(url).skew_s is None


def test_a_server_that_is_away_fails_with_what_to_do():
    """Nothing listens."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}/health"
    (found,) = health("issuer", url, FIX)
    assert (found.status, found.found, found.fix) == ("fail", f"{url} does not answer: Connection refused", FIX)


def test_a_server_that_is_not_ready_fails_with_its_word():
    """503 and a reason, as our gateway gives it."""
    with listening(app(503), "127.0.0.1", 0, name="test") as port:
        url = f"http://127.0.0.1:{port}/v2/health/ready"
        assert asked(url) == [("fail", f"{url} answers 503: Triton is not ready")]


def test_a_certificate_of_nobody_trusted_fails_and_of_the_authority_given_does_not(keys: Path):
    """Then --ca is what to give; the certificate of 30 days is not told."""
    certified = keys / "server.pem", keys / "server.key"
    with listening(app(), "127.0.0.1", 0, name="test", certificate=certified) as port:
        url = f"https://127.0.0.1:{port}/health"
        ((status, found),) = asked(url)
        assert status == "fail"
        assert "its certificate is not trusted" in found
        assert asked(url, keys / "ca.pem") == [("ok", f"{url} answers 200")]


def test_a_certificate_that_ends_soon_is_told():
    """In three days; one of 15 days, or none, is not."""
    (found,) = certificate("gateway", "gateway:443", time.time() + 3 * 86_400)
    assert (found.status, found.fix) == ("warn", "renew it, and restart what uses it")
    assert [*certificate("gateway", "g", time.time() + 15 * 86_400), *certificate("gateway", "g", None)] == []


def test_an_address_that_is_none_is_refused(tmp_path: Path):
    """And a file without certificates."""
    with pytest.raises(ConfigError, match=r"must be http://HOST:PORT or https://HOST:PORT, got 'gateway:8080'"):
        ask("gateway:8080")
    for wrong in ("http://team:hunter2@gateway:many", "http://gateway:0"):
        with pytest.raises(ConfigError, match=r"got 'http://gateway:(many|0)'$"):
            ask(wrong)
    (tmp_path / "ca.pem").write_text("none")
    with pytest.raises(ConfigError, match="--ca must be a PEM file with certificates"):
        ask("https://127.0.0.1:1", tmp_path / "ca.pem")


def test_clocks_that_are_off_are_told_by_how_much(keys: Path):
    """Ten seconds ahead: to watch; a minute behind: failed; none off is well; one that is away is passed over."""
    away = f"http://127.0.0.1:{free_ports(1)[0]}/"
    with (
        listening(app(), "127.0.0.1", 0, name="right") as right,
        listening(app(ahead_s=10.5), "127.0.0.1", 0, name="ahead") as ahead,
        listening(app(ahead_s=-60.5), "127.0.0.1", 0, name="behind") as behind,
    ):
        found = list(clocks([f"http://127.0.0.1:{port}/" for port in (right, ahead, behind)] + [away], [], None))
    assert [finding.status for finding in found] == ["ok", "warn", "fail"]
    assert "s ahead of this machine" in found[1].found
    assert "s behind this machine" in found[2].found
    assert [finding.fix for finding in found] == ["", SYNC, SYNC]
    assert [finding.status for finding in clocks([away], [], None)] == ["skipped"]
    with listening(app(), "127.0.0.1", 0, name="right") as port:
        (found,) = clocks([f"http://team:hunter2@127.0.0.1:{port}/"], [], None)
        assert found.found == f"the Date of 127.0.0.1:{port} and this machine's clock are within 2 s"
        (found,) = health("issuer", f"http://team:hunter2@127.0.0.1:{port}/", FIX)
        assert found.found == f"http://127.0.0.1:{port}/ answers 200"
    (broker,) = clocks([], [lambda: ("Kafka's broker", -31.0)], None)
    assert (broker.status, broker.found[:34]) == ("fail", "Kafka's broker is 31.0 s behind th")


@pytest.mark.parametrize(
    ("date", "skew"),
    [
        ("Thu, 01 Jan 1970 00:01:40 GMT", 0.0),  # 100.0 to 101.0, asked from 99.5 to 100.5
        ("Thu, 01 Jan 1970 00:01:50 GMT", 9.5),  # 110.0 at least, where ours was 100.5 at most
        ("Thu, 01 Jan 1970 00:01:30 GMT", -8.5),  # 91.0 at most, where ours was 99.5 at least
        ("yesterday", None),
        (None, None),
    ],
)
def test_a_date_tells_a_clock_to_the_second(date: str | None, skew: float | None):
    """Off by no more than cannot be explained by its second and the time that the answer took."""
    assert skew_s(date, 99.5, 100.5) == skew


def linked(address: str, ca: Path | None = None) -> list[tuple[str, str]]:
    return [(finding.status, finding.found) for finding in superlink("superlink", address, ca)]


def test_a_superlink_that_serves_is_well(keys: Path):
    """By TLS; in plaintext on loopback; and one without a health service there says so."""
    with speaking(keys) as address:
        assert linked(address, keys / "ca.pem") == [
            ("ok", f"{address} speaks TLS"),
            ("ok", f"{address} says that it serves"),
        ]
    with speaking(None) as address:
        assert linked(address) == [
            ("ok", f"{address} answers, in plaintext, on this machine alone"),
            ("ok", f"{address} says that it serves"),
        ]
    with speaking(keys, service=False) as address:
        assert [status for status, _ in linked(address, keys / "ca.pem")] == ["ok", "skipped"]


def test_a_superlink_that_speaks_http_is_asked_by_it(keys: Path):
    """As Flower's does, by TLS and in plaintext; 503 fails."""
    certified = keys / "server.pem", keys / "server.key"
    with listening(app(), "127.0.0.1", 0, name="test", certificate=certified) as port:
        assert linked(f"127.0.0.1:{port}", keys / "ca.pem") == [
            ("ok", f"127.0.0.1:{port} speaks TLS"),
            ("ok", f"https://127.0.0.1:{port}/health answers 200"),
        ]
    with listening(app(503), "127.0.0.1", 0, name="test") as port:
        assert [status for status, _ in linked(f"127.0.0.1:{port}")] == ["ok", "fail"]


def test_a_superlink_that_is_away_not_trusted_or_unwell_fails(keys: Path):
    """Each with its own sentence."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert linked(address) == [("fail", f"{address} does not answer: Connection refused")]
    with speaking(keys) as address:
        ((status, found),) = linked(address)
        assert (status, "its certificate is not trusted" in found) == ("fail", True)
    with speaking(None, well=False) as address:
        assert linked(address)[-1] == ("fail", f"{address} says that it does not serve")
    with pytest.raises(ConfigError, match="--superlink must be HOST:PORT, got 'superlink'"):
        linked("superlink")
