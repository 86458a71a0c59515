"""What `hybrid promote` hands to the gateway and the merge worker for one model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from hybrid.errors import ConfigError
from hybrid.features import Features


class Deployment(BaseModel):
    """One served version: all that serving needs to know, and no torch.

    Attributes:
        model, version: the pair.
        definition_hash: of the definition it was trained from.
        packed_view: Feast view that holds the packed server slots.
        join_key, join_key_type: of the entity.
        max_feature_age_s: older rows are refused as stale.
        server: server features, in slot order; their `schema_hash` is stored with each packed row.
        request: request features, in slot order, after the server's in the tower's input.
        server_embedding, device_embedding: sizes.
        server_tower, head: names of the Triton models; their Triton version is `version`.
            Tower: "slots" (n, server + request) FP32 -> "embedding" (n, a).
            Head: "server" (n, a), "device" (n, b) FP32 -> "prediction" (n, 1) FP32, a probability.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: int
    definition_hash: str
    packed_view: str
    join_key: str
    join_key_type: Literal["text", "integer"]
    max_feature_age_s: float
    server: Features
    request: Features
    server_embedding: int
    device_embedding: int
    server_tower: str
    head: str

    def write(self, folder: Path) -> Path:
        """Replaces `<folder>/<model>.json` in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self.model}.json"
        draft = target.with_suffix(".json.new")
        draft.write_text(self.model_dump_json(indent=2))
        return draft.replace(target)

    @classmethod
    def read_all(cls, folder: Path) -> dict[str, Deployment]:
        """Every deployment in `folder`, by model.

        Raises:
            ConfigError: a file there is not a deployment.
        """
        found = {}
        for file in sorted(folder.glob("*.json")):
            try:
                found[file.stem] = cls.model_validate_json(file.read_text())
            except ValueError as error:
                raise ConfigError(f"{file.name} is not a deployment: {error}") from None
        return found
