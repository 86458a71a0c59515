"""A SuperLink, by Flower's own commands: which SuperNodes may come, and runs of a prepared job's ServerApp."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybrid.errors import FederationError
from hybrid.federation.flower_app import APP

CONNECTION = "hybrid"  # its name in Flower's own config
COMMAND_S = 120.0  # of one command


def environment(home: Path) -> dict[str, str]:
    """Of Flower's processes: no telemetry, no look for updates, and a folder of its own."""
    return {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@dataclass(frozen=True)
class SuperLink:
    """Where it is.

    Attributes:
        address: HOST:PORT.
        authority: PEM file of who signed its certificate.
        environment: of Flower's commands, beside ours; its FLWR_HOME is a folder that is there.
    """

    address: str
    authority: Path
    environment: Mapping[str, str]

    def register(self, key: Path) -> bool:
        """Lets the SuperNode with this public key come; False: it might before.

        Raises:
            FederationError: the SuperLink does not answer, or does not take it.
        """
        done, told = self._flwr("supernode", "register", str(key), CONNECTION)
        if not done and not re.search("already (in use|registered|exists)", told):
            raise FederationError(f"the SuperLink at {self.address} does not take {key.name}: {told}")
        return done

    def unregister(self, node: str) -> None:
        """Lets a SuperNode come no more.

        Args:
            node: its id.

        Raises:
            FederationError: the SuperLink does not answer, or knows none of that id.
        """
        done, told = self._flwr("supernode", "unregister", node, CONNECTION)
        if not done:
            raise FederationError(f"the SuperLink at {self.address} does not unregister SuperNode {node}: {told}")

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

    def has_ended(self, run: str) -> bool:
        """Whether a run is over, however it ended.

        Raises:
            FederationError: the SuperLink does not answer, or knows no such run.
        """
        done, told = self._flwr("list", CONNECTION, "--run-id", run, "--format", "json")
        status = re.search(r'"status": ?"([a-z]+)', told)
        if not done or status is None:
            raise FederationError(f"the SuperLink at {self.address} does not say how run {run} is: {told}")
        return status[1] == "finished"

    def log(self, run: str) -> str:
        """What the ServerApp of a run logged.

        Raises:
            FederationError: the SuperLink does not answer, or knows no such run.
        """
        done, told = self._flwr("log", run, CONNECTION, "--show")
        if not done:
            raise FederationError(f"the SuperLink at {self.address} does not show the log of run {run}: {told}")
        return told

    def _flwr(self, *words: str) -> tuple[bool, str]:
        """Whether a command did what it should, and what it printed."""
        connection = {"address": self.address, "root-certificates": str(self.authority)}
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in connection.items())
        config = Path(self.environment["FLWR_HOME"]) / "config.toml"
        config.write_text(f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{lines}')
        try:
            ended = subprocess.run(
                [str(Path(sys.executable).with_name("flwr")), *words],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=COMMAND_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False, f"no answer within {COMMAND_S:g} s"
        return ended.returncode == 0, ended.stdout.strip()
