"""`hybrid analyze`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.answers import draw, show
from hybrid.cli.asking import (
    ROUND_S,
    DevicesOf,
    InProcess,
    OnDevices,
    PaidBy,
    RoundS,
    Seed,
    Spending,
    TokensOf,
    Whom,
    check_devices,
    check_epsilon,
    columns_of,
    estimate_json,
    keep_free,
    paying,
)
from hybrid.cli.runs import PRODUCTION, check_plot
from hybrid.errors import ConfigError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.analytics.asking import Ask
    from hybrid.analytics.questions import Asked, Binned, Counts, Numbers, Scale
    from hybrid.features import Transform
    from hybrid.spec import HybridModel

app = typer.Typer()

COUNTED = {"text": "each value", "label": "how often it is 1"}
NUMBERS_SHARES = (0.75, 0.25)  # of moments and histogram: both have the noise that they had as one vector


class Take(StrEnum):
    """Which rows of a person with more than are asked for."""

    LAST = "last"
    FIRST = "first"


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    feature: Annotated[str, typer.Argument(help="One of its device or request features, or `label`.")],
    *,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy to spend; without need where the server knows the answer anyway.")
    ] = None,
    quantiles: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, max=100, help="Cut people's values into N equal parts: N - 1 quantiles."),
    ] = None,
    quantile: Annotated[
        list[float] | None, typer.Option(help="A level in (0, 1), e.g. 0.5; may be given several times.")
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=512, help="Of a histogram from --low to --high; 10 by default."),
    ] = None,
    edges: Annotated[str | None, typer.Option(metavar="A,B,...", help="Of its bins, ascending.")] = None,
    frequent: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1000, help="Of text: the N most frequent values, declared or not."),
    ] = None,
    adaptive: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, max=512, help="N bins of about as many rows each; finding them costs 30 %."),
    ] = None,
    low: Annotated[float | None, typer.Option(help="Least value; by default from the declaration.")] = None,
    high: Annotated[float | None, typer.Option(help="Largest value; by default from the declaration.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Groups: a request or server feature with a vocabulary.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Of a person, at most: noise grows with it.")] = 1,
    take: Annotated[Take, typer.Option(help="Which rows, where a person has more.")] = Take.LAST,
    population: Annotated[
        str | None, typer.Option(help="Whom to ask; by default the population of the model's name.")
    ] = None,
    fold: Annotated[
        str | None, typer.Option(metavar="K/N", help="Leave out the users of one fold of N, as `hybrid train` does.")
    ] = None,
    run: PaidBy = None,
    seed: Seed = None,
    devices: DevicesOf = None,
    round_s: RoundS = None,
    tokens: TokensOf = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the answer, into an .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Asks people's devices about a feature or the label, and sees one noised sum: nobody's value.

    A number is answered with count, sum, mean, variance and a histogram; with
    --quantiles by quantiles, and a histogram that comes with them; text by how often
    each value of its vocabulary occurs, or, with --frequent, by those that many people
    have, whether anybody knew of them or not; `label` by its rate. Each device adds at
    most --rows of its rows, each as one count in its bin; the sum is noised, and
    paid for by the ledger of a run before the noise is drawn. A question that would
    pass the run's budget is refused, and nothing is spent.

    Every number has two intervals of 95 %: "noise" is for the exact value on the
    people asked, "full" for the population that they are a sample of.

    What the server knows anyway, request features and a label that it sees, is
    counted exactly, and costs nothing.

    With --devices nothing is simulated but the people: each has an encrypted store and
    the production version's bundle, checks in with an aggregator and answers its signed plan.

    Example: hybrid analyze coupon temperature --quantiles 5 --epsilon 0.2

    Example: hybrid analyze study_coach label --by assessment_type --epsilon 0.5 --run monday

    Example: hybrid analyze coupon temperature --epsilon 4 --devices 200
    """
    check_plot(plot)
    check_devices(devices, seed, round_s, tokens)
    from hybrid.analytics.asking import ANALYZE, Exact, People
    from hybrid.analytics.questions import Asked, by_of
    from hybrid.federation.population import Population, parse_fold
    from hybrid.registry import Registry

    workspace = Workspace.current()
    declared = Registry(workspace).load_model(model)
    asked = Asked(rows, take.value, None if by is None else by_of(declared, by))
    options = _Options(_levels(quantiles, quantile), bins, _edges(edges), adaptive, low, high)
    _check_frequent(frequent, asked)
    free = known_to_server(declared, feature)
    if not free:
        check_epsilon(declared, _given(epsilon, feature))
    plan = planned(declared, feature, options, asked, frequent)
    people_in = Population.open(population or model, workspace)
    kept = None if fold is None else ~people_in.fold(*parse_fold(fold))
    whom: Whom
    if devices is not None:
        _check_answerable(declared, feature, free, by)
        version, open_s = (model, PRODUCTION), round_s or ROUND_S
        whom = OnDevices.of(version, people_in, workspace, devices=devices, round_s=open_s, tokens=tokens, among=kept)
    else:
        names = [feature] if by is None else [feature, by]
        people = People(columns_of(declared, people_in, names, workspace), people_in.offsets)
        whom = InProcess(people_in.name, seed, people if kept is None else people.of(kept))
    shown = {
        "model": model,
        "feature": feature,
        "population": people_in.name,
        "fold": fold,
        "people": len(whom),
        "devices": devices is not None,
        "rows_a_person": rows,
        "take": take.value,
        "by": by,
        "seed": whom.seed,
        **plan.about,
    }
    if isinstance(whom, InProcess) and free:
        shown |= {"exact": True, **plan.ask(Exact(whom.people)), "spend": None}
        keep_free(workspace, model, run, ANALYZE, shown)
    else:
        with paying(declared, workspace, whom, Spending(ANALYZE, _given(epsilon, feature), run)) as question:
            question.begin(plan.shares)
            shown |= {"exact": False, **plan.ask(question.ask), "spend": question.spend()}
            shown["people"] = question.ask.answered
            question.keep(shown)
    if plot is not None:
        draw(plot, shown)
    if as_json:
        print(json.dumps(shown))
    else:
        show(shown)


