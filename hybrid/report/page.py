"""The page: its sections in order, its style and what it forbids itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from xml.etree.ElementTree import Element

from hybrid.report import funnel, people, privacy, versions
from hybrid.report.elements import MEANINGS, Children, badge, e, marked, name, number, text
from hybrid.report.facts import Facts

Section = Callable[[Facts], Iterator[Element]]
SECTIONS: tuple[tuple[str, str, Section], ...] = (
    ("versions", "Versions", versions.overview),
    ("features", "Features", people.features),
    ("label", "Label", people.label),
    ("curves", "Training curves", versions.curves),
    ("quality", "Quality, measured on devices", versions.quality),
    ("comparison", "Two versions compared", versions.comparison),
    ("funnel", "Funnel", funnel.funnel),
    ("drift", "Drift", people.drift),
    ("leakage", "What an embedding gives away", privacy.leakage),
    ("privacy", "Privacy spent, and left", privacy.spent),
)


def page(facts: Facts) -> str:
    """The whole page as HTML: one file, no script, nothing fetched, and all text in it escaped."""
    sheet = style()
    policy = f"default-src 'none'; style-src '{source_of(sheet)}'; base-uri 'none'; form-action 'none'"
    head = e(
        "head",
        e("meta", charset="utf-8"),
        e("meta", http_equiv="Content-Security-Policy", content=policy),
        e("meta", name="viewport", content="width=device-width, initial-scale=1"),
        e("meta", name="referrer", content="no-referrer"),
        e("title", f"{facts.model}: report"),
        e("style", sheet),
    )
    built = [(anchor, title, list(section(facts))) for anchor, title, section in SECTIONS]
    body = e(
        "body",
        e("header", e("h1", name(facts.model)), *_lead(facts)),
        navigation(anchor for anchor, _, _ in built),
        e("main", *legend(), *(section(*one) for one in built)),
        e(
            "footer",
            e("p", "Written by hybrid report. It spent nothing: what is noised was paid for when it was asked."),
        ),
    )
    return "<!doctype html>\n" + text(e("html", head, body, lang="en")) + "\n"


def style() -> str:
    """Of every page that shows such sections."""
    return files(__package__).joinpath("page.css").read_text()


def source_of(sheet: str) -> str:
    """What a content security policy calls a style that is in the page, to allow it alone."""
    return f"sha256-{base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()}"


def navigation(anchors: Iterable[str]) -> Element:
    """A link to each section."""
    links = (e("li", e("a", anchor.capitalize(), href=f"#{anchor}")) for anchor in anchors)
    return e("nav", e("ul", *links), aria_label="Sections")


def section(anchor: str, title: str, content: Iterable[Element]) -> Element:
    """One of a page, with its heading."""
    return e("section", e("h2", title, id=f"{anchor}-title"), *content, id=anchor, aria_labelledby=f"{anchor}-title")


def _lead(facts: Facts) -> Iterator[Element]:
    """What matters most, in one line each."""
    when = e("time", f"{facts.written:%Y-%m-%d %H:%M} UTC")
    only: Children = [] if facts.only is None else [" Answers and spending of run ", name(facts.only), " only."]
    yield e("p", "Written ", when, ".", *only, class_="when")
    aliases = [
        part
        for alias, at in sorted(facts.aliases.items())
        for part in (name(alias), " is version ", number(at, "public", "d"), "; ")
    ]
    tiles = [e("p", e("b", "Versions: "), number(len(facts.trainings), "public", "d"), ". ", *aliases[:-1])]
    if facts.composed is not None:
        found = facts.composed
        tiles.append(
            e(
                "p",
                e("b", "Spent: "),
                "ε ",
                number(found["epsilon"], "public", ".3f"),
                " at δ ",
                number(found["delta"], "public"),
                " by ",
                marked("public", str(found["runs"])),
                " run(s), for a person who was in all of them.",
            )
        )
    yield e("div", *tiles, class_="lead")


def legend() -> Iterator[Element]:
    """How numbers are to be read."""
    marks = [e("li", badge(mark), f" {meaning}") for mark, meaning in MEANINGS.items()]
    yield e(
        "section",
        e("h2", "How to read a number", id="legend-title"),
        e("ul", *marks, class_="marks"),
        e(
            "p",
            "Two intervals of 95 %: ",
            e("b", "noise"),
            " is for the exact value on the people who were asked, and only the mechanism's noise is in it; ",
            e("b", "full"),
            " is for the population that they are a sample of, person by person. ",
            "In pictures noise is thick, full is thin.",
        ),
        id="legend",
        aria_labelledby="legend-title",
    )
