"""One whole process of the training benchmark: `python -m benchmarks.process CONTESTANT`, for its parent.

Prints one JSON object as its last line: seconds since this process was started
at the end of each round ("rounds"), and what else the parent asks for.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

STARTED = time.time() - time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=["ours", "flower", "flower-documented", "population"])
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--started", type=float, default=STARTED, help="Unix time at which the parent started this.")
    parser.add_argument("--folder", type=Path, help="where files may be written")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    contestants = {"ours": ours, "flower": flower, "flower-documented": flower, "population": population}
    found = contestants[arguments.contestant](arguments)
    found["peak_mb"] = peak_mb()
    print(json.dumps(found))


def peak_mb() -> float:
    """Most memory of this process; what `getrusage` gives may be its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def ours(arguments: argparse.Namespace) -> dict[str, object]:
    """The whole product: Flower's apps over the in-process grid, the mechanism, noise, ledger, checkpoints on disk."""
    from benchmarks.workload import BATCH, CLIP, LR, STEPS, examples, network
    from hybrid.features import Float32
    from hybrid.federation.aggregator import Round, SimulatedAggregator
    from hybrid.federation.checkpoint import Checkpoints
    from hybrid.federation.client_app import client_app
    from hybrid.federation.engine import Engine
    from hybrid.federation.optimizers import ServerOptimizer
    from hybrid.federation.server_app import server_app
    from hybrid.federation.simulation import simulate
    from hybrid.federation.strategy import NoisedSum
    from hybrid.local_training import LocalTraining
    from hybrid.privacy.ledger import Ledger

    local, net = LocalTraining(steps=STEPS, lr=LR, batch=BATCH), network("6.3k")
    engine = Engine.build(net, examples("6.3k", arguments.users), local)
    start, ends = engine.side.flat(), []
    settings = Round(sampling=1.0, clip=CLIP, noise_multiplier=1.0, minimum=0)
    with Ledger.open(arguments.folder / "run", budget_epsilon=1e9, delta=1e-6) as ledger:
        ledger.reserve([replace(settings.event, count=arguments.rounds)])
        strategy = NoisedSum(arguments.users, ServerOptimizer("SGD", 1.0, start))
        aggregator = SimulatedAggregator(engine, ledger, settings, seed=0)
        parts = {"strategy": strategy, "aggregator": aggregator}
        checkpoints = Checkpoints(arguments.folder / "run", net.weights, parts)

        def on_round(number: int, flat: Float32) -> None:
            checkpoints.after(number, now=number in (0, arguments.rounds))
            ends.append(time.time() - arguments.started)

        simulate(server_app(strategy, start, arguments.rounds, on_round), {1: client_app(aggregator)})
    return {"rounds": ends[1:]}


def flower(arguments: argparse.Namespace) -> dict[str, object]:
    """Flower's own simulation engine and FedAvg, at one CPU a client: its best setting here."""
    import logging

    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from benchmarks.flower_client import documented, flat_record, lean
    from benchmarks.workload import network
    from hybrid.federation.engine import DeviceSide

    logging.getLogger("flwr").setLevel(logging.ERROR)
    side = DeviceSide(network("6.3k"))
    if arguments.contestant == "flower":
        app, start = lean, flat_record(side.flat())
    else:
        app, start = documented, ArrayRecord(side.state_dict())
    ends: list[float] = []
    server = ServerApp()

    @server.main()
    def run(grid, context):
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=arguments.users)

        def evaluate(number: int, arrays: ArrayRecord) -> None:
            ends.append(time.time() - arguments.started)

        strategy.start(grid=grid, initial_arrays=start, num_rounds=arguments.rounds, evaluate_fn=evaluate)

    run_simulation(
        server,
        app,
        num_supernodes=arguments.users,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 2}},
    )
    return {"rounds": ends[1:]}


def population(arguments: argparse.Namespace) -> dict[str, object]:
    """A round of 10,000 users out of a memory-mapped population of a million, 8 examples of 64 numbers each."""
    import numpy as np

    from benchmarks.workload import CLIP, LR, network
    from hybrid.federation.engine import Engine
    from hybrid.federation.population import Examples
    from hybrid.local_training import LocalTraining

    built = network("17k")  # its device side reads 64 numbers
    folder = arguments.folder
    if arguments.rounds == 0:  # only make the population, in a process whose memory is not measured
        make_population(folder, arguments.users)
        return {}
    examples = Examples.open(folder)
    engine = Engine.build(built, examples, LocalTraining(steps=1, lr=LR))
    flat, rng, ends = engine.side.flat(), np.random.default_rng(0), []
    for number in range(arguments.rounds):
        cohort = np.flatnonzero(rng.random(examples.users) < 10_000 / examples.users)
        begun = time.perf_counter()
        assert np.isfinite(engine.clipped_sum(flat, cohort, CLIP, stream=(0, number)).total).all()
        ends.append(time.perf_counter() - begun)
    return {"rounds": ends, "users": examples.users}


def make_population(folder: Path, users: int) -> None:
    """Writes it in parts."""
    import numpy as np

    from hybrid.federation.population import ExamplesWriter

    rng, part = np.random.default_rng(0), 100_000
    with ExamplesWriter(folder, np.arange(users + 1) * 8, server=2, device=64, population="benchmark") as writer:
        for _ in range(0, 8 * users, part):
            rows = min(part, 8 * users - len(writer))
            writer.write(
                rng.standard_normal((rows, 2), dtype=np.float32),
                rng.standard_normal((rows, 64), dtype=np.float32),
                (rng.random(rows) > 0.5).astype(np.float32),
            )


if __name__ == "__main__":
    main()
