"""The declaration of a hybrid model: one Python file builds one `HybridModel`.

Everything that can be checked without torch, Feast or data is checked when it
is built; `hybrid register` checks the rest (`hybrid.network`, `feature_store`).
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import CodeType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_serializer,
    model_validator,
)

from hybrid.errors import ConfigError
from hybrid.features import AnyTransform, Bucketize, Categorical, Features, Hash, Log1p, Numeric, Transform
from hybrid.protocol import DEVICE_EMBEDDING, ENTITY

_TRANSFORMS = "Numeric, Log1p, Bucketize, Categorical or Hash"


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", name):
        raise ValueError(f"must be lower-case letters, digits and _, starting with a letter, got {name!r}")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]


class Declared(BaseModel):
    """A part of a declaration: immutable, and unknown fields are errors that name the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(type(self).__name__, error)) from None

    @classmethod
    def read(cls, file: Path) -> Self:
        """What a JSON file declares.

        Raises:
            ConfigError: it cannot be read, is no JSON object, or a field of it is wrong.
        """
        try:
            fields = json.loads(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"{cls.__name__} file {str(file)!r} cannot be read: {error.strerror}") from None
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ConfigError(f"{cls.__name__} file {str(file)!r} must be a JSON object") from None
        return cls(**fields)


class Entity(Declared):
    """What the server features hang on: a Feast entity and its join key.

    Attributes:
        name: of the Feast entity.
        join_key: the key's column in every view of the model.
        dtype: "text" or "integer".
    """

    name: Name
    join_key: str
    dtype: Literal["text", "integer"] = "text"


class View(Declared):
    """One Feast feature view over a Parquet file.

    Attributes:
        name: of the view.
        source: Parquet file with the join key, the timestamp and the features;
            relative paths are taken from the folder of the model's file.
        timestamp_field: the column with each row's event time.
        features: feature (column) name -> transform.
    """

    name: Name
    source: Path
    timestamp_field: str = "event_timestamp"
    features: dict[str, AnyTransform]

    @field_serializer("source")
    def _portable(self, source: Path) -> str:
        return source.name  # a definition is the same wherever its file lies


class Server(Declared):
    """What the server knows: a Feast feature service over one entity.

    Attributes:
        service: name of the Feast feature service; one per model version of the features.
        entity: what the features hang on.
        views: the views it joins; feature names are distinct across them.
        max_feature_age: older rows are refused as stale (Feast does not enforce its ttl online).
    """

    service: Name
    entity: Entity
    views: Annotated[tuple[View, ...], Field(min_length=1)]
    max_feature_age: timedelta

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [name for view in self.views for name in view.features]
        _distinct("server features", names)
        if self.entity.join_key in names:
            raise ValueError(f"the join key {self.entity.join_key!r} cannot be a feature; copy it to another column")
        if self.max_feature_age <= timedelta(0):
            raise ValueError(f"max_feature_age must be positive, got {self.max_feature_age}")
        return self

    @property
    def packed_view(self) -> str:
        """Name of the generated Feast view that serves all features as one array."""
        return f"{self.service}__packed"

    @property
    def features(self) -> Features:
        """All features of all views, in order."""
        return Features(transforms={n: t for view in self.views for n, t in view.features.items()})


class Label(Declared):
    """What is predicted: a yes or no about each request.

    Attributes:
        column: of the population that holds it, 0 or 1.
        visible_to: who learns it. "server": the privacy budget protects the
            device features only. "device": it protects the label too.
        window: how long to wait for the event after the prediction; None where
            the label is known at once.
        absent: the label of a request without an event once `window` has passed;
            None: such a request is no example.
    """

    column: str
    visible_to: Literal["server", "device"]
    window: timedelta | None = None
    absent: Literal[0, 1] | None = None

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.window is not None and self.window <= timedelta(0):
            raise ValueError(f"window must be positive, got {self.window}")
        if self.window is None and self.absent is not None:
            raise ValueError("absent says what no event within `window` means, so it needs a window")
        return self

    @property
    def protects(self) -> str:
        """What epsilon is about."""
        return "device features" if self.visible_to == "server" else "device features and label"


