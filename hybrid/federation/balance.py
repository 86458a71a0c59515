"""Label balance: what devices sample their examples by, and what takes predictions back to everybody's.

Where one label is rare, most examples say the same. Devices then train with all of the rare one's and with some of the
other's, drawn anew in each participation; the head learns the odds of what is drawn. What it says is taken back by a
shift of its logits: first by what the sampling does to odds, then by how far predictions are still off, since clipped
and averaged updates do not end where the loss does. See docs/decisions/0029.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from hybrid.analytics.asking import PRIOR, RECALIBRATE, Answer, Ask, Exact, People, Simulated, phase
from hybrid.federation.engine import predict
from hybrid.federation.population import Examples
from hybrid.files import write_whole
from hybrid.network import Network
from hybrid.privacy.accountant import Event, noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.query import Labels, Query, Residuals
from hybrid.spec import HybridModel, Training, definition_hash
from hybrid.version import Balance

FILE = "balance.json"
EPSILON_SHARE = 0.25  # of the budget, by default: some 6 % of its square
PRIOR_SHARE = 0.2  # of what is asked, as 1 / z^2: a prior that is off by a tenth costs no calibration
CLIP = 4.0  # rows: few people's labels or residuals add up to more, and of who has more all count for less alike
MOST_REST = 3.0  # nats beside the analytic shift: more is noise
REST_SD = 1.0  # nats that the rest may well be: what is less sure than that is drawn to 0


def keep_for(prior: float, balance: float) -> tuple[float, float]:
    """Probabilities to keep an example with the label 0, and with the label 1: one of them is 1.

    Args:
        prior: share of positives among all, in (0, 1).
        balance: share of positives among what is kept, in (0, 1).

    >>> keep_for(0.2, 0.5), keep_for(0.75, 0.5)
    ((0.25, 1.0), (1.0, 0.3333333333333333))
    """
    ratio = prior / (1 - prior) * (1 - balance) / balance
    return (ratio, 1.0) if ratio <= 1 else (1.0, 1 / ratio)


def analytic_shift(keep: tuple[float, float]) -> float:
    """What takes logits of sampled examples to those of all, in nats: log(keep_0 / keep_1).

    Source:
        King and Zeng, Political Analysis 2001, section 4.1 (prior correction).
    """
    return math.log(keep[0] / keep[1])


def prior_query(rows: int) -> Query:
    """How many labels are 0 and 1."""
    return Query(parts=(Labels(),), rows=rows, clip=CLIP)


def prior_of(answer: Answer) -> float:
    """Share of positives, in (0, 1): a count that the noise swallows is taken to be as large as it."""
    negatives, positives = np.maximum(answer.counts[0], max(answer.sd, 0.5)).tolist()
    return float(positives / (negatives + positives))


def residuals_query(rows: int) -> Query:
    """How far predictions are off, in the large."""
    return Query(parts=(Residuals(),), rows=rows, clip=CLIP)


def rest_of(answer: Answer) -> float | None:
    """The shift of all logits with which predictions add up to as many positives as there are.

    By the parabola in the logarithm of that sum through its values at -1, 0 and 1, which is
    within 0.5 % of it there, and within 5 % up to 2 nats, however scores spread. What
    is found is drawn to 0 by as much as it is uncertain.

    Args:
        answer: of `residuals_query`.

    Returns:
        In nats, `MOST_REST` at most either way; None: no such shift, the noise left no sense.
    """
    residual, lower, same, higher = map(float, answer.counts[0])
    if min(lower, same, higher, same + residual) <= 0:
        return None
    low, middle, high = map(math.log, (lower, same, higher))
    gap, slope, bend = math.log(same + residual) - middle, (high - low) / 2, (low + high) / 2 - middle
    root = slope**2 + 4 * bend * gap
    if slope <= 0 or root < 0:
        return None
    rest = 2 * gap / (slope + math.sqrt(root))
    if abs(rest) > MOST_REST:
        return None
    return rest * REST_SD**2 / (REST_SD**2 + (answer.sd / (same * slope)) ** 2)


@dataclass
class Balancing:
    """What one training asks of its people for its balance, and what came of it: kept in the run's folder.

    What was released is read when the training goes on, never asked again. What was
    paid for and lost, the process being killed between the two, is asked again where
    nothing goes on without it (the prior), and given up where something does (the rest of the shift).

    Attributes:
        folder: of the run.
        config: hash of the run's config: what is there of another training is not this one's.
        target: share of positives to train with.
        epsilon: of both questions together; None: nothing is noised or charged.
        prior_known: whether the server knows the labels: the prior is exact and costs nothing.
        prior, rest: what was released so far.
        asked: whether the rest was, with an answer or without.
        before: entries of it in the ledger before that.
    """

    folder: Path
    config: str
    target: float
    epsilon: float | None
    prior_known: bool
    prior: float | None = None
    rest: float | None = None
    asked: bool = False
    before: int | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        settings: Training,
        model: HybridModel,
        *,
        budget: float | None,
        ledger: Ledger | None,
        resumed: bool,
    ) -> Self | None:
        """As a training begins, or goes on; None: it is not balanced.

        Args:
            folder: of the run.
            config: of the training.
            settings: likewise.
            model: whose label it is.
            budget: epsilon of everything; None: an oracle.
            ledger: that pays; None: an oracle.
            resumed: whether it goes on.
        """
        if settings.balance is None:
            return None
        epsilon = settings.balance_epsilon
        if budget is not None and epsilon is None:
            epsilon = EPSILON_SHARE * budget
        known = budget is None or model.label.visible_to == "server"
        new = cls(folder, definition_hash(config), settings.balance, None if budget is None else epsilon, known)
        try:
            kept = json.loads((folder / FILE).read_text()) if resumed else {}
        except FileNotFoundError:
            kept = {}
        if kept.pop("config", None) != new.config:
            return new
        found = replace(new, **kept)
        lost = ledger is not None and found.before is not None and _paid(ledger) > found.before
        return replace(found, asked=found.asked or lost)

    @property
    def keep(self) -> tuple[float, float]:
        """See `keep_for`."""
        assert self.prior is not None
        return keep_for(self.prior, self.target)

    @property
    def record(self) -> Balance:
        """For the training record."""
        assert self.prior is not None
        return Balance(
            prior=self.prior,
            prior_exact=self.prior_known,
            keep=self.keep,
            analytic=analytic_shift(self.keep),
            estimated=self.rest,
        )

    def due(self, delta: float) -> list[Event]:
        """What is still to be released, for the ledger to set aside.

        Args:
            delta: of the ledger.
        """
        if self.epsilon is None:
            return []
        whole = noise_multiplier_for(self.epsilon, delta, 1.0, 1)
        before: list[Event] = [] if self.prior_known or self.prior is not None else [phase(whole, PRIOR_SHARE)]
        return before if self.asked else [*before, phase(whole, self._rest_share)]

    @property
    def _rest_share(self) -> float:
        return 1.0 if self.prior_known else 1 - PRIOR_SHARE

    def ask_prior(self, network: Network, examples: Examples, ledger: Ledger | None, seed: int) -> None:
        """How often the label is 1, where it is not known yet; sets the network's correction to the analytic shift.

        Raises:
            BudgetExceeded: the ledger has not enough left.
        """
        if self.prior is None:
            people = People({"label": examples.labels}, examples.offsets)
            ask = self._ask(people, None if self.prior_known else ledger, PRIOR, seed)
            share = 1.0 if self.prior_known else PRIOR_SHARE
            self.prior = prior_of(ask(prior_query(_rows(network)), share=share))
            self._write()
        network.correction.set_shift(analytic_shift(self.keep))

    def ask_rest(self, network: Network, examples: Examples, ledger: Ledger | None, seed: int) -> None:
        """How far predictions of the trained network are off, where it is not known yet; corrects it by that.

        Raises:
            BudgetExceeded: the ledger has not enough left.
        """
        assert self.prior is not None
        analytic = analytic_shift(self.keep)
        network.correction.set_shift(analytic)
        if not self.asked:
            people = People({"label": examples.labels, "score": predict(network, examples)}, examples.offsets)
            ask = self._ask(people, ledger, RECALIBRATE, seed)
            self.before = None if ledger is None else _paid(ledger)
            self._write()
            self.rest = rest_of(ask(residuals_query(_rows(network)), share=self._rest_share))
            self.asked = True
            self._write()
        network.correction.set_shift(analytic + (self.rest or 0.0))

    def _ask(self, people: People, ledger: Ledger | None, purpose: str, seed: int) -> Ask:
        if ledger is None or self.epsilon is None:
            return Exact(people)
        return Simulated(people, ledger, purpose=purpose, epsilon=self.epsilon, seed=seed)

    def _write(self) -> None:
        """All or nothing, and on the disk."""
        kept = {name: getattr(self, name) for name in ("config", "prior", "rest", "asked", "before")}
        write_whole(self.folder / FILE, json.dumps(kept).encode())


def _paid(ledger: Ledger) -> int:
    return sum(entry.purpose == RECALIBRATE for entry in ledger.entries)


def _rows(network: Network) -> int:
    """Of a person, at most: those that a device may train with."""
    return network.model.on_device.max_examples
