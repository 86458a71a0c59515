"""Writes what a team would have before it starts: `python -m examples.coupon.prepare population`, then `offers`.

population  examples/coupon/data/population.parquet, for `hybrid population import`
offers      examples/coupon/data/offers.parquet, the Feast source: each offer's
            acceptance rate among the users who are not held out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.coupon import survey
from hybrid.cli import command_line
from hybrid.federation.population import Population, parse_fold
from hybrid.workspace import Workspace

POPULATION = survey.DATA / "population.parquet"
OFFERS = survey.DATA / "offers.parquet"


def write_population(target: Path = POPULATION) -> Path:
    """The survey with its `user` and `offer_id` columns."""
    survey.load().to_parquet(target, index=False)
    return target


def write_offers(population: Population, users: NDArray[np.bool_], target: Path = OFFERS) -> Path:
    """The offers' table, with acceptance rates among some users only.

    Args:
        population: the imported survey.
        users: (users,) whose answers count: training users, so that no held-out label comes back as a feature.
        target: the Parquet file.
    """
    known = np.repeat(users, np.diff(population.offsets))
    columns = {name: population.column(name)[known] for name in ("offer_id", "coupon", "expiration", "Y")}
    target.parent.mkdir(parents=True, exist_ok=True)
    survey.offers(pd.DataFrame(columns)).to_parquet(target, index=False)
    return target


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["population", "offers"])
    parser.add_argument("--fold", default="1/5", help="K/N: the users held out of the rates (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.what == "population":
        print(f"wrote {write_population()}")
        return
    population = Population.open("coupon", Workspace.current())
    print(f"wrote {write_offers(population, ~population.fold(*parse_fold(arguments.fold)))}")


if __name__ == "__main__":
    with command_line():
        main()
