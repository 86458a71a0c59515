"""The bundles of one model that a device has, in a folder that its host app gives.

    installed.json     which is current, which came before it, and the newest there ever was
    SHA256.bundle      the files of those two, by the hash of their bytes
    download, ...      what `device_runtime.download` has so far of the next
    shadow/            the same of a version that is tried beside the current one, where the host app lets it

A file is whole before its name is there, and the record names it only then: a device that dies at any moment has the
bundle of before or the one of after. The record outlives the bundles, so that an old one, rightly signed once, is not
taken again by a device whose bundle was deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_runtime import RUNTIME
from device_runtime.program import Engine, check_programs
from hybrid.bundle import MAX_BYTES, Bundle, Manifest, read_bundle
from hybrid.errors import BundleError, ConfigError
from hybrid.trust import Trusted

RECORD, SHADOW = "installed.json", "shadow"
MOST_REMEMBERED = 64  # halted versions
_DRAFT = ".draft-"


def none_halted(version: int) -> bool:
    """No version was halted."""
    return False


class Entry(BaseModel):
    """One bundle in the folder.

    Attributes:
        sha256: of its file's bytes.
        version, created_ms: of its manifest.
        tag: what the server calls these bytes (an entity tag); None where they did not come from one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    version: int
    created_ms: int
    tag: str | None = None


