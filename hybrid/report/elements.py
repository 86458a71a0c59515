"""HTML and SVG as elements, so that text is escaped wherever it comes from; numbers with their marks; tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

from hybrid.analytics.results import Mark, readable

Child = Element | str | None
Children = list[Child]
Estimate = Mapping[str, Any]
"""As commands print it: "value", "noise" and "full", each with its two ends, or None."""

SIGNS: Mapping[Mark, str] = {"noised": "≈", "public": "○", "oracle": "◇"}
MEANINGS: Mapping[Mark, str] = {
    "noised": "a sum over people, noised before it was released; a ledger paid for it",
    "public": "known to the server or to everybody anyway: nothing was spent",
    "oracle": "computed from pooled data, as only a simulation can: a fleet never has it",
}
NONE = "–"


def e(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """An element. `class_` is class, and other underscores are hyphens.

    >>> tostring(e("p", "1 < 2", e("b", "!"), class_="note"), "unicode", method="html")
    '<p class="note">1 &lt; 2<b>!</b></p>'
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    element = Element(
        tag, {name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in names.items()}
    )
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child is not None:
            element.text = (element.text or "") + child
    return element


def text(element: Element) -> str:
    """As it is written into a page."""
    return tostring(element, "unicode", method="html")


def name(of: object) -> Element:
    """Somebody else's text: its direction of writing stays its own."""
    return e("bdi", str(of))


def badge(mark: Mark) -> Element:
    """What all numbers beside it are."""
    return e("span", f"{SIGNS[mark]} {mark}", class_=f"badge {mark}", title=MEANINGS[mark], data_badge=mark)


def marked(mark: Mark, *said: Child) -> Element:
    """Something with a number in it, with the sign of what it is, which is read aloud too."""
    sign = e("span", SIGNS[mark], class_="sign", title=f"{mark}: {MEANINGS[mark]}", aria_hidden="true")
    return e("span", *said, sign, e("span", f" ({mark})", class_="aloud"), class_=f"marked {mark}", data_mark=mark)


def number(value: float | None, mark: Mark, form: str | None = None) -> Element:
    """One number; what is not known is a dash."""
    if value is None or not math.isfinite(value):
        return e("span", NONE)
    return marked(mark, _said(value, form))


def _said(value: float, form: str | None) -> str:
    return readable(value) if form is None else format(value, form)


def interval(ends: Sequence[float | None] | None, mark: Mark, form: str | None = None) -> Element:
    """95 %, from its low end to its high one."""
    if ends is None or None in ends:
        return e("span", NONE)
    return marked(mark, " to ".join(_said(end, form) for end in ends if end is not None))


def estimate(found: Estimate, mark: Mark, form: str | None = None) -> list[Element]:
    """Three cells: value, noise interval, full interval; an exact number has no interval of noise."""
    noise = e("span", "exact") if mark != "noised" else interval(found["noise"], mark, form)
    return [number(found["value"], mark, form), noise, interval(found["full"], mark, form)]


def table(caption: str, head: Sequence[Child], rows: Iterable[Sequence[Child]], mark: Mark | None = None) -> Element:
    """A table that scrolls within itself, its first column naming the rows; its caption stays where it is."""
    columns = e("thead", e("tr", *(e("th", each, scope="col") for each in head)))
    body = e("tbody")
    for first, *others in rows:
        body.append(e("tr", e("th", first, scope="row"), *(e("td", each) for each in others)))
    said = e("p", f"{caption} ", None if mark is None else badge(mark), class_="caption")
    within = e("table", columns, body, aria_label=caption)
    return e("div", said, e("div", within, class_="scroll", role="group", tabindex="0", aria_label=caption))


def details(summary: str, *children: Child) -> Element:
    """What is there for who opens it."""
    return e("details", e("summary", summary), *children)


def command(*lines: str) -> Element:
    """Command lines, to be copied whole."""
    return e(
        "pre", e("code", "\n".join(lines)), class_="command", tabindex="0", role="group", aria_label="command line"
    )


def missing(why: str, *lines: str) -> Element:
    """A section without data, and which command fills it."""
    return e("div", e("p", why, " This fills it:"), command(*lines), class_="missing")


def figure(title: Child, drawing: Element | None, caption: Sequence[Child], *behind: Child) -> Element:
    """A card: heading, picture, what it says, and what is behind it."""
    said = e("figcaption", *caption) if caption else None
    return e("figure", e("h3", title), drawing, said, *behind)


def many(count: int, noun: str) -> str:
    """One person, 2 persons."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
