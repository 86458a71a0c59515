"""Where devices drop out, version by version: noised counts of how far they came last week, and why no further.

Each device tells one row of its journal (`hybrid.journal`), of its newest version. How many came to a phase is a sum of
neighbouring cells, so the phases travel encoded (`hybrid.query.Part.cumulative`), the last one first; where and why
devices stopped is counted beside it. Both are one Gaussian release; what is left out of it below a threshold is
post-processing, for readers, not for privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid.analytics.asking import Answer
from hybrid.analytics.estimates import Estimate
from hybrid.journal import LEFT, STOPPED, STOPS, VERSION, Phase, stop
from hybrid.query import By, Categories, Floats, Histogram, Query

NOISES = 3.0  # standard deviations of the noise below which no number is shown
MOST_VERSIONS = 16  # that are asked about: a report holds as many numbers for each
PHASES = Histogram(column=LEFT, edges=tuple(phase.left - 0.5 for phase in reversed(Phase))[1:], cumulative=True)
PLACES = tuple((phase, reason) for phase, reasons in STOPS.items() for reason in reasons)


@dataclass(frozen=True)
class Stop:
    """Devices that came to a phase, and no further.

    Attributes:
        phase: which.
        reason: why, see `hybrid.journal.STOPS`.
        devices: how many; noised.
    """

    phase: Phase
    reason: str
    devices: Estimate


@dataclass(frozen=True)
class OfVersion:
    """How far the devices of one version came.

    Attributes:
        version: whose newest it was that week.
        phases: how many came to each, all in order; noised. None: fewer than the threshold.
        stops: where and why they stopped, the most first; those with the threshold at least.
    """

    version: int
    phases: dict[Phase, Estimate | None]
    stops: tuple[Stop, ...]

    @property
    def devices(self) -> Estimate:
        """How many there are."""
        found = self.phases[Phase.CHECKED]
        assert found is not None  # else the version is not shown
        return found


@dataclass(frozen=True)
class Funnel:
    """What a week's journals said.

    Attributes:
        people: how many devices answered; public.
        threshold: devices below which nothing is shown.
        versions: those with as many devices, ascending.
    """

    people: int
    threshold: float
    versions: tuple[OfVersion, ...]


def query_of(week: str, versions: Sequence[int]) -> Query:
    """What every device is asked.

    Args:
        week: which journals, as `hybrid.week` has it.
        versions: that are counted; a device of another adds nothing. At least one.
    """
    values = tuple(stop(phase, reason) for phase, reason in PLACES)
    by = By(column=VERSION, values=tuple(map(str, versions)))
    return Query(parts=(PHASES, Categories(column=STOPPED, values=values)), by=by, week=week)


def funnel(answer: Answer, least: int) -> Funnel:
    """What an answer says, without what is too small to be told from noise, or to be told at all.

    Args:
        answer: to `query_of`.
        least: devices below which nothing is shown, whatever the noise.
    """
    query = answer.query
    assert query.by is not None
    weights = _weights(answer.counts.shape[1])
    gradients = np.zeros((len(weights), query.groups, weights.shape[1]))
    gradients[:, 0] = weights  # the noise is every version's alike
    noise = answer.noise_sd(gradients.reshape(len(weights), -1))
    threshold = max(float(least), NOISES * float(noise.max()))
    found = []
    for version, counts in zip(query.by.values, answer.counts, strict=True):
        sums = zip(weights @ counts, noise, strict=True)
        told = [
            # Around what there can be at most: an interval beyond it would be cut to nothing.
            Estimate.of(min(float(value), answer.people), float(sd)).within(0.0, answer.people)
            if value >= threshold
            else None
            for value, sd in sums
        ]
        if told[0] is not None:  # the first phase: all of the version's devices
            found.append(_of(int(version), told))
    return Funnel(answer.people, threshold, tuple(sorted(found, key=lambda each: each.version)))


def _weights(size: int) -> Floats:
    """(phases + places, size) which of a version's cells are summed for each number: a row a phase, then a place."""
    weights = np.zeros((len(Phase) + len(PLACES), size))
    for row, phase in enumerate(Phase):
        weights[row, : phase.left + 1] = 1.0
    places = np.arange(len(PLACES))
    weights[len(Phase) + places, PHASES.size + places] = 1.0
    return weights


def _of(version: int, told: Sequence[Estimate | None]) -> OfVersion:
    phases = dict(zip(Phase, told, strict=False))
    places = zip(PLACES, told[len(Phase) :], strict=True)
    stops = [Stop(phase, reason, devices) for (phase, reason), devices in places if devices is not None]
    return OfVersion(version, phases, tuple(sorted(stops, key=lambda each: -each.devices.value)))


def latest(numbers: Iterable[int]) -> tuple[int, ...]:
    """The newest versions, as many as are asked about, ascending."""
    return tuple(sorted(numbers)[-MOST_VERSIONS:])


def folder_of(runs: Path, model: str, week: str) -> Path:
    """Of what a week's journals said, and the ledger that paid."""
    return runs / f"{model}-funnel-{week}"
