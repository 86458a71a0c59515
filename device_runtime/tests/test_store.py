import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from device_runtime.encrypted import Full
from device_runtime.protocol import Held, Upload
from device_runtime.rows import Rows
from device_runtime.store import Served, Store
from hybrid import Categorical, Log1p, Numeric
from hybrid.bundle import Keeping, Manifest, Parameter, TrainProgram
from hybrid.errors import ConfigError, StoreError
from hybrid.features import Features
from hybrid.plan import Policy, Turn
from hybrid.query import Labels, Moments, Query, Scores
from hybrid.tokens import Pending

KEY = bytes(range(32))
NOW = 1_900_000_000_000
HOUR = 3_600_000
SECRET = "Sentinel-Wert-4711"
REQUEST = {"time": "7AM", "distance": 1.5}
FEATURES = {"mood": "Zufrieden-Glasklar", "steps": 7319.0, "temperature": None}


def served(at_ms: int = NOW, version: int = 7, server: tuple[float, ...] = (0.5, -2.0)) -> Served:
    return Served(at_ms, version, 0.25, server, 60_000)


def keeping(manifest: Manifest, **settings) -> Manifest:
    return manifest.model_copy(update={"keeping": Keeping(**settings)})


def events(store: Store, device: int | None = None) -> list[dict]:
    return [found for found in store.export(device) if found["kind"] == "event"]


def many(n: int, *, text: str = "words", device: int = 0) -> Rows:
    return Rows(
        device=np.full(n, device),
        row=np.arange(n),
        entity=[f"shop-{i % 10}" for i in range(n)],
        request={"time": ["7AM"] * n, "distance": [1.5] * n},
        features={"mood": [text] * n, "steps": list(range(n)), "temperature": [None] * n},
    )


def pages(file: Path, key: bytes = KEY) -> bytes:
    """What whoever has the key reads of a file's pages: SQLCipher 4's, 4,096 bytes of which 80 are IV and HMAC."""
    data, found = file.read_bytes(), b""
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096]
        cipher = Cipher(algorithms.AES(key), modes.CBC(page[4016:4032])).decryptor()
        found += cipher.update(page[16 if start == 0 else 0 : 4016])  # the first begins with the salt
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def store(file: Path, rows: Rows, manifest: Manifest):
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(rows, NOW)
        yield store


# What comes back


def test_rows_come_back_as_they_were_written(store: Store, rows: Rows):
    """Text, numbers and missing values alike, by device and row."""
    (found,) = store.rows()
    assert found.device.tolist() == [4, 4, 9]
    assert found.row.tolist() == [0, 1, 0]
    assert list(found.entity) == rows.entity
    assert {name: list(values) for name, values in found.request.items()} == rows.request
    assert {name: list(values) for name, values in found.features.items()} == rows.features


def test_what_is_read_feeds_the_transforms(store: Store, manifest: Manifest):
    """A missing text has the index past unseen, 3 of a vocabulary of 2; a missing number is NaN."""
    (found,) = store.rows()
    inputs = manifest.features.inputs(found.features)
    np.testing.assert_array_equal(inputs, np.array([[0, 7319, 83.4375], [1, 10543, 71.8125], [3, np.nan, np.nan]]))


def test_nan_is_stored_as_missing(file: Path, rows: Rows, manifest: Manifest):
    """NumPy columns with NaN and pandas-like text columns with NaN give None."""
    features = {**rows.features, "steps": np.array([1, np.nan, 3], np.float32), "mood": ["a", float("nan"), "b"]}
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(replace(rows, features=features), NOW)
        (found,) = store.rows()
    assert found.features["steps"] == (1.0, None, 3.0)
    assert found.features["mood"] == ("a", None, "b")


def test_a_process_reads_its_own_devices_only(store: Store):
    """Devices 5 to 9 are one device here, 9; 10 and above are none."""
    assert [batch.device.tolist() for batch in store.rows(range(5, 10))] == [[9]]
    assert not list(store.rows(range(10, 99)))


def test_batches_cut_the_same_order(store: Store):
    """Three rows in batches of at most two; what is written meanwhile does not wait for the reader."""
    batches = []
    for batch in store.rows(batch=2):
        batches.append(list(zip(batch.device, batch.row, strict=True)))
        store.answered([(4, 0, served())])
    assert batches == [[(4, 0), (4, 1)], [(9, 0)]]


def test_rows_are_added_all_or_none(store: Store, rows: Rows):
    """(9, 0) is there already, so (9, 1) of the same call is not added either."""
    again = replace(rows, device=np.array([9, 9, 9]), row=np.array([1, 0, 2]))
    with pytest.raises(ConfigError, match=r"refuses a row: UNIQUE constraint failed: events.device, events.row"):
        store.write(again, NOW)
    assert len(events(store)) == 3


@pytest.mark.parametrize(
    ("feature", "values", "sentence"),
    [
        ("mood", ["Zufrieden-Glasklar", 5, None], "column 'device.mood' must hold text, got int"),
        ("steps", [1.0, "12", None], "column 'device.steps' must hold numbers, got str"),
        ("steps", [1.0, b"12", None], "column 'device.steps' must hold numbers, got bytes"),
        ("steps", [1.0], r"columns must have 3 values like 'device', got \{'device.steps': 1\}"),
        ("steps", [1, 10**400, None], "column 'device.steps' holds a value that cannot be stored: OverflowError"),
        ("mood", ["\ud800", "", None], "column 'device.mood' holds a value that cannot be stored: UnicodeEncodeError"),
    ],
)
def test_a_wrong_column_is_refused_by_name(store: Store, rows: Rows, feature: str, values: list, sentence: str):
    """The message has the column, what it must hold and what it got, and no value; nothing is added."""
    wrong = replace(rows, row=rows.row + 10, features={**rows.features, feature: values})
    with pytest.raises(ConfigError, match=sentence) as error:
        store.write(wrong, NOW)
    assert "12" not in str(error.value)
    assert len(events(store)) == 3


def test_rows_must_have_the_bundle_s_columns(store: Store, rows: Rows):
    """One feature less and one that no bundle asked for are both named."""
    features = {"mood": rows.features["mood"], "steps": rows.features["steps"], "salary": [1.0, 2.0, 3.0]}
    with pytest.raises(ConfigError, match=r"missing \['device.temperature'\], not the bundle's \['device.salary'\]"):
        store.write(replace(rows, features=features), NOW)


