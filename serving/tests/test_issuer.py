import asyncio
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ConfigError, IssuerError
from hybrid.federation.issuer import RemoteIssuer
from hybrid.files import write_whole
from hybrid.plan import Turn
from hybrid.tokens import TOKENS, WINDOWS, Opening, TokenRequest, Window
from serving import issuer as module
from serving.access import Access, ApiKey, ApiKeys
from serving.issuer import (
    KEPT_WINDOWS,
    BadTokenRequest,
    Issuer,
    OtherWindow,
    TokenTaken,
    TooManyScopes,
    UnknownWindow,
    application,
    control_application,
    listening,
)

CONTROL = "c" * 40
DAY_MS = 86_400_000


def opened(issuer, separation=1, number=None, scope="spring"):
    found = issuer.open(scope, Opening(separation=separation, number=number))
    return Window(issuer="issuer.example", scope=scope, number=found.number, key=found.key)


def take(issuer, account, window, asked=None):
    """A token, as an honest device gets it."""
    asked = asked or window.ask()
    return window.finish(asked, issuer.issue(account, window.scope, window.number, bytes(asked.request)))


def test_an_account_gets_one_token_of_a_window_whatever_devices_it_has(tmp_path):
    """The second device is refused, and told when; another account is not, and the next window is open to both."""
    with Issuer(tmp_path) as issuer:
        window = opened(issuer)
        assert window.verify(take(issuer, "ann", window))
        with pytest.raises(TokenTaken) as taken:
            take(issuer, "ann", window)
        assert taken.value.earliest == 2
        assert window.verify(take(issuer, "bob", window))
        later = opened(issuer)
        assert later.verify(take(issuer, "ann", later))


def test_the_same_request_is_answered_again_with_the_same_bytes(tmp_path):
    """Also by the next process: who lost the answer has not lost the window."""
    with Issuer(tmp_path) as issuer:
        window = opened(issuer)
        asked = window.ask()
        first = issuer.issue("ann", "spring", 1, bytes(asked.request))
    with Issuer(tmp_path) as issuer:
        assert issuer.issue("ann", "spring", 1, bytes(asked.request)) == first
        with pytest.raises(TokenTaken):
            take(issuer, "ann", window)


def test_between_two_tokens_of_a_scope_lies_its_separation(tmp_path):
    """With 3: after window 2 the next is 5. Another scope does not count."""
    with Issuer(tmp_path) as issuer:
        windows = {number: opened(issuer, 3, number) for number in range(1, 6)}
        take(issuer, "ann", windows[2])
        for number in (1, 3, 4):
            with pytest.raises(TokenTaken) as taken:
                take(issuer, "ann", windows[number])
            assert taken.value.earliest == 5
        take(issuer, "ann", opened(issuer, scope="summer"))
        assert windows[5].verify(take(issuer, "ann", windows[5]))


def test_a_wiped_device_waits_until_its_window_is_over(tmp_path):
    """Nothing that a device keeps counts: a request with other randomness is another device's, or a wiped one's."""
    with Issuer(tmp_path) as issuer:
        windows = {number: opened(issuer, 2, number) for number in (4, 5, 6)}
        asked = windows[4].ask()
        take(issuer, "ann", windows[4], asked)
        for number in (4, 5):
            with pytest.raises(TokenTaken):
                take(issuer, "ann", windows[number])
        assert windows[6].verify(take(issuer, "ann", windows[6]))


@settings(max_examples=25, deadline=None)
@given(separation=st.integers(1, 4), asked=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 8)), max_size=25))
def test_whatever_is_asked_the_tokens_of_an_account_are_a_separation_apart(tmp_path_factory, separation, asked):
    with Issuer(tmp_path_factory.mktemp("issuer")) as issuer:
        windows = {number: _shared(issuer, separation, number) for number in range(1, 9)}
        given_to = {"a": [], "b": []}
        for account, number in asked:
            with suppress(TokenTaken):
                take(issuer, account, windows[number])
                given_to[account].append(number)
    for numbers in given_to.values():
        assert all(later - before >= separation for before, later in pairwise(numbers))


KEYS = {}


def _shared(issuer, separation, number):
    """A window whose key another issuer of these tests made: a new one takes a tenth of a second."""
    key = KEYS.setdefault(number, module.new_key())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "new_key", lambda: key)
        return opened(issuer, separation, number)


def test_two_that_ask_at_once_get_one_token(tmp_path):
    with Issuer(tmp_path) as issuer, ThreadPoolExecutor(8) as pool:
        window = opened(issuer)

        def one(_):
            try:
                return take(issuer, "ann", window)
            except TokenTaken:
                return None

        assert sum(token is not None for token in pool.map(one, range(16))) == 1


