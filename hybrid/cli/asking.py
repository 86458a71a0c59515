"""What the commands that ask people share: whose rows, which ledger pays, how an answer is kept and shown."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from hybrid.analytics.results import readable
from hybrid.cli.runs import check_types, progress_bar, run_folder, server_slots
from hybrid.errors import BadRequest, BudgetExceeded, ConfigError

if TYPE_CHECKING:
    from hybrid.analytics.asking import Ask, People
    from hybrid.analytics.estimates import Estimate
    from hybrid.federation.population import Population
    from hybrid.local.devices import People as Devices
    from hybrid.local.fleet import Promoted
    from hybrid.privacy.accountant import Event
    from hybrid.privacy.ledger import Ledger
    from hybrid.spec import HybridModel
    from hybrid.workspace import Workspace

PER_RUN = "per run: what other runs asked is not composed"
SEEDED = f"the noise is seeded, and can be removed by whoever knows the seed (it is in the run's folder); {PER_RUN}"
ONE_ANSWER = f"no device answers a question twice, which nothing enforces without tokens; {PER_RUN}"
ONE_TOKEN = (
    f"no account answers a question twice, whatever devices it has: the issuer of tokens sees to that; {PER_RUN}"
)
MECHANISM = "Gaussian noise on sums of clipped contributions, zero-out adjacency"
NOISE = "noise: 95 %, for the exact value on these {people:,} people; only the mechanism's noise is in it"
FULL = "full: 95 %, for the population that they are a sample of, person by person"
ALIKE = "; rows of a person are taken to be alike, so it is rather too wide"


PaidBy = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Run under runs/ whose ledger pays; by default a new one, a new budget."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of the noise, to repeat a run; by default the operating system's.")
]
DevicesOf = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Ask real devices on this machine, in place of a simulation: the first N people's."
    ),
]
RoundS = Annotated[
    float | None, typer.Option(min=1, help="With --devices: seconds for which each query is open; 30 by default.")
]
TokensOf = Annotated[
    bool,
    typer.Option("--tokens", help="With --devices: an issuer, started for it, gives each person one token a query."),
]
ROUND_S = 30.0


@dataclass(frozen=True)
class Whom(ABC):
    """Who is asked.

    Attributes:
        population: name of the people.
        seed: of the noise; None: it is the operating system's.
    """

    population: str
    seed: int | None

    @property
    @abstractmethod
    def assumes(self) -> str:
        """What an epsilon relies on, as a sentence."""

    @property
    def unit(self) -> str | None:
        """That an epsilon is of; None: the one that the model declares."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """How many people."""

    @abstractmethod
    def asking(self, ledger: Ledger, spending: Spending) -> AbstractContextManager[Ask]:
        """They can be asked within the block; the ledger pays."""


@dataclass(frozen=True)
class InProcess(Whom):
    """People of a population, whose devices are simulated: see `Whom`.

    Attributes:
        people: their rows.
    """

    people: People

    @property
    def assumes(self) -> str:
        """See `Whom`."""
        return PER_RUN if self.seed is None else SEEDED

    def __len__(self) -> int:
        return len(self.people)

    def asking(self, ledger: Ledger, spending: Spending) -> AbstractContextManager[Ask]:
        """See `Whom`."""
        from hybrid.analytics.asking import Simulated

        purpose, epsilon = spending.purpose, spending.epsilon
        return nullcontext(Simulated(self.people, ledger, purpose=purpose, epsilon=epsilon, seed=self.seed))


@dataclass(frozen=True)
class OnDevices(Whom):
    """People of a population, each with a real device on this machine: see `Whom`.

    Attributes:
        promoted: the version that the devices have.
        people: what they hold.
        round_s: how long each query is open.
        keys: folder of the control plane's signing key.
        tokens: whether each person's answers need a token, of which there is one a query.
    """

    promoted: Promoted
    people: Devices
    round_s: float
    keys: Path
    tokens: bool = False

    @property
    def assumes(self) -> str:
        """See `Whom`."""
        return ONE_TOKEN if self.tokens else ONE_ANSWER

    @property
    def unit(self) -> str:
        """See `Whom`."""
        return "user" if self.tokens else "device"

    @classmethod
    def of(
        cls,
        version: tuple[str, str | int],
        population: Population,
        workspace: Workspace,
        *,
        devices: int,
        round_s: float,
        tokens: bool,
        among: NDArray[np.bool_] | None,
    ) -> OnDevices:
        """The first people's devices, with a promoted version.

        Args:
            version: name of the model, and a number, also as text, or an alias.
            population: whose rows they hold.
            workspace: where the version was promoted.
            devices: how many.
            round_s: how long each query is open.
            tokens: see the attribute.
            among: (users,) whom they are taken of; None: of all.

        Raises:
            NotFound: there is no such version.
            ConfigError: it was not promoted for devices, or there are too few people; the message says it.
        """
        from hybrid.local.fleet import Promoted

        promoted = Promoted.open(*version, workspace)
        people = promoted.people(population.name, devices, workspace, among=among)
        return cls(population.name, None, promoted, people, round_s, workspace.keys, tokens)

    def __len__(self) -> int:
        return self.people.users

    @contextmanager
    def asking(self, ledger: Ledger, spending: Spending) -> Iterator[Ask]:
        """See `Whom`."""
        from hybrid.analytics.fleet import FleetAsk
        from hybrid.local.fleet import asking

        with (
            progress_bar(f"asking {len(self)} devices, {self.round_s:g} s a query"),
            asking(
                self.promoted, self.people, ledger, self.keys, round_s=self.round_s, tokens=self.tokens
            ) as aggregator,
        ):
            yield FleetAsk(aggregator, purpose=spending.purpose, epsilon=spending.epsilon)


@dataclass(frozen=True)
class Paying:
    """One question, and the run whose ledger pays for it.

    Attributes:
        model, purpose, whom: what is asked, of whom.
        folder: of the run.
        ledger: its, open.
        ask: the people.
        before: releases in the ledger before this question.
    """

    model: HybridModel
    purpose: str
    whom: Whom
    folder: Path
    ledger: Ledger
    ask: Ask
    before: int

    @property
    def unit(self) -> str:
        """That an epsilon is of."""
        return self.whom.unit or self.model.privacy.unit

    def begin(self, shares: Sequence[float]) -> None:
        """Sets aside what all phases cost; a run that nobody described yet is described.

        Raises:
            BudgetExceeded: the ledger has not enough left. No file is changed.
        """
        from hybrid.analytics.results import describe

        self.ask.begin(shares)
        about = {"population": self.whom.population, "seed": self.whom.seed, "assumption": self.whom.assumes}
        claim = {"unit": self.unit, "protects": self.model.protects}
        describe(self.folder, self.model.name, self.purpose, **about, **claim)

    def spend(self) -> dict[str, Any]:
        """What this question cost, and what its run has left."""
        from hybrid.privacy.accountant import epsilon
        from hybrid.privacy.ledger import costs

        ledger, entries = self.ledger, self.ledger.entries[self.before :]
        this, spent = epsilon(costs(entries), ledger.delta), ledger.spent()
        return {
            "epsilon": this.epsilon,
            "delta": ledger.delta,
            "unit": self.unit,
            "protects": self.model.protects,
            "mechanism": f"{MECHANISM}; accountant: {this.method}",
            "assumption": self.whom.assumes,
            "purpose": self.purpose,
            "releases": len(entries),
            "run": self.folder.name,
            "spent": spent.epsilon,
            "budget_epsilon": ledger.budget_epsilon,
            "left": max(0.0, ledger.budget_epsilon - spent.epsilon),
        }

    def keep(self, shown: Mapping[str, Any]) -> Path:
        """Writes the answer into the run's folder, where reports find it."""
        from hybrid.analytics.results import keep

        return keep(self.folder, self.purpose, shown, mark="noised")


