import hashlib
import io
import json
import struct
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid import Categorical, Clear, Noised, Numeric
from hybrid.bundle import (
    MAX_BYTES,
    Alone,
    Manifest,
    head_size,
    read_bundle,
    read_head,
    signing_key,
    trusted_key,
    write_bundle,
)
from hybrid.errors import BundleError, ConfigError, PlanError
from hybrid.features import Features
from hybrid.plan import Halt, open_signed, sign
from hybrid.sealing import generate

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PROGRAMS = {"embed.pte": b"program one " * 20, "predict.pte": b"program two " * 20}
MANIFEST = Manifest(
    model="coupon",
    version=3,
    definition_hash="ab" * 32,
    features=Features.of({"age": Categorical(vocabulary=("21", "26")), "hours": Numeric(mean=2, std=3)}),
    request={"time": "text"},
    server_embedding=4,
    device_embedding=8,
    merge="server",
    release=Clear(reason="a test of bundles"),
    programs={},
)


def written(folder: Path, manifest: Manifest = MANIFEST, programs: dict[str, bytes] = PROGRAMS) -> bytes:
    write_bundle(folder / "coupon-3.bundle", manifest, programs, KEY)
    return (folder / "coupon-3.bundle").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("bundle"))


def rezipped(data: bytes, change: dict[str, bytes]) -> bytes:
    """The same archive with some files' contents replaced."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change.get(name, old.read(name)))
    return target.getvalue()


def test_a_bundle_comes_back_as_it_was_written(data: bytes):
    """Manifest, tables and programs survive, and the manifest lists each program's size and SHA-256."""
    bundle = read_bundle(data, KEY.public_key())
    assert bundle.programs == PROGRAMS
    assert bundle.manifest.features == MANIFEST.features
    assert bundle.manifest.request == {"time": "text"}
    assert bundle.manifest.programs["embed.pte"].bytes == 240
    assert bundle.manifest.programs["embed.pte"].sha256 == hashlib.sha256(b"program one " * 20).hexdigest()


@pytest.mark.parametrize("release", [Clear(reason="a test of bundles"), Noised(clip=2.0, sigma=1.5)])
def test_a_device_learns_how_its_embedding_is_released(release: Clear | Noised, tmp_path: Path):
    """Both kinds of release come back as the class that declares them."""
    manifest = MANIFEST.model_copy(update={"release": release})
    assert read_bundle(written(tmp_path, manifest), KEY.public_key()).manifest.release == release


def test_what_a_device_answers_alone_comes_back(data: bytes, tmp_path: Path):
    """Where the device merges; elsewhere there is none."""
    alone = Alone(unavailable="device-only", missing_server=(0.5, 1.0, -1.0, 0.25), constant=0.125)
    manifest = MANIFEST.model_copy(update={"merge": "device", "release": None, "alone": alone})
    assert read_bundle(written(tmp_path, manifest), KEY.public_key()).manifest.alone == alone
    assert read_bundle(data, KEY.public_key()).manifest.alone is None


@pytest.mark.parametrize(
    ("alone", "merge", "must"),
    [
        ({"unavailable": "device-only"}, "device", "missing_server must be an embedding where 'device-only'"),
        ({"stale_features": "constant"}, "device", "constant must be a probability where 'constant'"),
        ({"missing_server": (1.0,)}, "device", "alone.missing_server must have 4 numbers or none"),
        ({}, "server", "alone must be left out where merge='server'"),
    ],
)
def test_what_a_device_cannot_answer_alone_is_refused(alone: dict, merge: str, must: str):
    """A manifest that declares it is none."""
    fields = MANIFEST.model_dump() | {"merge": merge, "alone": alone}
    with pytest.raises(ValidationError, match=must):
        Manifest.model_validate(fields)


def test_equal_contents_are_equal_bytes(data: bytes, tmp_path: Path):
    """No clock and no randomness enters a bundle, so anyone can compare two by their hash."""
    assert written(tmp_path) == data


def test_a_bundle_signed_by_another_key_is_refused(data: bytes):
    """A device trusts one key, whatever else verifies."""
    with pytest.raises(BundleError, match="not signed by the key this device trusts"):
        read_bundle(data, Ed25519PrivateKey.generate().public_key())


def test_a_changed_manifest_is_refused(data: bytes):
    """Raising the version inside a signed bundle breaks the signature."""
    text = zipfile.ZipFile(io.BytesIO(data)).read("manifest.json")
    changed = rezipped(data, {"manifest.json": text.replace(b'"version":3', b'"version":4')})
    with pytest.raises(BundleError, match="not signed"):
        read_bundle(changed, KEY.public_key())


