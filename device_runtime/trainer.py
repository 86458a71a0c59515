"""Training on a device: its own examples through the bundle's training program, to one clipped update."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_runtime.program import load_program
from hybrid.bundle import Bundle, Keeping, TrainProgram
from hybrid.errors import BundleError, ConfigError, PlanError
from hybrid.local_training import LocalTraining, missing_sides
from hybrid.plan import TrainPlan
from hybrid.privacy.mechanisms import clip_rows

Float32 = NDArray[np.float32]
PROGRAM = "train.pte"
CHUNKS_A_LOOK = 16  # at the process's memory: each takes as long as a tenth of a small chunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one training may take: the lower of what its plan asks for and what the bundle allows.

    Attributes:
        examples: at most, the newest ones.
        seconds: of it, at most.
        memory_mb: that it may add to what the process takes.
        lowered: names of those for which the plan asks for more than the bundle allows.
    """

    examples: int
    seconds: float
    memory_mb: int
    lowered: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: TrainPlan, keeping: Keeping) -> Limits:
        """The bundle's are the model's own, signed when it was promoted; a plan may only ask for less."""
        asked = {"examples": plan.examples[1], "seconds": plan.seconds, "memory_mb": plan.memory_mb}
        allowed = {
            "examples": keeping.max_examples,
            "seconds": keeping.max_seconds,
            "memory_mb": keeping.max_memory_mb,
        }
        lowered = tuple(name for name, most in asked.items() if most > allowed[name])
        return cls(
            examples=min(plan.examples[1], keeping.max_examples),
            seconds=min(plan.seconds, keeping.max_seconds),
            memory_mb=min(plan.memory_mb, keeping.max_memory_mb),
            lowered=lowered,
        )


class _GivenUp(Exception):
    """Why a training ended without an update."""


