import argparse
import os

import pytest

from hybrid.errors import ConfigError
from serving.connection import Broker, Token, TritonAddress, add_kafka, add_triton, kafka_of, triton_of

KAFKA, TRITON = "kafka.example:9093", "triton.example:8001"


@pytest.fixture
def secret(tmp_path):
    """Of a text, a file that holds it and that its owner alone may read."""

    def write(text, mode=0o600):
        file = tmp_path / f"secret-{len(list(tmp_path.iterdir()))}"
        file.write_text(text)
        file.chmod(mode)
        return file

    return write


def kafka(*words):
    parser = argparse.ArgumentParser()
    add_kafka(parser)
    return kafka_of(parser.parse_args(["--kafka", *words]))


def triton(*words):
    parser = argparse.ArgumentParser()
    add_triton(parser, required=False)
    return triton_of(parser.parse_args(words))


def test_an_address_alone_is_plaintext_without_a_password():
    """As it was before there were other options."""
    assert kafka("127.0.0.1:9092").settings() == {"bootstrap_servers": "127.0.0.1:9092"}
    assert triton("--triton", TRITON).settings() == {"url": TRITON}
    assert triton() is None


def test_a_password_is_read_when_it_is_asked_for(secret):
    """SCRAM over TLS, by the machine's own authorities."""
    file = secret("first\n")
    words = ("--kafka-tls", "--kafka-sasl", "SCRAM-SHA-512", "--kafka-username", "hybrid")
    broker = kafka("a:9093,b:9094", *words, "--kafka-password-file", str(file))
    assert broker.settings() == {
        "bootstrap_servers": "a:9093,b:9094",
        "security_protocol": "SASL_SSL",
        "ssl_password": "",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "hybrid",
        "sasl_plain_password": "first",
    }
    file.write_text("second")
    assert broker.settings()["sasl_plain_password"] == "second"
    assert "second" not in repr(broker)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kafka.example"], "--kafka must be HOST:PORT, such as 127.0.0.1:9092, got 'kafka.example'"),
        (["a:9092,b"], "--kafka must be HOST:PORT, .* got 'b'"),
        (["a:0"], "got 'a:0'"),
        (["a:65536"], "got 'a:65536'"),
        ([KAFKA, "--kafka-ca", "ca"], "--kafka-ca needs --kafka-tls"),
        ([KAFKA, "--kafka-cert", "c", "--kafka-key", "k"], "--kafka-cert needs --kafka-tls"),
        ([KAFKA, "--kafka-key", "k"], "--kafka-key needs --kafka-tls"),
        ([KAFKA, "--kafka-tls", "--kafka-cert", "c"], "--kafka-cert and --kafka-key must be given together"),
        ([KAFKA, "--kafka-tls", "--kafka-key", "k"], "--kafka-cert and --kafka-key must be given together"),
        ([KAFKA, "--kafka-username", "u"], "--kafka-username needs --kafka-sasl, one of PLAIN, SCRAM-SHA-256"),
        ([KAFKA, "--kafka-password-file", "p"], "--kafka-password-file needs --kafka-sasl"),
        ([KAFKA, "--kafka-sasl", "GSSAPI"], "--kafka-sasl must be one of PLAIN, .* got 'GSSAPI'"),
        ([KAFKA, "--kafka-sasl", "PLAIN", "--kafka-password-file", "p"], "--kafka-sasl PLAIN needs --kafka-username"),
        ([KAFKA, "--kafka-sasl", "PLAIN", "--kafka-username", "u"], "PLAIN needs --kafka-password-file"),
        (
            ["127.0.0.1:1,b:1", "--kafka-sasl", "PLAIN", "--kafka-username", "u", "--kafka-password-file", "p"],
            "--kafka-sasl PLAIN sends the password as it is, so --kafka 127.0.0.1:1,b:1 needs --kafka-tls",
        ),
    ],
)
def test_options_of_kafka_that_do_not_go_together_are_refused_by_name(words, message):
    """Before anything is read or connected to."""
    with pytest.raises(ConfigError, match=message):
        kafka(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--triton", "triton.example"], "--triton must be HOST:PORT"),
        (["--triton", TRITON, "--triton-ca", "ca"], "--triton-ca needs --triton-tls"),
        (["--triton", TRITON, "--triton-tls", "--triton-key", "k"], "--triton-cert and --triton-key must be given"),
        (
            ["--triton", TRITON, "--triton-token-file", "t"],
            f"--triton-token-file sends the token with each call, so --triton {TRITON} needs --triton-tls",
        ),
        (["--triton-tls"], "--triton-tls needs --triton HOST:PORT"),
        (["--triton-token-file", "t"], "--triton-token-file needs --triton HOST:PORT"),
    ],
)
def test_options_of_triton_that_do_not_go_together_are_refused_by_name(words, message):
    """Before anything is read or connected to."""
    with pytest.raises(ConfigError, match=message):
        triton(*words)


