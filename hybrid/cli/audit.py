"""The `hybrid audit` commands: membership; inversion is in a module of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hybrid.cli.inversion import inversion
from hybrid.cli.runs import check_plot, exactly, examples_of, progress_bar
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.federation.population import Examples
    from hybrid.privacy.audit import Audited, Finding
    from hybrid.spec import HybridModel

app = typer.Typer()
group = typer.Typer(help="What models and mechanisms give away, measured by attacking them.", no_args_is_help=True)
app.add_typer(group, name="audit")
group.command()(inversion)

TURNS = 3  # of a canary in the rounds of a matrix mechanism, where the model declares no separation
STEPS = 1000  # of the progress bar, for each mechanism
FOUND, BUG = "mechanisms", "planted_bugs"
NO_PROOF = (
    "A bound below the claim does not prove the claim, which the accountant does: it says that one strong adversary, "
    "who sees every release and knows everybody else's data, could not tell more."
)
ORACLE = "Oracle: seeds are known, canaries are nobody, nothing is released, and no ledger of the model's pays for it."


@group.command()
def membership(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    epsilon: Annotated[
        float | None, typer.Option(help="The claim to audit; by default, and at most, what the model declares.")
    ] = None,
    population: Annotated[
        str | None, typer.Option(help="Who trains beside the canaries; by default the population of the model's name.")
    ] = None,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Audit the model's whole training too, or mechanisms only.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Of one run of a mechanism by itself.")] = 10,
    trials: Annotated[
        int, typer.Option(min=100, help="Canaries for each mechanism; with more the bounds are tighter.")
    ] = 50_000,
    confidence: Annotated[float, typer.Option(help="That all lower bounds hold.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of coins and noise: the same seed repeats an audit.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the bounds and the claim, into an .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Guesses from releases who was in them, and says how large epsilon must be for guesses as good as these.

    An accountant says what a mechanism costs at most, if the code does what
    its proof assumes; an audit looks for code that does not. Canaries, people
    whose updates are as long as the clip lets them be, go through the real
    mechanisms with the noise that the claimed epsilon asks for; half of them
    are zeroed out. An adversary who sees every release guesses which. From how
    often the guesses are right follows a lower bound on epsilon, with
    confidence: one above the claim is a bug.

    Audited are Gaussian sums of everybody, those of sampled people, those with
    a clip that adapts, and those with noise that spans rounds; then the
    model's own training on its population, with canaries in its cohorts. Three mechanisms with planted bugs show that
    a bug would be seen: half the noise, updates weighed by their number of
    examples, and sums divided by replies.

    The exit status is 1 if a mechanism is refuted, and if a planted bug is not
    seen: such an audit says nothing, and needs more trials.

    Example: hybrid audit membership coupon --epsilon 1
    """
    check_plot(plot)
    from hybrid.network import Network
    from hybrid.registry import Registry

    workspace = Workspace.current()
    registry = Registry(workspace)
    declared = registry.load_model(model)
    Network.build(declared, seed=seed).check_registered(registry.definition(model)["network"])
    from hybrid.federation.training import check_allowed

    claimed = check_allowed(declared, "federated", epsilon, declared.training)
    assert claimed is not None
    examples = None
    if training:
        declared = exactly(declared, population or model, None, workspace)
        examples = examples_of(declared, population or model, None, workspace)[0]
    found = _audit(declared, examples, claimed, rounds, trials=trials, confidence=confidence, seed=seed)
    delta = declared.privacy.delta
    shown = {"model": model, "epsilon": claimed, "delta": delta, "confidence": confidence, "seed": seed, "oracle": True}
    shown |= {kind: [_finding_json(finding) for finding in findings] for kind, findings in found.items()}
    refuted = [finding.name for finding in found[FOUND] if finding.refuted]
    unseen = [finding.name for finding in found[BUG] if not finding.refuted]
    shown |= {"refuted": refuted, "unseen": unseen}
    if plot is not None:
        _draw(plot, model, found)
    if as_json:
        print(json.dumps(shown))
    else:
        _print(shown, found)
    if refuted or unseen:
        raise typer.Exit(1)


def mechanisms(model: HybridModel, epsilon: float, rounds: int) -> tuple[Audited, ...]:
    """Those that a training can be given, each by itself, at the model's sampling and clip."""
    from hybrid.federation.aggregator import ADAPTATION
    from hybrid.privacy.audit import adaptive, gaussian

    sampling, quantile = model.training.sampling, model.training.clip_quantile or 0.5
    claim: dict[str, Any] = {"epsilon": epsilon, "delta": model.privacy.delta, "rounds": rounds}
    clip = model.privacy.clip
    return (
        *(gaussian(**claim, sampling=share, clip=clip) for share in sorted({sampling, 1.0}, reverse=True)),
        adaptive(**claim, sampling=sampling, quantile=quantile, lr=ADAPTATION, clip=clip),
        *(_correlated(kind, model, epsilon, rounds) for kind in ("banded", "blt")),
    )