class Privacy(Declared):
    """The privacy budget of one training, and what it protects.

    Attributes:
        epsilon: at most this much; > 0 and <= 100.
        delta: of (epsilon, delta)-differential privacy; training refuses one above 1/N^1.1.
        clip: largest L2 norm of one unit's update, in parameter units.
        unit: whose whole contribution is protected. "user" only where each
            person is counted once across all their devices.
    """

    epsilon: Annotated[FiniteFloat, Field(gt=0, le=100)]
    delta: Annotated[FiniteFloat, Field(gt=0, lt=0.01)]
    clip: Annotated[FiniteFloat, Field(gt=0)]
    unit: Literal["user", "device"]


class Clear(Declared):
    """The device embedding is released as it is. Whoever holds the tower may invert it.

    Attributes:
        reason: why that is acceptable here; printed by `hybrid register`, `show` and `promote`.
    """

    kind: Literal["clear"] = "clear"
    reason: Annotated[str, Field(min_length=10)]


class Noised(Declared):
    """The device embedding is clipped and noised on the device before each release.

    Attributes:
        clip: largest L2 norm of a released embedding before noise.
        sigma: standard deviation of the Gaussian noise, in units of `clip`.
    """

    kind: Literal["noised"] = "noised"
    clip: Annotated[FiniteFloat, Field(gt=0)]
    sigma: Annotated[FiniteFloat, Field(gt=0)]


_LATER = ("balance", "balance_epsilon", "normalise_share", "normalise_rows")
"""Settings of `Training` that are in its JSON only where they are not the default."""