def test_a_swapped_program_is_refused(data: bytes):
    """The manifest's signature covers each program by its hash, under its own name."""
    swapped = rezipped(data, {"embed.pte": PROGRAMS["predict.pte"], "predict.pte": PROGRAMS["embed.pte"]})
    with pytest.raises(BundleError, match=r"program 'embed\.pte' is not the one that was signed"):
        read_bundle(swapped, KEY.public_key())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.75, 0.99])
def test_a_truncated_bundle_is_refused(data: bytes, share: float):
    """Wherever a download stops, what came is no bundle."""
    with pytest.raises(BundleError):
        read_bundle(data[: int(share * len(data))], KEY.public_key())


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_what_a_device_runs(data: bytes, place: float, bit: int):
    """A flip is refused as a BundleError, or lies in the zip's own unused fields and changes nothing."""
    flipped = bytearray(data)
    flipped[int(place * len(data))] ^= 1 << bit
    try:
        bundle = read_bundle(bytes(flipped), KEY.public_key())
    except BundleError:
        return
    assert bundle == read_bundle(data, KEY.public_key())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes):
    """Whatever bytes a network gives, the answer is a BundleError."""
    with pytest.raises(BundleError):
        read_bundle(garbage, KEY.public_key())


def test_a_bundle_that_is_too_large_is_refused():
    """One byte over the limit is refused unread."""
    with pytest.raises(BundleError, match="at most 33554432 bytes"):
        read_bundle(b"0" * (MAX_BYTES + 1), KEY.public_key())


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_nothing_is_unpacked_before_the_signature_is_checked(compression: int):
    """A small archive that would unpack to gigabytes is refused, even where it says that it has 10 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("manifest.json", bytes(1 << 20))
        archive.writestr("manifest.sig", bytes(64))
    bomb = buffer.getvalue()
    for said in (bomb, bomb.replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little"))):
        with pytest.raises(BundleError, match="stored without compression"):
            read_bundle(said, KEY.public_key())


@pytest.mark.parametrize("tail", [b"0", b"PK\x05\x06" + bytes(18), bytes(1 << 16)])
def test_more_than_the_head_promises_is_refused(data: bytes, tail: bytes):
    """Behind the end, where a zip may have a second directory, and in front of the beginning."""
    for padded, why in ((data + tail, "must have"), (tail + data, "must hold manifest")):
        with pytest.raises(BundleError, match=why):
            read_bundle(padded, KEY.public_key())


def directory(entries: int, place: int) -> bytes:
    """A zip that is a directory alone, of files without a byte; `place` of each in the zip64 form."""
    extra = struct.pack("<HHQ", 1, 8, place)
    found = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 33, 0, 0, 0, 4, len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
        + number.to_bytes(4)
        + extra
        for number in range(entries)
    )
    return found + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, len(found), 0, 0)


@pytest.mark.parametrize("place", [0, 2**63, 2**64 - 1])
def test_a_zips_directory_is_not_believed(place: int):
    """One that sends its reader to where no file has bytes, or lists 60,000 files, is refused as any other damage."""
    for entries in (1, 60_000):
        with pytest.raises(BundleError, match="must hold manifest"):
            read_bundle(directory(entries, place), KEY.public_key())


def signed(data: bytes, change: Callable[[dict], object]) -> bytes:
    """The bundle with another manifest, rightly signed."""
    manifest = json.loads(zipfile.ZipFile(io.BytesIO(data)).read("manifest.json"))
    change(manifest)
    text = json.dumps(manifest).encode()
    return rezipped(data, {"manifest.json": text, "manifest.sig": KEY.sign(text)})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 3, "later": 1}, "is of format 3, this app reads 2: the app must be updated"),
        ({"minimum_runtime": 8, "later": 1}, "needs device runtime 8, this app has 7: the app must be updated"),
        ({"format": 1}, "is of format 1, this app reads 2: its version must be promoted again"),
        ({"later": 1}, "of another format: 1 fields differ"),
        ({"format": "2"}, "of another format: 1 fields differ"),
        ({"minimum_runtime": None}, "of another format: 1 fields differ"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused_though_signed(data: bytes, change: dict, why: str):
    """A newer control plane's is not half understood: the sentence says whether the app must be updated."""
    with pytest.raises(BundleError, match=why):
        read_bundle(signed(data, lambda manifest: manifest.update(change)), KEY.public_key(), runtime=7)


