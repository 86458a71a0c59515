"""How fast federated training is simulated: `python -m benchmarks.training [--json FILE]`.

In one run, with the same weights, examples, cohorts and threads, a round of:

central      plain torch mini-batches over the same examples, 8 of each user a step
ours         the batched engine: every user's local steps, clipping, and the sum in float64
sequential   one user after another on one resident model, without optimiser objects
flower       Flower's own simulation engine, at one CPU a client (100 and 1,000 users), with a client as lean as
             we could make one, and with one as Flower's documentation writes it

and, of whole processes, the seconds to round 100 with everything that a training
does (Flower's apps, noise, a ledger on the disk), and the peak memory of a round
of 10,000 out of a memory-mapped population of a million. Takes about ten minutes. Where
torch finds a GPU, central and ours run there too, with up to 100,000 users.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import measure
from benchmarks.workload import EXAMPLES, SIZES, Contest

RAY = "ray==2.55.1"  # what flwr 1.41's simulation extra pins
RAY_FOLDER = Path(".cache/benchmark-ray")
LONGEST_S = 400  # of one process
ROUNDS = {100: {"flower": 100, "flower-documented": 10}, 1000: {"flower": 4, "flower-documented": 3}}  # by users
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of torch, for everybody (default: all cores)")
    parser.add_argument("--without-flower", action="store_true", help="leave out Flower's engine, which takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, figures = engine_rows()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        process_rows(rows, figures, Path(folder), arguments.threads, flower=not arguments.without_flower)
        million(rows, figures, Path(folder), arguments.threads)
    measure.show(f"A round, in milliseconds ({arguments.threads} thread(s))", rows, figures)
    measure.write(arguments.json, rows, figures)


def engine_rows() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rounds in this process."""
    rows: list[dict[str, Any]] = []
    for size, users in [("6.3k", 10), ("6.3k", 100), ("6.3k", 1000), ("6.3k", 10_000)] + [
        (size, 100) for size in SIZES if size != "6.3k"
    ]:
        console.print(f"{users} users, {size} weights ...")
        rows.append(engine_row(size, users))
    if torch.cuda.is_available():
        for users in (100, 1000, 10_000, 100_000):
            console.print(f"{users} users, 6.3k weights, on the GPU ...")
            rows.append(engine_row("6.3k", users, "cuda"))
    found = {(row["weights"], row["users"]): row for row in rows if row["device"] == "cpu"}
    one, thousand = found["6.3k", 100], found["6.3k", 1000]
    figures = {
        "central_ratio": one["ours / central"],
        "central_ratio_1step": one["1 step: ours / central"],
        "sequential_speedup": one["sequential"] / one["ours"],
        "sequential_speedup_17k": found["17k", 100]["sequential"] / found["17k", 100]["ours"],
        "sequential_speedup_200k": found["200k", 100]["sequential"] / found["200k", 100]["ours"],
        "central_ratio_1000": thousand["ours / central"],
        "cohort_growth": cohort_growth(),
    }
    return rows, figures


def cohort_growth() -> float:
    """What a user costs in a cohort of 10,000, over what it costs in one of 1,000."""
    contests = {str(users): Contest.of("6.3k", users) for users in (1000, 10_000)}
    turns = measure.take_turns({name: contest.ours for name, contest in contests.items()}, seconds=15)
    return turns.ratio("10000", "1000") / 10


def engine_row(size: str, users: int, device: str = "cpu") -> dict[str, Any]:
    """One workload."""
    contest = Contest.of(size, users, device)
    where = torch.cuda.get_device_name() if device == "cuda" else device
    row: dict[str, Any] = {"weights": size, "users": users, "device": where, "parameters": contest.side.size}
    turns = measure.take_turns({"central": contest.central, "ours": contest.ours}, seconds=8)
    row |= turns.medians() | {"ours / central": turns.ratio("ours", "central")}
    steps = {"central": lambda: contest.central(EXAMPLES), "ours": contest.ours_one_step}
    turns = measure.take_turns(steps, seconds=5)
    row |= {f"1 step: {name}": value for name, value in turns.medians().items()}
    row["1 step: ours / central"] = turns.ratio("ours", "central")
    some = min(users, 100)  # its time is that of each user, one after another
    sequential = measure.take_turns({"": lambda: contest.sequential(some)}, seconds=2).medians()[""]
    row["sequential"] = sequential * users / some
    return row


