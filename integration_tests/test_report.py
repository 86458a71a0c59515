"""What audit, leakage and report tell a reader to type, and the page that comes of it, in real Chromium."""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext

from integration_tests.documents import DOCS, clone, once, typed

ACCESSIBILITY = Path(__file__).with_name("accessibility.js").read_text()
WIDTHS = {"phone": (390, 844), "desk": (1280, 800)}
DOCUMENTS = [DOCS / f"{name}.md" for name in ("audit", "leakage", "report")]
MORE = (  # than they ask: one feature by another, and two versions compared
    "hybrid analyze coupon temperature --by time --epsilon 1 --run questions",
    "hybrid evaluate coupon:1 --against 2 --epsilon 4 --run questions",
)


@dataclass(frozen=True)
class Typed:
    """What typing the documents' commands printed, and the page that the last one wrote."""

    printed: str
    page: Path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Typed:
    """One workspace for all of them: they begin alike."""
    folder = tmp_path_factory.mktemp("report")
    clone(folder)
    begun, last = once(*DOCUMENTS).rsplit("\n", 1)
    return Typed(typed(folder, "\n".join((begun, *MORE, last))), folder / "coupon.html")


@pytest.fixture(scope="module")
def page(written: Typed) -> Path:
    """The report."""
    return written.page


def test_audit_leakage_and_report_do_what_they_say(written: Typed):
    """At a claimed epsilon of 1 the bounds of six mechanisms lie in [0.4, 1), those of three bugs above it.

    All 16 features are recovered from a clear embedding; where none is, AUC is far below what it is with nothing of the
    device. The report costs nothing.
    """
    printed = written.printed
    rows = re.findall(r"│ (.+?) +│ +\d+ │ +(\d\.\d{3}) │.*│ +(no bug seen|seen) │", printed)
    assert [verdict for _, _, verdict in rows] == ["no bug seen"] * 6 + ["seen"] * 3, printed
    assert all(0.4 <= float(bound) < 1 for _, bound, _ in rows[:6]), printed
    assert all(float(bound) > 1 for _, bound, _ in rows[6:]), printed
    assert "From a clear embedding 16 of 16 features are recovered better than by guessing" in printed, printed
    (left,) = re.findall(r"over guessing; there noise costs .* of which (\d\.\d+) is left", printed)
    (without,) = re.findall(r"With nothing of the device AUC is (\d\.\d+)", printed)
    assert float(left) < float(without) - 0.05
    assert "Nothing was spent." in printed


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_read_the_report(
    page: Path, tab: Callable[..., AbstractContextManager[BrowserContext]], width: str, scheme: str, tmp_path_factory
):
    """Names, headings, contrast (WCAG AA), sizes, no sideways scroll, with all unfolded; nothing fetched.

    Text of pictures is at least 11 px high on a phone.
    """
    wide, high = WIDTHS[width]
    with tab(viewport={"width": wide, "height": high}, color_scheme=scheme) as context:
        requests: list[str] = []
        context.on("request", lambda request: requests.append(request.url))
        visit = context.new_page()
        visit.goto(page.as_uri())
        folder = Path(os.environ.get("HYBRID_SCREENSHOTS", tmp_path_factory.mktemp("screenshots")))
        visit.screenshot(path=folder / f"report-{width}-{scheme}.png", full_page=True)
        visit.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert visit.evaluate(ACCESSIBILITY) == []
        assert requests == [page.as_uri()]
        heights = visit.evaluate("""[...document.querySelectorAll("figure svg text")].map((each) =>
            parseFloat(getComputedStyle(each).fontSize) * each.ownerSVGElement.getBoundingClientRect().width
            / each.ownerSVGElement.viewBox.baseVal.width)""")
        assert min(heights) >= 11
        empty = visit.evaluate("[...document.querySelectorAll('.missing')].map((each) => each.parentElement.id)")
    assert empty == ["funnel", "drift"]


def test_the_report_holds_what_was_asked_and_what_it_cost(page: Path):
    """Two features, both versions, a comparison, all 16 features attacked, and each purpose that spent."""
    content = page.read_text()
    text = re.sub(r"<[^>]+>", "", content)
    assert "temperature by time" in text
    assert "<bdi>temperature</bdi>" in content
    assert "ROC" in text
    assert "Version 1 less version 2" in text
    assert "of 16 features are recovered" in text
    assert re.search(r"analyze: \d\.\d{3}", text)
    assert re.search(r"evaluate: \d\.\d{3}", text)
    assert re.search(r"train: \d\.\d{3}", text)
    assert "together ε" in text
