"""How long a fleet with a heavy tail trains until the model is good: asynchronously, and by rounds.

The study coach's students (OULAD), one device each, at epsilon 8. By rounds: devices toss coins, which amplifies, and a
round closes after its deadline, the next begins at once. Asynchronously: no sampling is claimed, and K updates make
a flush. Of either several ways are tried, deadlines or K, and steps, and for each seed the one counts that suited it
best. Either way a thousand devices are at work at once. Time is the fleet's, simulated; good is `TARGET` below what
training on pooled data reaches, by the mean of three points of the curve in a row.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.accuracy import Split, prepare_oulad
from hybrid.federation.fleet import Trace, Work, finishing
from hybrid.federation.training import OnFleet, Trained, train
from hybrid.spec import Training

TRACE = Path(__file__).with_name("heavy_tail.toml")
EPSILON, TARGET = 8.0, 0.01
AT_ONCE, STALENESS = 1000, 6
FLUSHES: tuple[dict[str, Any], ...] = (
    {"buffer": 300, "rounds": 100, "server_lr": 1.5},
    {"buffer": 400, "rounds": 60, "server_lr": 2.0},
    {"buffer": 400, "rounds": 75, "server_lr": 1.5},
)
COMING = 0.45  # share of the students who come between two participations of one
EXAMPLES = 5.4  # of a student, as the over-selection assumes
DEADLINES_S = (20.0, 30.0, 45.0, 60.0)
STEPS = ({"rounds": 200, "server_lr": 0.01}, {"rounds": 100, "server_lr": 0.02})  # of Adam, the example's optimiser


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: of its row.
        changes: of how the model declares its training.
        deadline_s: of a round, or of a device.
    """

    name: str
    changes: dict[str, Any]
    deadline_s: float


def measured(seeds: int, bar: Progress) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows, one a way to train, means over seeds; and figures."""
    task = bar.add_task("asynchronous: preparing", total=1)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        split, _, _ = prepare_oulad(None, folder / "oulad")
        users = split.train.users
        asynchronous = [_flushes(users, step) for step in FLUSHES]
        ways = [*asynchronous, *(_rounds(users, deadline, step) for deadline in DEADLINES_S for step in STEPS)]
        bar.update(task, total=seeds * (1 + len(ways)))
        hours: dict[str, list[float]] = {way.name: [] for way in ways}
        for seed in range(seeds):
            bar.update(task, description=f"asynchronous: seed {seed}, central")
            central = train(
                split.model, split.train, split.test, kind="central", seed=seed, run_dir=folder / f"c{seed}"
            )
            target = central.record.oracle["auc"] - TARGET
            bar.advance(task)
            for way in ways:
                bar.update(task, description=f"asynchronous: seed {seed}, {way.name}")
                hours[way.name].append(_hours(split, way, seed, folder / f"{seed} {way.name}", target))
                bar.advance(task)
    every = list(hours.values())
    fast, slow = (
        [min(times) for times in zip(*part, strict=True)] for part in (every[: len(FLUSHES)], every[len(FLUSHES) :])
    )
    rows = [{"trained": name, "hours to target, by seed": _shown(times)} for name, times in hours.items()]
    return rows, {
        "async_hours": statistics.median(fast),
        "sync_hours": statistics.median(slow),
        "async_speedup": statistics.median(other / one for one, other in zip(fast, slow, strict=True)),
    }


def _rounds(users: int, deadline_s: float, step: dict[str, float]) -> Way:
    """As many are to answer as do of `AT_ONCE` that are asked and there."""
    trace = Trace.load(TRACE)
    work = Work(steps=1, download_bytes=0, upload_bytes=0, deadline_s=deadline_s)
    answer = finishing(trace, rounds=[1], work=work, examples=EXAMPLES) / trace.available_share(trace.start_s(1))[0]
    sampling = AT_ONCE * float(answer[0]) / users
    return Way(f"rounds of {deadline_s:g} s, Adam {step['server_lr']}", {"sampling": sampling, **step}, deadline_s)


def _flushes(users: int, step: dict[str, Any]) -> Way:
    separation = math.floor(COMING * users / step["buffer"]) - STALENESS
    changes = {"separation": separation, "max_staleness": STALENESS, "noise": "banded", "server_optimizer": "SGD"}
    return Way(f"{step['rounds']} flushes of {step['buffer']}, SGD {step['server_lr']}", {**step, **changes}, 2000.0)


def _hours(split: Split, way: Way, seed: int, run: Path, target: float) -> float:
    """Of the fleet's time, until the model first is as good; infinite where it never is."""
    settings = Training(**split.model.training.model_dump() | {"average_last": 0.0} | way.changes)
    fleet = OnFleet(Trace.load(TRACE), way.deadline_s, EXAMPLES, AT_ONCE if settings.buffer else None)
    trained = train(
        split.model, split.train, split.test, epsilon=EPSILON, seed=seed, run_dir=run, settings=settings, fleet=fleet
    )
    if settings.buffer is None:
        ends = [way.deadline_s * number for number in range(settings.rounds + 1)]
    else:
        ends = [0.0, *json.loads((run / "fleet.json").read_text())["oracle"]["time_s"]]
    return _first(trained, ends, target) / 3600


def _first(trained: Trained, ends: Sequence[float], target: float) -> float:
    points = trained.curves["oracle_auc"]
    for three in zip(points, points[1:], points[2:], strict=False):
        if statistics.mean(value for _, value in three) >= target:
            return ends[three[-1][0]]
    return math.inf


def _shown(times: Sequence[float]) -> str:
    return ", ".join(f"{hours:.3f}" for hours in times)