def test_a_password_or_token_in_plaintext_is_for_this_machine_alone(secret):
    """Nobody else is on loopback's wire; SCRAM does not send the password."""
    file = secret("password")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        broker = Broker(f"{host}:9092", sasl="PLAIN", username="u", password_file=file)
        assert broker.settings()["security_protocol"] == "SASL_PLAINTEXT"
        assert broker.private
        assert TritonAddress(f"{host}:8001", token_file=file).private
    assert not Broker(KAFKA, sasl="SCRAM-SHA-256", username="u", password_file=file).private


@pytest.mark.parametrize("option", ["--kafka-ca", "--triton-ca"])
def test_an_authority_must_be_a_file_of_certificates(option, secret, tmp_path):
    """Named by its option, with the file, and why."""
    build = {
        "--kafka-ca": lambda ca: Broker(KAFKA, tls=True, ca=ca),
        "--triton-ca": lambda ca: TritonAddress(TRITON, tls=True, ca=ca),
    }
    for file, why in ((tmp_path / "absent", "No such file"), (secret("no certificate"), "")):
        with pytest.raises(ConfigError, match=f"{option} {file} must be a PEM file of certificates: {why}"):
            build[option](file).settings()


@pytest.mark.parametrize("peer", ["kafka", "triton"])
def test_a_certificate_that_is_none_is_refused_by_the_names_of_its_options(peer, secret):
    """Neither is read before it is needed, nor asked for at a terminal."""
    chain, key = secret("no certificate"), secret("no key")
    kinds = {
        "kafka": lambda: Broker(KAFKA, True, None, chain, key),
        "triton": lambda: TritonAddress(TRITON, True, None, chain, key),
    }
    with pytest.raises(ConfigError, match=f"--{peer}-cert {chain} and --{peer}-key {key} must be PEM files that fit"):
        kinds[peer]().settings()


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("hidden", 0o640, r"--kafka-password-file option's file secret-0 must be readable by its owner only"),
        ("", 0o600, "must hold 1 to 8192 printable characters on one line"),
        ("two\nlines", 0o600, "must hold 1 to 8192 printable characters on one line"),
        ("x" * 8193, 0o600, "must hold 1 to 8192 printable characters on one line"),
    ],
)
def test_a_password_file_is_its_owners_alone_and_holds_one_line(text, mode, message, secret):
    """The message names the option, and says nothing of what the file holds."""
    broker = Broker("localhost:1", sasl="PLAIN", username="u", password_file=secret(text, mode))
    with pytest.raises(ConfigError, match=message) as raised:
        broker.settings()
    assert not text or text not in str(raised.value)


def test_a_token_is_read_again_when_its_file_is_another(secret, tmp_path):
    """Kubernetes swaps a link; in between, or if it makes a mess of it, the old one is shown."""
    link, first, second, empty = tmp_path / "token", secret("one"), secret("two"), secret("")
    link.symlink_to(first)
    token = Token(link)
    assert token.headers() == {"authorization": "Bearer one"}
    for file, expected in ((second, "two"), (empty, "two"), (tmp_path / "absent", "two"), (first, "one")):
        (tmp_path / "next").symlink_to(file)
        os.replace(tmp_path / "next", link)
        assert token.headers() == {"authorization": f"Bearer {expected}"}


@pytest.mark.parametrize("text", ["two words", "tök"])
def test_a_token_that_cannot_travel_in_a_header_is_refused_at_the_start(text, secret):
    """By the name of its option."""
    with pytest.raises(ConfigError, match=r"--triton-token-file .* printable ASCII characters without spaces"):
        Token(secret(text))
