"""The console's pages as HTML: what they show comes in, text goes out, and nothing is asked or done here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from importlib.resources import files
from xml.etree.ElementTree import Element

from hybrid.console.health import Health
from hybrid.console.steps import MOST_REASON, Question, Seen, Step
from hybrid.console.work import Work
from hybrid.deployment import Change, Window
from hybrid.gates import Counted, quantile
from hybrid.report import page as report
from hybrid.report.elements import NONE, Child, Children, badge, e, missing, name, table, text
from hybrid.report.facts import Facts

ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath fill='%230060a8' "
    "d='M2 2h5v12H2zM9 6h5v8H9z'/%3E%3C/svg%3E"
)
SHOWN = ("versions", "quality", "comparison", "curves", "funnel", "drift", "privacy")  # of the report's sections
STEPS = (1, 5, 10, 25, 50, 100)  # %, that are proposed
SLOW_LEVEL = 0.95
MANY = 0.01  # of requests without an answer, or rows by a fallback
RECENT = timedelta(hours=1)
MOST_CHANGES = 20  # of a history
SAID = {"promote": "promoted", "halt": "taken back"}  # of a history's actions


@dataclass(frozen=True)
class Model:
    """What the console shows of one model.

    Attributes:
        name: of it.
        window: what is served; None: nothing yet.
        changes: its history, the oldest first.
        health: of its serving.
        work: what the console did to it last.
        facts: what a report says of it; None: that is being read, or cannot be.
        why: why it cannot be.
    """

    name: str
    window: Window | None
    changes: Sequence[Change]
    health: Health
    work: Work | None = None
    facts: Facts | None = None
    why: str = ""

    @property
    def seen(self) -> Seen:
        """Its rollout."""
        return Seen.of(self.window)

    @property
    def busy(self) -> bool:
        """Whether something is at work on it."""
        return self.work is not None and self.work.ended is None

    @property
    def launchable(self) -> list[int]:
        """Versions that can be given to devices, the latest first: no references, and none that was taken back."""
        trainings = self.facts.trainings if self.facts else {}
        halted = {one.version for one in self.window.halted} if self.window else set()
        found = [version for version, record in trainings.items() if record.kind == "federated"]
        return sorted(set(found) - halted - {self.seen.default}, reverse=True)


@cache
def style() -> str:
    """Of every page: the same as long as the process lasts, since its digest is allowed with each."""
    return report.style() + files(__package__).joinpath("console.css").read_text()


def login(said: str = "") -> str:
    """For who is not logged in; it names nothing of what is behind it."""
    form = e(
        "form",
        e("label", "Password of the team", for_="password"),
        e(
            "input",
            id="password",
            name="password",
            type="password",
            autocomplete="current-password",
            required="",
            autofocus="",
        ),
        e("button", "Log in", type="submit", class_="main"),
        method="post",
        action="/login",
        class_="card",
    )
    return _document("Log in", e("main", e("h1", "Hybrid console"), *_problem(said), form, class_="narrow"))


def overview(models: Sequence[Model], csrf: str, now: datetime) -> str:
    """Every model in a line."""
    listed: Element = e("ul", *(_line(model) for model in models), class_="models")
    if not models:
        listed = missing("No model is registered.", "hybrid register FILE")
    main = e("main", e("h1", "Models"), _when(now, "/"), listed)
    counts = e("footer", e("p", badge("public"), " Numbers on this page are known to the server anyway."))
    return _document("Models", _top(csrf), main, counts)


def model_page(model: Model, csrf: str, now: datetime) -> str:
    """All about one model, and what can be done to its rollout."""
    shown = [
        ("rollout", "Rollout", list(_rollout(model, csrf))),
        ("health", "Serving health", list(_health(model.health))),
    ]
    facts = model.facts
    if facts is None:
        shown.append(("more", "What is known of the model", [_unread(model.why)]))
    else:
        sections = {anchor: (title, section) for anchor, title, section in report.SECTIONS}
        shown += [(anchor, sections[anchor][0], list(sections[anchor][1](facts))) for anchor in SHOWN]
    body = e(
        "main",
        e("h1", name(model.name)),
        _when(now, f"/models/{model.name}"),
        *_work(model.work, now),
        report.navigation(anchor for anchor, _, _ in shown),
        *(report.section(*one) for one in shown),
        *report.legend(),
    )
    footer = e(
        "footer",
        e("p", f"hybrid report {model.name} writes a page with the rest: features, label, leakage."),
    )
    return _document(model.name, _top(csrf, model.name), body, footer)


def confirm(step: Step, asked: Question, seen: Seen, token: str, csrf: str) -> str:
    """The second question."""
    back = f"/models/{step.model}"
    main = e(
        "main",
        e("h1", asked.title),
        e("p", "Now: ", e("bdi", seen.line(), data_mark="public"), ".", class_="when"),
        e("h2", "What happens"),
        e("ul", *(e("li", e("bdi", each)) for each in asked.will), data_mark="public"),
        e("h2", "What cannot be undone"),
        e("ul", *(e("li", e("bdi", each)) for each in asked.final), class_="note", data_mark="public"),
        e(
            "form",
            _hidden(csrf=csrf, token=token),
            e("button", asked.yes, type="submit", class_="danger" if step.kind == "halt" else "main"),
            e("a", "No, go back", href=back, class_="button"),
            method="post",
            action=f"{back}/confirm",
            class_="answers",
        ),
        class_="narrow",
    )
    return _document(asked.title, _top(csrf, step.model), main)


def refused(title: str, said: str, csrf: str | None, back: str = "/") -> str:
    """What was not done, and why."""
    main = e(
        "main",
        e("h1", title),
        *_problem(said),
        e("p", e("a", "Go back", href=back, class_="button")),
        class_="narrow",
    )
    return _document(title, *([] if csrf is None else [_top(csrf)]), main)


def _document(title: str, *body: Element) -> str:
    head = e(
        "head",
        e("meta", charset="utf-8"),
        e("meta", name="viewport", content="width=device-width, initial-scale=1"),
        e("link", rel="icon", href=ICON),
        e("title", f"{title} · Hybrid console"),
        e("style", style()),
    )
    return "<!doctype html>\n" + text(e("html", head, e("body", *body), lang="en")) + "\n"


def _top(csrf: str, model: str | None = None) -> Element:
    at: Children = [] if model is None else [" / ", e("a", name(model), href=f"/models/{model}")]
    out = e("form", _hidden(csrf=csrf), e("button", "Log out", type="submit"), method="post", action="/logout")
    return e("header", e("p", e("a", "Hybrid console", href="/"), *at), out, class_="top")


def _when(now: datetime, here: str) -> Element:
    at = e("time", f"{now:%Y-%m-%d %H:%M:%S} UTC")
    return e("p", "As of ", at, ". ", e("a", "Look again", href=here), class_="when")


def _problem(said: str) -> list[Element]:
    return [e("p", e("b", "✕ "), e("bdi", said), class_="bad", role="alert")] if said else []


def _work(work: Work | None, now: datetime) -> Iterator[Element]:
    """What the console did last, not long ago, or does now."""
    if work is None or (work.ended is not None and now - work.ended > RECENT):
        return
    at = work.ended or work.began
    time = e("time", f"{at:%Y-%m-%d %H:%M:%S} UTC")
    if work.ended is None:
        said: Children = [
            e("b", "… At work: "),
            e("bdi", work.step.title),
            ", since ",
            time,
            ". This page follows it.",
        ]
        yield e("p", *said, class_="busy", role="status")
    elif work.failed:
        why: Children = [e("b", "✕ Not done: "), e("bdi", work.step.title), ". ", e("bdi", work.said), ". ", time]
        yield e("p", *why, class_="bad", role="alert")
    else:
        yield e("p", e("b", "✓ Done: "), e("bdi", work.said), ". ", time, class_="good", role="status")


def _unread(why: str) -> Element:
    if why:
        return e("p", e("b", "✕ It cannot be read: "), e("bdi", why), class_="bad", role="alert")
    return e("p", e("b", "… "), "It is being read, which takes a while at first: look again.", class_="busy")


def _line(model: Model) -> Element:
    """Of the overview."""
    seen = model.seen
    served: Children = ["nothing is served yet"]
    if seen.default is not None:
        served = [f"version {seen.default}"]
    canary: Children = ["none"]
    if seen.canary is not None:
        canary = [f"version {seen.canary}, {_percent(seen.share)}"]
    return e(
        "li",
        e("h2", e("a", name(model.name), href=f"/models/{model.name}")),
        e("p", e("b", "Default "), *served),
        e("p", e("b", "Canary "), *canary),
        e("p", e("b", "Serving "), *_pulse(model.health)),
        e("p", e("b", "… at work"), class_="busy") if model.busy else None,
        data_mark="public",
    )


def _pulse(health: Health) -> Children:
    """A model's health in one line: worst first."""
    if health.unread:
        rest = "" if len(health.unread) == 1 else f", and {len(health.unread) - 1} more"
        return [e("span", e("b", "✕ "), e("bdi", health.unread[0]), rest, class_="bad")]
    every = [one for one in health.versions.values() if one.requests]
    if not every:
        return [e("span", "no requests")]
    requests, failed = sum(one.requests for one in every), sum(one.failed for one in every)
    slowest = max(quantile(one.seconds, SLOW_LEVEL) for one in every)
    return [
        f"{requests / health.seconds:,.3g} requests/s, {100 * failed / requests:.2f} % without an answer, ",
        f"95 % within {_seconds(slowest)}",
    ]


