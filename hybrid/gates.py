"""Judges a canary beside the default, by what gateways and workers count of both.

Both are counted over the same time, by the same processes, so that what ails all versions alike halts none. A gate
fails where what was counted would be a chance of one in a million (`CHANCE`), were the canary just as bad as it may
be: so looking again and again, each second, takes back no good version, and a very bad one goes after a few requests.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from hybrid.analytics.psi import Noised, psi
from hybrid.errors import ConfigError

REQUESTS, SECONDS = "hybrid_gateway_requests_total", "hybrid_gateway_request_seconds_bucket"
ROWS, FALLBACKS = "hybrid_merge_rows_total", "hybrid_fallbacks_total"
PREDICTIONS, LAG = "hybrid_merge_prediction_bucket", "hybrid_worker_lag_records"
LABELS = {REQUESTS: "code", SECONDS: "le", ROWS: "code", FALLBACKS: "kind", PREDICTIONS: "le"}
OTHERS = frozenset({"ok", "update_required", "rate_limited", "cancelled"})  # codes that say nothing against a version
CHANCE = 1e-6
SLOW = 0.05  # of requests are slower than the 95th percentile
UNNOTICED_S = 0.05  # below this nobody minds how long a request takes

Outcome = Literal["passes", "fails", "waits"]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Sample = tuple[str, str, str]  # metric, version, and its third label


class Gates(BaseModel):
    """How much worse than the default a canary may be, before it is taken back.

    Attributes:
        least: requests, and rows, of either that are counted before anything passes.
        errors: by how much its share of requests without an answer may be larger.
        fallbacks: by how much its share of rows that a fallback answered may be larger.
        slower: times the default's 95th percentile of seconds; at most one request in twenty may take longer.
        drift: population stability index of its predictions against the default's, at most.
        auc: by how much its AUC may be lower, as `hybrid evaluate` found both to be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    least: Annotated[int, Field(ge=1)] = 500
    errors: Share = 0.01
    fallbacks: Share = 0.02
    slower: Annotated[FiniteFloat, Field(ge=1)] = 2.0
    drift: Annotated[FiniteFloat, Field(gt=0)] = 0.25
    auc: Share = 0.01


@dataclass(frozen=True)
class Verdict:
    """What one gate says.

    Attributes:
        gate: a field of `Gates`.
        outcome: "waits": too little is counted to say.
        said: in words, with the numbers.
    """

    gate: str
    outcome: Outcome
    said: str


@dataclass(frozen=True)
class Counted:
    """What was counted of one version.

    Attributes:
        requests, failed: at the gateway; those that say nothing against a version are in neither.
        rows, fallen: that were merged, and of these those that a fallback answered.
        seconds: upper end of a bucket -> requests that took at most so long.
        predictions: the same of predictions.
    """

    requests: int = 0
    failed: int = 0
    rows: int = 0
    fallen: int = 0
    seconds: Mapping[float, float] = field(default_factory=dict)
    predictions: Mapping[float, float] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Mapping[Sample, float], version: int) -> Counted:
        """Of what `grown` gives."""
        ours = {(name, label): n for (name, each, label), n in counts.items() if each == str(version)}

        def total(name: str, without: frozenset[str] = frozenset()) -> int:
            return round(sum(n for (each, label), n in ours.items() if each == name and label not in without))

        def buckets(name: str) -> dict[float, float]:
            return {float(label): n for (each, label), n in sorted(ours.items()) if each == name}

        failed = total(REQUESTS, OTHERS)
        return cls(
            requests=failed + round(ours.get((REQUESTS, "ok"), 0)),
            failed=failed,
            rows=total(ROWS),
            fallen=total(FALLBACKS),
            seconds=buckets(SECONDS),
            predictions=buckets(PREDICTIONS),
        )


def read(text: str, model: str) -> dict[Sample, float]:
    """What the gates need of one process's metrics.

    Args:
        text: as Prometheus reads it.
        model: whose.

    Raises:
        ConfigError: it is not such a text.
    """
    return read_all(text)[0].get(model, {})


