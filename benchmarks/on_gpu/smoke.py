"""Stage 1: does it work at all? A few checks, without pytest.

    python3 -m benchmarks.on_gpu.smoke FILE

After an error of the device, such as an invalid address, all that the process does later fails, too. So the checks run
in a process of their own, which ends after such an error, and another process runs the checks that are left. FILE has
each check's outcome as soon as it is known, with its traceback.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .record import Record

ROOT = Path(__file__).parent.parent.parent


def main(path: str, module: str = "benchmarks.on_gpu.checks") -> None:
    """Start processes until every check has an outcome; the first one says which checks there are."""
    todo: list[str] = []
    while True:
        command = [sys.executable, "-m", module, path]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        record = Record(path)
        checks = record.results.setdefault("checks", {})
        left = [name for name, found in checks.items() if found["outcome"] == "not run"]
        died = [name for name, found in checks.items() if found["outcome"] == "running"]
        if left == todo and not died:
            died = left  # the process cannot even start
        for name in died:
            checks[name] = {"outcome": "failed", "code": done.returncode, "traceback": done.stdout[-4000:]}
        record.write()
        todo = [name for name in left if name not in died]
        if not todo:
            break
    failed = [name for name, found in checks.items() if found["outcome"] == "failed"]
    for name, found in checks.items():
        print(f"{found['outcome']:7} {name}")
        if found["outcome"] == "failed":
            print("       ", *found["traceback"].splitlines()[-1:])
    if not checks:
        sys.exit(f"the checks cannot be imported:\n{done.stdout}")
    record.write(summary=f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1])
