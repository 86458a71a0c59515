"""How the answers of `hybrid analyze` look in a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.analytics.results import cells_of, readable
from hybrid.cli.asking import ALIKE, FULL, NOISE, bar, interval, spend_lines


def show(shown: Mapping[str, Any]) -> None:
    """Prints what was asked, the answer with both intervals, and what it cost."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in _head(shown):
        print(line)
    for table in _tables(shown):
        console.print(table)
    if not cells_of(shown):
        print("no value stands out from the noise: ask more people, or with a larger --epsilon")
    people = shown["people"]
    if not shown["exact"]:
        print(NOISE.format(people=people))
    print(FULL + (ALIKE if shown["rows_a_person"] > 1 else ""))
    for line in spend_lines(shown["spend"], _why(shown)):
        print(line)


def _why(shown: Mapping[str, Any]) -> str:
    what = "the label" if shown["kind"] == "label" else "a request feature"
    return f"{what} is visible to the server, which counts it exactly: no device is asked"


def _head(shown: Mapping[str, Any]) -> Iterator[str]:
    rows = shown["rows_a_person"]
    which = f"the {shown['take']} row" if rows == 1 else f"the {shown['take']} {rows} rows at most"
    without = f", without fold {shown['fold']}" if shown["fold"] else ""
    without += ", with real devices" if shown["devices"] else ""
    yield (
        f"{shown['feature']} of {shown['model']}: {shown['people']:,} people of {shown['population']}{without}, "
        f"{which} of each"
    )
    bounds = shown.get("bounds")
    if bounds is not None:
        log = "; even in log(1 + x), and moments are of it" if bounds["scale"] == "log1p" else ""
        yield f"between {readable(bounds['low'])} and {readable(bounds['high'])} ({bounds['from']}){log}"
    if "edges_from" in shown:
        yield f"edges {shown['edges_from']}"


def _tables(shown: Mapping[str, Any]) -> Iterator[Any]:
    """Quantiles or numbers of all groups, then a histogram of each."""
    for key, title in (("quantiles", "quantile"), ("numbers", "number")):
        if key in shown["groups"][0]:
            yield _values(shown, key, title)
    if shown["kind"] == "label":
        yield _rates(shown)
        return
    for group in shown["groups"]:
        yield _bars(shown, group)


def _values(shown: Mapping[str, Any], key: str, title: str) -> Any:
    table = _table(shown, title, "value", "noise", "full")
    log = shown["bounds"]["scale"] == "log1p" and key == "numbers"
    for group in shown["groups"]:
        found = group[key]
        named = found.items() if isinstance(found, dict) else ((f"{one['level']:.4g}", one) for one in found)
        for name, one in named:
            of_log = " of log(1 + x)" if log and name != "count" else ""
            row = (f"{name}{of_log}", _value(one["value"]), interval(one["noise"]), interval(one["full"]))
            table.add_row(*_of_group(shown, group), *row)
    return table


def _rates(shown: Mapping[str, Any]) -> Any:
    kinds = ("full",) if shown["exact"] else ("noise", "full")
    table = _table(shown, "rate", "", *(f"{kind}, %" for kind in kinds), "rows")
    most = max((group["shares"][1]["noise"][1] or 0.0 for group in shown["groups"]), default=1.0)
    for group in shown["groups"]:
        rate = group["shares"][1]
        ends = (_percents(rate[kind]) for kind in kinds)
        table.add_row(
            *_of_group(shown, group), _percent(rate["value"]), bar(rate, most, 16), *ends, _rows(group["rows"])
        )
    return table


def _bars(shown: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    title = None if group["group"] is None else f"{shown['by']}: {group['group']}"
    kinds = ("full",) if shown["exact"] else ("noise", "full")
    columns = (escape(shown["feature"]), "share", "", *(f"{kind}, %" for kind in kinds), "rows")
    table = Table(*columns, title=title and Text(title), title_justify="left", box=None, pad_edge=False)
    most = max((share["noise"][1] or 0.0 for share in group["shares"]), default=0.0)
    for name, share, count in zip(cells_of(shown), group["shares"], group["counts"], strict=True):
        ends = (_percents(share[kind]) for kind in kinds)
        table.add_row(Text(name), _percent(share["value"]), bar(share, most, 16), *ends, _rows(count))
    if group["missing"] is not None:
        table.add_row("missing", "", "", *("" for _ in kinds), _rows(group["missing"]))
    return table


def _table(shown: Mapping[str, Any], *columns: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    grouped = [] if shown["by"] is None else [escape(shown["by"])]
    return Table(*grouped, *columns, box=None, pad_edge=False)


def _of_group(shown: Mapping[str, Any], group: Mapping[str, Any]) -> list[Any]:
    from rich.text import Text

    return [] if shown["by"] is None else [Text(group["group"])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _percents(ends: Sequence[float | None] | None) -> str:
    return interval(ends and [end and 100 * end for end in ends], "{:.1f}".format)


def _rows(count: Mapping[str, Any]) -> str:
    return f"{count['value']:,.0f}"


def _value(value: float | None) -> str:
    return "-" if value is None else readable(value, 5)


def draw(file: Path, shown: Mapping[str, Any]) -> None:
    """Bars of shares with both intervals, one panel for each group."""
    from matplotlib.figure import Figure

    groups, names = shown["groups"], cells_of(shown)
    wide = 1 if len(groups) == 1 else 2
    high = -(-len(groups) // wide)
    figure = Figure(figsize=(6.4 * wide, 1.2 + (0.6 + 0.26 * len(names)) * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False, sharex=True).ravel()
    for panel, group in zip(panels, groups, strict=False):
        _panel(panel, group, names)
        panel.set_title("" if group["group"] is None else f"{shown['by']}: {group['group']}", fontsize="medium")
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    said = "exact" if shown["spend"] is None else f"epsilon {shown['spend']['epsilon']:.3g}"
    figure.suptitle(f"{shown['feature']} of {shown['model']}, {said}", fontsize="medium")
    figure.supxlabel("share of rows; thick: 95 % for these people (noise), thin: for the population", fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _panel(panel: Any, group: Mapping[str, Any], names: Sequence[str]) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    places = range(len(names))
    panel.barh(places, [share["value"] or 0.0 for share in group["shares"]], color="#9db8d2", height=0.8)
    for kind, width, colour in (("full", 1.0, "#444444"), ("noise", 3.0, "#1f4e79")):
        for place, share in zip(places, group["shares"], strict=True):
            if share[kind] is not None and None not in share[kind]:
                panel.plot(share[kind], [place, place], color=colour, linewidth=width, solid_capstyle="butt")
    panel.set_yticks(places, names, fontsize="small")
    panel.invert_yaxis()
    panel.set_xlim(0, None)