def _rollout(model: Model, csrf: str) -> Iterator[Element]:
    """What is served to whom, what can be done about it, and what was."""
    seen = model.seen
    if model.window is None:
        yield e("p", "Nothing is served yet: the first version that is promoted is the default of all devices.")
    else:
        yield e("div", *_stages(model.window, seen), class_="stages")
    if model.busy:
        yield e("p", "Nothing can be changed while something is at work.")
    else:
        yield e("div", *_forms(model, seen, csrf), class_="actions")
    if model.changes:
        yield _history(model.changes)


def _stages(window: Window, seen: Seen) -> Iterator[Element]:
    """Default, canary, and what devices may still have."""
    share = 1 - seen.share
    yield _stage("Default", window.default.version, f"{_percent(share)} of devices fetch it", share, 0)
    if seen.canary is not None:
        yield _stage("Canary", seen.canary, f"{_percent(seen.share)} of devices fetch it", seen.share, 1)
    if seen.shadow is not None:
        also = "and of devices that let it" if seen.devices else "for nobody"
        yield _stage("Shadow", seen.shadow, f"runs on {_percent(seen.batches)} of batches, {also}", seen.batches, 2)
    for version in seen.stays:
        yield _stage("Still answered", version, "for devices that have it", 0.0, 2)


def _stage(title: str, version: int, said: str, share: float, place: int) -> Element:
    part = e("rect", class_="bar", x=0.0, y=0.0, width=100 * share, height=6.0)
    drawing = e(
        "svg",
        e("rect", class_="rest", x=0.0, y=0.0, width=100.0, height=6.0),
        part,
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_=f"share s{place}",
    )
    return e(
        "div", e("p", title), e("p", f"version {version}", class_="big"), drawing, e("p", said), data_mark="public"
    )


