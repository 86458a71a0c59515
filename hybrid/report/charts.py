"""Pictures as SVG: as wide as a phone, so that their text stays as large as the page's; no script, nothing fetched.

Colours and dashes are in `page.css`, by class: series differ in both, and in the shape of their points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from hybrid.report.elements import Estimate, e

WIDTH = 360.0  # of every picture, in its own units: pixels of a phone
LINE = 26.0  # height of one bar
BESIDE = 138.0  # width for labels beside bars
MOST_LETTERS = 17  # of such a label: all are seen where letters are wide

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Numbers along one side.

    Attributes:
        label: what they are.
        low, high: its ends.
        ticks: places that are labelled; none: chosen.
        say: how a number is written.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[float] = ()
    say: Callable[[float], str] = "{:.4g}".format

    @property
    def places(self) -> Sequence[float]:
        """Where its labels are."""
        return self.ticks or even(self.low, self.high)


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        points: (x, y), drawn in this order.
        band: (x, low, high) around it.
        style: "step": flat until the next point; "dots": points only; "line".
        place: chooses its colour, dash and shape.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    style: str = "line"
    place: int = 0


def even(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers between two, about so many.

    >>> even(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(
    title: str,
    says: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Series],
    *,
    level: tuple[float, str] | None = None,
    diagonal: bool = False,
) -> Element:
    """Lines over two axes.

    Args:
        title: read aloud.
        says: what is to be seen, read aloud.
        x: the axis below.
        y: the axis beside it.
        lines: drawn over each other.
        level: a horizontal line, and what it is.
        diagonal: whether y = x is drawn.
    """
    left, top, right, height = 44.0, 26.0, 10.0, 190.0
    legend = [*((line.name, f"s{line.place}", line.style) for line in lines)]
    if level is not None:
        legend.append((level[1], "level", "line"))
    bottom = top + height
    whole = bottom + 42 + 22 * len(legend) + 4

    def across(value: float) -> float:
        return left + (WIDTH - left - right) * (value - x.low) / ((x.high - x.low) or 1)

    def up(value: float) -> float:
        return bottom - height * (min(max(value, y.low), y.high) - y.low) / ((y.high - y.low) or 1)

    drawn: list[Element] = []
    for place in y.places:
        drawn.append(e("line", class_="grid", x1=left, x2=WIDTH - right, y1=up(place), y2=up(place)))
        drawn.append(e("text", y.say(place), x=left - 6, y=up(place) + 4, class_="end"))
    for place in x.places:
        where = "end" if across(place) > WIDTH - 24 else "middle"
        at = WIDTH - right if where == "end" else across(place)
        drawn.append(e("line", class_="tick", x1=across(place), x2=across(place), y1=bottom, y2=bottom + 4))
        drawn.append(e("text", x.say(place), x=at, y=bottom + 18, class_=where))
    drawn.append(e("line", class_="axis", x1=left, x2=WIDTH - right, y1=bottom, y2=bottom))
    drawn.append(e("text", x.label, x=(left + WIDTH - right) / 2, y=bottom + 36, class_="middle"))
    drawn.append(e("text", y.label, x=2.0, y=10.0))
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        drawn.append(e("line", class_="diagonal", x1=across(low), y1=up(low), x2=across(high), y2=up(high)))
    if level is not None:
        drawn.append(e("line", class_="level", x1=left, x2=WIDTH - right, y1=up(level[0]), y2=up(level[0])))
    drawn += [e("g", *_series(line, across, up), class_=f"s{line.place}") for line in lines]
    for row, (said, style, kind) in enumerate(legend):
        drawn.append(_key(said, style, kind, bottom + 56 + 22 * row, left))
    return _svg(title, says, whole, drawn)


def _series(line: Series, across: Callable[[float], float], up: Callable[[float], float]) -> Iterator[Element]:
    if line.band:
        there = [(across(x), up(high)) for x, _, high in line.band]
        back = [(across(x), up(low)) for x, low, _ in reversed(line.band)]
        yield e("path", class_="band", d=_path([*there, *back]) + "Z")
    points = [(across(x), up(y)) for x, y in line.points]
    if line.style == "step":
        points = [p for at, (x, y) in enumerate(points) for p in ([(x, points[at - 1][1])] if at else []) + [(x, y)]]
    if line.style != "dots":
        yield e("path", class_="line", d=_path(points))
    if line.style == "dots" or (line.style == "line" and len(points) <= 24):
        for x, y in points:
            yield _shape(line.place, x, y)


def _key(said: str, style: str, kind: str, y: float, left: float) -> Element:
    """One line of the legend."""
    sample: list[Element] = []
    if kind != "dots":
        sample.append(
            e("line", class_="level" if style == "level" else "line", x1=left, x2=left + 30, y1=y - 4, y2=y - 4)
        )
    if style != "level" and kind != "step":
        sample.append(_shape(int(style[1:]), left + 15, y - 4))
    return e("g", e("g", *sample, class_=style), e("text", said, x=left + 38, y=y))


def _shape(place: int, x: float, y: float) -> Element:
    """Circle, square, diamond, triangle."""
    r = 3.2
    if place % 4 == 0:
        return e("circle", class_="dot", cx=x, cy=y, r=r)
    corners = {
        1: [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)],
        2: [(x, y - r - 1), (x + r + 1, y), (x, y + r + 1), (x - r - 1, y)],
        3: [(x, y - r - 1), (x + r + 1, y + r), (x - r - 1, y + r)],
    }[place % 4]
    return e("path", class_="dot", d=_path(corners) + "Z")


def bars(
    title: str, says: str, rows: Sequence[tuple[str, Estimate]], say: Callable[[float], str], *, most: float
) -> Element:
    """A bar from zero up to `most` for each row, with both intervals: the noise's thick, the full one thin."""
    left, right = BESIDE, 60.0

    def across(value: float) -> float:
        return left + (WIDTH - left - right) * min(max(value, 0.0), most) / most

    drawn: list[Element] = []
    for place, (label, row) in enumerate(rows):
        y = LINE * place + LINE / 2 + 2
        value = row["value"]
        drawn.append(e("text", e("title", label), short(label), x=left - 8, y=y + 4, class_="end"))
        if value is None:
            drawn.append(e("text", "not known", x=left + 4, y=y + 4))
            continue
        drawn.append(e("rect", class_="bar", x=left, y=y - 8, width=across(value) - left, height=16.0))
        drawn += _whiskers(row, across, y)
        drawn.append(e("text", say(value), x=WIDTH - 2, y=y + 4, class_="end"))
    drawn.append(e("line", class_="axis", x1=left, x2=left, y1=2.0, y2=LINE * len(rows) + 2))
    return _svg(title, says, LINE * len(rows) + 4, drawn)


