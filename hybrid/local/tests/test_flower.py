import json
import ssl
import subprocess
import sys
import time

import pytest

from hybrid.errors import FederationError, StackError
from hybrid.federation.checkpoint import Checkpoint
from hybrid.federation.superlink import SuperLink
from hybrid.local import flower
from hybrid.local.process import Service


@pytest.fixture
def keeper(tmp_path, monkeypatch):
    """Keeps servers of a folder, without waiting between restarts; and what it said."""
    monkeypatch.setattr(flower, "LONGEST_WAIT_S", 0.0)
    said = []
    kept = flower._Keeper(flower._Servers(tmp_path, 2), said.append)
    yield kept, said
    kept.stop()


def sleeper(name, seconds=60.0, **changes):
    code = f"import time; print('up', flush=True); time.sleep({seconds})"
    return Service(name, [sys.executable, "-c", code], ready=lambda log: "up" in log.read_text(), **changes)


def check_until(kept, met):
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        kept.check()


def test_a_server_that_dies_is_started_again_and_its_log_stays(keeper, tmp_path):
    """Killed, it is another process a moment later; both logs are there."""
    kept, said = keeper
    kept.start([sleeper("one")])
    first = kept._processes["one"]
    first._popen.kill()
    check_until(kept, lambda: kept._processes["one"].pid != first.pid)
    assert said == ["one was killed by SIGKILL; it is started again in 0 s"]
    assert {log.name for log in (tmp_path / "logs").iterdir()} == {"one.log", "one.1.log"}


def test_what_starts_a_supernodes_apps_is_started_again_with_it(keeper):
    """Else it would look for the new one late; that of the SuperLink holds the ServerApp, and stays."""
    kept, _ = keeper
    names = [f"{whose}{apps}" for whose in ("superlink", "supernode-1", "supernode-2") for apps in ("", "-apps")]
    kept.start([sleeper(name) for name in names])
    first = dict(kept._processes)
    killed = ("superlink", "supernode-1")
    for name in killed:
        first[name]._popen.kill()
    check_until(kept, lambda: not kept._due and all(kept._processes[name] is not first[name] for name in killed))
    again = {name for name in names if kept._processes[name] is not first[name]}
    assert again == {"superlink", "supernode-1", "supernode-1-apps"}


