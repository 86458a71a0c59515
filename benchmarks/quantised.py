"""What updates in 8 bits cost in accuracy: `python -m benchmarks.quantised [--json FILE] [--seeds 3]`.

OULAD (examples/study_coach), with the settings that the example declares: the same cohorts, rows, coins and noise with
updates as float32 and as int8, at epsilon 2 and without noise. Takes some minutes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.accuracy import prepare_oulad
from hybrid.federation.training import train

EPSILONS = (2.0, math.inf)
Row = dict[str, Any]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        rows, figures = quantised_auc_loss(arguments.seeds, Path(folder))
    measure.show("Test rows of OULAD (oracle: measured on pooled data)", rows, figures)
    measure.write(arguments.json, rows, figures)


def quantised_auc_loss(seeds: int, folder: Path, data: Path | None = None) -> tuple[list[Row], dict[str, float]]:
    """AUC of float32 minus AUC of int8, means over seeds.

    Args:
        seeds: how many.
        folder: for the files between.
        data: another table than the one that the example ships.

    Returns:
        One row a training, and the figures "quantised_auc_loss", at epsilon 2, and "quantised_auc_loss_eps_inf".
    """
    split, _, _ = prepare_oulad(data, folder)
    rows: list[Row] = []
    for epsilon in EPSILONS:
        for seed in range(seeds):
            for upload in ("float32", "int8"):
                run = folder / f"run-{epsilon:g}-{seed}-{upload}"
                settings = split.model.training.model_copy(update={"upload": upload})
                kind: Any = {"kind": "noiseless"} if epsilon == math.inf else {"epsilon": epsilon}
                begun = time.perf_counter()
                trained = train(split.model, split.train, split.test, seed=seed, run_dir=run, settings=settings, **kind)
                row = {"epsilon": epsilon, "seed": seed, "upload": upload, "AUC": trained.record.oracle["auc"]}
                rows.append(row | {"seconds": time.perf_counter() - begun})
    two, infinite = (_loss(rows, epsilon) for epsilon in EPSILONS)
    return rows, {"quantised_auc_loss": two, "quantised_auc_loss_eps_inf": infinite}


def _loss(rows: list[Row], epsilon: float) -> float:
    mean = {
        upload: float(np.mean([row["AUC"] for row in rows if (row["epsilon"], row["upload"]) == (epsilon, upload)]))
        for upload in ("float32", "int8")
    }
    return mean["float32"] - mean["int8"]


if __name__ == "__main__":
    main()
