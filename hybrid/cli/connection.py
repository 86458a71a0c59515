"""Options that say where Kafka and Triton are, as serving's own processes have them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from serving.connection import Broker, TritonAddress

Kafka = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Brokers, several with commas; else $HYBRID_KAFKA.")
]
KafkaTls = Annotated[bool, typer.Option("--kafka-tls", help="Encrypt, and check the broker's certificate.")]
KafkaCa = Annotated[Path | None, typer.Option(help="Of that certificate, PEM; else the usual ones.")]
KafkaCert = Annotated[Path | None, typer.Option(help="Chain shown to the broker, PEM.")]
KafkaKey = Annotated[Path | None, typer.Option(help="Its private key, PEM.")]
KafkaSasl = Annotated[
    str | None, typer.Option(metavar="MECHANISM", help="A password, by PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.")
]
KafkaUsername = Annotated[str | None, typer.Option(help="For it.")]
KafkaPasswordFile = Annotated[Path | None, typer.Option(help="For it; this user's alone.")]

Triton = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Triton's gRPC endpoint.")]
TritonTls = Annotated[bool, typer.Option("--triton-tls", help="Encrypt, and check the server's certificate.")]
TritonCa = Annotated[Path | None, typer.Option(help="Of that certificate, PEM; else the usual ones.")]
TritonCert = Annotated[Path | None, typer.Option(help="Chain shown to the server, PEM.")]
TritonKey = Annotated[Path | None, typer.Option(help="Its private key, PEM.")]
TritonTokenFile = Annotated[Path | None, typer.Option(help="Each call shows it as bearer.")]


def broker_of(
    bootstrap: str | None,
    *,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    sasl: str | None,
    username: str | None,
    password_file: Path | None,
) -> Broker | None:
    """The broker that a command line means, or `$HYBRID_KAFKA`; None where neither does.

    Raises:
        ConfigError: they do not go together, or there are others without --kafka.
    """
    from serving.connection import Broker

    bootstrap, rest = (
        bootstrap or os.environ.get("HYBRID_KAFKA"),
        (tls, ca, certificate, key, sasl, username, password_file),
    )
    if bootstrap is None and any(rest):
        raise ConfigError("--kafka must name the brokers, as HOST:PORT, where others of its options are given")
    return None if bootstrap is None else Broker(bootstrap, *rest)


def triton_address_of(
    address: str | None,
    *,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
) -> TritonAddress | None:
    """The Triton that a command line means; None where it means none.

    Raises:
        ConfigError: they do not go together, or there are others without --triton.
    """
    from serving.connection import TritonAddress

    rest = (tls, ca, certificate, key, token_file)
    if address is None and any(rest):
        raise ConfigError("--triton must name the server, as HOST:PORT, where others of its options are given")
    return None if address is None else TritonAddress(address, *rest)
