"""Stage 4: count a step's launches, and measure the memory it needs beside parameters, gradients and state.

python3 -m benchmarks.on_gpu.launches FILE
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

from .. import peers
from ..peers import FUSED, Arm, Shapes, Tensors
from . import common, times
from .common import DEVICE
from .record import Record, first_line

MIB = 1 << 20
SHAPES: dict[str, Shapes] = {
    "GPT-2, 124 M in 148": times.shapes_of("GPT-2, 124 M in 148"),
    "12 of 128 × 128": 12 * [(128, 128)],
}
ARMS = [FUSED, Arm("GrokAdamW, clip 1", peers.grokadamw(), kept=12), *times.ARMS[-1:]]


def launched(events: Iterable[Any]) -> list[str]:
    """Return the names of the kernels, copies and fills that ran on the device, from a profile's events.

    The profiler also lists spans there that the host has named, such as an optimizer's step. They are left out.
    """
    return [e.name for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


def of_arm(arm: Arm, shapes: Shapes) -> dict[str, Any]:
    step = arm.make(Tensors(shapes, DEVICE).params(arm))
    for _ in range(common.WARMUP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not common.REHEARSES:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = launched(profile.events())
    return {"launches": len(names), "peak_extra_mib": round(peak, 2), "by_name": Counter(names)}


def main(path: str) -> None:
    common.begin()
    warnings.simplefilter("ignore")  # about β1 in many layers, which is intended
    record = Record(path)
    record.write(device=common.device_name())
    rows: list[dict[str, Any]] = []
    failed = 0
    for model, shapes in SHAPES.items():
        for arm in ARMS:
            row = {"model": model, "arm": arm.name}
            try:
                row |= of_arm(arm, shapes)
            except Exception as error:  # the other rows may still succeed
                row["failed"] = first_line(error)
                failed += 1
                traceback.print_exc()
            rows.append(row)
            record.write(rows=rows)
            print(times.shown({name: value for name, value in row.items() if name != "by_name"}))
            common.release()
    record.write(summary=f"{len(rows) - failed} of {len(rows)} rows")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1])
