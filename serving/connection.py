"""Where Kafka and Triton are, and what is shown to them: TLS, certificates, a password, a token.

Secrets come from files that their owner alone may read, see `hybrid.files.read_private`. Nothing here opens a
connection.
"""

from __future__ import annotations

import argparse
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.files import read_private
from hybrid.protocol import is_loopback

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
LONGEST = 8192  # characters of a password or token


@dataclass(frozen=True)
class Broker:
    """A Kafka cluster, and how clients come to it.

    Certificates are read at each new connection, so renewed ones need no restart; the password is read by `settings`.

    Attributes:
        bootstrap: brokers to begin with, HOST:PORT, several with commas.
        tls: whether connections are encrypted, and the broker's certificate and name checked.
        ca: of the broker's certificate, PEM; None: those that the machine trusts.
        certificate, key: that are shown to the broker, PEM; both or neither.
        sasl: one of `MECHANISMS`; None: no password is shown.
        username, password_file: for it.

    Raises:
        ConfigError: they do not go together; names the options of `add_kafka`.
    """

    bootstrap: str
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    sasl: str | None = None
    username: str | None = None
    password_file: Path | None = None

    def __post_init__(self) -> None:
        _check_tls("--kafka", tls=self.tls, ca=self.ca, certificate=self.certificate, key=self.key)
        hosts = [host for host, _ in self.addresses]
        shown = {"--kafka-username": self.username, "--kafka-password-file": self.password_file}
        if self.sasl is None:
            for option, value in shown.items():
                if value is not None:
                    raise ConfigError(f"{option} needs --kafka-sasl, one of {', '.join(MECHANISMS)}")
            return
        if self.sasl not in MECHANISMS:
            raise ConfigError(f"--kafka-sasl must be one of {', '.join(MECHANISMS)}, got {self.sasl!r}")
        for option, value in shown.items():
            if not value:
                raise ConfigError(f"--kafka-sasl {self.sasl} needs {option}")
        if self.sasl == "PLAIN" and not self.tls and not all(map(is_loopback, hosts)):
            raise ConfigError(
                f"--kafka-sasl PLAIN sends the password as it is, so --kafka {self.bootstrap} needs --kafka-tls"
            )

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of each. Raises: ConfigError: one is none."""
        return [_address("--kafka", each) for each in self.bootstrap.split(",")]

    @property
    def private(self) -> bool:
        """Whether nobody between here and there can read along: by TLS, or since it is this machine."""
        return self.tls or all(is_loopback(host) for host, _ in self.addresses)

    def settings(self) -> dict[str, Any]:
        """Arguments of every kafka-python client.

        Raises:
            ConfigError: a file cannot be read, or holds something else; names its option.
        """
        if not self.tls and self.sasl is None:
            return {"bootstrap_servers": self.bootstrap}
        protocol = ("SASL_" if self.sasl else "") + ("SSL" if self.tls else "PLAINTEXT")
        found: dict[str, Any] = {"bootstrap_servers": self.bootstrap, "security_protocol": protocol}
        if self.tls:
            self.context()  # are they what they must be? kafka-python would only say that it has no connection
            files = {"ssl_cafile": self.ca, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
            found |= {name: str(file) for name, file in files.items() if file is not None}
            found["ssl_password"] = ""  # none is asked for at a terminal
        if self.sasl:
            assert self.password_file is not None
            found |= {"sasl_mechanism": self.sasl, "sasl_plain_username": self.username}
            found["sasl_plain_password"] = _secret(self.password_file, "--kafka-password-file")
        return found

    def context(self) -> ssl.SSLContext:
        """What its connections are encrypted with. Raises: ConfigError: see `settings`."""
        return _context("--kafka", self.ca, self.certificate, self.key)


@dataclass(frozen=True)
class TritonAddress:
    """A Triton server's gRPC endpoint, and how clients come to it.

    Attributes:
        address: HOST:PORT.
        tls: whether connections are encrypted, and the server's certificate and name checked.
        ca: of the server's certificate, PEM; None: those that gRPC brings.
        certificate, key: that are shown to the server, PEM; both or neither.
        token_file: of a token that each call shows as `authorization: Bearer`. Triton itself asks for none;
            what stands in front of it may.

    Raises:
        ConfigError: they do not go together; names the options of `add_triton`.
    """

    address: str
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None

    def __post_init__(self) -> None:
        _check_tls("--triton", tls=self.tls, ca=self.ca, certificate=self.certificate, key=self.key)
        private = self.private
        if self.token_file is not None and not private:
            raise ConfigError(
                f"--triton-token-file sends the token with each call, so --triton {self.address} needs --triton-tls"
            )

    @property
    def private(self) -> bool:
        """Whether nobody between here and there can read along: by TLS, or since it is this machine."""
        return self.tls or is_loopback(self.place[0])

    @property
    def place(self) -> tuple[str, int]:
        """(host, port). Raises: ConfigError: the address is none."""
        return _address("--triton", self.address)

    def settings(self) -> dict[str, Any]:
        """Arguments of tritonclient's gRPC client.

        Raises:
            ConfigError: a file cannot be read, or holds something else; names its option.
        """
        if not self.tls:
            return {"url": self.address}
        self.context()  # are they what they must be?
        files = {"root_certificates": self.ca, "private_key": self.key, "certificate_chain": self.certificate}
        return {"url": self.address, "ssl": True, **{name: str(f) for name, f in files.items() if f is not None}}

    def context(self) -> ssl.SSLContext:
        """What its connections are encrypted with. Raises: ConfigError: see `settings`."""
        return _context("--triton", self.ca, self.certificate, self.key)


class Token:
    """A token in a file, which is read again when the file is another: projected tokens of Kubernetes change hourly.

    Raises:
        ConfigError: the file cannot be read, or others can read it, or what it holds is no token; at first only.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen, self._headers = self._read()

    def headers(self) -> dict[str, str]:
        """The metadata of a call. What cannot be read now is what it was before."""
        try:
            if _state(self._file) != self._seen:
                self._seen, self._headers = self._read()
        except (OSError, ConfigError):
            pass  # it is being replaced; if it stays so, the server says that the old one is none any more
        return self._headers

    def _read(self) -> tuple[object, dict[str, str]]:
        option = "--triton-token-file"
        try:
            seen = _state(self._file)
        except OSError as error:
            raise ConfigError(f"{option} {self._file} cannot be read: {error.strerror}") from None
        token = _secret(self._file, option)
        if not token.isascii() or " " in token:
            raise ConfigError(f"{option} {self._file} must hold printable ASCII characters without spaces")
        return seen, {"authorization": f"Bearer {token}"}


