import os

import pytest

from hybrid.errors import ConfigError
from hybrid.files import check_private, take_from_group, write_whole


def test_what_is_private_is_read_by_its_owner_alone_whatever_was_there(tmp_path):
    """Modes of the file before it, and of a draft that was left, say nothing; what is not private has the usual."""
    file = tmp_path / "secret"
    for before in (file, tmp_path / ".secret"):
        before.write_bytes(b"old")
        before.chmod(0o666)
    write_whole(file, b"new", private=True)
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"new", 0o600)
    usual = tmp_path / "usual"
    usual.touch()
    write_whole(tmp_path / "shared", memoryview(b"all"))
    assert (tmp_path / "shared").stat().st_mode == usual.stat().st_mode


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path):
    """The draft's place is a folder: the file is as before."""
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / ".kept").mkdir()
    with pytest.raises(OSError, match="kept"):
        write_whole(tmp_path / "kept", b"new")
    assert (tmp_path / "kept").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("owner", "mode", "refused"),
    [(7, 0o600, False), (7, 0o640, True), (0, 0o440, False), (0, 0o640, False), (0, 0o660, True), (0, 0o444, True)],
)
def test_a_secret_is_its_owners_alone_or_a_mounted_one_its_groups(monkeypatch, owner, mode, refused):
    """User 7's own file, and one that root gives it by its group, as Kubernetes does: read, and never written."""
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    status = os.stat_result((0o100000 | mode, 0, 0, 1, owner, 7, 0, 0, 0, 0))
    if not refused:
        check_private(status, "token")
        return
    with pytest.raises(ConfigError, match="token must be readable by its owner only"):
        check_private(status, "token")


@pytest.mark.parametrize(
    ("mode", "group", "left"), [(0o2770, 0, 0o2700), (0o660, 0, 0o600), (0o664, 0, 0o604), (0o660, 1, 0o660)]
)
def test_what_our_group_may_do_is_taken_from_it_and_what_others_may_stays(tmp_path, monkeypatch, mode, group, left):
    """Of a file of ours whose group is ours; another group (here: ours plus 1) was given it by somebody."""
    file = tmp_path / "file"
    file.touch()
    file.chmod(mode)
    mine = file.stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: mine + group)
    take_from_group(file)
    assert file.stat().st_mode & 0o7777 == left
