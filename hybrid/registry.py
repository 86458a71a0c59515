"""Models, versions and aliases, kept by MLflow.

A model is registered as its definition: the declaration, and the structure and
operations of its network, under one hash. Each training adds a version bound to that hash.
Versions never change; aliases (`production`) point at them.

Definitions lie in the workspace, versions in an SQLite file and a folder beside them; or, where MLflow's own
`MLFLOW_TRACKING_URI` is set, where that says: on an MLflow server, which keeps the artifacts too, or in a database,
whose artifacts stay in the workspace. A server's credentials are MLflow's variables, as any client of it has them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError, NotFound, RegistryError
from hybrid.spec import HybridModel, definition_hash, load_model
from hybrid.tracking import TRACKING_URI, check_uri, connect, is_plaintext, is_server, without_credentials
from hybrid.version import TrainingRecord, Version
from hybrid.workspace import Workspace

WEIGHTS, DEFINITION, TRAINING = "weights.npz", "definition.json", "training.json"
METRICS_PER_CALL = 1000  # MLflow's limit
FINAL = "oracle."  # before the names of metrics of the trained version, among its curves

ALREADY = "RESOURCE_ALREADY_EXISTS"

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Registered:
    """One registered model, as `hybrid models` lists it.

    Attributes:
        name, definition_hash: of what is registered now.
        file: it was registered from.
        versions: numbers of its trained versions, ascending.
        aliases: alias -> version.
    """

    name: str
    definition_hash: str
    file: Path
    versions: tuple[int, ...]
    aliases: dict[str, int]


def parse_selector(text: str) -> tuple[str, str | int | None]:
    """NAME, NAME@ALIAS or NAME:VERSION -> the name, and the alias, the number or None.

    Raises:
        ConfigError: it is none of these.

    >>> parse_selector("coupon@production"), parse_selector("coupon:3"), parse_selector("coupon")
    (('coupon', 'production'), ('coupon', 3), ('coupon', None))
    """
    match = re.fullmatch(r"(?P<name>[^@:]+)(?:@(?P<alias>[^@:]+)|:(?P<number>[0-9]+))?", text)
    if not match:
        raise ConfigError(f"a model is selected by NAME, NAME@ALIAS or NAME:VERSION, got {text!r}")
    number = match["number"]
    return match["name"], int(number) if number else match["alias"]


class Registry:
    """The models of one workspace. MLflow is imported at first need: seconds.

    Any method that needs versions or aliases raises RegistryError where MLflow's server or database does not answer.

    Args:
        workspace: with the definitions.
        uri: of MLflow's server or database; None: what `MLFLOW_TRACKING_URI` says, and without it a file of the
            workspace.

    Raises:
        ConfigError: the URI is of a kind that is not supported.
    """

    def __init__(self, workspace: Workspace, uri: str | None = None) -> None:
        self._definitions, self._folder = workspace.definitions, workspace.mlflow
        self.database = workspace.mlflow / "mlflow.db"
        self._uri = uri or os.environ.get(TRACKING_URI) or None
        if self._uri is not None:
            check_uri(self._uri)

    @property
    def where(self) -> str:
        """Where versions are kept, without credentials."""
        return str(self.database) if self._uri is None else without_credentials(self._uri)

    @property
    def is_own_file(self) -> bool:
        """Whether versions are kept in the workspace's own file, as they are unless told otherwise."""
        return self._uri is None

    @property
    def is_plaintext(self) -> bool:
        """Whether versions travel to another machine without TLS, and so does what is shown for them."""
        return self._uri is not None and is_plaintext(self._uri)

    def check(self) -> None:
        """Asks for one thing that every MLflow has.

        Raises:
            RegistryError: it does not answer.
        """
        if not self._is_empty:
            self._client.search_registered_models(max_results=1)

    def register(self, model: HybridModel, network_description: Mapping[str, Any], file: Path) -> str:
        """Stores a definition and where its file is; the newest is the one trained.

        Args:
            model: built by `file`.
            network_description: `hybrid.network.Network.description()` of it.
            file: the team's; `load_model` reads it again.

        Returns:
            The definition's hash, over declaration and network description.
        """
        definition = {"declaration": model.definition(), "network": dict(network_description)}
        digest = definition_hash(definition)
        record = {
            "hash": digest,
            "file": str(file.resolve()),
            "file_sha256": _sha256(file.read_bytes()),
            **definition,
        }
        folder = self._definitions / model.name
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{DEFINITION}.new"
        draft.write_text(json.dumps(record, indent=2))
        draft.replace(folder / DEFINITION)
        return digest

    def load_model(self, name: str) -> HybridModel:
        """Builds the registered model from the team's file, which must be as it was registered.

        Raises:
            NotFound: no model of that name is registered.
            ConfigError: the file is gone, or changed since.
        """
        record = self._record(name)
        file = Path(record["file"])
        if not file.is_file():
            raise ConfigError(
                f"{name} was registered from {file.name!r}, which is gone; "
                f"run `hybrid register {file.name}` again from where it is"
            )
        again = f"run `hybrid register {shlex.quote(os.path.relpath(file))}` again"
        if _sha256(file.read_bytes()) != record["file_sha256"]:
            raise ConfigError(f"{file.name!r} of {name} changed since it was registered; {again}")
        model = load_model(file)
        # The same bytes can build another model: what the file imports may have changed.
        if model.definition() != record["declaration"]:
            raise ConfigError(f"what {file.name!r} of {name} declares changed since it was registered; {again}")
        return model

    def definition_hash(self, name: str) -> str:
        """Of what is registered now under `name`.

        Raises:
            NotFound: no model of that name is registered.
        """
        return str(self._record(name)["hash"])

    def definition(self, name: str) -> dict[str, Any]:
        """What is registered now under `name`: "declaration" and "network".

        Raises:
            NotFound: no model of that name is registered.
        """
        return _definition(self._record(name))

    def models(self) -> list[Registered]:
        """Every registered model, by name."""
        return [self.model(name) for name in self.names()]

    def model(self, name: str) -> Registered:
        """One registered model.

        Raises:
            NotFound: no model of that name is registered.
        """
        record = self._record(name)
        return Registered(name, record["hash"], Path(record["file"]), self._numbers(name), self._aliases(name))

    def create_version(
        self,
        name: str,
        *,
        weights: Mapping[str, NDArray[Any]],
        training: TrainingRecord,
        curves: Curves,
        expected_hash: str,
    ) -> int:
        """Adds an immutable version of what is registered now.

        Args:
            name: of a registered model.
            weights: "part.name" -> array, finite, as `Network.weights` gives them.
            training: how they came to be, and their cost in privacy.
            curves: metric -> (round, value) points, drawn by MLflow's UI.
            expected_hash: of the definition that was trained.

        Returns:
            The version's number, from 1.

        Raises:
            NotFound: no model of that name is registered.
            ConfigError: another definition was registered since, or a weight is not finite.
        """
        record = self._record(name)
        if expected_hash != record["hash"]:
            raise ConfigError(f"another definition of {name} was registered while this one was trained; train it again")
        bad = sorted(part for part, value in weights.items() if not np.isfinite(value).all())
        if bad:
            raise ConfigError(f"weights must be finite, got others in {bad}: the training diverged")
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **dict(weights))
        files = {
            WEIGHTS: buffer.getvalue(),
            DEFINITION: json.dumps(_definition(record), indent=2).encode(),
            TRAINING: training.model_dump_json(indent=2).encode(),
        }
        run = self._log_run(name, training, curves, files)
        return self._add_version(
            name, run, {"definition_hash": record["hash"], "weights_sha256": _sha256(files[WEIGHTS])}
        )

    def version(self, name: str, selector: str | int) -> Version:
        """A trained version, its weights included.

        Args:
            name: of the model.
            selector: a number, also as text, or an alias that points at one.

        Raises:
            NotFound: no such model, version or alias; says what there is.
            ConfigError: the model was never trained, or the stored weights are damaged.
        """
        number = self._resolve(name, selector)
        found = self._client.get_model_version(name, str(number))
        files = {file: self._artifact(found.run_id, file) for file in (WEIGHTS, DEFINITION, TRAINING)}
        if _sha256(files[WEIGHTS]) != found.tags["weights_sha256"]:
            raise ConfigError(
                f"the stored weights of {name}:{number} are damaged: their SHA-256 is not the one recorded"
            )
        with np.load(io.BytesIO(files[WEIGHTS]), allow_pickle=False) as archive:
            weights = {part: archive[part] for part in archive.files}
        return Version(
            model=name,
            number=number,
            definition_hash=found.tags["definition_hash"],
            definition=json.loads(files[DEFINITION]),
            training=TrainingRecord.model_validate_json(files[TRAINING]),
            weights=weights,
            aliases=tuple(sorted(alias for alias, at in self._aliases(name).items() if at == number)),
        )

    def trainings(self, name: str) -> dict[int, TrainingRecord]:
        """How each version of a model was trained, by number, ascending; without their weights.

        Raises:
            NotFound: no model of that name is registered.
        """
        self._record(name)
        runs = {number: self._client.get_model_version(name, str(number)).run_id for number in self._numbers(name)}
        return {
            number: TrainingRecord.model_validate_json(self._artifact(run, TRAINING)) for number, run in runs.items()
        }

    def created(self, name: str) -> dict[int, datetime]:
        """When each version of a model was added, in UTC, by number.

        Raises:
            NotFound: no model of that name is registered.
        """
        self._record(name)
        if self._is_empty:
            return {}
        found = self._client.search_model_versions(f"name = '{name}'")
        return {int(one.version): datetime.fromtimestamp(one.creation_timestamp / 1000, UTC) for one in found}

    def curves(self, name: str, number: int) -> dict[str, list[tuple[int, float]]]:
        """How a version's metrics went while it was trained: metric -> (round or epoch, value) points, ascending.

        Raises:
            NotFound: no such model or version.
        """
        run = self._client.get_model_version(name, str(self._resolve(name, number))).run_id
        metrics = [metric for metric in self._client.get_run(run).data.metrics if not metric.startswith(FINAL)]
        found = {metric: self._client.get_metric_history(run, metric) for metric in metrics}
        return {metric: sorted((point.step, point.value) for point in points) for metric, points in found.items()}

    def set_alias(self, name: str, number: int, alias: str) -> None:
        """Points an alias at a version; it pointed elsewhere before, or nowhere.

        Raises:
            NotFound: no such model or version.
            ConfigError: the model was never trained, or no alias can have that name.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", alias) or re.fullmatch(r"latest|v[0-9]+", alias):
            raise ConfigError(
                "an alias must be lower-case letters, digits, _ and -, start with a letter, "
                f"and not be 'latest' or like 'v1', got {alias!r}"
            )
        found = self._resolve(name, number)
        self._client.set_registered_model_alias(name, alias, str(found))

    def drop_alias(self, name: str, alias: str) -> None:
        """Points an alias nowhere; nothing, where it does not point anywhere.

        Raises:
            NotFound: no such model.
        """
        if alias in self.model(name).aliases:
            self._client.delete_registered_model_alias(name, alias)

    def _record(self, name: str) -> dict[str, Any]:
        # Names first: a name from a command line must not become a path.
        if name not in self.names():
            raise NotFound(f"no model {name!r} is registered; {self._what_there_is(name)}")
        record: dict[str, Any] = json.loads((self._definitions / name / DEFINITION).read_text())
        return record

    def _what_there_is(self, name: str) -> str:
        """In place of a name that nothing is registered under."""
        names = self.names()
        if not names:
            return f"nothing is, in {self._definitions.parent}: `hybrid register FILE` registers one"
        bare = re.split("[:@]", name)[0]
        hint = f"; here its name is enough, without a version: {bare}" if bare != name and bare in names else ""
        return f"registered: {', '.join(names)}{hint}"

    def names(self) -> list[str]:
        """Of every registered model."""
        return sorted(file.parent.name for file in self._definitions.glob(f"*/{DEFINITION}"))

    def _resolve(self, name: str, selector: str | int) -> int:
        """The number of an existing version: as given, also as text, or what an alias, which is never digits, has."""
        self._record(name)
        numbers, aliases = self._numbers(name), self._aliases(name)
        if not numbers:
            raise ConfigError(f"{name} has no trained version; run `hybrid train {name}` first")
        if isinstance(selector, str) and selector.isdecimal():
            selector = int(selector)
        if isinstance(selector, str):
            if selector not in aliases:
                raise NotFound(
                    f"{name} has no alias {selector!r}; it has: {', '.join(sorted(aliases)) or 'none'}. "
                    f"`hybrid promote {name} VERSION ALIAS` gives one; its versions are {', '.join(map(str, numbers))}"
                )
            return aliases[selector]
        if selector not in numbers:
            raise NotFound(f"{name} has no version {selector}; it has: {', '.join(map(str, numbers))}")
        return selector

    def _numbers(self, name: str) -> tuple[int, ...]:
        if self._is_empty:
            return ()
        found = self._client.search_model_versions(f"name = '{name}'")
        return tuple(sorted(int(version.version) for version in found))

    def _aliases(self, name: str) -> dict[str, int]:
        if self._is_empty:
            return {}
        found = self._client.search_registered_models(f"name = '{name}'")
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}

    def _log_run(self, name: str, training: TrainingRecord, curves: Curves, files: Mapping[str, bytes]) -> str:
        """An MLflow run with the record, its curves and the files; returns its id."""
        from mlflow.entities import Metric, Param

        client, now = self._client, int(time.time() * 1000)
        run = client.create_run(self._experiment(name), run_name=training.run).info.run_id
        points = [Metric(curve, value, now, step) for curve, values in curves.items() for step, value in values]
        points += [Metric(f"{FINAL}{metric}", value, now, 0) for metric, value in training.oracle.items()]
        for start in range(0, len(points), METRICS_PER_CALL):
            client.log_batch(run, metrics=points[start : start + METRICS_PER_CALL])
        settings = training.model_dump(exclude={"oracle", "settings", "learned"}, exclude_none=True)
        if training.settings is not None:
            settings |= {f"training.{setting}": value for setting, value in training.settings}
        client.log_batch(run, params=[Param(setting, str(value)) for setting, value in settings.items()])
        with tempfile.TemporaryDirectory() as folder:
            for file, data in files.items():
                (Path(folder) / file).write_bytes(data)
            client.log_artifacts(run, folder)
        client.set_terminated(run)
        return str(run)

    def _add_version(self, name: str, run: str, tags: dict[str, str]) -> int:
        try:
            self._client.create_registered_model(name)
        except RegistryError as error:
            if error.code != ALREADY:
                raise
        source = self._client.get_run(run).info.artifact_uri
        return int(self._client.create_model_version(name, source=source, run_id=run, tags=tags).version)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # A server says where its artifacts go; a database does not.
        here = None if self._uri is not None and is_server(self._uri) else (self._folder / "artifacts" / name).as_uri()
        return str(self._client.create_experiment(name, here))

    def _artifact(self, run: str, file: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:  # MLflow copies, and would leave the copy behind
            return Path(self._client.download_artifacts(run, file, folder)).read_bytes()

    @property
    def _is_empty(self) -> bool:
        """Whether nothing was trained yet, so that there is no need to make a file, nor to import MLflow."""
        return self._uri is None and not self.database.exists()

    @cached_property
    def _client(self) -> Any:
        """MLflow's, whose methods raise RegistryError."""
        if self._uri is None:
            self._folder.mkdir(parents=True, exist_ok=True)
        return connect(self._uri or f"sqlite:///{self.database}", self.where)


def _definition(record: Mapping[str, Any]) -> dict[str, Any]:
    return {part: record[part] for part in ("declaration", "network")}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
