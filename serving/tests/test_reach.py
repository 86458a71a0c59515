import contextlib
import socket
import ssl
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from hybrid.errors import ConfigError, Unavailable
from serving.connection import Broker, TritonAddress
from serving.reach import check_kafka, check_triton
from serving.testing import Certificate

LISTS = struct.pack(">i", 2) + b"".join(struct.pack(">h", len(name)) + name for name in (b"PLAIN", b"SCRAM-SHA-512"))


def answer(code, rest=LISTS):
    """Kafka's to SaslHandshake, version 1: size, correlation id, error code, mechanisms."""
    return struct.pack(">iih", 6 + len(rest), 0, code) + rest


OK, UNSUPPORTED, ILLEGAL = answer(0), answer(33), answer(34, struct.pack(">i", 0))


@pytest.fixture
def peer():
    """Of an answer, HOST:PORT of a server that gives it to each who says something; over TLS where it has a context."""
    with contextlib.ExitStack() as stack:

        def start(said, context=None, first=False):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve():
                while True:
                    try:
                        raw, _ = listener.accept()
                    except OSError:
                        return
                    with raw, contextlib.suppress(OSError):
                        connection = raw if context is None else context.wrap_socket(raw, server_side=True)
                        with connection:
                            if first or connection.recv(4096):
                                connection.sendall(said)
                            connection.recv(4096)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start


@pytest.fixture
def server(tmp_path):
    """The server's certificate, which is its own authority, and the context of a server that shows it."""
    certificate = Certificate.write(tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.chain, certificate.key)
    return certificate, context


@pytest.fixture
def password(tmp_path):
    file = tmp_path / "password"
    file.write_text("hidden")
    file.chmod(0o600)
    return {"sasl": "SCRAM-SHA-512", "username": "hybrid", "password_file": file}


def test_a_listener_that_asks_for_nothing_or_for_what_is_shown_is_taken(peer, server, password):
    """Plaintext, TLS, a password; the password itself is not sent."""
    certificate, context = server
    check_kafka(Broker(peer(ILLEGAL)))
    check_kafka(Broker(peer(ILLEGAL, context), tls=True, ca=certificate.chain))
    check_kafka(Broker(peer(OK), **password))
    check_kafka(Broker(peer(OK, context), tls=True, ca=certificate.chain, **password))


def test_the_first_of_several_brokers_that_answers_is_enough(peer):
    """Nobody listens on port 1."""
    check_kafka(Broker(f"127.0.0.1:1,{peer(ILLEGAL)}"), within_s=0)


def test_who_is_not_there_is_waited_for_and_then_said(peer):
    """Half a second of refused connections; the sentence names the address."""
    with pytest.raises(Unavailable, match=r"Kafka does not answer at 127.0.0.1:1: Connection refused \(does it ask"):
        check_kafka(Broker("127.0.0.1:1"), within_s=0.5)


def test_a_password_and_a_listener_that_do_not_go_together_are_said(peer, password):
    """By the option's name, with the mechanisms that the listener has."""
    for said in (OK, UNSUPPORTED):  # the first has PLAIN, which is what is asked for where none is given
        with pytest.raises(ConfigError, match=r"--kafka-sasl must be .* has \(PLAIN, SCRAM-SHA-512\), got none"):
            check_kafka(Broker(peer(said)))
    with pytest.raises(ConfigError, match=r"--kafka-sasl must be .* \(PLAIN, SCRAM-SHA-512\), got SCRAM-SHA-256"):
        check_kafka(Broker(peer(UNSUPPORTED), **password | {"sasl": "SCRAM-SHA-256"}))
    with pytest.raises(ConfigError, match=r"--kafka-sasl must be left out, .* asks for no password"):
        check_kafka(Broker(peer(ILLEGAL), **password))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"\x15\x03\x03\x00\x02\x02\x50", "--kafka-tls must be given: 127.0.0.1:.* speaks TLS alone"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "--kafka must name a Kafka broker: 127.0.0.1:.* is none"),
    ],
)
def test_what_is_no_broker_in_plaintext_is_told_apart(said, message, peer):
    """A TLS alert, and a web server."""
    with pytest.raises(ConfigError, match=message):
        check_kafka(Broker(peer(said)))


def test_a_certificate_that_the_authority_has_not_signed_ends_it(peer, server, tmp_path):
    """Another authority, and another name."""
    certificate, context = server
    other = Certificate.write(tmp_path, "other")
    with pytest.raises(
        ConfigError, match=r"--kafka 127.0.0.1:.* is not accepted: .* --kafka-ca must hold its authority"
    ):
        check_kafka(Broker(peer(ILLEGAL, context), tls=True, ca=other.chain))
    port = peer(ILLEGAL, context).rpartition(":")[2]
    with pytest.raises(ConfigError, match=r"--kafka localhost:.* is not accepted: Hostname mismatch"):
        check_kafka(Broker(f"localhost:{port}", tls=True, ca=certificate.chain))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_broker_that_wants_our_certificate_ends_it_unless_it_is_shown(version, peer, server, tmp_path):
    """TLS 1.2 says so in the handshake, 1.3 only after it."""
    certificate, context = server
    ours, other = Certificate.write(tmp_path, "ours"), Certificate.write(tmp_path, "other")
    context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, version
    context.load_verify_locations(ours.chain)
    address = peer(ILLEGAL, context)
    check_kafka(Broker(address, tls=True, ca=certificate.chain, certificate=ours.chain, key=ours.key))
    for shown in ({}, {"certificate": other.chain, "key": other.key}):
        with pytest.raises(ConfigError, match="--kafka-cert and --kafka-key must be a certificate that the other side"):
            check_kafka(Broker(address, tls=True, ca=certificate.chain, **shown), within_s=0)


def test_a_triton_whose_certificate_is_not_accepted_ends_it_and_one_that_is_away_does_not(
    peer, server, tmp_path, caplog
):
    """A worker answers without Triton, too, with what the model declares."""
    certificate, context = server
    other = Certificate.write(tmp_path, "other")
    address = peer(b"\0", context, first=True)
    check_triton(TritonAddress(address))
    check_triton(TritonAddress(address, tls=True, ca=certificate.chain))
    with pytest.raises(ConfigError, match=r"--triton 127.0.0.1:.* is not accepted: .* --triton-ca must hold"):
        check_triton(TritonAddress(address, tls=True, ca=other.chain))
    check_triton(TritonAddress("127.0.0.1:1", tls=True, ca=other.chain))
    assert "Triton does not answer at 127.0.0.1:1 yet: Connection refused" in caplog.text


def test_a_triton_that_wants_our_certificate_ends_it_unless_it_is_shown(server, tmp_path):
    """gRPC ends the connection after the handshake, and says nothing."""
    certificate, _ = server
    ours, other = Certificate.write(tmp_path, "ours"), Certificate.write(tmp_path, "other")
    pair = certificate.key.read_bytes(), certificate.chain.read_bytes()
    asking = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([pair], ours.chain.read_bytes(), require_client_auth=True)
    address = f"127.0.0.1:{asking.add_secure_port('127.0.0.1:0', credentials)}"
    asking.start()
    try:
        check_triton(TritonAddress(address, tls=True, ca=certificate.chain, certificate=ours.chain, key=ours.key))
        for shown in ({}, {"certificate": other.chain, "key": other.key}):
            with pytest.raises(ConfigError, match="--triton-cert and --triton-key must be a certificate"):
                check_triton(TritonAddress(address, tls=True, ca=certificate.chain, **shown))
    finally:
        asking.stop(0).wait()