def test_names_that_differ_in_case_are_two_features(file: Path, manifest: Manifest):
    """SQLite alone would take "Bar" and "bar" for one column."""
    names = ("Bar", "bar", "^bar", 'quo"ted', "Ärger", "ärger")
    features = Features(transforms={name: Numeric() for name in names})
    rows = Rows(np.array([0]), np.array([0]), ["a"], {}, {name: [float(i)] for i, name in enumerate(names)})
    changed = manifest.model_copy(update={"features": features, "request": {}})
    with Store.open(file, KEY, changed, now_ms=NOW) as store:
        store.write(rows, NOW)
        (found,) = store.rows()
        assert {name: values[0] for name, values in found.features.items()} == dict(zip(names, range(6), strict=True))
        assert events(store)[0]["features"] == dict(zip(names, range(6), strict=True))


# Encryption


def test_nothing_plain_is_on_the_disk_and_the_key_opens_it(file: Path, manifest: Manifest):
    """Not in the store, not in its journal in the middle of a transaction; with the key the value is there."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(many(500, text=SECRET), NOW)
        with store.together():
            store.forget(entity="shop-1", now_ms=NOW)
            journal = file.with_name(f"{file.name}-journal")
            assert journal.stat().st_size > 4096
            for each in file.parent.iterdir():
                assert SECRET.encode() not in each.read_bytes()
                assert b"SQLite" not in each.read_bytes()
    assert SECRET.encode() in pages(file)
    for each in file.parent.iterdir():
        assert SECRET.encode() not in each.read_bytes()


def test_its_files_are_their_owner_s_only(file: Path, manifest: Manifest):
    """Whatever the umask, and where the store was there with other rights before."""
    umask = os.umask(0)
    try:
        with Store.open(file, KEY, manifest, now_ms=NOW) as store:
            store.write(many(1), NOW)
            assert {each.name: each.stat().st_mode & 0o777 for each in file.parent.iterdir()} == {
                "store.sqlite": 0o600,
                "store.sqlite-journal": 0o600,
                "store.sqlite-reserve": 0o600,
            }
        file.chmod(0o644)
        with Store.open(file, KEY, manifest, now_ms=NOW):
            assert file.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)


def test_another_key_is_refused_and_nothing_changes(store: Store, file: Path, manifest: Manifest, capfd):
    """Of another app, and of a wrong length; SQLCipher's own log stays silent."""
    store.__exit__(None, None, None)
    before = file.read_bytes()
    with pytest.raises(StoreError, match="the key is not the one it was made with, or the file is damaged"):
        Store.open(file, KEY[::-1], manifest, now_ms=NOW)
    with pytest.raises(ConfigError, match="key must have 32 bytes, got 31"):
        Store.open(file, KEY[:-1], manifest, now_ms=NOW)
    assert file.read_bytes() == before
    assert capfd.readouterr() == ("", "")


def test_a_damaged_page_is_an_error_and_no_wrong_value(file: Path, manifest: Manifest):
    """One bit of each page from the middle on, whatever they hold: their HMAC does not hold."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(many(500), NOW)
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data), 4096):
        data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError), Store.open(file, KEY, manifest, now_ms=NOW) as store:  # noqa: PT012
        list(store.rows())
        list(store.export())


def test_what_is_no_store_is_refused(tmp_path: Path, manifest: Manifest):
    """An absent file is not made by reading it; a plain SQLite file, and a text, are named for what they are."""
    with pytest.raises(ConfigError, match="does not exist"):
        Store.open(tmp_path / "absent.sqlite", KEY)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be opened: FileNotFoundError"):
        Store.open(tmp_path / "no" / "folder.sqlite", KEY, manifest)
    with closing(sqlite3.connect(tmp_path / "plain.sqlite")) as database:
        database.execute("CREATE TABLE rows (device INTEGER)")
    with pytest.raises(StoreError, match="plain SQLite file, of an earlier release"):
        Store.open(tmp_path / "plain.sqlite", KEY, manifest)
    (tmp_path / "text.sqlite").write_text("not a database, whatever its name says " * 50)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store.open(tmp_path / "text.sqlite", KEY, manifest)
    (tmp_path / "empty.sqlite").touch(0o600)
    with pytest.raises(StoreError, match="is empty"):
        Store.open(tmp_path / "empty.sqlite", KEY)


def test_a_store_is_of_one_model(store: Store, file: Path, manifest: Manifest):
    """Another model's bundle does not open it."""
    with pytest.raises(StoreError, match="must be of model 'drinks', it is of 'meals'"):
        Store.open(file, KEY, manifest.model_copy(update={"model": "drinks"}), now_ms=NOW)


# Inferences, labels, examples


def test_an_inference_is_kept_whole(file: Path, manifest: Manifest):
    """What was asked, what the server side contributed, what came of it and when, as its person reads it."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        found = store.inference("shop-1", REQUEST, {**FEATURES, "steps": float("inf")}, served())
        assert store.label(1, NOW + 5, inference=found) == found
        assert list(store.export()) == [
            {
                "kind": "event",
                "id": found,
                "device": 0,
                "row": 0,
                "at": "2030-03-17T17:46:40.000+00:00",
                "entity": "shop-1",
                "request": REQUEST,
                "features": {**FEATURES, "steps": "inf"},
                "inference": {"version": 7, "prediction": 0.25, "server": [0.5, -2.0], "feature_age_ms": 60_000},
                "label": {"value": 1, "at": "2030-03-17T17:46:40.005+00:00"},
            }
        ]


def test_an_id_is_never_used_again(file: Path, manifest: Manifest):
    """A label that comes late for what was forgotten does not find the next inference, after a migration neither."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        first = store.inference("shop-1", REQUEST, FEATURES, served())
        store.forget(now_ms=NOW)
        second = store.inference("shop-1", REQUEST, FEATURES, served())
        assert second > first
        assert store.label(1, NOW, inference=first) is None
        store.forget(now_ms=NOW)
    less = Features(transforms={"steps": Numeric()})
    with Store.open(file, KEY, manifest.model_copy(update={"features": less}), now_ms=NOW) as store:
        assert store.inference("shop-1", REQUEST, {"steps": 1}, served()) > second


def test_an_answer_is_noted_with_its_event_until_the_label_is_there(store: Store):
    """A second answer replaces the first; once labelled, the event keeps what it was served. Others stay."""
    assert store.answered([(4, 0, served(NOW)), (4, 7, served(NOW))]) == 1
    assert store.answered([(4, 0, served(NOW + 1, server=(3.0, 4.0)))]) == 1
    assert store.label(0, NOW + 2, inference=store.id_of(4, 0)) is not None
    assert store.answered([(4, 0, served(NOW + 3))]) == 0
    (found,) = [event for event in events(store) if "inference" in event]
    assert (found["device"], found["row"], found["inference"]["server"]) == (4, 0, [3.0, 4.0])


