import os
from dataclasses import replace

import numpy as np
import pytest

from hybrid.errors import ConfigError
from hybrid.request_log import read_log
from hybrid.spec import Serving
from serving.merge import Batch, features, merge
from serving.request_log import RequestLog
from serving.testing import MemoryReader, SumModels, deployment


def predicted(*entities):
    """A batch at 1,000 ms, its rows read and predicted."""
    n = len(entities)
    ids = np.frombuffer(b"".join(number.to_bytes(16, "big") for number in range(n)), dtype="V16")
    request = np.array([[1.0, np.nan]] * n, np.float32)
    embedding, asked = np.full((n, 2), 77.0, np.float32), np.full(n, 1_000)
    batch = Batch(deployment(), np.zeros(n, np.int64), ids, np.array(entities, dtype=object), request, embedding, asked)
    joined = features(batch, MemoryReader({"bakery": (0.1, "ok"), "ruin": (3.0, "stale_features")}), 1_000)
    return batch, joined, np.where(joined.status == "ok", np.float32(0.5), np.nan), 1_000


def sampled(folder, share, *entities, **settings):
    RequestLog(folder, share, **settings).sample(*predicted(*entities))
    return read_log(folder, "shop")


def test_a_row_is_kept_as_it_was_served_without_the_devices_embedding(tmp_path):
    """Slots to the last bit of float32, a missing one as none; features of 5 ms ago; 77 is nowhere in the file."""
    (row,) = sampled(tmp_path, 1, "bakery")
    assert (row.model, row.version, row.definition_hash, row.entity) == ("shop", 1, "0" * 64, "bakery")
    assert (row.merged_ms, row.feature_ms, row.request_id) == (1_000, 995, "00" * 16)
    assert np.float32(row.server[0]) == np.float32(0.1)
    assert row.request == (1.0, None)
    (file,) = tmp_path.iterdir()
    assert "77" not in file.read_text().replace(row.definition_hash, "")


def test_only_rows_with_a_prediction_are_kept(tmp_path):
    """A stale one and an unknown one were not predicted from features."""
    batch, joined, prediction, now_ms = predicted("bakery", "ruin", "nowhere", "bakery")
    prediction[3] = np.nan  # its head overflowed
    RequestLog(tmp_path, 1).sample(batch, joined, prediction, now_ms)
    assert [(row.entity, row.score) for row in read_log(tmp_path, "shop")] == [("bakery", 0.5)]


def test_a_row_that_a_fallback_answered_is_not_kept(tmp_path):
    """Of four rows one is merged from both sides; what the others have for a prediction, features did not give."""
    served = deployment().model_copy(
        update={
            "serving": Serving(missing_entity="device-only", stale_features="constant", constant=0.5),
            "missing_server": (1.0, 1.0),
        }
    )
    batch, *_ = predicted("bakery", "ruin", "nowhere", "bakery")
    batch = replace(batch, deployment=served, request=np.zeros((4, 2), np.float32))
    batch.embedding[3] = np.inf  # refused
    log, answered = RequestLog(tmp_path, 1), []
    for models in (SumModels(), SumModels(broken=True)):  # without Triton nothing is merged
        reader = MemoryReader({"bakery": (0.1, "ok"), "ruin": (3.0, "stale_features")})
        (found,) = merge(batch, lambda _, r=reader: r, models, 1_000, sample=log.sample)
        answered.append(found.fallback.tolist())
    assert answered == [["none", "constant", "device-only", "none"], ["none", "constant", "constant", "none"]]
    assert [row.request_id for row in read_log(tmp_path, "shop")] == ["00" * 16]


def test_a_row_whose_prediction_stays_on_the_device_is_kept_without_a_score(tmp_path):
    """The server's side is what is compared with the offline store; a row without it is not kept."""
    batch, *_ = predicted("bakery", "nowhere")
    served = deployment().model_copy(
        update={"merge": "device", "serving": Serving(missing_entity="device-only"), "missing_server": (1.0, 1.0)}
    )
    batch = replace(batch, deployment=served, embedding=np.empty((2, 0), np.float32))
    batch.request[:] = 0
    merge(
        batch,
        lambda _: MemoryReader({"bakery": (0.1, "ok")}),
        SumModels(),
        1_000,
        sample=RequestLog(tmp_path, 1).sample,
    )
    (row,) = read_log(tmp_path, "shop")
    assert (row.entity, row.score, row.feature_ms) == ("bakery", None, 995)


def test_nothing_is_kept_unless_a_share_is_declared(tmp_path):
    """Share 0: not even a file."""
    sampled(tmp_path / "log", 0, "bakery")
    assert not (tmp_path / "log").exists()


def test_workers_in_containers_keep_files_of_their_own(tmp_path, monkeypatch):
    """There each may have the process id 1, and one folder is theirs together."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    for host in ("worker-0", "worker-1"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        sampled(tmp_path, 1, "bakery")
    assert {file.name for file in tmp_path.iterdir()} == {"worker-0-1.requests.jsonl", "worker-1-1.requests.jsonl"}


def test_the_share_is_kept(tmp_path):
    """Of 20,000 rows at 0.1, 2,000 with a standard deviation of 42: within five of them."""
    kept = sampled(tmp_path, 0.1, *["bakery"] * 20_000, random=np.random.default_rng(1))
    assert abs(len(kept) - 2_000) < 5 * 42


def test_the_log_is_its_owners_alone(tmp_path):
    """Folder and file: it holds entities and their features."""
    before = os.umask(0)
    try:
        sampled(tmp_path / "log", 1, "bakery")
    finally:
        os.umask(before)
    (file,) = (tmp_path / "log").iterdir()
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "log", file)] == ["0o700", "0o600"]


def test_a_full_or_broken_log_stops_and_serving_does_not(tmp_path, caplog):
    """Said once; 300 bytes hold one row of this model, not two; a folder that is a file cannot be written."""
    rows = predicted("bakery")
    full = RequestLog(tmp_path / "full", 1, max_bytes=300)
    (tmp_path / "file").touch()
    broken = RequestLog(tmp_path / "file", 1)
    for log in (full, broken):
        for _ in range(3):
            log.sample(*rows)
    assert len(read_log(tmp_path / "full", "shop")) == 1
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the request log is full",
        "the request log cannot be written, no more requests are kept",
    ]


def test_a_share_that_is_none_is_refused(tmp_path):
    """1.5 of the rows cannot be kept."""
    with pytest.raises(ConfigError, match=r"--log-sample must be in \[0, 1\], got 1.5"):
        RequestLog(tmp_path, 1.5)