def test_what_is_not_signed_is_not_read_though_it_says_to_be_newer(data: bytes):
    """Nobody else can make a device ask for an update of its app."""
    text = zipfile.ZipFile(io.BytesIO(data)).read("manifest.json").replace(b'"format":2', b'"format":3')
    with pytest.raises(BundleError, match="not signed"):
        read_bundle(rezipped(data, {"manifest.json": text}), KEY.public_key())


def test_a_bundle_for_this_runtime_is_read(data: bytes):
    """The runtime that it needs at least, and whatever it needs where nothing will run it."""
    newer = signed(data, lambda manifest: manifest.update(minimum_runtime=7))
    assert read_bundle(newer, KEY.public_key(), runtime=7).manifest.minimum_runtime == 7
    assert read_bundle(newer, KEY.public_key()).manifest.minimum_runtime == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"server_embedding": 1 << 40},
        {"device_embedding": -1},
        {"version": 1 << 63},
        {"version": 0},
        {"model": "../coupon"},
        {"keeping": {"seconds": 1e300}},
        {"keeping": {"label_window_s": 1e300}},
        {"train": {"rows": 1 << 40, "server": 4, "missing": False, "parameters": []}},
        {"train": {"rows": 4, "server": 4, "missing": False, "parameters": [{"name": "w", "shape": [1 << 40]}]}},
    ],
)
def test_a_size_that_no_device_can_hold_is_refused_though_signed(data: bytes, fields: dict):
    """Before anything is made of that size, and before a store is opened with it."""
    with pytest.raises(BundleError, match="of another format: 1 fields differ"):
        read_bundle(signed(data, lambda manifest: manifest.update(fields)), KEY.public_key())


@pytest.mark.parametrize("text", [b"[]", b"2", b"null", b"{}", b"{", b"\xff", b"", b"[" * 100_000])
def test_a_signed_manifest_that_is_none_is_refused(data: bytes, text: bytes):
    """Whatever stands there, of the whole and of the head the answer is a BundleError."""
    other = rezipped(data, {"manifest.json": text, "manifest.sig": KEY.sign(text)})
    for read in (read_bundle, read_head):
        with pytest.raises(BundleError):
            read(other, KEY.public_key())


@pytest.mark.parametrize("name", ["../embed.pte", "/etc/passwd", "embed", "Embed.pte", "a/b.pte", "é.pte", ""])
def test_a_program_cannot_be_called_like_a_place_elsewhere(name: str):
    """Names become files' names on some devices."""
    with pytest.raises(ValidationError, match="String should match pattern"):
        Manifest.model_validate(MANIFEST.model_dump() | {"programs": {name: {"sha256": "0" * 64, "bytes": 1}}})


def test_the_head_tells_where_each_program_lies(data: bytes):
    """Its bytes alone verify, and say of each program in the file which bytes are its own, and how long the file is."""
    size = head_size(data[:100])
    head = read_head(data[:size], KEY.public_key())
    assert {name: data[r.start : r.stop] for name, r in head.ranges().items()} == PROGRAMS
    assert head.size == len(data)
    assert head.manifest == read_bundle(data, KEY.public_key()).manifest


def test_the_head_and_the_programs_are_the_file_again(data: bytes):
    """Bit by bit, so that its entity tag is known without asking."""
    assert read_head(data, KEY.public_key()).join(PROGRAMS) == data


def test_the_head_of_a_bundle_without_programs_is_nearly_all_of_it(tmp_path: Path):
    """What follows is the zip's directory."""
    data = written(tmp_path, programs={})
    head = read_head(data[: head_size(data)], KEY.public_key())
    assert (head.ranges(), head.size, head.join({})) == ({}, len(data), data)


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_head_is_refused_or_changes_nothing(data: bytes, place: float, bit: int):
    """Of the head as of the whole: a BundleError, or the same manifest."""
    flipped = bytearray(data[: head_size(data)])
    flipped[int(place * len(flipped))] ^= 1 << bit
    try:
        head = read_head(bytes(flipped), KEY.public_key())
    except BundleError:
        return
    assert head == read_head(data, KEY.public_key())


@settings(max_examples=100, deadline=None)
@given(garbage=st.binary(max_size=300), cut=st.integers(0, 1200))
def test_no_head_is_refused(data: bytes, garbage: bytes, cut: int):
    """Garbage, and a head that ends early, whatever its lengths say."""
    for given_ in (garbage, data[: min(cut, head_size(data) - 1)]):
        with pytest.raises(BundleError):
            read_head(given_, KEY.public_key())