def process_rows(
    rows: list[dict[str, Any]], figures: dict[str, float], folder: Path, threads: int, *, flower: bool
) -> None:
    """Whole processes, ours and Flower's."""
    process("ours", folder, threads, users=10, rounds=1)  # a clone's first compiles what it imports: nobody is charged
    ours = {users: process("ours", folder, threads, users=users, rounds=100) for users in ROUNDS}
    rows.extend(process_row("ours, whole process", users, found) for users, found in ours.items())
    figures["ours_100_rounds_s"] = ours[100]["rounds"][99]
    if not flower:
        return
    install_ray()
    process("flower", folder, threads, users=10, rounds=1)
    for users, contestants in ROUNDS.items():
        for contestant, count in contestants.items():
            console.print(f"Flower's engine ({contestant}), {users} users, {count} rounds: takes a minute ...")
            # Engine against engine: Flower's draws no noise and keeps no ledger. The table has whole rounds too.
            # Ours is measured right before and right after, since the machine may be slower when it is Flower's turn.
            engine = measure.take_turns({"before": Contest.of("6.3k", users).ours}, seconds=2).medians()
            found = process(contestant, folder, threads, users=users, rounds=count)
            engine |= measure.take_turns({"after": Contest.of("6.3k", users).ours}, seconds=2).medians()
            rows.append(
                process_row(f"{contestant}, whole process", users, found) | {"ours": statistics.mean(engine.values())}
            )
            name = contestant.replace("-", "_") + "_speedup" + ("" if users == 100 else f"_{users}")
            figures[name] = steady_ms(found) / statistics.mean(engine.values())
            if (contestant, users) == ("flower", 100):
                figures["flower_100_rounds_s"] = found["rounds"][99]
                figures["flower_speedup_100_rounds"] = found["rounds"][99] / ours[100]["rounds"][99]


def steady_ms(found: Mapping[str, Any]) -> float:
    """Of a round after the first, in which everything was started."""
    ends = found["rounds"]
    return 1e3 * statistics.median(later - earlier for earlier, later in pairwise(ends))


def process_row(name: str, users: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    return {
        "weights": name,
        "users": users,
        "steady round": steady_ms(found),
        "first round after s": found["rounds"][0],
        "last round after s": found["rounds"][-1],
        "rounds": len(found["rounds"]),
        "peak MB": found["peak_mb"],
    }


def process(contestant: str, folder: Path, threads: int, *, users: int, rounds: int) -> dict[str, Any]:
    """Runs `benchmarks.process` and returns what it found, with the peak memory of all its processes."""
    work = folder / f"{contestant}-{users}"
    work.mkdir(exist_ok=True)
    words = [contestant, "--users", users, "--rounds", rounds, "--folder", work, "--threads", threads]
    words += ["--started", time.time()]
    path = os.pathsep.join(filter(None, [str(Path.cwd()), str(RAY_FOLDER.resolve()), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling libraries anew would be most of every start
    command = [sys.executable, "-m", "benchmarks.process", *map(str, words)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            output, errors = child.communicate(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"benchmarks.process {contestant} failed:\n{errors[-3000:]}")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def million(rows: list[dict[str, Any]], figures: dict[str, float], folder: Path, threads: int) -> None:
    """A round of 10,000 out of a million."""
    users = 1_000_000
    console.print("a population of 1,000,000 users x 8 examples x 64 numbers: 2.2 GB on disk for a minute ...")
    process("population", folder, threads, users=users, rounds=0)
    found = process("population", folder, threads, users=users, rounds=5)
    shutil.rmtree(folder / f"population-{users}")
    figures["million_users_rss_mb"] = found["peak_mb"]
    rows.append(
        {
            "weights": "17k, 10,000 of a million, 1 step of 8",
            "users": users,
            "1 step: ours": 1e3 * statistics.median(found["rounds"]),
            "peak MB": found["peak_mb"],
        }
    )


def install_ray() -> None:
    """What Flower's simulation engine runs on; too heavy to be among what the project installs."""
    if (RAY_FOLDER / "ray").is_dir():
        return
    console.print(f"installing {RAY} into {RAY_FOLDER} ...")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--constraints", "constraints.txt"]
    uv += ["--target", str(RAY_FOLDER), RAY]
    subprocess.run(uv, check=True)


if __name__ == "__main__":
    main()