def test_a_server_that_dies_again_and_again_ends_it(keeper):
    """After so many restarts, with how it ended."""
    kept, said = keeper
    kept.start([sleeper("one")])
    kept._processes["one"]._popen.kill()
    object.__setattr__(kept._processes["one"].service, "command", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(StackError, match="one ended with exit status 3"):
        check_until(kept, lambda: False)
    assert len(said) == flower.RESTARTS


def test_a_server_whose_preparation_fails_is_tried_again(keeper):
    """What it needs is down for a moment: the second restart succeeds."""
    kept, said = keeper
    failures = [None, StackError("`flwr supernode` failed: no SuperLink"), None]

    def prepare():
        if (failure := failures.pop(0)) is not None:
            raise failure

    kept.start([sleeper("one", prepare=prepare)])
    first = kept._processes["one"]
    first._popen.kill()
    check_until(kept, lambda: kept._processes["one"].pid != first.pid)
    assert said[1].startswith("`flwr supernode` failed: no SuperLink; it is started again")


def test_certificates_are_of_one_authority_for_loopback_and_keys_for_their_owner(tmp_path):
    """A TLS handshake over them succeeds for 127.0.0.1 and localhost, and for no other name."""
    flower._write_certificates(tmp_path)
    flower._write_node_key(tmp_path / "node")
    for secret in ("server.key", "node"):
        assert (tmp_path / secret).stat().st_mode & 0o777 == 0o600
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    for name, holds in (("127.0.0.1", True), ("localhost", True), ("flower.example", False)):
        client = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        assert _shake_hands(here, client, name) is holds


def _shake_hands(here, client, name):
    """Whether the client accepts the server under that name, back to back through memory."""
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = here.wrap_bio(a, b, server_side=True)
    peer = client.wrap_bio(b, a, server_hostname=name)
    try:
        for _ in range(6):
            for side in (peer, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError:
        return False
    return peer.version() is not None


@pytest.fixture
def servers(tmp_path):
    """With a file wherever a federation has some."""
    for folder in ("keys", "job", "flwr", "logs", "aggregator-1/examples", "aggregator-1/release", "aggregator-2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("x")
    for file in ("superlink.db", "superlink.db-wal", "aggregator-1/token", "aggregator-1/ledger.jsonl"):
        (tmp_path / file).write_text("x")
    (tmp_path / "job" / "done.json").write_text("{}")
    return flower._Servers(tmp_path, 2)


def left(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_nothing_private_is_left_of_a_federation(servers, tmp_path):
    """Ledgers, logs and what it goes on from stay."""
    flower._remove_private(servers)
    goes_on = {"job/file", "job/done.json", "aggregator-1/release/file"}
    assert left(tmp_path) == {"logs/file", "aggregator-1/ledger.jsonl"} | goes_on


def test_of_a_federation_that_is_over_ledgers_and_logs_are_left(servers, tmp_path):
    """And that it is over: a command that was killed before it made a version needs no more."""
    flower._remove_done(servers)
    flower._remove_private(servers)
    assert left(tmp_path) == {"logs/file", "aggregator-1/ledger.jsonl", "job/done.json"}


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A ServerApp's keeper, whose `flwr run` takes no time; what it ran, and what it said."""
    monkeypatch.setattr(flower, "LONGEST_WAIT_S", 0.0)
    servers, ran, said = flower._Servers(tmp_path, 2), [], []
    servers.job.mkdir()

    def flwr(_superlink, *words):
        ran.append(words)
        return True, "started run 12" if words[0] == "run" else "its log"

    monkeypatch.setattr(SuperLink, "_flwr", flwr)
    return flower._App(servers, said.append), ran, said


def ended(tmp_path):
    """A process that is no more tells that it began."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "job" / "process.json").write_text(json.dumps({"pid": dead.pid, "started": 0.0}))


def test_a_server_app_that_died_is_run_again(app, tmp_path):
    """As often as it takes, where rounds are over in between."""
    kept, ran, said = app
    kept.start()
    for number in range(20):
        ended(tmp_path)
        kept.check(number)
        kept.check(number)
    assert len(ran) == 21
    assert said == ["the ServerApp ended before its last round; it is started again in 0 s"] * 20


def test_a_server_app_that_dies_again_and_again_ends_the_training(app, tmp_path):
    """With what it logged."""
    kept, ran, said = app
    kept.start()
    for _ in range(flower.APP_RESTARTS):
        ended(tmp_path)
        kept.check(3)
        kept.check(3)
    ended(tmp_path)
    with pytest.raises(FederationError, match="ended before its last round, 6 times; its last lines:\n  its log"):
        kept.check(3)
    assert [words[0] for words in ran] == ["run"] * (1 + flower.APP_RESTARTS) + ["log"]
    assert len(said) == flower.APP_RESTARTS


def test_a_server_app_that_never_begins_is_run_again(app, monkeypatch):
    """It may have been killed while it was loaded, when it had not told its process yet."""
    kept, ran, said = app
    monkeypatch.setattr(flower, "APP_TIMEOUT_S", 0.0)
    kept.start()
    kept.check(0)
    kept.check(0)
    assert len(ran) == 2
    assert said == ["the ServerApp did not start within 0 s; it is started again in 0 s"]


@pytest.mark.parametrize(
    ("done", "count", "told"),
    [(2, 2, "must hold the 2 rounds that the run's checkpoint has, got 1"), (1, 3, "must stay the 2"), (1, 1, "the 2")],
)
def test_what_is_left_of_another_federation_is_refused(tmp_path, done, count, told):
    """Fewer rounds than the checkpoint has, or ledgers of other people."""
    Checkpoint(1, {}, {}).write(_made(tmp_path / "job"))
    for index in (1, 2):
        _made(tmp_path / f"aggregator-{index}")
    servers = flower._Servers(tmp_path, count)
    with pytest.raises(FederationError, match=told):
        flower._check_kept(servers, done)
    flower._check_kept(flower._Servers(tmp_path, 2), 1)


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder
