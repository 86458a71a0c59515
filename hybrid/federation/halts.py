"""The kill switch of one aggregator: what was halted is on its disk before a device is told, and stays halted."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hybrid.errors import ConfigError
from hybrid.federation.fleet_aggregator import FleetAggregator
from hybrid.files import write_whole
from hybrid.plan import Halt

_HALTS = TypeAdapter(tuple[Halt, ...])


class KillSwitch:
    """Halts versions for good: those of an earlier process at once.

    Args:
        aggregator: that tells its devices.
        model: which is all that it can halt.
        file: keeps every halt, as a JSON list; made with the first.

    Raises:
        ConfigError: the file cannot be read: what was halted must be known before a device is answered.
    """

    def __init__(self, aggregator: FleetAggregator, model: str, file: Path) -> None:
        self._aggregator, self._model, self._file = aggregator, model, file
        self._halts: tuple[Halt, ...] = ()
        if file.exists():
            try:
                self._halts = _HALTS.validate_json(file.read_bytes())
            except (OSError, ValidationError) as error:
                raise ConfigError(
                    f"halts {str(file)!r} must be a JSON list of halts: {type(error).__name__}; mend it, since without "
                    "it devices would go on with what was halted"
                ) from None
        for halt in self._halts:
            aggregator.halt(halt.versions, halt.reason)

    def halt(self, halt: Halt) -> None:
        """Halts some versions.

        Raises:
            ConfigError: they are another model's.
        """
        if halt.model != self._model:
            raise ConfigError(f"model must be {self._model!r}, which this aggregator trains, got {halt.model!r}")
        if halt not in self._halts:
            halts = (*self._halts, halt)
            write_whole(self._file, _HALTS.dump_json(halts))
            self._halts = halts
        self._aggregator.halt(halt.versions, halt.reason)