def test_a_label_without_its_inference_is_reported(store: Store, manifest: Manifest):
    """Of an unknown entity or id, of another device, of an event not asked about: None, and nothing is kept."""
    store.inference("shop-3", REQUEST, FEATURES, served(), device=4)
    assert store.label(1, NOW, entity="shop-99", device=4) is None
    assert store.label(1, NOW, entity="shop-3", device=9) is None
    assert store.label(1, NOW, inference=12345) is None
    assert store.label(1, NOW, entity="shop-1", device=4) is None  # written, never asked about
    assert store.label(1, NOW - 1, entity="shop-3", device=4) is None  # before it was asked about
    assert not [event for event in events(store) if "label" in event]
    with pytest.raises(ConfigError, match="must be 0 or 1"):
        store.label(2, NOW, entity="shop-3")
    with pytest.raises(ConfigError, match="one of inference and entity"):
        store.label(1, NOW)


WINDOW_S = 10.0
MOMENTS = st.integers(0, 40).map(lambda tenths: NOW + tenths * 1000)
ENTITIES = st.sampled_from(["a", "b"])
DEVICES = st.sampled_from([0, 1])
ASKED = st.tuples(st.just("ask"), DEVICES, ENTITIES, MOMENTS)
LABELLED = st.tuples(st.just("label"), DEVICES, ENTITIES, MOMENTS, st.sampled_from([0, 1]))
LABELLED_BY_ID = st.tuples(st.just("id"), st.integers(0, 20), MOMENTS, st.sampled_from([0, 1]))


class Reference:
    """The join, in plain words: every inference as a list entry, newest found by looking at all of them."""

    def __init__(self) -> None:
        self.inferences: list[dict] = []

    def ask(self, device, entity, at_ms):
        self.inferences.append({"device": device, "entity": entity, "at": at_ms, "label": None})
        return len(self.inferences) - 1

    def label(self, device, entity, at_ms, value):
        fitting = [
            (each["at"], place)
            for place, each in enumerate(self.inferences)
            if (each["device"], each["entity"]) == (device, entity) and 0 <= at_ms - each["at"] <= WINDOW_S * 1000
        ]
        return self._set(max(fitting)[1], value) if fitting else None

    def id(self, place, at_ms, value):
        known = place < len(self.inferences) and at_ms - self.inferences[place]["at"] <= WINDOW_S * 1000
        return self._set(place, value) if known else None

    def _set(self, place, value):
        self.inferences[place]["label"] = value
        return place

    def labels(self, device, newest, now_ms, absent):
        mine = sorted((each["at"], place) for place, each in enumerate(self.inferences) if each["device"] == device)
        found = []
        for at_ms, place in mine:
            label = self.inferences[place]["label"]
            if label is None and absent is not None and now_ms > at_ms + WINDOW_S * 1000:
                label = absent
            if label is not None:
                found.append((float(place), label))
        return found[-newest:]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    done=st.lists(st.one_of(ASKED, LABELLED, LABELLED_BY_ID), max_size=25),
    absent=st.sampled_from([None, 0, 1]),
    newest=st.integers(1, 10),
    now_ms=MOMENTS,
)
def test_labels_join_as_a_plain_reference_joins_them(manifest, tmp_path_factory, done, absent, newest, now_ms):
    """Whatever is asked and labelled in whatever order: the same inference, the same examples, oldest first."""
    file = tmp_path_factory.mktemp("join") / "store.sqlite"
    kept = keeping(manifest, label_window_s=WINDOW_S, label_absent=absent)
    reference, ids = Reference(), []
    with Store.open(file, KEY, kept, now_ms=NOW) as store, store.together():
        for kind, *what in done:
            if kind == "ask":
                device, entity, at_ms = what
                features = {**FEATURES, "steps": float(reference.ask(*what))}
                ids.append(store.inference(entity, REQUEST, features, served(at_ms), device=device))
                continue
            if kind == "label":
                device, entity, at_ms, value = what
                expected, joined = reference.label(*what), store.label(value, at_ms, entity=entity, device=device)
            else:
                place, at_ms, value = what
                known = ids[place] if place < len(ids) else 999
                expected, joined = reference.id(*what), store.label(value, at_ms, inference=known)
            assert joined == (None if expected is None else ids[expected])
        for device in (0, 1):
            found = store.examples(device, newest, now_ms)
            pairs = list(zip(found.features["steps"], found.labels.tolist(), strict=True))
            assert pairs == reference.labels(device, newest, now_ms, absent)
    shutil.rmtree(file.parent)


def test_examples_are_columns_that_training_takes(file: Path, manifest: Manifest):
    """Two of three inferences have labels: their contributions, raw values and labels, oldest first; float32."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        for i, label in enumerate((1, None, 0)):
            features = {"mood": None, "steps": 10.0 * i, "temperature": 60.0}
            found = store.inference("a", REQUEST, features, served(NOW + i, server=(0.1 + i, -1.0)))
            if label is not None:
                store.label(label, NOW + i, inference=found)
        examples = store.examples(0, 100, NOW)
        assert len(store.examples(0, 0, NOW)) == len(store.examples(5, 9, NOW)) == 0
        assert store.examples(5, 9, NOW).server.shape == (0, 2)
    np.testing.assert_array_equal(examples.server, np.array([[0.1, -1], [2.1, -1]], np.float32))
    assert examples.features == {"mood": (None, None), "steps": (0.0, 20.0), "temperature": (60.0, 60.0)}
    assert examples.labels.tolist() == [1.0, 0.0]
    assert (examples.server.dtype, examples.labels.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(manifest.features.inputs(examples.features)[:, 1], [0.0, 20.0])


def test_only_a_contribution_that_the_bundle_can_train_with_is_an_example(file: Path, manifest: Manifest):
    """None at all, one of another width, one of another version: three inferences with labels, and no example."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        for answer in (served(server=()), served(server=(1.0, 2.0, 3.0)), served(version=6)):
            store.label(1, NOW, inference=store.inference("a", REQUEST, FEATURES, answer))
        assert len(store.examples(0, 9, NOW)) == 0
        store.label(1, NOW, inference=store.inference("a", REQUEST, FEATURES, served()))
        assert len(store.examples(0, 9, NOW)) == 1


def trained(manifest: Manifest, *names: str) -> Manifest:
    parameters = tuple(Parameter(name=name, shape=(2,)) for name in names)
    return manifest.model_copy(update={"train": TrainProgram(rows=8, server=3, missing=False, parameters=parameters)})


def test_slots_serve_every_version_of_their_definition_and_embeddings_their_own_only(file: Path, manifest: Manifest):
    """Where users train the server tower, version 8 trains with 7's slots; of a new definition, 9, it does not."""
    federated = trained(manifest, "server_tower.0.weight", "head.bias")
    eight = federated.model_copy(update={"version": 8})
    other = federated.model_copy(update={"version": 9, "definition_hash": "cd" * 32})
    with Store.open(file, KEY, federated, now_ms=NOW) as store:
        store.label(1, NOW, inference=store.inference("a", REQUEST, FEATURES, served(server=(1.0, 2.0, 3.0))))
    for opened, expected in ((federated, 1), (eight, 1), (other, 0)):
        with Store.open(file, KEY, opened, now_ms=NOW) as store:
            assert len(store.examples(0, 9, NOW)) == expected
    central = trained(manifest, "head.bias").model_copy(update={"version": 8})
    with Store.open(file, KEY, central, now_ms=NOW) as store:
        assert len(store.examples(0, 9, NOW)) == 0


