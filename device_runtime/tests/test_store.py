import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device_runtime.store import Rows, read_rows, write_rows
from hybrid.bundle import Manifest
from hybrid.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path, rows: Rows, manifest: Manifest) -> Path:
    write_rows(tmp_path / "rows.sqlite", rows, manifest)
    return tmp_path / "rows.sqlite"


def test_rows_come_back_as_they_were_written(store: Path, rows: Rows, manifest: Manifest):
    """Text, numbers and missing values alike, by device and row."""
    (found,) = read_rows(store, manifest)
    assert found.device.tolist() == [4, 4, 9]
    assert found.row.tolist() == [0, 1, 0]
    assert list(found.entity) == rows.entity
    assert {name: list(values) for name, values in found.request.items()} == rows.request
    assert {name: list(values) for name, values in found.features.items()} == rows.features


def test_what_is_read_feeds_the_transforms(store: Path, manifest: Manifest):
    """A missing text has the index past unseen, 3 of a vocabulary of 2; a missing number is NaN."""
    (found,) = read_rows(store, manifest)
    inputs = manifest.features.inputs(found.features)
    np.testing.assert_array_equal(inputs, np.array([[0, 7319, 83.4375], [1, 10543, 71.8125], [3, np.nan, np.nan]]))


def test_nan_is_stored_as_missing(tmp_path: Path, rows: Rows, manifest: Manifest):
    """NumPy columns with NaN and pandas-like text columns with NaN give None."""
    features = {**rows.features, "steps": np.array([1, np.nan, 3], np.float32), "mood": ["a", float("nan"), "b"]}
    write_rows(tmp_path / "rows.sqlite", replace(rows, features=features), manifest)
    (found,) = read_rows(tmp_path / "rows.sqlite", manifest)
    assert found.features["steps"] == (1.0, None, 3.0)
    assert found.features["mood"] == ("a", None, "b")


def test_a_process_reads_its_own_devices_only(store: Path, manifest: Manifest):
    """Devices 5 to 9 are one device here, 9; 10 and above are none."""
    assert [batch.device.tolist() for batch in read_rows(store, manifest, devices=range(5, 10))] == [[9]]
    assert not list(read_rows(store, manifest, devices=range(10, 99)))


def test_batches_cut_the_same_order(store: Path, manifest: Manifest):
    """Three rows in batches of at most two."""
    batches = list(read_rows(store, manifest, batch=2))
    assert [list(zip(b.device, b.row, strict=True)) for b in batches] == [[(4, 0), (4, 1)], [(9, 0)]]


def test_rows_are_added_all_or_none(store: Path, rows: Rows, manifest: Manifest):
    """(9, 0) is there already, so (9, 1) of the same call is not added either."""
    again = replace(rows, device=np.array([9, 9, 9]), row=np.array([1, 0, 2]))
    with pytest.raises(ConfigError, match=r"refuses a row: UNIQUE constraint failed: rows.device, rows.row"):
        write_rows(store, again, manifest)
    assert sum(len(batch) for batch in read_rows(store, manifest)) == 3


def test_columns_of_an_older_store_may_lie_in_another_order(tmp_path: Path, rows: Rows, manifest: Manifest):
    """Rows are written by column name, and columns that the bundle does not know are left alone."""
    file = tmp_path / "rows.sqlite"
    names = ["device.steps", "device.old", "device.temperature", "request.distance"]
    with closing(sqlite3.connect(file)) as database:
        reals = ", ".join(f'"{name}" REAL' for name in names)
        texts = ", ".join(f'"{name}" TEXT' for name in ("entity", "device.mood", "request.time"))
        database.execute(f"CREATE TABLE rows ({reals}, {texts}, row INTEGER, device INTEGER)")
    write_rows(file, rows, manifest)
    (found,) = read_rows(file, manifest)
    assert found.features["steps"] == (7319.0, 10543.0, None)


@pytest.mark.parametrize(
    ("feature", "values", "sentence"),
    [
        ("mood", ["Zufrieden-Glasklar", 5, None], "column 'device.mood' must hold text, got int"),
        ("steps", [1.0, "12", None], "column 'device.steps' must hold numbers, got str"),
        ("steps", [1.0, b"12", None], "column 'device.steps' must hold numbers, got bytes"),
        ("steps", [1.0], r"columns must have 3 values like 'device', got \{'device.steps': 1\}"),
    ],
)
def test_a_wrong_column_is_refused_by_name(
    tmp_path: Path, rows: Rows, manifest: Manifest, feature: str, values: list, sentence: str
):
    """The message has the column, what it must hold and what it got, and no value."""
    wrong = replace(rows, features={**rows.features, feature: values})
    with pytest.raises(ConfigError, match=sentence) as error:
        write_rows(tmp_path / "rows.sqlite", wrong, manifest)
    assert "12" not in str(error.value)


def test_rows_must_have_the_bundle_s_columns(tmp_path: Path, rows: Rows, manifest: Manifest):
    """One feature less and one that no bundle asked for are both named."""
    features = {"mood": rows.features["mood"], "steps": rows.features["steps"], "salary": [1.0, 2.0, 3.0]}
    with pytest.raises(ConfigError, match=r"missing \['device.temperature'\], not the bundle's \['device.salary'\]"):
        write_rows(tmp_path / "rows.sqlite", replace(rows, features=features), manifest)


def test_a_store_of_another_bundle_is_refused(tmp_path: Path, manifest: Manifest):
    """A column too few, or of the other type, is named before a row is read."""
    file = tmp_path / "rows.sqlite"
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE rows (device INTEGER, row INTEGER, entity TEXT)")
        with pytest.raises(ConfigError, match=r"must have columns \['request.time'"):
            list(read_rows(file, manifest))
        for name in ("request.time", "device.mood", "device.steps", "device.temperature"):
            database.execute(f'ALTER TABLE rows ADD "{name}" TEXT')
        database.execute('ALTER TABLE rows ADD "request.distance" REAL')
    with pytest.raises(ConfigError, match=r"column 'device\.steps' must be REAL, got TEXT"):
        list(read_rows(file, manifest))


def test_what_is_no_store_is_refused(tmp_path: Path, manifest: Manifest):
    """An absent file is not made by reading it; another file is said to be unreadable."""
    with pytest.raises(ConfigError, match="does not exist"):
        list(read_rows(tmp_path / "absent.sqlite", manifest))
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.sqlite").write_text("not a database, whatever its name says " * 50)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_rows(tmp_path / "text.sqlite", manifest))
