import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from device_runtime.eligibility import Readings
from device_runtime.host import LinuxHost, ScriptedHost, ask_bus
from hybrid.errors import ConfigError

NOW_S = 1_700_000_000.0
LOGIND, NETWORK = "org.freedesktop.login1", "org.freedesktop.NetworkManager"


def lay(folder: Path, **files: object) -> None:
    """Files as the kernel shows them, each with a newline."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def supply(system: Path, name: str, **files: object) -> None:
    lay(system / "class" / "power_supply" / name, **files)


def zone(system: Path, number: int, **files: object) -> None:
    lay(system / "class" / "thermal" / f"thermal_zone{number}", type="x86_pkg_temp", **files)


def host(folder: Path, said: dict[str, str] | None = None, *, consent: bool = True) -> LinuxHost:
    """On a machine whose files lie in `folder`, where services say `said`."""
    return LinuxHost(
        store=folder,
        consent=lambda: consent,
        system=folder / "sys",
        terminals=folder / "dev",
        bus=lambda service, *_: (said or {}).get(service),
        now_s=lambda: NOW_S,
    )


def test_a_laptop_says_everything(tmp_path: Path):
    """On its charger at 83 %, cool, nobody there, at home."""
    supply(tmp_path / "sys", "AC", type="Mains", online=1)
    supply(tmp_path / "sys", "BAT0", type="Battery", scope="System", capacity=83, status="Charging")
    zone(tmp_path / "sys", 0, temp=41000, trip_point_0_type="passive", trip_point_0_temp=95000)
    readings = host(tmp_path, {LOGIND: "b true", NETWORK: "u 4"}).read()
    disk = os.statvfs(tmp_path)
    assert readings.free_bytes is not None
    assert 0 < readings.free_bytes <= disk.f_blocks * disk.f_frsize
    known = Readings(consent=True, charging=True, battery=0.83, idle=True, metered=False, thermal="nominal")
    assert replace(readings, free_bytes=None) == known


def test_a_machine_that_shows_nothing_says_that_it_cannot_tell(tmp_path: Path):
    """No sysfs, no services, and a store's folder that is not there."""
    blind = LinuxHost(tmp_path / "gone", lambda: True, tmp_path / "sys", tmp_path / "dev", lambda *_: None)
    assert blind.read() == Readings(consent=True)
    assert blind.read().unknown == ("charging", "battery", "idle", "metered", "thermal", "free_bytes")


def test_without_consent_nothing_is_asked(tmp_path: Path):
    """Not one service hears of it."""

    def bus(*_: str) -> str:
        raise AssertionError("a service was asked")

    assert LinuxHost(tmp_path, lambda: False, tmp_path, tmp_path, bus).read() == Readings()


def power(folder: Path) -> tuple[bool | None, float | None]:
    readings = host(folder).read()
    return readings.charging, readings.battery


def test_a_machine_without_a_battery_runs_on_the_mains(tmp_path: Path):
    """Its kernel lists no battery, or a mouse's only."""
    (tmp_path / "sys" / "class" / "power_supply").mkdir(parents=True)
    assert power(tmp_path) == (True, 1.0)
    supply(tmp_path / "sys", "hidpp_battery_0", type="Battery", scope="Device", capacity=5, status="Discharging")
    assert power(tmp_path) == (True, 1.0)


@pytest.mark.parametrize(
    ("online", "status", "charging"),
    [
        ("1", "Charging", True),
        ("1", "Discharging", True),
        ("0", "Discharging", False),
        ("0", "Unknown", False),
        (None, "Discharging", False),
        (None, "Charging", True),
        (None, "Not charging", True),
        (None, "Full", True),
        (None, "Unknown", None),
        ("", "Unknown", None),
    ],
)
def test_external_power_is_what_the_charger_says_else_the_battery(
    tmp_path: Path, online: str | None, status: str, charging: bool | None
):
    """A charger that says nothing, where the battery does not know either, is unknown."""
    supply(tmp_path / "sys", "BAT0", type="Battery", capacity=50, status=status)
    if online is not None:
        supply(tmp_path / "sys", "ADP1", type="USB", online=online)
    assert power(tmp_path) == (charging, 0.5)


def test_the_emptiest_battery_counts_and_one_that_says_nothing_makes_it_unknown(tmp_path: Path):
    """Of two, 60 % and 20 %; of three, one of which is broken; a charge of 300 % is broken too."""
    supply(tmp_path / "sys", "BAT0", type="Battery", capacity=60, status="Discharging")
    supply(tmp_path / "sys", "BAT1", type="Battery", capacity=20, status="Unknown")
    assert power(tmp_path) == (False, 0.2)
    supply(tmp_path / "sys", "BAT2", type="Battery", capacity=300, status="Full")
    assert power(tmp_path) == (False, None)


@pytest.mark.parametrize(
    ("celsius", "state"), [(59.9, "nominal"), (60, "fair"), (75, "serious"), (89.9, "serious"), (90, "critical")]
)
def test_a_sensor_without_trip_points_is_judged_by_degrees(tmp_path: Path, celsius: float, state: str):
    """As the module's limits say."""
    zone(tmp_path / "sys", 0, temp=int(celsius * 1000), trip_point_0_type="passive", trip_point_0_temp=0)
    assert host(tmp_path).read().thermal == state


