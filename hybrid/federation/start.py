"""Begins a prepared training at a SuperLink: `python -m hybrid.federation.start`.

What docs/flower.md does by hand: it waits for the SuperLink, registers the keys
of its SuperNodes, and has Flower run the job. Run again it registers what is
missing, and begins again what ended before its last round, which goes on there.
With --follow it stays, and ends where the run does: who starts it again, as
Kubernetes does, lets the training go on.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.errors import FederationError, HybridError
from hybrid.federation.flower_app import Progress
from hybrid.federation.superlink import SuperLink, environment

PAUSE_S = 2.0  # between two tries
LOOK_S = 60.0  # between two looks at a run: each is a process, which takes seconds of a processor


@dataclass
class Start:
    """A prepared training at a SuperLink.

    Attributes:
        superlink: where.
        keys: files with public keys of SuperNodes.
        job: the folder that `hybrid fleet prepare` wrote.
        patience_s: how long the SuperLink may not answer.
    """

    superlink: SuperLink
    keys: Sequence[Path]
    job: Path
    patience_s: float
    _registered: dict[Path, bytes] = field(default_factory=dict, init=False, repr=False)
    _run: str | None = field(default=None, init=False, repr=False)

    def begin(self) -> Iterator[str]:
        """Registers the keys, and runs the job unless it is over; says what was done, a line each.

        Raises:
            FederationError: the SuperLink does not answer, or takes something not; or there is no job.
        """
        if not (self.job / "job.json").is_file():
            raise FederationError(f"{self.job} must hold the job.json of `hybrid fleet prepare`, and there is none")
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                yield from self._register()
                break
            except FederationError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_S)
        if (said := self._over()) is None:
            self._run = self.superlink.run(self.job)
            said = f"Flower runs the job as {self._run}"
        yield said

    def follow(self, look_s: float = LOOK_S) -> Iterator[str]:
        """As `begin`; then stays, also when the job is over, registers keys that change, and looks after the run.

        Args:
            look_s: seconds between two looks.

        Raises:
            FederationError: as `begin`; or the run ended before the last round: begun again it goes on there.
        """
        yield from self.begin()
        heard = time.monotonic()
        while True:
            time.sleep(look_s)
            try:
                yield from self._register()
                gone = self._run is not None and self.superlink.has_ended(self._run)
            except FederationError:
                if time.monotonic() - heard > self.patience_s:
                    raise
                continue
            heard = time.monotonic()
            if gone:
                if (said := self._over()) is None:
                    raise FederationError(f"run {self._run} ended before the last round; begun again it goes on there")
                yield said
                self._run = None

    def _register(self) -> Iterator[str]:
        for key in self.keys:
            content = key.read_bytes()
            if self._registered.get(key) != content:
                new = self.superlink.register(key)
                self._registered[key] = content
                yield f"registered {key.name}" if new else f"{key.name} was registered before"

    def _over(self) -> str | None:
        failed = Progress(self.job).failed_rounds()
        return None if failed is None else f"the job is over: {failed} rounds without an answer"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--authority", type=Path, required=True, help="who signed its certificate (PEM)")
    parser.add_argument(
        "--node", type=Path, action="append", default=[], metavar="FILE", help="a SuperNode's public key"
    )
    parser.add_argument("--job", type=Path, required=True, help="folder, as the ServerApp sees it")
    parser.add_argument("--patience-s", type=float, default=300.0, help="for the SuperLink (default %(default)g)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="stay until SIGTERM; exit with status 1 where the run ends before its last round, to be started again",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        superlink = SuperLink(arguments.superlink, arguments.authority, environment(Path(home)))
        start = Start(superlink, arguments.node, arguments.job, arguments.patience_s)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            for line in start.follow() if arguments.follow else start.begin():
                print(line, flush=True)
        except HybridError as error:
            raise SystemExit(f"start: {error}") from None


if __name__ == "__main__":
    main()
