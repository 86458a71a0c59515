import json
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import ConfigError
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.request_log import LoggedRow
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

TRAINING = TrainingRecord(kind="federated", run="r", population="p", users=9, examples=9, epsilon=4, delta=1e-3)
SEEN = datetime.now(UTC) - timedelta(hours=2)


@pytest.fixture
def log(project, tmp_path):
    """(entity, served demand, ...) -> a log of one row each, served an hour ago; offline, centre is 1, port none."""
    zones = {"zone_id": ["centre", "port"], "demand": [1.0, None], "event_timestamp": [SEEN] * 2}
    pd.DataFrame(zones).to_parquet(tmp_path / "zones.parquet")
    registry, network = Registry(Workspace.current()), Network.build(load_model(tmp_path / "model.py"))
    digest = registry.definition_hash("taxi")
    registry.create_version("taxi", weights=network.weights(), training=TRAINING, curves={}, expected_hash=digest)
    milliseconds = int(SEEN.timestamp() * 1000)

    def write(*rows, definition=digest):
        lines = [
            LoggedRow(
                request_id=f"{definition[:4]}-{number}",
                model="taxi",
                version=1,
                definition_hash=definition,
                entity=entity,
                merged_ms=milliseconds + 3_600_000 + number,
                feature_ms=milliseconds,
                server=(demand,),
                request=(),
                score=0.5,
            ).model_dump_json()
            for number, (entity, demand) in enumerate(rows)
        ]
        (tmp_path / "log").mkdir(exist_ok=True)
        (tmp_path / "log" / f"{definition[:4]}.requests.jsonl").write_text("\n".join(lines) + "\n")

    return write


def skew(*words):
    return CliRunner().invoke(app, ["skew", "taxi", "--log", "log", *words], catch_exceptions=False)


def test_rows_as_the_offline_store_has_them_are_no_skew(log):
    """Exit status 0, and nothing differs, a value that is missing on both sides included."""
    log(("centre", 1.0), ("port", None))
    done = skew("--json")
    said = json.loads(done.stdout)
    assert (done.exit_code, said["rows"], said["other_definitions"]) == (0, {"same": 2}, 0)
    assert [(each["of"], each["rows"], each["max_abs"]) for each in said["differences"]] == [
        ("demand", 0, 0.0),
        ("server embedding", 0, 0.0),
        ("score, server side alone", 0, 0.0),
    ]


def test_a_difference_is_told_by_feature_with_its_times(log):
    """Of five rows, one is 0.25 and one 4 away, one lost its value, and one's entity is in no offline table.

    The head multiplies, and what stands for the device is zeros: of the server's side alone the score is always 0.5.
    """
    log(("centre", 1.25), ("centre", 5.0), ("port", 2.0), ("nowhere", 1.0), ("centre", 1.0))
    done = skew("--json")
    said = json.loads(done.stdout)
    assert (done.exit_code, said["rows"]) == (1, {"skewed": 3, "absent": 1, "same": 1})
    demand, embedding, score = said["differences"]
    assert (demand["rows"], demand["missing"], demand["max_abs"]) == (3, 1, 4.0)
    served = [SEEN + timedelta(hours=1, milliseconds=number) for number in range(3)]
    expected = [moment.timestamp() for moment in served]
    assert [datetime.fromisoformat(t).timestamp() for t in demand["first"]] == pytest.approx(expected, abs=0.0011)
    assert (embedding["rows"], score["rows"], score["max_abs"]) == (3, 0, 0.0)


def test_a_difference_within_the_tolerance_is_none(log):
    """0.25 is within 0.3, and what is computed from it is not asked to be nearer than that."""
    log(("centre", 1.25))
    assert skew("--tolerance", "0.3").exit_code == 0
    assert skew().exit_code == 1


def test_the_table_says_the_same_and_no_entity(log):
    """A line for each feature, and the counts."""
    log(("centre", 5.0), ("port", None))
    done = skew()
    assert done.exit_code == 1
    assert "taxi: 2 rows: 1 same, 1 skewed" in done.stdout
    assert "demand" in done.stdout
    assert "centre" not in done.stdout


def test_rows_of_another_definition_are_counted_and_not_compared(log):
    """Their slots mean something else."""
    log(("centre", 1.0))
    log(("centre", 9.0), definition="f" * 64)
    assert "1 rows of other definitions were not compared" in skew().stdout


def test_without_rows_it_says_how_to_get_some(log):
    """An empty log is no proof of anything."""
    log(("centre", 9.0), definition="f" * 64)
    with pytest.raises(ConfigError, match="got 1 of other definitions; start workers with --log-sample"):
        skew()