@pytest.mark.parametrize(
    "changed",
    [
        lambda request: b"",
        lambda request: bytes(request)[:-1],
        lambda request: bytes(TokenRequest(request.key ^ 1, request.blinded)),
        lambda request: bytes(TokenRequest(request.key, bytes(256))),
        lambda request: bytes(TokenRequest(request.key, b"\xff" * 256)),
    ],
    ids=["empty", "short", "another key", "zero", "above the modulus"],
)
def test_a_request_that_cannot_be_signed_takes_nothing(tmp_path, changed):
    with Issuer(tmp_path) as issuer:
        window = opened(issuer)
        with pytest.raises(BadTokenRequest):
            issuer.issue("ann", "spring", 1, changed(window.ask().request))
        assert window.verify(take(issuer, "ann", window))


def test_each_window_has_a_key_of_its_own_and_the_oldest_lose_theirs(tmp_path):
    """The deleted ones are nowhere in the file any more."""
    file = tmp_path / "issuer.db"
    with Issuer(tmp_path) as issuer:
        windows = [opened(issuer) for _ in range(KEPT_WINDOWS)]
        (secret,) = sqlite3.connect(file).execute("SELECT key FROM windows WHERE number = 1").fetchone()
        # The file cuts a long value into pages; what all keys begin with is left out.
        pieces = [secret[at : at + 16] for at in range(64, len(secret) - 16, 16)]
        assert sum(piece in file.read_bytes() for piece in pieces) > 0.9 * len(pieces)
        windows.append(opened(issuer))
        assert len({window.key for window in windows}) == KEPT_WINDOWS + 1
        with pytest.raises(UnknownWindow):
            take(issuer, "ann", windows[0])
        take(issuer, "ann", windows[1])
    assert not any(piece in file.read_bytes() for piece in pieces)
    assert not list(tmp_path.glob("*-journal"))


def test_a_key_is_kept_for_a_month_at_most(tmp_path):
    now = [0]
    with Issuer(tmp_path, now_ms=lambda: now[0]) as issuer:
        window = opened(issuer)
        now[0] = 31 * DAY_MS
        opened(issuer, scope="summer")
        with pytest.raises(UnknownWindow):
            take(issuer, "ann", window)


def test_a_window_that_is_open_is_opened_again_as_it_is_and_one_that_is_over_is_not(tmp_path):
    with Issuer(tmp_path) as issuer:
        assert opened(issuer, 2, 7) == opened(issuer, 2, 7)
        assert opened(issuer, 2).number == 8
        for separation, number in ((2, 6), (3, 9), (3, None)):
            with pytest.raises(OtherWindow):
                opened(issuer, separation, number)


def test_a_scope_that_was_closed_does_not_come_back(tmp_path):
    """Else who took a token of it could take another one: what accounts took is forgotten."""
    with Issuer(tmp_path) as issuer:
        window = opened(issuer)
        take(issuer, "ann", window)
        issuer.close("spring")
        with pytest.raises(UnknownWindow):
            take(issuer, "bob", window)
        with pytest.raises(OtherWindow, match="was closed"):
            opened(issuer)
    assert b"ann" not in (tmp_path / "issuer.db").read_bytes()


def test_scopes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_SCOPES", 2)
    with Issuer(tmp_path) as issuer:
        opened(issuer, scope="a")
        opened(issuer, scope="b")
        with pytest.raises(TooManyScopes):
            opened(issuer, scope="c")
        issuer.close("a")
        opened(issuer, scope="c")


def test_a_disk_that_is_full_gives_no_token_and_takes_none(tmp_path):
    """Nothing leaves before it is written; once there is space again the same account has its token."""
    with Issuer(tmp_path) as issuer:
        window = opened(issuer)
        (pages,) = issuer._db.execute("PRAGMA page_count").fetchone()
        issuer._db.execute(f"PRAGMA max_page_count = {pages}")
        given = []

        def fill():
            for number in range(10_000):
                with issuer._transaction():
                    issuer._take(f"{number:064x}", "spring", 1, bytes(32))
                given.append(number)

        with pytest.raises(sqlite3.OperationalError, match="full"):
            fill()
        issuer._db.execute(f"PRAGMA max_page_count = {pages + 100}")
        assert window.verify(take(issuer, f"{len(given):064x}", window))


def test_a_transaction_that_cannot_be_finished_is_none(tmp_path):
    """As where the disk fails at its end: the next one begins anew."""
    with Issuer(tmp_path) as issuer:
        window, database = opened(issuer), issuer._db

        class Failing:
            in_transaction = property(lambda _: database.in_transaction)

            def execute(self, statement, *values):
                if statement == "COMMIT":
                    raise sqlite3.OperationalError("disk I/O error")
                return database.execute(statement, *values)

        issuer._db = Failing()
        with pytest.raises(sqlite3.OperationalError):
            take(issuer, "ann", window)
        issuer._db = database
        assert window.verify(take(issuer, "ann", window))


