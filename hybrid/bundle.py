"""The device bundle: what ships to devices for one version, signed by the control plane.

One zip file: `manifest.json`, `manifest.sig` (Ed25519, RFC 8032, over the
manifest's bytes) and the programs in the manifest's order, whose SHA-256 it holds. A
device trusts the public key of its host app, never one that comes with a bundle.

Nothing in the file is compressed, so its head, manifest and signature, tells where each program lies: a device that
has some of them already fetches the ranges of the others (`read_head`, `Head.ranges`) and puts the same file together
(`Head.join`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from hybrid.errors import BundleError, ConfigError
from hybrid.features import Features
from hybrid.files import check_private
from hybrid.plan import MAX_PARAMETERS, Count, Name
from hybrid.protocol import CONSTANT, DEVICE_ONLY
from hybrid.spec import Clear, Noised
from hybrid.trust import Trusted, TrustedKeys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = 2
MAX_BYTES = 32 << 20
MAX_MANIFEST = 4 << 20  # tables of text included
SIGNATURE = 64
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip's own zero: equal contents are equal bytes
_ENTRY = struct.Struct("<4s5H3L2H")  # a local file header of a zip, APPNOTE 4.3.7
_DIRECTORY_ENTRY, _DIRECTORY_END = 46, 22  # 4.3.12 and 4.3.16, without names

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----[A-Za-z0-9+/=\s]+-----END PUBLIC KEY-----")

Size = Annotated[int, Field(ge=0, le=1 << 16)]  # of an embedding, or rows of a call: what a device can hold
Seconds = Annotated[FiniteFloat, Field(gt=0, le=1e14)]  # `timedelta.max` is less, and fits a store as milliseconds
ProgramName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}\.[a-z]{1,8}$")]


class Program(BaseModel):
    """One program file of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)]


