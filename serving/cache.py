"""What was read or computed a moment ago: an entity's features for a bounded time, a server embedding by its input.

Both stand before the thing itself, with its interface. An embedding is found
again by (tower, version, all that the tower read: the entity's features and the
request's), so it can be of no other request, nor of features that changed; a
packed row's event time would not tell, being that of its oldest view, beside
which a newer one can change. What is trusted is the row: features read less than
`reread_s` ago are used again, so that is how late a materialised change is seen.
How old features may be is the model's to say, and is checked at every use.

Where the store fails, what was read earlier is still there, as long as there is
room, for models that are declared to be answered with it (RFC 5861, section 4,
has the same for HTTP: stale-if-error).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import Unavailable
from hybrid.protocol import OK

if TYPE_CHECKING:
    from serving.merge import PackedRows, Reader
    from serving.triton import Float32, Models

log = logging.getLogger(__name__)

ENTRY_BYTES = 512  # of an entry in Python: its key, and its places in a dictionary and a list
CACHE_BYTES = 32 << 20  # of one model's features, and of its embeddings
REREAD_S = 5.0
HUNG_S, ALONE_S = 0.5, 1.0  # a store that failed after so long is asked again after so long, by one thread
LONG_AGO_MS = -(1 << 60)
TOWERS = 8  # whose embeddings are kept: some models, each in two versions


@dataclass(frozen=True)
class Rows:
    """See `serving.merge.PackedRows`."""

    slots: NDArray[np.float32]
    age_ms: NDArray[np.int64]
    status: NDArray[np.object_]


class CachedReader:
    """A `Reader` that reads an entity's features again only after `reread_s`. Threads may share it.

    Only rows that may be served are kept: an entity that is unknown, stale or
    drifted is seen as soon as it is materialised, and of one that is gone nothing
    is kept.

    A store that fails raises nothing: those of its rows that are not known are
    "unavailable", with the slots and the age of what was last read of them, where
    that is kept and young enough. One that hangs is left alone for a moment, in
    which the rows of other batches need not wait out its time limit too.

    Args:
        reader: the store itself.
        width: how many slots.
        reread_s: see above; 0 reads every row.
        max_age_s: of the features, as the model allows.
        max_bytes: of all that is kept; 0 keeps nothing.
        clock: seconds, never going back.

    Attributes:
        hits, misses: rows that were looked for and could be used, and that could not.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        width: int,
        reread_s: float,
        max_age_s: float,
        max_bytes: int = CACHE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader, self._reread_ms, self._max_age_ms = reader, 1000 * reread_s, 1000 * max_age_s
        self._width, self._clock = width, clock
        self._entry_bytes = ENTRY_BYTES + 4 * width + 16
        capacity = max_bytes // self._entry_bytes
        self._places = _Places(capacity)
        self.hits = self.misses = 0
        self._slots = np.empty((capacity, width), np.float32)
        self._oldest_ms, self._read_ms = np.zeros((2, capacity), np.int64)
        self._asked_again_s = -math.inf  # when; before, a store that hung is not asked
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return len(self) * self._entry_bytes

    def read(self, entities: Sequence[str], now_ms: int) -> Rows:
        """See `Reader`. An entry of a time that has not come, as when the clock was set back, is read again."""
        n = len(entities)
        if self._places.capacity:
            with self._lock:
                place = self._places.find(entities)
                slots, age_ms = self._slots[place], now_ms - self._oldest_ms[place]
                since_ms = now_ms - self._read_ms[place]
                last = (place >= 0) & (since_ms >= 0) & (age_ms <= self._max_age_ms)
                fresh = last & (since_ms < self._reread_ms)
                hits = int(fresh.sum())
                self.hits, self.misses = self.hits + hits, self.misses + n - hits
        else:
            slots, age_ms, last = np.empty((n, self._width), np.float32), np.zeros(n, np.int64), np.zeros(n, bool)
            fresh = last
        status = np.full(n, OK, dtype=object)
        if not fresh.all():
            missed = np.flatnonzero(~fresh)
            rows = self._ask([entities[row] for row in missed.tolist()], now_ms)
            if rows is None:
                status[missed], age_ms[~last] = Unavailable.code, -1
            else:
                slots[missed], age_ms[missed], status[missed] = rows.slots, rows.age_ms, rows.status
                if self._places.capacity:
                    self._keep(entities, missed, Rows(slots, age_ms, status), now_ms)
        return Rows(slots, age_ms, status)

    def _ask(self, entities: Sequence[str], now_ms: int) -> PackedRows | None:
        """What the store says; None where it says nothing."""
        begun_s = self._clock()
        with self._lock:
            if begun_s < self._asked_again_s:
                return None
            if self._asked_again_s > -math.inf:  # it hung: the others wait for what this one finds
                self._asked_again_s = math.inf
        try:
            rows = self._reader.read(entities, now_ms)
        except Exception as error:
            # The class alone: a store's message can quote the entity.
            log.error("the feature store does not answer for %d rows: %s", len(entities), type(error).__name__)
            ended_s = self._clock()
            with self._lock:
                hung = ended_s - begun_s >= HUNG_S
                self._asked_again_s = ended_s + ALONE_S if hung else -math.inf
            return None
        with self._lock:
            self._asked_again_s = -math.inf
        return rows

    def _keep(self, entities: Sequence[str], missed: NDArray[np.intp], rows: Rows, now_ms: int) -> None:
        """Of the `missed` rows, which were read now, those that may be served; of the others nothing holds any more."""
        good = rows.status[missed] == OK
        kept, gone = missed[good], missed[~good]
        with self._lock:
            place = self._places.take([entities[row] for row in kept.tolist()])
            self._slots[place], self._read_ms[place] = rows.slots[kept], now_ms
            self._oldest_ms[place] = now_ms - rows.age_ms[kept]
            place = self._places.find([entities[row] for row in gone.tolist()])
            self._oldest_ms[place[place >= 0]] = LONG_AGO_MS


