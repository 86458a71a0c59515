import pytest

from hybrid.console.sessions import (
    ATTEMPTS,
    CONFIRM_S,
    MOST_ASKED,
    MOST_SESSIONS,
    SESSION_S,
    Refused,
    Sessions,
    generated,
    password_in,
)
from hybrid.console.steps import Seen, Step
from hybrid.errors import ConfigError

PASSWORD = "correct horse battery"
STEP, SEEN = Step("promote", "shop", 2), Seen(default=1, served=(1,))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(PASSWORD, clock=clock)


def test_the_password_alone_opens_a_session(sessions: Sessions):
    """Each has an id of its own, which is not guessed; another text, a part of it or nothing opens none."""
    first, second = sessions.log_in(PASSWORD), sessions.log_in(PASSWORD)
    assert first != second
    assert len(first) >= 43  # 256 bits in base64
    assert sessions.of(first) is not sessions.of(second)
    for wrong in ("", PASSWORD[:-1], f"{PASSWORD} ", "\udcff"):
        with pytest.raises(Refused, match="that is not the password"):
            sessions.log_in(wrong)
    for unknown in (None, "", first[:-1], f"{first}x"):
        assert sessions.of(unknown) is None


def test_a_session_ends_after_its_time_or_at_a_word(sessions: Sessions, clock: Clock):
    """Whatever it does meanwhile; and a log-out ends one alone."""
    first, second = sessions.log_in(PASSWORD), sessions.log_in(PASSWORD)
    sessions.log_out(first)
    assert sessions.of(first) is None
    clock.now += SESSION_S - 1
    assert sessions.of(second) is not None
    clock.now += 1
    assert sessions.of(second) is None


def test_attempts_to_log_in_are_few_whoever_makes_them(sessions: Sessions, clock: Clock):
    """After ten wrong ones even the password is not looked at; six seconds later one more attempt is."""
    for _ in range(ATTEMPTS):
        with pytest.raises(Refused, match="not the password"):
            sessions.log_in("wrong")
    with pytest.raises(Refused, match="the next is in 6 s") as refused:
        sessions.log_in(PASSWORD)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 6)
    clock.now += 6
    assert sessions.of(sessions.log_in(PASSWORD)) is not None
    with pytest.raises(Refused, match="too many"):
        sessions.log_in(PASSWORD)


def test_sessions_and_questions_are_bounded_and_the_oldest_go(sessions: Sessions, clock: Clock):
    """65 log-ins leave the last 64; 17 questions the last 16."""
    identities = []
    for _ in range(MOST_SESSIONS + 1):
        clock.now += 10
        identities.append(sessions.log_in(PASSWORD))
    assert [sessions.of(each) is None for each in identities] == [True] + [False] * MOST_SESSIONS
    session = sessions.of(identities[-1])
    tokens = [sessions.ask(session, STEP, SEEN) for _ in range(MOST_ASKED + 1)]
    with pytest.raises(Refused):
        sessions.confirmed(session, tokens[0])
    assert sessions.confirmed(session, tokens[1]).step == STEP


def test_a_yes_counts_once_in_its_session_within_its_time(sessions: Sessions, clock: Clock):
    """Not again, not of another session, not five minutes later, and not to what nobody asked."""
    mine, other = (sessions.of(sessions.log_in(PASSWORD)) for _ in range(2))
    token = sessions.ask(mine, STEP, SEEN)
    with pytest.raises(Refused, match="nothing waits for this yes"):
        sessions.confirmed(other, token)
    found = sessions.confirmed(mine, token)
    assert (found.step, found.seen) == (STEP, SEEN)
    late = sessions.ask(mine, STEP, SEEN)
    clock.now += CONFIRM_S
    for used_up in (token, late, "", "made up"):
        with pytest.raises(Refused, match="Nothing was done"):
            sessions.confirmed(mine, used_up)


def test_a_form_is_of_its_session(sessions: Sessions):
    """The token of one is none in another."""
    mine, other = (sessions.of(sessions.log_in(PASSWORD)) for _ in range(2))
    mine.check_form(mine.csrf)
    for token in ("", other.csrf):
        with pytest.raises(Refused, match="not of your session"):
            mine.check_form(token)


def test_secrets_are_in_no_text_of_a_session(sessions: Sessions):
    """A log or a traceback that shows one gives nothing away."""
    session = sessions.of(sessions.log_in(PASSWORD))
    assert session.csrf not in repr(session)


def test_a_password_that_is_made_is_kept_for_its_owner_and_found_again(tmp_path):
    """32 characters of base64, 192 bits, in a file with the mode 600."""
    file = tmp_path / "keys" / "console-password"
    made = generated(file)
    assert len(made) == 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert generated(file) == made == password_in(file)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_password_file_that_cannot_be_read_is_a_sentence(tmp_path, content):
    """Gone, or no text."""
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(ConfigError, match=r"password file .* cannot be read: (FileNotFound|UnicodeDecode)Error"):
        password_in(tmp_path / "f")


def test_a_short_password_is_refused():
    """The message has its length, and not the password."""
    with pytest.raises(ConfigError, match="must have at least 12 characters, got 11") as error:
        Sessions("elevenchars")
    assert "eleven" not in str(error.value)