class Parameter(BaseModel):
    """One parameter of what a device trains: `shape`, its values in row-major order in the flat vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]


class TrainProgram(BaseModel):
    """How "train.pte" is fed, which computes a loss and its gradient.

    Its inputs, all float32: (p,) weights; (m, server) what the server side contributed; (m, features) inputs; (m,)
    labels; (m,) weight of each row in the loss, 0 for padding; and, where `missing`, (m, 2) which side is taken to be
    missing. Its outputs: the sum over rows of weight x cross-entropy, and (p,) its gradient. It holds no weights.

    Attributes:
        rows: m, of every call.
        server: columns of what the server side contributed: its embedding, or, where its tower is trained by
            devices too, its slots.
        missing: whether the embeddings that stand for a missing side are trained.
        parameters: in the order of the flat vector that travels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rows: Annotated[Size, Field(ge=1)]
    server: Size
    missing: bool
    parameters: tuple[Parameter, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.size > MAX_PARAMETERS:
            raise ValueError(f"parameters must be at most {MAX_PARAMETERS} numbers, got {self.size}")
        return self

    @property
    def size(self) -> int:
        """p, the length of the flat vector."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    @property
    def takes_slots(self) -> bool:
        """Whether devices train the server tower too, so that an example holds its slots in place of its embedding."""
        return any(parameter.name.startswith("server_tower.") for parameter in self.parameters)


class Keeping(BaseModel):
    """What a device keeps of a model, and what a plan may ask of it at most: `hybrid.spec.OnDevice` in plain units.

    Attributes:
        label_window_s: how long to wait for the label's event; None: the label is known at once.
        label_absent: the label of a request without an event in that time; None: such a request is no example.
        seconds, bytes: age and size of the store, beyond which the oldest examples are deleted.
        max_examples, max_seconds, max_memory_mb: of one round of training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    label_window_s: Seconds | None = None
    label_absent: Literal[0, 1] | None = None
    seconds: Seconds = 30 * 86400.0
    bytes: Annotated[int, Field(ge=1 << 16)] = 16 << 20
    max_examples: Annotated[int, Field(ge=1)] = 1024
    max_seconds: Annotated[FiniteFloat, Field(gt=0)] = 60.0
    max_memory_mb: Annotated[int, Field(ge=1)] = 512


class Alone(BaseModel):
    """What a device that merges answers by itself where it has no server's embedding, as the model declares.

    Attributes:
        unavailable: where no answer came that can be used: "error", "device-only" or "constant".
        stale_features: where an answer had expired: the same.
        missing_server: the embedding learned for a missing server side; empty where none was.
        constant: the probability of "constant", also where the gateway says "constant"; None: not declared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    unavailable: Literal["error", "device-only", "constant"] = "error"
    stale_features: Literal["error", "device-only", "constant"] = "error"
    missing_server: tuple[FiniteFloat, ...] = ()
    constant: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        declared = {self.unavailable, self.stale_features}
        if DEVICE_ONLY in declared and not self.missing_server:
            raise ValueError("missing_server must be an embedding where 'device-only' is declared")
        if CONSTANT in declared and self.constant is None:
            raise ValueError("constant must be a probability where 'constant' is declared")
        return self


class Manifest(BaseModel):
    """What a bundle is and promises.

    Attributes:
        format: of the bundle; a reader refuses another.
        model, version, definition_hash: the pair's device side.
        features: the device features; their tables turn raw values into inputs.
        request: request features by name, "text" or "number": sent as they are, with each request.
        server_embedding, device_embedding: sizes.
        merge, release: where the embeddings meet, and how the device's leaves.
        programs: by file name. "device.pte" with methods "embed": (1, features) -> (1, device_embedding), and
            "predict": (1, features), (1, server_embedding) -> (1,) probability; "embed.onnx" and "predict.onnx": the
            same for any number of rows; "train.pte": see `train`.
        alone: for merge="device", what the device answers by itself; None: nothing.
        train: how its training program is fed; None: it has none.
        keeping: of examples, and limits of plans.
        created_ms, expires_ms: Unix time in UTC; a device refuses a bundle that has expired, and goes on with the
            one it has; None: it never does.
        minimum_runtime: the oldest `device_runtime.RUNTIME` that can run it.

    Raises:
        ValueError: `alone` is of a model that merges on the server, or its embedding is of another size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    model: Name
    version: Count
    definition_hash: str
    features: Features
    request: dict[str, Literal["text", "number"]] = {}
    server_embedding: Size
    device_embedding: Size
    merge: Literal["server", "device"]
    release: Annotated[Clear | Noised, Field(discriminator="kind")] | None
    programs: dict[ProgramName, Program]
    alone: Alone | None = None
    train: TrainProgram | None = None
    keeping: Keeping = Keeping()
    created_ms: Annotated[int, Field(ge=0)] = 0
    expires_ms: Annotated[int, Field(ge=0)] | None = None
    minimum_runtime: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.alone is not None and self.merge == "server":
            raise ValueError("alone must be left out where merge='server'")
        if self.alone is not None and len(self.alone.missing_server) not in (0, self.server_embedding):
            raise ValueError(f"alone.missing_server must have {self.server_embedding} numbers or none")
        return self


@dataclass(frozen=True)
class Bundle:
    """A bundle whose signature and programs were verified."""

    manifest: Manifest
    programs: dict[str, bytes]


def write_bundle(target: Path, manifest: Manifest, programs: dict[str, bytes], key: Ed25519PrivateKey) -> Manifest:
    """Signs and writes a bundle in one step; the same contents give the same bytes.

    Args:
        target: the file; replaced atomically.
        manifest: its `programs` is filled from `programs`.
        programs: file name -> bytes.
        key: the control plane's.

    Returns:
        The manifest as written.
    """
    listed = {
        name: Program(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in programs.items()
    }
    manifest = manifest.model_copy(update={"programs": listed})
    text = manifest.model_dump_json().encode()
    data = Head(text, key.sign(text), manifest).join(programs)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".new")
    draft.write_bytes(data)
    draft.replace(target)
    return manifest


def read_bundle(data: bytes, trusted: Trusted, *, runtime: int | None = None) -> Bundle:
    """Verifies a bundle against the host app's key; nothing is read from it before that.

    Args:
        data: the file.
        trusted: the host app's key, or keys.
        runtime: `device_runtime.RUNTIME` of the device that is to run it; None: it is only looked at.

    Raises:
        BundleError: too large, truncated, wrongly signed, of another format, for a newer runtime, or with
            a program that is not the one the manifest signed.
    """
    if len(data) > MAX_BYTES:
        raise BundleError(f"a bundle has at most {MAX_BYTES} bytes, got {len(data)}")
    head = read_head(data, trusted, runtime=runtime)
    if len(data) != head.size:
        raise BundleError(f"the bundle is damaged or truncated (it must have {head.size} bytes, got {len(data)})")
    # The zip's directory is for other readers: what it says is not signed, and nothing here goes by it.
    programs = {name: data[span.start : span.stop] for name, span in head.ranges().items()}
    for name, program in head.manifest.programs.items():
        check_program(name, program, programs[name])
    return Bundle(head.manifest, programs)


def check_program(name: str, program: Program, data: bytes) -> None:
    """Refuses bytes that are not the program that the manifest signed.

    Raises:
        BundleError: they are not.
    """
    if len(data) != program.bytes or hashlib.sha256(data).hexdigest() != program.sha256:
        raise BundleError(f"program {name!r} is not the one that was signed")


@dataclass(frozen=True)
class Head:
    """The beginning of a bundle's file, verified by `read_head`: what the rest of it must be.

    Attributes:
        text: the manifest's bytes.
        signature: over them.
        manifest: as read from them.
    """

    text: bytes
    signature: bytes
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of the whole file, as `write_bundle` writes it."""
        names = ["manifest.json", "manifest.sig", *self.manifest.programs]
        directory = sum(_DIRECTORY_ENTRY + len(name) for name in names) + _DIRECTORY_END
        return max((r.stop for r in self.ranges().values()), default=_head_size(len(self.text))) + directory

    def ranges(self) -> dict[str, range]:
        """Where each program lies in the file, as `write_bundle` writes it; what lies there elsewhere is not signed."""
        place, found = _head_size(len(self.text)), {}
        for name, program in self.manifest.programs.items():
            place += _ENTRY.size + len(name)
            found[name] = range(place, place + program.bytes)
            place += program.bytes
        return found

    def join(self, programs: Mapping[str, bytes]) -> bytes:
        """The bundle's file with these programs, one for each name in the manifest: the same bytes for the same."""
        files = {"manifest.json": self.text, "manifest.sig": self.signature}
        files |= {name: programs[name] for name in self.manifest.programs}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        return buffer.getvalue()


def head_size(data: bytes) -> int:
    """How many bytes of a bundle's file `read_head` needs.

    Args:
        data: the file's beginning, some hundred bytes at least.

    Raises:
        BundleError: it is no bundle's, or its manifest is too large. Nothing is verified yet.
    """
    size = len(_first(data, 0, "manifest.json"))
    if size > MAX_MANIFEST:
        raise BundleError(f"a bundle's manifest has at most {MAX_MANIFEST} bytes, got {size}")
    return _head_size(size)


def read_head(data: bytes, trusted: Trusted, *, runtime: int | None = None) -> Head:
    """Verifies the beginning of a bundle's file, `head_size` bytes of it at least.

    Args:
        data: the beginning; what comes after is not looked at.
        trusted: the host app's key, or keys.
        runtime: see `read_bundle`.

    Raises:
        BundleError: as `read_bundle`, but for the programs, which it does not see.
    """
    text = _first(data, 0, "manifest.json")
    signature = _first(data, text.stop, "manifest.sig")
    if len(data) < signature.stop:
        raise BundleError("the bundle is damaged or truncated (its head is not whole)")
    parts = data[text.start : text.stop], data[signature.start : signature.stop]
    return Head(*parts, _verified(*parts, trusted, runtime))


def _head_size(manifest: int) -> int:
    return 2 * _ENTRY.size + len("manifest.json") + manifest + len("manifest.sig") + SIGNATURE


def _first(data: bytes, start: int, name: str) -> range:
    """Where the file whose header is at `start` lies, if it is the one that a bundle has there, stored plainly."""
    try:
        magic, _, flags, method, *_, packed, size, length, extra = _ENTRY.unpack_from(data, start)
    except struct.error:
        raise BundleError("the bundle is damaged or truncated (its head is not whole)") from None
    place = start + _ENTRY.size
    found = data[place : place + length]
    if (magic, flags, method, packed, extra, found) != (b"PK\x03\x04", 0, 0, size, 0, name.encode()):
        raise BundleError(f"the bundle's head must hold {name} first, stored without compression")
    return range(place + length, place + length + size)


def _verified(text: bytes, signature: bytes, trusted: Trusted, runtime: int | None) -> Manifest:
    """A manifest, once its signature was checked and it is known to be one that we can read."""
    from cryptography.exceptions import InvalidSignature

    try:
        trusted.verify(signature, text)
    except InvalidSignature:
        raise BundleError("the bundle is not signed by the key this device trusts") from None
    if len(text) > MAX_MANIFEST:
        raise BundleError(f"a bundle's manifest has at most {MAX_MANIFEST} bytes, got {len(text)}")
    _check_readable(text, runtime)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"the bundle's manifest is of another format: {error.error_count()} fields differ") from None