class Training(Declared):
    """How the device side is trained. Every field has a flag of `hybrid train`.

    Attributes:
        rounds: of federated training.
        sampling: probability with which each user takes part in a round (Poisson), in (0, 1].
        local_steps: gradient steps a user takes in a round, unless local_epochs says otherwise.
        local_epochs: how often a user takes each of its examples in a round, in place of local_steps.
        local_batch: examples of a step; None: all of the user's.
        local_lr: learning rate of those steps.
        proximal: mu of a term that holds each user near the round's weights (FedProx); 0: none.
        server_optimizer: a class of `torch.optim` by name, or "Yogi".
        server_lr: its learning rate.
        server_options: its other settings, e.g. {"betas": (0.9, 0.99)}.
        average_last: the model is the mean of its weights after about this share of the rounds, the last ones;
            0: those after the last round alone.
        separation: b: users take part by a schedule, each in every b-th round, in place of by coins (`sampling` is
            then of no account): no amplification is claimed, only that nobody takes part oftener or sooner again;
            None: by coins.
        buffer: K: asynchronous training, in which a round is over as soon as K updates came, each from a device that
            began at one of the latest versions; `rounds` and `separation`, which it needs, count such flushes. None: by
            rounds that all begin and end together.
        max_staleness: flushes that may happen while a device trains; what is later is not taken. With a buffer.
        noise: of the rounds: "independent"; or correlated between them, so that later rounds take back part of the
            noise of earlier ones, which needs a separation: "banded", or "blt", which remembers less.
        noise_memory: vectors that correlated noise remembers from round to round: bands - 1, or buffers of "blt";
            None: separation - 1, at most 31, or 4.
        clip_quantile: of the updates' norms that the clip follows, from privacy.clip on; None: it stays privacy.clip.
        server_tower: "central": fitted where its data is, on the label that the server sees, then frozen;
            "frozen": as its factory built it; "federated": trained by users too, from how it was built.
        tower_dropout: share of rows that train without the server's side, and of those without the device's, in
            [0, 0.5): what a missing side means is learned by it.
        upload: how a user's clipped update travels: "float32", or "int8", in 8 bits a weight, rounded by chance and
            clipped again where it arrives.
        balance: share of positives that devices train with, in (0, 1), 0.5 the usual: each device leaves out examples
            of the label that there is too much of, others in each round, and the version's correction takes
            predictions back to how often the label is 1. None: examples are taken as they come.
        balance_epsilon: of the budget, for what `balance` must know of everybody: how often the label is 1 before the
            training (where only devices know), and how far predictions are off after it. None: a quarter of the
            budget. That leaves the training nearly all: noise adds up in squares.
        normalise_share: of the budget's epsilon, what learning the constants of device features may cost, where some
            are declared to be learned; the rounds have what that leaves.
        normalise_rows: of a person, the last ones, that count in it at most.
    """

    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    sampling: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.5
    local_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    local_epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    local_batch: Annotated[int, Field(ge=1)] | None = None
    local_lr: Annotated[FiniteFloat, Field(gt=0)] = 0.1
    proximal: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    server_optimizer: str = "Adam"
    server_lr: Annotated[FiniteFloat, Field(gt=0)] = 0.01
    server_options: dict[str, FiniteFloat | bool | tuple[FiniteFloat, FiniteFloat]] = {}
    average_last: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    separation: Annotated[int, Field(ge=1)] | None = None
    buffer: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_staleness: Annotated[int, Field(ge=0, le=1000)] = 10
    noise: Literal["independent", "banded", "blt"] = "independent"
    noise_memory: Annotated[int, Field(ge=1, le=1000)] | None = None
    clip_quantile: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    server_tower: Literal["central", "frozen", "federated"] = "central"
    tower_dropout: Annotated[FiniteFloat, Field(ge=0, lt=0.5)] = 0.0
    upload: Literal["float32", "int8"] = "float32"
    balance: Annotated[FiniteFloat, Field(gt=0, lt=1)] | None = None
    balance_epsilon: Annotated[FiniteFloat, Field(gt=0)] | None = None
    normalise_share: Annotated[FiniteFloat, Field(gt=0, le=0.9)] = 0.1
    normalise_rows: Annotated[int, Field(ge=1, le=1000)] = 4

    @model_serializer(mode="wrap")
    def _as_declared(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings that came later, where they are not changed: definitions of before keep their hash."""
        defaults = {name: type(self).model_fields[name].default for name in _LATER}
        return {name: value for name, value in fields(self).items() if (name, value) not in defaults.items()}

    @model_validator(mode="after")
    def _balance(self) -> Self:
        if self.balance is None and self.balance_epsilon is not None:
            raise ValueError("balance_epsilon must be left out without balance: there is nothing to ask")
        return self

    @model_validator(mode="after")
    def _noise(self) -> Self:
        if self.noise != "independent" and self.separation is None:
            raise ValueError(f"separation must be given with noise={self.noise!r}: how soon again a user may take part")
        if self.buffer is not None and self.separation is None:
            raise ValueError(f"separation must be given with buffer={self.buffer}: how many flushes a user waits")
        if self.noise == "independent" and self.noise_memory is not None:
            raise ValueError("noise_memory must be left out with noise='independent', which remembers nothing")
        if self.separation is not None and self.clip_quantile is not None:
            raise ValueError(
                "clip_quantile must be left out with a separation: noise that spans the rounds is drawn for one clip"
            )
        return self


ServerMissing = Literal["error", "device-only", "constant"]


class Serving(Declared):
    """How requests are answered, and with what where a side is missing. It may change without training again.

    A request is never answered by a fallback that is not declared here, and every
    answer names the one that it is from.

    Attributes:
        transport: "kafka": requests and answers cross topics, which can be replayed, audited and fanned out;
            "direct": the gateway asks the feature store and Triton itself, at the lowest latency.
        versions: so many of the latest promotions are served, each by its own pair: devices hold one tower, and
            take a while to fetch the next.
        missing_entity: where the feature store has no row for the entity: "error"; "device-only", predicted with the
            embedding that was learned for a missing server side; or "constant".
        stale_features: where its row is older than `server.max_feature_age`, or was packed by another schema.
        unavailable: where the feature store does not answer, also: "cached", predicted with what was last read of the
            entity, while that is younger than `server.max_feature_age`; of an entity of which nothing is kept, the
            constant if there is one, else an error. Without Triton nothing can be predicted, server embeddings that
            are kept are of no use, as the head runs there too, and "device-only" and "cached" are the constant.
        missing_device: where a request comes without the device's embedding: "error"; "server-only", predicted with
            the embedding that was learned for a missing device side; or "constant".
        constant: the probability of "constant", and of rows whose fallback cannot be computed either; None: those
            are errors.
        contribution: whether a caller that asks for what the server contributed is given it, so that a device can keep
            it as the server's part of an example. For merge="server" that is the output `server_embedding`: it
            gives the server tower's output away, for any entity that a caller may name, and whoever collects enough
            of them can learn what the tower tells of the server's features, or imitate it. Where devices train the
            server tower too (training.server_tower="federated"), for either merge, it is `server_slots` as well: the
            server's features themselves, normalised and clipped or as places in a vocabulary.
    """

    transport: Literal["kafka", "direct"] = "kafka"
    versions: Annotated[int, Field(ge=1, le=16)] = 2
    missing_entity: ServerMissing = "error"
    stale_features: ServerMissing = "error"
    unavailable: ServerMissing | Literal["cached"] = "error"
    missing_device: Literal["error", "server-only", "constant"] = "error"
    constant: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    contribution: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        constants = [name for name, value in self if value == "constant"]
        if constants and self.constant is None:
            raise ValueError(f"constant must be a probability, since {constants[0]}='constant'")
        return self

    @property
    def learned(self) -> tuple[str, ...]:
        """The fields whose fallback needs an embedding that tower dropout learns."""
        return tuple(name for name, value in self if value in {"device-only", "server-only"})


class OnDevice(Declared):
    """What devices keep, and what training may ask of them at most. It may change without training again.

    Attributes:
        keep: examples older than this are deleted from the device.
        keep_mb: size of the device's store, beyond which its oldest examples are deleted.
        max_examples: of one round of training, the newest ones.
        max_seconds: of one round of training; one that takes longer is given up, and nothing is sent.
        max_memory_mb: that one round may add to what the process takes; the same.
        bundle_lifetime: from promotion on, after which devices no longer install the bundle; None: no end.
    """

    keep: timedelta = timedelta(days=30)
    keep_mb: Annotated[FiniteFloat, Field(ge=0.0625)] = 16.0
    max_examples: Annotated[int, Field(ge=1)] = 1024
    max_seconds: Annotated[FiniteFloat, Field(gt=0)] = 60.0
    max_memory_mb: Annotated[int, Field(ge=1)] = 512
    bundle_lifetime: timedelta | None = None

    @model_validator(mode="after")
    def _positive(self) -> Self:
        for name in ("keep", "bundle_lifetime"):
            value = getattr(self, name)
            if value is not None and value <= timedelta(0):
                raise ValueError(f"{name} must be positive, got {value}")
        return self


class Drift(Declared):
    """What watching for drift may cost people, beside what training costs. It may change without training again.

    Attributes:
        epsilon: of everything that is counted for it in one ISO week (UTC), at privacy.delta; > 0 and <= 100.
        periods: that are counted in a week, each for an equal part of that. A comparison needs two, its reference and
            its own; what was counted once is kept, and costs nothing again.
    """

    epsilon: Annotated[FiniteFloat, Field(gt=0, le=100)]
    periods: Annotated[int, Field(ge=1, le=1000)] = 2


class Funnel(Declared):
    """What telling where devices drop out may cost people, beside all else. It may change without training again.

    Attributes:
        epsilon: of what a device tells of one ISO week (UTC), once, at privacy.delta; > 0 and <= 100.
        least: devices below which no number is shown, however little noise there is.
    """

    epsilon: Annotated[FiniteFloat, Field(gt=0, le=100)]
    least: Annotated[int, Field(ge=1)] = 20


Factory = Callable[[], Any]


class HybridModel(Declared):
    """A hybrid model: server tower, device tower and head, declared in one file.

    A tower is given as a function without arguments that returns a
    `torch.nn.Module`; so a declaration is read without torch.

    Attributes:
        name: of the model, everywhere.
        server: the Feast features and their entity.
        request: features that the caller sends with each request; the server sees them.
        device: features known only on the device; they never leave it.
        server_tower: () -> module, (n, server.width + request.width) float32 -> (n, a).
        device_tower: () -> module, (n, device.width) float32 -> (n, b).
        head: () -> module, ((n, a), (n, b)) -> (n,) logits.
        label: what is predicted, and who learns it.
        privacy: the budget of one training.
        merge: where the two embeddings meet. "server": the device's is sent, a prediction comes back. "device": the
            request holds nothing of the device, the server's embedding comes back, and the device predicts; so every
            caller learns what the server tower says of the entities it names.
        release: for merge="server", how the device embedding leaves the device.
        training: defaults of `hybrid train`.
        serving: how requests are answered.
        on_device: what devices keep, and what training may ask of them.
        drift: what `hybrid drift` may spend; None: nothing.
        funnel: what `hybrid funnel` may; None: nothing.

    Raises:
        ConfigError: a field is wrong; the message names it, what it must be and what it got.
    """

    name: Name
    server: Server
    request: dict[str, AnyTransform] = {}
    device: dict[str, AnyTransform]
    server_tower: Annotated[Factory, Field(exclude=True, repr=False)]
    device_tower: Annotated[Factory, Field(exclude=True, repr=False)]
    head: Annotated[Factory, Field(exclude=True, repr=False)]
    label: Label
    privacy: Privacy
    merge: Literal["server", "device"]
    release: Annotated[Clear | Noised, Field(discriminator="kind")] | None = None
    training: Training = Training()
    serving: Serving = Serving()
    on_device: OnDevice = OnDevice()
    drift: Drift | None = None
    funnel: Funnel | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.device:
            raise ValueError("device must declare at least one feature")
        shared = sorted(set(self.device) & (set(self.server.features.names) | set(self.request)))
        if shared:
            raise ValueError(
                f"device features {shared} are also served by the server; a device feature must be known only there"
            )
        taken = sorted(set(self.request) & {ENTITY, DEVICE_EMBEDDING})
        if taken:
            raise ValueError(f"request features cannot be called {taken}: every request has inputs of those names")
        _check_exportable({**self.server.features.transforms, **self.request, **self.device})
        seen = self.server_features.pending
        if seen:
            raise ValueError(
                f"server and request features {list(seen)} must have constants written by hand: normalise='federated' "
                "and discover are for what only devices know; what the server sees, it can count itself"
            )
        _distinct("server and request features", [*self.server.features.names, *self.request])
        known = {*self.server.features.names, *self.request, *self.device, self.server.entity.join_key}
        if self.label.column in known:
            raise ValueError(f"label.column {self.label.column!r} is also a feature or the join key")
        if self.merge == "server" and self.release is None:
            raise ValueError(
                "release must be Clear(reason=...) or Noised(clip=..., sigma=...) where merge='server': "
                "a device embedding is a function of private features"
            )
        if self.merge == "device" and self.release is not None:
            raise ValueError("release must be left out where merge='device': the embedding stays on the device")
        if self.merge == "device" and self.serving.missing_device != "error":
            raise ValueError("serving.missing_device must be left out where merge='device': the device predicts")
        if self.merge == "device" and self.serving.contribution and self.training.server_tower != "federated":
            raise ValueError(
                "serving.contribution must be left out where merge='device' and training.server_tower is "
                f"{self.training.server_tower!r}: every answer is the server's embedding, and only where devices train "
                "the tower ('federated') do they need more"
            )
        return self

    @property
    def server_features(self) -> Features:
        """What the server tower reads: Feast features, then request features."""
        return Features(transforms={**self.server.features.transforms, **self.request})

    @property
    def request_features(self) -> Features:
        """What the caller sends."""
        return Features(transforms=self.request)

    @property
    def device_features(self) -> Features:
        """What the device tower reads."""
        return Features(transforms=self.device)

    @property
    def protects(self) -> str:
        """What epsilon is about."""
        return self.label.protects

    def with_learned(self, learned: Mapping[str, Transform]) -> HybridModel:
        """This model with the constants that a version learned, as if they had been written by hand.

        Args:
            learned: device feature -> its transform, for each whose constants are declared to be learned.

        Raises:
            ConfigError: it is not of exactly those features, or of another kind or width.
        """
        pending = self.device_features.pending
        if set(learned) != set(pending):
            raise ConfigError(
                f"constants of {self.name!r} must be learned of {list(pending)}, as it declares, got those of "
                f"{sorted(learned)}"
            )
        for name, transform in learned.items():
            declared = self.device[name]
            if type(transform) is not type(declared) or transform.width != declared.width or transform.pending:
                raise ConfigError(
                    f"what was learned of {name!r} must be {declared.kind} of width {declared.width}, as "
                    f"{self.name!r} declares, got {type(transform).__name__} of width {transform.width}"
                )
        return self.model_copy(update={"device": {**self.device, **learned}}) if learned else self

    def definition(self) -> dict[str, Any]:
        """What is trained, as JSON values: the declaration without the towers' code, and without how it is used."""
        return self.model_dump(mode="json", exclude={"serving", "on_device", "drift", "funnel"})


def definition_hash(definition: Mapping[str, Any]) -> str:
    """SHA-256 of a definition's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_model(file: Path) -> HybridModel:
    """Runs a team's model file and returns the one `HybridModel` it builds at module level.

    Relative view sources are resolved against the file's folder.

    Raises:
        ConfigError: the file does not exist, does not run, or builds none or several.
    """
    if file.is_dir():
        raise ConfigError(f"model file {str(file)!r} must be a Python file (.py), it is a folder")
    if not file.is_file():
        raise ConfigError(f"model file {str(file)!r} does not exist")
    if file.suffix != ".py":
        raise ConfigError(f"model file {file.name!r} must be a Python file (.py)")
    name = f"hybrid_model_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_AsItIsNow(name, str(file)))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _AsItIsNow(name, str(file)).exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"{file.name}: {error}") from None
    except ValidationError as error:  # of a transform
        raise ConfigError(f"{file.name}: {_explain(error.title, error)}") from None
    except Exception as error:
        raise ConfigError(f"{file.name} does not run: {type(error).__name__}: {error}") from error
    found = {id(value): value for value in vars(module).values() if isinstance(value, HybridModel)}
    if len(found) != 1:
        raise ConfigError(f"{file.name} must build exactly one HybridModel at module level, got {len(found)}")
    return _resolved(next(iter(found.values())), file.parent)


class _AsItIsNow(importlib.machinery.SourceFileLoader):
    """Compiles the file itself: cached byte code can be that of an edit before, made in the same second."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the file's present text."""
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _resolved(model: HybridModel, folder: Path) -> HybridModel:
    views = tuple(view.model_copy(update={"source": folder.resolve() / view.source}) for view in model.server.views)
    return model.model_copy(update={"server": model.server.model_copy(update={"views": views})})


def _distinct(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} must have distinct names, got {repeated} more than once")


def _explain(owner: str, error: ValidationError) -> str:
    """One line per fault: the field, what it must be, what it got."""
    lines = []
    for fault in error.errors(include_url=False):
        field = ".".join([owner, *(str(part) for part in fault["loc"])])
        got = "" if fault["type"] in {"value_error", "missing"} else f", got {_short(fault['input'])}"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] in {"union_tag_invalid", "union_tag_not_found", "model_attributes_type"}:
            message = "must be Clear(...) or Noised(...)" if fault["loc"] == ("release",) else f"must be {_TRANSFORMS}"
        lines.append(f"{field}: {message}{got}")
    return "; ".join(lines)


def _check_exportable(transforms: Mapping[str, Transform]) -> None:
    # A subclass would compute one thing here and its parent's in every exported program.
    for name, transform in transforms.items():
        if type(transform) not in (Numeric, Log1p, Bucketize, Categorical, Hash):
            raise ValueError(
                f"{name} must be {_TRANSFORMS} itself, which every side can compute, got {type(transform).__name__}"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
