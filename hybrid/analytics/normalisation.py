"""Constants of device features, learned under the ledger: means and standard deviations, and vocabularies.

One question for all features of a model that declare it, in phases that cost a given epsilon together. What is made of
the noised sums is post-processing, and always usable: noise alone gives the middle of a feature's bounds and a wide
standard deviation, never a negative variance.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from hybrid.analytics import vocabulary
from hybrid.analytics.asking import NORMALISE, Answer, Ask, People, Simulated
from hybrid.analytics.results import describe
from hybrid.errors import ConfigError
from hybrid.features import AnyTransform, Categorical, Log1p, Numeric, as_text
from hybrid.files import write_whole
from hybrid.privacy.accountant import epsilon as composed
from hybrid.privacy.ledger import Ledger, costs
from hybrid.query import Floats, Histogram, Moments, Query
from hybrid.spec import HybridModel
from hybrid.version import Learned

FILE = "learned.json"
"""Of a run: what it learned, and of what. It is written before anything else is made of it."""
BINS = 32  # between a feature's bounds, in which its bulk is found
BULK_SHARE = 0.3  # of the epsilon for numbers, for that
OUTSIDE = 0.01  # chance that a bin without rows widens any feature's bulk
LEAST_SD = 1e-3  # of the width of the bulk
Bounds = dict[str, tuple[float, float]]


def learn(ask: Ask, transforms: Mapping[str, AnyTransform], *, rows: int) -> dict[str, AnyTransform]:
    """Asks for the constants of all features at once.

    Numbers are asked twice: where the bulk of each lies between its bounds, by a histogram, and then count, sum and
    sum of squares within the bulk, on the scale that is normalised; what lies outside counts as its end. Each text
    feature is asked as `hybrid.analytics.vocabulary.discover` does.

    Args:
        ask: whom; nothing has been begun.
        transforms: of features that are `pending`; at least one.
        rows: of a person, the last ones, that count at most for numbers; >= 1. For texts it is the last one.

    Returns:
        By feature, its transform with what was learned.

    Raises:
        BudgetExceeded: the ledger has not enough left. Nothing was asked.
    """
    numbers = {name: each for name, each in transforms.items() if isinstance(each, Numeric)}
    texts = {name: each for name, each in transforms.items() if isinstance(each, Categorical)}
    share = 1.0 / (bool(numbers) + len(texts))  # of the numbers together, and of each text
    bulk, moments = BULK_SHARE * share, (1 - BULK_SHARE) * share
    ask.begin([*([bulk, moments] if numbers else []), *(part for _ in texts for part in vocabulary.phases(share))])
    found: dict[str, AnyTransform] = {}
    if numbers:
        histograms = tuple(Histogram(column=name, edges=_edges(each)) for name, each in numbers.items())
        bounds = _bulks(numbers, ask(Query(parts=histograms, rows=rows), share=bulk))
        parts = tuple(_moments(name, each, bounds[name]) for name, each in numbers.items())
        answer = ask(Query(parts=parts, rows=rows), share=moments)
        for (name, each), part, sums in zip(numbers.items(), parts, answer.total.reshape(-1, 3), strict=True):
            found[name] = each.learned(*_on_scale(part.range, *mean_and_sd(sums, answer.sd)))
    for name, text in texts.items():
        assert text.discover is not None
        frequent = vocabulary.discover(ask, name, text.discover, share=share)
        found[name] = text.learned([each.text for each in frequent])
    return {name: found[name] for name in transforms}


def mean_and_sd(sums: Floats, noise: float) -> tuple[float, float]:
    """Of numbers in [0, 1], from noised sums of 1, x and x^2.

    As many rows as the noise has standard deviations are added that are spread evenly over [0, 1]: where people
    are many they count for nothing, where noise is all there is they are what is left. The standard deviation is no
    less than what the noise could hide, and at most 1/2, the most that there can be.

    Args:
        sums: (3,).
        noise: standard deviation of each; >= 0.

    >>> mean_and_sd(np.array([100.0, 50.0, 50.0]), 0.0)
    (0.5, 0.5)
    """
    rows = max(float(sums[0]), 0.0) + noise
    if rows <= 0:
        return 0.5, 0.5
    mean = min(max((float(sums[1]) + noise / 2) / rows, 0.0), 1.0)
    square = min(max((float(sums[2]) + noise / 3) / rows, 0.0), 1.0)
    hidden = noise / rows * math.sqrt(1 + 4 * mean**2 + (2 * mean**2 - square) ** 2)  # sd of the variance's noise
    variance = max(square - mean**2, hidden, LEAST_SD**2)
    return mean, math.sqrt(min(variance, 0.25))


def exact(transforms: Mapping[str, AnyTransform], people: People) -> dict[str, AnyTransform]:
    """The same constants from pooled rows, all of them and without noise: a reference, as only a simulation can be.

    Args:
        transforms: of features that are `pending`.
        people: whose rows.
    """
    return {name: _exact(each, people.columns[name]) for name, each in transforms.items()}


def learned(
    model: HybridModel,
    people: People,
    run_dir: Path,
    *,
    budget: float | None,
    share: float,
    rows: int,
    seed: int | None,
    resume: bool = False,
) -> Learned | None:
    """What a training in a run is to use: learned now and paid from the run's ledger, or kept in the run before.

    It is on the disk before it is used: a process that is killed after that goes on with the same constants, and
    one that is killed between the spend and the disk has paid for an answer that nobody saw; the next asks anew.

    Args:
        model: whose constants.
        people: who are trained on.
        run_dir: of the run.
        budget: of the run's ledger, in epsilon; None: exact constants, for references without privacy.
        share: of the budget that this may cost.
        rows: of a person that count at most.
        seed: of the noise; None: the operating system's.
        resume: whether a training goes on, which has its constants.

    Returns:
        None where the model declares all its constants.

    Raises:
        BudgetExceeded: the ledger has not enough left.
        ConfigError: what the run keeps is damaged, or gone.
    """
    pending = {name: model.device[name] for name in model.device_features.pending}
    if not pending:
        return None
    if budget is None:
        return Learned(transforms=exact(pending, people), users=len(people), run=run_dir.name)
    of = _digest(pending, people, rows)
    before = _kept(run_dir, of)
    if before is not None:
        return before
    if resume:
        raise ConfigError(f"the constants that run {run_dir.name!r} learned ({FILE}) are gone: start another run")
    with Ledger.open(run_dir, budget_epsilon=budget, delta=model.privacy.delta) as ledger:
        describe(run_dir, model.name, NORMALISE, seed=seed)  # a training that never begins has spent all the same
        paid = len(ledger.entries)
        ask = Simulated(people, ledger, purpose=NORMALISE, epsilon=share * budget, seed=seed)
        transforms = learn(ask, pending, rows=rows)
        spent = composed(costs(ledger.entries[paid:]), ledger.delta).epsilon
        about = {"epsilon": spent, "delta": ledger.delta, "rows": rows}
        found = Learned(transforms=transforms, users=len(people), run=run_dir.name, **about)
        kept = {"of": of, "learned": found.model_dump(mode="json")}
        write_whole(run_dir / FILE, json.dumps(kept, indent=2).encode())
    return found


def _edges(transform: Numeric) -> tuple[float, ...]:
    """(BINS + 1,) even on the scale, in the feature's own unit."""
    low, high = _scaled_bounds(transform)
    even = np.linspace(low, high, BINS + 1)
    return tuple((np.expm1(even) if isinstance(transform, Log1p) else even).tolist())


