"""Estimates of how long runs take, from finished runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from .runs import Row, Run


def minutes_by_task(rows: Iterable[Row]) -> dict[str, float]:
    """Return the median of a run's minutes on a core, for each task that has run."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.minutes:
            found[row.task].append(row.minutes)
    return {task: median(minutes) for task, minutes in found.items()}


def minutes(asked: Run, rows: Iterable[Row]) -> float | None:
    """Estimate a run's minutes from its method's runs on its task, or else from all runs on it. None without any."""
    alike = [row for row in rows if row.task == asked.task and row.minutes]
    alike = [row for row in alike if row.method == asked.method] or alike
    if not alike:
        return None
    steps = min(median(row.steps for row in alike), asked.budget + asked.afterwards)
    return steps * median(row.minutes / row.steps for row in alike)
