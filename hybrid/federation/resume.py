"""How a training by rounds goes on where a process ended: what must be as it was, and which rounds are done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from hybrid.errors import ConfigError, NotFound
from hybrid.federation.aggregator import PURPOSE
from hybrid.federation.checkpoint import Checkpoint, machine
from hybrid.federation.engine import chunk_size
from hybrid.privacy.accountant import Event, GaussianEvent
from hybrid.privacy.ledger import AnyEntry, Ledger
from hybrid.spec import definition_hash

CONFIG = "config.json"
PROCESS = "process"  # part of every checkpoint of a training by rounds
BY_ROUNDS = ("federated", "noiseless")  # kinds that can be resumed; the others take seconds
HASHED = {
    "definition": "the model's declaration",
    "registered": "the model's registered definition",
    "data": "the rows to learn from",
    "held_out_data": "the held-out rows",
}


def started(run_dir: Path) -> dict[str, Any]:
    """How the latest training in a run directory was started: its config.json, unless that is of a question.

    Raises:
        NotFound: none was, or it was stopped before it spent anything.
    """
    try:
        config: dict[str, Any] = json.loads((run_dir / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        config = {}
    if "training" not in config:
        raise NotFound(
            f"run {run_dir.name!r} has no training to resume: none got as far as its first round, "
            "and nothing was spent by one; start it again, and it uses what else is in the run"
        )
    return config


def rounds_done(run_dir: Path, config: Mapping[str, Any]) -> int:
    """How many rounds of the training that `config` started its checkpoint holds.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    checkpoint = _checkpoint_of(run_dir, config)
    return 0 if checkpoint is None else checkpoint.step


def check_free(run_dir: Path) -> None:
    """Raises: ConfigError: the run holds a training that was interrupted, and would be lost."""
    try:
        config = started(run_dir)
    except NotFound:
        return
    if config.get("kind") in BY_ROUNDS and rounds_done(run_dir, config) < config["training"]["rounds"]:
        raise ConfigError(f"run {run_dir.name!r} holds an interrupted training: resume it, or choose another run")


def latest(run_dir: Path, config: Mapping[str, Any]) -> Checkpoint | None:
    """Where the training in `run_dir` stands; None where it was stopped before it paid for its first round.

    Args:
        run_dir: of the run.
        config: how it is to go on: as it was started.

    Raises:
        NotFound: no training was started in it.
        ConfigError: it cannot be resumed, was started otherwise than `config` says, or its checkpoint is damaged.
    """
    before, name = started(run_dir), run_dir.name
    if before.get("kind") not in BY_ROUNDS:
        raise ConfigError(f"run {name!r} must be a training by rounds, got kind {before.get('kind')!r}: start it anew")
    was, given = _flat(before), _flat(json.loads(json.dumps(config)))
    for setting in dict.fromkeys([*was, *given]):
        if was.get(setting) == given.get(setting):
            continue
        if setting in HASHED:
            raise ConfigError(f"{HASHED[setting]} changed since run {name!r} was started: start another run")
        raise ConfigError(
            f"{setting} of run {name!r} must stay {was.get(setting)!r} to resume it, got {given.get(setting)!r}"
        )
    return _checkpoint_of(run_dir, config)