def _bulks(numbers: Mapping[str, Numeric], answer: Answer) -> Bounds:
    """Of each feature, the ends of the bins that rows are in, in its own unit; its bounds where none stands out.

    One bin more on either side, for what lies close to an edge.
    """
    threshold = NormalDist().inv_cdf(1 - OUTSIDE / len(answer.total)) * answer.sd
    found = {}
    for (name, transform), counts in zip(numbers.items(), answer.total.reshape(len(numbers), -1), strict=True):
        edges = _edges(transform)
        between = counts[1 : BINS + 1].copy()
        between[0] += counts[0]
        between[-1] += counts[BINS + 1]
        held = np.flatnonzero(between > threshold)
        first, last = (held[0], held[-1]) if len(held) else (0, BINS - 1)
        found[name] = (edges[max(first - 1, 0)], edges[min(last + 2, BINS)])
    return found


def _moments(name: str, transform: Numeric, bounds: tuple[float, float]) -> Moments:
    scale = {"scale": "log1p"} if isinstance(transform, Log1p) else {}
    return Moments(column=name, low=bounds[0], high=bounds[1], **scale)


def _on_scale(bounds: tuple[float, float], mean: float, sd: float) -> tuple[float, float]:
    low, high = bounds
    return low + mean * (high - low), sd * (high - low)


def _scaled_bounds(transform: Numeric) -> tuple[float, float]:
    assert transform.low is not None
    assert transform.high is not None
    return transform.scaled(transform.low), transform.scaled(transform.high)


def _exact(transform: AnyTransform, column: object) -> AnyTransform:
    if isinstance(transform, Categorical):
        assert transform.discover is not None
        texts = [text for text in as_text(column) if text is not None]  # type: ignore[arg-type]
        names, counts = np.unique(np.array(texts, dtype=np.str_), return_counts=True)
        return transform.learned(names[np.argsort(-counts, kind="stable")][: transform.discover].tolist())
    assert isinstance(transform, Numeric)
    low, high = _scaled_bounds(transform)
    values = transform.scale(transform.inputs(column)).astype(np.float64)  # type: ignore[arg-type]
    x = (np.clip(values[np.isfinite(values)], low, high) - low) / (high - low)
    sums = np.array([len(x), x.sum(), (x * x).sum()])
    return transform.learned(*_on_scale((low, high), *mean_and_sd(sums, 0.0)))


def _digest(pending: Mapping[str, AnyTransform], people: People, rows: int) -> str:
    """Of all that the constants are learned from."""
    said = {name: each.model_dump(mode="json") for name, each in pending.items()}
    found = hashlib.sha256(json.dumps([said, rows], sort_keys=True).encode())
    found.update(np.ascontiguousarray(people.offsets, np.int64).tobytes())
    for name in sorted(pending):
        found.update(_bytes(np.asarray(people.columns[name])))
    return found.hexdigest()


def _bytes(column: NDArray[np.generic]) -> bytes:
    if column.dtype == object:
        return json.dumps([None if value is None else str(value) for value in column]).encode()
    return column.tobytes()


def _kept(run_dir: Path, of: str) -> Learned | None:
    """What the run learned of the same people for the same features.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        kept = json.loads((run_dir / FILE).read_bytes())
        found = Learned.model_validate(kept["learned"])
        return found if kept["of"] == of else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, ValidationError):
        raise ConfigError(f"{FILE} of run {run_dir.name!r} is damaged: start another run") from None