@dataclass(frozen=True)
class Spending:
    """How a question is paid for.

    Attributes:
        purpose: of the ledger's entries.
        epsilon: of the question, all its phases together.
        run: name of the run whose ledger pays; None: a new one, with the budget that the model declares.
    """

    purpose: str
    epsilon: float
    run: str | None


@contextmanager
def paying(model: HybridModel, workspace: Workspace, whom: Whom, spending: Spending) -> Iterator[Paying]:
    """A question to people, which a run's ledger pays for.

    Args:
        model: whose budget it is.
        workspace: with the runs.
        whom: who are asked.
        spending: how much, and from which run.

    Raises:
        BudgetExceeded: the run has not enough left; the message says what it has.
        ConfigError: epsilon is out of range, or delta too large for so many people.
    """
    from hybrid.federation.noise import check_delta
    from hybrid.privacy.ledger import Ledger

    check_epsilon(model, spending.epsilon)
    check_delta(model, len(whom))
    new = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model.name}-{spending.purpose}"
    with run_folder(workspace.runs, spending.run, new) as folder:
        budget = _budget(folder, model.privacy.epsilon)
        with Ledger.open(folder, budget_epsilon=budget, delta=model.privacy.delta) as ledger:
            try:
                with whom.asking(ledger, spending) as ask:
                    yield Paying(model, spending.purpose, whom, folder, ledger, ask, len(ledger.entries))
            except BudgetExceeded as error:
                raise BudgetExceeded(f"{error}; {_left(folder)}") from None