def resident_mb() -> float:
    """What this process takes, in MiB; 0 where the system does not tell, and no training passes its limit of memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Trainer:
    """Trains with one bundle; nothing of a training is left in it but why it gave up.

    Args:
        bundle: verified, with a training program.
        clock: seconds that only go forward.
        resident: MiB that this process takes.

    Attributes:
        gave_up: why the last training gave no update, without any number of the person's; None: it gave one.

    Raises:
        BundleError: the bundle has no training program.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        clock: Callable[[], float] = time.monotonic,
        resident: Callable[[], float] = resident_mb,
    ) -> None:
        if bundle.manifest.train is None or PROGRAM not in bundle.programs:
            raise BundleError(f"the bundle must hold a training program {PROGRAM!r} to train, got none")
        self._manifest, self._train = bundle.manifest, bundle.manifest.train
        self._bundle, self._clock, self._resident = bundle, clock, resident
        self.gave_up: str | None = None

    @property
    def parameters(self) -> int:
        """p, the length of the flat vector."""
        return self._train.size

    def train(  # noqa: PLR0917  # one thing a column
        self,
        plan: TrainPlan,
        weights: Float32,
        server: Float32,
        inputs: Float32,
        labels: Float32,
        go_on: Callable[[], bool],
        rng: np.random.Generator,
    ) -> Float32 | None:
        """One user's local training, as a simulation does it.

        Args:
            plan: whose `local`, `clip` and limits hold.
            weights: (p,) to start from; left alone.
            server: (n, train.server) what the server side contributed to each example.
            inputs: (n, features) inputs of each, the oldest example first.
            labels: (n,) 0 or 1.
            go_on: asked before each chunk of rows; False ends the training.
            rng: draws which examples are taken, their order and tower dropout: the same state gives the same bits.

        Returns:
            (p,) how far the weights moved, of L2 norm `plan.clip` at most; zeros where the plan samples examples by
            their label and none was drawn, since to send nothing would tell of the labels; None where `go_on` said
            stop, a limit was passed, there are too few examples or the numbers left those that are finite.

        Raises:
            PlanError: the plan is for another program than the bundle's, or asks for what it cannot do.
            BundleError: ExecuTorch does not run the program, or it gives something else than its manifest says.
        """
        local = self._local(plan, weights)
        limits = Limits.of(plan, self._manifest.keeping)
        for name in limits.lowered:
            log.info("plan %s asks for more %s than the bundle allows: %s", plan.id, name, getattr(limits, name))
        newest = slice(max(0, len(labels) - limits.examples), None)
        rows = self._rows(server[newest], inputs[newest], labels[newest])
        program = _Program(self._bundle, self._train)
        # The limits are of the training: what the engine takes to be loaded, torch say, is the app's.
        watch = _Watch(limits, go_on, self._clock, self._resident)
        self.gave_up = None
        try:
            if len(rows) < plan.examples[0]:
                raise _GivenUp(f"there must be at least {plan.examples[0]} examples")
            rows = rows.of(local.kept(rows.labels, rng))
            if not len(rows):
                return np.zeros_like(weights)
            schedule = _Schedule.draw(local, len(rows), plan.local.tower_dropout, rng)
            moved = self._descend(program, weights, local, rows, schedule, watch)
            if not np.isfinite(moved).all():
                raise _GivenUp("the weights left the finite numbers: the plan's lr may be too high")
        except _GivenUp as reason:
            self.gave_up = str(reason)
            log.info("training for plan %s gave no update: %s", plan.id, reason)
            return None
        clipped: Float32 = clip_rows(moved[None], plan.clip)[0].astype(np.float32)
        return clipped

    @staticmethod
    def _descend(  # noqa: PLR0917  # one thing a column
        program: _Program, start: Float32, local: LocalTraining, rows: _Rows, schedule: _Schedule, watch: _Watch
    ) -> Float32:
        """(p,) how far gradient descent moves from `start`."""
        moved = np.zeros_like(start)
        left, rate = np.float32(1 - local.lr * local.proximal), np.float32(local.lr)
        for step in range(schedule.steps):
            slope = np.zeros_like(start)
            for batch in rows.batches(*schedule.step(step)):
                watch.check()
                slope += program.gradient(start + moved, batch)
            with np.errstate(over="ignore", invalid="ignore"):  # looked for at the end
                moved = moved * left - rate * slope
        return moved

    def _local(self, plan: TrainPlan, weights: Float32) -> LocalTraining:
        manifest = self._manifest
        if (plan.model, plan.version, plan.definition_hash) != (
            manifest.model,
            manifest.version,
            manifest.definition_hash,
        ):
            raise PlanError(
                f"the plan must be for the bundle's {manifest.model}:{manifest.version} and its definition, "
                f"got {plan.model}:{plan.version}"
            )
        if plan.parameters != self.parameters or weights.shape != (self.parameters,):
            raise PlanError(
                f"the plan must have the program's {self.parameters} weights, "
                f"got {plan.parameters}, and weights of shape {weights.shape}"
            )
        if plan.local.tower_dropout and not self._train.missing:
            raise PlanError(
                "the plan's local.tower_dropout must be 0: the bundle's program trains no embeddings for a missing side"
            )
        local = plan.local
        try:
            return LocalTraining(
                steps=local.steps,
                epochs=local.epochs,
                lr=local.lr,
                batch=local.batch,
                proximal=local.proximal,
                keep=local.keep,
            )
        except ConfigError as error:
            raise PlanError(f"the plan's local.{error}") from None

    def _rows(self, server: Float32, inputs: Float32, labels: Float32) -> _Rows:
        shapes = (len(labels), self._train.server), (len(labels), len(self._manifest.features))
        if (server.shape, inputs.shape) != shapes or labels.ndim != 1:
            raise ConfigError(f"examples must have shapes {shapes}, got {server.shape} and {inputs.shape}")
        return _Rows(self._train, server, inputs, labels)


