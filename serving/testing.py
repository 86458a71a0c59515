"""Serving without servers, for unit tests: topics, feature store and networks in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.deployment import Deployment
from hybrid.errors import Unavailable, UnknownEntity
from hybrid.features import Categorical, Features, Numeric
from serving.kafka import Record, Upto

EMBEDDING = 2


def deployment(version: int = 1, join_key_type: Literal["text", "integer"] = "text") -> Deployment:
    """A deployment of model "shop": one server slot, a text and a number from the request, embeddings of 2."""
    return Deployment(
        model="shop",
        version=version,
        definition_hash="0" * 64,
        packed_view="shops__packed",
        join_key="shop_id",
        join_key_type=join_key_type,
        max_feature_age_s=60.0,
        server=Features.of({"size": Numeric()}),
        request=Features.of({"hour": Categorical(vocabulary=("7AM", "2PM")), "budget": Numeric()}),
        server_embedding=EMBEDDING,
        device_embedding=EMBEDDING,
        server_tower="shop_server_tower",
        head="shop_head",
    )


@dataclass
class MemoryTopic:
    """An `Inbox` and `Outbox` in one: what is sent can be polled, and delivery can be made to fail.

    Attributes:
        records: all that lies in the topic, in order.
        committed, position: of the one reader, as places in `records`.
        failures: how many flushes from now on fail; what they should have delivered is lost.
        paused: whether polls give nothing.
        max_bytes: a flush fails that holds a larger record, as Kafka's default limit has it.
    """

    records: list[Record] = field(default_factory=list)
    committed: int = 0
    position: int = 0
    failures: int = 0
    paused: bool = False
    max_bytes: int = 1 << 20
    _sent: list[Record] = field(default_factory=list)

    def send(self, topic: str, value: bytes, partition: int | None = None) -> None:
        """See `Outbox`."""
        self._sent.append(Record(topic, partition or 0, len(self.records) + len(self._sent), value))

    def flush(self) -> None:
        """See `Outbox`."""
        sent, self._sent = self._sent, []
        if self.failures:
            self.failures -= 1
            raise Unavailable("the topic was told to fail")
        if any(len(record.value) > self.max_bytes for record in sent):
            raise Unavailable("a record is larger than the topic takes")
        self.records += sent

    def poll(self, timeout_s: float, most: int) -> list[Record]:
        """See `Inbox`; never waits."""
        if self.paused:
            return []
        found = self.records[self.position : self.position + most]
        self.position += len(found)
        return found

    def commit(self, upto: Upto) -> None:
        """See `Inbox`; there is one partition."""
        (self.committed,) = upto.values()

    def pause(self) -> None:
        """See `Inbox`."""
        self.paused = True

    def resume(self) -> None:
        """See `Inbox`."""
        self.paused = False

    def rewind(self) -> None:
        """See `Inbox`."""
        self.position = self.committed


@dataclass(frozen=True)
class MemoryRows:
    """What `MemoryReader` answers."""

    slots: NDArray[np.float32]
    age_ms: NDArray[np.int64]
    status: NDArray[np.object_]


@dataclass(frozen=True)
class MemoryReader:
    """A feature store: entity -> (its one slot, "ok" or why it cannot be used); every row is 5 ms old."""

    known: Mapping[str, tuple[float, str]]

    def read(self, entities: Sequence[str], now_ms: int) -> MemoryRows:
        """See `serving.merge.Reader`."""
        rows = [self.known.get(entity, (np.nan, UnknownEntity.code)) for entity in entities]
        age = [5 if entity in self.known else -1 for entity in entities]
        slots = np.array([[slot] for slot, _ in rows], np.float32)
        return MemoryRows(slots, np.array(age), np.array([status for _, status in rows], dtype=object))


@dataclass
class SumModels:
    """Networks easy to do by hand: the tower sums a row's slots into each place, the head sums both embeddings.

    Attributes:
        calls: (model, version, rows) of each call.
        broken: whether every call fails.
        until_s: of each call.
    """

    calls: list[tuple[str, int, int]] = field(default_factory=list)
    broken: bool = False
    until_s: list[float] = field(default_factory=list)

    def infer(
        self,
        model: str,
        version: int,
        inputs: Mapping[str, NDArray[np.float32]],
        output: str,
        until_s: float = math.inf,
    ) -> NDArray[np.float32]:
        """See `serving.triton.Models`."""
        if self.broken:
            raise Unavailable("told to fail")
        self.until_s.append(until_s)
        total = np.concatenate(list(inputs.values()), axis=1).sum(axis=1)
        self.calls.append((model, version, len(total)))
        return np.repeat(total[:, None], EMBEDDING if output == "embedding" else 1, axis=1)


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate of 127.0.0.1, good for an hour, that signs itself: it is its own CA."""

    chain: Path
    key: Path

    @classmethod
    def write(cls, folder: Path, name: str = "gateway") -> Certificate:
        """A new one, as `<name>.crt` and `<name>.key`."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(hours=1))
        here = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        signed = builder.add_extension(here, False).add_extension(x509.BasicConstraints(True, None), True)
        written = cls(folder / f"{name}.crt", folder / f"{name}.key")
        written.chain.write_bytes(signed.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        written.key.write_bytes(key.private_bytes(*form))
        return written