def test_its_file_is_its_owners_alone(tmp_path):
    """What our own group may do with it, as a volume in Kubernetes has it, is taken back; others may nothing."""
    file = tmp_path / "own" / "issuer.db"
    with Issuer(tmp_path / "own"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o660)
    with Issuer(tmp_path / "own"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o604)
    with pytest.raises(ConfigError, match="readable by its owner only"):
        Issuer(tmp_path / "own")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "issuer.db").write_bytes(b"something else" * 100)
    (tmp_path / "issuer.db").chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be used"):
        Issuer(tmp_path)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from serving import issuer

    issuer.blind_sign = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # between writing and answering
    issuer.Issuer(Path(sys.argv[1])).issue("ann", "spring", 1, bytes.fromhex(sys.argv[2]))
"""


def test_a_process_killed_between_writing_and_answering_gives_no_second_token(tmp_path):
    """After it the request that was not answered is, and no other one."""
    with Issuer(tmp_path) as issuer:
        window = opened(issuer)
    asked = window.ask()
    words = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), bytes(asked.request).hex()]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    with Issuer(tmp_path) as issuer:
        with pytest.raises(TokenTaken):
            take(issuer, "ann", window)
        assert window.verify(take(issuer, "ann", window, asked))


# Over HTTP


@contextmanager
def served(folder, accounts=("ann", "bob")):
    """Both sides' URLs, and each account's key."""
    keys, lines = {}, []
    for account in accounts:
        line, keys[account] = ApiKey.issue(account)
        lines.append(str(line))
    (folder / "api-keys").write_text("\n".join(lines))
    with ExitStack() as stack:
        issuer = stack.enter_context(Issuer(folder / "issuer"))
        access = Access(ApiKeys(folder / "api-keys"))
        apps = (application(issuer, access), control_application(issuer, CONTROL))
        urls = [f"http://127.0.0.1:{stack.enter_context(listening(app))}" for app in apps]
        yield (*urls, keys)


def ask(url, key, window, body):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    path = TOKENS.format(scope=window.scope, number=window.number)
    return httpx.post(url + path, content=body, headers=headers)


def windows_of(control, **changed):
    return RemoteIssuer(**{"name": "issuer.example", "url": control, "token": CONTROL, "scope": "spring"} | changed)


def test_windows_are_opened_and_tokens_given_over_http(tmp_path):
    with served(tmp_path) as (url, control, keys):
        window = windows_of(control).open(None)
        assert (window.issuer, window.scope, window.number) == ("issuer.example", "spring", 1)
        path = TOKENS.format(scope="spring", number=1)
        assert httpx.get(url + path).content.hex() == window.key
        asked = window.ask()
        answer = ask(url, keys["ann"], window, bytes(asked.request))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/private-token-response")
        assert window.verify(window.finish(asked, answer.content))
        taken = ask(url, keys["ann"], window, bytes(window.ask().request))
        assert (taken.status_code, taken.json()["error"], taken.json()["earliest"]) == (409, "token_taken", 2)
        assert windows_of(control).open(None).number == 2


def test_where_devices_take_turns_the_horizon_is_the_scope(tmp_path):
    """Its separation is that of the steps, and as many as an update may be late: 3 + (6 - 4)."""
    turn = Turn(training="ab" * 16, first_step=4, last_step=6, separation=3)
    with served(tmp_path) as (url, control, keys):
        window = windows_of(control).open(turn)
        assert (window.scope, window.number) == ("ab" * 16, 4)
        assert windows_of(control).open(turn) == window
        asked = window.ask()
        assert ask(url, keys["ann"], window, bytes(asked.request)).status_code == 200
        taken = ask(url, keys["ann"], window, bytes(window.ask().request))
        assert taken.json()["earliest"] == 9


@pytest.mark.parametrize(
    ("path", "body", "key", "status"),
    [
        ("/v1/tokens/spring/1", b"", None, 401),
        ("/v1/tokens/spring/1", b"", "hybrid_0000000000000000_x", 401),
        ("/v1/tokens/spring/1", b"", "ann", 422),
        ("/v1/tokens/spring/1", bytes(260), "ann", 413),
        ("/v1/tokens/spring/2", bytes(259), "ann", 404),
        ("/v1/tokens/spring/x", bytes(259), "ann", 404),
        ("/v1/tokens/spring/-1", bytes(259), "ann", 404),
        ("/v1/tokens/spring/99999999999999999999", bytes(259), "ann", 404),
        ("/v1/tokens/SPRING/1", bytes(259), "ann", 404),
        ("/v1/windows/spring", b'{"separation":1}', "ann", 404),
    ],
)
def test_what_is_no_request_of_an_account_is_refused(tmp_path, path, body, key, status):
    """A window is opened at the other side alone."""
    with served(tmp_path) as (url, control, keys):
        windows_of(control).open(None)
        headers = {"authorization": f"Bearer {keys.get(key, key)}"} if key else {}
        answer = httpx.post(url + path, content=body, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("token", "scope", "body", "status"),
    [
        ("x" * 40, "spring", b'{"separation":1}', 401),
        (CONTROL, "Spring", b'{"separation":1}', 404),
        (CONTROL, "spring", b'{"separation":0}', 422),
        (CONTROL, "spring", b"[" * 1025, 413),
        (CONTROL, "closed", b'{"separation":1}', 409),
    ],
)
def test_who_may_not_or_does_not_open_a_window_is_refused(tmp_path, token, scope, body, status):
    with served(tmp_path) as (_, control, _):
        mine = {"authorization": f"Bearer {CONTROL}"}
        assert httpx.delete(control + WINDOWS.format(scope="closed"), headers=mine).status_code == 204
        answer = httpx.post(
            control + WINDOWS.format(scope=scope), content=body, headers={"authorization": f"Bearer {token}"}
        )
    assert answer.status_code == status


def test_an_aggregator_is_told_why_it_has_no_window(tmp_path):
    with served(tmp_path) as (_, control, _), pytest.raises(IssuerError, match="show the control side's token"):
        windows_of(control, token="y" * 40).open(None)
    with pytest.raises(IssuerError, match="cannot be reached"):
        windows_of(control).open(None)
    with pytest.raises(ConfigError, match="https"):
        windows_of("http://issuer.example")


def test_an_issuer_that_knows_nobody_is_refused(tmp_path):
    with Issuer(tmp_path) as issuer:
        with pytest.raises(ConfigError, match="must know accounts"):
            application(issuer, Access())
        with pytest.raises(ConfigError, match="at least 32"):
            control_application(issuer, "short")
        with (
            pytest.raises(ConfigError, match="certificate"),
            listening(control_application(issuer, CONTROL), "0.0.0.0"),
        ):
            pass


def test_nothing_is_logged_of_accounts_and_requests(tmp_path, caplog, monkeypatch):
    """Neither where all is well, nor where a request is refused, nor where something breaks."""
    caplog.set_level("DEBUG", logger="serving.issuer")
    with served(tmp_path) as (url, control, keys):
        window = windows_of(control).open(None)
        for _ in range(2):
            ask(url, keys["ann"], window, bytes(window.ask().request))
        monkeypatch.setattr(module, "blind_sign", lambda *_: 1 / 0)
        broken = ask(url, keys["bob"], window, bytes(window.ask().request))
    assert (broken.status_code, broken.json()["error"]) == (500, "internal")
    assert [record.getMessage() for record in caplog.records if record.name == "serving.issuer"] == [
        "window 1 of scope spring is open",
        "internal error: ZeroDivisionError",
    ]


def test_the_process_serves_both_sides_until_it_is_told_to_end(tmp_path):
    write_whole(tmp_path / "token", CONTROL.encode(), private=True)
    line, key = ApiKey.issue("ann")
    (tmp_path / "api-keys").write_text(str(line))
    words = ["--folder", tmp_path / "issuer", "--api-keys", tmp_path / "api-keys", "--token", tmp_path / "token"]
    command = [sys.executable, "-m", "serving.issuer", *map(str, words), "--port", "0", "--control-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            ports = [
                int(word.strip(",")) for word in process.stdout.readline().split() if word.strip(",\n").isdecimal()
            ]
            window = windows_of(f"http://127.0.0.1:{ports[1]}").open(None)
            asked = window.ask()
            answer = ask(f"http://127.0.0.1:{ports[0]}", key, window, bytes(asked.request))
            assert window.verify(window.finish(asked, answer.content))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_the_account_is_a_client_of_the_gateways_keys(tmp_path):
    """Two keys of one client are one account: one follows the other."""
    (one, first), (two, second) = ApiKey.issue("ann"), ApiKey.issue("ann")
    (tmp_path / "api-keys").write_text(f"{one}\n{two}")
    access = Access(ApiKeys(tmp_path / "api-keys"))
    admitted = [asyncio.run(access.admit([f"Bearer {key}"])) for key in (first, second)]
    assert admitted == ["ann", "ann"]
    assert json.dumps(admitted)