def keep_free(workspace: Workspace, model: str, run: str | None, kind: str, shown: Mapping[str, Any]) -> None:
    """Keeps an answer that cost nothing, since the server knows it anyway; without a run in the folder of all such."""
    from hybrid.analytics.results import keep

    with run_folder(workspace.runs, run or f"{model}-public", "") as folder:
        keep(folder, kind, shown, mark="public")


def check_devices(devices: int | None, seed: int | None, round_s: float | None, tokens: bool) -> None:
    """Raises: ConfigError: an option is given that does nothing."""
    if devices is not None and seed is not None:
        raise ConfigError(f"--seed must be left out with --devices: noise is the operating system's, got {seed}")
    if devices is None and round_s is not None:
        raise ConfigError(f"--round-s must be left out without --devices, got {round_s:g}")
    if devices is None and tokens:
        raise ConfigError("--tokens must be left out without --devices: a simulation asks each person once")


def check_epsilon(model: HybridModel, epsilon: float) -> None:
    """Raises: ConfigError: it is not > 0, or more than the model declares for all of a run."""
    declared = model.privacy.epsilon
    if not 0 < epsilon <= declared:
        raise ConfigError(
            f"--epsilon must be > 0 and at most the {declared:g} that {model.name!r} declares, got {epsilon:g}"
        )


def columns_of(
    model: HybridModel, population: Population, names: Sequence[str], workspace: Workspace
) -> dict[str, NDArray[Any]]:
    """Raw values of features and of the label, by name, each (n,), as devices and the server have them.

    Args:
        model: that declares them.
        population: whose rows.
        names: request, device or categorical server features, or "label".
        workspace: with the feature store.

    Raises:
        ConfigError: a column is absent or of the wrong type.
        NotFound: some rows have no server features at their time.
    """
    from hybrid.federation.population import labels_of
    from hybrid.query import LABEL

    found: dict[str, NDArray[Any]] = {}
    raw = {**model.request, **model.device}
    for name in names:
        if name == LABEL:
            values, known = labels_of(model.label, population)
            found[name] = np.where(known, values, np.nan)
        elif name in raw:
            found[name] = population.column(name)
            try:
                check_types(raw[name], found[name])
            except BadRequest as error:
                raise ConfigError(f"population {population.name!r}: feature {name!r} {error}") from None
        else:
            found[name] = _server_text(model, population, name, workspace)
    return found


