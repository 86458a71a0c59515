import pytest

from hybrid.bearer import check_token, new_token, read_token, shown
from hybrid.errors import ConfigError

TOKEN = "t" * 32


def test_a_token_comes_from_a_file_that_only_its_owner_reads(tmp_path):
    """What was written is what is read, also in the place of a file that others could read; without it, no token."""
    file = tmp_path / "token"
    file.write_text("of before")
    assert file.stat().st_mode & 0o044
    assert new_token(file) == read_token(file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="must be readable by its owner only"):
        read_token(file)
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "hunter2", "t" * 31, "t" * 16 + " " + "t" * 16, "t" * 32 + "\x1b", "\xfc" * 32])
def test_what_is_short_or_cannot_travel_in_a_header_is_no_token(text):
    """The aggregator and the issuer hold theirs to the same rule."""
    with pytest.raises(ConfigError, match="token must be at least 32 printable ASCII characters without spaces"):
        check_token(text)


@pytest.mark.parametrize(
    "given", [[], [""], [TOKEN], [f"bearer {TOKEN}"], [f"Bearer {TOKEN}x"], [f"Bearer {TOKEN}"] * 2, ["Bearer \xfc"]]
)
def test_a_token_is_shown_once_and_exactly(given):
    """Of two headers another part on the way may have looked at the other one."""
    assert shown([f"Bearer {TOKEN}"], TOKEN)
    assert not shown(given, TOKEN)
