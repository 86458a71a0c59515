"""What `hybrid promote` hands to the gateway and the merge worker: a version, and the window of those served."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from hybrid.errors import ConfigError
from hybrid.features import Features
from hybrid.files import write_whole
from hybrid.spec import Serving

Action = Literal["promote", "canary", "shadow", "halt"]
BESIDE = ("canary", "shadow")  # the default
MOST_HALTED = 16  # that are told of: devices have long had another of those before


Check = Callable[["Window | None"], None]
"""Looks at the window that is there, None where none is, while nobody else changes it; what it raises leaves all as it
was: so that what was decided by one window is not done to another."""


def anything(_window: Window | None) -> None:
    """A check that every window passes."""


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

    def write(self, folder: Path, check: Check = anything) -> Path:
        """Makes it the default of its model, in one step; see `Window.promote`.

        Args:
            folder: of the deployments.
            check: of what is there before.

        Raises:
            ConfigError: the model's file is there and cannot be read, or the version was halted.
        """

        def to(window: Window | None) -> Window:
            check(window)
            return Window(versions=(self,)) if window is None else window.promote(self)

        change(folder, self.model, to, action="promote", version=self.version)
        return folder / f"{self.model}.json"


class Canary(BaseModel):
    """A version that some devices fetch in place of the default.

    Attributes:
        version: which.
        share: of devices, in (0, 1]: each draws a number for itself, once for each version, that it tells nobody.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1)]
    share: Annotated[FiniteFloat, Field(gt=0, le=1)]


class Shadow(BaseModel):
    """A version whose server tower runs beside the default's, on what the server knows anyway; it answers nobody.

    Attributes:
        version: which.
        share: of the default's batches, in (0, 1], that it runs on too; and of devices, where they compute it.
        devices: whether devices that let it compute the whole pair too, once they had the default's answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1)]
    share: Annotated[FiniteFloat, Field(gt=0, le=1)]
    devices: bool = False


class Halted(BaseModel):
    """A version that was taken back.

    Attributes:
        version: which.
        reason: for people and logs.
        signed: a `hybrid.plan.Halt` of it as it travels, in base64: devices take nobody else's word for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1)]
    reason: str
    signed: str


