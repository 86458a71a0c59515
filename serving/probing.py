"""Whether Kafka and Triton are as serving needs them, asked from outside: nothing that serving uses is written to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import kafka
import tritonclient.grpc as triton
from kafka.admin import ConfigResource
from kafka.errors import BrokerResponseError, KafkaError, TopicAlreadyExistsError

from hybrid.errors import ConfigError, Unavailable
from serving.connection import Broker, Token, TritonAddress
from serving.kafka import GROUP
from serving.reach import check_triton
from serving.topics import ABSENT, DEAD_CONFIG, FORBIDDEN, PARTITIONS, REPLAYS, TOPIC_CONFIG, admin_of

DOCTOR = "hybrid.doctor.v1"  # for `round_trip` alone; the broker's clock is in its records
DOCTOR_CONFIG = {"retention.ms": "3600000", "message.timestamp.type": "LogAppendTime"}
CALL_MS = 5_000
CLIENT: dict[str, Any] = {"bootstrap_timeout_ms": CALL_MS}


@dataclass(frozen=True)
class Topic:
    """A topic as it is.

    Attributes:
        partitions: how many it has; 0: this client may not look at it.
        replicas: of its partition that has the fewest.
        behind: partitions some of whose replicas are not in sync.
        settings: those that serving cares for; empty where the broker lets nobody ask.
    """

    partitions: int
    replicas: int
    behind: int
    settings: Mapping[str, str]

    def differences(self, name: str) -> dict[str, tuple[str, str]]:
        """Setting -> what it is, and what serving creates the topic with."""
        wanted = expected(name)
        return {key: (found, wanted[key]) for key, found in self.settings.items() if found != wanted[key]}


@dataclass(frozen=True)
class RoundTrip:
    """A record that was sent and came back.

    Attributes:
        took_ms: from before it was sent until it was read.
        skew_s: the broker's clock less ours; 0 where the time that it took explains it.
    """

    took_ms: float
    skew_s: float


def expected(topic: str) -> Mapping[str, str]:
    """What serving creates one of its topics with."""
    return DEAD_CONFIG if topic == REPLAYS or topic.endswith(".dead") else TOPIC_CONFIG


def topics(broker: Broker) -> dict[str, Topic | None]:
    """Each topic of serving; None: it is absent.

    Raises:
        Unavailable: Kafka does not answer, or refuses.
        ConfigError: what is shown to the broker is not right.
    """
    with _admin(broker) as admin:
        return {each["name"]: _topic(admin, each) for each in admin.describe_topics(sorted(PARTITIONS))}


def workers(broker: Broker) -> int | None:
    """How many merge workers share the requests; None: the broker lets this client not ask.

    Raises:
        Unavailable: Kafka does not answer.
    """
    with _admin(broker) as admin:
        try:
            group = admin.describe_groups([GROUP])[GROUP]
        except KafkaError as error:
            if "Authorization" in type(error).__name__:
                return None
            raise
    return None if group["error"] and "uthoriz" in group["error"] else len(group["members"])


def round_trip(broker: Broker) -> RoundTrip:
    """Sends a record to `hybrid.doctor.v1`, which is made where it is absent, and reads it again.

    Raises:
        ConfigError: it is not there, and this client may not make it; or what is shown to the broker is not right.
        Unavailable: it cannot be written to or read, or the record does not come within some seconds.
    """
    _make(broker)
    value = uuid.uuid4().bytes
    with _told(), closing(_producer(broker)) as producer:
        producer.partitions_for(DOCTOR)  # so that what is timed is the record's way
        asked_s, began = time.time(), time.monotonic()
        sent = producer.send(DOCTOR, value, partition=0).get(timeout=CALL_MS / 1000)
        answered_s = time.time()
        _read(broker, sent.offset, value)
        took_ms = (time.monotonic() - began) * 1000
    theirs = sent.timestamp / 1000
    return RoundTrip(took_ms, max(theirs - answered_s, 0.0) + min(theirs + 0.001 - asked_s, 0.0))


def loaded(address: TritonAddress, models: Sequence[tuple[str, int]]) -> tuple[bool, list[tuple[str, int]]]:
    """Whether Triton says that it is ready, and which of the models, by name and version, it has not loaded.

    Raises:
        Unavailable: it does not answer.
        ConfigError: what is shown to it is not right.
    """
    check_triton(address)
    headers = Token(address.token_file).headers() if address.token_file else None
    call = {"headers": headers, "client_timeout": CALL_MS / 1000}
    try:
        with closing(triton.InferenceServerClient(**address.settings())) as client:
            ready = bool(client.is_server_ready(**call))
            return ready, [(name, v) for name, v in models if not client.is_model_ready(name, str(v), **call)]
    except triton.InferenceServerException as error:
        raise Unavailable(f"Triton at {address.address} does not answer: {error.status() or 'no status'}") from None


@contextmanager
def _admin(broker: Broker) -> Iterator[Any]:
    with _told(), closing(admin_of(broker, within_s=0)) as admin:
        yield admin


@contextmanager
def _told() -> Iterator[None]:
    """Kafka's errors as one of ours; of its text not a word."""
    try:
        yield
    except KafkaError as error:
        raise Unavailable(f"Kafka does not do what it is asked: {type(error).__name__}") from None


def _topic(admin: Any, described: Mapping[str, Any]) -> Topic | None:
    if described["error_code"] in (ABSENT, FORBIDDEN):
        return None if described["error_code"] == ABSENT else Topic(0, 0, 0, {})
    replicas = [(len(partition["replica_nodes"]), len(partition["isr_nodes"])) for partition in described["partitions"]]
    fewest, behind = min(replicas)[0], sum(in_sync < count for count, in_sync in replicas)
    return Topic(len(replicas), fewest, behind, _settings(admin, described["name"]))


def _settings(admin: Any, topic: str) -> dict[str, str]:
    try:
        found = admin.describe_configs([ConfigResource("TOPIC", topic)], config_filter="all")["topic"][topic]
    except (KafkaError, KeyError):  # no right to ask
        return {}
    return {name: str(found[name]["value"]) for name in expected(topic) if name in found}


def _make(broker: Broker) -> None:
    with _admin(broker) as admin:
        (code,) = [each["error_code"] for each in admin.describe_topics([DOCTOR])]
        if code not in (ABSENT, FORBIDDEN):
            return
        try:
            settings = {"num_partitions": 1, "configs": DOCTOR_CONFIG}
            admin.create_topics({DOCTOR: settings}, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            return
        except BrokerResponseError as error:
            raise ConfigError(f"{DOCTOR} is not there for this client to use ({type(error).__name__})") from None


def _producer(broker: Broker) -> Any:
    times = {"max_block_ms": CALL_MS, "request_timeout_ms": CALL_MS - 1000, "delivery_timeout_ms": CALL_MS}
    return kafka.KafkaProducer(**broker.settings(), **CLIENT, **times, acks="all", enable_idempotence=False)


def _read(broker: Broker, offset: int, value: bytes) -> None:
    place = kafka.TopicPartition(DOCTOR, 0)
    with closing(kafka.KafkaConsumer(**broker.settings(), **CLIENT, enable_auto_commit=False)) as consumer:
        consumer.assign([place])
        consumer.seek(place, offset)
        deadline = time.monotonic() + CALL_MS / 1000
        while time.monotonic() < deadline:
            for record in consumer.poll(timeout_ms=200).get(place, ()):
                if record.value == value:
                    return
    raise Unavailable(f"a record was written to {DOCTOR}, and was not to be read within {CALL_MS / 1000:g} s")