def _correlated(kind: Literal["banded", "blt"], model: HybridModel, epsilon: float, rounds: int) -> Audited:
    """A matrix mechanism whose canaries take part as often as they may."""
    from hybrid.privacy.accountant import noise_multiplier_for
    from hybrid.privacy.audit import correlated
    from hybrid.privacy.matrix import matrix_sum, optimised

    separation, delta = model.training.separation or -(-rounds // TURNS), model.privacy.delta
    matrix = optimised(kind, rounds, separation)
    noise = matrix.sensitivity * noise_multiplier_for(epsilon, delta, 1.0, 1)
    return correlated(
        f"{kind} noise, separation {separation}",
        matrix_sum(clip_norm=model.privacy.clip, noise_multiplier=noise, minimum=0, matrix=matrix),
        column=matrix.factor.column(rounds),
        separation=separation,
        noise_multiplier=noise,
        epsilon=epsilon,
        delta=delta,
    )


def _audit(
    model: HybridModel,
    examples: Examples | None,
    epsilon: float,
    rounds: int,
    *,
    trials: int,
    confidence: float,
    seed: int,
) -> dict[str, list[Finding]]:
    """FOUND: of the mechanisms, and of a training where there are examples; BUG: of the planted ones."""
    from hybrid.privacy.audit import audit, each_of, planted

    claim: dict[str, Any] = {"epsilon": epsilon, "delta": model.privacy.delta}
    alone = mechanisms(model, epsilon, rounds)
    bugs = planted(**claim, rounds=rounds, sampling=model.training.sampling)
    each = each_of(confidence, len(alone) + (examples is not None))
    audits: list[tuple[str, Callable[..., Finding]]] = [(FOUND, partial(audit, one)) for one in alone]
    found: dict[str, list[Finding]] = {FOUND: [], BUG: []}
    with TemporaryDirectory() as folder, progress_bar(f"audit of {model.name}") as progress:
        if examples is not None:
            from hybrid.federation.canaries import audit_training

            training = partial(audit_training, model, examples, epsilon=epsilon, folder=Path(folder))
            audits.append((FOUND, training))
        audits += [(BUG, partial(audit, one)) for one in bugs]
        for place, (kind, run) in enumerate(audits):

            def done(part: int, whole: int, before: int = place * STEPS) -> None:
                progress(before + STEPS * part // whole, len(audits) * STEPS)

            found[kind].append(run(trials=trials, seed=seed, confidence=each, progress=done))
    return found


def _finding_json(finding: Finding) -> dict[str, Any]:
    bound = finding.bound
    return {
        "name": finding.name,
        "rounds": finding.rounds,
        "epsilon_claimed": finding.epsilon,
        "epsilon_at_least": bound.epsilon,
        "guess": bound.guess,
        "right_at_least": bound.right,
        "wrong_at_most": bound.wrong,
        "trials": bound.trials,
        "refuted": finding.refuted,
    }


def _print(shown: Mapping[str, Any], found: Mapping[str, Sequence[Finding]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{shown['model']}: claimed epsilon {shown['epsilon']:g} at delta {shown['delta']:g} (oracle)")
    table.add_column("mechanism")
    for name in ("rounds", "epsilon at least", "right guesses", "wrong guesses", "trials", "verdict"):
        table.add_column(name, justify="right")
    for kind, words in ((FOUND, ("no bug seen", "REFUTED")), (BUG, ("NOT SEEN", "seen"))):
        for finding in found[kind]:
            bound = finding.bound
            numbers = (f"{bound.epsilon:.3f}", f">= {bound.right:.4f}", f"<= {bound.wrong:.4f}", f"{bound.trials}")
            table.add_row(finding.name, f"{finding.rounds}", *numbers, words[finding.refuted])
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 200).print(table, highlight=False)  # a file has room for a row
    print("\n".join(_statement(shown)))


def _statement(shown: Mapping[str, Any]) -> Iterator[str]:
    """What the table means."""
    error = 1.0 - shown["confidence"]
    yield (
        f"All lower bounds above the line hold together with confidence {shown['confidence']:g}: where every mechanism "
        f"keeps its claim, an audit refutes one with a probability of at most {error:.2g}."
    )
    yield NO_PROOF
    yield ORACLE
    for name in shown["refuted"]:
        yield f"REFUTED: {name} gives away more than epsilon {shown['epsilon']:g}. Release nothing that it noises."
    for name in shown["unseen"]:
        yield f"NOT SEEN: {name}. With so few trials this audit says nothing; give it more (--trials)."


def _draw(file: Path, model: str, found: Mapping[str, Sequence[Finding]]) -> None:
    """A bar for each mechanism up to its lower bound, and the claim as a line."""
    from matplotlib.figure import Figure

    rows = [(finding, colour) for kind, colour in ((FOUND, "C0"), (BUG, "0.6")) for finding in found[kind]]
    figure = Figure(figsize=(8.0, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.barh(
        [finding.name for finding, _ in rows],
        [finding.bound.epsilon for finding, _ in rows],
        color=[colour for _, colour in rows],
        height=0.6,
    )
    claimed = rows[0][0].epsilon
    axes.axvline(claimed, color="C3", linestyle=":", label=f"claimed: {claimed:g}")
    axes.invert_yaxis()
    axes.set(xlabel="epsilon is at least (grey: planted bugs)", title=f"{model}: membership audit (oracle)")
    figure.legend(frameon=False, loc="outside lower center", fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
