"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