class Record(BaseModel):
    """What is installed.

    Attributes:
        model: whose bundles these are.
        current, previous: the one that runs, and the one before it.
        newest: (version, created_ms) of the newest that was ever installed; nothing older is again.
        left: (version, created_ms) of the bundle that `Installed.rollback` left; it is not installed again.
        halted: versions that the control plane took back, the latest last; none of them is installed or run again.
        draw: (version, number in [0, 1)) of the latest canary, or shadow, that was offered: below its share it is
            fetched. In thousandths: who offers many shares to learn it learns little that tells devices apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    model: str
    current: Entry | None = None
    previous: Entry | None = None
    newest: tuple[int, int] | None = None
    left: tuple[int, int] | None = None
    halted: tuple[int, ...] = ()
    draw: tuple[int, float] | None = None


@dataclass(frozen=True)
class Installed:
    """The bundles that a device has of one model; every way to change them is all or nothing.

    Attributes:
        folder: made at first use, for its owner alone; nothing else may lie there.
        model: whose.
        trusted: the host app's key, never one that came with a bundle.
        engine: in which a new bundle's programs are tried; None: in each that is installed.

    Raises:
        ConfigError: the folder cannot be used, or holds another model's bundles.
    """

    folder: Path
    model: str
    trusted: Trusted
    engine: Engine | None = None

    @property
    def shadow(self) -> Installed:
        """The bundles of a version that is asked too and answers nobody: whatever becomes of them, these go on."""
        return replace(self, folder=self.folder / SHADOW)

    def record(self) -> Record:
        """What is installed, as the folder says.

        Raises:
            ConfigError: it cannot be read, or others than its owner may write it. It is not taken for an empty one,
                which would let old bundles in.
        """
        file = self.folder / RECORD
        try:
            if self.folder.stat().st_mode & 0o022:
                raise ConfigError(f"folder {str(self.folder)!r} must be writable by its owner only (chmod 700)")
            record = Record.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return Record(model=self.model)
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"{str(file)!r} cannot be read ({type(error).__name__}): it says what is installed"
            ) from None
        if record.model != self.model:
            raise ConfigError(f"folder {str(self.folder)!r} holds bundles of {record.model!r}, not of {self.model!r}")
        return record

    def open(self, *, halted: Callable[[int], bool] = none_halted) -> Bundle:
        """The bundle to run: the current one, or the one before it where that is halted or damaged.

        Args:
            halted: whether a version was, by the kill switch: `Store.halted` for example.

        Raises:
            BundleError: there is none; why not.
            ConfigError: the record cannot be read.
        """
        for _ in range(3):  # another process may install, and remove what we were about to read
            record = self.record()
            bundle, reasons = self._first_usable(record, halted)
            if bundle is not None:
                return bundle
            if self.record() == record:
                break
        raise BundleError("; ".join(reasons) or f"no bundle of {self.model!r} is installed")

    def install(
        self, data: bytes, *, now_ms: int, halted: Callable[[int], bool] = none_halted, tag: str | None = None
    ) -> Bundle:
        """Makes a bundle the current one, or leaves all as it was.

        Args:
            data: the file.
            now_ms: Unix time in UTC.
            halted: whether a version was, by the kill switch.
            tag: see `Entry`.

        Raises:
            BundleError: refused: wrongly signed, damaged, too large, of another model, expired, older than one that
                was installed before, halted, left by `rollback`, for a newer runtime, with a program that does not
                load here; or the folder has no room. What was installed goes on.
            ConfigError: the folder cannot be used.
        """
        with self.alone():
            return self.install_alone(data, now_ms=now_ms, halted=halted, tag=tag)

    def install_alone(
        self, data: bytes, *, now_ms: int, halted: Callable[[int], bool] = none_halted, tag: str | None = None
    ) -> Bundle:
        """As `install`, for a caller that is `alone` already."""
        record = self.record()
        bundle = read_bundle(data, self.trusted, runtime=RUNTIME)
        sha256 = hashlib.sha256(data).hexdigest()
        self.check(bundle.manifest, now_ms=now_ms, halted=halted)
        if record.current is None or sha256 != record.current.sha256:
            check_programs(bundle, self.engine)
        entry = Entry(sha256=sha256, version=bundle.manifest.version, created_ms=bundle.manifest.created_ms, tag=tag)
        self._switch(record, entry, data, halted)
        return bundle

    def check(self, manifest: Manifest, *, now_ms: int, halted: Callable[[int], bool] = none_halted) -> None:
        """Whether a bundle with this manifest may be installed, as far as its manifest tells.

        Raises:
            BundleError: it may not, and why.
            ConfigError: the record cannot be read.
        """
        version, record = manifest.version, self.record()
        newest, made = record.newest, (version, manifest.created_ms)
        if manifest.model != self.model:
            raise BundleError(f"the bundle is of model {manifest.model!r}, this device wants {self.model!r}")
        if manifest.expires_ms is not None and now_ms > manifest.expires_ms:
            raise BundleError(f"version {version} expired at {manifest.expires_ms} ms, by this device's clock")
        if newest is not None and made < newest:
            raise BundleError(
                f"version {version} of {manifest.created_ms} ms is older than version {newest[0]} of {newest[1]} ms, "
                "which was installed before: to go back, promote the old weights as a new version"
            )
        if made == record.left:
            raise BundleError(f"version {version} was rolled back from on this device")
        if halted(version) or version in record.halted:
            raise BundleError(f"version {version} was halted by the kill switch")

    def rollback(self, *, halted: Callable[[int], bool] = none_halted) -> Bundle:
        """Goes back to the bundle before the current one, which is not installed again.

        Args:
            halted: whether a version was, by the kill switch.

        Raises:
            BundleError: there is none before it that can be used. The current one goes on.
            ConfigError: the folder cannot be used.
        """
        with self.alone():
            record = self.record()
            current, before = record.current, record.previous
            if current is None or before is None or halted(before.version):
                raise BundleError(f"no bundle of {self.model!r} before the current one can be used")
            bundle = self._read(before)
            left = current.version, current.created_ms
            after = record.model_copy(update={"current": before, "previous": None, "left": left})
            self._publish(RECORD, after.model_dump_json().encode())
            self._clean(after)
            return bundle

    def halt_alone(self, versions: Iterable[int]) -> None:
        """Leaves versions that the control plane took back; for a caller that is `alone`.

        The one before is current again, where it can be. A device that has none may install an older one than those.

        Args:
            versions: which, as a signed message says.

        Raises:
            ConfigError: the folder cannot be used.
        """
        record = self.record()
        halted = (*record.halted, *(version for version in dict.fromkeys(versions) if version not in record.halted))
        if halted == record.halted:
            return
        kept = [entry for entry in (record.current, record.previous) if entry and entry.version not in halted]
        current, previous = [*kept, None, None][:2]
        newest = record.newest
        if newest is not None and newest[0] in halted:
            newest = max(((entry.version, entry.created_ms) for entry in kept), default=None)
        changed = {"current": current, "previous": previous, "newest": newest, "halted": halted[-MOST_REMEMBERED:]}
        after = record.model_copy(update=changed)
        self._publish(RECORD, after.model_dump_json().encode())
        self._clean(after)

    def empty_alone(self) -> None:
        """Removes the bundles, for a caller that is `alone`; what keeps an old or halted one out stays known.

        Raises:
            BundleError: the record cannot be written; the bundles are gone all the same.
            ConfigError: the folder cannot be used.
        """
        before = self.record()
        after = before.model_copy(update={"current": None, "previous": None})
        self._clean(after)
        if after != before:
            self._publish(RECORD, after.model_dump_json().encode())

    def drawn_alone(self, version: int) -> float:
        """This device's number in [0, 1) for a canary or shadow, drawn at first; for a caller that is `alone`.

        Raises:
            ConfigError: the folder cannot be used.
        """
        record = self.record()
        if record.draw is None or record.draw[0] != version:
            record = record.model_copy(update={"draw": (version, secrets.randbelow(1000) / 1000)})
            self._publish(RECORD, record.model_dump_json().encode())
        assert record.draw is not None
        return record.draw[1]

    def tag(self) -> str | None:
        """What the server calls the current bundle's bytes; None where that is not known, or the file is damaged."""
        current = self.record().current
        with suppress(BundleError):
            if current is not None and self._read(current):
                return current.tag
        return None

    def programs(self) -> dict[str, bytes]:
        """Programs that are here already, by their SHA-256."""
        found: dict[str, bytes] = {}
        record = self.record()
        for entry in filter(None, (record.current, record.previous)):
            with suppress(BundleError):  # a damaged file has nothing to give
                bundle = self._read(entry)
                found |= {program.sha256: bundle.programs[name] for name, program in bundle.manifest.programs.items()}
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from changing the folder meanwhile.

        Raises:
            ConfigError: one does so now, or the folder cannot be used.
        """
        descriptor = -1
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(f"another process is updating {str(self.folder)!r}: try again later") from None
        except OSError as error:
            raise ConfigError(f"folder {str(self.folder)!r} cannot be used: {error.strerror}") from None
        try:
            yield
        finally:
            os.close(descriptor)  # which ends the lock, as the end of this process would

    def _first_usable(self, record: Record, halted: Callable[[int], bool]) -> tuple[Bundle | None, list[str]]:
        reasons = []
        for entry in filter(None, (record.current, record.previous)):
            if halted(entry.version):
                reasons.append(f"version {entry.version} was halted by the kill switch")
                continue
            try:
                return self._read(entry), []
            except BundleError as error:
                reasons.append(f"version {entry.version}: {error}")
        return None, reasons

    def _read(self, entry: Entry) -> Bundle:
        try:
            with (self.folder / f"{entry.sha256}.bundle").open("rb") as handle:
                data = handle.read(MAX_BYTES + 1)
        except OSError as error:
            raise BundleError(f"its file cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:  # signed or not: what is known of it is the entry's
            raise BundleError("its file is not the one that was installed")
        return read_bundle(data, self.trusted, runtime=RUNTIME)

    def _switch(self, record: Record, entry: Entry, data: bytes, halted: Callable[[int], bool]) -> None:
        before, current, made = record.previous, record.current, (entry.version, entry.created_ms)
        # The same promotion again, in another file or not, leaves the one before it where it is.
        if current is not None and made != (current.version, current.created_ms) and not halted(current.version):
            before = current
        newest = max(made, record.newest or made)
        after = record.model_copy(update={"current": entry, "previous": before, "newest": newest})
        try:
            self._publish(f"{entry.sha256}.bundle", data)
            self._publish(RECORD, after.model_dump_json().encode())
        except BundleError:
            self._clean(record)
            raise
        self._clean(after)

    def _clean(self, record: Record) -> None:
        """Removes what the record does not name; what a process that died had begun, too."""
        named = {f"{entry.sha256}.bundle" for entry in (record.current, record.previous) if entry}
        with suppress(OSError):
            for file in self.folder.iterdir():
                if file.name.startswith(_DRAFT) or (file.suffix == ".bundle" and file.name not in named):
                    file.unlink()

    def _publish(self, name: str, data: bytes) -> None:
        """A file whole and on disk under its name, or not at all."""
        draft = None
        try:
            descriptor, draft = tempfile.mkstemp(dir=self.folder, prefix=_DRAFT)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(descriptor)
            os.replace(draft, self.folder / name)
            sync_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                os.unlink(draft or "")
            raise BundleError(f"the bundle cannot be written, what was installed goes on: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk, as `os.fsync` does a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
