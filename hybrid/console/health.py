"""How serving is doing: what gateways and workers count, looked at again and again, of the last minutes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

import httpx

from hybrid.errors import ConfigError, HybridError
from hybrid.gates import Counted, Sample, fetched, grown, read_all

EVERY_S = 5.0
LAST_S = 300.0  # that numbers are of
TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """How a model is served.

    Attributes:
        seconds: that it was counted over; 0: not yet.
        versions: version -> what was counted of it, of all processes together; none where nobody asked for it.
        lag: records that workers have not polled yet; None: no worker is read.
        read: processes that are.
        unread: why others are not, a sentence each.
    """

    seconds: float = 0.0
    versions: Mapping[int, Counted] = field(default_factory=dict)
    lag: float | None = None
    read: int = 0
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Look:
    """One process at one time."""

    at: float
    models: Mapping[str, Mapping[Sample, float]]
    lag: float | None


class Pulse(AbstractContextManager["Pulse"]):
    """Looks at the processes every few seconds, in a thread of its own, until the block ends.

    Args:
        processes: asked at each look for the addresses of their metrics; a HybridError says why there are none.
        clock: in seconds.
        every_s: between two looks.
    """

    def __init__(
        self,
        processes: Callable[[], Sequence[str]],
        *,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = EVERY_S,
    ) -> None:
        self._processes, self._clock, self._every_s = processes, clock, every_s
        self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        self._alone, self._over = threading.Lock(), threading.Event()
        self._looks: dict[str, deque[_Look]] = {}
        self._unread: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="console-pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def look(self) -> None:
        """At each process, once."""
        try:
            urls = self._processes()
        except HybridError as error:
            self._keep({}, {"": str(error)})
            return
        found: dict[str, _Look] = {}
        unread: dict[str, str] = {}
        for url in urls:
            try:
                found[url] = self._read(url)
            except (httpx.HTTPError, httpx.InvalidURL, ConfigError) as error:
                why = str(error) if isinstance(error, ConfigError) else type(error).__name__
                unread[url] = f"{url} cannot be read: {why}"
        self._keep(found, unread)

    def health(self, model: str) -> Health:
        """Of a model, since the first look of the last minutes."""
        with self._alone:
            looks, unread = {url: list(of) for url, of in self._looks.items()}, tuple(self._unread.values())
        total = sum((grown(*_steps(of, model)) for of in looks.values()), start=grown((), ()))
        versions = sorted({int(version) for (_, version, _), count in total.items() if count and version.isdecimal()})
        lags = [of[-1].lag for of in looks.values() if of and of[-1].lag is not None]
        return Health(
            seconds=max((of[-1].at - of[0].at for of in looks.values() if of), default=0.0),
            versions={version: Counted.of(total, version) for version in versions},
            lag=sum(lag for lag in lags if lag is not None) if lags else None,
            read=len(looks),
            unread=unread,
        )

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:
                log.error("looking at serving: %s", type(error).__name__)
            if self._over.wait(self._every_s):
                return

    def _read(self, url: str) -> _Look:
        text = fetched(self._client, url)
        return _Look(self._clock(), *read_all(text))

    def _keep(self, found: Mapping[str, _Look], unread: Mapping[str, str]) -> None:
        with self._alone:
            self._unread = dict(unread)
            # Of one that cannot be read, what it counted before says nothing of now.
            self._looks = {url: self._looks.get(url, deque()) for url in found}
            for url, look in found.items():
                looks = self._looks[url]
                looks.append(look)
                while looks[0].at < look.at - LAST_S:
                    looks.popleft()


def _steps(looks: Sequence[_Look], model: str) -> tuple[list[Mapping[Sample, float]], list[Mapping[Sample, float]]]:
    """What a process had counted before and after each of its steps: so that one that was started anew is seen."""
    counts = [look.models.get(model, {}) for look in looks]
    return [before for before, _ in pairwise(counts)], [after for _, after in pairwise(counts)]