@dataclass(frozen=True)
class Process:
    """One process of a training, as its checkpoints tell of it, and what it takes over from the one before.

    A round after the checkpoint may be in the ledger already: the process that
    paid for it was killed before the next checkpoint. In a seeded simulation it
    is computed again from the same weights, with the same cohort and the same
    noise; being the same number, its release tells nobody anything new, and is
    paid for by the entry that is there. That holds only where the sum is the
    same to the last bit: the same noise on two sums that differ by a rounding
    error would show the difference. So the machine must be the same, and train
    on its CPU: a GPU's sums may differ from call to call. Where it is not, each
    such round is a new attempt, with other noise and an entry of its own, as it
    always is on a fleet.

    Where rounds run elsewhere (a `Federation`), all are paid for before the first,
    and the aggregators' own ledgers count what is released: an entry is there
    for its round, wherever and however often the training goes on.

    Attributes:
        config: hash of the run's config.
        noise_multiplier: of every round.
        left: rounds that are to be done, repeated ones included; elsewhere, all.
        machine: what decides the last bit of a sum.
        moved: whether the run came from another machine, or need not compute what it did to the last bit.
        ledger: that pays; None for an oracle.
        since: place of the ledger's first entry that may be repeated on this machine.
        repeats: entries of rounds that are computed again, to the same releases; elsewhere, all that are paid for.
        went_on: whether there was a process before.
    """

    config: str
    noise_multiplier: float
    left: int
    machine: Mapping[str, str]
    moved: bool
    ledger: Ledger | None
    since: int
    repeats: tuple[AnyEntry, ...]
    went_on: bool

    @classmethod
    def of(
        cls,
        run_dir: Path,
        config: Mapping[str, Any],
        begun: Checkpoint | None,
        ledger: Ledger | None,
        *,
        rounds: int,
        noise_multiplier: float,
        device: str = "cpu",
        elsewhere: bool = False,
    ) -> Self:
        """This process.

        Args:
            run_dir: of the run.
            config: of the training.
            begun: what it goes on from; None: it begins.
            ledger: that pays; None for an oracle.
            rounds: of the training, those that are done included.
            noise_multiplier: of every round.
            device: where users are trained, as torch names it.
            elsewhere: by other processes, with ledgers of their own.

        Raises:
            ConfigError: the ledger does not hold what the checkpoint's rounds spent.
        """
        here = machine() | {"device": device, "chunk": str(chunk_size(torch.device("cpu")))}
        before = None if begun is None else begun.state[PROCESS]
        done = 0 if begun is None or elsewhere else begun.step
        moved = before is not None and not elsewhere and (before["machine"] != here or device != "cpu")
        entries = [] if ledger is None else ledger.entries
        if before is not None and ledger is not None:
            _check_ledger(run_dir, before["entries"], moved=moved)
        since = len(entries) if before is None or moved else before["since"]
        repeats = tuple(e for e in entries[since:] if e.purpose == PURPOSE and e.round > done)
        return cls(
            definition_hash(config),
            noise_multiplier,
            rounds - done,
            here,
            moved,
            ledger,
            since,
            repeats,
            begun is not None,
        )

    @property
    def unpaid(self) -> int:
        """Releases to come that the ledger does not hold."""
        return self.left - len({entry.round for entry in self.repeats})

    def due(self, event: Event) -> list[Event]:
        """What the ledger is to set aside for the releases to come.

        Args:
            event: cost of a round, or of all of them where their noise is correlated: the first step pays for all.
        """
        if isinstance(event, GaussianEvent):
            return [replace(event, count=self.unpaid)] if self.unpaid else []
        entries = [] if self.ledger is None or not self.went_on else self.ledger.entries
        return [] if any(entry.purpose == PURPOSE and entry.event == event for entry in entries) else [event]

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return {
            "config": self.config,
            "noise_multiplier": self.noise_multiplier,
            "machine": dict(self.machine),
            "since": self.since,
            "entries": 0 if self.ledger is None else len(self.ledger.entries),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing: it was built from it."""


@dataclass
class Place:
    """Where rounds that run elsewhere keep what they need: chosen before they are paid for.

    Attributes:
        folder: in the run's; not made yet.
    """

    folder: Path

    @classmethod
    def new(cls, run_dir: Path) -> Self:
        """One of its own: a run may have several trainings."""
        number = 1
        while (folder := run_dir / f"federation-{number}").exists():
            number += 1
        return cls(folder)

    def state(self) -> str:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return self.folder.name

    def restore(self, state: str) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self.folder = self.folder.with_name(state)


def _check_ledger(run_dir: Path, entries: int, *, moved: bool) -> None:
    """Raises: ConfigError: it holds fewer releases than `entries`, or, of a run that moved, unreadable ones."""
    account = Ledger.read(run_dir)
    known = len(account.entries) + len(account.lost)
    if known < entries:
        raise ConfigError(
            f"the ledger of run {run_dir.name!r} must hold at least the {entries} releases that its checkpoint "
            f"knows of, got {known}: start another run"
        )
    if moved and account.lost:
        raise ConfigError(
            f"the ledger of run {run_dir.name!r} has lines that cannot be read, which may be of rounds that another "
            "machine computed: resume it there, or start another run"
        )


def _checkpoint_of(run_dir: Path, config: Mapping[str, Any]) -> Checkpoint | None:
    """Of the training that `config` started; None where it has not reached its rounds."""
    try:
        found = Checkpoint.read(run_dir)
    except NotFound:
        return None
    return found if found.state is not None and found.state[PROCESS]["config"] == definition_hash(config) else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"rounds": 3}} -> {"training.rounds": 3}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
