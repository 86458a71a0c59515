"""Sections about people's data: features, and the label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from hybrid.analytics.results import Mark, Result, cells_of
from hybrid.report.charts import bars, ends
from hybrid.report.elements import (
    NONE,
    Children,
    badge,
    command,
    details,
    e,
    estimate,
    figure,
    interval,
    many,
    marked,
    missing,
    name,
    number,
    table,
)
from hybrid.report.facts import Facts
from hybrid.version import Balance, TrainingRecord, constants_of

LABEL = "label"
ASK = "0.2"  # the epsilon of a question that is proposed
MOST_GROUPS = 12
MOST_BARS = 40
INTERVALS = ("value", "95 % noise", "95 % full")


def features(facts: Facts) -> Iterator[Element]:
    """A histogram of each feature that was asked about."""
    asked = _latest(facts, label=False)
    yield e("p", "How people's features are distributed, as far as somebody asked. A bar is the share of rows.")
    if asked:
        yield e("div", *(answer(run, result) for run, result in asked.values()), class_="cards")
    never = [feature for feature in facts.device if feature not in {feature for feature, _ in asked}]
    ask = [f"hybrid analyze {facts.model} {feature} --epsilon {ASK}" for feature in never]
    if never and not asked:
        yield missing("Nobody asked about a device feature yet.", ask[0])
    if len(ask) > (0 if asked else 1):
        yield details(
            "Device features that nobody asked about", e("p", "Each of these commands spends privacy:"), command(*ask)
        )
    yield from _learned(facts)


def label(facts: Facts) -> Iterator[Element]:
    """How often the label is 1."""
    who = (
        "The server sees it: counting it costs nothing."
        if facts.label_visible_to == "server"
        else "Only devices know it."
    )
    yield e("p", "The label is ", name(facts.label), ". ", who)
    asked = _latest(facts, label=True)
    if asked:
        yield e("div", *(answer(run, result) for run, result in asked.values()), class_="cards")
    else:
        spends = "" if facts.label_visible_to == "server" else f" --epsilon {ASK}"
        yield missing("Nobody asked how often the label is 1.", f"hybrid analyze {facts.model} label{spends}")
    trained = reversed(facts.trainings.items())
    rows = [_balance_row(version, record, record.balance) for version, record in trained if record.balance is not None]
    if rows:
        head = ("version", "prior", "kept of label 0", "kept of label 1", "shift by sampling", "shift as estimated")
        yield table("Label balance: what devices kept, and the correction of logits that a version carries", head, rows)


def drift(facts: Facts) -> Iterator[Element]:
    """Whether features and scores are distributed as they were."""
    found = facts.of("drift")
    if not found:
        yield missing("Nobody compared people's features of two periods.", f"hybrid drift {facts.model} --period week")
        return
    run, result = found[0]
    shown = result.shown
    rows = [(column["column"], _index(column)) for column in shown["columns"]]
    most = max([end for _, row in rows for end in ends(row) if end is not None] + [shown["thresholds"]["drifted"]])
    drawing = bars(
        "Population stability index", "Of each column, with 95 % intervals.", rows, "{:.2f}".format, most=most
    )
    moved, drifted = (number(shown["thresholds"][each], "public") for each in ("moved", "drifted"))
    caption: Children = [
        badge("noised"),
        " PSI: stable below ",
        moved,
        ", drifted from ",
        drifted,
        " on. Whiskers: 95 %.",
    ]
    head = ("column", "PSI", "95 % full", "verdict")
    cells = [
        [
            name(column["column"]),
            number(column["psi"], "noised", ".3f"),
            interval([column["low"], column["high"]], "noised", ".3f"),
            column["verdict"],
        ]
        for column in shown["columns"]
    ]
    periods: Children = [name(shown["reference"]["name"]), " against ", name(shown["current"]["name"]), "."]
    behind = table("PSI by column", head, cells, "noised")
    yield e(
        "div",
        figure("Features then and now", drawing, caption, e("p", *periods, *paid(run, result)), behind),
        class_="cards",
    )


def _index(column: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": column["psi"], "noise": None, "full": [column["low"], column["high"]]}


def answer(run: str, result: Result) -> Element:
    """One answer of `hybrid analyze`: a picture for each group, and its numbers."""
    shown, mark = result.shown, result.mark
    title = e("span", name("label" if shown["kind"] == LABEL else shown["feature"]))
    if shown["by"] is not None:
        title.extend([e("span", " by "), name(shown["by"])])
    groups = shown["groups"][:MOST_GROUPS]
    left_out = len(shown["groups"]) - len(groups)
    behind = [table_ for group in groups for table_ in _tables(shown, group, mark)]
    notes = [e("p", *_who(shown), *paid(run, result))]
    if left_out:
        notes.append(e("p", f"{many(left_out, 'more group')} in the run's folder."))
    return figure(
        title,
        e("div", *_pictures(shown, groups)),
        [badge(mark)],
        *notes,
        *_key_numbers(shown, mark),
        details("All numbers", *behind),
    )


def paid(run: str, result: Result) -> Children:
    """When, and what for."""
    when = f"{result.time:%Y-%m-%d %H:%M} UTC"
    if result.spend is None:
        return [" ", e("time", when), ", at no cost."]
    epsilon, delta = (number(result.spend[part], "public", ".3g") for part in ("epsilon", "delta"))
    return [
        " ",
        e("time", when),
        ", for ε ",
        epsilon,
        " at δ ",
        delta,
        ", paid by run ",
        name(result.spend["run"]),
        ".",
    ]


def _latest(facts: Facts, *, label: bool) -> dict[tuple[str, str | None], tuple[str, Result]]:
    """(feature, by) -> its latest answer."""
    found: dict[tuple[str, str | None], tuple[str, Result]] = {}
    for run, result in facts.of("analyze"):
        if (result.shown["kind"] == LABEL) == label:
            found.setdefault((result.shown["feature"], result.shown["by"]), (run, result))
    return dict(sorted(found.items(), key=lambda one: (one[0][0], one[0][1] or "")))


def _who(shown: Mapping[str, Any]) -> Children:
    rows = shown["rows_a_person"]
    which = "row" if rows == 1 else f"{rows} rows at most"
    said: Children = [number(shown["people"], "public", ",d"), " people of ", name(shown["population"])]
    return [*said, ", the ", shown["take"], " ", e("span", which, data_mark="public"), " of each."]


def _pictures(shown: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Iterator[Element]:
    """One of each group, on the same scale; of a label, one with a bar for each group."""
    if shown["kind"] == LABEL:
        rows = [(group["group"] or "label is 1", group["shares"][1]) for group in groups]
        said = ", ".join(f"{who}: {_percent(share['value'])}" for who, share in rows)
        yield bars("Rate of label 1", f"Shares of rows with 95 % intervals; {said}.", rows, _percent, most=1.0)
        return
    if not shown["values" if shown["kind"] != "histogram" else "edges"]:
        yield e("p", "No value stands out from the noise.")
        return
    tops = [end for group in groups for share in group["shares"] for end in ends(share) if end is not None]
    for group in groups:
        rows = list(zip(cells_of(shown), group["shares"], strict=True))
        known = [row for row in rows if row[1]["value"] is not None]
        most = max(known, key=lambda row: row[1]["value"], default=None)
        said = "no share is known" if most is None else f"most rows: {most[0]}, {_percent(most[1]['value'])}"
        of = "" if group["group"] is None else f", {shown['by']} {group['group']}"
        says = f"Shares of rows with 95 % intervals; {said}."
        drawing = bars(f"{shown['feature']}{of}", says, rows[:MOST_BARS], _percent, most=max([*tops, 1e-9]))
        yield drawing if group["group"] is None else e("div", e("h4", name(group["group"])), drawing)


def _tables(shown: Mapping[str, Any], group: Mapping[str, Any], mark: Mark) -> Iterator[Element]:
    of = "" if group["group"] is None else f", {shown['by']}: {group['group']}"
    rows = zip(cells_of(shown), group["shares"], group["counts"], strict=True)
    cells: list[Children] = [
        [name(cell), *estimate(share, mark, ".2%"), number(count["value"], mark, ",.0f")] for cell, share, count in rows
    ]
    if group["missing"] is not None:
        cells.append(["missing", "", "", "", number(group["missing"]["value"], mark, ",.0f")])
    yield table(f"Shares of rows{of}", ("", "share", "95 % noise", "95 % full", "rows"), cells, mark)


def _key_numbers(shown: Mapping[str, Any], mark: Mark) -> Iterator[Element]:
    """Mean and the like, and quantiles, of each group."""
    log = (shown.get("bounds") or {}).get("scale") == "log1p"
    for group in shown["groups"][:MOST_GROUPS]:
        of = "" if group["group"] is None else f", {shown['by']}: {group['group']}"
        if "numbers" in group:
            said = "Moments of log(1 + x)" if log else "Moments"
            rows = [[each, *estimate(found, mark)] for each, found in group["numbers"].items() if each != "sum"]
            yield table(f"{said}{of}", ("", *INTERVALS), rows, mark)
        if "quantiles" in group:
            levels = [[marked("public", f"{one['level']:.3g}"), *estimate(one, mark)] for one in group["quantiles"]]
            yield table(f"Quantiles{of}", ("level", *INTERVALS), levels, mark)


def _learned(facts: Facts) -> Iterator[Element]:
    """Constants that a version carries."""
    for version, record in reversed(facts.trainings.items()):
        learned = record.learned
        if learned is None:
            continue
        mark: Mark = "oracle" if learned.epsilon is None else "noised"
        rows = [
            [name(feature), marked(mark, name(constants_of(transform)))]
            for feature, transform in learned.transforms.items()
        ]
        said = f"Constants of features that version {version} carries"
        yield table(said, ("feature", "constants"), rows, mark)
        yield e("p", e("bdi", learned.line(), data_mark=mark), ".")
        return


def _balance_row(version: int, record: TrainingRecord, balance: Balance) -> Children:
    marks: tuple[Mark, Mark, Mark] = ("public" if balance.prior_exact else "noised", "public", "noised")
    if record.epsilon is None:
        marks = ("oracle", "oracle", "oracle")  # a reference: nothing was noised
    prior, keep, rest = marks
    kept = (number(each, keep, ".3g") for each in balance.keep)
    shifts = number(balance.analytic, prior, "+.3f"), number(balance.estimated, rest, "+.3f")
    return [marked("public", str(version)), number(balance.prior, prior), *kept, *shifts]


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"
