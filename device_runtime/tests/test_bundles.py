import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_runtime import RUNTIME
from device_runtime.bundles import Installed
from hybrid.bundle import MAX_BYTES, Bundle, read_bundle, write_bundle
from hybrid.errors import BundleError, ConfigError

NOW = 1_000_000
Sign = Callable[..., bytes]


@pytest.fixture
def sign(bundle: Bundle, key: Ed25519PrivateKey, tmp_path: Path) -> Sign:
    """(version, with, another key, programs, and manifest's fields) -> a bundle's file, made at `version` ms."""

    def signed(version: int, *, by: Ed25519PrivateKey = key, programs: dict | None = None, **fields: object) -> bytes:
        manifest = bundle.manifest.model_copy(update={"version": version, "created_ms": version} | fields)
        write_bundle(tmp_path / "signed.bundle", manifest, programs or bundle.programs, by)
        return (tmp_path / "signed.bundle").read_bytes()

    return signed


@pytest.fixture
def installed(tmp_path: Path, key: Ed25519PrivateKey) -> Installed:
    """Nothing yet. Programs are tried in ONNX Runtime: `test_program.py` tries both engines."""
    return Installed(tmp_path / "device", "meals", key.public_key(), engine="onnx")


def names(installed: Installed) -> list[str]:
    return sorted(file.name for file in installed.folder.iterdir())


def test_what_was_installed_is_what_runs(installed: Installed, sign: Sign, key: Ed25519PrivateKey):
    """Nothing before; afterwards the bundle that was signed, for this process and for the next."""
    with pytest.raises(BundleError, match="no bundle of 'meals' is installed"):
        installed.open()
    data = sign(3)
    assert installed.install(data, now_ms=NOW) == read_bundle(data, key.public_key())
    assert installed.open() == read_bundle(data, key.public_key())
    assert Installed(installed.folder, "meals", key.public_key()).open().manifest.version == 3


def test_two_bundles_are_kept_and_nothing_else(installed: Installed, sign: Sign):
    """The current one and the one before it, under the hash of their bytes, and the record; for their owner alone."""
    for version in (1, 2, 3):
        installed.install(sign(version), now_ms=NOW)
    record = installed.record()
    assert (record.current.version, record.previous.version, record.newest) == (3, 2, (3, 3))
    assert names(installed) == sorted([f"{e.sha256}.bundle" for e in (record.current, record.previous)] + [RECORD])
    assert installed.folder.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in installed.folder.iterdir())


