"""The demo's report: one self-contained HTML page with plots, and what each number means."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.version import TrainingRecord

KINDS = {"server_only": "server only", "central": "central, no privacy", "federated": "federated, private"}
MIN_REQUESTS, MAX_DIFFERENCE, MAX_EPSILON = 2000, 1e-4, 8
COLOURS = {"server_only": "#999999", "central": "#0072b2", "federated": "#d55e00"}  # Okabe and Ito: told apart by all

STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 66rem; margin: 0 auto; padding: 1rem; color: #222; }
h1 { line-height: 1.2; } h2 { margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-size: .875rem; color: #555; }
.note { border-left: 4px solid #d55e00; padding: .2rem 1rem; background: #fdf3ec; }
"""


@dataclass(frozen=True)
class Findings:
    """What the demo measured.

    Attributes:
        report: the figures of `report.json`, nested.
        calibration_ratio: by kind, mean prediction over mean label.
        reliability: by kind, (deciles, 2): mean prediction, mean label.
        curves: fold 1's federated training: name -> (round, value) points.
        epsilon_by_round: (round, epsilon) points of fold 1.
        latency_ms: one per answered request.
        users, rows: of the population.
        release: how the device embedding leaves the device, in words.
        training: how the served version was trained, and what it cost.
    """

    report: Mapping[str, Any]
    calibration_ratio: Mapping[str, float]
    reliability: Mapping[str, NDArray[np.float64]]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    epsilon_by_round: Sequence[tuple[int, float]]
    latency_ms: NDArray[np.float64]
    users: int
    rows: int
    release: str
    training: TrainingRecord


def metric_rows(findings: Findings) -> list[tuple[str, str, str, str]]:
    """The comparison as rows of text: kind, AUC, log-loss, calibration ratio."""
    auc, loss, ratio = findings.report["auc"], findings.report["log_loss"], findings.calibration_ratio
    return [(name, f"{auc[kind]:.4f}", f"{loss[kind]:.4f}", f"{ratio[kind]:.3f}") for kind, name in KINDS.items()]


def privacy_sentence(findings: Findings) -> str:
    """What the training cost in privacy, and how much that claim is worth here."""
    training = findings.training
    return (
        f"One training: {'; '.join(training.privacy_lines())}. With {findings.users} users a δ of that size is weak: "
        f"it is of the order of one user in {1 / training.delta:,.0f}. The five folds are not composed."
    )


def broken_promises(figures: Mapping[str, Any]) -> list[str]:
    """Which sentences about the figures of `report.json` are not true; none where the demo holds."""
    auc, loss = figures["auc"], figures["log_loss"]
    difference = figures["max_abs_difference"]
    promises = {
        "every request is answered with a prediction": (
            figures["requests"] == figures["answered"] == figures["predicted"] >= MIN_REQUESTS
        ),
        "served predictions are the offline ones": difference is not None and difference <= MAX_DIFFERENCE,
        "records went through the broker": figures["broker_records"] > 0,
        "the budget is kept": 0 < figures["epsilon"] <= MAX_EPSILON,
        "federated beats server only in log-loss": loss["federated"] < loss["server_only"],
        "federated beats server only in AUC by more than chance": auc["federated_minus_server_only_low"] > 0,
    }
    return [promise for promise, holds in promises.items() if not holds]


