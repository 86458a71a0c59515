"""Begins a prepared training at a SuperLink: `python -m hybrid.federation.start`.

What docs/flower.md does by hand: it waits for the SuperLink, registers the keys
of its SuperNodes, and has Flower run the job. Run again it registers what is
missing, and begins again what ended before its last round, which goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.errors import FederationError, HybridError
from hybrid.federation.flower_app import APP, Progress

CONNECTION = "fleet"  # its name in Flower's own config
COMMAND_S = 120.0  # of one command of Flower's
PAUSE_S = 2.0  # between two tries


@dataclass(frozen=True)
class SuperLink:
    """Where it is.

    Attributes:
        address: HOST:PORT.
        authority: PEM file of who signed its certificate.
        patience_s: how long it may not answer.
    """

    address: str
    authority: Path
    patience_s: float

    def register(self, key: Path) -> str:
        """Lets the SuperNode with this public key come, and says whether that is new.

        Raises:
            FederationError: the SuperLink does not answer, or does not take it.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            done, told = self._flwr("supernode", "register", str(key), CONNECTION)
            if done:
                return f"registered {key.name}"
            if re.search("already (in use|registered|exists)", told):
                return f"{key.name} was registered before"
            if time.monotonic() > deadline:
                raise FederationError(f"the SuperLink at {self.address} does not take {key.name}: {told}")
            time.sleep(PAUSE_S)

    def run(self, job: Path) -> str:
        """Has the ServerApp of a job begin, or go on, and returns the number of Flower's run.

        Args:
            job: its folder, as the ServerApp sees it.

        Raises:
            FederationError: the SuperLink does not answer, or does not take it.
        """
        done, told = self._flwr("run", str(APP), CONNECTION, "--run-config", f"job={json.dumps(str(job / 'job.json'))}")
        run = re.search(r"started run (\d+)", told)
        if not done or run is None:
            raise FederationError(f"the SuperLink at {self.address} does not run the job: {told}")
        return run[1]

    def _flwr(self, *words: str) -> tuple[bool, str]:
        """Whether a command of Flower's did what it should, and what it printed."""
        with tempfile.TemporaryDirectory() as home:
            connection = {"address": self.address, "root-certificates": str(self.authority)}
            lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in connection.items())
            config = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{lines}\n'
            (Path(home) / "config.toml").write_text(config)
            environment = {**os.environ, "FLWR_HOME": home, "FLWR_TELEMETRY_ENABLED": "0"}
            try:
                ended = subprocess.run(
                    [str(Path(sys.executable).with_name("flwr")), *words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=COMMAND_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return False, f"no answer within {COMMAND_S:g} s"
        return ended.returncode == 0, " ".join(ended.stdout.split())


def start(superlink: SuperLink, keys: Sequence[Path], job: Path) -> list[str]:
    """Registers the keys, and runs the job unless it is over; returns what was done, a line each.

    Args:
        superlink: where.
        keys: public keys of SuperNodes.
        job: the folder that `hybrid fleet prepare` wrote.

    Raises:
        FederationError: see `SuperLink`; or there is no job.
    """
    if not (job / "job.json").is_file():
        raise FederationError(f"{job} must hold the job.json of `hybrid fleet prepare`, and there is none")
    lines = [superlink.register(key) for key in keys]
    if (failed := Progress(job).failed_rounds()) is not None:
        return [*lines, f"the job is over: {failed} rounds without an answer"]
    return [*lines, f"Flower runs the job as {superlink.run(job)}"]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--authority", type=Path, required=True, help="who signed its certificate (PEM)")
    parser.add_argument(
        "--node", type=Path, action="append", default=[], metavar="FILE", help="a SuperNode's public key"
    )
    parser.add_argument("--job", type=Path, required=True, help="folder, where the ServerApp runs")
    parser.add_argument("--patience-s", type=float, default=300.0, help="for the SuperLink (default %(default)g)")
    arguments = parser.parse_args()
    superlink = SuperLink(arguments.superlink, arguments.authority, arguments.patience_s)
    try:
        for line in start(superlink, arguments.node, arguments.job):
            print(line, flush=True)
    except HybridError as error:
        raise SystemExit(f"start: {error}") from None


if __name__ == "__main__":
    main()