@dataclass(frozen=True)
class _Schedule:
    """Which rows each step takes.

    Attributes:
        place, weight: (s, m); see `hybrid.local_training.Schedule`.
        absent: (steps, m, 2); None without tower dropout.
        steps: how many.
    """

    place: NDArray[np.int64]
    weight: Float32
    absent: Float32 | None
    steps: int

    @classmethod
    def draw(cls, local: LocalTraining, examples: int, dropout: float, rng: np.random.Generator) -> _Schedule:
        """Of one user, in the order in which a simulation draws."""
        drawn = local.schedule(np.array([examples]), rng)
        steps, rows = int(drawn.steps[0]), drawn.place.shape[2]
        absent = missing_sides((1, steps, rows), dropout, rng)[0] if dropout else None
        return cls(drawn.place[0], drawn.weight[0], absent, steps)

    def step(self, number: int) -> tuple[NDArray[np.int64], Float32, Float32 | None]:
        """Rows, (m,), their weights in the step's loss, and which side each lacks; padding left out."""
        which = min(number, len(self.place) - 1)
        real = np.flatnonzero(self.weight[which])
        absent = None if self.absent is None else self.absent[number][real]
        return self.place[which][real], self.weight[which][real], absent


@dataclass(frozen=True)
class _Rows:
    """A user's examples, as they enter the program."""

    train: TrainProgram
    server: Float32
    inputs: Float32
    labels: Float32

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, kept: NDArray[np.bool_]) -> _Rows:
        """Some of them."""
        return _Rows(self.train, self.server[kept], self.inputs[kept], self.labels[kept])

    def batches(
        self, rows: NDArray[np.int64], weight: Float32, absent: Float32 | None
    ) -> Iterator[tuple[Float32, ...]]:
        """One step's rows, as many at a time as the program takes."""
        size = self.train.rows
        for begin in range(0, len(rows), size):
            # Padding repeats a row of the same chunk, whose loss is in the step's anyway: 0 x infinity would
            # otherwise bring one in that is not.
            here = np.arange(begin, begin + size)
            real = here < len(rows)
            here = np.where(real, here, begin)
            taken = rows[here]
            weights = np.where(real, weight[here], np.float32(0))
            batch = (self.server[taken], self.inputs[taken], self.labels[taken], weights)
            if not self.train.missing:
                yield batch
            elif absent is None:
                yield (*batch, np.zeros((size, 2), np.float32))
            else:
                yield (*batch, absent[here])


@dataclass
class _Watch:
    """Ends a training that may not go on."""

    limits: Limits
    go_on: Callable[[], bool]
    clock: Callable[[], float]
    resident: Callable[[], float]
    begun: float = field(init=False)
    before_mb: float = field(init=False)
    chunks: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.begun, self.before_mb = self.clock(), self.resident()

    def check(self) -> None:
        """Before each chunk.

        Raises:
            _GivenUp: it was told to stop, or a limit is passed.
        """
        if not self.go_on():
            raise _GivenUp("it was told to stop")
        if self.clock() - self.begun > self.limits.seconds:
            raise _GivenUp(f"it took more than {self.limits.seconds:g} s")
        if self.chunks % CHUNKS_A_LOOK == 0 and self.resident() - self.before_mb > self.limits.memory_mb:
            raise _GivenUp(f"it took more than {self.limits.memory_mb} MiB of memory")
        self.chunks += 1


class _Program:
    """The training program, loaded in ExecuTorch."""

    def __init__(self, bundle: Bundle, train: TrainProgram) -> None:
        self._size = train.size
        self._run = load_program(bundle, PROGRAM)

    def gradient(self, weights: Float32, batch: tuple[Float32, ...]) -> Float32:
        """(p,) of the batch's loss at `weights`."""
        try:
            outputs = self._run(weights, *batch)
        except RuntimeError:  # of its text nothing: it may tell what it was given
            raise BundleError(f"program {PROGRAM!r} does not take what its manifest says") from None
        if len(outputs) != 2 or outputs[1].shape != (self._size,):
            raise BundleError(f"program {PROGRAM!r} must return a loss and a gradient of {self._size} numbers")
        return outputs[1]
