"""The topics of serving: created where they are absent and we may, else asked for by name and settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import kafka
from kafka.errors import BrokerResponseError, KafkaError, TopicAlreadyExistsError

from hybrid.errors import ConfigError, Unavailable
from hybrid.messages import DeadLetter, DeviceEmbeddings, Predictions
from serving.connection import Broker
from serving.reach import REACH_S, check_kafka

log = logging.getLogger(__name__)

REPLAYS = "hybrid.dead-letter-replays.v1"  # what was sent again; see `serving.dead_letters`
PARTITIONS = {
    DeviceEmbeddings.TOPIC: 4,
    Predictions.TOPIC: 8,
    DeadLetter.topic_for(DeviceEmbeddings.TOPIC): 1,
    DeadLetter.topic_for(Predictions.TOPIC): 1,
    REPLAYS: 1,
}
# A topic is deleted by whole segments, so hourly retention needs segments shorter than an hour.
TOPIC_CONFIG = {"retention.ms": "3600000", "segment.ms": "600000", "message.timestamp.type": "CreateTime"}
# Letters wait for somebody to mend what was wrong, for a week; a flood of poison must not fill the disk meanwhile.
DEAD_CONFIG = TOPIC_CONFIG | {"retention.ms": "604800000", "segment.ms": "86400000", "retention.bytes": str(1 << 30)}
BOOTSTRAP_MS = 10_000
ABSENT, FORBIDDEN = 3, 29  # UNKNOWN_TOPIC_OR_PARTITION, TOPIC_AUTHORIZATION_FAILED


def create_topics(broker: Broker, requests: int | None = None) -> dict[str, int]:
    """Creates the topics of serving that are absent; those that are there stay as they are.

    Args:
        broker: where.
        requests: partitions of the topic of requests if it is created now: workers share them. The topic of answers
            gets as many, but no fewer than without it: each process of a gateway has one.

    Returns:
        topic -> its partitions, of those that may be seen.

    Raises:
        ConfigError: what is shown to the broker is not right, or a topic is absent and we may not create it.
        Unavailable: it does not answer.
    """
    wanted = dict(PARTITIONS)
    if requests is not None:
        wanted |= {DeviceEmbeddings.TOPIC: requests, Predictions.TOPIC: max(requests, PARTITIONS[Predictions.TOPIC])}
    with closing(admin_of(broker)) as admin:
        try:
            found = _created(admin, wanted)
        except KafkaError as error:
            raise Unavailable(f"Kafka does not answer: {type(error).__name__}") from None
    for topic in (topic for topic, partitions in found.items() if not partitions):
        log.warning("topic %s may not be looked at by this user, so it is taken to be there", topic)
    return {topic: partitions for topic, partitions in found.items() if partitions}


def _created(admin: Any, wanted: Mapping[str, int]) -> Mapping[str, int | None]:
    """As `_found`, once those that were absent are there. Raises: ConfigError: one is not to be."""
    found = _found(admin, wanted)
    absent = [topic for topic, partitions in found.items() if partitions is None]
    refused = {topic: why for topic in absent if (why := _create(admin, topic, wanted[topic]))}
    if refused:
        raise ConfigError(_asked_for(refused, wanted))
    return _found(admin, wanted) if absent else found


def check_access(broker: Broker) -> None:
    """Returns once the broker has taken all that is shown to it, the password too; raises what `create_topics` does."""
    admin_of(broker).close()


def admin_of(broker: Broker, within_s: float = REACH_S) -> Any:
    """kafka-python's client for topics and groups.

    Args:
        broker: where.
        within_s: for it to be there; it may be starting.

    Raises:
        ConfigError: what is shown to the broker is not right.
        Unavailable: it does not answer.
    """
    check_kafka(broker, within_s)
    try:
        return kafka.KafkaAdminClient(bootstrap_timeout_ms=BOOTSTRAP_MS, **broker.settings())
    except KafkaError as error:
        if broker.sasl is not None:  # all else was taken, see `check_kafka`
            raise ConfigError(
                f"--kafka-username and --kafka-password-file must be what {broker.bootstrap} knows: "
                f"it refuses {broker.username!r} and the password in {broker.password_file}"
            ) from None
        raise Unavailable(f"Kafka does not answer: {type(error).__name__}") from None


def _found(admin: Any, topics: Mapping[str, int]) -> dict[str, int | None]:
    """Of each topic its partitions; None: it is absent, 0: it may not be looked at."""
    found: dict[str, int | None] = dict.fromkeys(topics)
    for topic in admin.describe_topics(sorted(topics)):
        if topic["error_code"] != ABSENT:
            found[topic["name"]] = 0 if topic["error_code"] == FORBIDDEN else len(topic["partitions"])
    return found


def _create(admin: Any, topic: str, partitions: int) -> str | None:
    """Creates it; or says why that is refused."""
    settings = {"num_partitions": partitions, "configs": _config(topic)}
    try:
        admin.create_topics({topic: settings}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        log.info("topic %s was created meanwhile", topic)
    except BrokerResponseError as error:
        return type(error).__name__.removesuffix("Error")
    return None


def _asked_for(refused: Mapping[str, str], partitions: Mapping[str, int]) -> str:
    lines = [
        f"  {topic}: {partitions[topic]} partitions, {', '.join(f'{k}={v}' for k, v in _config(topic).items())} ({why})"
        for topic, why in refused.items()
    ]
    return "\n".join(["Kafka refuses to create topics that serving needs; have them created, like so:", *lines])


def _config(topic: str) -> dict[str, str]:
    return DEAD_CONFIG if topic == REPLAYS or topic.endswith(".dead") else TOPIC_CONFIG