def test_a_version_that_comes_back_for_another_definition_loses_its_contributions(file: Path, manifest: Manifest):
    """A registry that was made anew counts from 1 again."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.label(1, NOW, inference=store.inference("a", REQUEST, FEATURES, served()))
    again = manifest.model_copy(update={"definition_hash": "cd" * 32})
    with Store.open(file, KEY, again, now_ms=NOW) as store:
        assert len(store.examples(0, 9, NOW)) == 0
        assert events(store)[0]["inference"]["server"] == []


# Another bundle


def test_the_store_follows_the_bundle_s_features(store: Store, file: Path, manifest: Manifest):
    """A new one is missing, one that is gone is gone, one of another type starts anew; the rest stays."""
    store.answered([(4, 0, served())])
    store.__exit__(None, None, None)
    features = Features(transforms={"steps": Log1p(), "mood": Numeric(), "pulse": Numeric()})
    newer = manifest.model_copy(update={"version": 8, "features": features, "request": {"distance": "number"}})
    with Store.open(file, KEY, newer, now_ms=NOW) as store:
        (found,) = store.rows()
        assert found.features == {"steps": (7319.0, 10543.0, None), "mood": (None,) * 3, "pulse": (None,) * 3}
        assert found.request == {"distance": (1.5, 2.0, None)}
        assert events(store)[0]["inference"]["server"] == [0.5, -2.0]
        store.inference("a", {"distance": 1}, {"steps": 1, "mood": 2, "pulse": 3}, served(version=8))
    with Store.open(file, KEY) as store:
        assert events(store)[-1]["features"] == {"steps": 1.0, "mood": 2.0, "pulse": 3.0}


def test_what_a_bundle_no_longer_has_is_gone_for_whoever_has_the_key_too(file: Path, manifest: Manifest):
    """1,000 rows that grew after they were written, so that pages were split: no page holds the value any more."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(many(1000, text=SECRET), NOW)
        store.answered((0, i, served()) for i in range(0, 1000, 3))
        assert SECRET.encode() in pages(file)
    less = manifest.model_copy(update={"features": Features(transforms={"steps": Log1p()})})
    with Store.open(file, KEY, less, now_ms=NOW) as store:
        assert len(events(store)) == 1000
        assert SECRET.encode() not in pages(file)
        assert file.with_name("store.sqlite-journal").stat().st_size == 0


# What a query reads

STEPS = Moments(column="steps", low=0, high=9)


def test_a_query_reads_the_last_or_first_rows_of_a_device(store: Store):
    """Of four events of another device two, the oldest first; another device's are none of them."""
    store.write(many(4), NOW)
    last = store.asked(Query(parts=(STEPS,), rows=2), NOW)
    first = store.asked(Query(parts=(STEPS,), rows=2, take="first"), NOW)
    assert (last.columns["steps"], first.columns["steps"]) == ((2.0, 3.0), (0.0, 1.0))
    assert set(last.columns) == {"time", "distance", "mood", "steps", "temperature", "label"}
    assert (last.columns["time"], last.columns["label"]) == (("7AM", "7AM"), (None, None))
    assert list(last.features) == ["mood", "steps", "temperature"]


def test_a_query_of_a_device_without_rows_reads_none(store: Store):
    found = store.asked(Query(parts=(STEPS, Scores(nodes=(0, 1)))), NOW, device=77)
    assert (found.columns["steps"], found.server.shape, found.predicted.shape) == ((), (0, 2), (0,))


def test_a_query_that_reads_labels_takes_rows_that_have_one(file: Path, manifest: Manifest):
    """Of four events the second has a label, the third waits for one that will not come, the last still may."""
    asked = Query(parts=(Labels(),), rows=9)
    settings = keeping(manifest, label_window_s=3600, label_absent=0)
    with Store.open(file, KEY, settings, now_ms=NOW) as store:
        store.write(many(4), NOW)
        store.answered([(0, row, served(NOW + row)) for row in (1, 2)] + [(0, 3, served(NOW + HOUR))])
        store.label(1, NOW + 1, inference=store.id_of(0, 1))
        found = store.asked(asked, NOW + HOUR + 60_000)
        assert (found.columns["label"], found.columns["steps"]) == ((1, 0), (1.0, 2.0))
        assert len(store.asked(Query(parts=(STEPS,), rows=9), NOW).columns["label"]) == 4