@dataclass(frozen=True)
class _Options:
    """How a number is asked about, as given; None was not."""

    levels: tuple[float, ...] | None
    bins: int | None
    edges: tuple[float, ...] | None
    adaptive: int | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Plan:
    """A question, checked before anything is read or paid.

    Attributes:
        shares: of its phases.
        ask: asks it; the answer as JSON values.
        about: what it is, as JSON values.
    """

    shares: tuple[float, ...]
    ask: Callable[[Ask], dict[str, Any]]
    about: dict[str, Any]


def _check_answerable(model: HybridModel, feature: str, free: bool, by: str | None) -> None:
    """Raises: ConfigError: devices need not, or cannot, answer it."""
    if free:
        raise ConfigError(f"--devices must be left out for {feature!r}: the server knows it, and asks nobody")
    if by in model.server.features.transforms:
        raise ConfigError(
            f"--by must be a request feature with --devices: no device knows {by!r} of the server's tables"
        )


def known_to_server(model: HybridModel, feature: str) -> bool:
    """Whether the server can count it without asking anybody.

    Raises:
        ConfigError: the model has no such feature, or it is one of the server's own tables.
    """
    from hybrid.query import LABEL

    if feature == LABEL:
        return model.label.visible_to == "server"
    if feature in model.server.features.transforms:
        raise ConfigError(f"{feature!r} is a server feature: it is in the server's own tables, and no device is asked")
    if feature not in {**model.request, **model.device}:
        known = ", ".join([*model.device, *model.request, LABEL])
        raise ConfigError(f"{model.name!r} has no feature {feature!r}; it has: {known}")
    return feature in model.request


def planned(model: HybridModel, feature: str, options: _Options, asked: Asked, frequent: int | None = None) -> Plan:
    """The question that a feature and its options mean.

    Raises:
        ConfigError: the feature cannot be asked about so; the message says what it must be.
    """
    from hybrid.features import Categorical
    from hybrid.query import LABEL

    if feature == LABEL:
        _no_number_options(options, "label")
        return _of_label(asked)
    transform = {**model.request, **model.device}[feature]
    if frequent is not None:
        _no_number_options(options, "text")
        return _of_frequent(feature, transform, frequent)
    if isinstance(transform, Categorical) and transform.pending:
        raise ConfigError(f"--frequent must be given for {feature!r}: its vocabulary is to be learned")
    if isinstance(transform, Categorical):
        _no_number_options(options, "text")
        return _of_text(feature, transform.vocabulary, asked)
    if transform.text:
        raise ConfigError(
            f"--frequent must be given for {feature!r}: it is hashed, so there is no declared vocabulary to count by"
        )
    return _of_number(model, feature, options, asked)


