"""What a host app says of the device it runs on: one small interface, Linux's own answers, and scripted ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from device_runtime.eligibility import THERMAL, Readings, Thermal
from hybrid.errors import ConfigError

IN_USE_S = 300.0  # a terminal that was touched within this time says that somebody is here
WARM_C = (60.0, 75.0, 90.0)  # fair, serious, critical from here on, of a sensor without trip points
FAIR_BELOW_C = 10.0  # so near to where the kernel begins to slow the device down, it is fair no more than that
SENSOR_C = (-40.0, 150.0)  # outside, a sensor is broken
ANSWER_S = 2.0  # how long a service may take to answer
_BUS = ("PATH", "DBUS_SYSTEM_BUS_ADDRESS")


class Host(Protocol):
    """What the runtime asks of the host app; called now and again while a device takes part, from one thread."""

    def read(self) -> Readings:
        """What is so now; never raises: what it cannot tell is None."""
        ...


class ScriptedHost:
    """For tests and demonstrations: one reading after another; the last one stays.

    Args:
        readings: at least one.
        consent: whether the person agrees; a reading has consent only where both say so.

    Raises:
        ConfigError: there is no reading.
    """

    def __init__(self, readings: Sequence[Readings], consent: Callable[[], bool] = lambda: True) -> None:
        if not readings:
            raise ConfigError("a scripted host must have at least one reading")
        self._left, self._consent = list(readings), consent

    @classmethod
    def open(cls, file: Path, consent: Callable[[], bool] = lambda: True) -> ScriptedHost:
        """Reads a JSON list of objects with the fields of `Readings`; those left out are unknown.

        Args:
            file: of the list.
            consent: see the class.

        Raises:
            ConfigError: it cannot be read, or is no such list.
        """
        try:
            given = json.loads(file.read_bytes())
            return cls(TypeAdapter(list[Readings]).validate_python(given), consent)
        except OSError as error:
            raise ConfigError(f"the readings in {str(file)!r} cannot be read: {type(error).__name__}") from None
        except (ValidationError, ValueError):
            raise ConfigError(f"{file.name!r} must be a JSON list of objects with the fields of Readings") from None

    def read(self) -> Readings:
        """See `Host`."""
        reading = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        return replace(reading, consent=reading.consent and self._consent())


def ask_bus(service: str, path: str, interface: str, name: str) -> str | None:
    """One property of a service on the system's D-Bus, as busctl writes it, such as "u 4"; None without an answer."""
    busctl = shutil.which("busctl")
    if busctl is None:
        return None
    command = [busctl, "--system", f"--timeout={ANSWER_S:g}", "get-property", service, path, interface, name]
    # Of the environment where the bus is, and no more: keys of the store and of the API may be there.
    environment = {name: value for name in _BUS if (value := os.environ.get(name)) is not None}
    try:
        said = subprocess.run(
            command,
            capture_output=True,
            timeout=2 * ANSWER_S,
            check=True,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.decode(errors="replace").strip()


@dataclass(frozen=True)
class LinuxHost:
    """What a Linux machine says of itself, by the kernel's files, logind and NetworkManager.

    Attributes:
        store: the folder where the device's store lies.
        consent: whether the person agrees, asked at each reading.
        system: where sysfs is.
        terminals: where the terminals' devices are.
        bus: one property of a service, see `ask_bus`.
        now_s: Unix time.

    Source:
        Linux, Documentation/ABI/testing/sysfs-class-power and sysfs-class-thermal; org.freedesktop.login1(5);
        NetworkManager's NMMetered.
    """

    store: Path
    consent: Callable[[], bool]
    system: Path = Path("/sys")
    terminals: Path = Path("/dev")
    bus: Callable[[str, str, str, str], str | None] = field(default=ask_bus, repr=False)
    now_s: Callable[[], float] = field(default=time.time, repr=False)

    def read(self) -> Readings:
        """See `Host`; without consent nothing is asked."""
        if not self.consent():
            return Readings()
        charging, battery = self._power()
        return Readings(
            consent=True,
            charging=charging,
            battery=battery,
            idle=self._idle(),
            metered=self._metered(),
            thermal=self._thermal(),
            free_bytes=self._free(),
        )

    def _power(self) -> tuple[bool | None, float | None]:
        """Whether it is on external power, and the charge of its emptiest battery.

        A kernel that lists no battery of the machine's own runs on the mains; one that lists nothing tells nothing.
        """
        listed = _folders(self.system / "class" / "power_supply", "*")
        if listed is None:
            return None, None
        kinds = {supply: _text(supply / "type") for supply in listed}
        # scope "Device": a mouse's or a headset's.
        batteries = [s for s, kind in kinds.items() if kind == "Battery" and _text(s / "scope") != "Device"]
        if not batteries:
            return True, 1.0
        online = [_text(s / "online") for s, kind in kinds.items() if kind in ("Mains", "USB", "Wireless")]
        charges = [_number(battery / "capacity") for battery in batteries]
        shares = [charge / 100 for charge in charges if charge is not None and 0 <= charge <= 100]
        battery = min(shares) if len(shares) == len(batteries) else None
        return _external(online, [_text(battery / "status") for battery in batteries]), battery

    def _thermal(self) -> Thermal | None:
        """Of the warmest sensor that works."""
        zones = _folders(self.system / "class" / "thermal", "thermal_zone*") or []
        ranks = [rank for zone in zones if (rank := _warmth(zone)) is not None]
        return THERMAL[max(ranks)] if ranks else None  # type: ignore[return-value]

    def _idle(self) -> bool | None:
        """By logind; without it a terminal can tell that somebody is here, and nothing that nobody is."""
        if self._touched():
            return False
        said = self.bus(
            "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "IdleHint"
        )
        return {"b true": True, "b false": False}.get(said or "")

    def _touched(self) -> bool:
        """Whether somebody used a terminal just now."""
        for pattern in ("tty[0-9]*", "pts/[0-9]*"):
            for terminal in self.terminals.glob(pattern):
                try:
                    if abs(self.now_s() - terminal.stat().st_atime) < IN_USE_S:
                        return True
                except OSError:
                    continue
        return False

    def _metered(self) -> bool | None:
        """By NetworkManager, what it guesses included."""
        name = "org.freedesktop.NetworkManager"
        said = self.bus(name, "/org/freedesktop/NetworkManager", name, "Metered")
        return {"u 1": True, "u 2": False, "u 3": True, "u 4": False}.get(said or "")

    def _free(self) -> int | None:
        try:
            disk = os.statvfs(self.store)
        except OSError:
            return None
        return disk.f_bavail * disk.f_frsize


def _external(online: Sequence[str | None], statuses: Sequence[str | None]) -> bool | None:
    """Whether power comes from outside: by what gives it, else by what the batteries do."""
    if "1" in online:
        return True
    if "Discharging" in statuses:
        return False
    if online and all(value == "0" for value in online):
        return False
    return True if statuses and all(s in ("Charging", "Full", "Not charging") for s in statuses) else None


def _warmth(zone: Path) -> int | None:
    """How warm a zone is, as a place in THERMAL: by the kernel's trip points, else by `WARM_C`."""
    measured = _number(zone / "temp")
    if measured is None or not SENSOR_C[0] <= measured / 1000 <= SENSOR_C[1]:
        return None
    celsius = measured / 1000
    trips = dict(_trips(zone))
    critical = min((trips[kind] for kind in ("hot", "critical") if kind in trips), default=None)
    serious = trips.get("passive", critical)
    if serious is None:
        return sum(celsius >= limit for limit in WARM_C)
    # Above where it is slowed down, and below where it is shut off.
    limits = (serious - FAIR_BELOW_C, serious, math.inf if critical is None else critical)
    return sum(celsius >= limit for limit in limits)


def _trips(zone: Path) -> Iterator[tuple[str, float]]:
    """Kind and degrees Celsius of a zone's trip points; the lowest of a kind comes last. 0 and less is none."""
    found = []
    for file in sorted(zone.glob("trip_point_*_type")):
        degrees = _number(file.with_name(file.name.replace("_type", "_temp")))
        if degrees is not None and degrees > 0:
            found.append((_text(file) or "", degrees / 1000))
    return iter(sorted(found, key=lambda trip: -trip[1]))


def _folders(parent: Path, pattern: str) -> list[Path] | None:
    """Those below `parent`; None where it cannot be read."""
    try:
        return sorted(parent.glob(pattern)) if parent.is_dir() and os.access(parent, os.R_OK | os.X_OK) else None
    except OSError:
        return None


def _text(file: Path) -> str | None:
    try:
        with file.open("rb") as handle:
            return handle.read(256).decode(errors="replace").strip()
    except OSError:
        return None


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal() else None