def differences(title: str, says: str, rows: Sequence[tuple[str, Estimate]], say: Callable[[float], str]) -> Element:
    """A point for each row and its intervals around zero, each row on a scale of its own."""
    left, right = BESIDE, 62.0
    middle, half = (left + WIDTH - right) / 2, (WIDTH - right - left) / 2 - 4
    drawn = [e("line", class_="axis", x1=middle, x2=middle, y1=2.0, y2=LINE * len(rows) + 2)]
    for place, (label, row) in enumerate(rows):
        y = LINE * place + LINE / 2 + 2
        drawn.append(e("text", short(label), x=left - 8, y=y + 4, class_="end"))
        most = max([abs(end) for end in ends(row) if end is not None] or [0.0]) or 1.0
        if row["value"] is None:
            continue

        def across(value: float, most: float = most) -> float:
            return middle + half * value / most

        drawn += _whiskers(row, across, y)
        drawn.append(e("g", _shape(0, across(row["value"]), y), class_="s0"))
        drawn.append(e("text", say(row["value"]), x=WIDTH - 2, y=y + 4, class_="end"))
    drawn.append(e("text", "0", x=middle, y=LINE * len(rows) + 18, class_="middle"))
    return _svg(title, says, LINE * len(rows) + 24, drawn)


def _whiskers(row: Estimate, across: Callable[[float], float], y: float) -> Iterator[Element]:
    for kind in ("full", "noise"):
        low, high = row.get(kind) or (None, None)
        if low is not None and high is not None:
            yield e("line", class_=f"whisker {kind}", x1=across(low), x2=across(high), y1=y, y2=y)


def ends(row: Estimate) -> Iterator[float | None]:
    """A value, and the ends of its intervals."""
    yield row["value"]
    for kind in ("noise", "full"):
        yield from row.get(kind) or ()


def meter(title: str, part: float, whole: float) -> Element:
    """How much of a whole is used."""
    share = min(max(part / whole, 0.0), 1.0)
    drawn = [
        e("rect", class_="frame", x=1.0, y=1.0, width=118.0, height=12.0),
        e("rect", class_="bar", x=1.0, y=1.0, width=118.0 * share, height=12.0),
    ]
    return e("svg", e("title", title), *drawn, viewBox="0 0 120 14", role="img", class_="meter", aria_label=title)


def short(label: str) -> str:
    """What fits beside a bar."""
    return label if len(label) <= MOST_LETTERS else f"{label[: MOST_LETTERS - 1]}…"


def range_of(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis that has these, with some room."""
    low, high = (min([*values, 0.0]) if zero else min(values)), max(values)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    return (low if zero and low == 0 else low - room), high + room


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _svg(title: str, says: str, height: float, drawn: Sequence[Element]) -> Element:
    return e(
        "svg",
        e("title", title),
        e("desc", says),
        *drawn,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        aria_label=f"{title}. {says}",
    )