def _server_text(model: HybridModel, population: Population, name: str, workspace: Workspace) -> NDArray[np.object_]:
    """(n,) a categorical server feature as it was at each row's time; None where it is not of the vocabulary."""
    slots = server_slots(model, population, workspace)
    transform = model.server.features.transforms[name]
    words = np.array([*transform.model_dump()["vocabulary"], None, None], dtype=object)
    return np.asarray(words[slots[:, model.server.features.names.index(name)].astype(np.int64)])


def _budget(folder: Path, declared: float) -> float:
    """Of the run's ledger, or, where it has none yet, as declared."""
    from hybrid.errors import NotFound
    from hybrid.privacy.ledger import Ledger

    try:
        return Ledger.read(folder).budget_epsilon
    except NotFound:
        return declared


def _left(folder: Path) -> str:
    """What a run has left, and what still fits: epsilons do not add up, so that is more than the difference."""
    from hybrid.privacy.ledger import Ledger

    account = Ledger.read(folder)
    spent, budget = account.spent().epsilon, account.budget_epsilon
    left = f"run {folder.name!r} has epsilon {max(0.0, budget - spent):.3g} left of {budget:g}"
    fits = _fits(account.events(), budget, account.delta)
    return f"{left}: " + (
        f"one question of {fits:.3f} fits (epsilons do not add up)" if fits else "no further question fits"
    )


def _fits(besides: Sequence[Event], budget: float, delta: float) -> float:
    """The largest epsilon, to three digits after the point, of one question that a budget still allows."""
    from hybrid.privacy.accountant import noise_multiplier_for
    from hybrid.privacy.mechanisms import gaussian_epsilon

    try:
        multiplier = noise_multiplier_for(budget, delta, 1.0, 1, besides=besides)
    except BudgetExceeded:
        return 0.0
    return math.floor(1000 * gaussian_epsilon(1 / multiplier, delta)) / 1000


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """A number and its intervals; None for what there is not."""
    full = estimate.full
    return {
        "value": _number(estimate.value),
        "noise": [_number(estimate.noise.low), _number(estimate.noise.high)],
        "full": None if full is None else [_number(full.low), _number(full.high)],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def spend_lines(spend: Mapping[str, Any] | None, exact: str) -> Iterator[str]:
    """What was spent, in words; `exact` is why nothing was."""
    if spend is None:
        yield f"spent: nothing; {exact}"
        return
    yield (
        f"spent: epsilon {spend['epsilon']:.4g} at delta {spend['delta']:g} per {spend['unit']}; protects the "
        f"{spend['protects']}"
    )
    releases = "one release" if spend["releases"] == 1 else f"{spend['releases']} releases"
    yield f"  {spend['mechanism']}; {releases}, everybody in each"
    yield (
        f"  ledger of run {spend['run']}: {spend['spent']:.4g} spent of {spend['budget_epsilon']:g}, "
        f"{spend['left']:.4g} left"
    )
    yield f"  assumes: {spend['assumption']}"


def interval(ends: Sequence[float | None] | None, say: Callable[[float], str] = readable) -> str:
    """Of 95 %, as it is printed."""
    known = [end for end in ends or () if end is not None]
    return " to ".join(map(say, known)) if len(known) == 2 else "-"


def bar(estimate: Mapping[str, Any], most: float, width: int = 24) -> str:
    """A value as a bar with its noise interval: full up to the lower end, hatched up to the value, a line beyond.

    >>> bar({"value": 0.5, "noise": [0.25, 0.75]}, 1.0, 8)
    '██▒▒─┤'
    """
    if estimate["value"] is None or not most > 0:
        return ""
    ends: tuple[float, ...] = (estimate["noise"][0], estimate["value"], estimate["noise"][1])
    low, value, high = (round(width * min(max(end, 0.0), most) / most) for end in ends)
    solid = "█" * low + "▒" * (value - low)
    return solid if high <= value else solid + "─" * (high - value - 1) + "┤"
