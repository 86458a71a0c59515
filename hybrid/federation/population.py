"""The people a model learns from, as columns: an Arrow file in the order of users, and where each user's rows begin.

There is never one object per user, and no user id is kept: only, for each user,
the bucket that decides its fold, of which many users share one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from hybrid.errors import BadRequest, ConfigError, NotFound
from hybrid.features import Float32
from hybrid.spec import HybridModel, Label, Name
from hybrid.workspace import Workspace

BUCKETS = 1 << 16  # 16 bits of a hash: enough to cut folds, too few to tell people apart in a large population

ROWS_A_PART = 1 << 17


@dataclass(frozen=True)
class Examples:
    """Labelled rows as the towers read them, in the order of users.

    Attributes:
        server: (n, server_features.width) float32, encoded.
        device: (n, device_features.width) float32, encoded.
        labels: (n,) float32, 0 or 1.
        offsets: (users + 1,) int64: user u has the rows offsets[u] to offsets[u + 1].
        population: name of what they came from.
    """

    server: Float32 = field(repr=False)
    device: Float32 = field(repr=False)
    labels: Float32 = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    population: str = ""

    @classmethod
    def open(cls, folder: Path) -> Examples:
        """Maps what an `ExamplesWriter` wrote into memory: rows are read from the disk as a cohort needs them.

        Raises:
            NotFound: the folder holds no whole examples.
        """
        if not (folder / "examples.json").is_file():
            raise NotFound(f"{folder.name!r} holds no examples")
        # Copied when written to, which nobody does: torch wants memory that it may write to.
        columns = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("server", "device", "labels")}
        about = json.loads((folder / "examples.json").read_text())
        return cls(**columns, offsets=np.load(folder / "offsets.npy"), population=about["population"])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def users(self) -> int:
        """How many people."""
        return len(self.offsets) - 1

    @property
    def user_of_row(self) -> NDArray[np.int64]:
        """(n,) the user, in [0, users), of each row."""
        return np.repeat(np.arange(self.users), np.diff(self.offsets))

    def of(self, users: NDArray[np.bool_]) -> Examples:
        """Those of some users only.

        Args:
            users: (users,) which.
        """
        return self._rows(users[self.user_of_row], np.diff(self.offsets)[users])

    def with_labels(self, rows: NDArray[np.bool_]) -> Examples:
        """Some rows only; a user who keeps none stays, with no row.

        Args:
            rows: (n,) which.
        """
        return self._rows(rows, np.bincount(self.user_of_row[rows], minlength=self.users))

    def _rows(self, rows: NDArray[np.bool_], counts: NDArray[Any]) -> Examples:
        kept = {name: getattr(self, name)[rows] for name in ("server", "device", "labels")}
        return replace(self, **kept, offsets=_offsets(counts))


class ExamplesWriter:
    """Writes examples to a folder part by part, so that more fit than memory holds; a `with` block.

    Args:
        folder: made where it is missing; what it held before is replaced.
        offsets: (users + 1,) of all rows to come.
        server, device: columns of each side.
        population: name of what they come from.
    """

    def __init__(self, folder: Path, offsets: NDArray[np.int64], *, server: int, device: int, population: str) -> None:
        self._folder, self._offsets, self._population = folder, offsets, population
        self._shapes = {"server": (server,), "device": (device,), "labels": ()}
        self._written = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "examples.json").unlink(missing_ok=True)
        rows = int(self._offsets[-1])
        self._columns = {
            name: np.lib.format.open_memmap(
                self._folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(rows, *shape)
            )
            for name, shape in self._shapes.items()
        }
        return self

    def __len__(self) -> int:
        """Rows written so far."""
        return self._written

    def write(self, server: Float32, device: Float32, labels: Float32) -> None:
        """The next k rows, (k, server), (k, device) and (k,), in the order of users."""
        here = slice(self._written, self._written + len(labels))
        for name, values in (("server", server), ("device", device), ("labels", labels)):
            self._columns[name][here] = values
        self._written = here.stop

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Makes them whole; what was broken off cannot be opened.

        Raises:
            ConfigError: fewer or more rows were written than the offsets say.
        """
        for column in self._columns.values():
            column.flush()
        if error is not None:
            return
        if self._written != self._offsets[-1]:
            raise ConfigError(f"{self._folder.name!r} must get {self._offsets[-1]} rows, got {self._written}")
        np.save(self._folder / "offsets.npy", self._offsets)
        (self._folder / "examples.json").write_text(json.dumps({"population": self._population}))


