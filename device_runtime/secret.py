"""Secrets of the host app on a machine without a keystore: each in a file that its owner alone may read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hybrid.errors import ConfigError
from hybrid.files import read_private

STORE_KEY_VARIABLE = "HYBRID_STORE_KEY"
_STORE_KEY = 64  # hex digits


def read_store_key(file: Path | None, environment: Mapping[str, str]) -> bytes:
    """The key of a device's store: 32 bytes, in hex in a file, or else in the environment as HYBRID_STORE_KEY.

    Raises:
        ConfigError: neither is given, or it is no such key. The text does not hold it.
    """
    text = read_private(file, "store key", _STORE_KEY) if file else environment.get(STORE_KEY_VARIABLE, "").strip()
    if not text:
        raise ConfigError(f"the store needs its key: name a file with --key-file, or set {STORE_KEY_VARIABLE}")
    try:
        key = bytes.fromhex(text) if len(text) == _STORE_KEY else b""
    except ValueError:
        key = b""
    if len(key) * 2 != _STORE_KEY:
        raise ConfigError(f"the store key must be {_STORE_KEY} hex digits (32 bytes), got {len(text)} characters")
    return key