def test_a_query_reads_what_this_version_was_given(file: Path, manifest: Manifest):
    """Of events of version 7, of 6, of none, and of a fallback, which kept nothing: the first alone."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(many(4), NOW)
        store.answered([(0, 0, served()), (0, 1, served(version=6)), (0, 3, Served(NOW, 7, 0.5))])
        found = store.asked(Query(parts=(STEPS,), rows=9), NOW)
    np.testing.assert_array_equal(found.server, [[0.5, -2.0]] + [[np.nan] * 2] * 3)
    np.testing.assert_array_equal(found.predicted, [0.25, np.nan, np.nan, np.nan])


# What goes


def test_what_is_too_old_goes(file: Path, manifest: Manifest):
    """Kept for an hour: what is older by a millisecond goes when the store is opened or written to, or told to."""
    hour = keeping(manifest, seconds=3600.0)
    with Store.open(file, KEY, hour, now_ms=NOW) as store:
        first = store.inference("a", REQUEST, FEATURES, served(NOW - HOUR))
        second = store.inference("a", REQUEST, FEATURES, served(NOW))
        assert [event["id"] for event in events(store)] == [first, second]
        assert store.enforce(NOW) == 0
        assert store.enforce(NOW + 1) == 1
        third = store.inference("b", REQUEST, FEATURES, served(NOW + HOUR + 1))
        assert [event["id"] for event in events(store)] == [third]
    with Store.open(file, KEY, hour, now_ms=NOW + 3 * HOUR) as store:
        assert events(store) == []


def test_what_a_wrong_clock_stamped_does_not_stay_for_ever(file: Path, manifest: Manifest):
    """Two hours ahead, where an hour is kept."""
    with Store.open(file, KEY, keeping(manifest, seconds=3600.0), now_ms=NOW) as store:
        store.inference("a", REQUEST, FEATURES, served(NOW + 2 * HOUR))
        assert store.enforce(NOW) == 1


def test_the_store_stays_below_its_size_and_the_oldest_go_first(file: Path, manifest: Manifest):
    """128 kB: after 3,000 inferences the file is no larger, and what is left are the newest ones, without a gap."""
    with Store.open(file, KEY, keeping(manifest, bytes=1 << 17), now_ms=NOW) as store:
        sizes = []
        for batch in range(30):
            with store.together():
                for i in range(100):
                    store.inference("a", REQUEST, FEATURES, served(NOW + 100 * batch + i))
            sizes.append(file.stat().st_size)
        left = [event["id"] for event in events(store)]
    assert max(sizes) <= (1 << 17) + 4096 * 8  # within one transaction more pages may be there than at its end
    assert sizes[-1] <= 1 << 17
    assert left == list(range(3001 - len(left), 3001))
    assert len(left) > 300


def test_an_update_that_waits_costs_no_example(file: Path, manifest: Manifest):
    """Of 300 kB in a store of 128 kB: the events stay; when it is sent, the file is small again."""
    with Store.open(file, KEY, keeping(manifest, bytes=1 << 17), now_ms=NOW) as store:
        store.write(many(100), NOW)
        store.keep_upload(Upload("a" * 32, "b" * 32, os.urandom(300_000), NOW + HOUR, 7))
        assert store.enforce(NOW) == 0
        assert file.stat().st_size > 300_000
        store.uploaded("a" * 32)
        assert file.stat().st_size < 1 << 17


def test_forgetting_gives_the_space_back(file: Path, manifest: Manifest):
    """2,000 rows of half a kilobyte: a megabyte that the file no longer has."""
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(many(2000, text="x" * 500), NOW)
        before = file.stat().st_size
        assert store.forget(now_ms=NOW) == 2000
    assert before > 1_000_000
    assert file.stat().st_size < 100_000


@pytest.mark.parametrize("seed", range(3))
def test_what_is_forgotten_is_gone_for_whoever_has_the_key_too(file: Path, manifest: Manifest, seed: int):
    """The rows of one entity, all over a file that grew in no order: no page holds their text, others keep theirs."""
    order = random.Random(seed)
    rows = many(1000)
    rows = replace(
        rows, features={**rows.features, "mood": [f"<{shop}>" + "x" * order.randrange(60) for shop in rows.entity]}
    )
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        store.write(rows, NOW)
        store.answered((0, row, served()) for row in order.sample(range(1000), 700))
        assert b"<shop-3>" in pages(file)
        assert store.forget(entity="shop-3", now_ms=NOW) == 100
        assert b"shop-3" not in pages(file)
        assert b"<shop-4>" in pages(file)
        assert len(events(store)) == 900
        assert store.forget(now_ms=NOW) == 900
        assert b"shop-" not in pages(file)


def test_forgetting_is_of_one_entity_one_device_or_everything(store: Store):
    """Device 4 has rows about shops 1 and 2, device 9 about shop 1."""
    assert store.forget(entity="shop-1", device=9, now_ms=NOW) == 1
    assert [(event["device"], event["entity"]) for event in events(store)] == [(4, "shop-1"), (4, "shop-2")]
    assert store.forget(entity="shop-2", now_ms=NOW) == 1
    assert store.forget(device=5, now_ms=NOW) == 0
    assert store.forget(device=4, now_ms=NOW) == 1
    assert events(store) == []


def test_who_forgets_waits_as_if_it_had_just_taken_part(store: Store):
    """Updates are gone; the plans are left, dated now; a device that never took part has none.

    Were they one, a plan that allows three in a week would have five of who forgot after the third.
    """
    for plan, at_ms in (("a" * 32, NOW - 2 * HOUR), ("b" * 32, NOW - HOUR)):
        assert store.begin(plan, at_ms, device=4)
    store.keep_upload(Upload("b" * 32, "c" * 32, b"update", NOW + HOUR, 7), device=4)
    store.halt("meals", [3], "predicts nonsense")
    store.forget(entity="shop-2", now_ms=NOW)  # its update was trained with it
    assert store.pending(NOW, device=4) == []
    assert store.history(0, device=4) == [NOW - 2 * HOUR, NOW - HOUR]
    store.forget(now_ms=NOW)
    assert store.history(0, device=4) == [NOW, NOW]
    assert store.history(0, device=9) == []
    plans = [found["plan"] for found in store.export() if found["kind"] == "participation"]
    assert plans == ["a" * 32, "b" * 32]
    assert store.halted(3) == "predicts nonsense"
    store.forget(now_ms=NOW + HOUR)
    assert store.history(0, device=4) == [NOW + HOUR, NOW + HOUR]


def test_who_forgets_takes_part_in_no_plan_again(store: Store):
    """A round may be open for longer than a policy's separation: its plan is refused, taken part in or tossed away."""
    assert store.begin("a" * 32, NOW, device=4)
    assert store.begin("b" * 32, NOW, device=4, takes_part=False)
    store.forget(now_ms=NOW)
    assert not store.begin("a" * 32, NOW + 48 * HOUR, device=4)
    assert not store.begin("b" * 32, NOW + 48 * HOUR, device=4)
    assert store.history(0, device=4) == [NOW]


# Training


def test_a_device_takes_part_in_a_plan_once(store: Store, file: Path, manifest: Manifest):
    """The second time is refused, after the process has ended too; another device of the process is another."""
    assert store.begin("a" * 32, NOW)
    assert not store.begin("a" * 32, NOW + 1)
    assert store.begin("a" * 32, NOW + 2, device=1)
    store.__exit__(None, None, None)
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        assert not store.begin("a" * 32, NOW + 3)
        assert store.begin("b" * 32, NOW + 4)
        assert store.history(NOW) == [NOW, NOW + 4]
        assert store.history(NOW + 1) == [NOW + 4]


def turn(step: int, *, training: str = "5" * 32, last: int = 0, separation: int = 3) -> Turn:
    return Turn(training=training, first_step=step, last_step=step + last, separation=separation)


def test_a_turn_is_a_separation_after_the_last_step_that_may_have_the_update(store: Store):
    """Of the same device and training; whoever asks too soon has not begun, and may begin later."""
    assert store.begin("a" * 32, NOW, turn=turn(4, last=1))
    assert store.next_step("5" * 32) == 4 + 1 + 3
    assert not store.begin("b" * 32, NOW, turn=turn(7))
    assert store.begin("b" * 32, NOW, device=1, turn=turn(7))
    assert store.begin("c" * 32, NOW, turn=turn(7, training="6" * 32))
    assert store.begin("b" * 32, NOW, turn=turn(8))
    assert store.history(0) == [NOW] * 3


def test_a_turn_is_drawn_once(store: Store):
    store.draw_turn("5" * 32, 7)
    store.draw_turn("5" * 32, 1)
    assert store.next_step("5" * 32) == 7