def _forms(model: Model, seen: Seen, csrf: str) -> Iterator[Element]:
    """One for each step that can be taken; each is asked about again before anything happens."""
    ask, others = _Forms(model, csrf), model.launchable
    if seen.canary is not None:
        about = f"version {seen.canary}"
        if seen.share < 1:
            yield ask.form("canary", "Let more devices in", about, ask.share(seen.share), seen.canary)
        yield ask.form("promote", "Promote the canary", f"{about}, to all devices", [], seen.canary)
    elif others:
        if seen.default is not None:
            fields = [*ask.version("canary", others), *ask.share(0.0)]
            yield ask.form("canary", "Start a canary", "on some devices", fields)
        yield ask.form("promote", "Promote a version", "to all devices at once", ask.version("promote", others))
    back = sorted((one for one in seen.served if seen.after(one) is not None), key=lambda one: one != seen.canary)
    if back:
        fields = [*ask.version("halt", back), *ask.reason()]
        yield ask.form("halt", "Take a version back", "for good; devices go to the one before", fields)


@dataclass(frozen=True)
class _Forms:
    """Forms of one model's page."""

    model: Model
    csrf: str

    def form(self, kind: str, title: str, about: str, fields: Iterable[Element], version: int | None = None) -> Element:
        """With one button, which only leads to a question."""
        known = {} if version is None else {"version": str(version)}
        return e(
            "form",
            e("h3", title),
            e("p", about, class_="when", data_mark="public"),
            *fields,
            _hidden(csrf=self.csrf, **known),
            e("button", f"{title} …", type="submit", class_="danger" if kind == "halt" else "main"),
            method="post",
            action=f"/models/{self.model.name}/{kind}",
            class_="card",
        )

    def version(self, kind: str, versions: Sequence[int]) -> list[Element]:
        """A choice of them."""
        chosen = f"{kind}-version"
        options = (e("option", self._said(version), value=str(version)) for version in versions)
        return [e("label", "Version", for_=chosen), e("select", *options, id=chosen, name="version")]

    def share(self, above: float) -> list[Element]:
        """Of devices, in percent, more than now."""
        proposed = next((step for step in STEPS if step > max(100 * above, 1)), 100)
        field = e(
            "input",
            id="share",
            name="share",
            type="number",
            min="0.1",
            max="100",
            step="0.1",
            value=str(proposed),
            required="",
            inputmode="decimal",
        )
        return [e("label", "Share of devices, %", for_="share"), field]

    def reason(self) -> list[Element]:
        """Why, for people and devices."""
        field = e("input", id="reason", name="reason", required="", maxlength=str(MOST_REASON), autocomplete="off")
        return [e("label", "Why (people and devices are told)", for_="reason"), field]

    def _said(self, version: int) -> str:
        seen, facts = self.model.seen, self.model.facts
        record = None if facts is None else facts.trainings.get(version)
        roles = {seen.canary: ", the canary", seen.shadow: ", the shadow", seen.default: ", the default"}
        spent = "" if record is None or record.epsilon is None else f", ε {record.epsilon:.3g}"
        return f"{version}{roles.get(version, '')}{spent}"


