import json

import pytest

from hybrid.errors import ConfigError
from hybrid.request_log import read_log

ROW = {
    "request_id": "00",
    "model": "shop",
    "version": 1,
    "definition_hash": "0" * 64,
    "entity": "bakery",
    "merged_ms": 5,
    "feature_ms": 2,
    "server": [1.5, None],
    "request": [],
    "score": 0.25,
}


def write(folder, name, *rows, end="\n"):
    text = "\n".join(json.dumps(ROW | row) if isinstance(row, dict) else row for row in rows) + end
    (folder / f"{name}.requests.jsonl").write_text(text)


def test_rows_of_a_model_come_in_the_order_of_their_time_each_once(tmp_path):
    """Two workers' files; one row was delivered to both, one is another model's."""
    write(tmp_path, "1", {"request_id": "a", "merged_ms": 9}, {"request_id": "b", "merged_ms": 3})
    write(tmp_path, "2", {"request_id": "a", "merged_ms": 9}, {"request_id": "c", "model": "other"})
    rows = read_log(tmp_path, "shop")
    assert [(row.request_id, row.merged_ms) for row in rows] == [("b", 3), ("a", 9)]
    assert rows[0].server == (1.5, None)


def test_a_line_that_a_killed_worker_left_half_written_is_left_out(tmp_path):
    """The last one, without its end."""
    write(tmp_path, "1", {}, '{"request_id": "b", "mod', end="")
    assert [row.request_id for row in read_log(tmp_path, "shop")] == ["00"]


def test_a_line_that_is_no_row_is_named_and_not_shown(tmp_path):
    """Not the last: somebody wrote there. It may hold an entity, so the message does not quote it."""
    write(tmp_path, "1", {}, '{"entity": "secret"}', {})
    with pytest.raises(ConfigError, match=r"line 2 of 1\.requests\.jsonl must be a logged row, and is not") as error:
        read_log(tmp_path, "shop")
    assert "secret" not in str(error.value)
