"""The file of a stage's results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Record:
    """The results of a stage, in a file that is rewritten with each new result."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, **results: Any) -> None:
        """Add the results, or replace earlier ones of the same name, and write the file."""
        self.results |= results
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.results, ensure_ascii=False, indent=1) + "\n")
        os.replace(beside, self.path)  # so that a stage killed now leaves a whole file


def first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
