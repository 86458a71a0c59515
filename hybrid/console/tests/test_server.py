import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from starlette.testclient import TestClient

from hybrid.console.health import Health
from hybrid.console.pages import Model
from hybrid.console.server import MAX_BODY, Console, Place, application
from hybrid.console.sessions import ATTEMPTS, SESSION_S, Sessions
from hybrid.console.steps import Seen, Step
from hybrid.console.work import Desk
from hybrid.deployment import Change, Window
from hybrid.errors import ConfigError, NotFound
from hybrid.report.tests.examples import facts
from serving.testing import deployment

URL = "http://127.0.0.1:18010"
PASSWORD = "correct horse battery"
EVIL = "<script>alert(1)</script>\"'&"
HERE = {"Origin": URL, "Sec-Fetch-Site": "same-origin"}


class World:
    """A rollout in memory, and what was done to it."""

    def __init__(self) -> None:
        self.window = Window(versions=(deployment(1),)).promote(deployment(2))
        self.done: list[Step] = []
        self.error: Exception | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()

    def perform(self, step: Step, seen: Seen) -> str:
        self.goes_on.wait(10)
        seen.check(self.window)
        if self.error:
            raise self.error
        self.done.append(step)
        return f"{step.name} was done"

    def model(self, name: str) -> Model:
        if name != "shop":
            raise NotFound(f"no model {name!r} is registered")
        change = Change(at=datetime(2026, 11, 29, tzinfo=UTC), action="halt", version=9, reason=EVIL, default=2)
        found = facts(trainings={n: facts().trainings[min(n, 2)] for n in (1, 2, 4)})
        return Model("shop", self.window, [change], Health(unread=(EVIL,)), self.desk.latest("shop"), found)

    def seen(self, name: str) -> Seen:
        return self.model(name).seen


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    with Desk(world.perform) as world.desk:
        yield world
        world.goes_on.set()


def browser(world: World, *, tls: bool = False, url: str = URL) -> TestClient:
    models = lambda: [replace(world.model("shop"), facts=None)]  # noqa: E731
    console = Console(models, world.model, world.seen, world.desk, Sessions(PASSWORD))
    app = application(console, Place(frozenset({"127.0.0.1", "localhost"}), tls))
    return TestClient(app, base_url=url, follow_redirects=False, raise_server_exceptions=False)


@pytest.fixture
def client(world: World) -> TestClient:
    """Logged in."""
    client = browser(world)
    answer = client.post("/login", data={"password": PASSWORD}, headers=HERE)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    return client


def hidden(page: str, name: str) -> str:
    return re.search(rf'name="{name}" value="([^"]*)"', page)[1]


def ask(client: TestClient, kind: str = "canary", **form: str):
    form = {"version": "4", "share": "5", "reason": "r", "csrf": hidden(client.get("/").text, "csrf")} | form
    return client.post(f"/models/shop/{kind}", data=form, headers=HERE)


def confirm(client: TestClient, page: str, **form: str):
    form = {"csrf": hidden(page, "csrf"), "token": hidden(page, "token")} | form
    return client.post("/models/shop/confirm", data=form, headers=HERE)


def test_a_button_asks_twice(client: TestClient, world: World):
    """The first answer asks in words, and nothing is done; the second does it, once."""
    asked = ask(client)
    assert asked.status_code == 200
    assert "5 % of devices fetch shop:4 in place of 2" in asked.text
    assert world.done == []
    answer = confirm(client, asked.text)
    assert (answer.status_code, answer.headers["location"]) == (303, "/models/shop")
    assert world.done == [Step("canary", "shop", 4, share=0.05)]
    assert "shop:4 was done" in client.get("/models/shop").text
    again = confirm(client, asked.text)
    assert again.status_code == 409
    assert "each counts once" in again.text
    assert len(world.done) == 1


@pytest.mark.parametrize(
    ("kind", "form", "step"),
    [
        ("promote", {}, Step("promote", "shop", 4)),
        ("halt", {"version": "2", "reason": EVIL}, Step("halt", "shop", 2, reason=EVIL)),
    ],
)
def test_each_kind_of_step_is_done_as_it_was_asked(client: TestClient, world: World, kind, form, step):
    """Also a reason with quotes and brackets in it, which the page shows as text."""
    asked = ask(client, kind, **form)
    assert "<script>" not in asked.text
    assert confirm(client, asked.text).status_code == 303
    assert world.done == [step]


