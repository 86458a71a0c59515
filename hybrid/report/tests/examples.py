"""Facts of a made-up model, with an answer of every kind."""

from datetime import UTC, datetime, timedelta

from hybrid.analytics.results import Result
from hybrid.features import Numeric
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Account, Entry
from hybrid.report.facts import Facts
from hybrid.report.spending import over_time
from hybrid.version import Balance, Learned, TrainingRecord

NOW = datetime(2026, 11, 29, 9, 0, tzinfo=UTC)
EVIL = "<script>alert(1)</script>\"'&"
SPEND = {"epsilon": 0.2, "delta": 9e-4, "purpose": "analyze", "releases": 1, "run": "monday"}


def estimate(value, noise=0.02, full=0.03):
    return {"value": value, "noise": [value - noise, value + noise], "full": [value - full, value + full]}


def group(shares, name=None):
    rows = [estimate(1000 * share, 20, 30) for share in shares]
    counts = {"counts": rows, "rows": estimate(1000.0, 20, 30), "missing": estimate(7.0, 5, 6)}
    return {"group": name, "shares": [estimate(share) for share in shares], **counts}


def asked(feature, kind, groups, **more):
    about = {"model": "shop", "feature": feature, "kind": kind, "population": "shop", "people": 587, "by": None}
    spend = more.pop("spend", SPEND)
    shown = about | {"rows_a_person": 1, "take": "last", "seed": 77123, "groups": groups, "spend": spend} | more
    mark = "public" if spend is None else "noised"
    return Result(kind="analyze", model="shop", time=NOW, mark=mark, spend=spend, shown=shown)


def numbers():
    one = group([0.05, 0.2, 0.4, 0.25, 0.1])
    one["numbers"] = {"count": estimate(1000, 20, 20), "mean": estimate(61.5, 0.7, 1.2)}
    one["quantiles"] = [{"level": 0.5, **estimate(60, 1, 2)}]
    bounds = {"low": -20, "high": 140, "scale": "linear", "from": "as given"}
    return asked("temperature", "histogram", [one], edges=[20, 45, 70, 95], bounds=bounds)


def words(*values):
    return asked("mood", "categories", [group([1 / len(values)] * len(values))], values=list(values))


def labels():
    return asked("label", "label", [group([0.43, 0.57])], values=["0", "1"], spend=None)


def curve(bend):
    x = [place / 20 for place in range(21)]
    y = [value**bend for value in x]
    return {"x": x, "y": y, "low": [max(v - 0.04, 0) for v in y], "high": [min(v + 0.04, 1) for v in y]}


def evaluation(auc):
    metrics = {"auc": estimate(auc, 0.01), "log_loss": estimate(0.61), "calibration": estimate(1.05)}
    return {"rows": estimate(900.0, 20, 30), "metrics": metrics, "roc": curve(0.5), "deciles": curve(1.1)}


def evaluated():
    shown = {
        "model": "shop",
        "versions": [{"version": 2, "aliases": ["canary"]}, {"version": 1, "aliases": ["production"]}],
        "population": "shop",
        "fold": "1/5",
        "notes": ["these people were in the training of shop:1"],
        "people": 118,
        "evaluations": [evaluation(0.742), evaluation(0.731)],
        "differences": {"auc": estimate(0.011, 0.004, 0.008), "log_loss": estimate(-0.004, 0.003, 0.005)},
        "spend": SPEND | {"purpose": "evaluate", "releases": 2},
    }
    return Result(kind="evaluate", model="shop", time=NOW, mark="noised", spend=shown["spend"], shown=shown)


