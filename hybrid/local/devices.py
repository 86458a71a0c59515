"""Real devices on one machine, many in one process: what `hybrid fleet run` starts.

Each has its examples in an encrypted store, asks the aggregator by itself, decides by its host's readings, trains with
the bundle's program and uploads: `device_runtime`, as a phone's app would call it. `python -m hybrid.local.devices`
says when it is ready, runs sessions until its standard input ends, and prints how they ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import StackError
from hybrid.features import Float32

if TYPE_CHECKING:
    from device_runtime.answering import Answerer
    from device_runtime.participation import Outcome
    from device_runtime.store import Store
    from device_runtime.trainer import Trainer

CONCURRENCY = 4  # sessions at once in one process
END_S = 60.0  # for what is begun when a process is told to end
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
        labels: (n,) 0 or 1; NaN where there is none yet.
    """

    offsets: NDArray[np.int64]
    entity: Sequence[str] = field(repr=False)
    request: Mapping[str, Sequence[Any]] = field(repr=False)
    features: Mapping[str, Sequence[Any]] = field(repr=False)
    server: Float32 = field(repr=False)
    labels: Float32 = field(repr=False)

    @property
    def users(self) -> int:
        """How many people."""
        return len(self.offsets) - 1

    def of(self, users: range) -> People:
        """Some of them, one after another."""
        first, end = int(self.offsets[users.start]), int(self.offsets[users.stop])

        def cut(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
            return {name: values[first:end] for name, values in columns.items()}

        offsets = self.offsets[users.start : users.stop + 1] - first
        rows = slice(first, end)
        entity, request, features = self.entity[rows], cut(self.request), cut(self.features)
        return People(offsets, entity, request, features, self.server[rows], self.labels[rows])

    def twice(self, second: int) -> People:
        """They, and behind them the second devices of the first so many, with the same rows."""
        more = self.of(range(second))

        def joined(one: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
            return {name: [*values, *other[name]] for name, values in one.items()}

        return People(
            offsets=np.concatenate([self.offsets, self.offsets[-1] + more.offsets[1:]]),
            entity=[*self.entity, *more.entity],
            request=joined(self.request, more.request),
            features=joined(self.features, more.features),
            server=np.concatenate([self.server, more.server]),
            labels=np.concatenate([self.labels, more.labels]),
        )

    def store(self, store: Store, users: range, version: int) -> int:
        """Writes some people's rows, device i = users[i]; returns how many.

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
                if not np.isnan(self.labels[row]):
                    store.label(int(self.labels[row]), now_ms + i, inference=store.id_of(int(device[i]), i))
        return len(rows)


@dataclass(frozen=True)
class Opened:
    """What devices of this machine have from their host app.

    Attributes:
        bundle: with a training program.
        trust: the public key that bundles and plans are signed by.
        aggregator: base URL.
        rest_s: no device stays away for longer than this.
        issuer: base URL of the issuer of tokens; None: there is none.
        accounts: of each device, in order, its account's key there.
        reports: base URL of the aggregator to which devices report what they did last week, which is what they do now:
            while they take part, their clocks are a week behind. None: they do not report.
        not_charging: so many of the devices, the first ones, never are.
    """

    bundle: Path
    trust: Path
    aggregator: str
    rest_s: float
    issuer: str | None = None
    accounts: Sequence[str] = field(default=(), repr=False)
    reports: str | None = None
    not_charging: int = 0


class Processes:
    """Processes of devices; get them from `running`."""

    def __init__(self, started: Sequence[subprocess.Popen[str]]) -> None:
        self._started = started

    def wait_ready(self) -> None:
        """Returns once all have their bundle and store open.

        Raises:
            StackError: one failed; the message is what it said.
        """
        for process in self._started:
            assert process.stdout is not None
            if not process.stdout.readline():
                _, error = process.communicate()
                raise StackError(f"a process of devices failed: {error.strip()}")

    def finish(self) -> Counter[str]:
        """Lets what is begun end, and returns how often each ending of a session came.

        Raises:
            StackError: one failed; the message is what it said.
        """
        for process in self._started:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None  # which `communicate` would flush
        endings: Counter[str] = Counter()
        for process in self._started:
            try:
                output, error = process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                raise StackError(f"a process of devices did not end in {END_S:g} s") from None
            if process.returncode:
                raise StackError(f"a process of devices failed: {error.strip()}")
            endings.update(json.loads(output)["endings"])
        return endings


@contextmanager
def running(opened: Opened, people: People, folder: Path, *, processes: int) -> Iterator[Processes]:
    """Starts people's devices; none is left after the block.

    Args:
        opened: what they have.
        people: whose examples they hold.
        folder: for their stores and the key of these; to be deleted afterwards.
        processes: how many.
    """
    from device_runtime.program import open_bundle
    from device_runtime.store import Store

    manifest = open_bundle(opened.bundle, opened.trust).manifest
    key, key_file = secrets.token_bytes(32), folder / "store.key"
    _write_secret(key_file, key.hex())
    cuts = np.linspace(0, people.users, min(processes, people.users) + 1).astype(int).tolist()
    started: list[subprocess.Popen[str]] = []
    try:
        for number, part in enumerate(map(range, cuts[:-1], cuts[1:])):
            file = folder / f"devices-{number}.store"
            with Store.open(file, key, manifest) as store:
                people.store(store, part, manifest.version)
            pipe = subprocess.PIPE
            words = command(opened, file, key_file, len(part))
            if opened.reports is not None:
                words += ["--reports", opened.reports, "--not-charging", str(max(0, opened.not_charging - part.start))]
            if opened.issuer is not None:
                accounts = folder / f"devices-{number}.accounts"
                _write_secret(accounts, "\n".join(opened.accounts[part.start : part.stop]))
                words += ["--issuer", opened.issuer, "--accounts", str(accounts)]
            started.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        yield Processes(started)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _write_secret(file: Path, text: str) -> None:
    """A new file that its owner alone may read."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(text)


def command(opened: Opened, store: Path, key_file: Path, devices: int) -> list[str]:
    """The command line of one process, for a store that holds so many devices."""
    files = ["--bundle", opened.bundle, "--trust", opened.trust, "--store", store, "--key-file", key_file]
    more = ["--aggregator", opened.aggregator, "--devices", devices, "--rest-s", opened.rest_s]
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
    parser.add_argument("--issuer", default=None, help="of tokens, for example http://127.0.0.1:8092")
    parser.add_argument("--accounts", type=Path, default=None, help="with each device's key there, one a line")
    parser.add_argument("--reports", default=None, help="the aggregator to which they report what they did last week")
    parser.add_argument("--not-charging", type=int, default=0, help="so many of them never are")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(_run(**vars(arguments)))))


