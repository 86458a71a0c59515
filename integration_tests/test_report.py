"""`hybrid report` of a trained, asked and attacked coupon model, in real Chromium."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext

ROOT = Path(__file__).parents[1]
ACCESSIBILITY = Path(__file__).with_name("accessibility.js").read_text()
WIDTHS = {"phone": (390, 844), "desk": (1280, 800)}
COMMANDS = (
    "examples.coupon.prepare population",
    "hybrid population import examples/coupon/data/population.parquet --user user --name coupon",
    "examples.coupon.prepare offers --fold 1/5",
    "hybrid register examples/coupon/model.py",
    "hybrid features apply coupon",
    "hybrid analyze coupon label",
    "hybrid analyze coupon age --epsilon 1 --run questions",
    "hybrid analyze coupon temperature --by time --epsilon 1 --run questions",
    "hybrid train coupon --epsilon 8 --fold 1/5 --rounds 20",
    "hybrid train coupon --epsilon 4 --fold 1/5 --rounds 20",
    "hybrid evaluate coupon:1 --against 2 --epsilon 4 --run questions",
    "hybrid audit inversion coupon --version 1 --rows 100 --sigma 0 --sigma 1",
    "hybrid report coupon --output coupon.html",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, after all of the commands."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.parquet", "__pycache__"))
    environment = {**os.environ, "HYBRID_HOME": str(folder / ".hybrid")}
    for command in COMMANDS:
        words = [sys.executable, "-m", *command.split()]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return folder / "coupon.html"


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
    assert "Version 1 less version 2" in text
    assert "of 16 features are recovered" in text
    assert re.search(r"analyze: \d\.\d{3}", text)
    assert re.search(r"evaluate: \d\.\d{3}", text)
    assert re.search(r"train: \d\.\d{3}", text)
    assert "together ε" in text
