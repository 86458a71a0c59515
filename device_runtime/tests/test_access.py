import os
from pathlib import Path

import pytest

from device_runtime.access import MAX_KEY, authorization, read_api_key
from hybrid.errors import ConfigError

HERE = "http://127.0.0.1:8080"


def key_file(folder: Path, text: bytes, mode: int = 0o600) -> Path:
    file = folder / "api-key"
    file.write_bytes(text)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("text", [b"hybrid_1_x", b"hybrid_1_x\n", b"  hybrid_1_x \r\n"])
def test_a_key_is_the_files_one_line(tmp_path: Path, text: bytes):
    """With or without a newline behind it."""
    assert read_api_key(key_file(tmp_path, text)) == "hybrid_1_x"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int):
    """The sentence names the file and the command that mends it."""
    with pytest.raises(ConfigError, match=r"api-key must be readable by its owner only \(chmod 600\)"):
        read_api_key(key_file(tmp_path, b"k", mode))
    assert read_api_key(key_file(tmp_path, b"k", 0o600)) == "k"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    """It is not there, or a folder."""
    for file, why in ((tmp_path / "none", "FileNotFoundError"), (tmp_path, "IsADirectoryError")):
        with pytest.raises(ConfigError, match=f"API key's file '{file}' cannot be read: {why}"):
            read_api_key(file)


def test_a_key_can_come_from_a_pipe():
    """As from a command that gets it out of a safe: its mode is 0600."""
    reading, writing = os.pipe()
    os.write(writing, b"hybrid_1_x\n")
    os.close(writing)
    try:
        assert read_api_key(Path(f"/dev/fd/{reading}")) == "hybrid_1_x"
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    "key", ["", "a b", "a\nb", "k\r\nX-Evil: 1", "k\n", "k\x00", "schl\u00fcssel", "k=x", "\ufffd", "k" * (MAX_KEY + 1)]
)
def test_what_is_no_key_is_refused_and_not_repeated(key: str):
    """Nothing that could end the header, or that the gateway would not read; the sentence has its length alone."""
    with pytest.raises(ConfigError, match=rf"the API key must be one line of .* got {len(key)} characters$") as refused:
        authorization(key, HERE)
    assert len(key) < 3 or key not in str(refused.value)


@pytest.mark.parametrize("gateway", [HERE, "http://localhost:1", "http://[::1]:1", "https://gateway.example"])
def test_a_key_is_shown_over_https_or_on_this_machine(gateway: str):
    """Where nobody else reads it."""
    assert authorization("hybrid_1_x", gateway) == {"Authorization": "Bearer hybrid_1_x"}


@pytest.mark.parametrize(
    "gateway", ["http://gateway.example", "http://10.0.0.1:80", "HTTP://localhost.example", "http://127.0.0.1.example"]
)
def test_a_key_is_not_sent_in_clear_to_another_machine(gateway: str):
    """Whoever is on the way would have it; without a key anything goes."""
    with pytest.raises(ConfigError, match="gateway must be an https:// URL, or of this machine") as refused:
        authorization("hybrid_1_x", gateway)
    assert "hybrid_1_x" not in str(refused.value)
    assert authorization(None, gateway) == {}


@pytest.mark.parametrize("key", ["hybrid_1_x", None])
def test_a_gateway_with_a_password_is_refused_and_not_repeated(key: str | None):
    """httpx would send it as Basic, in the key's place."""
    with pytest.raises(ConfigError, match="without user name and password") as refused:
        authorization(key, "https://me:secret@gateway.example")
    assert "secret" not in str(refused.value)


def test_a_gateway_that_is_no_url_is_said_to_be_none():
    """A port is a number."""
    with pytest.raises(ConfigError, match="gateway must be an http:// or https:// URL"):
        authorization(None, "http://gateway:port")
