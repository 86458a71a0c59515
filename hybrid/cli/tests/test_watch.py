import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import scipy.stats  # noqa: F401  # which the gates import while their time runs
from click.testing import Result
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.tests.test_rollout import Aliases, aliases, served, tried_out, workspace  # noqa: F401
from hybrid.cli.watch import seconds_of
from hybrid.errors import ConfigError, StackError
from hybrid.workspace import Workspace

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


def test_a_canary_that_nobody_sees_is_taken_back(workspace: Workspace, aliases: Aliases):  # noqa: F811
    """Metrics that cannot be read are tried again, and then are a reason, which names no process to devices."""
    tried_out(workspace)
    with gateway([COUNTED.format(default=5, canary=5), None]) as url:
        done = watch("--for", "1m", "--blind", "0.05s", "--metrics", url, "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["outcome"] == "taken back"
    (halted,) = served(workspace).halted
    assert halted.reason == "gate metrics: metrics of 1 of 1 processes could not be read for 0.05 s"


def test_metrics_that_come_back_are_counted_on(workspace: Workspace, aliases: Aliases):  # noqa: F811
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


def test_what_cannot_be_read_at_first_is_an_error(workspace: Workspace, aliases: Aliases):  # noqa: F811
    """Before anything is watched: the canary goes on."""
    tried_out(workspace)
    with gateway([None]) as url:
        done = watch("--metrics", url)
    assert isinstance(done.exception, StackError)
    assert "cannot be read: HTTPStatusError; the canary goes on" in str(done.exception)
    assert served(workspace).canary is not None


@pytest.mark.parametrize("text", ["0s", "-1m", "ten", "5d", ""])
def test_a_time_is_a_number_with_a_unit(text: str):
    with pytest.raises(ConfigError, match="a time must be a number above 0 with s, m or h"):
        seconds_of(text)
