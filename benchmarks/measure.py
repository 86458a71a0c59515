"""How the benchmarks time and tell."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Turns:
    """Milliseconds of contestants that took turns.

    Attributes:
        taken: by name, one a turn.
    """

    taken: Mapping[str, Sequence[float]]

    def medians(self) -> dict[str, float]:
        """Of each."""
        return {name: statistics.median(times) for name, times in self.taken.items()}

    def ratio(self, ours: str, theirs: str) -> float:
        """The median over turns of ours over theirs in the same turn: the machine's moods cancel."""
        return statistics.median(a / b for a, b in zip(self.taken[ours], self.taken[theirs], strict=True))


def take_turns(contestants: Mapping[str, Callable[[], object]], *, seconds: float, most: int = 300) -> Turns:
    """Runs each in turn, so that a slower machine is slower for all.

    Args:
        contestants: by name; each is run once before it counts.
        seconds: that all runs together take, about; each counts at least three times.
        most: runs of each.
    """
    for run in contestants.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    begun = time.perf_counter()
    turns = 0
    while turns < 3 or (time.perf_counter() - begun < seconds and turns < most):
        turns += 1
        for name, run in contestants.items():
            before = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - before) * 1e3)
    return Turns(taken)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def show(title: str, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, float]) -> None:
    """On standard output, a table of each run of rows that have the same columns, and one of the figures."""
    console = Console(highlight=False, width=None if os.isatty(1) else 160)
    for columns, alike in groupby(rows, key=tuple):
        table = Table(*columns, title=title, title_justify="left")
        for row in alike:
            table.add_row(*(_text(row[name]) for name in columns))
        console.print(table)
    summary = Table("figure", "value", title="Figures", title_justify="left")
    for name, value in figures.items():
        summary.add_row(name, _text(value))
    console.print(summary)


def write(file: Path | None, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, float]) -> None:
    """The object that is compared over time, where a file is asked for."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), "rows": list(rows), "figures": dict(figures)}, indent=2))


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
