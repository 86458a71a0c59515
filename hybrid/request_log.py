"""The log of sampled requests: what the server's side of a prediction was, as served.

A line of JSON for each row. It holds an entity and its features, so a deployment says
which share of the requests may be kept, by default none. The device's embedding is
never in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hybrid.errors import ConfigError

SUFFIX = ".requests.jsonl"


class LoggedRow(BaseModel):
    """One row of a request that was predicted with both sides, or whose server side went to the device.

    Attributes:
        request_id: of the row, in hex; a repeat is a redelivery.
        model, version: that answered.
        definition_hash: of the definition that the version was trained from.
        entity: the Feast join key, as text.
        merged_ms: when it was merged, Unix time.
        feature_ms: when the oldest of its server features was true, Unix time.
        server, request: slots as served; None where missing.
        score: the prediction; None where the device predicts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str
    model: str
    version: int
    definition_hash: str
    entity: str
    merged_ms: int
    feature_ms: int
    server: tuple[float | None, ...]
    request: tuple[float | None, ...]
    score: float | None


def read_log(folder: Path, model: str) -> list[LoggedRow]:
    """The logged rows of a model, in the order of their time, each once.

    Raises:
        ConfigError: a line is not one; the last of a file may be, where its worker was killed.
    """
    rows = {row.request_id: row for file in sorted(folder.glob(f"*{SUFFIX}")) for row in _rows(file)}
    return sorted((row for row in rows.values() if row.model == model), key=lambda row: row.merged_ms)


def _rows(file: Path) -> Iterator[LoggedRow]:
    text = file.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield LoggedRow.model_validate_json(line)
        except ValueError:
            if number == text.count("\n") + 1:  # the last, and without an end
                return
            raise ConfigError(f"line {number} of {file.name} must be a logged row, and is not") from None