class CachedModels:
    """`Models` whose server towers run once for each input that differs. Threads may share it.

    A tower's output is asked for as "embedding" (see `hybrid.deployment.Deployment`);
    heads, which read the device's side, always run.

    Args:
        models: the networks themselves.
        max_bytes: of the embeddings of one version; 0 keeps nothing.

    Attributes:
        hits, misses: rows whose embedding was looked for and found, and that were not.
    """

    def __init__(self, models: Models, max_bytes: int = CACHE_BYTES) -> None:
        self._models, self._max_bytes = models, max_bytes
        self._towers: dict[tuple[str, int], _Embeddings] = {}
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        with self._lock:
            return sum(tower.kept_bytes for tower in self._towers.values())

    def infer(
        self, model: str, version: int, inputs: Mapping[str, Float32], output: str, until_s: float = math.inf
    ) -> Float32:
        """See `Models`."""
        if output != "embedding" or not self._max_bytes:
            return self._models.infer(model, version, inputs, output, until_s)
        ((name, slots),) = inputs.items()
        raw, size = np.ascontiguousarray(slots, np.float32).tobytes(), 4 * slots.shape[1]
        keys = [raw[start : start + size] for start in range(0, len(raw), size)]
        with self._lock:
            tower = self._towers.get((model, version))
            known = None if tower is None else tower.get(keys)
            hit = np.zeros(len(keys), bool) if known is None else known.hit
            hits = int(hit.sum())
            self.hits, self.misses = self.hits + hits, self.misses + len(keys) - hits
        if known is not None and hit.all():
            return known.embedding
        missed = {keys[row]: row for row in np.flatnonzero(~hit).tolist()}
        first = {key: place for place, key in enumerate(missed)}
        computed = self._models.infer(model, version, {name: slots[list(missed.values())]}, output, until_s)
        with self._lock:
            self._tower(model, version, computed.shape[1], size).put(list(missed), computed)
        embedding = np.empty((len(keys), computed.shape[1]), np.float32) if known is None else known.embedding
        rows = np.flatnonzero(~hit).tolist()
        embedding[rows] = computed[[first[keys[row]] for row in rows]]
        return embedding

    def _tower(self, model: str, version: int, width: int, key_bytes: int) -> _Embeddings:
        key = model, version
        if key not in self._towers:
            while len(self._towers) >= TOWERS:
                del self._towers[next(iter(self._towers))]
            self._towers[key] = _Embeddings(width, self._max_bytes, ENTRY_BYTES + key_bytes + 4 * width)
        return self._towers[key]


@dataclass(frozen=True)
class _Known:
    hit: NDArray[np.bool_]
    embedding: NDArray[np.float32]  # meaningless where not hit


class _Embeddings:
    """One tower's, by its input."""

    def __init__(self, width: int, max_bytes: int, entry_bytes: int) -> None:
        capacity, self._entry_bytes = max_bytes // entry_bytes, entry_bytes
        self._places = _Places(capacity)
        self._embedding = np.empty((max(capacity, 1), width), np.float32)

    @property
    def kept_bytes(self) -> int:
        return len(self._places) * self._entry_bytes

    def get(self, keys: Sequence[bytes]) -> _Known:
        place = self._places.find(keys)
        return _Known(place >= 0, self._embedding[place])

    def put(self, keys: Sequence[bytes], embedding: NDArray[np.float32]) -> None:
        room = self._places.capacity
        if room:  # of more keys than there is room for, the last
            self._embedding[self._places.take(keys[-room:])] = embedding[-room:]


class _Places:
    """Key -> row of some columns, the oldest key's given to the next when all are taken."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._place: dict[Hashable, int] = {}
        self._keys: list[Hashable] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._place)

    def find(self, keys: Sequence[Hashable]) -> NDArray[np.intp]:
        """(n,) rows; -1 where a key has none."""
        get = self._place.get
        return np.fromiter((get(key, -1) for key in keys), np.intp, len(keys))

    def take(self, keys: Sequence[Hashable]) -> NDArray[np.intp]:
        """(n,) rows, for keys that have one their own."""
        return np.fromiter(map(self._take, keys), np.intp, len(keys))

    def _take(self, key: Hashable) -> int:
        if (found := self._place.get(key)) is not None:
            return found
        place, self._next = self._next, (self._next + 1) % self.capacity
        if place < len(self._keys):
            del self._place[self._keys[place]]
            self._keys[place] = key
        else:
            self._keys.append(key)
        self._place[key] = place
        return place
