"""`hybrid console` in real Chromium: two versions that were promoted one after the other, and no process of serving."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page

from hybrid.bundle import trusted_key
from hybrid.deployment import Window, history
from hybrid.export.promote import deployment_of
from hybrid.local.process import free_ports
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.rollout import Rollout
from hybrid.spec import Training, load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

ACCESSIBILITY = Path(__file__).with_name("accessibility.js").read_text()
MODEL = Path(__file__).with_name("stall_model.py").read_text().partition("    serving=")[0] + ")\n"  # without fallbacks
WIDTHS = {"phone": (360, 800), "desk": (1280, 800)}
PASSWORD = "correct horse battery"
REASON = 'recall <b>fell</b> & "more"'
TRAINED = TrainingRecord(
    kind="federated",
    run="monday",
    population="stall",
    users=90,
    examples=900,
    settings=Training(server_tower="frozen"),
    epsilon=1.5,
    delta=1e-4,
    unit="user",
    protects="device features",
    oracle={"auc": 0.7654},
)
Tab = Callable[..., AbstractContextManager[BrowserContext]]


@dataclass
class Served:
    """A console, its workspace, and a port where no metrics are."""

    workspace: Workspace
    url: str
    silent: int


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("console")
    environment = {**os.environ, "HYBRID_HOME": str(folder / ".hybrid"), "HYBRID_CONSOLE_PASSWORD": PASSWORD}
    workspace = Workspace(folder / ".hybrid")
    (folder / "stall.py").write_text(MODEL)
    model, registry = load_model(folder / "stall.py"), Registry(workspace)
    for seed in (1, 2):
        network = Network.build(model, seed=seed)
        registry.register(model, network.description(), folder / "stall.py")
        trained = {"weights": network.weights(), "training": TRAINED, "curves": {"oracle_auc": [(1, 0.7), (2, 0.76)]}}
        registry.create_version("stall", **trained, expected_hash=registry.definition_hash("stall"))
    # Both served, without an export, which takes a minute and nobody would load: 2 before 1.
    digest, names = registry.definition_hash("stall"), ("stall_server_tower", "stall_head")
    for version in (2, 1):
        deployment_of(network, version, digest, names).write(workspace.deployments)
    registry.set_alias("stall", 1, "production")
    (silent,) = free_ports(1)
    command = [sys.executable, "-m", "hybrid", "console", "--port", "0"]
    command += ["--metrics", f"http://127.0.0.1:{silent}/metrics"]
    with (folder / "console.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        said = process.stdout.readline()
        url = re.match(r"The console: (\S+)", said)[1]
        httpx.get(f"{url}health").raise_for_status()
        yield Served(workspace, url, silent)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        log_ = (folder / "console.log").read_text()
        assert PASSWORD not in log_
        assert "internal error" not in log_
    assert process.returncode == 0


def logged_in(context: BrowserContext, console: Served) -> Page:
    page = context.new_page()
    page.goto(console.url)
    page.get_by_label("Password of the team").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Models").wait_for()
    return page


def model_page(page: Page) -> None:
    """Once all of it is read, which takes a while at first."""
    page.get_by_role("link", name="stall").first.click()
    page.get_by_role("heading", name="stall", level=1, exact=True).wait_for()
    while page.get_by_text("It is being read").count():
        page.reload()


def everybody_can_read(page: Page, name: str, folder: Path) -> None:
    page.screenshot(path=folder / f"console-{name}.png", full_page=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate(ACCESSIBILITY) == [], name


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("HYBRID_SCREENSHOTS", tmp_path_factory.mktemp("screenshots")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_read_every_page(console: Served, tab: Tab, screenshots: Path, width: str, scheme: str):
    """Names, headings, contrast (WCAG AA), sizes, no sideways scroll, no message of the browser; nothing of elsewhere.

    What cannot be read of serving is said in words. A form that is closed leads back; a log-out ends it.
    """
    wide, high = WIDTHS[width]
    with tab(viewport={"width": wide, "height": high}, color_scheme=scheme) as context:
        requests: list[str] = []
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.goto(console.url)
        everybody_can_read(page, f"login-{width}-{scheme}", screenshots)
        page.close()
        page = logged_in(context, console)
        assert f"http://127.0.0.1:{console.silent}/metrics cannot be read: ConnectError" in page.inner_text("main")
        everybody_can_read(page, f"models-{width}-{scheme}", screenshots)
        model_page(page)
        everybody_can_read(page, f"model-{width}-{scheme}", screenshots)
        text = page.inner_text("main")
        for said in ("0.765", "hybrid funnel stall", "hybrid drift stall", "1.500", "device features, per user"):
            assert said in text, said
        page.get_by_role("button", name="Start a canary").click()
        page.get_by_role("heading", name="Start stall:2 as a canary?").wait_for()
        everybody_can_read(page, f"question-{width}-{scheme}", screenshots)
        page.get_by_role("link", name="No, go back").click()
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("heading", name="Hybrid console").wait_for()
        page.goto(f"{console.url}models/stall")
        page.get_by_label("Password of the team").wait_for()
    assert all(url.startswith(console.url) for url in requests if not url.startswith("data:"))
    assert [change.action for change in history(console.workspace.deployments, "stall")] == ["promote", "promote"]


def test_a_canary_is_started_and_taken_back_with_buttons_that_ask_twice(console: Served, tab: Tab, screenshots: Path):
    """On a phone: tried out, let grow and taken back; the history has each, devices believe it."""
    workspace = console.workspace
    with tab(viewport={"width": 360, "height": 800}) as context:
        page = logged_in(context, console)
        model_page(page)
        page.get_by_label("Share of devices, %").fill("5")
        page.get_by_role("button", name="Start a canary").click()
        page.get_by_text("5 % of devices fetch stall:2 in place of 1, the default.").wait_for()
        page.get_by_role("button", name="Yes, start it with 5 % of devices").click()
        page.get_by_text("✓ Done").wait_for()
        assert "stall:2 is the canary: 5% of devices fetch it, the others 1" in page.inner_text("main")
        everybody_can_read(page, "canary", screenshots)
        page.get_by_label("Share of devices, %").fill("20")
        page.get_by_role("button", name="Let more devices in").click()
        page.get_by_role("button", name="Yes, 20 % of devices").click()
        page.get_by_text("✓ Done").wait_for()
        assert Registry(workspace).model("stall").aliases == {"production": 1, "canary": 2}
        page.get_by_label("Why (people and devices are told)").fill(REASON)
        page.get_by_role("button", name="Take a version back").click()
        page.get_by_text("Version 2 is used up").wait_for()
        assert Window.read(workspace.deployments / "stall.json").canary.share == 0.2, "nothing before the second yes"
        page.get_by_role("button", name="Yes, take stall:2 back for good").click()
        page.get_by_text("✓ Done").wait_for()
        told = page.inner_text(".history")
        everybody_can_read(page, "taken-back", screenshots)
    assert re.findall(r"(canary|taken back|promoted)\s+(\d)\s+(\S+)", told) == [
        ("taken back", "2", "none"),
        ("canary", "2", "20"),
        ("canary", "2", "5"),
        ("promoted", "1", "all"),
        ("promoted", "2", "all"),
    ]
    assert REASON in told
    window = Window.read(workspace.deployments / "stall.json")
    assert (window.default.version, window.canary) == (1, None)
    assert Rollout.of(window).halts(trusted_key(workspace.keys / "bundle-signing.pub")) == {2: REASON}
    assert Registry(workspace).model("stall").aliases == {"production": 1}
