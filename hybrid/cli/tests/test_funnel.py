"""Devices that drop out where a test says so, by real journals, and what `hybrid funnel` makes of them."""

import json
import re
from datetime import UTC, datetime

import numpy as np
import pytest
from typer.testing import CliRunner

from device_runtime.answering import reported
from device_runtime.store import Store
from hybrid import Clear, Numeric
from hybrid.analytics.asking import FUNNEL, Answer, People, Simulated
from hybrid.analytics.funnel import PLACES, folder_of, funnel, latest, query_of
from hybrid.analytics.results import keep
from hybrid.bundle import Manifest
from hybrid.cli import app
from hybrid.cli.funnel import _print, shown_of
from hybrid.errors import ConfigError, NotFound
from hybrid.features import Features
from hybrid.journal import LEFT, STOPPED, UNTRIED, VERSION, Phase
from hybrid.plan import QueryPlan
from hybrid.privacy.accountant import GaussianEvent, noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import SeededNoise

WEEK = "2026-W47"
IN_IT = int(datetime(2026, 11, 20, tzinfo=UTC).timestamp() * 1000)
NOTHING = Phase.ELIGIBLE, "nothing"
PLANTED = {  # version -> how many devices came so far in that week, and why no further
    4: {
        (Phase.CHECKED, "refused"): 200,
        (Phase.DOWNLOADED, "not_charging"): 900,
        (Phase.DOWNLOADED, UNTRIED): 300,
        NOTHING: 400,
        (Phase.PLANNED, "in_use"): 250,
        (Phase.PLANNED, "broke_off"): 150,
        (Phase.TRAINED, "waiting"): 100,
        (Phase.UPLOADED, None): 700,
    },
    5: {
        (Phase.CHECKED, "interrupted"): 90,
        (Phase.DOWNLOADED, "battery_low"): 600,
        (Phase.ELIGIBLE, "busy"): 300,
        (Phase.PLANNED, "few_examples"): 200,
        (Phase.TRAINED, "metered"): 300,
        (Phase.UPLOADED, None): 500,
    },
    6: {(Phase.UPLOADED, None): 10},
}
CAME = {  # summed by hand: how many came to each phase
    4: dict(zip(Phase, (3000, 2800, 1600, 1200, 800, 700), strict=True)),
    5: dict(zip(Phase, (1990, 1900, 1300, 1000, 800, 500), strict=True)),
}
LEAST, EPSILON, DELTA, SEEDS = 40, 1.0, 1e-5, 200
QUERY = query_of(WEEK, [4, 5, 6])
MANIFEST = Manifest(
    model="meals",
    version=6,
    definition_hash="ab" * 32,
    features=Features.of({"steps": Numeric()}),
    server_embedding=2,
    device_embedding=4,
    merge="server",
    release=Clear(reason="a test of the funnel"),
    programs={},
)


@pytest.fixture(scope="module")
def journals(tmp_path_factory):
    """What 5,000 devices noted of that week, each in its own journal; some had come less far before."""
    found = []
    file = tmp_path_factory.mktemp("journals") / "devices.sqlite"
    with Store.open(file, bytes(32), MANIFEST, now_ms=IN_IT) as store, store.together():
        for version, places in PLANTED.items():
            for (phase, reason), many in places.items():
                for _ in range(many):
                    journal = store.journal(len(found))
                    if phase is not Phase.CHECKED:
                        journal.note(version - 1, *NOTHING, IN_IT - 1)
                        journal.note(version, Phase.DOWNLOADED, UNTRIED, IN_IT)
                    journal.note(version, phase, reason, IN_IT + 1)
                    found.append(journal.of(WEEK))
    assert len(found) == 5000
    return found


@pytest.fixture(scope="module")
def people(journals):
    """The same as a simulation has them."""
    rows = [noted.columns for noted in journals]
    columns = {name: np.array([row[name][0] for row in rows], object) for name in (VERSION, LEFT, STOPPED)}
    columns[LEFT] = columns[LEFT].astype(float)
    return People(columns, np.arange(5001))


