"""Devices that take part, or cannot, tell so a week later: real sessions, stores, HTTP, and the command line."""

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from device_runtime.aggregator import Aggregator
from device_runtime.eligibility import Readings
from device_runtime.host import ScriptedHost
from device_runtime.participation import Participation
from device_runtime.program import open_bundle
from device_runtime.reporting import Report
from device_runtime.store import Store
from device_runtime.trainer import Trainer
from hybrid.analytics.asking import FUNNEL
from hybrid.analytics.fleet import FleetAsk
from hybrid.analytics.funnel import funnel, query_of
from hybrid.bundle import trusted_key
from hybrid.federation.aggregator import Round
from hybrid.federation.checkin import listening
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import Audience, FleetAggregator
from hybrid.journal import Phase
from hybrid.local.devices import GOOD
from hybrid.week import WEEK_S, last_week
from integration_tests.test_fleet_rounds import KEY, LAX, World

DEVICES, UNPLUGGED, BUSY = 8, 3, 1  # the first ones never charge, the next is in use once it has its plan
WEEK_MS = int(WEEK_S * 1000)
UNPAID = Round(sampling=1.0, clip=1.0, noise_multiplier=0.0, minimum=0)


def readings(device: int) -> list[Readings]:
    good = Readings(**GOOD)
    if device < UNPLUGGED:
        return [replace(good, charging=False)]
    return [good, good, replace(good, idle=False)] if device < UNPLUGGED + BUSY else [good]


def test_devices_tell_how_far_they_came_last_week(tmp_path: Path):
    """Without noise: 8 have version 4, 5 could take part, 4 uploaded; 3 were not charging, 1 was in use.

    They tell once; a session of the command line tells of the last device, and again nothing.
    """
    world = World(tmp_path)
    file = world.store(tmp_path / "devices.store", range(DEVICES))
    took_part(world, file)
    clock = ManualClock()
    audience = Audience(model="kiosk", version=4, definition_hash="cd" * 32, round_s=3600, wanted=DEVICES)
    asking = FleetAggregator(audience, None, None, world.key, clock=clock)
    query = query_of(last_week(datetime.now(UTC)), [3, 4])
    with listening(asking) as port, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(FleetAsk(asking, purpose=FUNNEL, epsilon=None), query)
        assert clock.waited_for.wait(60)
        url = f"http://127.0.0.1:{port}"
        assert reports(world, file, url) == ["uploaded"] * (DEVICES - 1)
        assert [typed(world, tmp_path, url) for _ in range(2)] == ["uploaded", "taken_part"]
        assert reports(world, file, url) == ["taken_part"] * (DEVICES - 1)
        clock.forward(3600)
        told = funnel(answer.result(60), 1)
    assert told.people == DEVICES
    (four,) = told.versions
    came = [estimate and round(estimate.value, 3) for estimate in four.phases.values()]
    assert (four.version, came) == (4, [8, 8, 5, 5, 4, 4])
    stops = {(stopped.phase, stopped.reason): round(stopped.devices.value, 3) for stopped in four.stops}
    assert stops == {(Phase.DOWNLOADED, "not_charging"): 3, (Phase.PLANNED, "in_use"): 1}


def took_part(world: World, file: Path) -> None:
    """One round of a training, in which each device has a session, a week ago by its clock."""
    clock, bundle = ManualClock(), open_bundle(world.bundle, world.trust)
    training, trainer = FleetAggregator(world.task(), UNPAID, None, world.key, clock=clock), Trainer(bundle)
    with listening(training) as port, ThreadPoolExecutor(1) as thread:
        released = thread.submit(training.run_round, 1, world.weights)
        assert clock.waited_for.wait(60)
        with Store.open(file, KEY, world.manifest) as kept:
            for device in range(DEVICES):
                asks = {"host": ScriptedHost(readings(device)), "aggregator": Aggregator(f"http://127.0.0.1:{port}")}
                about = {"bundle": bundle, "trainer": trainer, "own": LAX, "now_ms": lambda: now_ms() - WEEK_MS}
                about |= {"store": kept, "trusted": trusted_key(world.trust), "device": device, **asks}
                asyncio.run(Participation(**about).session())
        clock.forward(3600)
        assert np.any(released.result(60).sum)


def reports(world: World, file: Path, url: str) -> list[str]:
    """Of all devices but the last, nothing known of them but that the person agrees; how they ended."""
    asks = {"host": ScriptedHost([Readings(consent=True)]), "aggregator": Aggregator(url), "spread_s": 0}
    with Store.open(file, KEY) as kept:
        about = {"model": kept.model, "store": kept, "trusted": trusted_key(world.trust), **asks}
        ended = [asyncio.run(Report(device=device, **about).session()) for device in range(DEVICES - 1)]
    return [str(outcome.ending) for outcome in ended]


def typed(world: World, folder: Path, url: str) -> str:
    """How the last device's session ends that `python -m device_runtime report` runs."""
    (folder / "consent").touch()
    files = ["--trust", world.trust, "--store", folder / "devices.store", "--key-file", world.key_file]
    more = ["--consent", folder / "consent", "--aggregator", url, "--devices", f"{DEVICES - 1}:{DEVICES}"]
    words = [sys.executable, "-m", "device_runtime", "report", *files, *more, "--spread-s", "0"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    (session,) = json.loads(done.stdout)["sessions"]
    return session["ending"]


def now_ms() -> int:
    return time.time_ns() // 1_000_000