@dataclass(frozen=True)
class Population:
    """An imported table: rows in the order of users, memory-mapped.

    Attributes:
        name: of the population.
        offsets: (users + 1,) int64: user u has the rows offsets[u] to offsets[u + 1].
        buckets: (users,) uint16, of a hash of the user.
        time: the column with each row's time; None where rows have none.
        table: a pyarrow Table without the user column.
    """

    name: str
    offsets: NDArray[np.int64] = field(repr=False)
    buckets: NDArray[np.uint16] = field(repr=False)
    time: str | None
    table: Any = field(repr=False)

    @classmethod
    def open(cls, name: str, workspace: Workspace) -> Population:
        """Maps an imported population into memory.

        Raises:
            NotFound: none of that name was imported.
        """
        import pyarrow as pa

        folder = workspace.populations / _checked_name(name)
        if not (folder / "population.json").is_file():
            raise NotFound(f"population {name!r} does not exist; `hybrid population import` makes one")
        about = json.loads((folder / "population.json").read_text())
        table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
        with np.load(folder / "users.npz") as users:
            return cls(name, users["offsets"], users["buckets"], about["time"], table)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def users(self) -> int:
        """How many people."""
        return len(self.buckets)

    def column(self, name: str) -> NDArray[Any]:
        """(n,) raw values; missing text is None, a missing number NaN.

        Raises:
            ConfigError: the population has no such column.
        """
        if name not in self.table.column_names:
            raise ConfigError(f"population {self.name!r} must have a column {name!r}, got {self.table.column_names}")
        values: NDArray[Any] = self.table[name].to_numpy()
        return values

    def fold(self, held_out: int, folds: int, *, seed: int = 0) -> NDArray[np.bool_]:
        """(users,) who is held out in one of several folds, by a seeded hash: the same on every machine.

        Args:
            held_out: which fold, in [1, folds].
            folds: how many; at least 2.
            seed: another one cuts otherwise.

        Raises:
            ConfigError: a number is outside its range.
        """
        if not 1 <= held_out <= folds or folds < 2:
            raise ConfigError(f"fold must be K/N with 1 <= K <= N and N >= 2, got {held_out}/{folds}")
        distinct, of_user = np.unique(self.buckets, return_inverse=True)
        held = np.array([_digest(f"{seed}:{bucket}") % folds == held_out - 1 for bucket in distinct], dtype=np.bool_)
        return held[of_user]


def examples(
    model: HybridModel, population: Population, server_slots: Float32, *, folder: Path | None = None
) -> Examples:
    """Turns a population into what the towers of `model` read.

    Args:
        model: whose features and label to take.
        population: must have the request and device features and the label as columns.
        server_slots: (n, server features) of each row, from the feature store.
        folder: where they are written, part by part, and mapped into memory; None: they are held in memory.

    Raises:
        ConfigError: a column is absent or of the wrong type, or a label is not 0 or 1.
    """
    expected = (len(population), len(model.server.features))
    if server_slots.shape != expected:
        raise ConfigError(f"server_slots must have shape {expected}, got {server_slots.shape}")
    labels, known = labels_of(model.label, population)
    if folder is None:
        server, device = encoded(model, population, server_slots, slice(None))
        rows = Examples(server, device, labels, population.offsets, population.name)
        return rows if known.all() else rows.with_labels(known)
    offsets = np.concatenate([[0], np.cumsum(known)])[population.offsets]
    widths = {"server": model.server_features.width, "device": model.device_features.width}
    with ExamplesWriter(folder, offsets, **widths, population=population.name) as writer:
        for begin in range(0, len(population), ROWS_A_PART):
            part = slice(begin, begin + ROWS_A_PART)
            server, device = encoded(model, population, server_slots, part)
            writer.write(server[known[part]], device[known[part]], labels[part][known[part]])
    return Examples.open(folder)


def encoded(
    model: HybridModel, population: Population, server_slots: Float32, rows: slice | NDArray[np.integer]
) -> tuple[Float32, Float32]:
    """What both towers read of some rows, with or without a label.

    Args:
        model: whose features to take.
        population: has them as columns.
        server_slots: (n, server features) of every row.
        rows: which, k of them.

    Returns:
        (k, server_features.width) and (k, device_features.width).

    Raises:
        ConfigError: a column is absent or of the wrong type.
    """
    columns = {name: population.column(name)[rows] for name in [*model.request, *model.device]}
    server_slots, request, device = server_slots[rows], model.request_features, model.device_features
    try:
        request_slots = request.slots(request.inputs(columns))
        device_slots = device.slots(device.inputs(columns))
    except BadRequest as error:
        raise ConfigError(f"population {population.name!r}: {error}") from None
    # A model without request features has no column that tells how many rows there are.
    request_slots = request_slots.reshape(len(server_slots), len(request))
    server = model.server_features.encode(np.concatenate([server_slots, request_slots], axis=1))
    return server, device.encode(device_slots)


