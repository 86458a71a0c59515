import asyncio
import json
import socket
import subprocess
import sys

import pytest

from hybrid.errors import ConfigError
from serving import __main__ as command_line
from serving.access import ApiKeys, Tokens
from serving.connection import Broker, TritonAddress

KAFKA = "127.0.0.1:1"  # nobody listens; what is tested here is found before


def parse(*arguments):
    return command_line._parser().parse_args(
        ["gateway", "--deployments", "d", "--kafka", KAFKA, "--port", "1", *arguments]
    )


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys").write_text("")
    return str(tmp_path / "keys")


@pytest.fixture
def jwk_set(tmp_path):
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": []}))
    return str(tmp_path / "jwks.json")


def test_others_than_this_machine_must_be_asked_who_they_are(keys):
    """0.0.0.0 needs API keys, JWT or clients' certificates; loopback none."""
    for host in ("0.0.0.0", "::", "gateway.example"):
        with pytest.raises(
            ConfigError, match="clients must be known: give --api-keys, --jwt-issuer or --tls-client-ca"
        ):
            command_line._check_exposed(parse("--host", host))
        command_line._check_exposed(parse("--host", host, "--api-keys", keys))
    for host in ("127.0.0.1", "::1", "localhost"):
        command_line._check_exposed(parse("--host", host))


def test_an_open_network_without_tls_is_warned_of(keys, caplog):
    """A proxy may add it, so it is no error."""
    command_line._check_exposed(parse("--host", "0.0.0.0", "--api-keys", keys))
    assert "not encrypted: give --tls-cert" in caplog.text


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "3601", "soon"])
def test_a_deadline_that_is_none_is_refused(given, capsys):
    """By name, with what it must be; 2.5 s and an hour are some."""
    with pytest.raises(SystemExit):
        parse("--deadline-s", given)
    assert f"--deadline-s: must be seconds above 0, at most 3600, got '{given}'" in capsys.readouterr().err
    assert [parse("--deadline-s", text).deadline_s for text in ("2.5", "3600")] == [2.5, 3600]


@pytest.mark.parametrize("given", ["0", "-1", "4.5", "many"])
def test_partitions_that_are_none_are_refused(given, capsys):
    """By name; 1 is the least."""
    with pytest.raises(SystemExit):
        parse("--kafka-partitions", given)
    assert f"--kafka-partitions: must be a whole number from 1 on, got '{given}'" in capsys.readouterr().err
    assert parse("--kafka-partitions", "1").kafka_partitions == 1


def test_the_flags_say_who_may_ask(keys, jwk_set):
    """API keys, or JWT with its three parts, never both; rates with a burst of a second, at least one full request."""
    assert command_line._access(parse()).credentials is None
    assert isinstance(command_line._access(parse("--api-keys", keys)).credentials, ApiKeys)
    full = ("--jwt-issuer", "https://i", "--jwt-audience", "hybrid", "--jwt-keys", jwk_set)
    found = command_line._access(parse(*full, "--jwt-scope", "infer", "--jwt-algorithms", "ES256,ES384")).credentials
    assert isinstance(found, Tokens)
    assert (found.settings.scope, found.settings.algorithms) == ("infer", ("ES256", "ES384"))
    access = command_line._access(parse("--requests-per-s", "0.5", "--rows-per-s", "2"))
    assert access.requests.take("a", 1, 0) == 0
    assert access.rows.take("a", 1024, 0) == 0
    for wrong in (full[:2], full[:4], (*full, "--api-keys", keys), (*full, "--jwt-algorithms", "HS256"),
                  ("--requests-per-s", "0"), ("--api-keys", "/nowhere")):  # fmt: skip
        with pytest.raises(ConfigError):
            command_line._access(parse(*wrong))


