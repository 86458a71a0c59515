import math
from pathlib import Path

import numpy as np
import pytest

from device_runtime.answers import Answer
from device_runtime.recording import Recording
from device_runtime.rows import Rows
from device_runtime.secret import read_store_key
from device_runtime.store import Store
from hybrid.bundle import Manifest, Parameter, TrainProgram
from hybrid.errors import ConfigError

KEY, NOW = bytes(32), 1_900_000_000_000


def answer(row: int, **fields) -> Answer:
    about = {"status": "ok", "prediction": 0.5, "version": 7, "feature_age_ms": 5, "server_embedding": (1.0, 2.0)}
    return Answer(device=0, row=row, **(about | fields))


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest):
    n = 6
    with Store.open(tmp_path / "store.sqlite", KEY, manifest, now_ms=NOW) as store:
        features = {"mood": [None] * n, "steps": [1.0] * n, "temperature": [None] * n}
        request = {"time": [None] * n, "distance": [None] * n}
        store.write(Rows(np.zeros(n, int), np.arange(n), ["a"] * n, request, features), NOW)
        yield store


def test_what_the_server_contributed_is_kept_where_it_is_the_entity_s_own(store: Store, manifest: Manifest):
    """Merged, or from features last read: its embedding. A fallback's: the prediction alone. No prediction: nothing."""
    with Recording(store, manifest, batch=2, now_ms=lambda: NOW + 1) as recording:
        recording.add(answer(0))
        recording.add(answer(1, status="unavailable", fallback="cached"))
        recording.add(answer(2, status="unknown_entity", fallback="device-only"))
        recording.add(answer(3, status="unavailable", fallback="constant", server_embedding=()))
        recording.add(answer(4, server_embedding=()))
        recording.add(Answer(0, 5, "unreachable"))
    found = [event.get("inference") for event in store.export()]
    assert [inference and (inference["prediction"], inference["server"]) for inference in found] == [
        (0.5, [1.0, 2.0]),
        (0.5, [1.0, 2.0]),
        (0.5, []),
        (0.5, []),
        (0.5, []),
        None,
    ]


def test_slots_are_kept_where_devices_train_the_server_tower_and_never_an_embedding(store: Store, manifest: Manifest):
    """Slots as they came, null where a value is missing; an embedding alone, of the same width even, is not kept."""
    parameters = (Parameter(name="server_tower.0.weight", shape=(2, 2)),)
    train = TrainProgram(rows=8, server=2, missing=False, parameters=parameters)
    federated = manifest.model_copy(update={"train": train})
    with Recording(store, federated, now_ms=lambda: NOW + 1) as recording:
        recording.add(answer(0, server_slots=(3.0, math.nan)))
        recording.add(answer(1))
        recording.add(answer(2, status="unavailable", fallback="cached", server_slots=(3.0, 4.0)))
        recording.add(answer(3, status="missing_device", fallback="server-only", server_slots=(3.0, 4.0)))
    found = [event["inference"]["server"] for event in store.export() if "inference" in event]
    assert found == [[3.0, None], [], [3.0, 4.0], []]


def test_answers_are_kept_in_batches_and_whatever_ends_the_run(store: Store, manifest: Manifest):
    """Two at once; the third when the context ends, though by an error."""

    def kept() -> int:
        return sum("inference" in event for event in store.export())

    with pytest.raises(KeyError), Recording(store, manifest, batch=2, now_ms=lambda: NOW) as recording:  # noqa: PT012
        recording.add(answer(0))
        assert kept() == 0
        recording.add(answer(1))
        assert kept() == 2
        recording.add(answer(2))
        raise KeyError
    assert kept() == 3


def test_a_store_key_is_64_hex_digits_in_a_private_file_or_the_environment(tmp_path: Path):
    """The file comes first; one that others can read, or of another form, is refused without a digit in the text."""
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text("ab" * 32 + "\n")
    assert read_store_key(file, {"HYBRID_STORE_KEY": "cd" * 32}) == b"\xab" * 32
    assert read_store_key(None, {"HYBRID_STORE_KEY": "cd" * 32}) == b"\xcd" * 32
    for text in ("ab" * 31, "ab" * 33, "zz" * 32, "a b" * 21 + "a"):
        with pytest.raises(ConfigError, match=r"must be 64 hex digits \(32 bytes\), got \d+ characters") as error:
            read_store_key(None, {"HYBRID_STORE_KEY": text})
        assert "ab" not in str(error.value)
    file.chmod(0o604)
    with pytest.raises(ConfigError, match="readable by its owner only"):
        read_store_key(file, {})
    with pytest.raises(ConfigError, match="name a file with --key-file, or set HYBRID_STORE_KEY"):
        read_store_key(None, {})
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        read_store_key(tmp_path / "absent", {})