RECORD = "installed.json"
REFUSALS: dict[str, tuple[Callable[[Sign, Bundle], bytes], str]] = {
    "another key": (lambda sign, _: sign(6, by=Ed25519PrivateKey.generate()), "not signed by the key this device"),
    "truncated": (lambda sign, _: sign(6)[:-1], "damaged or truncated"),
    "too large": (lambda sign, _: sign(6) + bytes(MAX_BYTES), "at most 33554432 bytes"),
    "expired": (lambda sign, _: sign(6, expires_ms=NOW - 1), "version 6 expired at 999999 ms"),
    "downgraded": (lambda sign, _: sign(4, created_ms=NOW), "version 4 of 1000000 ms is older than version 5 of 5 ms"),
    "an older promotion": (lambda sign, _: sign(5, created_ms=4), "version 5 of 4 ms is older than version 5 of 5"),
    "another model": (lambda sign, _: sign(6, model="drinks"), "is of model 'drinks', this device wants 'meals'"),
    "newer runtime": (
        lambda sign, _: sign(6, minimum_runtime=RUNTIME + 1),
        f"needs device runtime {RUNTIME + 1}, this app has {RUNTIME}: the app",
    ),
    "halted": (lambda sign, _: sign(13), "version 13 was halted"),
    "unknown operator": (
        lambda sign, bundle: sign(
            6, programs=bundle.programs | {"predict.onnx": bundle.programs["predict.onnx"].replace(b"Tanh", b"Tanz")}
        ),
        "'predict.onnx' does not load in onnx: .*Tanz",
    ),
    "no program": (lambda sign, _: sign(6, programs={"embed.pte": b"1"}), r"must hold a program 'embed\.onnx'"),
    "empty": (lambda sign, _: b"", "damaged or truncated"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_refused_leaves_the_old_one_going_on(installed: Installed, sign: Sign, bundle: Bundle, what: str):
    """The reason is a sentence, and not a byte in the folder is another one."""
    make, why = REFUSALS[what]
    installed.install(sign(5), now_ms=NOW)
    before = {name: (installed.folder / name).read_bytes() for name in names(installed)}
    with pytest.raises(BundleError, match=why):
        installed.install(make(sign, bundle), now_ms=NOW, halted=lambda version: version == 13)
    assert {name: (installed.folder / name).read_bytes() for name in names(installed)} == before
    assert installed.open().manifest.version == 5


def test_a_bundle_is_installed_up_to_the_moment_it_expires_and_runs_on(installed: Installed, sign: Sign):
    """What expires is the permission to install it."""
    installed.install(sign(1, expires_ms=NOW), now_ms=NOW)
    assert installed.open().manifest.expires_ms == NOW
    with pytest.raises(BundleError, match="expired"):
        installed.check(installed.open().manifest, now_ms=NOW + 1)


def test_a_version_that_was_promoted_again_is_newer(installed: Installed, sign: Sign):
    """Of one version the later promotion; the same bytes may come again, and mend a damaged file."""
    installed.install(sign(5), now_ms=NOW)
    later = sign(5, created_ms=9)
    installed.install(later, now_ms=NOW)
    file = installed.folder / f"{installed.record().current.sha256}.bundle"
    file.write_bytes(b"damaged")
    installed.install(later, now_ms=NOW)
    assert (installed.record().current.created_ms, installed.record().previous.created_ms) == (9, 5)
    assert file.read_bytes() == later


def test_the_same_promotion_in_another_file_does_not_push_out_the_one_before(installed: Installed, sign: Sign):
    """What a zip says of times is not signed: whoever serves it could else leave a device nothing to go back to."""
    for version in (4, 5):
        installed.install(sign(version), now_ms=NOW)
    data = bytearray(sign(5))
    data[data.rindex(b"PK\x01\x02") + 12] ^= 1  # the last file's time in the directory, APPNOTE 4.3.12
    installed.install(bytes(data), now_ms=NOW)
    assert (installed.record().current.version, installed.record().previous.version) == (5, 4)
    assert installed.open(halted=lambda version: version == 5).manifest.version == 4


def test_a_file_that_is_not_the_one_that_was_installed_does_not_run(installed: Installed, sign: Sign):
    """Rightly signed as it is: under the name of another it would pass for that version where one was halted."""
    for version in (4, 5):
        installed.install(sign(version), now_ms=NOW)
    current = installed.record().current.sha256
    (installed.folder / f"{current}.bundle").write_bytes(sign(3))
    assert installed.open().manifest.version == 4
    with pytest.raises(BundleError, match="version 5: its file is not the one that was installed"):
        installed.open(halted=lambda version: version == 4)


def test_a_folder_that_others_may_write_is_refused(installed: Installed, sign: Sign):
    """They could put an old bundle and its record there, rightly signed once."""
    installed.install(sign(5), now_ms=NOW)
    for mode in (0o770, 0o707):
        installed.folder.chmod(mode)
        for use in (installed.open, lambda: installed.install(sign(6), now_ms=NOW), installed.tag):
            with pytest.raises(ConfigError, match=r"must be writable by its owner only \(chmod 700\)"):
                use()


def test_deleting_the_bundles_does_not_let_an_old_one_in(installed: Installed, sign: Sign):
    """The newest that ever was is in the record, which a person who clears the app's downloads keeps."""
    installed.install(sign(5), now_ms=NOW)
    for file in installed.folder.glob("*.bundle"):
        file.unlink()
    with pytest.raises(BundleError, match="version 5: its file cannot be read: No such file"):
        installed.open()
    with pytest.raises(BundleError, match="older than version 5"):
        installed.install(sign(4), now_ms=NOW)
    installed.install(sign(5), now_ms=NOW)
    assert installed.open().manifest.version == 5


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"model":"meals"', b"\xff", b'{"model":"drinks"}'])
def test_a_damaged_record_is_not_taken_for_an_empty_one(installed: Installed, sign: Sign, damage: bytes):
    """That would let old bundles in: the folder is refused until its host decides."""
    installed.install(sign(5), now_ms=NOW)
    (installed.folder / RECORD).write_bytes(damage)
    for use in (installed.open, lambda: installed.install(sign(6), now_ms=NOW), installed.rollback):
        with pytest.raises(ConfigError, match=r"installed\.json|holds bundles of 'drinks'"):
            use()


def test_where_the_current_bundle_is_damaged_or_halted_the_one_before_runs(installed: Installed, sign: Sign):
    """And where both are, the reasons of both are told."""
    installed.install(sign(1), now_ms=NOW)
    installed.install(sign(2), now_ms=NOW)
    assert installed.open(halted=lambda version: version == 2).manifest.version == 1
    file = installed.folder / f"{installed.record().current.sha256}.bundle"
    file.write_bytes(file.read_bytes()[:-1])
    assert installed.open().manifest.version == 1
    with pytest.raises(
        BundleError, match=r"version 2: its file is not the one that was installed; version 1 was halted"
    ):
        installed.open(halted=lambda version: version == 1)


def test_a_halted_bundle_is_not_what_to_fall_back_on(installed: Installed, sign: Sign):
    """Versions 1 and 2, 2 is halted, 3 comes: before 3 there is 1."""
    installed.install(sign(1), now_ms=NOW)
    installed.install(sign(2), now_ms=NOW)
    installed.install(sign(3), now_ms=NOW, halted=lambda version: version == 2)
    assert installed.record().previous.version == 1


def test_a_device_goes_back_once_and_not_forth(installed: Installed, sign: Sign):
    """To the one before; what it left is not installed again, and the newest stays the newest. A later one is taken."""
    installed.install(sign(1), now_ms=NOW)
    with pytest.raises(BundleError, match="before the current one"):
        installed.rollback()
    installed.install(sign(2), now_ms=NOW)
    with pytest.raises(BundleError, match="before the current one"):
        installed.rollback(halted=lambda version: version == 1)
    assert installed.rollback().manifest.version == 1
    assert installed.open().manifest.version == 1
    with pytest.raises(BundleError, match="version 2 was rolled back from on this device"):
        installed.install(sign(2), now_ms=NOW)
    installed.install(sign(3), now_ms=NOW)
    assert installed.open().manifest.version == 3
    assert installed.record().newest == (3, 3)


def test_what_is_here_already_is_known_by_its_hash(installed: Installed, sign: Sign, bundle: Bundle):
    """Programs of both bundles; nothing of one whose file is damaged."""
    assert installed.programs() == {}
    installed.install(sign(1), now_ms=NOW)
    assert set(installed.programs().values()) == set(bundle.programs.values())
    for file in installed.folder.glob("*.bundle"):
        file.write_bytes(b"damaged")
    assert installed.programs() == {}


def test_two_processes_do_not_change_it_at_once(installed: Installed, sign: Sign):
    """The second is told so, and its turn comes when the first is done, however that ends."""
    data = sign(1)
    other = Installed(installed.folder, "meals", installed.trusted, engine="onnx")
    with suppress(ZeroDivisionError), installed.alone():
        with pytest.raises(ConfigError, match="another process is updating"):
            other.install(data, now_ms=NOW)
        raise ZeroDivisionError
    other.install(data, now_ms=NOW)


def test_a_folder_that_is_none_is_said_to_be(installed: Installed, sign: Sign):
    """A file in its place: a sentence, not a traceback."""
    installed.folder.write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used"):
        installed.install(sign(1), now_ms=NOW)


def test_bytes_are_on_disk_before_their_name_is(installed: Installed, sign: Sign, monkeypatch: pytest.MonkeyPatch):
    """For the bundle, then for the record: its bytes, its name, the folder; so a power cut finds no empty file."""
    data, done = sign(1), []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])
        fsync(descriptor)

    def named(draft: str, target: Path) -> None:
        done.append(target.suffix)
        replace(draft, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    installed.install(data, now_ms=NOW)
    assert done == [".draft", ".bundle", "device", ".draft", ".json", "device"]


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import onnxruntime
from device_runtime import bundles
from hybrid.bundle import trusted_key

before, trust, new = map(Path, sys.argv[1:4])
key, data = trusted_key(trust), new.read_bytes()
folder = before.with_name("killed")


def install_until(line):
    left = line

    def lines(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != bundles.__file__:
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return lines

    installed = bundles.Installed(folder, "meals", key, engine="onnx")
    sys.settrace(lines)
    installed.install(data, now_ms=1)


found = []
for line in range(1, 10_000):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(before, folder)
    if (child := os.fork()) == 0:
        install_until(line)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    installed = bundles.Installed(folder, "meals", key, engine="onnx")
    found.append(installed.open().manifest.version)
    assert installed.install(data, now_ms=1).manifest.version == 2
    assert len(list(folder.iterdir())) == 3
    if status == 0:
        break
print(json.dumps(found))
"""


def test_a_kill_at_any_line_leaves_the_old_one_or_the_new_one_whole(
    installed: Installed, sign: Sign, key: Ed25519PrivateKey, tmp_path: Path
):
    """`kill -9` before each line that installing runs, one process for each: first 1, from some line on 2, never none.

    After each, the next attempt succeeds and leaves two bundles and the record alone.
    """
    from device_runtime.tests.test_program import public

    installed.install(sign(1), now_ms=NOW)
    (tmp_path / "new.bundle").write_bytes(sign(2))
    command = [sys.executable, "-c", KILLED, installed.folder, public(key, tmp_path), tmp_path / "new.bundle"]
    found = json.loads(subprocess.check_output(command, text=True, timeout=300))
    assert len(found) > 50
    assert set(found) == {1, 2}
    assert found == sorted(found)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system is mounted by root alone; the next test limits the size of files instead")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_one_going_on(small_disk: Path, sign: Sign, key: Ed25519PrivateKey):
    """Filled to each byte count that lets more of an installation through, down to the record alone."""
    installed = Installed(small_disk / "device", "meals", key.public_key(), engine="onnx")
    installed.install(sign(1), now_ms=NOW)
    before, new = names(installed), sign(2)
    refusals: list[str] = []
    filler = small_disk / "filler"
    for free in range(0, len(new) + 3 * 4096, 4096):
        stat = os.statvfs(small_disk)
        filler.write_bytes(bytes(stat.f_bavail * stat.f_frsize - free))
        try:
            installed.install(new, now_ms=NOW)
            break
        except BundleError as error:
            refusals.append(str(error))
        finally:
            filler.unlink()
        assert (installed.open().manifest.version, names(installed)) == (1, before)
    assert len(refusals) > 5
    assert all("No space left on device" in refusal for refusal in refusals)
    assert installed.open().manifest.version == 2


def test_a_write_that_ends_early_leaves_the_old_one_going_on(installed: Installed, sign: Sign):
    """The system refuses bytes in the middle of a file, as of a full disk; once it does not, all is well."""
    installed.install(sign(1), now_ms=NOW)
    before, new = names(installed), sign(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(new) // 2, hard))
    try:
        with pytest.raises(BundleError, match="cannot be written, what was installed goes on: File too large"):
            installed.install(new, now_ms=NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (installed.open().manifest.version, names(installed)) == (1, before)
    assert installed.install(new, now_ms=NOW).manifest.version == 2
