"""`hybrid train` is killed with SIGKILL, again and again, and resumed."""

import json
import multiprocessing
import os
import random
import signal
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybrid.cli import main
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.workspace import Workspace

KILLS, ROUNDS = 20, 300
MODEL = f"""
    from datetime import timedelta

    from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, Training, View


    def tower():
        from torch import nn

        return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 4))


    def head():
        import torch

        class Match(torch.nn.Module):
            def forward(self, server, device):
                return (server * device).sum(-1)

        return Match()


    model = HybridModel(
        name="rides",
        server=Server(
            service="rides_zones",
            entity=Entity(name="zone", join_key="zone_id"),
            views=(View(name="zones", source="zones.parquet", features={{"demand": Numeric()}}),),
            max_feature_age=timedelta(days=300),
        ),
        device={{"age": Numeric(mean=30, std=10)}},
        server_tower=tower,
        device_tower=tower,
        head=head,
        label=Label(column="rode", visible_to="server"),
        privacy=Privacy(epsilon=6, delta=1e-3, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="a test of the command"),
        training=Training(rounds={ROUNDS}, sampling=1.0, server_lr=0.02, clip_quantile=0.5, average_last=0.5),
    )
"""
PRELOADED = [
    "torch._dynamo",
    "torch.export",
    "flwr.serverapp",
    "mlflow",
    "feast",
    "pandas",
    "hybrid.federation.training",
]


class _Project:
    """A folder in which `hybrid` commands run, each in a process of its own, whose libraries are loaded already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)

    def start(self, *words: str) -> multiprocessing.Process:
        """The command, running."""
        process = self._processes.Process(target=_hybrid, args=(self.folder, words))
        with pytest.MonkeyPatch.context() as path:
            path.syspath_prepend(Path(__file__).parents[1])  # where it finds `_hybrid`
            process.start()
        return process

    def run(self, *words: str) -> str:
        """The command's output, once it has ended well."""
        process = self.start(*words)
        process.join()
        assert process.exitcode == 0, (self.folder / "stderr").read_text()
        return (self.folder / "stdout").read_text()

    def spent(self, run: str) -> int:
        """Lines of a run's ledger that hold a release."""
        try:
            return (self.folder / "runs" / run / "ledger.jsonl").read_bytes().count(b'"spent"')
        except FileNotFoundError:
            return 0


def _hybrid(folder, words):
    os.chdir(folder)
    os.environ["HYBRID_HOME"] = str(folder / ".hybrid")
    sys.argv = ["hybrid", *words]
    with open("stdout", "w") as out, open("stderr", "w") as err, redirect_stdout(out), redirect_stderr(err):
        main()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a registered model and its population."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    now = datetime.now(UTC)
    zones = pd.DataFrame({"zone_id": ["centre", "port"], "demand": [1.0, -1.0], "event_timestamp": [now] * 2})
    zones.to_parquet(folder / "zones.parquet")
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"person": rng.integers(0, 200, 1000), "zone_id": rng.choice(["centre", "port"], 1000)})
    rows["age"], rows["at"] = rng.normal(30, 10, 1000), now.replace(tzinfo=None) + timedelta(minutes=1)
    rows["rode"] = (rows.age > 30).astype(int)
    rows.to_parquet(folder / "rows.parquet")
    project = _Project(folder)
    project.run("register", "model.py")
    project.run("features", "apply", "rides")
    project.run("population", "import", "rows.parquet", "--user", "person", "--time", "at", "--name", "rides")
    return project


def test_twenty_kills_change_no_bit_and_cost_nothing(project):
    """At random rounds, and at random moments from the command's start on, each time resumed.

    In the end weights, record, curves and ledger entries are those of a training that nobody disturbed.
    """
    words = ("rides", "--fold", "1/4", "--json")
    whole = json.loads(project.run("train", *words, "--run", "whole"))
    rng, killed, target = random.Random(0), 0, 0
    while killed < KILLS:
        begun = (project.folder / "runs" / "killed" / "config.json").exists()
        process = project.start("train", "rides", "--run", "killed", *(["--resume"] if begun else words[1:]))
        if killed % 4 == 0:
            process.join(rng.uniform(0, 2))
        else:
            target = max(target, project.spent("killed")) + rng.randint(0, 2 * ROUNDS // KILLS - 5)
            while project.spent("killed") < min(target, ROUNDS) and process.is_alive():
                process.join(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (project.folder / "stderr").read_text()
        killed += 1
    assert project.spent("killed") > 0
    resumed = json.loads(project.run("train", "rides", "--run", "killed", "--resume", "--json"))
    assert resumed["training"] == whole["training"] | {"run": "killed"}
    _assert_same(project.folder, resumed["version"], whole["version"])


def _assert_same(folder, mine, theirs):
    registry = Registry(Workspace(folder / ".hybrid"))
    weights = [registry.version("rides", version).weights for version in (mine, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])
    runs = [folder / "runs" / name for name in ("killed", "whole")]
    curves = [json.loads((run / "metrics.json").read_text()) for run in runs]
    assert curves[0] == curves[1]
    entries = [[entry.model_copy(update={"time": None}) for entry in Ledger.read(run).entries] for run in runs]
    assert len(entries[0]) == ROUNDS
    assert entries[0] == entries[1]