@pytest.mark.parametrize(("celsius", "state"), [(69, "nominal"), (70, "fair"), (80, "serious"), (100, "critical")])
def test_a_sensor_with_trip_points_is_judged_by_them(tmp_path: Path, celsius: int, state: str):
    """The kernel slows it down at 80 degrees, lowest of two, and shuts it off at 100."""
    trips = {"trip_point_0_type": "passive", "trip_point_0_temp": 85000, "trip_point_1_type": "critical"}
    trips |= {"trip_point_1_temp": 100000, "trip_point_2_type": "passive", "trip_point_2_temp": 80000}
    zone(tmp_path / "sys", 0, temp=celsius * 1000, **trips)
    assert host(tmp_path).read().thermal == state


def test_the_warmest_sensor_that_works_counts(tmp_path: Path):
    """One says 274 degrees below zero, one says no number, one is 76 degrees warm."""
    for number, temp in enumerate((30000, -274000, "N/A", 76000)):
        zone(tmp_path / "sys", number, temp=temp)
    assert host(tmp_path).read().thermal == "serious"
    (tmp_path / "sys" / "class" / "thermal" / "thermal_zone3" / "temp").unlink()
    assert host(tmp_path).read().thermal == "nominal"


@pytest.mark.parametrize(
    ("said", "metered"), [("u 1", True), ("u 2", False), ("u 3", True), ("u 4", False), ("u 0", None), ("", None)]
)
def test_the_network_is_what_networkmanager_says_or_guesses(tmp_path: Path, said: str, metered: bool | None):
    """Its NMMetered: yes, no, guess yes, guess no, unknown."""
    assert host(tmp_path, {NETWORK: said}).read().metered is metered


@pytest.mark.parametrize(("said", "idle"), [("b true", True), ("b false", False), ("s maybe", None), (None, None)])
def test_nobody_is_there_when_logind_says_so(tmp_path: Path, said: str | None, idle: bool | None):
    """Without it that is unknown."""
    assert host(tmp_path, {LOGIND: said} if said else {}).read().idle is idle


@pytest.mark.parametrize("terminal", ["tty1", "pts/0"])
def test_somebody_at_a_terminal_is_there_whatever_logind_says(tmp_path: Path, terminal: str):
    """It was touched 299 s ago; a second later it tells nothing."""
    file = tmp_path / "dev" / terminal
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (NOW_S - 299, 0))
    assert host(tmp_path, {LOGIND: "b true"}).read().idle is False
    os.utime(file, (NOW_S - 300, 0))
    assert host(tmp_path, {LOGIND: "b true"}).read().idle is True
    assert host(tmp_path).read().idle is None


def test_a_bus_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without busctl, with one that fails, with one that never ends; a real process each time, which is gone then."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("device_runtime.host.ANSWER_S", 0.1)
    assert ask_bus(LOGIND, "/", LOGIND, "IdleHint") is None
    for script, said in (("exit 1", None), ("exec /bin/sleep 60", None), ("echo 'b true'", "b true")):
        (tmp_path / "busctl").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "busctl").chmod(0o755)
        assert ask_bus(LOGIND, "/", LOGIND, "IdleHint") == said


def test_a_program_that_is_asked_is_told_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The store's key and the API key may be in the environment, which a process passes on unless told otherwise."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("HYBRID_STORE_KEY", "HYBRID_API_KEY", "SECRET_OF_ANOTHER"):
        monkeypatch.setenv(name, "sentinel")
    (tmp_path / "busctl").write_text("#!/bin/sh\nset\n")
    (tmp_path / "busctl").chmod(0o755)
    said = ask_bus(LOGIND, "/", LOGIND, "IdleHint")
    assert said is not None
    assert "sentinel" not in said


def test_the_machine_that_runs_this_test_can_be_read():
    """Whatever it is: a reading without an exception, and its disk has room."""
    readings = LinuxHost(Path(__file__).parent, lambda: True).read()
    assert readings.consent
    assert readings.free_bytes is not None


def test_a_script_goes_on_reading_by_reading_and_stays_at_its_last(tmp_path: Path):
    """From a file, fields left out are unknown."""
    file = tmp_path / "readings.json"
    file.write_text(json.dumps([{"consent": True, "charging": True, "battery": 0.5}, {"consent": False}]))
    script = ScriptedHost.open(file)
    first = Readings(consent=True, charging=True, battery=0.5)
    assert [script.read() for _ in range(3)] == [first, Readings(), Readings()]


def test_a_script_has_consent_only_where_the_person_gives_it():
    """Both say so, at that moment."""
    given = [False, True, True]
    script = ScriptedHost([Readings(consent=True, battery=0.5)] * 2 + [Readings()], lambda: given.pop(0))
    assert [script.read().consent for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '[{"consent": "maybe"}]', '[{"thermal": "hot"}]', "\udcff", '[{"consnt": true}]']
)
def test_a_file_that_is_no_script_is_refused(tmp_path: Path, text: str):
    """A ConfigError, without what the file holds."""
    file = tmp_path / "readings.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="reading"):
        ScriptedHost.open(file)
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        ScriptedHost.open(tmp_path / "none")