def html(findings: Findings) -> str:
    """The whole page; every plot is inline SVG, nothing is fetched."""
    report = findings.report
    head = "".join(
        f"<th>{name}</th>" for name in ("five folds by user, unseen users", "AUC", "log-loss", "calibration")
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in metric_rows(findings)
    )
    plots = "".join(
        f"<figure>{_svg(draw, findings)}<figcaption>{escape(caption)}</figcaption></figure>" for draw, caption in PLOTS
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hybrid Towers: the coupon demo</title><style>{STYLE}</style></head><body>
<h1>Will a driver accept this coupon?</h1>
<p>The server knows the offer and the hour. The phone knows the driver and the trip, and keeps them.
{findings.rows:,} answers of {findings.users} people (UCI 603, CC BY 4.0).</p>
<div class="scroll"><table><tr>{head}</tr>{body}</table></div>
<p>Calibration is the mean prediction over the mean label: 1 is right. Federated minus server only, AUC, lower 95 %
bound (paired bootstrap over users): <b>{report["auc"]["federated_minus_server_only_low"]:+.4f}</b>. These are
<b>oracle</b> figures: computed on pooled data, which only a simulation has.</p>
<p>For comparison, on all features of the same data logistic regression has an AUC of 0.720 and boosted trees 0.770. The
towers are small networks that meet in one score, so they come near the trees and not past them; the trees also see
education, occupation, income and car, which this example leaves on the device unused.</p>
<p class="note">{escape(privacy_sentence(findings))}</p>
<p>The device embedding was released to the server {escape(findings.release)}.</p>
<h2>What happened</h2>
<div class="plots">{plots}</div>
<h2>Served</h2>
<p>{report["requests"]:,} requests from device processes, {report["answered"]:,} answered, {report["predicted"]:,} with
a prediction, through Kafka {escape(report["kafka"]["version"])} ({report["broker_records"]:,} records) and Triton
{escape(report["triton"]["version"])}. The served predictions differ from the offline ones of the same version by at
most {report["max_abs_difference"]:.1e}. Latency {report["latency_ms"]["p50"]:.0f} ms at the median and
{report["latency_ms"]["p99"]:.0f} ms at the 99th percentile, with every process on one machine.</p>
</body></html>
"""


def _svg(draw: Callable[[Any, Findings], None], findings: Findings) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, findings)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().split("?>", 1)[1].split(">", 1)[1]  # without the XML prologue and doctype


def _training(axes: Any, findings: Findings) -> None:
    rounds, auc = zip(*findings.curves["oracle_auc"], strict=True)
    axes.plot(rounds, auc, color=COLOURS["federated"], label="federated, by round")
    fold = findings.report["fold_1"]["auc"]
    for kind in ("server_only", "central"):
        axes.axhline(fold[kind], color=COLOURS[kind], linestyle="--", label=KINDS[kind])
    axes.set(xlabel="round", ylabel="AUC, unseen users of fold 1")
    _legend(axes)


def _calibration(axes: Any, findings: Findings) -> None:
    axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
    for kind, points in findings.reliability.items():
        axes.plot(points[:, 0], points[:, 1], marker="o", markersize=3, color=COLOURS[kind], label=KINDS[kind])
    axes.set(xlabel="predicted, mean of each tenth", ylabel="accepted", xlim=(0, 1), ylim=(0, 1))
    _legend(axes)


def _legend(axes: Any) -> None:
    """Above the plot, where no curve can be."""
    axes.figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize="small", handlelength=1.2)


def _latency(axes: Any, findings: Findings) -> None:
    ordered = np.sort(findings.latency_ms)
    axes.plot(ordered, np.linspace(0, 100, len(ordered)), color=COLOURS["central"])
    for name, position in (("p50", "bottom"), ("p99", "top")):
        value = findings.report["latency_ms"][name]
        axes.axvline(value, color="#cccccc", linewidth=1)
        axes.annotate(f" {name} {value:.0f} ms", (value, 15), va=position)
    axes.set(xlabel="milliseconds from request to answer", ylabel="% of requests", xlim=(0, None), ylim=(0, 100))


def _privacy(axes: Any, findings: Findings) -> None:
    rounds, epsilon = zip(*findings.epsilon_by_round, strict=True)
    axes.plot(rounds, epsilon, color=COLOURS["federated"])
    axes.set(xlabel="round", ylabel=f"ε spent, at δ = {findings.training.delta:.1e}", ylim=(0, None))


PLOTS: Sequence[tuple[Callable[[Any, Findings], None], str]] = (
    (_training, "Training. The federated model starts from the server's own and learns from people's phones."),
    (_calibration, "Calibration on unseen users, all folds: on the line, predictions mean what they say."),
    (_latency, "Latency of the served requests: gateway, Kafka, Feast, Triton, Kafka, gateway."),
    (_privacy, "Privacy: what a user's participation may reveal grows with each round, and is bounded."),
)