def import_table(
    file: Path, *, user: str, name: str, workspace: Workspace, time: str | None = None, replace: bool = False
) -> Population:
    """Brings a team's own table into a columnar population.

    Rows are put in the order of a hash of the user, then of time; the user column is dropped.

    Args:
        file: .csv, .csv.gz or .parquet. In CSV an empty field is a missing value.
        user: the column that says whose row it is: the unit that privacy protects.
        name: of the population; lower-case letters, digits and _.
        workspace: where to put it.
        time: the column with each row's time, a timestamp.
        replace: whether it may take the place of one of the same name.

    Raises:
        ConfigError: the file cannot be read, a column is absent or unfit, or the name is taken.
    """
    folder = workspace.populations / _checked_name(name)
    if folder.exists() and not replace:
        raise ConfigError(f"population {name!r} exists already; choose another name, or --replace it")
    table = _read(file)
    for column in filter(None, (user, time)):
        if column not in table.column_names:
            raise ConfigError(f"{file.name} must have a column {column!r}, got {table.column_names}")
    if not table.num_rows:
        raise ConfigError(f"{file.name} must have at least one row, got none")
    order, offsets, buckets = _by_user(table, user, time)
    draft = folder.with_name(f".{name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _write(draft, table.drop_columns([user]).take(order), offsets, buckets, time)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return Population.open(name, workspace)


def parse_fold(text: str) -> tuple[int, int]:
    """What `--fold` of a command means: "K/N" -> (held_out, folds) of `Population.fold`.

    Raises:
        ConfigError: it is not of that form.

    >>> parse_fold("1/5")
    (1, 5)
    """
    held_out, _, folds = text.partition("/")
    if not (held_out.isdecimal() and folds.isdecimal()):
        raise ConfigError(f"--fold must be K/N, e.g. 1/5, got {text!r}")
    return int(held_out), int(folds)


def names(workspace: Workspace) -> list[str]:
    """Of all imported populations."""
    return sorted(file.parent.name for file in workspace.populations.glob("[!.]*/population.json"))


def _read(file: Path) -> Any:
    """The file as a pyarrow Table."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if not file.is_file():
        raise ConfigError(f"file {str(file)!r} does not exist")
    try:
        if file.suffix == ".parquet":
            return pa.parquet.read_table(file)
        if file.name.endswith((".csv", ".csv.gz")):
            # The word "None" or "NA" may be somebody's answer; only an empty field is missing.
            options = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
            return pa.csv.read_csv(file, convert_options=options)
    except pa.ArrowInvalid as error:
        # Arrow's message may quote a row.
        raise ConfigError(f"{file.name} cannot be read as a table ({type(error).__name__})") from None
    raise ConfigError(f"file must end in .csv, .csv.gz or .parquet, got {file.name!r}")


def _by_user(
    table: Any, user: str, time: str | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint16]]:
    """The order of rows, where each user begins in it, and each user's bucket."""
    import pyarrow as pa

    if table[user].null_count:
        raise ConfigError(f"column {user!r} must say whose row each is, got {table[user].null_count} missing values")
    coded = table[user].combine_chunks().cast(pa.string()).dictionary_encode()
    digests = np.array([_digest(text) for text in coded.dictionary.to_pylist()], dtype=np.uint64)
    of_row = digests[coded.indices.to_numpy()]
    keys: list[NDArray[Any]] = [of_row]
    if time is not None:
        kind, missing = table[time].type, table[time].null_count
        if missing or not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
            raise ConfigError(f"column {time!r} must hold a timestamp in every row, got {kind}, {missing} missing")
        keys.insert(0, table[time].to_numpy())
    distinct, counts = np.unique(of_row, return_counts=True)
    return np.lexsort(keys), _offsets(counts), (distinct % BUCKETS).astype(np.uint16)


def _write(folder: Path, table: Any, offsets: NDArray[np.int64], buckets: NDArray[np.uint16], time: str | None) -> None:
    import pyarrow as pa

    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    np.savez(folder / "users.npz", offsets=offsets, buckets=buckets)
    about = {"rows": table.num_rows, "users": len(buckets), "time": time}
    (folder / "population.json").write_text(json.dumps(about))


def labels_of(label: Label, population: Population) -> tuple[Float32, NDArray[np.bool_]]:
    """(n,) labels, and which rows have one.

    Raises:
        ConfigError: the column is absent, or holds other than 0 and 1.
    """
    column = population.column(label.column)
    if column.dtype.kind not in "biuf":
        raise ConfigError(f"label column {label.column!r} must hold 0 or 1, got {column.dtype}")
    values = column.astype(np.float32)
    known = ~np.isnan(values)
    if label.absent is not None:
        values, known = np.where(known, values, np.float32(label.absent)), np.ones_like(known)
    if not np.isin(values[known], (0, 1)).all():
        raise ConfigError(f"label column {label.column!r} must hold 0 or 1, got other numbers")
    return values, known


def _offsets(counts: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"hybrid-user").digest(), "little")


def _checked_name(name: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"population must be lower-case letters, digits and _, starting with a letter, got {name!r}"
        ) from None
