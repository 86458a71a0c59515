"""Judges a canary, or a shadow, beside the default, by what gateways and workers count of both.

Both are counted over the same time, by the same processes, so that what ails all versions alike halts none. A gate
fails where what was counted would be a chance of one in a million (`CHANCE`), were the canary just as bad as it may
be: so looking again and again, each second, takes back no good version, and a very bad one goes after a few requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from hybrid.analytics.psi import Noised, psi
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    import httpx

MOST_BYTES = 16 << 20  # of one process's metrics
LAG = "hybrid_worker_lag_records"
OTHERS = frozenset({"ok", "update_required", "rate_limited", "cancelled", "dropped"})  # say nothing against a version


class Metrics(NamedTuple):
    """What is read of each process, each with its third label.

    Attributes:
        requests: by code; of a shadow batches, whose rows fail together.
        seconds: histogram.
        forward: histogram of a batch's networks, in which other versions' batches have no part; of a shadow the same.
        rows: by code.
        fallbacks: by kind; of a shadow there are none.
        predictions: histogram.
    """

    requests: tuple[str, str]
    seconds: tuple[str, str]
    forward: tuple[str, str]
    rows: tuple[str, str]
    fallbacks: tuple[str, str]
    predictions: tuple[str, str]


SERVED = Metrics(
    requests=("hybrid_gateway_requests_total", "code"),
    seconds=("hybrid_gateway_request_seconds_bucket", "le"),
    forward=("hybrid_merge_forward_seconds_bucket", "le"),
    rows=("hybrid_merge_rows_total", "code"),
    fallbacks=("hybrid_fallbacks_total", "kind"),
    predictions=("hybrid_merge_prediction_bucket", "le"),
)
SHADOWED = Metrics(
    requests=("hybrid_shadow_batches_total", "code"),
    seconds=("hybrid_shadow_seconds_bucket", "le"),
    forward=("hybrid_shadow_seconds_bucket", "le"),
    rows=("hybrid_shadow_rows_total", "code"),
    fallbacks=("", ""),
    predictions=("hybrid_shadow_prediction_bucket", "le"),
)
LABELS = dict([*SERVED, *SHADOWED])
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
        slower: times the default's 95th percentile of seconds; at most one request in twenty may take longer, nor more
            batches in the networks.
        drift: population stability index of its predictions against the default's, at most.
        auc: by how much its AUC may be lower, as `hybrid evaluate` found both to be.
        inversion: how much more often than by guessing an attacker may recover a device feature from what a device
            releases, as `hybrid audit inversion` found; None: it is not asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    least: Annotated[int, Field(ge=1)] = 500
    errors: Share = 0.01
    fallbacks: Share = 0.02
    slower: Annotated[FiniteFloat, Field(ge=1)] = 2.0
    drift: Annotated[FiniteFloat, Field(gt=0)] = 0.25
    auc: Share = 0.01
    inversion: Share | None = None


@dataclass(frozen=True)
class Verdict:
    """What one gate says.

    Attributes:
        gate: a field of `Gates`, or "budget", or "metrics".
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
        forward: the same of batches.
        predictions: the same of predictions.
    """

    requests: int = 0
    failed: int = 0
    rows: int = 0
    fallen: int = 0
    seconds: Mapping[float, float] = field(default_factory=dict)
    forward: Mapping[float, float] = field(default_factory=dict)
    predictions: Mapping[float, float] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Mapping[Sample, float], version: int, metrics: Metrics = SERVED) -> Counted:
        """Of what `grown` gives."""
        ours = {(name, label): n for (name, each, label), n in counts.items() if each == str(version)}

        def total(metric: tuple[str, str], without: frozenset[str] = frozenset()) -> int:
            return round(sum(n for (each, label), n in ours.items() if each == metric[0] and label not in without))

        def buckets(metric: tuple[str, str]) -> dict[float, float]:
            return {float(label): n for (each, label), n in sorted(ours.items()) if each == metric[0]}

        failed = total(metrics.requests, OTHERS)
        return cls(
            requests=failed + round(ours.get((metrics.requests[0], "ok"), 0)),
            failed=failed,
            rows=total(metrics.rows),
            fallen=total(metrics.fallbacks),
            seconds=buckets(metrics.seconds),
            forward=buckets(metrics.forward),
            predictions=buckets(metrics.predictions),
        )


def fetched(client: httpx.Client, url: str) -> str:
    """A process's metrics, as Prometheus reads them.

    Args:
        client: with a time limit.
        url: of them.

    Raises:
        httpx.HTTPError, httpx.InvalidURL: it does not answer, or with an error.
        ConfigError: they have more than `MOST_BYTES`.
    """
    text = bytearray()
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        for part in answer.iter_bytes():
            text += part
            if len(text) > MOST_BYTES:
                raise ConfigError(f"its metrics have more than {MOST_BYTES} bytes")
    return text.decode("utf-8", "replace")


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


def judge_shadow(gates: Gates, shadow: Counted, default: Counted) -> list[Verdict]:
    """The same of what ran beside the default, which answers nobody: of batches, and of seconds of a forward pass."""
    failed = (shadow.failed, shadow.requests), (default.failed, default.requests)
    return [
        _share("errors", "batches that failed", gates, *failed),
        _slower(gates, shadow, default),
        _drift(gates, shadow, default),
    ]


def judge_pair(served: Iterable[Verdict], shadowed: Iterable[Verdict]) -> list[Verdict]:
    """Of a shadow that devices compute too: what they were answered is judged, and batches may only speak against it.

    Args:
        served: of `judge`: by what devices asked of both.
        shadowed: of `judge_shadow`: by batches of the worker.
    """
    worse = {one.gate: one for one in shadowed if one.outcome == "fails"}
    return [worse.get(one.gate, one) for one in served]


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


def judge_inversion(most: float, audit: Mapping[str, Any] | None) -> Verdict:
    """By the latest audit of the version, at the noise that it declares: oracle, of a simulation.

    Args:
        most: see `Gates.inversion`.
        audit: as `hybrid audit inversion --json` has it; None: there is none.
    """
    levels = () if audit is None else audit["levels"]
    gains = [found["gain"] for level in levels if level["declared"] for found in level["features"].values()]
    if not gains:
        return Verdict("inversion", "waits", "no audit of it at the noise it declares: `hybrid audit inversion`")
    low, high = (max(gain[end] for gain in gains) for end in ("low", "high"))
    said = f"a feature is recovered more often than by guessing by {low:+.3f} to {high:+.3f}; {most:g} is allowed"
    outcome: Outcome = "fails" if low > most else "passes" if high <= most else "waits"
    return Verdict("inversion", outcome, said)


def judge_budget(spent: float | None, budget: float | None) -> Verdict:
    """By the ledger of the run that trained the version.

    Args:
        spent: epsilon, of all that the ledger holds; None: the version was trained without a mechanism, or its ledger
            is missing.
        budget: that it has; None likewise.
    """
    if spent is None or budget is None:
        return Verdict("budget", "waits", "no ledger says what its training spent: a reference, or a ledger is missing")
    said = f"its run spent epsilon {spent:.3f} of {budget:g}"
    return Verdict("budget", "fails" if spent > budget else "passes", said)


def _share(name: str, what: str, gates: Gates, canary: tuple[int, int], default: tuple[int, int]) -> Verdict:
    (bad, of), (usual, of_default), most = canary, default, getattr(gates, name)
    ours, theirs = bad / max(of, 1), usual / max(of_default, 1)
    said = f"{what}: {ours:.2%} of {of:,}, of the default's {theirs:.2%} of {of_default:,}; {most:.2%} more are allowed"
    if is_more(bad, of, theirs + most):
        return Verdict(name, "fails", said)
    return Verdict(name, "passes" if of >= gates.least else "waits", said)


def _slower(gates: Gates, canary: Counted, default: Counted) -> Verdict:
    """By requests, which is what people notice; and by batches: a slow version's hold up the default's requests too."""
    requests = _later(gates, "requests", canary.seconds, default.seconds)
    batches = _later(gates, "batches", canary.forward, default.forward)
    return batches if batches.outcome == "fails" else requests


def _later(gates: Gates, what: str, canary: Mapping[float, float], default: Mapping[float, float]) -> Verdict:
    timed, others = (round(seconds.get(math.inf, 0.0)) for seconds in (canary, default))
    if min(timed, others) < gates.least:
        return Verdict("slower", "waits", f"seconds: of {timed:,} and {others:,} {what}, {gates.least:,} are needed")
    bound = max(UNNOTICED_S, gates.slower * quantile(default, 1 - SLOW))
    edge = min((edge for edge in canary if edge >= bound), default=math.inf)
    slow = timed - round(canary.get(edge, timed))
    said = f"{what} that took longer than {edge:g} s: {slow / timed:.2%} of {timed:,}; {SLOW:.0%} are allowed"
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