@pytest.fixture(scope="module")
def exact(journals):
    """The sum of what the devices send."""
    about = {"id": "0" * 32, "model": "meals", "version": 6, "definition_hash": "ab" * 32, "expires_ms": 1}
    plan = QueryPlan(query=QUERY, **about)
    return np.sum([reported(plan, noted).astype(np.float64) for noted in journals], axis=0)


def test_devices_send_what_a_simulation_sums(people, exact):
    np.testing.assert_allclose(exact, people.sum(QUERY), rtol=1e-6, atol=1e-3)


def test_5_000_devices_are_within_the_error_bars_and_few_are_not_shown(exact):
    """Of 200 seeds each number's interval holds the planted one in 88 % or more, all together in 93 to 97 %.

    With a chance of 95 % each, 176 or fewer of 200 has one of 1e-4 (binomial). A version with 10 devices is
    not shown, and of places where nobody stopped none.
    """
    sd = noise_multiplier_for(EPSILON, DELTA, 1.0, 1) * QUERY.norm
    planted = {(v, p): n for v, came in CAME.items() for p, n in came.items()}
    planted |= {(v, place): n for v in CAME for place, n in PLANTED[v].items() if place[1] is not None}
    held = dict.fromkeys(planted, 0)
    for seed in range(SEEDS):
        noised = exact + SeededNoise(seed).gaussian(QUERY.size, sd)
        told = funnel(Answer(QUERY, noised, sd, 5000), LEAST)
        assert [each.version for each in told.versions] == [4, 5]
        for each in told.versions:
            numbers = each.phases | {(stopped.phase, stopped.reason): stopped.devices for stopped in each.stops}
            assert {(each.version, name) for name in numbers} == {key for key in planted if key[0] == each.version}
            for name, estimate in numbers.items():
                held[each.version, name] += planted[each.version, name] in estimate.noise
    assert told.threshold == LEAST
    assert min(held.values()) >= 0.88 * SEEDS, held
    assert 0.93 <= np.mean(list(held.values())) / SEEDS <= 0.97


def test_the_threshold_is_three_standard_deviations_where_that_is_more(exact):
    """Of the noisiest number, which is how many were offered a version: 1.62 x 1.274 of the multiplier."""
    sd = 30 * QUERY.norm
    told = funnel(Answer(QUERY, exact, sd, 5000), 1)
    roots = np.linalg.norm([1, 1 / 2, 3 / 8, 5 / 16, 35 / 128, 63 / 256])
    assert told.threshold == pytest.approx(3 * sd * roots)
    assert [each.version for each in told.versions] == [4, 5]
    (checked,) = (each.phases[Phase.CHECKED] for each in told.versions if each.version == 5)
    assert checked.noise.high - checked.noise.low == pytest.approx(2 * 1.959964 * sd * roots)


def test_more_devices_than_answered_are_none_and_the_interval_keeps_its_lower_half(exact):
    """Noise that adds 3 standard deviations to 5,000 devices of one version: 5,000, and down to 1.96 of them below."""
    query = query_of(WEEK, [4])
    counts = np.zeros(query.counts)
    counts[0] = 5000.0  # all uploaded
    total, sd = query.encode(counts[None])[0], 10.0
    total[0] += 3 * sd  # which every running sum begins with
    checked = funnel(Answer(query, total, sd, 5000), LEAST).versions[0].phases[Phase.UPLOADED]
    assert (checked.value, checked.noise.low, checked.noise.high) == (5000, pytest.approx(5000 - 19.6, abs=0.01), 5000)


def test_it_is_paid_for_and_the_newest_versions_are_asked_about(people, tmp_path):
    with Ledger.open(tmp_path, budget_epsilon=1, delta=DELTA) as ledger:
        answer = Simulated(people, ledger, purpose=FUNNEL, epsilon=EPSILON, seed=None)(QUERY)
        assert [(entry.purpose, entry.clip) for entry in ledger.entries] == [("funnel", QUERY.norm)]
        assert 0.99 < ledger.spent().epsilon <= 1
    assert [each.version for each in funnel(answer, LEAST).versions] == [4, 5]
    assert latest(range(30, 0, -1)) == tuple(range(15, 31))
    assert len(PLACES) == len(set(PLACES))


