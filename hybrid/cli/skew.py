"""`hybrid skew`: compares sampled requests, as served, with the offline store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.errors import ConfigError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hybrid.registry import Registry
    from hybrid.request_log import LoggedRow
    from hybrid.spec import HybridModel

TO_LOG = "start workers with --log-sample, or the local stack with `hybrid up --log-sample 1`"
app = typer.Typer()
EXAMPLES = 3


@dataclass(frozen=True)
class Difference:
    """How one number of the compared rows differs from what the offline store gives for it.

    Attributes:
        of: a feature's name, or what is computed from the features.
        rows: that differ by more than the tolerance.
        missing: of them, those where one side has no value.
        max_abs: largest difference of the others, in the units of the slot.
        first: when the first of `rows` were served.
    """

    of: str
    rows: int
    missing: int
    max_abs: float
    first: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `hybrid skew` prints.

    Attributes:
        model: which.
        rows: status -> rows; see `feature_store.skew.Compared`.
        other_definitions: logged rows that were not compared, being of versions trained from another definition.
        tolerance: as asked for.
        differences: by feature, then of what is computed from them.
    """

    model: str
    rows: dict[str, int]
    other_definitions: int
    tolerance: float
    differences: tuple[Difference, ...]


@app.command()
def skew(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    log: Annotated[Path | None, typer.Option(help="Folder of the request log. Default: the local stack's.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a slot that counts as none.")] = 1e-6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compares what was served with what the offline store says, for the requests that were logged.

    Workers started with --log-sample keep a share of the rows: the server's
    features as served, never the device's embedding. Each row is compared with
    the point-in-time join at its own time; then the server tower is run on both,
    and the head, with the embedding that stands for a missing device.

    A row is "late" where what was served had been true, and the offline store knew
    newer values: the online store was behind. It is "skewed" where what was
    served was never true, and "absent" where the offline store does not know
    its entity then. Exit status 1 if a row is skewed or absent.

    Example: hybrid skew coupon
    """
    import numpy as np

    from feature_store.skew import ABSENT, SKEWED, Served, compare
    from hybrid.registry import Registry
    from hybrid.request_log import read_log

    workspace = Workspace.current()
    registry, folder = Registry(workspace), log or workspace.request_log
    declared, definition = registry.load_model(model), registry.definition_hash(model)
    if not folder.is_dir():
        raise ConfigError(f"no requests were logged: folder {folder} does not exist; {TO_LOG}")
    logged = read_log(folder, model)
    rows = [row for row in logged if row.definition_hash == definition]
    if not rows:
        raise ConfigError(
            f"{folder} must hold requests of {model} as it is registered now, got {len(logged)} of other definitions; "
            f"{TO_LOG}"
        )
    served = Served(
        entity=np.array([row.entity for row in rows], dtype=object),
        slots=np.array([row.server for row in rows], np.float32),  # None becomes NaN
        feature_ms=np.array([row.feature_ms for row in rows]),
        merged_ms=np.array([row.merged_ms for row in rows]),
    )
    compared = compare(declared, served, workspace.feast, tolerance)
    known = compared.status != ABSENT
    pairs = {
        n: (served.slots[known, i], compared.offline[known, i]) for i, n in enumerate(declared.server.features.names)
    }
    kept = [row for row, there in zip(rows, known, strict=True) if there]
    pairs |= _computed(registry, declared, kept, served.slots[known], compared.offline[known])
    report = Report(
        model=model,
        rows=dict(Counter(compared.status.tolist())),
        other_definitions=len(logged) - len(rows),
        tolerance=tolerance,
        differences=tuple(_difference(name, *pair, kept, tolerance) for name, pair in pairs.items()),
    )
    (_print_json if as_json else _show)(report)
    raise typer.Exit(1 if report.rows.keys() & {SKEWED, ABSENT} else 0)


def _computed(
    registry: Registry,
    model: HybridModel,
    rows: Sequence[LoggedRow],
    served: NDArray[np.float32],
    offline: NDArray[np.float32],
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What each row's own version makes of its slots: the server's embedding, and the score without a device."""
    import numpy as np

    request = np.array([row.request for row in rows], np.float32).reshape(len(rows), -1)
    version = np.array([row.version for row in rows])
    found: dict[str, Any] = {}
    for number in np.unique(version).tolist():
        run, here = _network(registry, model, number), version == number
        for name, a, b in zip(
            ("server embedding", "score, server side alone"),
            run(np.hstack([served[here], request[here]])),
            run(np.hstack([offline[here], request[here]])),
            strict=True,
        ):
            both = found.setdefault(name, tuple(np.zeros((len(rows), a.shape[1]), np.float32) for _ in range(2)))
            both[0][here], both[1][here] = a, b
    return found


def _network(registry: Registry, model: HybridModel, number: int) -> Callable[[NDArray[Any]], tuple[Any, Any]]:
    """(n, server + request) slots -> (n, a) embeddings and (n, 1) probabilities with no device's embedding."""
    import torch

    from hybrid.network import Network

    version = registry.version(model.name, number)
    network = Network.of(model, version)
    network.check_registered(version.definition["network"])
    tower, head = network.server_program(), network.head.eval()

    def run(slots: NDArray[Any]) -> tuple[Any, Any]:
        with torch.no_grad():
            embedding = tower(torch.from_numpy(slots))
            score = network.correction(head(embedding, network.missing_embedding("device", len(slots))))
        return embedding.numpy(), score.reshape(-1, 1).numpy()

    return run


def _difference(
    name: str,
    served: NDArray[np.float32],
    offline: NDArray[np.float32],
    rows: Sequence[LoggedRow],
    tolerance: float,
) -> Difference:
    """(n,) or (n, k) numbers of both; of several numbers a row, the largest difference counts."""
    import numpy as np

    n = len(rows)
    one_missing = (np.isnan(served) != np.isnan(offline)).reshape(n, -1).any(axis=1)
    apart = np.nan_to_num(np.abs(served.astype(np.float64) - offline)).reshape(n, -1).max(axis=1, initial=0.0)
    differs = one_missing | (apart > tolerance)
    first = [datetime.fromtimestamp(rows[place].merged_ms / 1000, UTC) for place in np.flatnonzero(differs)[:EXAMPLES]]
    times = tuple(moment.isoformat(timespec="milliseconds") for moment in first)
    return Difference(name, int(differs.sum()), int(one_missing.sum()), float(apart.max(initial=0.0)), times)


def _print_json(report: Report) -> None:
    print(json.dumps(asdict(report)))


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("of", overflow="fold"), "rows that differ", "one side missing", "largest difference", "first served"
    )
    for each in report.differences:
        table.add_row(each.of, str(each.rows), str(each.missing), f"{each.max_abs:.3g}", "\n".join(each.first))
    Console(highlight=False).print(table)
    counts = ", ".join(f"{rows} {status}" for status, rows in sorted(report.rows.items()))
    print(f"{report.model}: {sum(report.rows.values())} rows: {counts}")
    if report.other_definitions:
        print(f"{report.other_definitions} rows of other definitions were not compared")
