"""A pytest plugin that prints a failure's traceback at once, as the run may be stopped before it ends."""

from __future__ import annotations

from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{str(report.longrepr)[-3000:]}\n", flush=True)
