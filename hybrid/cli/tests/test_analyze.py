import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.accountant import epsilon
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.workspace import Workspace

FILE = """
from datetime import timedelta
from hybrid import Bucketize, Categorical, Clear, Entity, Hash, HybridModel, Label
from hybrid import Log1p, Numeric, Privacy, Server, View

model = HybridModel(
    name="taxi",
    server=Server(
        service="zones",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="zones.parquet", features={"demand": Numeric()}),),
        max_feature_age=timedelta(hours=1),
    ),
    request={"hour": Categorical(vocabulary=("7AM", "2PM"))},
    device={
        "trips": Numeric(mean=10, std=5),
        "wait": Bucketize(edges=(1, 5)),
        "spent": Log1p(mean=1, std=1),
        "home": Categorical(vocabulary=("north", "south")),
        "street": Hash(buckets=8),
    },
    server_tower=lambda: None,
    device_tower=lambda: None,
    head=lambda: None,
    label=Label(column="rode", visible_to="VISIBLE"),
    privacy=Privacy(epsilon=2, delta=1e-4, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of the command"),
)
"""
NETWORK = {"server_embedding": 4, "device_embedding": 4, "parameters": {"head": 2}}
PEOPLE = 2000


@pytest.fixture(params=["device"])
def project(request, tmp_path, monkeypatch):
    """A registered model and its population; (*words) -> what `hybrid analyze taxi` prints."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(FILE.replace("VISIBLE", request.param))
    Registry(Workspace.current()).register(load_model(tmp_path / "model.py"), NETWORK, tmp_path / "model.py")
    rows = pd.DataFrame(
        {
            "person": np.arange(PEOPLE),
            "hour": np.where(np.arange(PEOPLE) < 500, "7AM", "2PM"),
            "trips": np.arange(PEOPLE) / 100,
            "wait": np.full(PEOPLE, 3.0),
            "spent": np.full(PEOPLE, 9.0),
            "home": np.where(np.arange(PEOPLE) < 1500, "north", "east"),
            "street": "A",
            "rode": (np.arange(PEOPLE) < 250).astype(int),  # half of those of 7AM
        }
    )
    rows.to_parquet("rows.parquet")
    words = ["population", "import", "rows.parquet", "--user", "person", "--name", "taxi"]
    CliRunner().invoke(app, words, catch_exceptions=False)

    def ask(*words):
        seed = () if {"--devices", "--seed"} & {*words} else ("--seed", "0")
        return CliRunner().invoke(app, ["analyze", "taxi", *words, *seed], catch_exceptions=False).stdout

    return ask


def test_a_question_is_in_its_runs_ledger_and_its_answer_beside_it(project, tmp_path):
    """One release of the purpose "analyze", which costs what is said; what is printed as JSON is kept."""
    shown = json.loads(project("trips", "--quantiles", "4", "--epsilon", "0.5", "--run", "monday", "--json"))
    account = Ledger.read(tmp_path / "runs" / "monday")
    assert [entry.purpose for entry in account.entries] == ["analyze"]
    assert shown["spend"]["epsilon"] == epsilon(account.events(), 1e-4).epsilon <= 0.5
    assert shown["spend"]["left"] == pytest.approx(2 - shown["spend"]["epsilon"])
    assert json.loads((tmp_path / "runs" / "monday" / "results" / "analyze-0001.json").read_text())["shown"] == shown


def test_quantiles_have_levels_values_and_both_intervals(project):
    """The median of 0, 0.01, ..., 19.99 is 9.995, and within both intervals."""
    shown = json.loads(project("trips", "--quantiles", "4", "--epsilon", "1", "--json"))
    found = shown["groups"][0]["quantiles"]
    assert [one["level"] for one in found] == [0.25, 0.5, 0.75]
    low, high = found[1]["noise"]
    assert low <= 9.995 <= high
    assert found[1]["value"] == pytest.approx(9.995, abs=1)
    assert found[1]["full"][0] <= low < high <= found[1]["full"][1]
    assert shown["bounds"] == {
        "low": -10,
        "high": 30,
        "scale": "linear",
        "from": "low and high from its declaration: 4 std on either side of its mean",
    }


def test_a_number_is_answered_with_moments_and_a_histogram(project):
    """Two releases; ten even bins between the declared bounds, and those outside."""
    shown = json.loads(project("trips", "--epsilon", "1", "--json"))
    (group,) = shown["groups"]
    assert shown["spend"]["releases"] == 2
    assert list(group["numbers"]) == ["count", "sum", "mean", "variance", "std"]
    assert group["numbers"]["mean"]["value"] == pytest.approx(9.995, abs=1)
    assert (len(shown["edges"]), len(group["counts"]), len(group["shares"])) == (11, 12, 12)


@pytest.mark.parametrize(
    ("words", "edges"),
    [
        (("trips", "--edges", "5,10"), [5, 10]),
        (("trips", "--bins", "2", "--low", "0", "--high", "20"), [0, 10, 20]),
        (("wait",), [1, 5]),
        (("spent", "--bins", "1"), [0, np.e**5 - 1]),
    ],
)
def test_bins_are_as_given_or_as_declared(project, words, edges):
    """Edges, even bins, buckets, and, of a logarithm, its bounds."""
    assert json.loads(project(*words, "--epsilon", "1", "--json"))["edges"] == pytest.approx(edges)


def test_text_is_counted_by_its_vocabulary(project):
    """Three quarters north, none south, a quarter any other."""
    shown = json.loads(project("home", "--epsilon", "2", "--json"))
    assert shown["values"] == ["north", "south", "any other"]
    assert [one["value"] for one in shown["groups"][0]["shares"]] == pytest.approx([0.75, 0, 0.25], abs=0.02)


def test_a_private_label_is_asked_for_by_group(project):
    """Half of 7AM, nobody of 2PM."""
    shown = json.loads(project("label", "--by", "hour", "--epsilon", "2", "--json"))
    assert [group["group"] for group in shown["groups"]] == ["7AM", "2PM"]
    assert [group["shares"][1]["value"] for group in shown["groups"]] == pytest.approx([0.5, 0], abs=0.05)


@pytest.mark.parametrize("project", ["server"], indirect=True)
def test_a_label_that_the_server_sees_is_counted_exactly_and_free(project, tmp_path):
    """250 of 2000; no ledger is made; it says why; the answers are kept for a report, in one folder."""
    shown = json.loads(project("label", "--json"))
    assert (shown["exact"], shown["spend"]) == (True, None)
    assert shown["groups"][0]["counts"][1]["value"] == 250
    assert "spent: nothing; the label is visible to the server" in project("label")
    assert json.loads(project("hour", "--json"))["groups"][0]["counts"][0]["value"] == 500
    kept = [file.relative_to(tmp_path).as_posix() for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert sorted(kept) == [f"runs/taxi-public/results/analyze-000{number}.json" for number in (1, 2, 3)]


def test_a_question_that_would_pass_the_budget_changes_no_file(project, tmp_path):
    """Of epsilon 2, 1.5 are spent: another 1.5 is refused, with what is left and what fits; that much is granted."""
    project("trips", "--bins", "3", "--epsilon", "1.5", "--run", "monday")
    before = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    with pytest.raises(
        BudgetExceeded,
        match=r"run 'monday' has epsilon 0\.50\d left of 2: one question of \S+ fits \(epsilons do not add up\)",
    ) as e:
        project("trips", "--adaptive", "3", "--epsilon", "1.5", "--run", "monday")
    assert {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()} == before
    fits = str(e.value).split("one question of ")[1].split()[0]
    assert 1 < float(fits) < 1.5
    project("trips", "--bins", "3", "--epsilon", fits, "--run", "monday")
    assert 1.98 < Ledger.read(tmp_path / "runs" / "monday").spent().epsilon <= 2
    with pytest.raises(BudgetExceeded, match=r"no further question fits|one question of 0\.0"):
        project("trips", "--bins", "3", "--epsilon", "0.5", "--run", "monday")


def test_a_run_of_questions_is_among_the_models_runs(project):
    """`hybrid privacy taxi` counts it, under the purpose, and says that no version is to come of it."""
    project("trips", "--bins", "3", "--epsilon", "1")
    printed = CliRunner().invoke(app, ["privacy", "taxi"], catch_exceptions=False).stdout
    assert "(versions: none: questions)" in printed
    assert "analyze: 1 release" in printed
    assert "at delta 0.0001 per user, of 2" in printed
    assert "protects  device features and label" in printed
    assert "assumes   the noise is seeded" in printed


def test_what_is_printed_says_what_the_intervals_are_and_what_was_spent(project):
    """In words, with a bar for each bin."""
    printed = project("trips", "--bins", "2", "--low", "0", "--high", "20", "--epsilon", "1", "--run", "monday")
    assert "noise: 95 %, for the exact value on these 2,000 people" in printed
    assert "full: 95 %, for the population that they are a sample of" in printed
    assert "at delta 0.0001 per user; protects the device features and label" in printed
    assert "ledger of run monday: 0.99" in printed
    assert "the noise is seeded, and can be removed" in printed
    assert "█" in printed


def test_without_a_seed_noise_is_the_operating_systems(project):
    """Of one question asked twice there are two answers, and with a seed one."""
    words = ("analyze", "taxi", "trips", "--bins", "2", "--epsilon", "1", "--json")
    for seed, answers in ((), 2), (("--seed", "3"), 1):
        shown = [json.loads(CliRunner().invoke(app, [*words, *seed], catch_exceptions=False).stdout) for _ in range(2)]
        assert len({one["groups"][0]["shares"][1]["value"] for one in shown}) == answers
        assert ("the noise is seeded" in shown[0]["spend"]["assumption"]) == bool(seed)


def test_a_fold_is_left_out_of_those_asked(project):
    """As in training: fewer people, and it is said."""
    shown = json.loads(project("trips", "--bins", "2", "--epsilon", "1", "--fold", "1/5", "--json"))
    assert 1500 < shown["people"] < 1700
    assert "without fold 1/5" in project("trips", "--bins", "2", "--epsilon", "1", "--fold", "1/5")


def test_frequent_texts_are_found_that_nobody_declared(project):
    """1,500 people live north and 500 east, which no vocabulary has; both intervals hold the shares."""
    shown = json.loads(project("home", "--frequent", "5", "--epsilon", "2", "--json"))
    assert shown["values"] == ["north", "east"]
    for share, exact in zip(shown["groups"][0]["shares"], (0.75, 0.25), strict=True):
        assert share["noise"][0] < exact < share["noise"][1]
        assert share["full"][0] < exact < share["full"][1]
    assert "north" in project("home", "--frequent", "5", "--epsilon", "2")


def test_where_no_text_stands_out_it_is_said(project):
    """At epsilon 0.01 the noise hides 1,500 people."""
    assert "no value stands out from the noise" in project("home", "--frequent", "5", "--epsilon", "0.01")


@pytest.mark.parametrize("name", ["trips.svg", "trips.png"])
def test_a_plot_is_drawn(project, tmp_path, name):
    """Into the file that is named, also of groups."""
    project("trips", "--bins", "3", "--by", "hour", "--epsilon", "1", "--plot", name)
    assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trips",), "--epsilon must be given: 'trips' is the devices'"),
        (("trips", "--epsilon", "2.1"), "--epsilon must be > 0 and at most the 2 that 'taxi' declares, got 2.1"),
        (("trips", "--epsilon", "0"), "--epsilon must be > 0"),
        (("tips", "--epsilon", "1"), "'taxi' has no feature 'tips'; it has: trips, wait, spent, home, street, hour"),
        (("demand", "--epsilon", "1"), "'demand' is a server feature"),
        (("street", "--epsilon", "1"), "--frequent must be given for 'street': it is hashed"),
        (("trips", "--frequent", "3", "--epsilon", "1"), "--frequent must be left out: it is for text"),
        (("home", "--frequent", "3", "--by", "hour", "--epsilon", "1"), "--rows, --take and --by must be left out"),
        (("trips", "--by", "home", "--epsilon", "1"), r"with a declared vocabulary \(hour\); 'home' is known only on"),
        (("home", "--quantiles", "4", "--epsilon", "1"), "--quantiles must be left out: they are for numbers, .* text"),
        (("label", "--low", "4", "--epsilon", "1"), "--low must be left out: they are for numbers, and this is label"),
        (("trips", "--bins", "4", "--edges", "1,2", "--epsilon", "1"), "--edges and --bins are different questions"),
        (("trips", "--edges", "1,x", "--epsilon", "1"), "--edges must be numbers with commas between them, got '1,x'"),
        (("trips", "--edges", "2,1", "--epsilon", "1"), "edges must be finite and ascend, got 2, 1"),
        (("trips", "--quantile", "1.5", "--epsilon", "1"), "levels of quantiles must ascend between 0 and 1, got 1.5"),
        (("trips", "--low", "50", "--epsilon", "1"), "low must be finite and below high, got 50 and 30"),
        (("trips", "--epsilon", "1", "--population", "bus"), "population 'bus' does not exist"),
        (("trips", "--epsilon", "1", "--run", "../monday"), "--run must be"),
        (("trips", "--epsilon", "1", "--devices", "9", "--seed", "1"), "--seed must be left out with --devices: noise"),
        (("trips", "--epsilon", "1", "--round-s", "9"), "--round-s must be left out without --devices, got 9"),
        (("trips", "--epsilon", "1", "--tokens"), "--tokens must be left out without --devices"),
        (("hour", "--devices", "9"), "--devices must be left out for 'hour': the server knows it"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_leaves_no_run(project, tmp_path, words, message):
    """In a sentence that says what it must be."""
    with pytest.raises(Exception, match=message) as refused:
        project(*words)
    assert isinstance(refused.value, ConfigError) or "bus" in message
    assert not list((tmp_path / "runs").glob("*"))


def test_delta_must_be_small_for_so_many_people(project, tmp_path):
    """2000^-1.1 is 2.3 in ten thousand: a declared delta of one in a thousand is refused."""
    (tmp_path / "model.py").write_text((tmp_path / "model.py").read_text().replace("delta=1e-4", "delta=1e-3"))
    registry = Registry(Workspace.current())
    registry.register(load_model(tmp_path / "model.py"), NETWORK, tmp_path / "model.py")
    with pytest.raises(ConfigError, match=r"privacy.delta must be at most 0\.00023, users\^-1\.1 at 2000, got 0\.001"):
        project("trips", "--bins", "2", "--epsilon", "1")
    assert not list((tmp_path / "runs").glob("*"))