def _check_readable(text: bytes, runtime: int | None) -> None:
    """Before all fields are looked at: those of a newer format are unknown, and what to do is worth a sentence."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"the bundle's manifest is no JSON ({type(error).__name__})") from None
    found = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    written, needed = found.get("format"), found.get("minimum_runtime", 1)
    if isinstance(written, int) and written > FORMAT:
        raise BundleError(f"the bundle is of format {written}, this app reads {FORMAT}: the app must be updated")
    if isinstance(written, int) and written < FORMAT:
        raise BundleError(
            f"the bundle is of format {written}, this app reads {FORMAT}: its version must be promoted again"
        )
    if runtime is not None and isinstance(needed, int) and needed > runtime:
        raise BundleError(f"the bundle needs device runtime {needed}, this app has {runtime}: the app must be updated")


def signing_key(folder: Path) -> Ed25519PrivateKey:
    """The control plane's key in `folder`, made at first use with its public half beside it.

    Raises:
        ConfigError: the key file can be read by others, or holds no Ed25519 key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file, public_file = folder / "bundle-signing.pem", folder / "bundle-signing.pub"
    encoding = serialization.Encoding.PEM
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        no_password = serialization.NoEncryption()
        made = Ed25519PrivateKey.generate()
        _create(file, made.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password), 0o600)
    check_private(file.stat(), file.name)
    key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file.name} must hold an Ed25519 key")
    if not public_file.exists():
        public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
        _create(public_file, public, 0o644)
    return key


def _create(file: Path, data: bytes, mode: int) -> None:
    """Writes a file whole or not at all; one that another process made first stays."""
    descriptor, draft = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            os.fchmod(descriptor, mode)
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        Path(draft).unlink()


def trusted_key(file: Path) -> TrustedKeys:
    """What a host app gives its devices: a public key in PEM, or several, one after another.

    Raises:
        ConfigError: the file holds none, or one that is not Ed25519.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        keys = [load_pem_public_key(text) for text in _PEM.findall(file.read_bytes())]
    except (OSError, ValueError) as error:
        raise ConfigError(f"trusted key {str(file)!r} cannot be read: {type(error).__name__}") from None
    found = tuple(key for key in keys if isinstance(key, Ed25519PublicKey))
    if not found or len(found) < len(keys):
        raise ConfigError(f"trusted key {file.name!r} must be Ed25519, one or several in PEM")
    return TrustedKeys(found)
