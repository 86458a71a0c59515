"""Section about what becomes of a version on devices: how many come how far, and where they stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from hybrid.report.charts import bars, ends
from hybrid.report.elements import (
    NONE,
    Children,
    Estimate,
    badge,
    details,
    e,
    figure,
    interval,
    missing,
    name,
    number,
    table,
)
from hybrid.report.facts import Facts
from hybrid.report.people import paid

MOST_STOPPED = 8  # bars; all are in the table


def funnel(facts: Facts) -> Iterator[Element]:
    """The phases of the latest week that was asked about, of each version."""
    found = facts.of("funnel")
    if not found:
        yield missing(
            "Nobody asked devices how far they come with a version.", f"hybrid funnel {facts.model} --devices 60"
        )
        return
    run, result = max(found, key=lambda one: str(one[1].shown["week"]))  # of its answers the latest
    shown = result.shown
    yield e(
        "p",
        "How many devices came how far in week ",
        e("time", shown["week"]),
        ", of ",
        number(shown["people"], "public", ",d"),
        " that were asked. What is below ",
        number(shown["threshold"], "public", ",.4g"),
        " could be noise alone, and is not shown.",
        *paid(run, result),
    )
    if not shown["versions"]:
        yield e("p", "No version has as many devices, as far as the noise lets it be seen.")
        return
    rows = [
        _estimate(row) for one in shown["versions"] for row in (one["devices"], *one["phases"], *one["stopped"]) if row
    ]
    most = max([end for row in rows for end in ends(row) if end is not None], default=1.0) or 1.0
    yield e("div", *(_version(one, most) for one in shown["versions"]), class_="cards")


def _version(one: Mapping[str, Any], most: float) -> Element:
    """One version's phases as bars, on the scale of all versions; where devices stopped; and all numbers."""
    version = one["version"]
    phases = [("all devices", _estimate(one["devices"])), *_rows(one["phases"], _phase)]
    known = [(label, row) for label, row in phases if row["value"] is not None]
    said = (
        f"{known[0][0]}: {_count(known[0][1]['value'])}; {known[-1][0]}: {_count(known[-1][1]['value'])}"
        if known
        else ""
    )
    drawing = bars(
        f"Devices of version {version} by phase", f"{said or 'nothing is known'}.", phases, _count, most=most
    )
    stopped = _rows(one["stopped"], _stop)
    behind: list[Element] = []
    if stopped:
        largest = sorted(stopped, key=lambda row: -(row[1]["value"] or 0.0))[:MOST_STOPPED]
        says = "; ".join(f"{label}: {_count(row['value'])}" for label, row in largest)
        behind += [
            e("h4", "Where they stopped"),
            bars(f"Where devices of version {version} stopped", f"{says}.", largest, _count, most=most),
        ]
    head = ("", "devices", "95 % noise")
    cells: list[Children] = [
        [name(label), number(row["value"], "noised", ",.0f"), interval(row["noise"], "noised", ",.0f")]
        for label, row in (*phases, *stopped)
    ]
    caption: Children = [badge("noised"), " Bars are devices, whiskers 95 % of the noise."]
    return figure(
        f"Version {version}",
        drawing,
        caption,
        *behind,
        details("All numbers", table(f"Devices of version {version}", head, cells, "noised")),
    )


def _rows(found: Sequence[Mapping[str, Any] | None], label: Any) -> list[tuple[str, Estimate]]:
    return [(label(row), _estimate(row)) for row in found if row is not None]


def _phase(row: Mapping[str, Any]) -> str:
    return str(row["name"]).replace("_", " ")


def _stop(row: Mapping[str, Any]) -> str:
    reason = str(row["reason"]).replace("_", " ")
    return f"{row['phase']}: {reason}"


def _estimate(row: Mapping[str, Any] | None) -> Estimate:
    """None: below the threshold."""
    if row is None:
        return {"value": None, "noise": None, "full": None}
    return {"value": row["value"], "noise": [row["low"], row["high"]], "full": None}


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"
