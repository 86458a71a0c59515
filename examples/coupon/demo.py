"""`make demo`: declare, train, promote, serve and ask a hybrid model, on real data with real servers.

Runs the commands that a team would type, prints each, and compares five folds
by user. Everything it makes is under `runs/demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from examples.coupon import devices, folds, prepare, report
from hybrid.cli import command_line
from hybrid.errors import HybridError
from hybrid.version import Version
from hybrid.workspace import Workspace

FOLDS = 5
HERE = Path(__file__).parent
console = Console()


@dataclass(frozen=True)
class Demo:
    """Where the demo works, and how it talks."""

    folder: Path
    workspace: Workspace
    started: float

    def say(self, text: str) -> None:
        """One step, with the seconds since the start."""
        console.print(f"[dim]{time.monotonic() - self.started:4.0f} s[/dim]  [bold]{text}[/bold]")

    def hybrid(self, *words: str) -> None:
        """Runs one `hybrid` command in this process, as `hybrid.cli.main` would, and shows what a person would type.

        One process, so that Feast, MLflow and torch are imported once and not per command.
        """
        from hybrid.cli import app

        console.print(f"\n[cyan]$ hybrid {' '.join(words)}[/cyan]", highlight=False)
        if status := app(list(words), standalone_mode=False):
            raise SystemExit(status)


def main() -> None:
    """Runs the demo; fails with a sentence if anything does, or is not as the product promises."""
    from hybrid.local import stack as local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stack is stopped
    folder = Path("runs/demo").resolve()
    os.environ["HYBRID_HOME"] = str(folder / ".hybrid")
    demo = Demo(folder, Workspace.current(), time.monotonic())
    try:
        local.down(demo.workspace)  # of a demo that was killed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run(demo)
    except KeyboardInterrupt:
        console.print("Interrupted. Nothing is left running.")
        sys.exit(128 + signal.SIGINT)


def run(demo: Demo) -> None:
    """Every step, then the table and the report."""
    from hybrid.registry import Registry

    demo.say("The survey, as a population of people and a table of offers")
    prepare.write_population()
    population = str(prepare.POPULATION.relative_to(Path.cwd()))
    demo.hybrid("population", "import", population, "--user", "user", "--name", "coupon")
    with folds.progress(console) as progress:
        prepared = folds.prepare_folds(demo.workspace, FOLDS, progress)

    demo.say("Declare, register, materialise")
    demo.hybrid("register", str((HERE / "model.py").relative_to(Path.cwd())))
    demo.hybrid("features", "apply", "coupon")
    demo.hybrid("features", "materialize", "coupon")

    demo.say("Train the version that will be served: fold 1, federated, private")
    demo.hybrid("train", "coupon", "--epsilon", "8", "--fold", f"1/{FOLDS}")
    served = Registry(demo.workspace).version("coupon", 1)

    demo.say(f"Compare with training in one place: {FOLDS} folds by user, three ways each")
    with folds.progress(console) as progress:
        outcome = folds.compare(prepared, served, demo.folder / "folds", progress)

    demo.say("Promote, start Kafka, Triton, gateway and worker, and ask")
    demo.hybrid("promote", "coupon", str(served.number), "production")
    with stack(demo):
        demo.say("People's devices ask: two processes, each with its share of fold 1's unseen users")
        answers = devices.ask(demo.workspace, served.number, prepared[0].held_out, demo.folder)
        servers = devices.servers(demo.workspace)
        demo.say(f"{answers.answered} of {answers.requests} requests answered; {answers.examples} examples are kept")
    finish(demo, outcome, answers, servers, served)


@contextmanager
def stack(demo: Demo) -> Iterator[None]:
    """The local stack, stopped whatever happens."""
    try:
        demo.hybrid("up", "--free-ports")
        yield
    finally:
        demo.hybrid("down")


def finish(
    demo: Demo, outcome: folds.Outcome, answers: devices.Answers, servers: dict[str, Any], served: Version
) -> None:
    """Writes report.json and report.html, and prints the table."""
    offline: NDArray[np.float64] = outcome.served_predictions[answers.row]
    figures = outcome.figures() | {
        "oracle": ["auc", "log_loss", "fold_1"],  # computed on pooled data, as only a simulation can
        "epsilon": served.training.epsilon,
        "delta": served.training.delta,
        "requests": answers.requests,
        "answered": answers.answered,
        "predicted": len(answers.row),
        "examples_on_devices": answers.examples,
        "max_abs_difference": float(np.abs(answers.prediction - offline).max()) if len(offline) else None,
        "latency_ms": {
            "p50": float(np.percentile(answers.latency_ms, 50)),
            "p99": float(np.percentile(answers.latency_ms, 99)),
        },
        **servers,
    }
    findings = report.Findings(
        report=figures,
        calibration_ratio=outcome.calibration_ratio,
        reliability=outcome.reliability,
        curves=outcome.curves,
        epsilon_by_round=folds.epsilon_by_round(served.training),
        latency_ms=answers.latency_ms,
        users=outcome.users,
        rows=outcome.rows,
        release=release_sentence(served.definition["declaration"]["release"]),
        training=served.training,
    )
    (demo.folder / "report.json").write_text(json.dumps(figures, indent=2))
    (demo.folder / "report.html").write_text(report.html(findings))
    show(demo, findings)
    if broken := report.broken_promises(figures):
        raise HybridError(f"the demo does not hold: {'; '.join(broken)}")


def release_sentence(release: dict[str, Any]) -> str:
    """How the device embedding left the device."""
    if release["kind"] == "clear":
        return f"as it is, because: {release['reason']}. Whoever holds the tower may learn from it about the person"
    return f"clipped to norm {release['clip']} with noise of {release['sigma']} times that"


def show(demo: Demo, findings: report.Findings) -> None:
    """What a person reads at the end."""
    figures = findings.report
    table = Table(title=f"Unseen users, {FOLDS} folds (oracle: computed on pooled data, as only a simulation can)")
    table.add_column("trained")
    for column in ("AUC", "log-loss", "calibration"):
        table.add_column(column, justify="right")
    for row in report.metric_rows(findings):
        table.add_row(*row)
    console.print()
    console.print(table)
    low = figures["auc"]["federated_minus_server_only_low"]
    console.print(f"AUC, federated minus server only: paired lower 95 % bound {low:+.4f}", highlight=False)
    console.print(report.privacy_sentence(findings), highlight=False)
    console.print(
        f"{figures['requests']} requests, {figures['answered']} answered, {figures['predicted']} predicted; latency "
        f"p50 {figures['latency_ms']['p50']:.0f} ms, p99 {figures['latency_ms']['p99']:.0f} ms; served and offline "
        f"predictions differ by at most {figures['max_abs_difference']:.1e}",
        highlight=False,
    )
    console.print("Look at its models: HYBRID_HOME=runs/demo/.hybrid .venv/bin/hybrid models", highlight=False)
    demo.say(f"Done. The report: {(demo.folder / 'report.html').relative_to(Path.cwd())}")
    console.print(
        "Be a person's device, in your browser, and see every byte that leaves it: make page", highlight=False
    )


if __name__ == "__main__":
    with command_line():
        main()