def _of_label(asked: Asked) -> Plan:
    from hybrid.analytics.questions import labels

    def ask(people: Ask) -> dict[str, Any]:
        return {"groups": [_counts_json(group) for group in labels(people, asked)]}

    return Plan((1.0,), ask, {"kind": "label", "values": ["0", "1"]})


def _of_text(feature: str, vocabulary: Sequence[str], asked: Asked) -> Plan:
    from hybrid.analytics.questions import categories, check_values
    from hybrid.query import MOST_VALUES

    def ask(people: Ask) -> dict[str, Any]:
        return {"groups": [_counts_json(group) for group in categories(people, feature, vocabulary, asked)]}

    check_values(feature, vocabulary, MOST_VALUES)
    return Plan((1.0,), ask, {"kind": "categories", "values": [*vocabulary, "any other"]})


def _of_frequent(feature: str, transform: Transform, most: int) -> Plan:
    from hybrid.analytics.questions import frequent
    from hybrid.analytics.vocabulary import phases

    if not transform.text:
        raise ConfigError(f"--frequent must be left out: it is for text, and {feature!r} is a number")

    def ask(people: Ask) -> dict[str, Any]:
        values, counts = frequent(people, feature, most)
        return {"values": values, "groups": [_counts_json(counts)]}

    return Plan(phases(), ask, {"kind": "categories"})


def _check_frequent(frequent: int | None, asked: Asked) -> None:
    if frequent is not None and (asked.rows, asked.take, asked.by) != (1, "last", None):
        raise ConfigError("--rows, --take and --by must be left out with --frequent: each person's last row counts")


def _of_number(model: HybridModel, feature: str, options: _Options, asked: Asked) -> Plan:
    from hybrid.analytics.questions import ADAPTIVE_SHARES, BINS, check_levels
    from hybrid.features import Bucketize

    _check_one_way(options)
    transform = {**model.request, **model.device}[feature]
    if options.edges is not None:
        return _of_edges(feature, options.edges, asked, "as given")
    if isinstance(transform, Bucketize) and (options.bins, options.adaptive, options.levels) == (None, None, None):
        return _of_edges(feature, transform.edges, asked, "from its declaration")
    scale, bounds = _scale(feature, transform, options)
    number = _Number(feature, scale, asked, options.bins or BINS)
    about = {"kind": "histogram", "bounds": bounds}
    if options.adaptive is not None:
        return Plan(ADAPTIVE_SHARES, partial(number.adaptive, options.adaptive), about)
    if options.levels is not None:
        check_levels(options.levels)
        return Plan((1.0,), partial(number.quantiles, options.levels), about)
    if options.bins is not None:
        return Plan((1.0,), number.histogram, about)
    return Plan(NUMBERS_SHARES, number.numbers, about)


def _check_one_way(options: _Options) -> None:
    given = [f"--{name}" for name in ("edges", "adaptive", "bins") if getattr(options, name) is not None]
    if options.levels is not None and given not in ([], ["--bins"]):
        given.append("--quantiles")
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are different questions: give one (--quantiles may have --bins)")


def _of_edges(feature: str, edges: Sequence[float], asked: Asked, source: str) -> Plan:
    from hybrid.analytics.questions import check_edges, histogram

    check_edges(edges)
    about = {"kind": "histogram", "edges_from": source}
    return Plan((1.0,), lambda people: _binned_json(histogram(people, feature, edges, asked)), about)


