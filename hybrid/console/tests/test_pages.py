import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import inf

import pytest

from hybrid.console.health import Health
from hybrid.console.pages import Model, model_page, overview
from hybrid.console.steps import Step
from hybrid.console.work import Work
from hybrid.deployment import Halted, Window
from hybrid.gates import Counted
from hybrid.report.tests.examples import facts, record
from serving.testing import deployment

NOW = datetime(2026, 11, 29, 19, 0, tzinfo=UTC)
TWO = Window(versions=(deployment(1),)).promote(deployment(2))
TRAINED = {1: record("a", 1.0), 2: record("a", 1.5), 3: record("b", None), 4: record("c", 1.7), 5: record("d", 1.8)}
SHOP = Model("shop", TWO, (), Health(), facts=facts(trainings=TRAINED))


def page(model: Model) -> str:
    return model_page(model, "csrf", NOW)


def forms(model: Model) -> list[str]:
    """Titles of what can be done."""
    return re.findall(r"<h3>([^<]+)</h3><p class=\"when\"", page(model))


def versions(model: Model, kind: str) -> list[str]:
    chosen = re.search(rf'id="{kind}-version".*?</select>', page(model))[0]
    return re.findall(r'value="(\d+)"', chosen)


def test_what_can_be_done_is_what_the_rollout_allows():
    """Nothing served: promote. A default: a canary too, and back where one came before. A canary: let it grow."""
    assert forms(replace(SHOP, window=None)) == ["Promote a version"]
    assert forms(replace(SHOP, window=Window(versions=(deployment(1),)))) == ["Start a canary", "Promote a version"]
    assert forms(SHOP) == ["Start a canary", "Promote a version", "Take a version back"]
    tried = replace(SHOP, window=TWO.try_out(deployment(4), 0.05))
    assert forms(tried) == ["Let more devices in", "Promote the canary", "Take a version back"]
    assert versions(tried, "halt") == ["4", "2", "1"]
    whole = replace(SHOP, window=TWO.try_out(deployment(4), 1.0))
    assert forms(whole) == ["Promote the canary", "Take a version back"]


def test_references_and_what_was_taken_back_cannot_be_launched():
    """Of five versions 3 was trained without a mechanism, 4 was taken back, and 2 is the default."""
    halted = TWO.halt(Halted(version=4, reason="r", signed=""))
    assert versions(replace(SHOP, window=halted), "canary") == ["5", "1"]


@pytest.mark.parametrize(("devices", "said"), [(False, "for nobody"), (True, "and of devices that let it")])
def test_whom_a_shadow_runs_for_is_said(devices: bool, said: str):
    """On a tenth of the batches; on as many of the devices only where the rollout says so."""
    window = TWO.shade(deployment(4), 0.1, devices=devices)
    assert f"runs on 10 % of batches, {said}" in page(replace(SHOP, window=window))


def test_a_version_can_be_taken_back_whatever_cannot_be_read():
    """Without facts the buttons that need none are there, and the page says what is wrong."""
    broken = replace(SHOP, facts=None, why="a ledger is damaged", health=Health(unread=("gateway-1 cannot be read",)))
    assert forms(broken) == ["Take a version back"]
    for said in ("a ledger is damaged", "gateway-1 cannot be read", "✕"):
        assert said in page(broken)
    assert "It is being read" in page(replace(SHOP, facts=None))


def test_nothing_can_be_asked_for_while_something_is_at_work():
    """The page says what, and since when."""
    busy = replace(SHOP, work=Work(Step("promote", "shop", 4), NOW))
    assert forms(busy) == []
    assert "shop:4 for all devices" in page(busy)


@pytest.mark.parametrize(("ago", "shown"), [(timedelta(minutes=59), True), (timedelta(minutes=61), False)])
def test_what_was_done_is_said_for_an_hour(ago, shown):
    """Then the history alone says it."""
    done = Work(Step("promote", "shop", 2), NOW - ago, NOW - ago, "shop:2 is the default")
    assert ("✓ Done" in page(replace(SHOP, work=done))) == shown


def test_health_is_said_for_each_version_and_what_is_bad_not_by_colour_alone():
    """3,000 requests in 300 s are 10 a second; 60 of them, 2 %, without an answer; 19 of 20 within 25 ms."""
    default = Counted(3000, 60, 2940, 0, {0.01: 100, 0.025: 2900, inf: 3000}, {})
    canary = Counted(30, 0, 30, 0, {0.01: 30, inf: 30}, {})
    model = replace(SHOP, health=Health(300, {2: default, 4: canary}, lag=7, read=2))
    rows = re.findall(r"<tr>.*?</tr>", page(model).partition("By version")[2].partition("</section>")[0])
    told = [re.sub(r"<[^>]+>", " ", row).split() for row in rows[1:]]
    assert told[0] == ["4", "0.1", "0.00", "%", "10", "ms", "0.1", "0.00", "%"]
    assert told[1] == ["2", "10", "!", "2.00", "%", "25", "ms", "9.8", "0.00", "%"]
    assert "in the last 5 min 0 s. Records that wait for workers: 7." in page(model)
    line = re.sub(r"<[^>]+>", "", overview([model], "csrf", NOW))
    assert "10.1 requests/s, 1.98 % without an answer, 95 % within 25 ms" in line
