"""Files that are there whole, or not at all; and those that are their owner's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hybrid.errors import ConfigError


def write_whole(file: Path, content: bytes | memoryview, *, private: bool = False) -> None:
    """Puts it in the file's place; on the disk, once this returns, and never in part.

    Args:
        file: whose folder is there.
        content: all of it.
        private: whether its owner alone may read it, from its first byte on.

    Raises:
        OSError: the disk does not take it; what was there before still is.
    """
    draft = file.with_name(f".{file.name}")
    draft.unlink(missing_ok=True)  # one that was there may be others', or be read by them
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_private(status: os.stat_result, name: str) -> None:
    """Raises: ConfigError: others can read the file.

    Another's file may be read by the group where that other is root: so Kubernetes gives a secret to a pod that is not.
    It is PostgreSQL's rule for `server.key` (its manual, "Secure TCP/IP Connections with SSL", basic setup).

    Args:
        status: of the file.
        name: for the error.
    """
    given = status.st_uid == 0 and os.geteuid() != 0
    others = 0o037 if given else 0o077
    if status.st_mode & others:
        raise ConfigError(f"{name} must be readable by its owner only (chmod 600)")


def take_from_group(path: Path) -> None:
    """Takes from our own group what it may do with a file or folder of ours; other groups, and others, keep it.

    A kubelet gives all of a volume to the group of the pod that mounts it (`fsGroup`), also what was its owner's alone.
    """
    status = path.stat()
    if (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid()) and status.st_mode & 0o070:
        path.chmod(stat.S_IMODE(status.st_mode) & ~0o070)


def read_private(file: Path, what: str, longest: int) -> str:
    """The text of a file that its owner alone may read, without white space around it; see `check_private`.

    Args:
        file: with the secret.
        what: what it is, for errors.
        longest: characters; of a longer text at least one more is returned.

    Raises:
        ConfigError: the file cannot be read, or others can read it.
    """
    try:
        with file.open("rb") as handle:
            check_private(os.fstat(handle.fileno()), f"the {what}'s file {file.name}")
            text = handle.read(longest + 2)
    except OSError as error:
        raise ConfigError(f"the {what}'s file {str(file)!r} cannot be read: {type(error).__name__}") from None
    return text.decode(errors="replace").strip()