@dataclass(frozen=True)
class _Number:
    """Questions about a number between bounds, each answered as JSON values."""

    feature: str
    scale: Scale
    asked: Asked
    bins: int

    def histogram(self, people: Ask, share: float = 1.0) -> dict[str, Any]:
        """Of even bins."""
        from hybrid.analytics.questions import histogram

        edges = self.scale.grid(self.bins).tolist()
        return _binned_json(histogram(people, self.feature, edges, self.asked, share=share))

    def adaptive(self, bins: int, people: Ask) -> dict[str, Any]:
        """Of bins with as many rows each."""
        from hybrid.analytics.questions import adaptive_histogram

        return _binned_json(adaptive_histogram(people, self.feature, bins, self.scale, self.asked))

    def quantiles(self, levels: Sequence[float], people: Ask) -> dict[str, Any]:
        """Quantiles, and a histogram."""
        from hybrid.analytics.questions import quantiles

        found = quantiles(people, self.feature, levels, self.scale, self.asked, bins=self.bins)
        shown = _binned_json(found.histogram)
        for group, values in zip(shown["groups"], found.groups, strict=True):
            pairs = zip(levels, values, strict=True)
            group["quantiles"] = [{"level": level, **estimate_json(value)} for level, value in pairs]
        return shown

    def numbers(self, people: Ask) -> dict[str, Any]:
        """Moments, and a histogram."""
        from hybrid.analytics.questions import numbers

        first, second = NUMBERS_SHARES
        moments = numbers(people, self.feature, self.scale, self.asked, share=first)
        shown = self.histogram(people, second)
        for group, found in zip(shown["groups"], moments, strict=True):
            group["numbers"] = _numbers_json(found)
        return shown


def _scale(feature: str, transform: Any, options: _Options) -> tuple[Scale, dict[str, Any]]:
    """Between which bounds, and where they are from."""
    from hybrid.analytics.questions import Scale, scale_of

    suggested = scale_of(transform)
    low, high = options.low, options.high
    if suggested is not None:
        low, high = suggested.low if low is None else low, suggested.high if high is None else high
    if low is None or high is None:
        raise ConfigError(f"--low and --high must be given for {feature!r}: its declaration suggests no bounds")
    scale = Scale(low, high, log=suggested is not None and suggested.log)
    names = [name for name in ("low", "high") if getattr(options, name) is None]
    source = f"{' and '.join(names)} from its declaration: {_suggestion(transform)}" if names else "as given"
    return scale, {"low": low, "high": high, "scale": "log1p" if scale.log else "linear", "from": source}


def _suggestion(transform: Any) -> str:
    from hybrid.analytics.questions import WIDTHS
    from hybrid.features import Bucketize

    if isinstance(transform, Bucketize):
        return "its outer edges"
    return f"{WIDTHS:g} std on either side of its mean" if transform.low is None else "bounds for normalisation"


def _no_number_options(options: _Options, what: str) -> None:
    given = [name for name, value in vars(options).items() if value is not None]
    if given:
        said = ", ".join(f"--{'quantiles' if name == 'levels' else name}" for name in given)
        counted = f"without them, {COUNTED[what]} is counted"
        raise ConfigError(f"{said} must be left out: they are for numbers, and this is {what}; {counted}")


def _given(epsilon: float | None, feature: str) -> float:
    if epsilon is None:
        raise ConfigError(f"--epsilon must be given: {feature!r} is the devices', and asking about it spends privacy")
    return epsilon


def _levels(parts: int | None, levels: list[float] | None) -> tuple[float, ...] | None:
    if parts is not None and levels:
        raise ConfigError("--quantiles and --quantile are two ways to choose levels; give one")
    if parts is not None:
        return tuple(place / parts for place in range(1, parts))
    return tuple(sorted(set(levels))) if levels else None


def _edges(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"--edges must be numbers with commas between them, got {text!r}") from None


def _binned_json(binned: Binned) -> dict[str, Any]:
    return {"edges": list(binned.edges), "groups": [_counts_json(group) for group in binned.groups]}


def _counts_json(counts: Counts) -> dict[str, Any]:
    return {
        "group": counts.group,
        "rows": estimate_json(counts.rows),
        "missing": None if counts.missing is None else estimate_json(counts.missing),
        "counts": list(map(estimate_json, counts.cells)),
        "shares": list(map(estimate_json, counts.shares)),
    }


def _numbers_json(numbers: Numbers) -> dict[str, Any]:
    names = ("count", "sum", "mean", "variance", "std")
    return {name: estimate_json(getattr(numbers, name)) for name in names}