def test_a_rollout_that_was_changed_between_both_is_left_alone(client: TestClient, world: World):
    """Somebody started another canary: it is told, and the yes is used up."""
    asked = ask(client)
    world.window = world.window.try_out(deployment(3), 0.5)
    answer = confirm(client, asked.text)
    assert answer.status_code == 409
    assert "now: default 2, canary 3 on 50 % of devices" in answer.text
    world.window = world.window.promote(deployment(2))
    assert confirm(client, asked.text).status_code == 409
    assert world.done == []


def test_what_fails_says_why_and_one_thing_is_done_at_a_time(client: TestClient, world: World, monkeypatch):
    """While a step is at work another is refused, and the page follows it; its error stands on the page."""
    monkeypatch.setattr("hybrid.console.work.QUICK_S", 0.0)
    world.goes_on.clear()
    world.error = ConfigError("shop:4 cannot be exported")
    first, second = ask(client), ask(client, "halt", version="2")
    assert confirm(client, first.text).status_code == 303
    page = client.get("/models/shop")
    assert "At work" in page.text
    assert page.headers["refresh"] == "2"
    assert "<button" not in page.text.partition("Rollout")[2].partition("Serving health")[0]
    refused = confirm(client, second.text)
    assert refused.status_code == 409
    assert "one thing at a time" in refused.text
    world.goes_on.set()
    for _ in range(1000):
        page = client.get("/models/shop")
        if "At work" not in page.text:
            break
    assert "shop:4 cannot be exported" in page.text
    assert "refresh" not in page.headers


def test_an_error_that_nobody_foresaw_is_named_and_not_told(client: TestClient, world: World, caplog):
    """Its text may name what no page should; the console goes on."""
    world.error = RuntimeError("row 7 of somebody")
    assert confirm(client, ask(client).text).status_code == 303
    page = client.get("/models/shop").text
    assert "(RuntimeError)" in page
    assert "somebody" not in page + caplog.text
    assert "test_server.py" in caplog.text


def test_nothing_is_shown_or_done_for_who_is_not_logged_in(world: World):
    """Every page, also of a model that there is none of, leads to the log-in, which names nothing."""
    stranger = browser(world)
    for path in ("/", "/models/shop", "/models/other"):
        answer = stranger.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    for kind in ("canary", "promote", "halt", "confirm"):
        answer = stranger.post(f"/models/shop/{kind}", data={"version": "4"}, headers=HERE)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "shop" not in stranger.get("/login").text
    assert world.done == []


def test_a_session_is_over_after_its_log_out(client: TestClient):
    """Its cookie goes, and would open nothing."""
    cookie = client.cookies["hybrid-console"]
    out = client.post("/logout", data={"csrf": hidden(client.get("/").text, "csrf")}, headers=HERE)
    assert out.headers["location"] == "/login"
    assert "hybrid-console" not in client.cookies
    client.cookies.set("hybrid-console", cookie)
    assert client.get("/").status_code == 303


def test_a_wrong_password_is_refused_and_many_are_not_looked_at(world: World, caplog):
    """403, then 429 with when to try again; no log holds what was typed."""
    stranger = browser(world)
    for _ in range(ATTEMPTS):
        assert stranger.post("/login", data={"password": "my other password"}, headers=HERE).status_code == 403
    answer = stranger.post("/login", data={"password": PASSWORD}, headers=HERE)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert "set-cookie" not in answer.headers
    assert "other password" not in caplog.text