def test_forgetting_gives_no_turn_back(store: Store):
    """Else who has everything forgotten could be in two steps near each other. What is kept of it can be read."""
    store.begin("a" * 32, NOW, turn=turn(4))
    store.forget(now_ms=NOW)
    assert not store.begin("b" * 32, NOW, turn=turn(6))
    assert [found for found in store.export() if found["kind"] == "turn"] == [
        {"kind": "turn", "device": 0, "training": "5" * 32, "next_step": 7}
    ]


def held(number: int = 3, *, scope: str = "spring", token: bytes | None = None, expires_ms: int = NOW) -> Held:
    return Held(scope, number, Pending(bytes([number]) * 98, b"b" * 256, 1 << 2000 | number), expires_ms, token)


def test_a_token_is_kept_for_each_scope_and_device_until_it_is_spent(store: Store):
    """What it was asked for with first, then the token in its place."""
    assert store.held("spring") is None
    store.hold(held(), NOW)
    store.hold(held(4, scope="summer"), NOW)
    store.hold(held(5), NOW, device=1)
    store.hold(held(token=b"token"), NOW)
    assert store.held("spring") == held(token=b"token")
    assert (store.held("summer"), store.held("spring", device=1)) == (held(4, scope="summer"), held(5))
    store.spend("spring")
    assert store.held("spring") is None
    assert store.held("spring", device=1) == held(5)


def test_tokens_that_have_expired_go_with_the_next(store: Store):
    store.hold(held(), NOW)
    store.hold(held(scope="summer", expires_ms=NOW + 2), NOW + 1)
    assert store.held("spring") is None
    assert store.held("summer") is not None


def test_tokens_are_exported_and_forgotten_with_everything_of_a_device(store: Store):
    """Not with one entity: they are of no event. The issuer gives no other one of their windows."""
    store.hold(held(token=b"token"), NOW)
    store.hold(held(4, scope="summer"), NOW)
    found = [found for found in store.export() if found["kind"] == "token"]
    at = "2030-03-17T17:46:40.000+00:00"
    same = {"kind": "token", "device": 0, "expires": at}
    assert found == [
        same | {"scope": "spring", "number": 3, "token_base64": "dG9rZW4="},
        same | {"scope": "summer", "number": 4, "token_base64": None},
    ]
    store.forget(entity="shop-1")
    assert store.held("spring") is not None
    store.forget()
    assert store.held("spring") is store.held("summer") is None


def test_a_store_of_before_there_were_tokens_learns_them(file: Path, manifest: Manifest):
    """Also exported and forgotten by who has no bundle."""
    with Store.open(file, KEY, manifest) as store:
        store._db.all("DROP TABLE tokens")
    with Store.open(file, KEY) as store:
        assert list(store.export()) == []
        store.forget()
    with Store.open(file, KEY, manifest) as store:
        store.hold(held(), NOW)


def test_a_store_of_before_there_were_turns_learns_them(file: Path, manifest: Manifest):
    """It is read without, too."""
    with Store.open(file, KEY, manifest) as store:
        store._db.all("DROP TABLE turns")
    with Store.open(file, KEY) as store:
        assert list(store.export()) == []
    with Store.open(file, KEY, manifest) as store:
        assert store.begin("a" * 32, NOW, turn=turn(4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), separation=st.integers(1, 5), late=st.integers(0, 3))
def test_no_two_updates_are_ever_nearer_than_the_separation(
    tmp_path_factory, manifest: Manifest, seed: int, separation: int, late: int
):
    """Steps offered in any order, some twice, by two connections, each update in any step that its plan allows."""
    random_, folder = random.Random(seed), tmp_path_factory.mktemp("turns")
    counted = []
    with Store.open(folder / "s", KEY, manifest) as one, Store.open(folder / "s", KEY, manifest) as other:
        for number in range(30):
            asked = turn(random_.randint(1, 12), last=late, separation=separation)
            if random_.choice((one, other)).begin(f"{number:032x}", NOW, turn=asked):
                counted.append(random_.randint(asked.first_step, asked.last_step))
    assert counted
    assert all(later - earlier >= separation for earlier, later in pairwise(counted))


