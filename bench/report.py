"""The table, the JSON file and the plot."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil
from matplotlib.figure import Figure

from bench.load import wrk_version
from bench.scenarios import Outcome

_HEADINGS: Final = (
    "scenario",
    "chatterd",
    "tutorial",
    "ceiling",
    "x tutorial",
    "x ceiling",
    "met",
    "note",
)
_LIBRARIES: Final = (
    "granian",
    "hypercorn",
    "starlette",
    "sqlalchemy",
    "asyncpg",
    "psycopg",
    "pillow",
)


def machine(postgresql: str) -> Mapping[str, object]:
    """Return what the figures depend on; the load average is that of the last minute."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "postgresql": postgresql,
        "wrk": wrk_version(),
    } | {name: version(name) for name in _LIBRARIES}


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table in Markdown. Ratios are cut off, never rounded up."""
    lines = [_HEADINGS, *map(_cells, outcomes)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    ratios = {found.against: found for found in outcome.comparisons}
    notes = [outcome.note] if outcome.note else []
    for against, found in ratios.items():
        if against not in {"tutorial", "ceiling"}:
            beside = f" {_figure(outcome, against)}" if against in outcome.figures else ""
            notes.append(f"{against}{beside}: {_ratio(found.ratio, found.goal)}")
    return (
        outcome.title,
        *(_figure(outcome, name) for name in ("chatterd", "tutorial", "ceiling")),
        *(
            _ratio(ratios[name].ratio, ratios[name].goal) if name in ratios else ""
            for name in ("tutorial", "ceiling")
        ),
        outcome.met,
        ". ".join(notes),
    )


def _figure(outcome: Outcome, name: str) -> str:
    figure = outcome.figures.get(name)
    if figure is None:
        return ""
    digits = 0 if figure >= 100 else 1 if figure >= 1 else 2
    return f"{figure:.{digits}f}" + f" {outcome.unit}" * (outcome.unit != "requests/s")


def _ratio(ratio: float, goal: float | None) -> str:
    cut = f"{math.floor(ratio * 100) / 100:.2f}"
    return cut if goal is None else f"{cut} (>= {goal:g})"


def write(
    folder: Path, name: str, facts: Mapping[str, object], outcomes: Sequence[Outcome]
) -> None:
    """Write `name`.json and `name`.png into `folder`."""
    found = {
        **facts,
        "outcomes": [asdict(outcome) | {"met": outcome.met} for outcome in outcomes],
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    _plot(outcomes).savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})


def _plot(outcomes: Sequence[Outcome]) -> Figure:
    """Draw each ratio as a bar, on a logarithmic scale, and its goal as a black line."""
    bars = [
        (f"{outcome.title}\nto {found.against}", found)
        for outcome in outcomes
        for found in outcome.comparisons
        if found.goal is not None and not outcome.fault
    ]
    figure = Figure(figsize=(11, 1.5 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    colours = ["tab:green" if found.ratio >= (found.goal or 0) else "tab:red" for _, found in bars]
    axes.barh(places, [found.ratio for _, found in bars], color=colours, height=0.6)
    for place, (_, found) in zip(places, bars, strict=True):
        axes.vlines(found.goal or 0, place - 0.4, place + 0.4, color="black", linewidth=2)
        axes.annotate(
            f" {math.floor(found.ratio * 100) / 100:.2f}", (found.ratio, place), va="center"
        )
    axes.set_xscale("log")
    axes.set_yticks(places, [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.set_xlabel("chatterd's figure divided by the other's; the black line is the goal")
    axes.grid(axis="x", alpha=0.3)
    return figure
