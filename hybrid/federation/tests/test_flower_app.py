import os
import select
import subprocess
import sys
from contextlib import nullcontext

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
from hybrid.federation.strategy import PLAN, ROUND, RUN, WEIGHTS, flat_array, flat_record
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
    """Two before ten, as numbers go, not names; each to the bit; the end says how many failed."""
    left = Progress(tmp_path)
    for number in (2, 10, 1):
        left.put(number, np.array([number, 0.1], dtype=np.float32))
    assert [(number, flat.tolist()) for number, flat in left.take(0)] == [
        (number, [number, float(np.float32(0.1))]) for number in (1, 2, 10)
    ]
    assert list(left.take(0)) == []
    assert left.failed_rounds() is None
    left.end(3)
    assert left.failed_rounds() == 3


def test_a_round_is_there_until_it_was_handed_on_and_not_told_twice(tmp_path):
    """Whoever takes it dies before it asks for the next: it is there again; told again after that, it is not taken."""
    left = Progress(tmp_path)
    for number in (1, 2):
        left.put(number, np.zeros(1, np.float32))
    assert next(left.take(0)).number == 1
    assert [number for number, _ in left.take(0)] == [1, 2]
    left.put(2, np.zeros(1, np.float32))
    assert list(left.take(2)) == []
    assert not list(tmp_path.glob("after-*"))


def test_one_process_at_a_time_is_at_a_job(tmp_path):
    """A second one waits until the first has ended, also by SIGKILL."""
    code = "import sys; from pathlib import Path; from hybrid.federation.flower_app import Progress\n"
    code += "with Progress(Path(sys.argv[1])).alone(): print('in', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    first, second = (
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
        for _ in range(2)
    )
    both = {process.stdout: process for process in (first, second)}
    ready, _, _ = select.select(both, [], [], 60)
    (inside,) = ready
    assert inside.readline() == "in\n"
    both.pop(inside).kill()
    (other,) = both
    assert other.readline() == "in\n"
    for process in (first, second):
        process.kill()
        process.communicate()


def test_who_follows_knows_the_server_apps_process(tmp_path):
    """This one, by its id and start, until another is expected."""
    left = Progress(tmp_path)
    assert left.process() is None
    left.begin()
    assert left.process()[0] == os.getpid()
    assert is_running(*left.process())
    left.expect()
    assert left.process() is None


def test_a_node_that_does_not_say_where_its_aggregator_is_fails(monkeypatch):
    """The message names what --node-config must give."""
    monkeypatch.setattr(flower_app, "_end_with_parent", lambda: None)
    context = Context(run_id=1, node_id=1, node_config={"token": "t"}, state=RecordDict(), run_config={})
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    content = RecordDict({WEIGHTS: flat_record(np.zeros(2, np.float32)), PLAN: ConfigRecord({ROUND: 1})})
    with pytest.raises(ConfigError, match=r"--node-config must give aggregator .* got \['token'\]"):
        flower_app.client(Message(content, dst_node_id=1, message_type="train"), context)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(nodes, rounds=2, optimizer="SGD") -> runs the ServerApp on the job of `tmp_path`, as `flwr run` does.

    Each node is given as its app, or as the sum that it answers for each weight.
    """
    monkeypatch.setattr(flower_app, "_end_with_parent", lambda: None)
    np.save(tmp_path / "initial.npy", np.ones(2, np.float32))

    def start(*nodes, rounds=2, optimizer="SGD"):
        settings = TRAINING.model_copy(update={"server_optimizer": optimizer})
        job = Job(rounds=rounds, planned_cohort=10.0, training=settings, nodes=len(nodes))
        (tmp_path / "job.json").write_text(job.model_dump_json())

        def app(grid, context):
            context.run_config = {"job": str(tmp_path / "job.json")}
            flower_app.server(grid, context)

        simulate(app, {number: node(told) for number, told in enumerate(nodes, start=1)})

    return start


def node(told):
    app = ClientApp()

    @app.train()
    def train(message, context):
        total = told if isinstance(told, float) else told(message)
        return Message(RecordDict({"sum": flat_record(np.full(2, total))}), reply_to=message)

    return app


def test_a_server_app_goes_through_its_jobs_rounds(run, tmp_path):
    """Two nodes whose sums are 1 and 2 for each weight, of a planned cohort of ten: SGD at 0.5 adds 0.15 a round."""
    run(1.0, 2.0)
    left = Progress(tmp_path)
    rounds = {number: flat.tolist() for number, flat in left.take(-1)}
    assert rounds == {number: pytest.approx([1 + 0.15 * number] * 2) for number in (0, 1, 2)}
    assert left.failed_rounds() == 0


def test_a_server_app_that_died_in_a_round_asks_for_it_again_by_the_same_name(run, tmp_path, monkeypatch):
    """From the same weights; and with Adam, whose steps remember, it ends where one ends that nobody killed.

    Each life of it is another run to Flower; to aggregators all are the first.
    """
    asked = []

    def dying(message):
        plan, weights = message.content[PLAN], flat_array(message.content[WEIGHTS])
        asked.append((plan[RUN], plan[ROUND], weights.tolist()))
        if len(asked) in (3, 4):
            raise RuntimeError("killed, for the test")
        return float(plan[ROUND])

    for life in (1, 2, 3):
        monkeypatch.setattr("hybrid.federation.simulation.RUN_ID", life)
        with pytest.raises(RuntimeError) if life < 3 else nullcontext():
            run(dying, rounds=5, optimizer="Adam")
    assert [(name, number) for name, number, _ in asked] == [("1", number) for number in (1, 2, 3, 3, 3, 4, 5)]
    assert asked[2] == asked[3] == asked[4]
    left = Progress(tmp_path)
    killed = dict(left.take(-1))
    (tmp_path / "checkpoint.npz").unlink()
    run(lambda message: float(message.content[PLAN][ROUND]), rounds=5, optimizer="Adam")
    whole = dict(left.take(-1))
    assert whole.keys() == killed.keys() == set(range(6))
    for number, flat in whole.items():
        np.testing.assert_array_equal(killed[number], flat)


def test_a_server_app_whose_rounds_are_over_asks_for_nothing(run, tmp_path):
    """Run again, it says that they are."""
    run(1.0)
    (tmp_path / "done.json").unlink()
    run(lambda message: pytest.fail("asked"))
    assert Progress(tmp_path).failed_rounds() == 0