@pytest.mark.parametrize(
    "wrong", [["--tls-cert", "c"], ["--tls-key", "k"], ["--tls-client-ca", "a"], ["--tls-cert", "c", "--tls-key", "k"]]
)
def test_a_certificate_needs_its_key_and_both_must_be_there(wrong):
    """Said at the start, by the names of the flags."""
    with pytest.raises(ConfigError, match=r"--tls-cert.*--tls-key"):
        command_line._certificate(parse(*wrong))
    assert command_line._certificate(parse()) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--reply-partition", "-1"], "--reply-partition must be a number from 0 on, or from-hostname, got '-1'"),
        (["--kafka-ca", "ca"], "--kafka-ca needs --kafka-tls"),
        (["--triton-ca", "ca"], "--triton-ca needs --triton HOST:PORT"),
        (["--host", "0.0.0.0"], "clients must be known"),
        (["--bundles", "/nowhere"], "bundles' folder must be one that is there, got '/nowhere'"),
        (["--results", "/dev/null/nowhere"], "results' folder must be one that can be written"),
        (["--results", "/tmp", "--results-s", "5"], "--results-s must be 10 .* got 5"),
        (["--results", "/tmp", "--results-mb", "0"], "--results-mb must be at least 1, got 0"),
        (["--metrics-port", "65535", "--processes", "2"], "--metrics-port 65536 .* ports end at 65535"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(arguments, message):
    """Partitions that are not there, an open door, and a second process whose metrics have no port."""
    with pytest.raises(ConfigError, match=message):
        command_line.gateway(parse(*arguments))


def test_a_pod_of_a_stateful_set_has_the_partitions_of_its_ordinal():
    """Three pods of two processes: 0 and 1, 2 and 3, 4 and 5. A Deployment's pod has no ordinal."""
    first = command_line._first_partition
    assert [first("from-hostname", 2, f"gateway-{ordinal}") for ordinal in range(3)] == [0, 2, 4]
    assert first("7", 2, "") == 7
    for name in ("", "gateway", "gateway-5f6c-x2k9p", "gateway-01", "gateway-1 "):
        with pytest.raises(ConfigError, match=r"from-hostname needs a \$HOSTNAME that ends in -NUMBER"):
            first("from-hostname", 1, name)


def test_every_process_of_a_gateway_needs_a_partition_that_is_there():
    """The topic says how many there are; where it may not be looked at, nobody knows."""
    check = command_line._check_partitions
    check(6, 2, 8)
    check(100, 1, None)
    with pytest.raises(ConfigError, match=r"lie in the 8 partitions of hybrid\.predictions\.v1, .* got 7 to 8"):
        check(7, 2, 8)


def test_what_crosses_a_network_in_plaintext_is_warned_of(caplog):
    """A mesh may encrypt it, so it is no error."""
    warn = command_line._warn_of_plaintext
    warn(Broker("127.0.0.1:9092"), TritonAddress("localhost:8001"))
    warn(Broker("kafka.example:9092", tls=True), TritonAddress("triton.example:8001", tls=True))
    warn(Broker("kafka.example:9092", tls=True), None)
    assert caplog.text == ""
    warn(Broker("kafka.example:9092"), TritonAddress("triton.example:8001"))
    assert ["give --kafka-tls" in caplog.text, "give --triton-tls" in caplog.text] == [True, True]


def test_a_taken_port_is_said_also_where_processes_share_it():
    """SO_REUSEPORT would let in whoever has it too."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--grpc-port {port} of 127.0.0.1 cannot be listened on"):
            command_line._check_free("127.0.0.1", port, "--grpc-port")


def test_a_key_is_made_once_and_only_its_hash_is_kept(tmp_path):
    """The file is its owner's alone; the key on the screen is the client's."""
    file = tmp_path / "keys"
    command = [sys.executable, "-m", "serving", "api-key", "shop-app", "--file", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert text != again
    assert file.stat().st_mode & 0o777 == 0o600
    assert text.split("_", 2)[2] not in file.read_text()
    keys = ApiKeys(file)
    assert [asyncio.run(keys.client(each)) for each in (text, again)] == ["shop-app", "shop-app"]
