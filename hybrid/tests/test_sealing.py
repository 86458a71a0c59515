import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from hybrid.sealing import OVERHEAD, CannotOpen, OpeningKey, SealingKey, generate


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(sealing, opening) key of one pair."""
    folder = tmp_path_factory.mktemp("keys")
    generate(folder / "a.pem", folder / "a.pub")
    return SealingKey.read(folder / "a.pub"), OpeningKey.read(folder / "a.pem")


@settings(deadline=None)
@given(st.binary(max_size=1000), st.binary(max_size=100))
def test_what_is_sealed_opens_with_the_other_half_in_the_same_context(pair, data, context):
    """Any bytes, empty ones too, come back; sealed they are 48 longer: a key of 32 and a tag of 16."""
    sealing, opening = pair
    sealed = sealing.seal(data, context)
    assert len(sealed) == len(data) + 48 == len(data) + OVERHEAD
    assert opening.open(sealed, context) == data


def test_another_context_a_changed_byte_and_cut_bytes_are_refused(pair):
    """Each of them is CannotOpen, never other bytes."""
    sealing, opening = pair
    sealed = sealing.seal(b"an embedding", b"place 1")
    with pytest.raises(CannotOpen):
        opening.open(sealed, b"place 2")
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(CannotOpen):
            opening.open(bytes(changed), b"place 1")
        with pytest.raises(CannotOpen):
            opening.open(sealed[:place], b"place 1")


def test_the_same_bytes_sealed_twice_have_nothing_in_common(pair):
    """Neither the ephemeral key nor the ciphertext: nobody sees that two records were the same."""
    first, second = (pair[0].seal(b"\0" * 64, b"") for _ in range(2))
    assert first[:32] != second[:32]
    assert first[32:] != second[32:]


def test_another_key_does_not_open(pair, tmp_path):
    """And has another id."""
    generate(tmp_path / "b.pem", tmp_path / "b.pub")
    other = OpeningKey.read(tmp_path / "b.pem")
    assert other.key_id != pair[1].key_id == pair[0].key_id
    with pytest.raises(CannotOpen):
        other.open(pair[0].seal(b"x", b""), b"")


def test_the_private_key_is_its_owners_alone_and_no_key_is_replaced(tmp_path):
    """0600 and 0644; a second pair at either path is refused, and nothing of it is written."""
    private, public = tmp_path / "keys/a.pem", tmp_path / "a.pub"
    generate(private, public)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (private, public)] == [0o600, 0o644]
    before = private.read_bytes(), public.read_bytes()
    for pair in [(private, tmp_path / "new.pub"), (tmp_path / "new.pem", public)]:
        with pytest.raises(ConfigError, match="exists"):
            generate(*pair)
    assert before == (private.read_bytes(), public.read_bytes())
    assert not list(tmp_path.glob("new*"))


def test_a_file_that_holds_no_such_key_is_refused_by_name(tmp_path):
    """The other half, garbage, nothing, or a private key that others can read; the message holds nothing of it."""
    generate(tmp_path / "a.pem", tmp_path / "a.pub")
    (tmp_path / "bad").write_bytes(b"secret")
    (tmp_path / "bad").chmod(0o600)
    for name in ("a.pem", "bad", "none"):
        with pytest.raises(ConfigError, match=f"{name} must hold an X25519 public key in PEM") as refused:
            SealingKey.read(tmp_path / name)
        assert "secret" not in str(refused.value)
    (tmp_path / "a.pub").chmod(0o600)
    for name in ("a.pub", "bad"):
        with pytest.raises(ConfigError, match=f"{name} must hold an X25519 private key in PEM"):
            OpeningKey.read(tmp_path / name)
    with pytest.raises(ConfigError, match="none does not exist; `hybrid dead-letters keygen`"):
        OpeningKey.read(tmp_path / "none")
    (tmp_path / "a.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="readable by its owner only"):
        OpeningKey.read(tmp_path / "a.pem")
