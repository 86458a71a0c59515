"""How a prepared training is begun, and kept going; with a real SuperLink in integration_tests/test_chart.py."""

from dataclasses import dataclass, field

import pytest

from hybrid.errors import FederationError
from hybrid.federation.flower_app import APP, Progress
from hybrid.federation.start import Start
from hybrid.federation.superlink import CONNECTION, SuperLink, environment
from hybrid.local.process import free_ports

STARTED = (True, "Successfully built x.fab 🎊 Successfully started run 18446744073709551615")
TAKEN = (False, "[red]Public key already in use[/red]")
RUNS = (True, '{"success": true, "runs": [{"run-id": 18446744073709551615, "status": "running"}]}')
ENDED = (True, '{"success": true, "runs": [{"run-id": 18446744073709551615, "status": "finished:failed"}]}')


class AskedAgain(Exception):
    """After the last answer."""


@dataclass(frozen=True)
class Told(SuperLink):
    """A SuperLink that answers Flower's commands by a list, and keeps what it was asked."""

    answers: list = field(default_factory=list)
    asked: list = field(default_factory=list)

    def _flwr(self, *words):
        self.asked.append(words)
        if not self.answers:
            raise AskedAgain
        answer = self.answers.pop(0)
        return answer() if callable(answer) else answer


@pytest.fixture
def told(tmp_path):
    """(keys, *answers) -> the start of a job at a SuperLink that gives these answers; and the SuperLink."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").touch()

    def start(keys, *answers):
        files = [tmp_path / f"node-{number}.pub" for number in range(keys)]
        for file in files:
            file.write_text("key")
        superlink = Told("superlink:8095", tmp_path / "ca.crt", environment(tmp_path), [*answers])
        return Start(superlink, files, tmp_path / "job", 0.0), superlink

    return start


def test_keys_are_registered_then_the_job_is_run_from_where_the_server_app_sees_it(told, tmp_path):
    """Two nodes, one of which was registered before; the run's number is an unsigned 64-bit one."""
    start, superlink = told(2, (True, ""), TAKEN, STARTED)
    assert list(start.begin()) == [
        "registered node-0.pub",
        "node-1.pub was registered before",
        "Flower runs the job as 18446744073709551615",
    ]
    assert superlink.asked == [
        ("supernode", "register", str(tmp_path / "node-0.pub"), CONNECTION),
        ("supernode", "register", str(tmp_path / "node-1.pub"), CONNECTION),
        ("run", str(APP), CONNECTION, "--run-config", f'job="{tmp_path}/job/job.json"'),
    ]


def test_a_job_that_is_over_is_not_begun_again(told, tmp_path):
    """Its nodes are registered all the same: they may be needed by the next."""
    Progress(tmp_path / "job").end(2)
    start, _ = told(1, (True, ""))
    assert list(start.begin()) == ["registered node-0.pub", "the job is over: 2 rounds without an answer"]


def test_a_superlink_that_refuses_is_quoted(told):
    """Once its patience is over."""
    with pytest.raises(FederationError, match=r"superlink:8095 does not take node-0\.pub: not a key"):
        list(told(1, (False, "not a key"))[0].begin())


@pytest.mark.parametrize("answer", [(False, "no such app"), (True, "no such app")])
def test_a_superlink_that_does_not_run_the_job_is_quoted(told, answer):
    with pytest.raises(FederationError, match="superlink:8095 does not run the job: no such app"):
        list(told(0, answer)[0].begin())


def test_a_folder_without_a_job_is_refused_before_anybody_is_asked(told, tmp_path):
    start, superlink = told(1)
    (tmp_path / "job" / "job.json").unlink()
    with pytest.raises(FederationError, match=r"job must hold the job\.json of `hybrid fleet prepare`"):
        list(start.begin())
    assert superlink.asked == []


def test_who_follows_ends_where_the_run_does_so_that_it_is_begun_again(told):
    """After a look at which it ran."""
    start, superlink = told(0, STARTED, RUNS, ENDED)
    with pytest.raises(FederationError, match="run 18446744073709551615 ended before the last round"):
        list(start.follow(look_s=0))
    assert superlink.answers == []


def test_who_follows_stays_once_the_job_is_over_and_registers_a_key_that_was_replaced(told, tmp_path):
    """The run is asked about no more."""

    def after_the_last_round():
        Progress(tmp_path / "job").end(0)
        (tmp_path / "node-0.pub").write_text("another")
        return ENDED

    start, superlink = told(1, (True, ""), STARTED, RUNS, after_the_last_round, (True, ""))
    lines = start.follow(look_s=0)
    assert [next(lines) for _ in range(4)] == [
        "registered node-0.pub",
        "Flower runs the job as 18446744073709551615",
        "the job is over: 0 rounds without an answer",
        "registered node-0.pub",
    ]
    assert superlink.answers == []


def test_who_follows_waits_for_a_superlink_that_is_away_for_a_moment(told):
    """As long as its patience; then it ends, to be started again."""
    start, superlink = told(0, STARTED, (False, "connection refused"), RUNS)
    start.patience_s = 60.0
    with pytest.raises(AskedAgain):
        list(start.follow(look_s=0))
    start.patience_s, start._run = 0.0, None
    superlink.answers.extend([STARTED, (False, "connection refused"), RUNS])
    with pytest.raises(FederationError, match="does not say how run 18446744073709551615 is: connection refused"):
        list(start.follow(look_s=0))


def test_a_superlink_that_is_away_is_named_after_its_patience(tmp_path):
    """By Flower's own command, which is told where it is, and whom to trust, and nothing else of the user's."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").touch()
    (tmp_path / "ca.crt").write_text("no certificate")
    (tmp_path / "node-0.pub").write_text("key")
    (port,) = free_ports(1)
    superlink = SuperLink(f"127.0.0.1:{port}", tmp_path / "ca.crt", environment(tmp_path))
    with pytest.raises(FederationError, match=rf"the SuperLink at 127\.0\.0\.1:{port} does not take node-0\.pub: "):
        list(Start(superlink, [tmp_path / "node-0.pub"], tmp_path / "job", 0.0).begin())
