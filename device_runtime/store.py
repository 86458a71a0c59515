"""What a device keeps: its events, what the server side contributed, the labels that came, and its part in training.

One encrypted SQLite file (`device_runtime.encrypted`) of one model. An event is a row with its entity and its raw
features; asked about, it is an inference, whose id is the event's; with a label it is an example. A process that
stands for many devices gives each a number; a single device is number 0. Times are Unix time in milliseconds, UTC.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from device_runtime import retention, schema
from device_runtime.encrypted import Database, Full
from device_runtime.journal import Journal
from device_runtime.protocol import Held, Upload
from device_runtime.rows import DEVICE, REQUEST, Rows, feature_columns, quoted, values
from hybrid.bundle import Manifest
from hybrid.errors import ConfigError, StoreError
from hybrid.journal import Phase
from hybrid.plan import Policy, Turn
from hybrid.query import LABEL, Query
from hybrid.tokens import Pending

_UPLOAD = "plan, upload, body, expires_ms, version, policy, reports"  # as `Upload` has them


@dataclass(frozen=True)
class Served:
    """What the server side contributed to an inference, and what came of it.

    Attributes:
        at_ms: of the answer.
        version: that predicted.
        prediction: probability; NaN where there is none.
        server: (a,) float32, the embedding as it was merged, or the slots where users train the server tower too;
            empty where none was told, or what answered is a fallback.
        feature_age_ms: of the server's features; -1 where there were none.
    """

    at_ms: int
    version: int
    prediction: float = math.nan
    server: Sequence[float] = ()
    feature_age_ms: int = -1

    def columns(self) -> tuple[Any, ...]:
        """Version, server, feature age and prediction as SQLite stores them."""
        server = np.asarray(self.server, "<f4").tobytes() if len(self.server) else None
        return (
            self.version,
            server,
            None if self.feature_age_ms < 0 else self.feature_age_ms,
            None if math.isnan(self.prediction) else self.prediction,
        )


@dataclass(frozen=True)
class Examples:
    """What one device may train with, oldest first.

    Attributes:
        server: (n, a) what the server side contributed.
        features: device feature -> (n,) raw values, None where missing.
        labels: (n,) 0 or 1.
    """

    server: NDArray[np.float32]
    features: Mapping[str, Sequence[Any]]
    labels: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Asked:
    """Rows of one device that a query counts over, the oldest first.

    Attributes:
        columns: device and request features by name, each (n,) raw, None where missing; "label" 0, 1 or None.
        features: the device features alone.
        server: (n, server_embedding) as the server side contributed it to this version; NaN where it did not.
        predicted: (n,) what this version predicted from a genuine contribution; NaN where it did not.
    """

    columns: Mapping[str, Sequence[Any]]
    features: Mapping[str, Sequence[Any]]
    server: NDArray[np.float32]
    predicted: NDArray[np.float32]


class Store(AbstractContextManager["Store"]):
    """A device's store, open for one thread; see `open`.

    Whatever changes it is on the disk when the call returns, or has not happened: `kill -9` at any moment leaves
    one or the other.
    """

    def __init__(self, database: Database, manifest: Manifest | None) -> None:
        self._db, self._given = database, manifest

    @classmethod
    def open(cls, file: Path, key: bytes, manifest: Manifest | None = None, *, now_ms: int | None = None) -> Self:
        """Opens a device's store, made at first use, and brings it to what the bundle wants kept.

        Features that are new to it are missing in the events that it has; those that the bundle no longer has
        are deleted from all of them, for good. What is too old goes too.

        Args:
            file: of the store; readable by its owner only.
            key: the host app's, 32 bytes.
            manifest: of the verified bundle; None: as the store is, for `forget`, `export` and what is not about
                features.
            now_ms: the device's time; None: as its clock says.

        Raises:
            ConfigError: no key of that length, no such folder, or, without a manifest, no such file.
            StoreError: another key's, another model's, damaged, or no space to bring it up to date. Nothing is changed.
        """
        database = Database(file, key, create=manifest is not None)
        store = cls(database, manifest)
        try:
            if manifest is not None:
                schema.prepare(database, manifest, file.name)
            elif not schema.columns(database):
                raise StoreError(f"store {file.name!r} is empty: no app has written to it")
            else:
                with suppress(Full):
                    schema.complete(database)
            with suppress(Full):  # what is there can be read and forgotten all the same
                store.enforce(_now() if now_ms is None else now_ms)
        except BaseException:
            database.close()
            raise
        return store

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def together(self) -> AbstractContextManager[None]:
        """Calls within are one: all of them happen, or none does; and many of them take the time of one.

        Raises:
            StoreError: there is no space, or another process holds the store.
        """
        return self._db.transaction()

    # Events

    def write(self, rows: Rows, at_ms: int) -> None:
        """Adds events that are asked about later; all of them or none.

        Args:
            rows: (device, row) tells one from another.
            at_ms: when they were.

        Raises:
            ConfigError: columns are absent or of different lengths, a value is of
                the wrong type, or a (device, row) is already there.
            StoreError: there is no space.
        """
        columns = feature_columns(self._manifest)
        names = ["device", "row", "entity", *map(quoted, columns), "at_ms"]
        sql = f"INSERT INTO events ({', '.join(names)}) VALUES ({_marks(len(names) - 1)}, {int(at_ms)})"  # noqa: S608
        with self._db.transaction():
            self._db.run_many(sql, zip(*values(rows, columns), strict=True))
            self.enforce(at_ms)

    def inference(
        self, entity: str, request: Mapping[str, Any], features: Mapping[str, Any], served: Served, *, device: int = 0
    ) -> int:
        """Keeps one event that was asked about and answered, and returns its id, never used again.

        Args:
            entity: the join key.
            request: raw request features by name; None where missing.
            features: the same of the device features.
            served: the answer.
            device: whose.

        Raises:
            ConfigError: a feature is absent or of the wrong type.
            StoreError: there is no space.
        """
        columns = feature_columns(self._manifest)
        with self._db.transaction():
            (row,) = self._db.one("SELECT coalesce(max(row) + 1, 0) FROM events WHERE device = ?", (device,))
            found = values(_one_row(device, row, entity, request, features), columns)
            names = ["device", "row", "entity", *map(quoted, columns), "at_ms"]
            names += ["version", "server", "feature_age_ms", "prediction"]
            sql = f"INSERT INTO events ({', '.join(names)}) VALUES ({_marks(len(names))})"  # noqa: S608
            inference = self._db.insert(sql, [*(column[0] for column in found), served.at_ms, *served.columns()])
            self.enforce(served.at_ms)
        return inference

    def answered(self, answers: Iterable[tuple[int, int, Served]]) -> int:
        """Notes what was answered about events that were written before: (device, row, answer); all or none.

        An event that has its label keeps what it was served before: a later answer may know what came of it. One that
        is no longer there stays away.

        Returns:
            How many events were noted.

        Raises:
            StoreError: there is no space.
        """
        sql = (
            "UPDATE events SET at_ms = ?, version = ?, server = ?, feature_age_ms = ?, prediction = ? "
            "WHERE device = ? AND row = ? AND label IS NULL"
        )
        found = [(served.at_ms, *served.columns(), device, row) for device, row, served in answers]
        if not found:
            return 0
        with self._db.transaction():
            noted = self._db.run_many(sql, found)
            self.enforce(max(at_ms for at_ms, *_ in found))
        return noted

    def rows(self, devices: range | None = None, batch: int = 256) -> Iterator[Rows]:
        """Yields events in batches, by device and row. Nothing is held meanwhile: the store may be written to.

        Args:
            devices: only these (step 1); None: all.
            batch: most rows at once.
        """
        columns = feature_columns(self._manifest)
        names = ["device", "row", "entity", *map(quoted, columns)]
        sql = (
            f"SELECT {', '.join(names)} FROM events "  # noqa: S608
            "WHERE (device, row) > (?, ?) AND device <= ? ORDER BY device, row LIMIT ?"
        )
        first, last = (devices.start, devices.stop - 1) if devices is not None else (-(2**63) + 1, 2**63 - 1)
        after = (first - 1, 2**63 - 1)
        while found := self._db.all(sql, (*after, last, batch)):
            after = found[-1][:2]
            yield _rows(found, columns)

    def id_of(self, device: int, row: int) -> int | None:
        """The id of an event that was written with these; None: it is not there."""
        found = self._db.all("SELECT id FROM events WHERE device = ? AND row = ?", (device, row))
        return found[0][0] if found else None

    def label(
        self, value: int, at_ms: int, *, inference: int | None = None, entity: str | None = None, device: int = 0
    ) -> int | None:
        """Joins a label to the inference that it belongs to; a later one for the same inference takes its place.

        Args:
            value: 0 or 1.
            at_ms: of the event that says so.
            inference: its id, where the app knows it; else
            entity: whose newest inference before the event is meant, of that device.
            device: whose, with `entity`.

        Returns:
            The inference; None where there is none of that id or entity, or the event came later than
            `keeping.label_window_s` after it: then the label is not kept.

        Raises:
            ConfigError: not 0 or 1, or not one of `inference` and `entity`.
            StoreError: there is no space.
        """
        if value not in (0, 1):
            raise ConfigError("a label must be 0 or 1")
        if (inference is None) == (entity is None):
            raise ConfigError("a label needs one of inference and entity")
        with self._db.transaction():
            found = self._of_entity(entity, device, at_ms) if entity is not None else self._of_id(inference)
            if not found or at_ms - found[0][1] > self._window_ms:
                return None
            self._db.run("UPDATE events SET label = ?, label_ms = ? WHERE id = ?", (int(value), at_ms, found[0][0]))
            joined: int = found[0][0]
            return joined

    def _of_id(self, inference: int | None) -> list[tuple[Any, ...]]:
        return self._db.all("SELECT id, at_ms FROM events WHERE id = ? AND version IS NOT NULL", (inference,))

    def _of_entity(self, entity: str, device: int, at_ms: int) -> list[tuple[Any, ...]]:
        return self._db.all(
            "SELECT id, at_ms FROM events WHERE device = ? AND at_ms BETWEEN ? AND ? AND entity = ? "
            "AND version IS NOT NULL ORDER BY at_ms DESC, id DESC LIMIT 1",
            (device, max(at_ms - self._window_ms, -(2**63)), at_ms, entity),
        )

    def examples(self, device: int, newest: int, now_ms: int) -> Examples:
        """The newest inferences of a device that have a label, and a contribution that this bundle can train with.

        That is one of the width that `train.server` says (without a training program, the embedding's) and of this
        version: another version's server tower has other embeddings. Where users train the server tower too, slots are
        contributed, which all versions of one definition share.

        Args:
            device: whose.
            newest: at most so many.
            now_ms: the device's time; where `keeping.label_window_s` has passed without an event, the label is
                `keeping.label_absent`, if there is one.
        """
        manifest, waited = self._manifest, self._waited(now_ms)
        width = manifest.server_embedding if manifest.train is None else manifest.train.server
        columns = {name: f"{DEVICE}{name}" for name in manifest.features.names}
        names = ["server", "coalesce(label, ?)", *(quoted(column) for column in columns.values())]
        sql = (
            f"SELECT {', '.join(names)} FROM events WHERE device = ? AND length(server) = ? "  # noqa: S608
            f"AND version IN ({self._comparable}) AND (label IS NOT NULL OR at_ms < ?) "
            "ORDER BY at_ms DESC, id DESC LIMIT ?"
        )
        chosen = (manifest.keeping.label_absent, device, 4 * width, waited, max(newest, 0))
        found = self._db.all(sql, chosen)[::-1]
        server, labels, *features = zip(*found, strict=True) if found else ((),) * len(names)
        return Examples(
            server=np.frombuffer(b"".join(server), "<f4").reshape(len(found), width).astype(np.float32),
            features=dict(zip(columns, features, strict=True)),
            labels=np.array(labels, np.float32),
        )

    def asked(self, query: Query, now_ms: int, *, device: int = 0) -> Asked:
        """The rows that a query counts over: `query.rows` of all events at most, labelled ones where it reads labels.

        Args:
            query: which reads what the bundle declares.
            now_ms: see `examples`, for labels that stayed away.
            device: whose.
        """
        manifest = self._manifest
        request = {name: f"{REQUEST}{name}" for name in manifest.request}
        own = {name: f"{DEVICE}{name}" for name in manifest.features.names}
        columns = request | own
        label = "coalesce(label, CASE WHEN version IS NOT NULL AND at_ms < ? THEN ? END)"
        here = f"version = {manifest.version} AND server IS NOT NULL"
        names = [label, f"CASE WHEN {here} THEN server END", f"CASE WHEN {here} THEN prediction END"]
        names += [quoted(column) for column in columns.values()]
        order = "DESC" if query.take == "last" else "ASC"
        labelled = f"AND {label} IS NOT NULL" if LABEL in query.reads else ""
        sql = (
            f"SELECT {', '.join(names)} FROM events WHERE device = ? {labelled} "  # noqa: S608
            f"ORDER BY at_ms {order}, id {order} LIMIT ?"
        )
        late = (self._waited(now_ms), manifest.keeping.label_absent)
        found = self._db.all(sql, (*late, device, *(late if labelled else ()), query.rows))
        found = found[::-1] if query.take == "last" else found
        labels, server, predicted, *values = zip(*found, strict=True) if found else ((),) * len(names)
        by_name = dict(zip(columns, values, strict=True))
        return Asked(
            columns=by_name | {LABEL: labels},
            features={name: by_name[name] for name in own},
            server=_embeddings(server, manifest.server_embedding),
            predicted=np.array(predicted, np.float32),
        )

    def _waited(self, now_ms: int) -> int:
        """Requests without a label from before this time will get none, where the bundle says what that means."""
        absent = self._manifest.keeping.label_absent
        return -(2**63) if absent is None else max(now_ms - self._window_ms, -(2**63))

    @property
    def _comparable(self) -> str:
        """SQL that gives the versions whose contributions can stand beside each other."""
        manifest = self._manifest
        if manifest.train is not None and manifest.train.takes_slots:
            version = f"SELECT definition FROM versions WHERE version = {manifest.version}"  # noqa: S608
            return f"SELECT version FROM versions WHERE definition = ({version})"  # noqa: S608
        return str(manifest.version)

    # What goes

    def enforce(self, now_ms: int) -> int:
        """Deletes what is too old or too much, oldest first, and gives its space back; returns how many events.

        Cheap where there is nothing to do.

        Args:
            now_ms: the device's time. What is as far in the future as it may be in the past was stamped by a clock
                that was wrong, and goes too.
        """
        return 0 if self._given is None else retention.enforce(self._db, self._given.keeping, now_ms)

    def forget(self, *, device: int | None = None, entity: str | None = None, now_ms: int | None = None) -> int:
        """Deletes for good: everything of a device, or of all; or its events about one entity. Returns how many events.

        Updates that wait to be sent are deleted with it: they were trained with what is forgotten. Tokens and journal
        go where everything of a device does; the issuer gives no other of their windows. The ids of plans that a
        forgotten device decided on are left, dated now: it waits as if it had just taken part in all of them, and takes
        part in none again that is still open, else forgetting would let a person be counted more often; for the same
        reason the steps stay at which its turn is in each training, and the week that it reported. Halted versions
        stay halted.

        Args:
            device: only this; None: all.
            entity: only events about it; None: everything.
            now_ms: the device's time; None: as its clock says.

        Raises:
            StoreError: the disk fails, or another process holds the store. A full disk does not keep from forgetting.
        """
        whose, those = ("1", ()) if device is None else ("device = ?", (device,))
        events, given = (whose, those) if entity is None else (f"{whose} AND entity = ?", (*those, entity))
        took_part_ms = None if entity is not None else _now() if now_ms is None else now_ms
        try:
            with self._db.transaction():
                self._forget_training(whose, those, took_part_ms)
                gone = retention.delete_events(self._db, events, given)
        except Full:
            gone = retention.delete_events(self._db, events, given)
            with self._db.reserve():
                self._forget_training(whose, those, took_part_ms)
        schema.rewrite(self._db)
        return gone

    def _forget_training(self, whose: str, those: tuple[int, ...], now_ms: int | None) -> None:
        """`now_ms`: in place of the times of participations; None: they stay."""
        with self._db.transaction():
            self._db.run(f"DELETE FROM uploads WHERE {whose}", those)  # noqa: S608
            self._db.run("INSERT INTO about VALUES ('forgets', '1') ON CONFLICT (name) DO UPDATE SET value = value + 1")
            if now_ms is not None:
                if schema.has(self._db, "tokens"):
                    self._db.run(f"DELETE FROM tokens WHERE {whose}", those)  # noqa: S608
                if schema.has(self._db, "journal"):
                    self._db.run(f"DELETE FROM journal WHERE {whose}", those)  # noqa: S608
                self._db.run(f"UPDATE participations SET at_ms = ? WHERE {whose}", (now_ms, *those))  # noqa: S608
            schema.rewrite_later(self._db)

    def export(self, device: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields everything that is kept of a device, or of all, as JSON values: "kind" says what each is.

        Args:
            device: only this one's; None: all.
        """
        yield from self._export_events(device)
        whose, those = ("device = ?", (device,)) if device is not None else ("1", ())
        sql = f"SELECT device, plan, at_ms, took_part FROM participations WHERE {whose} ORDER BY at_ms"  # noqa: S608
        for number, plan, at_ms, took_part in self._db.all(sql, those):
            found = {"device": number, "plan": plan, "at": _iso(at_ms), "took_part": bool(took_part)}
            yield {"kind": "participation", **found}
        sql = f"SELECT device, plan, upload, expires_ms, body FROM uploads WHERE {whose}"  # noqa: S608
        for number, plan, upload, expires_ms, body in self._db.all(sql, those):
            found = {"device": number, "plan": plan, "upload": upload, "expires": _iso(expires_ms)}
            yield {"kind": "upload", **found, "body_base64": base64.b64encode(body).decode()}
        if schema.has(self._db, "tokens"):
            sql = f"SELECT device, scope, number, expires_ms, token FROM tokens WHERE {whose}"  # noqa: S608
            for number, scope, window, expires_ms, token in self._db.all(sql, those):
                found = {"device": number, "scope": scope, "number": window, "expires": _iso(expires_ms)}
                yield {"kind": "token", **found, "token_base64": token and base64.b64encode(token).decode()}
        if schema.has(self._db, "turns"):
            sql = f"SELECT device, training, next_step FROM turns WHERE {whose}"  # noqa: S608
            for number, training, step in self._db.all(sql, those):
                yield {"kind": "turn", "device": number, "training": training, "next_step": step}
        if schema.has(self._db, "reports"):
            yield from self._export_journal(whose, those)
        for model, version, reason in self._db.all("SELECT model, version, reason FROM halted"):
            yield {"kind": "halt", "model": model, "version": version, "reason": reason}

    def _export_journal(self, whose: str, those: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        sql = f"SELECT device, week, version, phases_left, reason FROM journal WHERE {whose} ORDER BY week"  # noqa: S608
        for number, week, version, left, reason in self._db.all(sql, those):
            reached = {"phase": str(Phase.with_left(left)), "stopped": reason}
            yield {"kind": "journal", "device": number, "week": week, "version": version, **reached}
        sql = f"SELECT device, week, begun FROM reports WHERE {whose}"  # noqa: S608
        for number, week, begun in self._db.all(sql, those):
            yield {"kind": "report", "device": number, "week": week, "reported": bool(begun)}

    def _export_events(self, device: int | None) -> Iterator[dict[str, Any]]:
        features = schema.columns(self._db)
        names = [*schema.EVENT, *map(quoted, features)]
        sql = (
            f"SELECT {', '.join(names)} FROM events WHERE id > ? AND device = coalesce(?, device) ORDER BY id LIMIT 256"  # noqa: S608
        )
        after = 0
        while found := self._db.all(sql, (after, device)):
            after = found[-1][0]
            for row in found:
                yield _exported(dict(zip([*schema.EVENT, *features], row, strict=True)))

    # Training

    def begin(
        self, plan_id: str, at_ms: int, *, device: int = 0, takes_part: bool = True, turn: Turn | None = None
    ) -> bool:
        """Notes that the device takes part in a plan, or that a toss decided that it does not.

        Args:
            plan_id: of the plan.
            at_ms: when.
            device: whose.
            takes_part: whether it is part of the history.
            turn: of the plan; its next one is then a separation after the last step that this one may be in.

        Returns:
            False, and nothing is noted, where the plan was decided on before, or its first step is before the
            device's turn.
        """
        with self._db.transaction():
            if turn is not None and turn.first_step < (self.next_step(turn.training, device=device) or 0):
                return False
            row = (device, plan_id, at_ms, takes_part)
            begun = self._db.run("INSERT OR IGNORE INTO participations VALUES (?, ?, ?, ?)", row) == 1
            if begun and takes_part and turn is not None:
                following = (device, turn.training, turn.last_step + turn.separation)
                self._db.run("INSERT OR REPLACE INTO turns VALUES (?, ?, ?)", following)
            return begun

    def next_step(self, training: str, *, device: int = 0) -> int | None:
        """From which step of a training's horizon on it is the device's turn; None: it never heard of the training."""
        found = self._db.all("SELECT next_step FROM turns WHERE device = ? AND training = ?", (device, training))
        return found[0][0] if found else None

    def draw_turn(self, training: str, step: int, *, device: int = 0) -> None:
        """Notes it for a device that never heard of the training; else it stays."""
        with self._db.transaction():
            self._db.run("INSERT OR IGNORE INTO turns VALUES (?, ?, ?)", (device, training, step))

    def history(self, since_ms: int, *, device: int = 0) -> list[int]:
        """When the device took part since then, oldest first."""
        sql = "SELECT at_ms FROM participations WHERE device = ? AND at_ms >= ? AND took_part ORDER BY at_ms"
        return [at_ms for (at_ms,) in self._db.all(sql, (device, since_ms))]

    @property
    def forgets(self) -> int:
        """How often something was forgotten: a training that began before it must not be kept after it."""
        found = self._db.all("SELECT value FROM about WHERE name = 'forgets'")
        return int(found[0][0]) if found else 0

    def keep_upload(self, upload: Upload, *, device: int = 0) -> None:
        """Keeps an update until it is sent; one of the same plan takes the other's place."""
        with self._db.transaction():
            sql = f"INSERT OR REPLACE INTO uploads ({_UPLOAD}, device) VALUES ({_marks(8)})"  # noqa: S608
            row = (upload.plan, upload.upload, upload.body, upload.expires_ms, upload.version)
            self._db.run(sql, (*row, upload.policy.model_dump_json(), upload.reports, device))

    def pending(self, now_ms: int, *, device: int = 0, reports: bool = False) -> list[Upload]:
        """The updates that wait to be sent and have not expired, the first to expire first; or such reports."""
        sql = (
            f"SELECT {_UPLOAD} FROM uploads WHERE device = ? AND expires_ms >= ? AND reports = ? "  # noqa: S608
            "ORDER BY expires_ms"
        )
        found = self._db.all(sql, (device, now_ms, reports))
        return [
            Upload(plan, upload, body, end_ms, version, Policy.model_validate_json(policy), bool(reports))
            for plan, upload, body, end_ms, version, policy, reports in found
        ]

    def uploaded(self, plan_id: str, *, device: int = 0) -> None:
        """Deletes a plan's update: it was taken, or nobody wants it."""
        with self._db.transaction():
            self._db.run("DELETE FROM uploads WHERE device = ? AND plan = ?", (device, plan_id))
            self._db.shrink()

    def journal(self, device: int) -> Journal:
        """How far a device came with each version, week by week."""
        return Journal(device, self._db)

    @property
    def model(self) -> str:
        """Whose store it is."""
        (name,) = self._db.one("SELECT value FROM about WHERE name = 'model'")
        return str(name)

    def held(self, scope: str, *, device: int = 0) -> Held | None:
        """The token of a scope, or what it was asked for with; None: there is none."""
        sql = "SELECT number, asked, expires_ms, token FROM tokens WHERE device = ? AND scope = ?"
        for number, asked, expires_ms, token in self._db.all(sql, (device, scope)):
            return Held(scope, number, Pending.read(asked), expires_ms, token)
        return None

    def hold(self, held: Held, now_ms: int, *, device: int = 0) -> None:
        """Keeps it in the place of the scope's last; those that have expired go."""
        with self._db.transaction():
            self._db.run("DELETE FROM tokens WHERE device = ? AND expires_ms < ?", (device, now_ms))
            row = (device, held.scope, held.number, bytes(held.asked), held.expires_ms, held.token)
            self._db.run("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?, ?)", row)

    def spend(self, scope: str, *, device: int = 0) -> None:
        """Deletes it: it is in an update."""
        with self._db.transaction():
            self._db.run("DELETE FROM tokens WHERE device = ? AND scope = ?", (device, scope))

    def halt(self, model: str, versions: Iterable[int], reason: str) -> None:
        """Notes that these versions must not be used any more; for good."""
        with self._db.transaction():
            found = [(model, version, reason) for version in versions]
            self._db.run_many("INSERT OR REPLACE INTO halted VALUES (?, ?, ?)", found)

    def halted(self, version: int) -> str | None:
        """Why a version of this store's model must not be used; None: it may."""
        sql = "SELECT reason FROM halted WHERE version = ? AND model = (SELECT value FROM about WHERE name = 'model')"
        found = self._db.all(sql, (version,))
        return found[0][0] if found else None

    # Opening

    @property
    def _manifest(self) -> Manifest:
        if self._given is None:
            raise ConfigError("the store must be opened with the bundle's manifest for this")
        return self._given

    @property
    def _window_ms(self) -> int:
        window_s = self._manifest.keeping.label_window_s
        return 2**62 if window_s is None else int(window_s * 1000)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _iso(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):  # of a clock that was wrong
        return f"{at_ms} ms"


def _marks(number: int) -> str:
    return ", ".join("?" * number)


def _embeddings(found: Sequence[bytes | None], width: int) -> NDArray[np.float32]:
    """(n, width); NaN where there is none of that width."""
    server = np.full((len(found), width), np.nan, np.float32)
    for row, blob in enumerate(found):
        if blob is not None and len(blob) == 4 * width:
            server[row] = np.frombuffer(blob, "<f4")
    return server


def _one_row(device: int, row: int, entity: str, request: Mapping[str, Any], features: Mapping[str, Any]) -> Rows:
    return Rows(
        device=np.array([device]),
        row=np.array([row]),
        entity=[entity],
        request={name: [value] for name, value in request.items()},
        features={name: [value] for name, value in features.items()},
    )


def _rows(found: Sequence[tuple[Any, ...]], columns: Mapping[str, str]) -> Rows:
    device, row, entity, *features = zip(*found, strict=True)
    by_name = dict(zip(columns, features, strict=True))
    return Rows(
        device=np.array(device, dtype=np.int64),
        row=np.array(row, dtype=np.int64),
        entity=entity,
        request={name.removeprefix(REQUEST): v for name, v in by_name.items() if name.startswith(REQUEST)},
        features={name.removeprefix(DEVICE): v for name, v in by_name.items() if name.startswith(DEVICE)},
    )


def _exported(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event as its person reads it."""
    readable = {name: _readable(value) for name, value in event.items()}
    found = {"kind": "event", "id": event["id"], "device": event["device"], "row": event["row"]}
    found |= {"at": _iso(event["at_ms"]), "entity": event["entity"]}
    found["request"] = {n.removeprefix(REQUEST): v for n, v in readable.items() if n.startswith(REQUEST)}
    found["features"] = {n.removeprefix(DEVICE): v for n, v in readable.items() if n.startswith(DEVICE)}
    if event["version"] is not None:
        server = [None if math.isnan(x) else x for x in np.frombuffer(event["server"] or b"", "<f4").tolist()]
        found["inference"] = {"version": event["version"], "prediction": readable["prediction"], "server": server}
        found["inference"]["feature_age_ms"] = event["feature_age_ms"]
    if event["label"] is not None:
        found["label"] = {"value": event["label"], "at": _iso(event["label_ms"])}
    return found


def _readable(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
