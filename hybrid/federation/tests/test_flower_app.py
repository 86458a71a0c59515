import os

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity

from hybrid import Training
from hybrid.errors import ConfigError
from hybrid.federation import flower_app
from hybrid.federation.flower_app import APP, Job, Progress
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import PLAN, ROUND, WEIGHTS, flat_record
from hybrid.local.process import is_running

TRAINING = Training(rounds=2, sampling=0.5, local_lr=0.5, server_lr=0.5)


def test_the_app_names_what_flower_finds():
    """Its folder holds no code: both names are of this package, and of what Flower runs."""
    import tomllib

    components = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    assert components == {
        "serverapp": f"{flower_app.__name__}:server",
        "clientapp": f"{flower_app.__name__}:client",
    }
    assert [file.name for file in APP.iterdir()] == ["pyproject.toml"]
    assert isinstance(flower_app.server, ServerApp)
    assert isinstance(flower_app.client, ClientApp)


def test_a_job_is_read_as_it_was_written(tmp_path):
    """Through its file; a file that is none, and rounds below one, are refused."""
    job = Job(rounds=2, planned_cohort=10.0, training=TRAINING, nodes=2)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert Job.read(tmp_path / "job.json") == job
    with pytest.raises(ConfigError, match="cannot be read"):
        Job.read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="rounds"):
        Job(rounds=0, planned_cohort=10.0, training=TRAINING, nodes=2)


def test_rounds_are_taken_once_and_in_order(tmp_path):
    """Ten before two, as numbers go, not names; each to the bit; the end says how many failed."""
    left = Progress(tmp_path)
    for number in (2, 10, 1):
        left.put(number, np.array([number, 0.1], dtype=np.float32))
    assert [(number, flat.tolist()) for number, flat in left.take()] == [
        (number, [number, float(np.float32(0.1))]) for number in (1, 2, 10)
    ]
    assert list(left.take()) == []
    assert left.failed_rounds() is None
    left.end(3)
    assert left.failed_rounds() == 3


def test_who_follows_knows_the_server_apps_process(tmp_path):
    """This one, by its id and start."""
    left = Progress(tmp_path)
    assert left.process() is None
    left.begin()
    assert left.process()[0] == os.getpid()
    assert is_running(*left.process())


def test_a_node_that_does_not_say_where_its_aggregator_is_fails(monkeypatch):
    """The message names what --node-config must give."""
    monkeypatch.setattr(flower_app, "_end_with_parent", lambda: None)
    context = Context(run_id=1, node_id=1, node_config={"token": "t"}, state=RecordDict(), run_config={})
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    content = RecordDict({WEIGHTS: flat_record(np.zeros(2, np.float32)), PLAN: ConfigRecord({ROUND: 1})})
    with pytest.raises(ConfigError, match=r"--node-config must give aggregator .* got \['token'\]"):
        flower_app.client(Message(content, dst_node_id=1, message_type="train"), context)


def test_a_server_app_goes_through_its_jobs_rounds(tmp_path, monkeypatch):
    """Two nodes whose sums are 1 and 2 for each weight, of a planned cohort of ten: SGD at 0.5 adds 0.15 a round."""
    monkeypatch.setattr(flower_app, "_end_with_parent", lambda: None)
    job = Job(rounds=2, planned_cohort=10.0, training=TRAINING.model_copy(update={"server_optimizer": "SGD"}), nodes=2)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    np.save(tmp_path / "initial.npy", np.ones(2, np.float32))

    def node(total):
        app = ClientApp()

        @app.train()
        def train(message, context):
            return Message(RecordDict({"sum": flat_record(np.full(2, total))}), reply_to=message)

        return app

    def run(grid, context):
        context.run_config = {"job": str(tmp_path / "job.json")}
        flower_app.server(grid, context)

    simulate(run, {1: node(1.0), 2: node(2.0)})
    left = Progress(tmp_path)
    rounds = {number: flat.tolist() for number, flat in left.take()}
    assert rounds == {number: pytest.approx([1 + 0.15 * number] * 2) for number in (0, 1, 2)}
    assert left.failed_rounds() == 0
