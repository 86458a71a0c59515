"""A trained version of a hybrid model, and the account of how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hybrid.features import UNUSED, AnyTransform, Categorical, Log1p, Numeric
from hybrid.spec import Training


class Balance(BaseModel):
    """What a training with label balance learned, and how far its correction shifts logits, in nats.

    Attributes:
        prior: share of positives, of people who count alike; noised unless `prior_exact`.
        prior_exact: whether the server knows the labels, or nothing is private.
        keep: probabilities with which devices keep an example with the label 0, and with the label 1.
        analytic: what the sampling does to the odds, undone.
        estimated: how far predictions were still off, added to it; None: nothing that makes sense was found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prior: float
    prior_exact: bool
    keep: tuple[float, float]
    analytic: float
    estimated: float | None

    def line(self) -> str:
        """In words."""
        rest = "nothing that makes sense" if self.estimated is None else f"{self.estimated:+.3f}"
        return (
            f"label prior {self.prior:.4g} ({'exact' if self.prior_exact else 'noised'}); devices keep "
            f"{self.keep[0]:.3g} of label 0 and {self.keep[1]:.3g} of label 1; logits are shifted by "
            f"{self.analytic:+.3f}, and {rest} as estimated after the training"
        )


class Learned(BaseModel):
    """Constants of device features that a query learned, and what it cost.

    Attributes:
        transforms: by feature name, with constants as if they had been written by hand.
        users: whose rows were asked (public).
        rows: of a person, the last ones, that the query counted at most; None: all, in a reference.
        epsilon, delta: of these releases alone. None: exact, computed from pooled rows without a mechanism, as only a
            simulation can: a reference.
        run: whose ledger paid for them, and holds them in its whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transforms: dict[str, AnyTransform]
    users: int
    run: str
    rows: int | None = None
    epsilon: float | None = None
    delta: float | None = None

    @property
    def silent(self) -> tuple[str, ...]:
        """Features of whose texts none was frequent: all values are alike to them."""
        return tuple(
            name
            for name, transform in self.transforms.items()
            if isinstance(transform, Categorical) and all(text.startswith(UNUSED) for text in transform.vocabulary)
        )

    def line(self) -> str:
        """What was learned, and what for, in words."""
        names = ", ".join(self.transforms)
        if self.epsilon is None:
            return f"constants of {names}: exact, from pooled rows (oracle)"
        rows = "the last row" if self.rows == 1 else f"the last {self.rows} rows"
        spent = f"epsilon {self.epsilon:.3f} at delta {self.delta} of run {self.run}"
        return f"constants of {names}: {spent}, from {rows} of each person"


def constants_of(transform: AnyTransform) -> str:
    """What was learned of a feature, in words; places that no text was found for are not told.

    >>> constants_of(Numeric(mean=7319, std=20))
    'mean 7319, std 20'
    """
    if isinstance(transform, Categorical):
        texts = [text for text in transform.vocabulary if not text.startswith(UNUSED)]
        return ", ".join(texts) or "no text is frequent"
    assert isinstance(transform, Numeric)
    return f"mean {transform.mean:.4g}, std {transform.std:.4g}" + (" of log1p" if isinstance(transform, Log1p) else "")


class TrainingRecord(BaseModel):
    """How a version came to be, and what it cost in privacy. Stored with the version, shown wherever it is.

    Attributes:
        kind: "federated" under differential privacy, or a reference without it: "noiseless" federated
            rounds, "central" or "server-only".
        run: folder name under `runs/`.
        population: name of what it learned from.
        users: how many it learned from (public).
        examples: how many rows of them (oracle: a person's rows are counted as they are); None where only devices know.
        settings: of the training; None in records that are older than this field.
        epsilon, delta: spent by this training; None where there was no privacy mechanism.
        noise_multiplier, clip, sampling, rounds: of the mechanism; None where there was none, and where nobody is
            sampled.
        mechanism: in words, with the accountant, e.g. "Gaussian on Poisson samples, PRV accountant".
        assumption: what the claim rests on, in words.
        unit: "user" or "device".
        protects: "device features" or "device features and label"; None without a mechanism.
        balance: of a training whose devices sample examples by their label; None: they take them as they come.
        oracle: metrics computed from pooled data, in simulation only: never released from a fleet.
        learned: constants that belong to the weights; None where the model declares all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["federated", "noiseless", "central", "server-only"]
    run: str
    population: str
    users: int
    examples: int | None
    settings: Training | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    clip: float | None = None
    sampling: float | None = None
    rounds: int | None = None
    mechanism: str | None = None
    assumption: str | None = None
    unit: Literal["user", "device"] | None = None
    protects: str | None = None
    balance: Balance | None = None
    oracle: dict[str, float] = {}
    learned: Learned | None = None

    @property
    def without(self) -> Literal["device"] | None:
        """The side that such a version predicts without: the baseline has no device embedding."""
        return "device" if self.kind == "server-only" else None

    def privacy_lines(self) -> tuple[str, ...]:
        """The whole claim in words, to be printed wherever epsilon is.

        Returns:
            Epsilon with delta, unit and what it protects; the mechanism over its rounds
            and their sampling; what it rests on; what learned constants cost. One line
            where there was no mechanism.
        """
        learned = () if self.learned is None else (self.learned.line(),)
        if self.epsilon is None:
            return ("none: a reference of a simulation, trained without a mechanism", *learned)
        said = {name: "?" if value is None else value for name, value in self.model_dump().items()}
        sampling = "everybody in each" if self.sampling == 1 else "each person in each with probability {sampling}"
        if self.settings is not None and self.settings.separation is not None:
            sampling = f"each person at most once in any {self.settings.separation} of them"
        lines = (
            f"epsilon {self.epsilon:.3f} at delta {{delta}} per {{unit}}; protects the {{protects}}",
            f"{{mechanism}}; {{rounds}} rounds, {sampling}",
            "assumes: {assumption}",
        )
        return (*(line.format_map(said) for line in lines), *learned)


@dataclass(frozen=True)
class Version:
    """An immutable registered version.

    Attributes:
        model, number: its name.
        definition_hash: of the definition it was trained from.
        definition: that definition, as JSON values: its "declaration", and the "network" that its file built.
        training: how it was trained.
        weights: "part.name" -> array, as `hybrid.network.Network.weights` gives them.
        aliases: that point at it now.
    """

    model: str
    number: int
    definition_hash: str
    definition: dict[str, Any]
    training: TrainingRecord
    weights: dict[str, NDArray[np.float32]] = field(repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def learned(self) -> Mapping[str, AnyTransform]:
        """Constants that it learned, by device feature: what `HybridModel.with_learned` takes."""
        return {} if self.training.learned is None else self.training.learned.transforms