def _history(changes: Sequence[Change]) -> Element:
    rows: list[list[Child]] = [
        [
            e("time", f"{change.at:%Y-%m-%d %H:%M:%S}"),
            SAID.get(change.action, change.action),
            str(change.version),
            _whom(change),
            str(change.default),
            name(change.reason) if change.reason else NONE,
        ]
        for change in list(reversed(changes))[:MOST_CHANGES]
    ]
    head = ("when (UTC)", "what", "version", "devices", "default after it", "why")
    return e("div", table("History, the latest first", head, rows, "public"), data_mark="public", class_="history")


def _whom(change: Change) -> str:
    """Of devices, that fetch a version after a change of it."""
    if change.action == "shadow":
        batches = f"{_percent(change.share or 0.0)} of batches"
        return f"{batches}, and of those that let it" if change.devices else f"none: {batches}"
    return {"promote": "all", "halt": "none"}.get(change.action) or _percent(change.share or 0.0)


def _health(health: Health) -> Iterator[Element]:
    """What processes of serving count of each version; what cannot be read is said first."""
    for each in health.unread:
        yield e("p", e("b", "✕ Not read: "), e("bdi", each), class_="bad", role="alert")
    if not health.read:
        return
    lag = "" if health.lag is None else f" Records that wait for workers: {health.lag:,.0f}."
    said = f" Counted by gateways and workers ({health.read}) in the last {_span(health.seconds)}.{lag}"
    yield e("p", badge("public"), said, data_mark="public")
    counted = {version: one for version, one in health.versions.items() if one.requests or one.rows}
    if not counted:
        yield e("p", "Nobody asked for a prediction meanwhile.")
        return
    head = ("version", "requests/s", "without an answer", "95 % within", "rows/s", "by a fallback")
    rows = [_counted(version, one, health.seconds) for version, one in sorted(counted.items(), reverse=True)]
    yield e("div", table("By version", head, rows), data_mark="public")


def _counted(version: int, one: Counted, seconds: float) -> list[Child]:
    slow = _seconds(quantile(one.seconds, SLOW_LEVEL)) if one.requests else NONE
    requests_s, rows_s = (f"{count / seconds:,.3g}" for count in (one.requests, one.rows))
    return [
        str(version),
        requests_s,
        _share_of(one.failed, one.requests),
        slow,
        rows_s,
        _share_of(one.fallen, one.rows),
    ]


def _share_of(part: int, whole: int) -> Child:
    """Of requests or rows; many are said to be."""
    said = f"{100 * part / whole:.2f} %" if whole else NONE
    return e("span", e("b", "! "), said, class_="bad") if part > MANY * whole else said


def _hidden(**values: str) -> Element:
    fields = (e("input", type="hidden", name=key, value=value) for key, value in values.items())
    return e("span", *fields, hidden="")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _seconds(value: float) -> str:
    if value == float("inf"):
        return "longer than is timed"
    return f"{1000 * value:,.4g} ms" if value < 1 else f"{value:,.4g} s"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