def add_kafka(parser: argparse.ArgumentParser) -> None:
    """Gives a command line the options of `Broker`."""
    options = parser.add_argument_group("Kafka", "where it is, and what is shown to it; plaintext and nothing, unless")
    options.add_argument("--kafka", required=True, metavar="HOST:PORT", help="several with commas")
    _add_tls(options, "--kafka", "broker")
    options.add_argument("--kafka-sasl", metavar="MECHANISM", help=f"a password by {', '.join(MECHANISMS)}")
    options.add_argument("--kafka-username", metavar="NAME", help="for it")
    options.add_argument("--kafka-password-file", type=Path, metavar="FILE", help="for it; this user's alone")


def kafka_of(arguments: argparse.Namespace) -> Broker:
    """The broker that a command line means. Raises: ConfigError: see `Broker`."""
    return Broker(
        arguments.kafka,
        arguments.kafka_tls,
        arguments.kafka_ca,
        arguments.kafka_cert,
        arguments.kafka_key,
        arguments.kafka_sasl,
        arguments.kafka_username,
        arguments.kafka_password_file,
    )


def add_triton(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Gives a command line the options of `TritonAddress`."""
    options = parser.add_argument_group("Triton", "its gRPC endpoint, and what is shown to it")
    what = "" if required else "for models declared transport='direct'"
    options.add_argument("--triton", required=required, metavar="HOST:PORT", help=what)
    _add_tls(options, "--triton", "server")
    options.add_argument(
        "--triton-token-file", type=Path, metavar="FILE", help="each call shows it as bearer; read again on change"
    )


def triton_of(arguments: argparse.Namespace) -> TritonAddress | None:
    """The Triton that a command line means; None where it means none.

    Raises:
        ConfigError: see `TritonAddress`; or others of its options are given without --triton.
    """
    if arguments.triton is None:
        for option in ("tls", "ca", "cert", "key", "token_file"):
            if getattr(arguments, f"triton_{option}"):
                raise ConfigError(f"--triton-{option.replace('_', '-')} needs --triton HOST:PORT")
        return None
    return TritonAddress(
        arguments.triton,
        arguments.triton_tls,
        arguments.triton_ca,
        arguments.triton_cert,
        arguments.triton_key,
        arguments.triton_token_file,
    )


def _add_tls(options: argparse._ArgumentGroup, option: str, peer: str) -> None:
    options.add_argument(f"{option}-tls", action="store_true", help=f"encrypt, and check the {peer}'s certificate")
    options.add_argument(
        f"{option}-ca", type=Path, metavar="FILE", help="of that certificate, PEM; else the usual ones"
    )
    options.add_argument(f"{option}-cert", type=Path, metavar="FILE", help=f"chain shown to the {peer}, PEM")
    options.add_argument(f"{option}-key", type=Path, metavar="FILE", help="its private key, PEM")


def _check_tls(option: str, *, tls: bool, ca: Path | None, certificate: Path | None, key: Path | None) -> None:
    for name, file in (("ca", ca), ("cert", certificate), ("key", key)):
        if file is not None and not tls:
            raise ConfigError(f"{option}-{name} needs {option}-tls")
    if (certificate is None) != (key is None):
        raise ConfigError(f"{option}-cert and {option}-key must be given together")


def _address(option: str, text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("dns:///").removeprefix("[").removesuffix("]")
    if not colon or not host or any(map(str.isspace, text)) or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise ConfigError(f"{option} must be HOST:PORT, such as 127.0.0.1:9092, got {text!r}")
    return host, int(port)


def _context(option: str, ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if ca is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(ca)
    except (OSError, ValueError) as error:  # also what ssl raises
        raise ConfigError(f"{option}-ca {ca} must be a PEM file of certificates: {_why(error)}") from None
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password="")  # none is asked for at a terminal
        except (OSError, ValueError) as error:
            files = f"{option}-cert {certificate} and {option}-key {key}"
            raise ConfigError(f"{files} must be PEM files that fit: {_why(error)}") from None
    return context


def _secret(file: Path, option: str) -> str:
    text = read_private(file, f"{option} option", LONGEST)
    if not 1 <= len(text) <= LONGEST or not text.isprintable():
        raise ConfigError(f"{option} {file} must hold 1 to {LONGEST} printable characters on one line")
    return text


def _state(file: Path) -> object:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