def test_a_device_that_is_killed_at_any_moment_never_takes_its_turn_twice(file: Path, manifest: Manifest):
    """30 processes, each killed while it takes turns: what it says that it sent is a separation apart in all."""
    fork, moments, sent = multiprocessing.get_context("fork"), random.Random(9), []
    Store.open(file, KEY, manifest).__exit__(None, None, None)
    for life in range(30):
        read, told = fork.Pipe(duplex=False)

        def child(life=life, told=told):
            with Store.open(file, KEY, manifest) as store:
                for number in range(10_000):
                    first = (store.next_step("5" * 32) or 1) - 2  # too soon at first
                    for step in range(max(first, 1), first + 4):
                        if store.begin(f"{life:016x}{number:08x}{step % 4:08x}", NOW, turn=turn(step, last=1)):
                            told.send(step)

        process = fork.Process(target=child)
        process.start()
        told.close()
        if moments.random() < 0.7:
            assert read.poll(60)
        time.sleep(moments.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        sent += received(read)
    assert len(sent) > 30
    assert all(later - (earlier + 1) >= 3 for earlier, later in pairwise(sent))


def test_a_lost_toss_is_decided_on_and_no_participation(store: Store):
    """Neither is a second toss possible, nor does the device wait as if it had taken part; its person can see it."""
    assert store.begin("a" * 32, NOW, takes_part=False)
    assert not store.begin("a" * 32, NOW + 1)
    assert store.history(0) == []
    assert [found["took_part"] for found in store.export() if found["kind"] == "participation"] == [False]


def test_a_training_can_tell_that_something_was_forgotten_meanwhile(store: Store):
    """By one more for each time, of whatever."""
    assert store.forgets == 0
    store.forget(entity="shop-2", now_ms=NOW)
    store.forget(now_ms=NOW)
    assert store.forgets == 2


def test_an_update_waits_until_it_is_taken_or_expired(store: Store):
    """With its id, bytes and conditions as they were; the next look at what is old deletes the expired one."""
    first = Upload("a" * 32, "1" * 32, b"first", NOW + HOUR, 7, Policy(battery=0.75))
    store.keep_upload(first)
    store.keep_upload(Upload("b" * 32, "2" * 32, SECRET.encode(), NOW + 2, 6))
    assert [(each.plan[0], each.upload[0], each.body) for each in store.pending(NOW)] == [
        ("b", "2", SECRET.encode()),
        ("a", "1", b"first"),
    ]
    assert store.pending(NOW + 3) == [first]
    assert store.pending(NOW, device=1) == []
    store.enforce(NOW + 3)
    assert [found["upload"][0] for found in store.export() if found["kind"] == "upload"] == ["1"]
    store.uploaded("a" * 32)
    assert store.pending(NOW) == []


def test_an_update_that_waited_before_conditions_were_kept_waits_under_the_strictest(
    store: Store, file: Path, manifest: Manifest
):
    """A store of an earlier build is brought up to date when it is opened; what waits in it is not lost."""
    store.keep_upload(Upload("a" * 32, "1" * 32, b"first", NOW + HOUR, 7, Policy(idle=False)))
    for column in ("version", "policy", "reports"):
        store._db.run(f"ALTER TABLE uploads DROP COLUMN {column}")
    for table in ("turns", "tokens", "journal", "reports"):
        store._db.run(f"DROP TABLE {table}")
    store.__exit__(None, None, None)
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        assert store.pending(NOW) == [Upload("a" * 32, "1" * 32, b"first", NOW + HOUR, 0, Policy())]
        assert [store.journal(0).of("2030-W11"), store.journal(0).due("2030-W11", NOW)] == [None, NOW]


def test_a_halt_is_of_this_model_s_versions(store: Store):
    """Another model's halts say nothing of it."""
    store.halt("meals", [3, 4], "predicts nonsense")
    store.halt("drinks", [5], "other")
    assert [store.halted(version) for version in (3, 4, 5, 7)] == ["predicts nonsense", "predicts nonsense", None, None]


def test_many_calls_are_one_where_they_are_together(store: Store):
    """The second fails, so the first has not happened."""
    with pytest.raises(ConfigError), store.together():  # noqa: PT012
        store.inference("a", REQUEST, FEATURES, served())
        store.label(2, NOW, entity="a")
    assert len(events(store)) == 3


# kill -9


def another(manifest: Manifest) -> Manifest:
    features = Features(transforms={"steps": Log1p(), "mood": Categorical(vocabulary=("a",)), "pulse": Numeric()})
    return manifest.model_copy(update={"version": 8, "features": features})


def work(file: Path, manifest: Manifest, step: int) -> None:
    """One change, the same whenever it is made; every seventh is another bundle's."""
    random_ = random.Random(step)
    now = NOW + 1000 * step
    opened = another(manifest) if step // 7 % 2 else manifest
    with Store.open(file, KEY, keeping(opened, bytes=1 << 18, seconds=200.0), now_ms=now) as store:
        features = {name: {"mood": SECRET}.get(name, 1.0) for name in opened.features.names}
        kind = random_.choice(["write", "write", "ask", "label", "forget", "answer", "train"])
        if kind == "write":
            rows = Rows(
                device=np.zeros(200, int),
                row=200 * step + np.arange(200) + 1_000_000,
                entity=[f"shop-{i % 10}" for i in range(200)],
                request={"time": [None] * 200, "distance": [float(step)] * 200},
                features={name: [value] * 200 for name, value in features.items()},
            )
            store.write(rows, now)
        elif kind == "ask":
            store.inference(f"shop-{step % 10}", REQUEST, features, served(now))
        elif kind == "label":
            store.label(1, now, entity=f"shop-{step % 10}")
        elif kind == "answer":
            store.answered((0, row + 1_000_000, served(now)) for row in range(200 * (step - 5), 200 * step, 3))
        elif kind == "forget":
            store.forget(entity=f"shop-{step % 10}", now_ms=now)
        else:
            with store.together():
                store.begin(f"{step:032x}", now)
                store.keep_upload(Upload(f"{step:032x}", f"{step:032x}", bytes(5000), now + 10_000, 7))


def received(read) -> list[int]:
    """What lies in a pipe whose writer has ended."""
    found = []
    with contextlib.suppress(EOFError):
        while read.poll():
            found.append(read.recv())
    return found


def state(file: Path) -> list[dict]:
    with Store.open(file, KEY) as store:
        return list(store.export())


def test_a_process_that_is_killed_leaves_what_it_was_told_is_kept(file: Path, manifest: Manifest):
    """40 processes, each killed at a random moment of writing, migrating, forgetting: a store that is whole, in the
    state after the last change that was acknowledged, or the one that was being made; and nothing plain on the disk.
    """
    moments, replica, step, cut = random.Random(5), file.with_name("replica.sqlite"), 0, 0
    work(file, manifest, 0)
    work(replica, manifest, 0)
    fork = multiprocessing.get_context("fork")
    for _ in range(40):
        read, told = fork.Pipe(duplex=False)

        def child(first=step, told=told):
            for i in range(first + 1, first + 1000):
                work(file, manifest, i)
                told.send(i)

        process = fork.Process(target=child)
        process.start()
        told.close()
        if moments.random() < 0.7:  # on a busy machine the others do not come as far as the first change
            assert read.poll(60)
        time.sleep(moments.random() * 0.12)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        journal = file.with_name(f"{file.name}-journal")
        cut += journal.exists() and journal.stat().st_size > 0
        for each in file.parent.iterdir():
            assert SECRET.encode() not in each.read_bytes()
        if moments.random() < 0.2:
            with pytest.raises(StoreError):  # whoever comes first with another key does no harm
                Store.open(file, KEY[::-1], manifest)
        acknowledged = max([step, *received(read)])
        for i in range(step + 1, acknowledged + 1):
            work(replica, manifest, i)
        step = acknowledged
        whole(file)
        found = state(file)
        if found != state(replica):
            work(replica, manifest, step + 1)
            step += 1
            # A change of one bundle's features to another's, and of what is too old, comes before the change itself.
            if found != state(replica):
                work(file, manifest, step)
                assert state(file) == state(replica)
    assert step > 40
    assert cut > 3, cut


def whole(file: Path) -> None:
    import sqlcipher3

    with closing(sqlcipher3.connect(str(file))) as database:
        database.execute(f"PRAGMA key=\"x'{KEY.hex()}'\"")
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA cipher_integrity_check").fetchall() == []


def test_two_processes_write_to_one_store(file: Path, manifest: Manifest):
    """Each 50 times ten events of its own, at once: all 1,000 are there."""
    Store.open(file, KEY, manifest, now_ms=NOW).__exit__(None, None, None)
    fork = multiprocessing.get_context("fork")

    def child(device):
        with Store.open(file, KEY, manifest, now_ms=NOW) as store:
            for i in range(50):
                store.write(replace(many(10, device=device), row=np.arange(10) + 10 * i), NOW)

    processes = [fork.Process(target=child, args=(device,)) for device in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with Store.open(file, KEY, manifest, now_ms=NOW) as store:
        assert (len(events(store, 1)), len(events(store, 2))) == (500, 500)


# A full disk


def test_a_write_beyond_what_a_file_may_have_is_refused_and_the_rest_goes_on(file: Path, manifest: Manifest):
    """The kernel's limit on a file's size, one page above the store's: what was there stays, and can be forgotten."""

    def child(said):
        with Store.open(file, KEY, manifest, now_ms=NOW) as store:
            store.write(many(500), NOW)
            limit = file.stat().st_size + 4096
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                store.write(many(500, device=1), NOW)
            except Full as error:
                said.send(str(error))
            said.send(len(events(store)))
            said.send(store.forget(entity="shop-3", now_ms=NOW))
            said.send(len(events(store)))
            store.write(many(10, device=2), NOW)
            said.send(len(events(store)))

    fork = multiprocessing.get_context("fork")
    read, said = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(said,))
    process.start()
    said.close()
    process.join()
    assert process.exitcode == 0
    heard = [read.recv() for _ in range(5)]
    assert heard[0].startswith("store 'store.sqlite' cannot be written: no space is left, or the disk fails")
    assert heard[1:] == [500, 50, 450, 460]
    whole(file)


def test_a_new_bundle_on_a_full_disk_leaves_the_store_as_it_is(file: Path, manifest: Manifest):
    """The columns would not fit: the bundle is refused, the old one goes on, and reading out needs none."""

    def child(said):
        with Store.open(file, KEY, manifest, now_ms=NOW) as store:
            store.write(many(500), NOW)
            limit = file.stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))
        before = state(file)
        try:
            Store.open(file, KEY, another(manifest), now_ms=NOW)
        except Full:
            said.send("refused")
        with Store.open(file, KEY, manifest, now_ms=NOW) as store:
            said.send(list(store.export()) == before)

    fork = multiprocessing.get_context("fork")
    read, said = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(said,))
    process.start()
    said.close()
    process.join()
    assert received(read) == ["refused", True]
    whole(file)


