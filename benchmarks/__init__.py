"""Benchmarks: modules to run, each of which says what it prints, and where it writes its results."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