@pytest.mark.parametrize("tls", [False, True])
def test_the_cookie_is_for_this_console_alone(world: World, tls: bool):
    """No script reads it, no other site sends it, it ends with its session; under TLS no plain request has it."""
    url = URL.replace("http:", "https:") if tls else URL
    client = browser(world, tls=tls, url=url)
    answer = client.post("/login", data={"password": PASSWORD}, headers=HERE | {"Origin": url})
    parts = answer.headers["set-cookie"].lower().split("; ")
    assert {"httponly", "samesite=strict", "path=/", f"max-age={SESSION_S:.0f}"} <= set(parts)
    assert ("secure" in parts) == tls
    assert parts[0].startswith("__host-hybrid-console=" if tls else "hybrid-console=")
    assert "strict-transport-security" not in answer.headers  # it would be for all ports of the host
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:18010"},
        {"Host": "127.0.0.1:18010@evil.example"},
        {"Host": ""},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ],
)
def test_a_name_that_others_made_to_point_here_is_refused(client: TestClient, headers):
    """For each request, logged in or not; but a probe is answered, by whatever address."""
    for path in ("/", "/login"):
        assert client.get(path, headers=headers).status_code == 403
    answer = client.post("/login", data={"password": PASSWORD}, headers=HERE | headers)
    assert answer.status_code == 403
    assert client.get("/health", headers=headers).text == "ready\n"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8080"},  # the same site, by its cookies, and another origin
        {"Origin": "https://127.0.0.1:18010"},
        {"Origin": "http://localhost:18010"},
        {"Origin": "https://evil.example"},
        {"Origin": URL, "Sec-Fetch-Site": "same-site"},
        {"Origin": URL, "Sec-Fetch-Site": "cross-site"},
        {"Origin": URL, "Sec-Fetch-Site": "none"},
    ],
)
def test_a_form_of_another_origin_does_nothing(client: TestClient, world: World, headers):
    """Whatever cookie and token come with it."""
    asked = ask(client).text
    form = {"csrf": hidden(asked, "csrf"), "token": hidden(asked, "token"), "version": "4", "share": "5"}
    for path in ("/models/shop/canary", "/models/shop/confirm", "/logout", "/login"):
        assert client.post(path, data=form, headers=headers).status_code == 403
    assert world.done == []
    assert client.get("/").status_code == 200


def test_a_form_without_its_sessions_token_does_nothing(client: TestClient, world: World):
    """Neither question nor deed nor log-out; another session's token is none."""
    other = browser(world)
    other.cookies = client.cookies
    asked = ask(client).text
    for csrf in ("", "x" * 43):
        assert ask(client, csrf=csrf).status_code == 403
        assert confirm(client, asked, csrf=csrf).status_code == 403
        assert client.post("/logout", data={"csrf": csrf}, headers=HERE).status_code == 403
    assert world.done == []


def test_a_yes_is_of_the_session_that_was_asked(client: TestClient, world: World):
    """The token of a question is none in another session of the same console."""
    asked = ask(client).text
    first = client.cookies["hybrid-console"]
    client.post("/login", data={"password": PASSWORD}, headers=HERE)
    assert client.cookies["hybrid-console"] != first
    csrf = hidden(client.get("/").text, "csrf")
    assert confirm(client, asked, csrf=csrf).status_code == 409
    assert world.done == []


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"a" * (MAX_BODY + 1), "application/x-www-form-urlencoded", 413),
        (b"a=1&a=2", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"a%d=1" % n for n in range(20)), "application/x-www-form-urlencoded", 400),
        (b"\xff=1", "application/x-www-form-urlencoded", 400),
        (b"a=%ff", "application/x-www-form-urlencoded", 400),
        (b"{}", "application/json", 415),
        (b"", "multipart/form-data; boundary=x", 415),
    ],
)
def test_a_body_that_is_no_small_form_is_refused(client: TestClient, content, kind, status):
    """With a page in words."""
    for path in ("/models/shop/canary", "/login"):
        answer = client.post(path, content=content, headers=HERE | {"Content-Type": kind})
        assert answer.status_code == status
        assert "<h1>" in answer.text


def test_unknown_paths_models_and_methods_are_refused_in_words(client: TestClient):
    """404 and 405; a model's name is a name, and what nobody can do is 400."""
    for path in ("/nothing", "/models", "/models/other", "/models/..%2f..%2fetc", "/models/shop/confirm/x"):
        assert client.get(path).status_code == 404, path
    assert client.request("DELETE", "/models/shop", headers=HERE).status_code == 405
    assert client.get("/models/shop/confirm").status_code == 405
    assert ask(client, version="2").status_code == 400
    assert "shop:2 is the default already" in ask(client, version="2").text


def test_every_answer_forbids_what_no_page_needs(client: TestClient):
    """Pages, refusals and the probe: one style by its digest, no script, no frame, no other origin, nothing kept."""
    for path in ("/", "/models/shop", "/login", "/nothing", "/health"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        for part in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"):
            assert part in policy
        assert "unsafe" not in policy
        assert "script" not in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
    assert client.get("/", headers={"Host": "evil.example"}).headers["cache-control"] == "no-store"


def test_text_of_others_is_text_on_every_page(client: TestClient):
    """A reason and a process's error with `<script>` in them are shown as they are written."""
    for path in ("/", "/models/shop"):
        page = client.get(path).text
        assert "<script" not in page
        assert "&lt;script&gt;alert(1)" in page
        assert not re.search(r"<[^>]+\son\w+=", page)
