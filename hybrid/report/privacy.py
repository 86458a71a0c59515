"""Sections about privacy: what an embedding gives away, and what was spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from xml.etree.ElementTree import Element

from hybrid.report.charts import Axis, Series, meter, plot, range_of
from hybrid.report.elements import NONE, Children, badge, details, e, figure, marked, missing, name, number, table
from hybrid.report.facts import Facts
from hybrid.report.spending import TOGETHER, Spending

UNITS = (
    ("days", timedelta(days=1)),
    ("hours", timedelta(hours=1)),
    ("minutes", timedelta(minutes=1)),
    ("seconds", timedelta(seconds=1)),
)
COMPOSED = 7  # place of the line of all purposes together


def leakage(facts: Facts) -> Iterator[Element]:
    """How well attacks that know the tower recover features."""
    yield e("p", "How this model releases a device's embedding: ", e("bdi", facts.release, data_mark="public"))
    found = facts.of("inversion")
    if not found:
        yield missing("Nobody attacked what is released yet.", f"hybrid audit inversion {facts.model}")
        return
    _, result = found[0]
    shown = result.shown
    levels = shown["levels"]
    yield e("div", _cost(shown), _gains(shown), class_="cards")
    features = sorted(levels[0]["features"], key=lambda each: -levels[0]["features"][each]["gain"]["mean"])
    head: Children = ["feature", "guessing", *(_sigma(level) for level in levels)]
    rows = [
        [
            name(each),
            number(levels[0]["features"][each]["prior"], "oracle", ".0%"),
            *(_heat(level["features"][each]) for level in levels),
        ]
        for each in features
    ]
    yield table(
        f"How often each feature of version {shown['version']} is recovered, and points over guessing (95 %), by noise",
        head,
        rows,
        "oracle",
    )
    yield e("ul", *(e("li", e("bdi", each)) for each in shown["verdict"]), data_mark="oracle", class_="verdict")
    yield e(
        "p",
        badge("oracle"),
        " Intervals: 95 % under people drawn again.",
        " ",
        e("time", f"{result.time:%Y-%m-%d %H:%M} UTC"),
        ".",
    )


def _cost(shown: Mapping[str, Any]) -> Element:
    levels, without = shown["levels"], shown["auc_without"]
    clear = levels[0]["auc"] + levels[0]["auc_cost"]["mean"]
    bands = [
        (place, clear - level["auc_cost"]["high"], clear - level["auc_cost"]["low"])
        for place, level in enumerate(levels)
    ]
    points = [(place, level["auc"]) for place, level in enumerate(levels)]
    y = Axis("AUC", *range_of([*(y for _, y in points), *(end for band in bands for end in band[1:]), without]))
    drawing = plot(
        "AUC by noise",
        f"AUC is {points[0][1]:.3f} with least noise, {points[-1][1]:.3f} with most, {without:.3f} with nothing sent.",
        _noise_axis(levels),
        y,
        [Series("AUC", points, bands)],
        level=(without, "nothing of the device sent"),
    )
    rows = [
        [
            _sigma(level),
            number(level["epsilon"], "public", ".3g"),
            number(level["auc"], "oracle", ".4f"),
            marked("oracle", _difference(level["auc_cost"], ".4f")),
            number(level["whole"], "oracle", ".1%"),
        ]
        for level in levels
    ]
    behind = table(
        "Noise levels", ("noise / clip", "local ε", "AUC", "AUC lost (95 %)", "whole profiles"), rows, "oracle"
    )
    return figure(
        "What noise costs",
        drawing,
        [badge("oracle"), " Band: 95 % of what noise costs, under people drawn again."],
        details("All numbers", behind),
    )


def _gains(shown: Mapping[str, Any]) -> Element:
    levels = shown["levels"]
    order = sorted(levels[0]["features"], key=lambda each: -levels[0]["features"][each]["gain"]["mean"])[:4]
    found = {
        each: [(place, 100 * level["features"][each]["gain"]["mean"]) for place, level in enumerate(levels)]
        for each in order
    }
    bands = {
        each: [
            (place, *(100 * level["features"][each]["gain"][end] for end in ("low", "high")))
            for place, level in enumerate(levels)
        ]
        for each in order
    }
    lines = [Series(each, found[each], bands[each], place=place) for place, each in enumerate(order)]
    y = Axis(
        "points over guessing",
        *range_of([end for band in bands.values() for _, low, high in band for end in (low, high)], zero=True),
    )
    first, most = order[0], found[order[0]][0][1]
    drawing = plot(
        "What is recovered by noise",
        f"With least noise {first} is recovered {most:.0f} points over guessing.",
        _noise_axis(levels),
        y,
        lines,
    )
    return figure(
        "What it hides",
        drawing,
        [badge("oracle"), " The features that are recovered best; all are in the table below. Bands: 95 %."],
    )


def _noise_axis(levels: Sequence[Mapping[str, Any]]) -> Axis:
    said = [f"{level['sigma']:g}" if level["sigma"] else "clear" for level in levels]
    return Axis("noise / clip", 0, max(len(levels) - 1, 1), tuple(range(len(levels))), lambda place: said[round(place)])


def _heat(found: Mapping[str, Any]) -> Element:
    gain = found["gain"]
    deep = min(5, max(0, round(5 * gain["mean"])))
    return e("span", marked("oracle", f"{found['recovery']:.0%} ", _points(gain)), class_=f"heat h{deep}")


def _points(gain: Mapping[str, float]) -> str:
    return f"{100 * gain['mean']:+.0f} ({100 * gain['low']:+.0f} to {100 * gain['high']:+.0f})"


def _difference(found: Mapping[str, float], form: str) -> str:
    return f"{format(found['mean'], form)} ({format(found['low'], form)} to {format(found['high'], form)})"


def _sigma(level: Mapping[str, Any]) -> Element:
    said = f"{level['sigma']:g}" if level["sigma"] else "clear"
    return e("span", f"{said} (declared)" if level["declared"] else said, data_mark="public")


def spent(facts: Facts) -> Iterator[Element]:
    """Epsilon over time by purpose, of all runs and of each."""
    epsilon, delta, unit = facts.budget
    yield e(
        "p",
        "Declared: at most ε ",
        number(epsilon, "public"),
        " at δ ",
        number(delta, "public"),
        f" per {unit} in each run. ",
        badge("public"),
        " What was spent is no secret; what it was spent on is above.",
    )
    for each in facts.unpaid:
        yield e("p", "Not shown: ", e("bdi", each), class_="note", data_mark="public")
    if not facts.runs:
        yield missing("No privacy was spent yet.", f"hybrid train {facts.model} --epsilon 4 --fold 1/5")
        return
    yield e("div", *map(_over_time, facts.spending), class_="cards")
    head = ("run", "ε spent", "of", "ε left", "used", "versions", "spent on", "protects")
    yield table("Runs and their budgets", head, [_run_row(run) for run in facts.runs], "public")
    doubts = [e("li", name(run["run"]), ": ", run["doubt"]) for run in facts.runs if run["doubt"]]
    if doubts:
        yield e("ul", *doubts, class_="note", data_mark="public")
    yield e("ul", *map(_sentence, _sentences(facts)))


def _sentence(said: Children) -> Element:
    return e("li", *said)


def _sentences(facts: Facts) -> Iterator[Children]:
    yield [f"Scope: {facts.scope}."]
    if facts.composed is not None:
        found = facts.composed
        yield [
            "For people who were in all of the model's runs (",
            number(found["runs"], "public", "d"),
            "): together ε ",
            number(found["epsilon"], "public", ".3f"),
            " at δ ",
            number(found["delta"], "public"),
            f" ({found['accountant']}).",
        ]
    else:
        yield ["For people who were in all of the model's runs: not known, since a ledger is not whole."]
    for said in dict.fromkeys(run["assumption"] for run in facts.runs if run["assumption"]):
        yield ["Assumes: ", e("bdi", said, data_mark="public"), "."]
    references = [number for number, record in facts.trainings.items() if record.epsilon is None]
    if references:
        listed = ", ".join(map(str, references))
        yield [
            "References, trained without a mechanism, which nothing here protects people from: versions ",
            marked("public", listed),
            ".",
        ]


def _run_row(run: Mapping[str, Any]) -> Children:
    versions = marked("public", ", ".join(map(str, run["versions"]))) if run["versions"] else e("span", NONE)
    protects = run["protects"] or "said by a version"
    if "epsilon" not in run:
        return [name(run["run"]), "ledger missing", NONE, NONE, NONE, versions, NONE, protects]
    ratio = f"{run['epsilon'] / run['budget_epsilon']:.0%} of the budget is spent"
    purposes: dict[str, int] = {}
    for each in run["spent_on"]:
        purposes[each["purpose"]] = purposes.get(each["purpose"], 0) + each["releases"]
    used_for = ", ".join(f"{purpose} ({count})" for purpose, count in purposes.items())
    return [
        name(run["run"]),
        number(run["epsilon"], "public", ".3f"),
        number(run["budget_epsilon"], "public", "g"),
        number(run["left"], "public", ".3f"),
        e("span", meter(ratio, run["epsilon"], run["budget_epsilon"])),
        versions,
        marked("public", used_for),
        protects,
    ]


def _over_time(spending: Spending) -> Element:
    begin = min(time for line in spending.lines.values() for time, _ in line)
    end = max(time for line in spending.lines.values() for time, _ in line)
    unit, length = next(((each, one) for each, one in UNITS if end - begin >= 2 * one), UNITS[-1])

    def since(time: datetime) -> float:
        return (time - begin) / length

    last = max(since(end), 1.0)
    lines = []
    for order, (purpose, points) in enumerate(spending.lines.items()):
        place = COMPOSED if purpose == TOGETHER else order
        drawn = [(since(time), value) for time, value in points]
        lines.append(
            Series(f"{purpose}: {points[-1][1]:.3f}", [*drawn, (last * 1.04, drawn[-1][1])], style="step", place=place)
        )
    tops = [value for points in spending.lines.values() for _, value in points]
    level = None if spending.budget is None else (spending.budget, f"budget of the run: {spending.budget:g}")
    y = Axis("ε", *range_of([*tops, *([] if spending.budget is None else [spending.budget])], zero=True))
    x = Axis(f"{unit} since {begin:%Y-%m-%d %H:%M} UTC", 0.0, last * 1.04)
    says = "; ".join(f"{purpose} came to epsilon {points[-1][1]:.3f}" for purpose, points in spending.lines.items())
    drawing = plot(f"Epsilon over time, {spending.title}", f"{says}.", x, y, lines, level=level)
    rows = [
        [name(purpose), e("time", f"{time:%Y-%m-%d %H:%M:%S}"), number(value, "public", ".4f")]
        for purpose, points in spending.lines.items()
        for time, value in points
    ]
    behind = table("Epsilon after releases", ("purpose", "time (UTC)", "ε"), rows, "public")
    caption: Children = [
        badge("public"),
        " Each purpose alone, at δ ",
        number(spending.delta, "public"),
        "; composed they cost less than their sum.",
    ]
    return figure(name(spending.title), drawing, caption, details("All numbers", behind))
