"""An aggregator's process that is made to be killed: rounds of some seconds, one after another.

`python aggregator_process.py FOLDER PORT` goes on where the last one ended, by what `released.jsonl` says of it; with
`flushes` behind it asynchronously, with correlated noise; with `queries`, it asks one query after another.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from hybrid.analytics.asking import ANALYZE
from hybrid.analytics.fleet import FleetAsk
from hybrid.bundle import signing_key
from hybrid.federation.aggregator import Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.checkin import listening
from hybrid.federation.fleet_aggregator import FleetAggregator, Task
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import optimised
from hybrid.query import Histogram, Query

SETTINGS = Round(sampling=1.0, clip=0.5, noise_multiplier=1.0, minimum=0)
BUFFER, SEPARATION = Buffer(updates=2, oldest=1), 2
QUERY = Query(parts=(Histogram(column="steps", edges=(1000.0, 5000.0, 10_000.0)),), rows=8)
FLUSHES = replace(SETTINGS, matrix=optimised("banded", 1000, SEPARATION))


def main(folder: Path, port: int, *instead: str) -> None:
    """Writes each round's sum once it is out, as who holds the weights, or asks, would."""
    task = Task.model_validate_json((folder / "task.json").read_bytes())
    flat = np.load(folder / "weights.npy")
    with (
        Ledger.open(folder / "run", budget_epsilon=1e6, delta=1e-4) as ledger,
        (folder / "released.jsonl").open("a") as released,
    ):
        key = signing_key(folder / "keys")
        if instead == ("flushes",):
            state = folder / "noise.state"
            aggregator = FleetAggregator(task, FLUSHES, ledger, key, noise_state=state, buffer=BUFFER)
        else:
            ledger.reserve([replace(SETTINGS.event, count=100)])
            aggregator = FleetAggregator(task, SETTINGS, ledger, key)
        with listening(aggregator, port=port):
            number = len((folder / "released.jsonl").read_text().splitlines()) + 1
            print("ready", flush=True)
            while True:
                if instead == ("queries",):
                    answer = FleetAsk(aggregator, purpose=ANALYZE, epsilon=1.0)(QUERY)
                    number = ledger.entries[-1].round
                    line = {"round": number, "received": answer.people, "sum": answer.total.tolist()}
                else:
                    release = aggregator.run_round(number, flat)
                    line = {"round": number, "received": release.received, "sum": release.sum[:4].tolist()}
                line["step"] = getattr(ledger.entries[-1], "step", None)
                released.write(json.dumps(line) + "\n")
                released.flush()
                os.fsync(released.fileno())
                number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
