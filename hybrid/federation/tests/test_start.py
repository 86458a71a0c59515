"""How a prepared training is begun; with a real SuperLink in integration_tests/test_chart.py."""

from dataclasses import dataclass, field

import pytest

from hybrid.errors import FederationError
from hybrid.federation.flower_app import APP, Progress
from hybrid.federation.start import SuperLink, start
from hybrid.local.process import free_ports

STARTED = (True, "Successfully built x.fab 🎊 Successfully started run 18446744073709551615")
TAKEN = (False, "[red]Public key already in use[/red]")


@dataclass(frozen=True)
class Told(SuperLink):
    """A SuperLink that answers Flower's commands by a list, and keeps what it was asked."""

    answers: list = field(default_factory=list)
    asked: list = field(default_factory=list)

    def _flwr(self, *words):
        self.asked.append(words)
        return self.answers.pop(0)


@pytest.fixture
def told(tmp_path):
    """(*answers) -> the SuperLink that gives them; beside a job."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").touch()
    return lambda *answers: Told("superlink:8095", tmp_path / "ca.crt", 0.0, [*answers])


def test_keys_are_registered_then_the_job_is_run_from_where_the_server_app_sees_it(told, tmp_path):
    """Two nodes, one of which was registered before; the run's number is an unsigned 64-bit one."""
    superlink = told((True, ""), TAKEN, STARTED)
    lines = start(superlink, [tmp_path / "node-0.pub", tmp_path / "node-1.pub"], tmp_path / "job")
    assert lines == [
        "registered node-0.pub",
        "node-1.pub was registered before",
        "Flower runs the job as 18446744073709551615",
    ]
    assert superlink.asked == [
        ("supernode", "register", str(tmp_path / "node-0.pub"), "fleet"),
        ("supernode", "register", str(tmp_path / "node-1.pub"), "fleet"),
        ("run", str(APP), "fleet", "--run-config", f'job="{tmp_path}/job/job.json"'),
    ]


def test_a_job_that_is_over_is_not_begun_again(told, tmp_path):
    """Its nodes are registered all the same: they may be needed by the next."""
    Progress(tmp_path / "job").end(2)
    superlink = told((True, ""))
    assert start(superlink, [tmp_path / "node-0.pub"], tmp_path / "job") == [
        "registered node-0.pub",
        "the job is over: 2 rounds without an answer",
    ]


def test_a_superlink_that_refuses_is_quoted(told, tmp_path):
    """At a key, once its patience is over; at the run at once."""
    with pytest.raises(FederationError, match=r"superlink:8095 does not take node-0\.pub: not a key"):
        start(told((False, "not a key")), [tmp_path / "node-0.pub"], tmp_path / "job")
    for answer in ((False, "no such app"), (True, "no such app")):
        with pytest.raises(FederationError, match="superlink:8095 does not run the job: no such app"):
            start(told(answer), [], tmp_path / "job")


def test_a_folder_without_a_job_is_refused_before_anybody_is_asked(told, tmp_path):
    superlink = told()
    with pytest.raises(FederationError, match=r"empty must hold the job\.json of `hybrid fleet prepare`"):
        start(superlink, [tmp_path / "node-0.pub"], tmp_path / "empty")
    assert superlink.asked == []


def test_a_superlink_that_is_away_is_named_after_its_patience(tmp_path):
    """By Flower's own command, which is told where it is, and whom to trust, and nothing else of the user's."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").touch()
    (tmp_path / "ca.crt").write_text("no certificate")
    (port,) = free_ports(1)
    superlink = SuperLink(f"127.0.0.1:{port}", tmp_path / "ca.crt", 0.0)
    with pytest.raises(FederationError, match=rf"the SuperLink at 127\.0\.0\.1:{port} does not take node-0\.pub: "):
        start(superlink, [tmp_path / "node-0.pub"], tmp_path / "job")