def shown(exact, least=LEAST, people=5000):
    privacy = {"week": WEEK, "epsilon": 1.0, "budget_epsilon": 1.0, "delta": DELTA, "left": 0.0, "unit": "device"}
    said = {"mechanism": "Gaussian", "assumption": "none", "protects": "the journal", "run": "r", "accountant": "exact"}
    answer = Answer(QUERY, exact, 3.7 * QUERY.norm, people)
    return shown_of("taxi", WEEK, funnel(answer, least)) | {"privacy": privacy | said}


def test_what_is_printed_says_where_devices_stopped_on_a_narrow_terminal_too(exact, capsys, monkeypatch):
    for width in ("120", "40"):
        monkeypatch.setenv("COLUMNS", width)
        _print(shown(exact))
        printed = capsys.readouterr().out
        assert "taxi, week 2026-W47: 5,000 devices told how far they came" in printed
        assert "stopped at downloaded, not_charging: 900 ± 12" in printed
        assert "3,000 ± 15" in printed
        assert "57%" in printed, "1,600 of 2,800 were eligible"
        assert ("█" in printed) == (width == "120")
        table = [line for line in printed.splitlines() if line[:1] in "│┃┏┡├└"]
        assert max(map(len, table)) <= int(width)


def test_what_is_below_the_threshold_is_null_and_a_drowned_funnel_says_so(exact, capsys):
    """At a threshold of 750 version 4 has no uploads to show; of 50 devices nothing can be told."""
    told = shown(exact, least=750)
    four = told["versions"][0]
    assert four["phases"][-1] == {"name": "uploaded", "value": None, "low": None, "high": None}
    assert [each["reason"] for each in four["stopped"]] == ["not_charging"]
    _print(told)
    assert "fewer than 750" in capsys.readouterr().out
    _print(shown(exact / 100, least=60, people=50))
    printed = capsys.readouterr().out
    assert "Nothing is shown: no version has 60 devices or more" in printed
    assert "The noise is as large as this fleet" in printed


def invoke(*words):
    return CliRunner().invoke(app, ["funnel", *words], catch_exceptions=False)


def test_what_is_kept_is_shown_again_for_nothing(project, exact, tmp_path):
    """The latest week, or the one that is asked for; without a declaration, or devices, nothing is asked."""
    with pytest.raises(NotFound, match="hybrid funnel taxi --devices N"):
        invoke("taxi")
    for week in (WEEK, "2026-W45"):
        folder = folder_of(tmp_path / "runs", "taxi", week)
        with Ledger.open(folder, budget_epsilon=1, delta=DELTA) as ledger:
            ledger.spend(GaussianEvent(4.0), purpose=FUNNEL, clip=QUERY.norm, round_number=1)
            spend = {"epsilon": ledger.spent().epsilon, "delta": DELTA, "purpose": FUNNEL, "releases": 1}
        kept = json.loads(json.dumps(shown(exact) | {"week": week}))
        keep(folder, "funnel", kept, mark="noised", spend=spend | {"run": folder.name})
    assert json.loads(invoke("taxi", "--json").stdout)["week"] == WEEK
    assert json.loads(invoke("taxi", "--week", "2026-W45", "--json").stdout)["week"] == "2026-W45"
    assert "week 2026-W47" in invoke("taxi", "--plot", "funnel.svg").stdout
    assert (tmp_path / "funnel.svg").read_text().startswith("<?xml")
    CliRunner().invoke(app, ["report", "taxi"], catch_exceptions=False)
    page = re.sub("<[^>]+>", " ", (tmp_path / "taxi.html").read_text())
    for said in ("2026-W47", "Version 4", "3,000", "downloaded: not charging", "900", "Version 5"):
        assert said in page, said
    with pytest.raises(ConfigError, match="--epsilon must be left out without --devices"):
        invoke("taxi", "--epsilon", "1")
    with pytest.raises(ConfigError, match="add funnel=Funnel"):
        invoke("taxi", "--devices", "3")
