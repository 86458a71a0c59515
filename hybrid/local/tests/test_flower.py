import ssl
import sys
import time

import pytest

from hybrid.errors import StackError
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


def test_nothing_private_is_left_of_a_federation(tmp_path):
    """Ledgers and logs stay."""
    servers = flower._Servers(tmp_path, 2)
    for folder in ("keys", "job", "flwr", "logs", "aggregator-1/examples", "aggregator-1/release", "aggregator-2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("x")
    for file in ("superlink.db", "superlink.db-wal", "aggregator-1/token", "aggregator-1/ledger.jsonl"):
        (tmp_path / file).write_text("x")
    flower._remove_private(servers)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"logs/file", "aggregator-1/ledger.jsonl"}
