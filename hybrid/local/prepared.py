"""A training on devices that others run: what its processes on several machines read, and the version that it gives.

docs/flower.md says who starts what. In a prepared folder are

    aggregator.json   for the process of each aggregator (`hybrid.federation.checkin.Service`)
    job/              for the ServerApp: `job.json` (`hybrid.federation.flower_app.Job`), `initial.npy`, what it learns
    prepared.json     what the registry is told of the version
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybrid.errors import ConfigError, FederationError
from hybrid.federation.aggregator import Round
from hybrid.federation.checkin import Tokens
from hybrid.federation.flower_app import Job, Progress
from hybrid.local.fleet import Promoted, device_side, pay_ahead, service
from hybrid.network import Network
from hybrid.plan import Policy
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import Declared
from hybrid.version import TrainingRecord

if TYPE_CHECKING:
    from hybrid.workspace import Workspace

AGGREGATOR, JOB, PREPARED = "aggregator.json", "job", "prepared.json"


class Prepared(Declared):
    """What a prepared training will give.

    Attributes:
        model, version: that it goes on from.
        definition_hash: of it.
        record: of the new version, if no round fails.
    """

    model: str
    version: int
    definition_hash: str
    record: TrainingRecord


def prepare(
    folder: Path,
    promoted: Promoted,
    settings: Round,
    ledger: Ledger,
    *,
    round_s: float,
    devices: int,
    aggregators: int,
    population: str,
    run: str,
    tokens: Tokens | None = None,
) -> Prepared:
    """Writes all that the processes read; the run is charged for all rounds.

    Args:
        folder: new.
        promoted: what to train.
        settings: of each round.
        ledger: of the run.
        round_s: how long a round is open. A device takes part at most once a day, whatever it is.
        devices: that are expected to check in, over all aggregators.
        aggregators: how many, each with devices of its own.
        population: what the record names as the people.
        run: folder name under `runs/`.
        tokens: the issuer whose tokens updates need: then an account is in a sum at most once, whatever devices it has.

    Raises:
        ConfigError: the folder is there; or there are tokens and several aggregators, each of which would take one.
        BudgetExceeded: the run has not enough left.
    """
    if tokens is not None and aggregators > 1:
        raise ConfigError(
            f"aggregators must be 1 with tokens, each would take an update of an account, got {aggregators}"
        )
    rounds, (file, job) = promoted.settings.rounds, (folder / PREPARED, folder / JOB)
    task = promoted.task(round_s, devices=-(-devices // aggregators), policy=Policy())
    told = service(task, settings, rounds, ledger.delta, buffer=promoted.buffer, tokens=tokens)
    try:
        job.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"folder must be a new one, got {str(folder)!r}") from None
    pay_ahead(ledger, settings, rounds)
    about = {"users": devices, "examples": None, "aggregators": aggregators, "tokens": tokens is not None}
    version = promoted.version
    prepared = Prepared(
        model=version.model,
        version=version.number,
        definition_hash=version.definition_hash,
        record=promoted.record(settings, ledger, **about, population=population, run=run),  # type: ignore[arg-type]
    )
    (folder / AGGREGATOR).write_text(told.model_dump_json(indent=2))
    np.save(job / "initial.npy", promoted.side.flat())
    planned = promoted.planned(devices, aggregators)
    (job / "job.json").write_text(promoted.job(round_s, planned=planned, nodes=aggregators).model_dump_json(indent=2))
    file.write_text(prepared.model_dump_json(indent=2))
    return prepared


def finish(folder: Path, workspace: Workspace) -> tuple[int, Prepared]:
    """Registers the version that a prepared training gave; returns its number, and how it came to be.

    Args:
        folder: of `prepare`.
        workspace: with the registry.

    Raises:
        ConfigError: the folder is no prepared training, or the model was registered anew since.
        FederationError: its ServerApp has not ended, or no round was released.
    """
    prepared, job, progress = Prepared.read(folder / PREPARED), Job.read(folder / JOB / "job.json"), folder / JOB
    failed, last = Progress(progress).failed_rounds(), Progress(progress).last()
    if failed is None or last is None or last.number < job.rounds:
        raise FederationError(f"{str(progress)!r} must hold all {job.rounds} rounds; the ServerApp has not ended")
    if failed == job.rounds:
        raise FederationError(f"none of the {job.rounds} rounds was released: there is no version to register")
    registry = Registry(workspace)
    network = Network.of(registry.load_model(prepared.model), registry.version(prepared.model, prepared.version))
    device_side(network, job.training).load_flat(last.flat)
    record = prepared.record.model_copy(update={"rounds": job.rounds - failed})
    number = registry.create_version(
        prepared.model,
        weights=network.weights(),
        training=record,
        curves={},
        expected_hash=prepared.definition_hash,
    )
    return number, prepared.model_copy(update={"record": record})
