"""How far a fleet's matrix mechanism has come, on the disk: what the noise of later steps needs of earlier ones.

Secret: who has it can take noise out of what was released. So it is a file of its own, for its owner alone, never part
of a checkpoint and never of a backup: a state put back is one whose later steps were drawn already.

It is written twice a step, both times whole or not at all: once the sum is fixed, before the ledger is, and once noise
was drawn, before the noised sum leaves. Entries of the ledger name their horizon. So after a crash

    the ledger has as many of this horizon as the file says            no noise was drawn since: it goes on
    so many, or that step's too, and the file said that a step was     its sum never left: the step is walked over
    about to be paid for
    others                                                             it is not the state that the ledger goes on
                                                                       from: a new horizon, which is paid for anew

A step that may have been drawn is never opened again, paid for or not: else a file of before it, put back after it
had left, would look like that crash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.federation.aggregator import PaidMechanism, Round
from hybrid.files import write_whole
from hybrid.plan import Turn
from hybrid.privacy.ledger import Ledger, MatrixEntry

log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size


class Resumption(StrEnum):
    """What a process that takes over does with what it found."""

    GO_ON = "go_on"
    WALK_OVER = "walk_over"  # the step that was about to be paid for, or was, and never left
    ANEW = "anew"


@dataclass(frozen=True)
class Standing:
    """What the file holds.

    Attributes:
        training: names the horizon, to devices and in the ledger.
        about: the settings of the mechanism, which must be the same.
        step: steps of the horizon that are used up.
        entries: that the ledger had of the horizon.
        drawing: whether the next step was about to be paid for.
        buffers: (memory, p) of the factor.
    """

    training: str
    about: str
    step: int
    entries: int
    drawing: bool
    buffers: NDArray[np.float64] = field(repr=False)

    def resumption(self, steps: Sequence[int]) -> Resumption:
        """What to do where the ledger has entries of these steps of the horizon, in this order."""
        since = list(steps[self.entries :])
        if len(steps) < self.entries or since not in ([], [self.step + 1]):
            return Resumption.ANEW
        if self.drawing:
            return Resumption.WALK_OVER
        return Resumption.ANEW if since else Resumption.GO_ON

    def write(self, file: Path) -> None:
        """Puts it in the place of the one before, at once, and on the disk before this returns.

        Raises:
            OSError: the disk does not take it; the one before is still there.
        """
        values = asdict(self) | {"buffers": self.buffers.shape}
        content = json.dumps(values).encode() + b"\n" + np.ascontiguousarray(self.buffers, "<f8").tobytes()
        write_whole(file, content + hashlib.sha256(content).digest(), private=True)

    @classmethod
    def read(cls, file: Path) -> Standing | None:
        """What `write` wrote; None: nothing.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            written = file.read_bytes()
        except FileNotFoundError:
            return None
        content, recorded = written[:-_DIGEST], written[-_DIGEST:]
        if hashlib.sha256(content).digest() != recorded:
            raise ConfigError(f"noise state {file.name!r} is damaged: without it the horizon must be paid for again")
        head, _, numbers = content.partition(b"\n")
        values = json.loads(head)
        buffers = np.frombuffer(numbers, "<f8").astype(np.float64).reshape(values.pop("buffers"))
        return cls(**values, buffers=buffers)


class Horizon:
    """A fleet's matrix mechanism, step by step; each attempt that devices were given a plan of uses one up.

    Those who took part in an attempt that is not released have used their turn, so its step is walked over: drawn with
    nobody's sum, and not shown. Else it could never be done again where everybody had been asked.

    Args:
        file: keeps the state; its folder must be there.
        mechanism: at its beginning.
        settings: its, with a matrix.
        ledger: that pays.
        size: p.

    Raises:
        ConfigError: the file is another mechanism's, or damaged.
    """

    def __init__(
        self, file: Path, mechanism: PaidMechanism, settings: Round, ledger: Ledger | None, *, size: int
    ) -> None:
        assert settings.matrix is not None
        self._file, self._mechanism, self._ledger = file, mechanism, ledger
        self._matrix = settings.matrix
        self._about = f"{settings.matrix!r} x {settings.noise_multiplier!r}, clip {settings.clip!r}, {size} numbers"
        self._training = mechanism.horizon = secrets.token_hex(16)
        self._used = False
        self._begin(Standing.read(file))

    def _begin(self, found: Standing | None) -> None:
        if found is not None and found.about != self._about:
            raise ConfigError(
                f"noise state {self._file.name!r} must be of this clip, noise and matrix, and is of others: it can "
                "only be gone on with as it was begun; give another file to begin another training"
            )
        way = Resumption.ANEW if found is None else found.resumption(self._steps(found.training))
        if found is not None and way is not Resumption.ANEW:
            self._training = self._mechanism.horizon = found.training
            self._mechanism.restore(self._mechanism.state() | {"round": found.step, "buffers": found.buffers})
        if found is not None:
            log.info("noise state of step %d: %s", found.step, way)
        if way is Resumption.WALK_OVER:
            self._mechanism.walk_over()
        self._save(drawing=False)

    def turn(self, late: int = 0) -> Turn:
        """Of the next step, and of updates that may be so many steps late; devices may be given it from now on."""
        step = self._mechanism.released + 1
        separation = self._matrix.participation.separation
        return Turn(training=self._training, first_step=step, last_step=step + late, separation=separation)

    def opened(self) -> None:
        """Devices are given the next step's plan."""
        self._used = True

    def draws(self) -> None:
        """Its sum is fixed, and is paid for next.

        Raises:
            OSError: the disk does not take the state: nothing may be paid for.
        """
        self._save(drawing=True)

    def settle(self, before: int) -> None:
        """The attempt is over: what was drawn is kept, or its step is walked over. Nothing leaves before this returns.

        Args:
            before: steps that were used up when it began.

        Raises:
            OSError: the disk does not take the state: nothing may leave.
        """
        if not self._used:
            return
        if self._mechanism.released == before:
            self._mechanism.walk_over()
        self._used = False
        self._save(drawing=False)

    def _steps(self, training: str) -> list[int]:
        """Of a horizon, that the ledger has, in order; without noise there are none."""
        entries = () if self._ledger is None else self._ledger.entries
        return [entry.step for entry in entries if isinstance(entry, MatrixEntry) and entry.horizon == training]

    def _save(self, *, drawing: bool) -> None:
        state: dict[str, Any] = self._mechanism.state()
        over = state["round"] == self._matrix.participation.rounds
        buffers = np.zeros_like(state["buffers"]) if over else state["buffers"]  # no more noise: the secret may go
        entries = len(self._steps(self._training))
        Standing(self._training, self._about, state["round"], entries, drawing, buffers).write(self._file)
