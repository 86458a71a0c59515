import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import scipy.stats  # noqa: F401  # which the gates import while their time runs
from click.testing import Result
from typer.testing import CliRunner

from hybrid.analytics.results import keep
from hybrid.cli import app
from hybrid.cli.tests.test_rollout import served, tried_out
from hybrid.cli.watch import seconds_of
from hybrid.deployment import Window, change
from hybrid.errors import ConfigError, StackError
from hybrid.workspace import Workspace
from serving.testing import deployment

COUNTED = """
# TYPE hybrid_gateway_requests counter
hybrid_gateway_requests_total{{code="ok",model="shop",version="2"}} {default}
hybrid_gateway_requests_total{{code="ok",model="shop",version="3"}} {canary}
"""


@contextmanager
def gateway(answers: list[str | None]) -> Iterator[str]:
    """URL of metrics: the answers one after the other, then the last again and again; None: an error."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(200 if answer is not None else 503)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics"
        finally:
            server.shutdown()
            thread.join()


def watch(*words: str) -> Result:
    return CliRunner().invoke(app, ["watch", "shop", "--every", "0.01s", *words])


def test_a_canary_that_nobody_sees_is_taken_back(workspace: Workspace, aliases: dict[str, int]):
    """Metrics that cannot be read are tried again, and then are a reason, which names no process to devices."""
    tried_out(workspace)
    with gateway([COUNTED.format(default=5, canary=5), None]) as url:
        done = watch("--for", "1m", "--blind", "0.05s", "--metrics", url, "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["outcome"] == "taken back"
    (halted,) = served(workspace).halted
    assert halted.reason == "gate metrics: metrics of 1 of 1 processes could not be read for 0.05 s"


def test_metrics_that_come_back_are_counted_on(workspace: Workspace, aliases: dict[str, int]):
    """What was counted meanwhile too, and what a process counted before it was started anew."""
    tried_out(workspace)
    looks = [
        COUNTED.format(default=5, canary=5),
        COUNTED.format(default=15, canary=9),
        None,
        None,
        COUNTED.format(default=25, canary=12),
        COUNTED.format(default=3, canary=2),
    ]
    with gateway(looks) as url:
        done = watch("--for", "2s", "--blind", "30s", "--least", "9", "--metrics", url, "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    said = {one["gate"]: (one["outcome"], one["said"]) for one in shown["gates"]}
    assert said["metrics"] == ("passes", "all processes are read")
    assert said["errors"][1].startswith("requests without an answer: 0.00% of 9, of the default's 0.00% of 23")
    assert served(workspace).canary is not None


def test_what_cannot_be_read_at_first_is_an_error(workspace: Workspace, aliases: dict[str, int]):
    """Before anything is watched: the canary goes on."""
    tried_out(workspace)
    with gateway([None]) as url:
        done = watch("--metrics", url)
    assert isinstance(done.exception, StackError)
    assert "cannot be read: HTTPStatusError; the canary goes on" in str(done.exception)
    assert served(workspace).canary is not None


def test_a_shadow_is_watched_where_there_is_no_canary(workspace: Workspace, aliases: dict[str, int]):
    """Taken back where its batches fail; it cannot be promoted past being a canary."""
    shade = {"action": "shadow", "version": 3, "share": 0.1}
    change(workspace.deployments, "shop", lambda window: window.shade(deployment(3), 0.1), **shade)
    failed = """
# TYPE hybrid_shadow_batches counter
hybrid_shadow_batches_total{{code="unavailable",model="shop",version="3"}} {}
"""
    with gateway([failed.format(0), failed.format(9)]) as url:
        done = watch("--for", "1m", "--promote", "--metrics", url)
        assert "--promote must be left out for a shadow" in str(done.exception)
        done = watch("--for", "1m", "--metrics", url, "--json")
    shown = json.loads(done.stdout)
    assert (done.exit_code, shown["shadow"], shown["default"], shown["outcome"]) == (3, 3, 2, "taken back")
    assert served(workspace).shadow is None


def test_a_shadow_that_devices_ask_is_taken_back_where_their_requests_fail(
    workspace: Workspace,
    aliases: dict[str, int],
):
    """As a canary is; of one that none asks, requests say nothing."""
    counts = """
# TYPE hybrid_gateway_requests counter
hybrid_gateway_requests_total{{code="unavailable",model="shop",version="3"}} {}
"""
    shade = {"action": "shadow", "version": 3, "share": 0.1}
    for devices, outcome in ((False, "went on"), (True, "taken back")):
        to = partial(Window.shade, deployment=deployment(3), share=0.1, devices=devices)
        change(workspace.deployments, "shop", to, **shade)
        with gateway([counts.format(0), counts.format(9)]) as url:
            shown = json.loads(watch("--for", "0.2s", "--metrics", url, "--json").stdout)
        assert (shown["shadow"], shown["outcome"]) == (3, outcome)
        assert ("fallbacks" in {one["gate"] for one in shown["gates"]}) == devices
    assert served(workspace).halted[0].reason.startswith("gate errors: requests without an answer")


def test_the_latest_audit_of_the_version_is_asked_where_it_is_wanted(workspace: Workspace, aliases: dict[str, int]):
    """Of version 3, not the earlier one, nor one of another version; without --inversion nobody asks."""
    tried_out(workspace)

    def audited(version: int, low: float) -> None:
        features = {"age": {"gain": {"low": low, "high": low + 0.1}}}
        shown = {"model": "shop", "version": version, "levels": [{"declared": True, "features": features}]}
        keep(workspace.runs / "r", "inversion", shown, mark="oracle")

    for version, low in ((3, -0.1), (3, 0.4), (2, -0.1)):
        audited(version, low)
    with gateway([COUNTED.format(default=0, canary=0)]) as url:
        words = ("--for", "0.01s", "--metrics", url, "--json")
        assert "inversion" not in watch(*words).stdout
        shown = json.loads(watch(*words, "--inversion", "0.2").stdout)
    failed = [one for one in shown["gates"] if one["outcome"] == "fails"]
    assert [one["gate"] for one in failed] == ["inversion"]
    assert "by +0.400 to +0.500; 0.2 is allowed" in served(workspace).halted[0].reason


@pytest.mark.parametrize("text", ["0s", "-1m", "ten", "5d", ""])
def test_a_time_is_a_number_with_a_unit(text: str):
    with pytest.raises(ConfigError, match="a time must be a number above 0 with s, m or h"):
        seconds_of(text)
