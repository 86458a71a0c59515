"""Who may use the console: a password, sessions in memory, and one-time tokens for what is to be confirmed."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.console.steps import Seen, Step
from hybrid.errors import ConfigError, HybridError
from hybrid.files import write_whole

SHORTEST_PASSWORD = 12  # characters
SESSION_S = 8 * 3600.0
CONFIRM_S = 300.0  # in which somebody says yes
MOST_SESSIONS = 64  # the oldest goes
MOST_ASKED = 16  # of a session, likewise
ATTEMPTS = 10  # to log in, of everybody together
ATTEMPT_S = 6.0  # after which there is one more

Clock = Callable[[], float]


class Refused(HybridError):
    """The console does not do what a browser asks of it.

    Attributes:
        status: of HTTP.
        retry_after_s: when it may be tried again; None where that does not help.
    """

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(frozen=True)
class Asked:
    """What was asked once, and waits for a yes.

    Attributes:
        step: that it is.
        seen: the rollout that was shown beside the question.
        ends: by the clock.
    """

    step: Step
    seen: Seen
    ends: float


@dataclass
class Session:
    """Of one browser.

    Attributes:
        ends: by the clock, whatever it does.
        csrf: each of its forms has it: another site's cannot.
        asked: token -> what waits for a yes.
    """

    ends: float
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    asked: dict[str, Asked] = field(default_factory=dict, repr=False)

    def check_form(self, token: str) -> None:
        """Raises: Refused: the form is not of this session."""
        if not same(token, self.csrf):
            raise Refused(403, "this form is not of your session: open the page again")


class Sessions:
    """Those that are logged in. Several threads may use it.

    Args:
        password: of the team.
        clock: in seconds.

    Raises:
        ConfigError: the password is too short.
    """

    def __init__(self, password: str, *, clock: Clock = time.monotonic) -> None:
        if len(password) < SHORTEST_PASSWORD:
            raise ConfigError(
                f"the console's password must have at least {SHORTEST_PASSWORD} characters, got {len(password)}"
            )
        self._password, self._clock, self._alone = password, clock, threading.Lock()
        self._sessions: dict[str, Session] = {}  # by a digest of the id: what is in memory opens nothing
        self._attempts, self._counted = float(ATTEMPTS), clock()

    def log_in(self, password: str) -> str:
        """A new session's id.

        Raises:
            Refused: it is not the password; or there were too many attempts, and it was not looked at.
        """
        self._attempt()
        if not same(password, self._password):
            raise Refused(403, "that is not the password")
        identity = secrets.token_urlsafe(32)
        with self._alone:
            _make_room(self._sessions, MOST_SESSIONS)
            self._sessions[_digest(identity)] = Session(ends=self._clock() + SESSION_S)
        return identity

    def of(self, identity: str | None) -> Session | None:
        """Whose id it is, while it lasts."""
        with self._alone:
            found = self._sessions.get(_digest(identity or ""))
            return found if found is not None and found.ends > self._clock() else None

    def log_out(self, identity: str | None) -> None:
        """Its id opens nothing any more."""
        with self._alone:
            self._sessions.pop(_digest(identity or ""), None)

    def ask(self, session: Session, step: Step, seen: Seen) -> str:
        """A token with which the session may say yes to this, once."""
        token = secrets.token_urlsafe(32)
        with self._alone:
            _make_room(session.asked, MOST_ASKED)
            session.asked[token] = Asked(step, seen, self._clock() + CONFIRM_S)
        return token

    def confirmed(self, session: Session, token: str) -> Asked:
        """What the session said yes to; the token is used up.

        Raises:
            Refused: it was asked no such thing, or said yes already, or too late.
        """
        with self._alone:
            found = session.asked.pop(token, None)
        if found is None or found.ends <= self._clock():
            minutes = CONFIRM_S / 60
            raise Refused(
                409, f"nothing waits for this yes: each counts once, within {minutes:g} minutes. Nothing was done"
            )
        return found

    def _attempt(self) -> None:
        with self._alone:
            now = self._clock()
            self._attempts = min(float(ATTEMPTS), self._attempts + (now - self._counted) / ATTEMPT_S)
            self._counted = now
            if self._attempts < 1:
                wait_s = math.ceil((1 - self._attempts) * ATTEMPT_S)
                raise Refused(429, f"too many attempts to log in: the next is in {wait_s} s", wait_s)
            self._attempts -= 1


def password_in(file: Path) -> str:
    """What a file holds, without the end of its line.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password file {str(file)!r} cannot be read: {type(error).__name__}") from None


def generated(file: Path) -> str:
    """The password that the file holds; a new one, for its owner alone, where it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(file, f"{secrets.token_urlsafe(24)}\n".encode(), private=True)
    return password_in(file)


def same(given: str, expected: str) -> bool:
    """Whether both are the same text, in a time that tells nothing of either."""
    return hmac.compare_digest(_hash(given), _hash(expected))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _digest(identity: str) -> str:
    return _hash(identity).hex()


def _make_room(found: dict[str, Any], most: int) -> None:
    """The oldest go."""
    while len(found) >= most:
        del found[next(iter(found))]