def test_a_head_is_not_larger_than_a_manifest_may_be(data: bytes):
    """A peer that says 4 GiB is not waited for."""
    said = bytearray(data[:100])
    said[18:26] = b"\xff\xff\xff\xff" * 2  # compressed and plain size, APPNOTE 4.3.7
    with pytest.raises(BundleError, match="at most 4194304 bytes, got 4294967295"):
        head_size(bytes(said))


def test_the_signing_key_is_made_once_and_its_public_half_verifies(tmp_path: Path):
    """A second call reads the first one's key; devices are given the file beside it."""
    first, again = signing_key(tmp_path / "keys"), signing_key(tmp_path / "keys")
    assert first.private_bytes_raw() == again.private_bytes_raw()
    trusted = trusted_key(tmp_path / "keys" / "bundle-signing.pub")
    trusted.verify(first.sign(b"text"), b"text")


def test_a_lost_public_half_is_written_again(tmp_path: Path):
    """As where a crash came between the two files: the next use mends it, and the key stays."""
    key = signing_key(tmp_path)
    (tmp_path / "bundle-signing.pub").unlink()
    assert signing_key(tmp_path).private_bytes_raw() == key.private_bytes_raw()
    trusted_key(tmp_path / "bundle-signing.pub").verify(key.sign(b"text"), b"text")


def test_first_uses_at_the_same_time_agree_on_one_key(tmp_path: Path):
    """Eight threads, one key, and no other file than its two halves."""
    together = threading.Barrier(8)

    def use(_: int) -> bytes:
        together.wait(10)
        return signing_key(tmp_path).private_bytes_raw()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(use, range(8)))) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bundle-signing.pem", "bundle-signing.pub"]


def test_only_the_owner_may_read_the_signing_key(tmp_path: Path):
    """It is made with mode 0600, and refused once the group can read it."""
    signing_key(tmp_path)
    file = tmp_path / "bundle-signing.pem"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="readable by its owner only"):
        signing_key(tmp_path)


def test_a_trusted_key_that_is_none_is_refused(tmp_path: Path):
    """No file, garbage and a private key each give one sentence."""
    signing_key(tmp_path)
    (tmp_path / "garbage.pub").write_bytes(b"garbage")
    for name in ("absent.pub", "garbage.pub", "bundle-signing.pem"):
        with pytest.raises(ConfigError, match=name):
            trusted_key(tmp_path / name)


def test_while_a_key_is_replaced_bundles_plans_and_halts_of_either_are_taken(data: bytes, tmp_path: Path):
    """Of a file with the old key and the new one: what either signed is read, what a third did is not."""
    new, stranger = signing_key(tmp_path / "new"), Ed25519PrivateKey.generate()
    pem, spki = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    both = KEY.public_key().public_bytes(pem, spki) + (tmp_path / "new" / "bundle-signing.pub").read_bytes()
    (tmp_path / "trusted.pem").write_bytes(both)
    trusted, halt = trusted_key(tmp_path / "trusted.pem"), Halt(model="coupon", versions=(3,), reason="a test")
    manifest = MANIFEST.model_copy(update={"version": 4})
    for key in (new, stranger):
        write_bundle(tmp_path / f"{key is new}.bundle", manifest, PROGRAMS, key)
    assert read_bundle(data, trusted).manifest.version == 3
    assert read_bundle((tmp_path / "True.bundle").read_bytes(), trusted).manifest.version == 4
    assert [open_signed(sign(halt, key), trusted)[0] for key in (KEY, new)] == [halt, halt]
    with pytest.raises(BundleError, match="not signed by the key this device trusts"):
        read_bundle((tmp_path / "False.bundle").read_bytes(), trusted)
    with pytest.raises(PlanError, match="not signed by the key this device trusts"):
        open_signed(sign(halt, stranger), trusted)


def test_of_several_trusted_keys_all_must_be_of_the_kind(tmp_path: Path):
    """One of X25519 beside ours would be a mistake: none is dropped in silence."""
    signing_key(tmp_path)
    generate(tmp_path / "sealing.pem", tmp_path / "sealing.pub")
    both = [(tmp_path / name).read_bytes() for name in ("bundle-signing.pub", "sealing.pub")]
    (tmp_path / "both.pem").write_bytes(b"".join(both))
    with pytest.raises(ConfigError, match=r"'both\.pem' must be Ed25519"):
        trusted_key(tmp_path / "both.pem")
