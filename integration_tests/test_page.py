"""`hybrid page`: a person's device in real Chromium, beside real Kafka, Triton, Feast, worker and gateway."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist

import httpx
import pandas as pd
import pytest
import torch
from playwright.sync_api import BrowserContext, Page, Request
from typer.testing import CliRunner

from feature_store.materialize import apply, materialize
from hybrid.cli import app
from hybrid.local import stack
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

WIDTHS = {"phone": (360, 800), "desk": (1280, 800)}
Tab = AbstractContextManager[BrowserContext]

STALL = Path(__file__).with_name("stall_model.py").read_text()
SHOPS = {"bakery": 1.0, "kiosk": 2.5, "cinema": 6.0}
TRAINING = TrainingRecord(kind="federated", run="r", population="p", users=9, examples=9, epsilon=8, delta=9e-4)
SECRETS = {"mood": "Missmutig-Vertrackt", "steps": "7319.25", "street": "Große Straße 7"}


@dataclass
class World:
    """One network, promoted to be merged on the server ("giving") and on the device ("stall")."""

    workspace: Workspace
    network: Network
    environment: dict[str, str]
    pages: dict[str, str]
    command: subprocess.Popen[str]

    def prediction(self, server: list[float], mood: str, steps: float, street: str) -> float:
        """What torch says of a device's features and what the server contributed."""
        inputs = self.network.model.device_features.inputs({"mood": [mood], "steps": [steps], "street": [street]})
        with torch.no_grad():
            device = self.network.device_program()(torch.from_numpy(inputs))
            head = self.network.head.eval()
            return float(torch.sigmoid(head(torch.tensor([server], dtype=torch.float32), device))[0])


def changed(text_: str, changes: dict[str, str]) -> str:
    """The text with each of these once exchanged for another."""
    for old, new in changes.items():
        assert text_.count(old) == 1, old
        text_ = text_.replace(old, new)
    return text_


def stall() -> str:
    """The shop's model with a text as request feature and a hashed device feature, without fallbacks."""
    more = {
        'request={"budget"': 'request={"time": Categorical(vocabulary=("7AM", "2PM")), "budget"',
        '"steps": Log1p(mean=8, std=2),': '"steps": Log1p(mean=8, std=2),\n        "street": Hash(buckets=31),',
        "Entity, HybridModel": "Entity, Hash, HybridModel",
        'training=Training(server_tower="federated"),': "",
    }
    return changed(STALL.partition("    serving=")[0] + ")\n", more)


def giving() -> str:
    """The same, merged on the server, noised, with the server's embedding for whoever asks."""
    release = 'merge="server",\n    release=Noised(clip=1.0, sigma=0.5),'
    names = {'"stall"': '"giving"', "sizes_v1": "sizes_v2", "Numeric, Privacy": "Noised, Numeric, Privacy"}
    serving = "\n    serving=Serving(contribution=True),"
    return changed(stall(), names | {'merge="device",': release + serving})


def promoted(folder: Path, environment: dict[str, str]) -> tuple[Workspace, Network]:
    """Two registered models with the same weights, promoted by the command: merged on the server, and on the device."""
    now = datetime.now(UTC)
    columns = {"shop_id": list(SHOPS), "size": list(SHOPS.values()), "event_timestamp": [now] * len(SHOPS)}
    pd.DataFrame(columns).to_parquet(folder / "sizes.parquet")
    workspace = Workspace(folder / ".hybrid")
    for name, text_ in (("giving", giving()), ("stall", stall())):
        file = folder / f"{name}.py"
        file.write_text(text_)
        model, registry = load_model(file), Registry(workspace)
        network = Network.build(model, seed=5)
        registry.register(model, network.description(), file)
        digest = registry.definition_hash(name)
        registry.create_version(name, weights=network.weights(), training=TRAINING, curves={}, expected_hash=digest)
        apply(model, workspace.feast)
        materialize(model, workspace.feast, now + timedelta(seconds=1))
        done = CliRunner().invoke(app, ["promote", name, "1", "production"], env=environment)
        assert done.exit_code == 0, done.output
    return workspace, network