DISK = """
import os, sys
from pathlib import Path
from device_runtime.encrypted import Full
from device_runtime.store import Store
from device_runtime.tests.test_store import *

manifest = Manifest.model_validate_json(sys.stdin.read())
file = Path("store.sqlite")
with Store.open(file, KEY, manifest, now_ms=NOW) as store:
    store.write(many(2000), NOW)
other = os.open("other", os.O_WRONLY | os.O_CREAT)  # somebody else's, to the last byte
try:
    while os.write(other, bytes(4096)):
        pass
except OSError:
    os.close(other)
assert os.statvfs(".").f_bavail == 0
with Store.open(file, KEY, manifest, now_ms=NOW) as store:
    for write in (
        lambda: store.write(many(2000, device=1), NOW),
        lambda: store.inference("a", REQUEST, FEATURES, served()),
        lambda: store.begin("a" * 32, NOW),
    ):
        try:
            write()
        except Full:
            print("refused")
    print(len(events(store)))
    print(store.forget(entity="shop-3", now_ms=NOW))
    print(len(events(store)), b"shop-3" in pages(file))
    print(store.forget(now_ms=NOW))
    print(len(events(store)), file.stat().st_size)
    store.inference("a", REQUEST, FEATURES, served())
    print(len(events(store)), b"shop-" in pages(file))
"""


def test_a_full_disk_refuses_what_is_new_and_never_the_person(tmp_path: Path, manifest: Manifest):
    """A file system of 1 MB without a free byte: new events and plans are refused, what is there is read, and forgotten
    for good; then there is space again.
    """
    where = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*where, "mount -t tmpfs tmpfs /mnt"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system (unshare --map-root-user --mount)")
    script = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && cd {tmp_path} && exec "$0" -c "$1"'
    done = subprocess.run(
        [*where, script, sys.executable, textwrap.dedent(DISK)],
        input=manifest.model_dump_json(),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *refused, before, forgotten, after, rest, left, again = done.stdout.splitlines()
    assert refused == ["refused"] * 3
    assert (before, forgotten, after, rest) == ("2000", "200", "1800 False", "1800")
    assert left.startswith("0 ")
    assert again == "1 False"


# The command line


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text(KEY.hex() + "\n")
    return file


def command(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "HYBRID_STORE_KEY"} | environment
    done = [sys.executable, "-m", "device_runtime", *map(str, words)]
    return subprocess.run(done, capture_output=True, text=True, check=False, env=environment)


def test_a_person_reads_and_forgets_by_command(store: Store, file: Path, key_file: Path, tmp_path: Path):
    """`export` writes what is kept, for its owner only, replacing what lay there; `forget` deletes it."""
    store.answered([(4, 0, served())])
    store.__exit__(None, None, None)
    out = tmp_path / "mine.jsonl"
    out.write_text("before")
    out.chmod(0o644)
    done = command("export", "--store", file, "--key-file", key_file, "--out", out, "--device", "4")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"written": 2}), done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0]["features"] == {"mood": "Zufrieden-Glasklar", "steps": 7319.0, "temperature": 83.4375}
    assert out.stat().st_mode & 0o777 == 0o600
    done = command("forget", "--store", file, "--entity", "shop-2", HYBRID_STORE_KEY=KEY.hex())
    assert json.loads(done.stdout) == {"forgotten": 1}
    done = command("forget", "--store", file, "--everything", "--key-file", key_file)
    assert json.loads(done.stdout) == {"forgotten": 2}
    assert state(file) == []


def test_a_halted_version_asks_nothing(
    store: Store, file: Path, key_file: Path, bundle_file: Path, key: Ed25519PrivateKey, tmp_path: Path
):
    """The reason is told; nobody listens at the gateway's port, and no results are written."""
    store.halt("meals", [7], "predicts nonsense")
    trust = tmp_path / "trust.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    trust.write_bytes(key.public_key().public_bytes(encoding, form))
    files = ("--bundle", bundle_file, "--trust", trust, "--store", file, "--key-file", key_file)
    done = command("infer", *files, "--gateway", "http://127.0.0.1:1", "--out", tmp_path / "out.parquet")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: meals:7 was halted, another bundle must come: predicts nonsense\n"
    assert not (tmp_path / "out.parquet").exists()


def test_the_commands_want_the_right_key(store: Store, file: Path, key_file: Path):
    """None, another, one that others can read, one of another form: one sentence each, without the key."""
    forget = ("forget", "--store", file, "--everything")
    done = command(*forget)
    assert (done.returncode, done.stderr) == (
        1,
        "error: the store needs its key: name a file with --key-file, or set HYBRID_STORE_KEY\n",
    )
    done = command(*forget, HYBRID_STORE_KEY="ff" * 32)
    assert done.returncode == 1
    assert done.stderr.startswith("error: store 'store.sqlite' cannot be opened: the key is not the one")
    done = command(*forget, HYBRID_STORE_KEY="zz" * 32)
    assert done.stderr == "error: the store key must be 64 hex digits (32 bytes), got 64 characters\n"
    key_file.chmod(0o640)
    done = command(*forget, "--key-file", key_file)
    assert done.stderr == "error: the store key's file key must be readable by its owner only (chmod 600)\n"
    assert command("forget", "--store", file).returncode == 2  # what to forget must be said
    assert len(events(store)) == 3
