import numpy as np
import pytest

from hybrid.errors import ConfigError, FederationError
from hybrid.federation.flower_app import Job, Progress
from hybrid.local.prepared import Prepared, finish
from hybrid.spec import Training
from hybrid.version import TrainingRecord


@pytest.fixture
def folder(tmp_path):
    """A prepared training of two rounds, before its first."""
    record = TrainingRecord(kind="federated", run="spring", population="devices", users=40, examples=None)
    prepared = Prepared(model="kiosk", version=4, definition_hash="cd" * 32, record=record)
    (tmp_path / "job").mkdir()
    (tmp_path / "prepared.json").write_text(prepared.model_dump_json())
    job = Job(rounds=2, planned_cohort=40, training=Training(rounds=2), nodes=2)
    (tmp_path / "job" / "job.json").write_text(job.model_dump_json())
    return tmp_path


def test_a_training_that_has_not_ended_gives_no_version(folder):
    """Not before the last round's weights are there, and the ServerApp has said that it is over."""
    progress = Progress(folder / "job")
    for step in (lambda: None, lambda: progress.put(1, np.ones(3, np.float32)), lambda: progress.end(0)):
        step()
        with pytest.raises(FederationError, match="must hold all 2 rounds; the ServerApp has not ended"):
            finish(folder, None)


def test_a_training_without_a_released_round_gives_no_version(folder):
    progress = Progress(folder / "job")
    for number in (0, 1, 2):
        progress.put(number, np.ones(3, np.float32))
    progress.end(2)
    assert progress.last().number == 2
    with pytest.raises(FederationError, match="none of the 2 rounds was released"):
        finish(folder, None)


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Prepared file '.*prepared.json' cannot be read"):
        finish(tmp_path, None)