def read_all(text: str) -> tuple[dict[str, dict[Sample, float]], float | None]:
    """The same of every model; and how many records a worker has not polled yet, None where it is no worker's.

    Raises:
        ConfigError: it is not such a text.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[Sample, float]] = {}
    lag = None
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == LAG:
                    lag = sample.value
                elif sample.name in LABELS:
                    labels = sample.labels
                    key = (sample.name, labels["version"], labels[LABELS[sample.name]])
                    found.setdefault(labels["model"], {})[key] = sample.value
        return found, lag
    except (ValueError, KeyError):
        raise ConfigError("metrics must be in Prometheus' text format, as gateway and worker show them") from None


def grown(before: Iterable[Mapping[Sample, float]], after: Iterable[Mapping[Sample, float]]) -> Counter[Sample]:
    """What all processes counted between two looks; one that was started anew began at 0."""
    total: Counter[Sample] = Counter()
    for old, new in zip(before, after, strict=True):
        began = {} if any(new.get(sample, 0.0) < count for sample, count in old.items()) else old
        for sample, count in new.items():
            total[sample] += count - began.get(sample, 0.0)  # type: ignore[assignment]
    return total


def judge(gates: Gates, canary: Counted, default: Counted) -> list[Verdict]:
    """What each gate says of what was served; in the order of `Gates`."""
    return [
        _share(
            "errors",
            "requests without an answer",
            gates,
            (canary.failed, canary.requests),
            (default.failed, default.requests),
        ),
        _share(
            "fallbacks",
            "rows answered by a fallback",
            gates,
            (canary.fallen, canary.rows),
            (default.fallen, default.rows),
        ),
        _slower(gates, canary, default),
        _drift(gates, canary, default),
    ]


def judge_auc(gates: Gates, difference: Mapping[str, list[float] | None] | None) -> Verdict:
    """By the latest comparison of the two on people's devices: `hybrid evaluate MODEL@canary --against production`.

    Args:
        gates: what is allowed.
        difference: of AUC, canary less default, as `hybrid evaluate --json` has it; None: there is no comparison.
    """
    ends = None if difference is None else difference["full"] or difference["noise"]
    if ends is None or ends[0] is None or ends[1] is None:
        return Verdict("auc", "waits", "no comparison on people's devices: `hybrid evaluate` --against makes one")
    low, high = ends
    said = f"AUC of the canary less the default's: {low:+.4f} to {high:+.4f}, lowest allowed {-gates.auc:+.4f}"
    if high < -gates.auc:
        return Verdict("auc", "fails", said)
    return Verdict("auc", "passes" if low >= -gates.auc else "waits", said)


def _share(name: str, what: str, gates: Gates, canary: tuple[int, int], default: tuple[int, int]) -> Verdict:
    (bad, of), (usual, of_default), most = canary, default, getattr(gates, name)
    ours, theirs = bad / max(of, 1), usual / max(of_default, 1)
    said = f"{what}: {ours:.2%} of {of:,}, of the default's {theirs:.2%} of {of_default:,}; {most:.2%} more are allowed"
    if is_more(bad, of, theirs + most):
        return Verdict(name, "fails", said)
    return Verdict(name, "passes" if of >= gates.least else "waits", said)


def _slower(gates: Gates, canary: Counted, default: Counted) -> Verdict:
    if min(canary.requests, default.requests) < gates.least:
        counted = f"{canary.requests:,} and {default.requests:,}"
        return Verdict("slower", "waits", f"seconds: of {counted} requests of either, {gates.least:,} are needed")
    bound = max(UNNOTICED_S, gates.slower * quantile(default.seconds, 1 - SLOW))
    edge = min((edge for edge in canary.seconds if edge >= bound), default=math.inf)
    timed = round(canary.seconds.get(math.inf, 0.0))
    slow = timed - round(canary.seconds.get(edge, timed))
    said = f"requests that took longer than {edge:g} s: {slow / max(timed, 1):.2%} of {timed:,}; {SLOW:.0%} are allowed"
    return Verdict("slower", "fails" if is_more(slow, timed, SLOW) else "passes", said)


def _drift(gates: Gates, canary: Counted, default: Counted) -> Verdict:
    ours, theirs = _cells(canary.predictions), _cells(default.predictions)
    if min(ours.sum(), theirs.sum()) < gates.least:
        counted = f"{ours.sum():,.0f} and {theirs.sum():,.0f}"
        return Verdict("drift", "waits", f"predictions: of {counted} of either, {gates.least:,} are needed")
    found = psi(Noised(theirs, 0.0), Noised(ours, 0.0))
    ends = f"{found.low:.3f} to {'-' if found.high is None else format(found.high, '.3f')}"
    said = f"predictions against the default's: index {ends}; {gates.drift:g} is allowed"
    return Verdict("drift", "fails" if found.low > gates.drift else "passes", said)


def quantile(buckets: Mapping[float, float], level: float) -> float:
    """The upper end of the bucket that it is in; of none, infinity."""
    wanted = level * buckets.get(math.inf, 0.0)
    return next((edge for edge, count in sorted(buckets.items()) if count >= wanted), math.inf)


def _cells(buckets: Mapping[float, float]) -> NDArray[np.float64]:
    """(k,) counts of buckets, of sums up to their ends."""
    counts = [count for _, count in sorted(buckets.items())]
    return np.diff(np.array(counts, np.float64), prepend=0.0) if counts else np.zeros(1)


def is_more(bad: int, of: int, share: float) -> bool:
    """Whether so many, of a share that is at most this one, are a chance of less than `CHANCE`.

    >>> is_more(3, 3, 0.01), is_more(4, 4, 0.01)
    (False, True)
    """
    from scipy.stats import binom

    return bool(bad > 0 and binom.sf(bad - 1, of, min(share, 1.0)) < CHANCE)


def seconds_of(text: str) -> float:
    """A time as people write it.

    Raises:
        ConfigError: it is none.

    >>> [seconds_of(text) for text in ("90", "30s", "10m", "1.5h")]
    [90.0, 30.0, 600.0, 5400.0]
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or not float(found[1]):
        raise ConfigError(f"a time must be a number above 0 with s, m or h, such as 10m, got {text!r}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
