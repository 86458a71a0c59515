"""What a sweep tries: a file of lists, and the configurations that they make."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.local_training import LocalTraining
from hybrid.spec import HybridModel, Training

MOST = 1000  # configurations of a sweep
OWN = ("epsilon", "clip", "seed")  # fields that are not of `Training`
# Configurations that differ in nothing of this see the same people and the same rows in every step.
SHARED = (
    "rounds",
    "sampling",
    "separation",
    "local_steps",
    "local_epochs",
    "local_batch",
    "proximal",
    "server_tower",
    "tower_dropout",
    "upload",
)


@dataclass(frozen=True)
class Configuration:
    """One training of a sweep.

    Attributes:
        settings: how it trains.
        epsilon: to spend at most; infinite: an oracle, without noise and without privacy.
        clip: largest L2 norm of one user's update, in place of the model's.
        seed: of everything random.
        swept: field -> value, of what the grid lists.
    """

    settings: Training
    epsilon: float
    clip: float
    seed: int
    swept: Mapping[str, Any]

    @property
    def is_oracle(self) -> bool:
        """Whether it has no noise, and so no privacy: only a simulation may look at it."""
        return math.isinf(self.epsilon)

    @property
    def shared(self) -> tuple[Any, ...]:
        """Equal for configurations that can be trained together."""
        return (self.seed, *(getattr(self.settings, name) for name in SHARED))

    def of(self, model: HybridModel) -> HybridModel:
        """The model with this clip."""
        return model.model_copy(update={"privacy": model.privacy.model_copy(update={"clip": self.clip})})


@dataclass(frozen=True)
class Grid:
    """Lists of values over fields of `Training`, `epsilon`, `clip` and `seed`; every combination is a configuration.

    Attributes:
        lists: field -> values to try.
        fixed: field -> the value of every configuration, in place of the model's.
    """

    lists: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lists:
            raise ConfigError("grid must list the values of at least one field, got none")
        known = [*OWN, *Training.model_fields]
        for name in (*self.lists, *self.fixed):
            if name not in known:
                raise ConfigError(f"grid must have fields of Training, epsilon, clip or seed, got {name!r}")
        for name, values in self.lists.items():
            if not values:
                raise ConfigError(f"{name} must list at least one value, got none")
            if any(value in values[:place] for place, value in enumerate(values)):
                raise ConfigError(f"{name} must list each value once, got {list(values)!r}")
            if name in self.fixed:
                raise ConfigError(f"{name} must be in [grid] or in [fixed], got it in both")
        if len(self) > MOST:
            raise ConfigError(f"grid must make at most {MOST} configurations, got {len(self)}")

    def __len__(self) -> int:
        return prod(map(len, self.lists.values()))

    @classmethod
    def load(cls, file: Path) -> Grid:
        """Reads a TOML file with a table `grid` of lists and, if wanted, a table `fixed` of values.

        Raises:
            ConfigError: there is no such file, or it is not of that form.
        """
        if not file.is_file():
            raise ConfigError(f"grid file {str(file)!r} does not exist")
        try:
            content = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file.name} must be TOML: {error}") from None
        unknown = sorted(set(content) - {"grid", "fixed"})
        if unknown:
            raise ConfigError(f"{file.name} must have the tables [grid] and [fixed] only, got {unknown}")
        tables = [content.get(name, {}) for name in ("grid", "fixed")]
        for name, table in zip(("grid", "fixed"), tables, strict=True):
            if not isinstance(table, dict):
                raise ConfigError(f"{name} must be a table, [{name}], got {table!r}")
        for name, values in tables[0].items():
            if not isinstance(values, list):
                raise ConfigError(f"{name} must be a list of values to try, got {values!r}")
        return cls({name: tuple(values) for name, values in tables[0].items()}, tables[1])

    def configurations(self, model: HybridModel) -> tuple[Configuration, ...]:
        """Every combination, the last list's values changing first, over what the model declares.

        Raises:
            ConfigError: a value is of the wrong type or out of its range.
        """
        return tuple(self._configurations(model))

    def _configurations(self, model: HybridModel) -> Iterator[Configuration]:
        declared = model.training.model_dump() | {"epsilon": model.privacy.epsilon, "clip": model.privacy.clip}
        for values in product(*self.lists.values()):
            swept = dict(zip(self.lists, values, strict=True))
            given = {**self.fixed, **swept}
            every = {**declared, "seed": 0, **given}
            settings = _settings({name: value for name, value in every.items() if name not in OWN}, given)
            epsilon = _number("epsilon", every["epsilon"])
            if not (0 < epsilon <= model.privacy.epsilon or epsilon == math.inf):
                raise ConfigError(
                    f"epsilon must be > 0 and at most the {model.privacy.epsilon:g} that {model.name!r} declares, "
                    f"or inf for no noise, got {epsilon:g}"
                )
            clip, seed = _number("clip", every["clip"]), every["seed"]
            if not 0 < clip < math.inf:
                raise ConfigError(f"clip must be finite and > 0, got {clip!r}")
            if type(seed) is not int or seed < 0:
                raise ConfigError(f"seed must be an integer >= 0, got {seed!r}")
            yield Configuration(settings, epsilon, clip, seed, swept)


def _settings(values: Mapping[str, Any], given: Mapping[str, Any]) -> Training:
    settings = Training(**values)
    for name in given:
        value, kept = given[name], getattr(settings, name, None)
        # "0.1" and true would be taken for numbers.
        if name not in OWN and isinstance(value, bool | str) and type(kept) is not type(value):
            raise ConfigError(f"{name} must be a number, got {value!r}")
    LocalTraining.of(settings)  # refuses what only two fields together make wrong
    return settings


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    return float(value)
