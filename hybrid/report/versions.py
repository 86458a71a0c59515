"""Sections about versions: what they are, how they learned, how good they are, which of two is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from hybrid.analytics.results import Result
from hybrid.report.charts import Axis, Series, differences, plot, range_of
from hybrid.report.elements import (
    NONE,
    Children,
    badge,
    details,
    e,
    estimate,
    figure,
    marked,
    missing,
    name,
    number,
    table,
)
from hybrid.report.facts import Facts
from hybrid.report.people import INTERVALS, paid
from hybrid.version import TrainingRecord

METRICS = {
    "auc": "AUC",
    "log_loss": "log-loss",
    "normalised_entropy": "norm. entropy",
    "calibration": "calibration",
    "mean_prediction": "mean prediction",
    "mean_label": "mean label",
    "precision": "precision",
    "recall": "recall",
}
CURVES = {"oracle_auc": "AUC", "oracle_log_loss": "log-loss"}
MOST_POINTS = 40  # of a curve's table
NO_INTERVAL = (
    "Exact on the people that training held out, so without an interval of noise; for others nothing is known."
)
SHARES = Axis("", 0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0), "{:g}".format)


def overview(facts: Facts) -> Iterator[Element]:
    """Every version with its record."""
    if not facts.trainings:
        yield missing("Nothing was trained yet.", f"hybrid train {facts.model} --epsilon 4 --fold 1/5")
        return
    measured = {version: result for version, result, _ in reversed(list(_evaluations(facts)))}
    oracles = ("AUC", "without server", "without device")
    head = ("version", "alias", "made (UTC)", "trained", "people", "ε", "δ", "protects", "AUC, noised", *oracles)
    rows = [
        _row(facts, version, record, measured.get(version)) for version, record in reversed(facts.trainings.items())
    ]
    yield table("Versions, the latest first; the last two columns are what fallbacks are left with", head, rows)
    yield e(
        "p",
        badge("oracle"),
        " is exact on the people that training held out, so without an interval of noise, and says nothing of others; "
        "the noised AUC is of the latest evaluation, with its 95 % interval of noise.",
    )
    yield details(
        "Training records", *(_record(version, record) for version, record in reversed(facts.trainings.items()))
    )


def _row(facts: Facts, version: int, record: TrainingRecord, evaluation: Mapping[str, Any] | None) -> Children:
    aliases = ", ".join(alias for alias, at in sorted(facts.aliases.items()) if at == version)
    auc = e("span", NONE)
    if evaluation is not None:
        found = evaluation["metrics"]["auc"]
        ends = "" if None in found["noise"] else f" ({found['noise'][0]:.3f} to {found['noise'][1]:.3f})"
        auc = number(found["value"], "noised", ".3f") if not ends else marked("noised", f"{found['value']:.3f}{ends}")
    oracle = (
        number(record.oracle.get(key), "oracle", ".3f") for key in ("auc", "auc_without_server", "auc_without_device")
    )
    made = facts.created.get(version)
    spent: Children = [e("span", "none"), NONE, NONE]
    if record.epsilon is not None:
        said = NONE if record.protects is None else f"{record.protects}, per {record.unit}"
        whose = e("span", said, class_="whole")
        spent = [number(record.epsilon, "public", ".3f"), number(record.delta, "public"), whose]
    return [
        marked("public", str(version)),
        name(aliases) if aliases else NONE,
        NONE if made is None else e("time", f"{made:%Y-%m-%d}"),
        record.kind,
        number(record.users, "public", ",d"),
        *spent,
        auc,
        *oracle,
    ]


def _record(version: int, record: TrainingRecord) -> Element:
    """How a version came to be."""
    lines = [e("li", each) for each in record.privacy_lines()]
    settings = [] if record.settings is None else list(record.settings)
    set_ = ", ".join(f"{key} {value}" for key, value in settings if value not in (None, (), {}))
    oracle = [[name(key.replace("_", " ")), number(value, "oracle")] for key, value in record.oracle.items()]
    return e(
        "div",
        e("h3", f"Version {version}"),
        e("p", "Run ", name(record.run), ", population ", name(record.population), ". ", badge("public")),
        e("ul", *lines),
        e("p", "Settings: ", name(set_)) if set_ else None,
        table(f"Measured on people that version {version} did not see", ("", "value"), oracle, "oracle")
        if oracle
        else None,
        data_mark="public",
    )


def curves(facts: Facts) -> Iterator[Element]:
    """AUC and log-loss by round."""
    if not any(facts.curves.values()):
        yield missing(
            "No version measured itself while it was trained: that takes people who are held out.",
            f"hybrid train {facts.model} --epsilon 4 --fold 1/5",
        )
        return
    yield e("p", NO_INTERVAL)
    yield e("div", *(card for key in CURVES if (card := _curve(facts, key)) is not None), class_="cards")


def _curve(facts: Facts, key: str) -> Element | None:
    found = {version: of[key] for version, of in facts.curves.items() if of.get(key)}
    if not found:
        return None
    points = [point for curve in found.values() for point in curve]
    lines = [Series(f"version {version}", curve, place=place) for place, (version, curve) in enumerate(found.items())]
    x = Axis("round or epoch", 0, max(step for step, _ in points))
    y = Axis(CURVES[key], *range_of([value for _, value in points]))
    last = ", ".join(f"version {version} ends at {curve[-1][1]:.3f}" for version, curve in found.items())
    steps = sorted({step for step, _ in points})
    steps = steps[:: -(-len(steps) // MOST_POINTS)]
    by = {version: dict(curve) for version, curve in found.items()}
    rows = [[marked("public", str(step)), *(number(by[v].get(step), "oracle") for v in by)] for step in steps]
    behind = table(f"{CURVES[key]} by round", ("round", *(f"version {v}" for v in by)), rows, "oracle")
    return figure(
        CURVES[key],
        plot(f"{CURVES[key]} by round", f"{last}.", x, y, lines),
        [badge("oracle")],
        details("All numbers", behind),
    )


def quality(facts: Facts) -> Iterator[Element]:
    """ROC, calibration and metrics of each version that was measured on devices."""
    latest: dict[int, tuple[Mapping[str, Any], str, Result]] = {}
    for version, evaluation, (run, result) in _evaluations(facts):
        latest.setdefault(version, (evaluation, run, result))
    if not latest:
        yield missing(
            "No version was measured on people's devices yet.",
            f"hybrid evaluate {facts.model}:{max(facts.trainings, default=1)} --epsilon 1",
        )
        return
    shown = dict(sorted(latest.items(), reverse=True)[:4])
    found = {version: evaluation for version, (evaluation, _, _) in shown.items()}
    yield e("div", _roc(found), _calibration(found), class_="cards")
    notes: dict[str, None] = {}
    for version, (evaluation, run, result) in shown.items():
        rows = [[METRICS.get(key, key), *estimate(one, "noised", ".4f")] for key, one in evaluation["metrics"].items()]
        said = result.shown
        yield table(f"Version {version}", ("", *INTERVALS), rows, "noised")
        fold: Children = [] if said["fold"] is None else [" of fold ", marked("public", said["fold"])]
        yield e(
            "p",
            number(said["people"], "public", ",d"),
            " people of ",
            name(said["population"]),
            *fold,
            ".",
            *paid(run, result),
        )
        notes |= dict.fromkeys(said["notes"])
    for note in notes:
        yield e("p", "Note: ", e("bdi", note, data_mark="public"), class_="note")


def _roc(found: Mapping[int, Mapping[str, Any]]) -> Element:
    lines = [_banded(f"version {v}", one["roc"], place) for place, (v, one) in enumerate(found.items())]
    areas = ", ".join(f"version {v} has an AUC of {_three(one['metrics']['auc']['value'])}" for v, one in found.items())
    x, y = (Axis(said, 0.0, 1.0, SHARES.ticks, SHARES.say) for said in ("false positive rate", "true positive rate"))
    drawing = plot("ROC", f"{areas}; bands are 95 % at each place, noise only.", x, y, lines, diagonal=True)
    caption: Children = [badge("noised"), " Bands: 95 % at each place for the exact curve on these people; noise only."]
    return figure(
        "ROC",
        drawing,
        caption,
        details("All numbers", *_tables(found, "roc", "false positive rate", "true positive rate")),
    )


def _calibration(found: Mapping[int, Mapping[str, Any]]) -> Element:
    lines = [_banded(f"version {v}", one["deciles"], place) for place, (v, one) in enumerate(found.items())]
    ratios = ", ".join(
        f"version {v} predicts {_three(one['metrics']['calibration']['value'])} times the mean label"
        for v, one in found.items()
    )
    x, y = (Axis(said, 0.0, 1.0, SHARES.ticks, SHARES.say) for said in ("mean prediction", "mean label"))
    drawing = plot("Calibration", f"{ratios}; on the diagonal both are the same.", x, y, lines, diagonal=True)
    caption: Children = [badge("noised"), " Ten parts of equally many rows; right is the diagonal. Bands as for ROC."]
    return figure(
        "Calibration",
        drawing,
        caption,
        details("All numbers", *_tables(found, "deciles", "mean prediction", "mean label")),
    )


def _banded(title: str, curve: Mapping[str, Sequence[float]], place: int) -> Series:
    band = tuple(zip(curve["x"], curve["low"], curve["high"], strict=True))
    return Series(title, tuple(zip(curve["x"], curve["y"], strict=True)), band, place=place)


def _tables(found: Mapping[int, Mapping[str, Any]], key: str, x: str, y: str) -> Iterator[Element]:
    for version, one in found.items():
        curve = one[key]
        step = -(-len(curve["x"]) // 21)
        rows = list(zip(*(curve[part] for part in ("x", "y", "low", "high")), strict=True))[::step]
        cells = [
            [number(a, "noised", ".3f"), number(b, "noised", ".3f"), marked("noised", f"{low:.3f} to {high:.3f}")]
            for a, b, low, high in rows
        ]
        yield table(f"Version {version}", (x, y, "95 % noise"), cells, "noised")


def comparison(facts: Facts) -> Iterator[Element]:
    """The latest comparison of two versions."""
    compared = [(run, result) for run, result in facts.of("evaluate") if result.shown["differences"]]
    if not compared:
        numbers = [*facts.trainings, 1, 2]
        first, second = (numbers[-3], numbers[-4]) if len(facts.trainings) > 1 else (2, 1)
        yield missing(
            "No two versions were compared on the same people.",
            f"hybrid evaluate {facts.model}:{first} --against {second} --epsilon 1",
        )
        return
    run, result = compared[0]
    first, second = (one["version"] for one in result.shown["versions"])
    rows = [(METRICS.get(key, key), one) for key, one in result.shown["differences"].items()]
    auc = result.shown["differences"]["auc"]
    drawing = differences(
        "Differences", f"AUC differs by {_signed(auc['value'])}. Each row has a scale of its own.", rows, _signed
    )
    behind = table(
        "Differences", ("", *INTERVALS), [[key, *estimate(one, "noised", "+.4f")] for key, one in rows], "noised"
    )
    title = f"Version {first} less version {second}"
    caption: Children = [
        badge("noised"),
        " On the same rows. Each row of the picture has a scale of its own; whiskers are 95 %, thick noise, thin full.",
    ]
    yield e(
        "div",
        figure(
            title,
            drawing,
            caption,
            e("p", e("span", _verdict(auc, first, second), data_mark="noised"), *paid(run, result)),
            behind,
        ),
        class_="cards",
    )


def _verdict(auc: Mapping[str, Any], first: int, second: int) -> str:
    ends = auc["full"] or auc["noise"]
    if None in ends or ends[0] <= 0 <= ends[1]:
        return "Which of them ranks better cannot be told from this."
    better, other = (first, second) if ends[0] > 0 else (second, first)
    return f"Version {better} ranks better than version {other}, beyond what chance explains."


def _evaluations(facts: Facts) -> Iterator[tuple[int, Mapping[str, Any], tuple[str, Result]]]:
    """(version, what was measured, where from), the latest first."""
    for run, result in facts.of("evaluate"):
        for version, evaluation in zip(result.shown["versions"], result.shown["evaluations"], strict=True):
            yield version["version"], evaluation, (run, result)


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.4f}"


def _three(value: float | None) -> str:
    return "an unknown number" if value is None else f"{value:.3f}"