class Window(BaseModel):
    """The versions of one model that are served, each by its own pair, and what devices are to fetch of them.

    Attributes:
        versions: the default first, which answers a request that names none and is what devices fetch; then a
            canary and a shadow, and those that devices may still hold, the latest first.
        canary: what some devices fetch in its place; None: all fetch the default.
        shadow: what runs beside the default, and answers nobody.
        halted: versions that were taken back, the latest last. None of them is served.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Annotated[tuple[Deployment, ...], Field(min_length=1)]
    canary: Canary | None = None
    shadow: Shadow | None = None
    halted: Annotated[tuple[Halted, ...], Field(max_length=MOST_HALTED)] = ()

    @model_validator(mode="after")
    def _rolled_out(self) -> Self:
        others = {version.version for version in self.versions[1:]}
        if self.canary is not None and self.canary.version not in others:
            raise ValueError("canary must be one of the versions, and not the default")
        if self.shadow is not None and self.shadow.version not in others - {self._canary}:
            raise ValueError("shadow must be one of the versions, and neither the default nor the canary")
        if {halted.version for halted in self.halted} & (others | {self.default.version}):
            raise ValueError("versions must be none that was halted")
        return self

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

    @property
    def _canary(self) -> int | None:
        return None if self.canary is None else self.canary.version

    @property
    def tried(self) -> int | None:
        """What `hybrid watch` judges: the canary, or without one the shadow."""
        return self._canary if self.shadow is None or self.canary is not None else self.shadow.version

    def promote(self, deployment: Deployment) -> Window:
        """With this version as the default, and as many before it as it says; canary and shadow go on, if others.

        Raises:
            ConfigError: the version was halted.
        """
        self.check(deployment.version)
        return self._without(deployment.version)._with(deployment, self.versions)

    def try_out(self, deployment: Deployment, share: float) -> Window:
        """With this version as the canary, in place of any before it.

        Args:
            deployment: which.
            share: see `Canary`.

        Raises:
            ConfigError: the version was halted, or is the default.
        """
        canary = Canary(version=deployment.version, share=share)
        return self._beside(deployment, canary=canary)

    def shade(self, deployment: Deployment, share: float, *, devices: bool = False) -> Window:
        """With this version as the shadow, in place of any before it; it may be no canary any more.

        Args:
            deployment: which.
            share: see `Shadow`.
            devices: see `Shadow`.

        Raises:
            ConfigError: the version was halted, is the default or the canary, or its tower reads other features than
                the default's, whose it is to be given.
        """
        default, version = self.default, f"{deployment.model}:{deployment.version}"
        if deployment.version == self._canary:
            raise ConfigError(f"{version} is the canary, which devices have: take it back first")
        if (deployment.server, deployment.request) != (default.server, default.request):
            raise ConfigError(
                f"{version} reads other features of the server or of requests than {default.version}, beside which it "
                "would run on the same: make it a canary"
            )
        if default.serving.transport != "kafka":
            raise ConfigError(f"serving.transport of {default.model} must be 'kafka': only a merge worker has shadows")
        return self._beside(deployment, shadow=Shadow(version=deployment.version, share=share, devices=devices))

    def halt(self, halted: Halted) -> Window:
        """Without a version: of the default, what came before it is the default again.

        Raises:
            ConfigError: it is the only one.
        """
        left = [version for version in self.versions if version.version != halted.version]
        others = [found for found in self.halted if found.version != halted.version]
        window = self._without(halted.version).model_copy(update={"halted": (*others, halted)[-MOST_HALTED:]})
        stable = [version for version in left if version.version not in window._beside_default]
        if not stable:
            raise ConfigError(
                f"{self.default.model}:{halted.version} is the only version that is served: there is none to go back "
                "to; promote another first"
            )
        return window._with(stable[0], left)

    def check(self, version: int) -> None:
        """Raises: ConfigError: the version was halted, and can be offered to nobody again."""
        for halted in self.halted:
            if halted.version == version:
                raise ConfigError(
                    f"{self.default.model}:{version} was taken back ({halted.reason}), and devices take it from nobody "
                    "any more: train another"
                )

    @property
    def _beside_default(self) -> list[int]:
        return [one.version for one in (self.canary, self.shadow) if one is not None]

    def _without(self, version: int) -> Window:
        """With nothing that is of this version beside the default; not checked."""
        beside = ((name, getattr(self, name)) for name in BESIDE)
        return self.model_copy(update={name: None for name, one in beside if one and one.version == version})

    def _beside(self, deployment: Deployment, **beside: Canary | Shadow) -> Window:
        self.check(deployment.version)
        if deployment.version == self.default.version:
            raise ConfigError(f"{deployment.model}:{deployment.version} is the default already: all devices fetch it")
        window = self._without(deployment.version).model_copy(update=beside)
        return window._with(self.default, [deployment, *self.versions[1:]])

    def _with(self, default: Deployment, others: Iterable[Deployment]) -> Window:
        """As many others as the default says; canary and shadow are one more each."""
        found: dict[int, Deployment] = {}
        for version in (default, *others):
            found.setdefault(version.version, version)
        tried = [found.pop(version) for version in self._beside_default]
        first, *rest = found.values()
        versions = (first, *tried, *rest[: default.serving.versions - 1])
        return Window(versions=versions, canary=self.canary, shadow=self.shadow, halted=self.halted)

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


class Change(BaseModel):
    """What was done to a model's window: one line of its history.

    Attributes:
        at: when, in UTC.
        action: "promote": the version became the default; "canary": some devices fetch it; "shadow": it runs beside the
            default; "halt": it was taken back.
        version: which.
        share: of devices, of a canary; of batches, of a shadow.
        devices: true: so large a share of devices compute the shadow too, where their host apps let them.
        reason: why it was taken back.
        default, canary, shadow: version of each, after it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    action: Action
    version: int
    share: float | None = None
    devices: bool | None = None
    reason: str | None = None
    default: int
    canary: int | None = None
    shadow: int | None = None


def change(
    folder: Path,
    model: str,
    to: Callable[[Window | None], Window],
    *,
    action: Action,
    version: int,
    share: float | None = None,
    devices: bool = False,
    reason: str | None = None,
) -> Window:
    """Changes a model's window in one step, while nobody else does, and notes it in its history first.

    Args:
        folder: of the deployments.
        model: whose.
        to: the window that is there, None where none is -> the one to be. What it raises leaves all as it was.
        action: for the history, as the rest; see `Change`.
        version: which is changed.
        share: of a canary or shadow.
        devices: of a shadow.
        reason: of a halt.

    Returns:
        The window to be: it is in `<folder>/<model>.json`.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{model}.json"
    with (folder / f"{model}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        window = to(Window.read(target) if target.exists() else None)
        beside = {name: one.version for name in BESIDE if (one := getattr(window, name)) is not None}
        about = {"action": action, "version": version, "share": share, "devices": devices or None, "reason": reason}
        done = Change(at=datetime.now(UTC), default=window.default.version, **beside, **about)
        with (folder / f"{model}.history").open("a") as history:
            history.write(done.model_dump_json(exclude_none=True) + "\n")
            history.flush()
            os.fsync(history.fileno())
        # Without what is empty: serving of before there were rollouts reads a window that has none.
        empty: dict[str, Any] = {name: True for name in (*BESIDE, "halted") if not getattr(window, name)}
        if window.shadow is not None and not window.shadow.devices:
            empty["shadow"] = {"devices"}
        write_whole(target, window.model_dump_json(indent=2, exclude=empty).encode())
    return window


def history(folder: Path, model: str) -> tuple[Change, ...]:
    """What was done to a model's window, the oldest first; of versions before there was a history nothing.

    Args:
        folder: of the deployments.
        model: whose.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = folder / f"{model}.history"
    if not file.exists():
        return ()
    try:
        return tuple(map(Change.model_validate_json, file.read_text().splitlines()))
    except ValueError:
        raise ConfigError(f"{file.name} must hold one change a line, as JSON: a line of it is none") from None
