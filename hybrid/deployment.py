"""What `hybrid promote` hands to the gateway and the merge worker: a version, and the window of those served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from hybrid.errors import ConfigError
from hybrid.features import Features
from hybrid.spec import Serving


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
        merge: where the embeddings meet; on the "device", it is the server's that is sent.
        serving: how requests are answered.
        contributes: what an example holds of the server's side: its "embedding", or, where devices train the server
            tower too, the "slots" that go into it; as the version's bundle says.
        missing_server, missing_device: the embedding that stands for a missing side; empty where none was learned.
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
    merge: Literal["server", "device"] = "server"
    serving: Serving = Serving()
    contributes: Literal["embedding", "slots"] = "embedding"
    missing_server: tuple[FiniteFloat, ...] = ()
    missing_device: tuple[FiniteFloat, ...] = ()

    @model_validator(mode="after")
    def _learned(self) -> Self:
        for side, size in (("server", self.server_embedding), ("device", self.device_embedding)):
            if len(getattr(self, f"missing_{side}")) not in (0, size):
                raise ValueError(f"missing_{side} must have {size} numbers or none")
        return self

    @property
    def sent_embedding(self) -> int:
        """Size of what a request holds of the device: nothing where the device merges."""
        return self.device_embedding if self.merge == "server" else 0

    @property
    def server_slots(self) -> int:
        """Size of what a caller may be given of the server tower's input; 0: nobody is given any."""
        gives = self.serving.contribution and self.contributes == "slots"
        return len(self.server) + len(self.request) if gives else 0

    def write(self, folder: Path) -> Path:
        """Makes it the default of its model: the first in the window of `<folder>/<model>.json`, in one step.

        Raises:
            ConfigError: the file is there and cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self.model}.json"
        before = Window.read(target).versions if target.exists() else ()
        others = [version for version in before if version.version != self.version]
        window = Window(versions=(self, *others[: self.serving.versions - 1]))
        draft = target.with_suffix(".json.new")
        draft.write_text(window.model_dump_json(indent=2))
        return draft.replace(target)


class Window(BaseModel):
    """The versions of one model that are served, each by its own pair.

    Attributes:
        versions: the latest promotion first: it is the default, and what devices fetch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Annotated[tuple[Deployment, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if len({version.model for version in self.versions}) > 1:
            raise ValueError("versions must be of one model")
        if len({version.version for version in self.versions}) < len(self.versions):
            raise ValueError("versions must be distinct")
        return self

    @property
    def default(self) -> Deployment:
        """What answers a request that names no version."""
        return self.versions[0]

    @classmethod
    def read(cls, file: Path) -> Self:
        """One file that `Deployment.write` wrote.

        Raises:
            ConfigError: it is not one.
        """
        try:
            return cls.model_validate_json(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file.name} is not a deployment: {error}") from None

    @classmethod
    def read_all(cls, folder: Path) -> dict[str, Self]:
        """Every window in `folder`, by model.

        Raises:
            ConfigError: a file there is not one.
        """
        return {file.stem: cls.read(file) for file in sorted(folder.glob("*.json"))}