def hybrid_page(model: str, environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """`hybrid page MODEL`, once it says where the page is."""
    command = [sys.executable, "-m", "hybrid", "page", model, "--port", "0", "--no-open"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **streams)
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.match(r"The page: (\S+)", line):
            return process, found[1]
    raise AssertionError("".join(said))


def interrupted(process: subprocess.Popen[str]) -> str:
    """What a command still said after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    return said


@pytest.fixture(scope="module")
def world(package: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    environment = {**os.environ, "HYBRID_HOME": str(folder / ".hybrid"), "HYBRID_CACHE": str(cache)}
    workspace, network = promoted(folder, environment)
    first, url = hybrid_page("giving", environment)  # starts the stack
    try:
        second, other = hybrid_page("stall", environment)  # uses it
        try:
            yield World(workspace, network, environment, {"giving": url, "stall": other}, first)
        finally:
            said = interrupted(second)
        assert "Stopped the local stack" not in said
        assert stack.status(workspace).phase == "ready"
    finally:
        said = interrupted(first)
    assert "Stopped the local stack." in said
    assert stack.status(workspace) is None


class Visit:
    """A person's visit of the page, with every request of the browser."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        context.on("request", self._requested)
        self.page = context.new_page()
        self.page.goto(url)
        self.wait()

    def _requested(self, request: Request) -> None:
        self.requests.append(request)

    def wait(self, asked: int = 1) -> None:
        """Until at least so many requests of this page load were answered, and none is on its way."""
        self.page.wait_for_function(
            """(asked) => {
                const said = [...document.querySelectorAll("#requests summary span")].map((each) => each.textContent);
                return said.length >= asked && !said.includes("not answered yet");
            }""",
            arg=asked,
        )

    def sent(self) -> list[bytes]:
        return [request.post_data_buffer for request in self.requests if request.method == "POST"]

    def set(self, **values: str) -> None:
        """Sets features by their labels; one change, then the answer."""
        for name, value in values.items():
            before = self.page.locator("#requests details").count()
            control = self.page.get_by_label(name, exact=True)
            if control.evaluate("(element) => element.tagName") == "SELECT":
                control.select_option(label=value)
            else:
                control.fill(value)
            with_more = "(n) => document.querySelectorAll('#requests details').length > n"
            self.page.wait_for_function(with_more, arg=before)
            self.wait()

    def probability(self) -> float:
        shown = self.page.locator("#probability").inner_text()
        assert shown != "–", self.page.locator("#outcome").inner_text()
        return float(shown.removesuffix(" %")) / 100

    def told(self, model: str, canary: bool) -> dict:
        """What the gateway tells devices to fetch, once that has a canary or has none."""
        # A loop, since Playwright's `wait_for_function` takes a promise itself for a yes.
        return self.page.evaluate(
            """async ([model, canary]) => {
                for (;;) {
                    const told = await (await fetch(`gateway/v2/models/${model}/rollout`)).json();
                    if ((told.canary !== null) === canary) return told;
                }
            }""",
            [model, canary],
        )


@pytest.mark.parametrize("model", ["giving", "stall"])
def test_nothing_that_a_person_sets_leaves_in_any_form_but_the_declared_one(
    world: World, tab: Callable[..., Tab], model: str
):
    """Every request of the browser, over a session in which all features are set, one after the other.

    All go to the page's own origin; their bodies hold entity and request features, and no device feature as text, as a
    number or as float32 or float64, nor its name, nor the embedding before its noise. Merged on the device they are
    the same whatever is set.
    """
    with tab() as context:
        visit = Visit(context, world.pages[model])
        visit.set(**SECRETS)
        sent = visit.sent()
        shown = visit.page.locator(".sent-hex").first.text_content()
        claim = visit.page.locator("#disclosure").inner_text()
        totals = visit.page.locator("#totals").inner_text()
        marked = visit.page.get_by_text("Marked: the embedding.").count()
    assert {httpx.URL(request.url).netloc for request in visit.requests} == {httpx.URL(visit.url).netloc}
    assert len(sent) == 1 + len(SECRETS)
    everything = b"".join(sent) + "".join(request.url for request in visit.requests).encode()
    hidden = [*SECRETS, *SECRETS.values(), "Glasklar", "Vertrackt", "Stra"]
    assert [secret for secret in hidden if secret.encode() in everything] == []
    network = world.network
    raw = {"mood": [SECRETS["mood"]], "steps": [float(SECRETS["steps"])], "street": [SECRETS["street"]]}
    inputs = network.model.device_features.inputs(raw)
    with torch.no_grad():
        embedding = network.device_program()(torch.from_numpy(inputs)).numpy()
    numbers = [float(SECRETS["steps"]), *embedding[0].tolist()]
    packed = [struct.pack(kind, number) for number in numbers for kind in ("<f", "<d", ">f", ">d")]
    assert [number for number in packed if number in everything] == []
    # What is shown is what left, byte for byte.
    body = sent[-1]
    lines = [re.match(r"[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", line)[1] for line in shown.splitlines()]
    assert bytes.fromhex(" ".join(lines)) == body
    header = json.loads(body[: body.rindex(b"}]}") + 3])
    names = [tensor["name"] for tensor in header["inputs"]]
    if model == "stall":
        assert names == ["entity", "time", "budget"]
        assert len(set(sent)) == 1
        assert claim.startswith("Nothing of the device")
        assert marked == 0
    else:
        assert names == ["entity", "time", "budget", "device_embedding"]
        assert len({each[-16:] for each in sent}) == len(sent)  # fresh noise
        assert marked > 0
        assert "clipped to a norm of 1, with Gaussian noise of 0.5" in claim
        epsilon = float(re.search(r"local epsilon of ([\d.]+) at delta 0.0001\.", claim)[1])
        assert delta_of(epsilon + 0.05) < 1e-4 < delta_of(epsilon - 0.05)
        assert "4 requests" in totals


def delta_of(epsilon: float) -> float:
    """Of one release: norms up to 1 and noise of 0.5 are mu = 2 / 0.5 = 4 (Balle and Wang 2018, theorem 8)."""
    cdf, mu = NormalDist().cdf, 4.0
    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def test_a_device_that_merges_predicts_what_torch_predicts(world: World, tab: Callable[..., Tab]):
    """The prediction that is shown and kept, from the server's embedding that is kept beside it, to 1e-5."""
    with tab() as context:
        visit = Visit(context, world.pages["stall"])
        visit.set(**SECRETS, shop_id="cinema")
        shown = visit.probability()
        kept = export_of(visit.page)[-1]
        assert "Merged on this device by version 1" in visit.page.locator("#outcome").inner_text()
    expected = world.prediction(kept["server"], SECRETS["mood"], float(SECRETS["steps"]), SECRETS["street"])
    assert kept["prediction"] == pytest.approx(expected, abs=1e-5)
    assert shown == pytest.approx(expected, abs=6e-4)  # a tenth of a per cent, rounded
    assert (kept["entity"], kept["features"]["street"]) == ("cinema", SECRETS["street"])


def export_of(page: Page) -> list[dict]:
    """What the page's export holds."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all as a file").click()
    return json.loads(Path(download.value.path()).read_text())["inferences"]


def test_the_store_survives_a_reload_takes_a_label_and_is_empty_once_forgotten(world: World, tab: Callable[..., Tab]):
    """After the reload the form is as it was; "Yes" joins the latest prediction; forgetting leaves no record."""
    with tab() as context:
        visit = Visit(context, world.pages["stall"])
        visit.set(mood="Zufrieden-Glasklar")
        visit.page.get_by_role("button", name="Yes", exact=True).click()
        visit.page.get_by_text("Kept with this prediction, here.").wait_for()
        visit.page.reload()
        visit.wait()
        assert visit.page.get_by_label("mood").evaluate("(e) => e.selectedOptions[0].text") == "Zufrieden-Glasklar"
        kept = export_of(visit.page)
        assert [each["label"] for each in kept] == [None, 1, None]
        visit.page.get_by_role("button", name="Forget all").click()
        visit.page.get_by_text("All is forgotten").wait_for()
        assert export_of(visit.page) == []
        assert visit.page.locator("#records").inner_text() == ""
        # The key that was deleted is this model's alone: another one's page of this origin still reads what it kept.
        names = visit.page.evaluate("async () => (await indexedDB.databases()).map(({ name }) => name)")
        assert [name for name in names if "key" in name] == ["hybrid-page-key-stall"]


def answering(refusal: tuple | None):
    """A route that answers with (status, JSON, headers), or not at all."""
    if refusal is None:
        return lambda route: route.abort()
    status, document, headers = refusal
    return lambda route: route.fulfill(status=status, json=document, headers=headers)


def test_what_goes_wrong_is_a_sentence_with_what_to_do(world: World, tab: Callable[..., Tab]):
    """No gateway, another shop, a version that is no longer served, a limit: each as a gateway says it."""
    refusals = {
        "cannot be reached": None,
        "knows nothing about what you named": (404, {"error": "no row", "code": "unknown_entity"}, {}),
        "must fetch a newer bundle": (410, {"error": "gone", "code": "update_required"}, {}),
        "ask again in 7 seconds": (429, {"error": "too fast", "code": "rate_limited"}, {"Retry-After": "7"}),
        "does not use": (200, {"outputs": []}, {}),
    }
    for text_, refusal in refusals.items():
        # Chromium itself writes a line to the console about each such answer.
        with tab(expected="Failed to load resource") as context:
            visit = Visit(context, world.pages["giving"])
            visit.page.route("**/infer", answering(refusal))
            visit.page.get_by_role("button", name="Ask now").click()
            alert = visit.page.get_by_role("alert")
            alert.get_by_text(text_).wait_for()
            assert visit.page.locator("#probability").inner_text() == "–"
            assert not visit.page.locator("#happened").is_visible(), "of no prediction nothing can have happened"
            visit.page.unroute("**/infer")
            alert.get_by_role("button").click()
            visit.page.wait_for_function("() => document.getElementById('notice').hidden")
            assert visit.probability() > 0


ACCESSIBILITY = Path(__file__).with_name("accessibility.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_use_the_page(world: World, tab: Callable[..., Tab], width: str, scheme: str, tmp_path_factory):
    """Names, headings, contrast (WCAG AA), sizes, no sideways scroll; all by keyboard, in the order of the page."""
    wide, high = WIDTHS[width]
    options = {"viewport": {"width": wide, "height": high}, "color_scheme": scheme, "reduced_motion": "reduce"}
    with tab(**options) as context:
        visit = Visit(context, world.pages["giving"])
        visit.set(mood="Missmutig-Vertrackt")
        visit.page.get_by_text("Look at them").click()
        assert visit.page.evaluate(ACCESSIBILITY) == []
        folder = Path(os.environ.get("HYBRID_SCREENSHOTS", tmp_path_factory.mktemp("screenshots")))
        visit.page.screenshot(path=folder / f"page-{width}-{scheme}.png", full_page=True)
        assert visit.page.evaluate("getComputedStyle(document.getElementById('fill')).transitionDuration") == "0s"
        visit.page.evaluate("document.querySelector('.skip').focus()")
        focused = []
        for _ in range(80):
            visit.page.keyboard.press("Tab")
            focused.append(
                visit.page.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 20)")
            )
            if focused[-1] == "consent":
                break
        order = ["own-0", "own-1", "own-2", "example", "clear", "ask", "live", "entity", "export", "forget", "consent"]
        assert [name for name in focused if name in order] == order
        visit.page.keyboard.press("Space")
        visit.page.get_by_text("it is in use: this page is being looked at").wait_for()
        assert "you have not agreed" not in visit.page.locator("#reasons").inner_text()


def test_only_the_page_itself_may_ask(world: World):
    """Another site's page, a name that points here, another path of the gateway, a body too large: refused."""
    url = world.pages["giving"]
    infer = f"{url}gateway/v2/models/giving/versions/1/infer"

    def status(method: str, at: str, **options: object) -> int:
        return httpx.request(method, at, trust_env=False, **options).status_code

    assert status("GET", url) == 200
    assert status("GET", url, headers={"Host": "evil.example"}) == 403
    assert status("POST", infer, content=b"{}", headers={"Origin": "https://evil.example"}) == 403
    assert status("POST", infer, content=b"{}", headers={"Origin": "null"}) == 403
    assert status("GET", url, headers={"Sec-Fetch-Site": "cross-site"}) == 403
    assert status("POST", infer, content=bytes((1 << 20) + 1)) == 413
    assert status("POST", infer, content=iter([b"{}"])) == 413  # chunked: it does not say how long
    assert status("POST", infer, content=b"{}") == 400  # the gateway's own answer
    for path in ("v2", "openapi.json", "v2/models/giving/../../../metrics", "v2/repository/index", "v2/models/x/ready"):
        assert status("GET", f"{url}gateway/{path}") == 404
    for path in ("../hybrid/page.py", "%2e%2e/package.json", "node_modules", "app.js/"):
        assert status("GET", f"{url}{path}") == 404


def test_the_page_allows_itself_its_own_origin_and_nothing_else(world: World):
    """Content-Security-Policy and Permissions-Policy of every answer, the gateway's among them."""
    for path in ("", "app.js", "config.json", "nothing", "gateway/v2/health/ready"):
        headers = httpx.get(world.pages["giving"] + path, trust_env=False).headers
        policy = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self' 'wasm-unsafe-eval'"
        assert {policy[name] for name in ("style-src", "connect-src", "img-src")} == {"'self'"}
        assert "geolocation=()" in headers["Permissions-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers


def test_a_page_that_cannot_be_is_a_sentence(world: World):
    """A model that is not promoted; a port that is taken."""
    taken = httpx.URL(world.pages["giving"]).port
    for arguments, said in (
        (["nobody"], "model 'nobody' is not promoted; promoted are ['giving', 'stall']"),
        (["giving", "--port", str(taken), "--no-open"], f"port {taken} cannot be used"),
    ):
        command = [sys.executable, "-m", "hybrid", "page", *arguments]
        done = subprocess.run(command, env=world.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"error: {said}")


def test_a_browser_takes_a_canary_and_leaves_it_at_a_signed_word(world: World, tab: Callable[..., Tab]):
    """All devices are to fetch version 2; a gateway's own word does not take it back, `hybrid rollback` does.

    The bundle before it, kept in the browser, goes on; and version 2 is not installed again, whoever offers it.
    """
    registry, digest = Registry(world.workspace), Registry(world.workspace).definition_hash("giving")
    about = {"training": TRAINING, "curves": {}, "expected_hash": digest}
    registry.create_version("giving", weights=world.network.weights(), **about)

    def rolled(*words: str) -> None:
        done = CliRunner().invoke(app, list(words), env=world.environment)
        assert done.exit_code == 0, done.output

    def version(visit: Visit) -> str:
        return re.search(r"version (\d+),", visit.page.locator("#about").inner_text())[1]

    with tab() as context:
        visit = Visit(context, world.pages["giving"])
        assert version(visit) == "1"
        rolled("rollout", "giving", "2", "--canary", "100%")
        document = visit.told("giving", canary=True)
        visit.page.reload()
        visit.wait()
        assert (version(visit), visit.probability() > 0) == ("2", True)
        forged = document | {"canary": None, "halted": ["AAAA" * 40]}
        visit.page.route("**/rollout", lambda route: route.fulfill(json=forged))
        visit.page.reload()
        visit.wait()
        assert version(visit) == "2", "an older default is refused, and what nobody signed counts for nothing"
        visit.page.unroute("**/rollout")
        rolled("rollback", "giving", "--reason", "recall fell")
        visit.told("giving", canary=False)
        visit.page.reload()
        visit.wait()
        assert (version(visit), visit.probability() > 0) == ("1", True)
        visit.page.route("**/rollout", lambda route: route.fulfill(json=document))
        visit.page.reload()
        visit.wait()
        assert version(visit) == "1"
