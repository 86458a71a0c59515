"""Real devices on one machine, many in one process: what `hybrid fleet run` starts.

Each has its examples in an encrypted store, asks the aggregator by itself, decides by its host's readings, trains with
the bundle's program and uploads: `device_runtime`, as a phone's app would call it. `python -m hybrid.local.devices`
runs sessions until its standard input ends, and prints how they ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.features import Float32

if TYPE_CHECKING:
    from device_runtime.participation import Outcome
    from device_runtime.store import Store

CONCURRENCY = 4  # sessions at once in one process
GOOD = {
    "consent": True,
    "charging": True,
    "battery": 1.0,
    "idle": True,
    "metered": False,
    "thermal": "nominal",
    "free_bytes": 1 << 30,
}  # readings of a host on which nothing speaks against taking part


@dataclass(frozen=True)
class People:
    """What people's devices hold, as columns of n rows.

    Attributes:
        offsets: (users + 1,) person u has the rows offsets[u] to offsets[u + 1].
        entity: (n,) the join key.
        request: name -> (n,) raw values.
        features: the same of the device features.
        server: (n, a) what the server side contributed.
        labels: (n,) 0 or 1.
    """

    offsets: NDArray[np.int64]
    entity: Sequence[str] = field(repr=False)
    request: Mapping[str, Sequence[Any]] = field(repr=False)
    features: Mapping[str, Sequence[Any]] = field(repr=False)
    server: Float32 = field(repr=False)
    labels: Float32 = field(repr=False)

    def store(self, store: Store, users: range, version: int) -> int:
        """Writes some people's examples, device i = users[i]; returns how many.

        Args:
            store: new.
            users: of the people; step 1.
            version: that contributed.
        """
        from device_runtime.rows import Rows
        from device_runtime.store import Served

        first, end = self.offsets[users.start], self.offsets[users.stop]
        rows = range(int(first), int(end))
        counts = np.diff(self.offsets)[users.start : users.stop]
        device = np.repeat(np.arange(len(users)), counts)
        # Timed one after another, so that the newest of a person's rows is its last one.
        now_ms = time.time_ns() // 1_000_000 - len(rows)
        number = np.arange(len(rows))
        columns = Rows(
            device,
            number,
            [self.entity[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.request.items()},
            {name: [values[row] for row in rows] for name, values in self.features.items()},
        )
        with store.together():
            store.write(columns, now_ms)
            store.answered(
                (int(device[i]), i, Served(now_ms + i, version, 0.5, self.server[row].tolist(), 0))
                for i, row in enumerate(rows)
            )
            for i, row in enumerate(rows):
                store.label(int(self.labels[row]), now_ms + i, inference=store.id_of(int(device[i]), i))
        return len(rows)


def command(
    *, bundle: Path, trust: Path, store: Path, key_file: Path, aggregator: str, devices: int, rest_s: float
) -> list[str]:
    """The command line of one process of devices; see `main`.

    Args: what its options are called.
    """
    files = ["--bundle", bundle, "--trust", trust, "--store", store, "--key-file", key_file]
    more = ["--aggregator", aggregator, "--devices", devices, "--rest-s", rest_s]
    return [sys.executable, "-m", "hybrid.local.devices", *map(str, [*files, *more])]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="with a training program")
    parser.add_argument("--trust", type=Path, required=True, help="the public key that bundles and plans are signed by")
    parser.add_argument("--store", type=Path, required=True, help="encrypted SQLite file with the devices' examples")
    parser.add_argument("--key-file", type=Path, required=True, help="the store's key, 64 hex digits")
    parser.add_argument("--aggregator", required=True, help="for example http://127.0.0.1:8090")
    parser.add_argument("--devices", type=int, required=True, help="how many are in the store")
    parser.add_argument("--rest-s", type=float, required=True, help="no device stays away for longer than this")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(_run(**vars(arguments)))))


async def _run(
    *, bundle: Path, trust: Path, store: Path, key_file: Path, aggregator: str, devices: int, rest_s: float
) -> dict[str, Any]:
    from device_runtime.aggregator import Aggregator
    from device_runtime.eligibility import Readings
    from device_runtime.host import ScriptedHost
    from device_runtime.participation import Participation
    from device_runtime.program import open_bundle
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store
    from device_runtime.trainer import Trainer
    from hybrid.bundle import trusted_key
    from hybrid.plan import Policy

    opened, trusted, asked = open_bundle(bundle, trust), trusted_key(trust), Aggregator(aggregator)
    host = ScriptedHost([Readings(**GOOD)])  # type: ignore[arg-type]
    # A round stands for a day here: a device takes part in each.
    own = Policy(separation_s=0, participations=1_000_000)
    trainers: asyncio.Queue[Trainer] = asyncio.Queue()
    for _ in range(CONCURRENCY):
        trainers.put_nowait(Trainer(opened))
    with Store.open(store, read_store_key(key_file, {}), opened.manifest) as kept:

        async def session(device: int) -> Outcome:
            trainer = await trainers.get()
            try:
                return await Participation(
                    opened, trainer, kept, host, asked, trusted, device=device, own=own
                ).session()
            finally:
                trainers.put_nowait(trainer)

        endings = await _live(session, devices, rest_s, _input_ended())
    return {"devices": devices, "sessions": endings.total(), "endings": dict(endings)}


async def _live(session: Any, devices: int, rest_s: float, ended: asyncio.Event) -> Counter[str]:
    """Lets each device take part again and again; returns how often each ending came."""
    endings: Counter[str] = Counter()

    async def live(device: int) -> None:
        while not ended.is_set():
            outcome = await session(device)
            endings[str(outcome.ending)] += 1
            away_s = rest_s if outcome.ask_again_s is None else min(outcome.ask_again_s, rest_s)
            with_end = asyncio.wait_for(ended.wait(), away_s)
            try:
                await with_end
            except TimeoutError:
                continue

    await asyncio.gather(*map(live, range(devices)))
    return endings


def _input_ended() -> asyncio.Event:
    """Set when standard input ends: its other end was closed, or who held it is gone."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def watch() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch, name="input", daemon=True).start()
    return ended


if __name__ == "__main__":
    main()