def difference(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def recovered(prior, gain):
    return {"recovery": prior + gain, "prior": prior, "gain": difference(gain, gain - 0.02, gain + 0.02)}


def attacked():
    levels = [
        {
            "sigma": sigma,
            "epsilon": sigma and 3 / sigma,
            "declared": sigma == 0,
            "auc": auc,
            "auc_cost": difference(0.74 - auc, 0.735 - auc, 0.745 - auc),
            "whole": gain / 2,
            "features": {"temperature": recovered(0.4, gain), "mood": recovered(0.3, gain / 2)},
        }
        for sigma, auc, gain in ((0.0, 0.74, 0.55), (0.3, 0.736, 0.3), (1.0, 0.72, 0.08), (3.0, 0.69, 0.01))
    ]
    verdict = ["From a clear embedding 2 of 2 features are recovered better than by guessing."]
    shown = {"model": "shop", "version": 2, "auc_without": 0.71, "levels": levels, "verdict": verdict}
    return Result(kind="inversion", model="shop", time=NOW, mark="oracle", spend=None, shown=shown)


def drifted():
    columns = [
        {"column": "temperature", "psi": 0.31, "low": 0.27, "high": 0.36, "verdict": "drifted"},
        {"column": "mood", "psi": None, "low": 0.0, "high": None, "verdict": "unclear"},
    ]
    periods = {"reference": {"name": "october"}, "current": {"name": "november"}}
    shown = {"model": "shop", "columns": columns, "thresholds": {"moved": 0.1, "drifted": 0.25}, **periods}
    return Result(kind="drift", model="shop", time=NOW, mark="noised", spend=SPEND | {"purpose": "drift"}, shown=shown)


def noisy(value):
    return {"value": value, "low": value - 55.0, "high": value + 55.0}


def funnelled():
    phases = {"checked": 3900.0, "downloaded": 3650.0, "installed": 3600.0, "predicted": 3100.0}
    stopped = [{"phase": "downloaded", "reason": "too_large", **noisy(210.0)}]
    hidden = {"name": "trained", "value": None, "low": None, "high": None}
    version = {
        "version": 2,
        "devices": noisy(4000.0),
        "phases": [*({"name": phase, **noisy(value)} for phase, value in phases.items()), hidden],
        "stopped": stopped,
    }
    shown = {"model": "shop", "week": "2026-W47", "people": 5000, "threshold": 40.0, "versions": [version]}
    paid = SPEND | {"purpose": "funnel"}
    return Result(kind="funnel", model="shop", time=NOW, mark="noised", spend=paid, shown=shown)


def record(run, epsilon):
    oracle = {"auc": 0.7376, "log_loss": 0.61, "auc_without_server": 0.62, "auc_without_device": 0.716}
    private = {"epsilon": epsilon, "delta": 9e-4, "unit": "user", "protects": "device features", "rounds": 3}
    if epsilon is None:
        return TrainingRecord(kind="central", run=run, population="shop", users=469, examples=10108, oracle=oracle)
    learned = Learned(transforms={"steps": Numeric(mean=7319, std=20)}, users=587, run=run, epsilon=0.3, delta=9e-4)
    balance = Balance(prior=0.0512, prior_exact=False, keep=(0.1, 1.0), analytic=-2.303, estimated=0.021)
    private |= {"learned": learned, "balance": balance}
    said = {"mechanism": "Gaussian", "assumption": "nobody sees who took part", "sampling": 1.0}
    return TrainingRecord(
        kind="federated", run=run, population="shop", users=469, examples=10108, oracle=oracle, **private, **said
    )


def account():
    event = GaussianEvent(4.0)
    entries = [("train", 0, 1), ("train", 1, 2), ("train", 2, 3), ("analyze", 30, 1), ("evaluate", 65, 1)]
    about = {"noise_multiplier": event.noise_multiplier, "sampling": 1.0, "clip": 1.0, "attempt": 1}
    lines = [Entry(purpose=p, round=n, time=NOW + timedelta(minutes=m), **about) for p, m, n in entries]
    return Account(8.0, 9e-4, tuple(lines))


def run_json(name="monday"):
    return {
        "run": name,
        "versions": [1, 2],
        "unit": "user",
        "protects": "device features",
        "assumption": "nobody sees who took part",
        "doubt": None,
        "budget_epsilon": 8.0,
        "delta": 9e-4,
        "epsilon": 1.9,
        "left": 6.1,
        "spent_on": [{"purpose": "train", "releases": 3}, {"purpose": "analyze", "releases": 1}],
    }


def curves(by):
    return {
        name: [(step, at + by * step) for step in range(0, 201, 10)]
        for name, at in (("oracle_auc", 0.7), ("oracle_log_loss", 0.62))
    }


EMPTY = Facts(
    model="shop",
    written=NOW,
    device=("temperature", "mood"),
    request=("time",),
    label="bought",
    label_visible_to="device",
    release="clear. Reason: a test",
    budget=(8.0, 9e-4, "user"),
)


def facts(*results, **changed):
    """A model with two versions and a reference, and these answers of run monday; by default one of each kind."""
    found = results or (numbers(), words("calm", "cross"), labels(), evaluated(), funnelled(), drifted(), attacked())
    whole = {
        "aliases": {"production": 1, "canary": 2},
        "trainings": {1: record("monday", 1.2), 2: record("monday", 1.9), 3: record("tuesday", None)},
        "created": {1: NOW - timedelta(days=9), 2: NOW - timedelta(days=2), 3: NOW},
        "curves": {2: curves(2e-4), 1: curves(1e-4)},
        "results": [("monday", result) for result in found],
        "runs": [run_json()],
        "scope": "per run; repeats and tuning not composed",
        "composed": {"epsilon": 1.9, "delta": 9e-4, "accountant": "exact Gaussian", "runs": 1},
        "spending": [over_time("run monday", [account()], delta=9e-4, budget=8.0)],
    }
    return Facts(**vars(EMPTY) | whole | changed)
