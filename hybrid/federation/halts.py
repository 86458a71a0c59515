"""The kill switches of one aggregator: what was halted is on its disk before a device is told, and stays halted.

A version is halted for good, on each device that has it. Training is halted until it is resumed: devices are given no
plan, and go on to predict.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from hybrid.errors import ConfigError
from hybrid.federation.fleet_aggregator import FleetAggregator
from hybrid.federation.remote import Order, Training
from hybrid.files import write_whole
from hybrid.plan import Halt

_T = TypeVar("_T")
HALTS, SUSPENDED = "halts.json", "suspended.json"
_HALTS = TypeAdapter(tuple[Halt, ...])


class KillSwitch:
    """Halts versions for good, and training until it is resumed: as an earlier process was told, at once.

    Args:
        aggregator: that tells its devices.
        model: which is all that it can halt.
        folder: keeps every halt, as a JSON list, and why training is halted; each file made with the first.

    Raises:
        ConfigError: a file cannot be read: what was halted must be known before a device is answered.
    """

    def __init__(self, aggregator: FleetAggregator, model: str, folder: Path) -> None:
        self._aggregator, self._model, self._folder = aggregator, model, folder
        self._halts: tuple[Halt, ...] = self._kept(HALTS, _HALTS, "a JSON list of halts") or ()
        for halt in self._halts:
            aggregator.halt(halt.versions, halt.reason)
        suspended = self._kept(SUSPENDED, TypeAdapter(Order), "a JSON object of model and reason")
        if suspended is not None:
            aggregator.suspend(suspended.reason)

    def halt(self, halt: Halt) -> None:
        """Halts some versions.

        Raises:
            ConfigError: they are another model's.
        """
        self._check(halt.model)
        if halt not in self._halts:
            halts = (*self._halts, halt)
            write_whole(self._folder / HALTS, _HALTS.dump_json(halts))
            self._halts = halts
        self._aggregator.halt(halt.versions, halt.reason)

    def training(self) -> Training:
        """How it stands."""
        return Training(model=self._model, plan=self._aggregator.open_plan, halted=self._aggregator.suspended)

    def suspend(self, order: Order) -> None:
        """Halts all training; again, with another reason.

        Raises:
            ConfigError: it is another model's.
        """
        self._check(order.model)
        write_whole(self._folder / SUSPENDED, order.model_dump_json().encode())
        self._aggregator.suspend(order.reason)

    def resume(self, order: Order) -> None:
        """Training goes on, if it was halted; the reason is for the log.

        Raises:
            ConfigError: it is another model's.
        """
        self._check(order.model)
        (self._folder / SUSPENDED).unlink(missing_ok=True)
        self._aggregator.resume()

    def end(self, plan: str, order: Order) -> None:
        """Ends the round that a plan is of.

        Raises:
            ConfigError: it is another model's.
            NotFound: the plan is not open.
        """
        self._check(order.model)
        self._aggregator.end_plan(plan, order.reason)

    def _check(self, model: str) -> None:
        if model != self._model:
            raise ConfigError(f"model must be {self._model!r}, which this aggregator trains, got {model!r}")

    def _kept(self, name: str, form: TypeAdapter[_T], what: str) -> _T | None:
        file = self._folder / name
        if not file.exists():
            return None
        try:
            return form.validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"{name} in {str(self._folder)!r} must be {what}: {type(error).__name__}; mend it, since without it "
                "devices would go on with what was halted"
            ) from None