async def _run(
    *,
    bundle: Path,
    trust: Path,
    store: Path,
    key_file: Path,
    aggregator: str,
    devices: int,
    rest_s: float,
    issuer: str | None,
    accounts: Path | None,
    reports: str | None,
    not_charging: int,
) -> dict[str, Any]:
    from device_runtime.aggregator import Aggregator
    from device_runtime.answering import Answerer
    from device_runtime.credentials import Credentials
    from device_runtime.eligibility import Readings
    from device_runtime.host import ScriptedHost
    from device_runtime.participation import Participation
    from device_runtime.program import open_bundle
    from device_runtime.reporting import Report
    from device_runtime.secret import read_store_key
    from device_runtime.store import Store
    from device_runtime.trainer import Trainer
    from hybrid.bundle import trusted_key
    from hybrid.plan import Policy
    from hybrid.week import WEEK_S

    opened, trusted, asked = open_bundle(bundle, trust), trusted_key(trust), Aggregator(aggregator)
    good = Readings(**GOOD)  # type: ignore[arg-type]
    hosts = ScriptedHost([good]), ScriptedHost([replace(good, charging=False)])
    behind_ms, told = (0, None) if reports is None else (int(WEEK_S * 1000), Aggregator(reports))
    # A round stands for a day here: a device takes part in each.
    own = Policy(separation_s=0, participations=1_000_000)
    shared, room = _InTurn(Trainer(opened), Answerer(opened)), asyncio.Semaphore(CONCURRENCY)
    trainer, answerer = cast(Trainer, shared), cast(Answerer, shared)
    keys = [] if accounts is None else accounts.read_text().split()
    credentials = None if issuer is None else Credentials(issuer, keys[0])
    with Store.open(store, read_store_key(key_file, {}), opened.manifest) as kept:

        async def session(device: int) -> Outcome:
            whose: dict[str, Any] = {
                "store": kept,
                "host": hosts[device < not_charging],
                "trusted": trusted,
                "device": device,
                "credentials": None if credentials is None else credentials.of(keys[device]),
            }
            async with room:
                outcome = await Participation(
                    bundle=opened,
                    trainer=trainer,
                    aggregator=asked,
                    answerer=answerer,
                    own=own,
                    now_ms=lambda: time.time_ns() // 1_000_000 - behind_ms,
                    **whose,
                ).session()
                if told is not None:
                    await Report(model=kept.model, aggregator=told, spread_s=0, **whose).session()
                return outcome

        print(json.dumps({"ready": devices}), flush=True)
        endings = await _live(session, devices, rest_s, _input_ended())
    return {"devices": devices, "sessions": endings.total(), "endings": dict(endings)}


class _InTurn:
    """Programs that several sessions share: trainings of several threads at once have been seen to stand still."""

    def __init__(self, trainer: Trainer, answerer: Answerer) -> None:
        self._trainer, self._answerer, self._alone = trainer, answerer, threading.Lock()
        self.gave_up: str | None = None

    def train(self, *arguments: Any, **more: Any) -> Float32 | None:
        """See `device_runtime.trainer.Trainer.train`."""
        with self._alone:
            update = self._trainer.train(*arguments, **more)
            self.gave_up = self._trainer.gave_up
        return update

    def answer(self, *arguments: Any, **more: Any) -> Float32 | None:
        """See `device_runtime.answering.Answerer.answer`."""
        with self._alone:
            answer = self._answerer.answer(*arguments, **more)
            self.gave_up = self._answerer.gave_up
        return answer


async def _live(
    session: Callable[[int], Awaitable[Outcome]], devices: int, rest_s: float, ended: asyncio.Event
) -> Counter[str]:
    """Lets each device take part again and again, once at least; returns how often each ending came."""
    endings: Counter[str] = Counter()

    async def live(device: int) -> None:
        while True:
            outcome = await session(device)
            endings[str(outcome.ending)] += 1
            if ended.is_set():
                return
            away_s = rest_s if outcome.ask_again_s is None else min(outcome.ask_again_s, rest_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), away_s)
                return

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
