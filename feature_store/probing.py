"""Whether the feature store gives what serving will ask it for: its newest row, and Redis."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from feature_store.definitions import OLDEST_MS, OnlineStore, packed_file, secret_of
from feature_store.materialize import reader
from hybrid.errors import ConfigError, Unavailable
from hybrid.spec import HybridModel

EVICTS = ("allkeys", "volatile")  # policies that drop rows when memory is short begin so


@dataclass(frozen=True)
class Newest:
    """The newest row that was materialised, as serving reads it.

    Attributes:
        status: "ok", or why serving would not use it: see `PackedRows`.
        age_s: of its oldest part; of a row that is not there, of what was materialised.
        max_age_s: that the model declares.
        rows: that were materialised.
    """

    status: str
    age_s: float
    max_age_s: float
    rows: int


@dataclass(frozen=True)
class RedisFound:
    """A Redis that answered.

    Attributes:
        answer_ms: how long a PING took.
        policy: what it does when its memory is full; None: it does not say.
    """

    answer_ms: float
    policy: str | None

    @property
    def evicts(self) -> bool:
        """Whether it drops features when its memory is full."""
        return self.policy is not None and self.policy.startswith(EVICTS)


def newest(model: HybridModel, folder: Path, now: datetime) -> Newest:
    """Opens a model's packed view, and reads the newest row that was materialised, of whichever entity.

    Args:
        model: as it is registered.
        folder: of the Feast store.
        now: with a time zone.

    Raises:
        ConfigError: the view was not applied, or nothing was materialised.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    packed = reader(model, folder)
    file, key = packed_file(model.server, folder), model.server.entity.join_key
    if not file.is_file():
        raise ConfigError(f"nothing was materialised for {model.name}; run `hybrid features materialize {model.name}`")
    rows = pq.read_table(file, columns=[key, OLDEST_MS])
    if not len(rows):
        raise ConfigError(f"no entity of {model.name} is in every view: its sources have none in common")
    place = pc.index(rows[OLDEST_MS], pc.max(rows[OLDEST_MS])).as_py()
    now_ms = int(now.timestamp() * 1000)
    found = packed.read([str(rows[key][place].as_py())], now_ms)
    age_ms = int(found.age_ms[0]) if found.age_ms[0] >= 0 else now_ms - rows[OLDEST_MS][place].as_py()
    max_age_s = model.server.max_feature_age.total_seconds()
    return Newest(str(found.status[0]), age_ms / 1000, max_age_s, len(rows))


def ask_redis(online: OnlineStore) -> RedisFound:
    """Asks Redis as serving reaches it.

    Args:
        online: of kind "redis".

    Raises:
        Unavailable: it does not answer, or refuses the password.
        ConfigError: the password's file cannot be read, or Redis' client is not installed.
    """
    try:
        import redis
    except ImportError:
        raise ConfigError("Redis' client is not installed: pip install 'hybrid-towers[redis]'") from None
    host, _, port = online.address.rpartition(":")
    client = redis.Redis(
        host=host,
        port=int(port),
        db=online.database,
        ssl=online.tls,
        username=online.username,
        password=secret_of(online.password_file) if online.password_file else None,
        socket_timeout=online.timeout_s,
        socket_connect_timeout=online.timeout_s,
    )
    try:
        began = time.monotonic()
        client.ping()
        answer_ms = (time.monotonic() - began) * 1000
        try:
            said: Any = client.config_get("maxmemory-policy")
            policy = said.get("maxmemory-policy")
        except redis.ResponseError:  # a hosted one lets nobody ask
            policy = None
    except redis.RedisError as error:
        raise Unavailable(f"Redis at {online.address} does not answer: {type(error).__name__}") from None
    finally:
        client.close()
    return RedisFound(answer_ms, policy)
