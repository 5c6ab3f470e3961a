"""Show what Triton compiles the GPU kernels to (no GPU needed): registers, spills, width of loads and stores.

    python -m benchmarks.compiled [--json]

Each kernel is compiled for each architecture, and for each pair of dtypes of parameters (and gradients) and of state.
The kernel for fewer bits is compiled in several formats for one architecture, and in one format for the others. Unless
"tail" is true, only the body for full chunks is compiled. "scalar" loads read tables and single numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grokadamw.backends import gpu
from grokadamw.backends.gpu_tables import CODED, JUDGE_BLOCK, JUDGE_THREADS, LONG, ODD, SHAPES, WIDTHS

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (75, 80, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
DTYPES = [  # dtype of parameters and gradients, dtype of state
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
INT8, SHORT, WHOLE = (torch.int8, torch.uint8, torch.int8), 3 * (torch.bfloat16,), 3 * (torch.float32,)
# low-bit formats: the dtype of parameters and gradients; the dtypes of m, v and μ; the number of low bits of weights
CODES = {
    "bfloat16": (torch.float32, SHORT, 0),
    "int8": (torch.float32, INT8, 0),
    "int8, 24 bits": (torch.bfloat16, INT8, 8),
    "int8, float16 of 24 bits": (torch.float16, INT8, 8),
    "32 bits": (torch.bfloat16, WHOLE, 16),
}
# a kernel takes a second or two, so only one GPU gets all formats, and only one format the cases "no tail" and "rows"
THOROUGH, LIMITED = "sm_90", "int8, 24 bits"
UPDATE = dict.fromkeys(("chunks", "table", "grads", "numbers"), "*i64") | {"finite": "*i1"}  # its pointer arguments
BATCHES = [2, 32, 1024]  # groups of parameters, as a power of two: `judge` holds a number for each in registers


class Code(NamedTuple):
    """One kernel, compiled for one GPU."""

    kernel: str
    target: str
    param: str
    tail: bool
    registers: int | None  # None for AMD's GPUs: their code is compiled but not inspected
    spilled: int | None  # bytes of local memory per thread
    wide_loads: int | None  # of 16 bytes
    scalar_loads: int | None
    other_loads: int | None
    wide_stores: int | None
    scalar_stores: int | None
    other_stores: int | None


def sources(kernels: Any, param: torch.dtype, state: torch.dtype, tail: bool) -> Iterator[tuple[str, ASTSource, int]]:
    """Yield each kernel with the constants that `gpu` gives it, and its threads, in warps of 32.

    `update` is also compiled for micro-batches before the last, and with limits on rows; `judge` for each number of
    batches.
    """
    tl, shape = kernels.tl, SHAPES[max(state.itemsize, 4)]
    of_grads = SHAPES[param.itemsize]
    dtypes = {name: getattr(tl, str(x).removeprefix("torch.")) for name, x in (("param", param), ("state", state))}
    pointers = {
        "update": UPDATE,
        "squares": dict.fromkeys(("chunks", "sizes", "grads"), "*i64") | {"sums": "*fp64"},
        "judge": dict.fromkeys(("sums", "verdict"), "*fp64")
        | dict.fromkeys(("limits", "skipped"), "*i64")
        | {"grad_scale": "*fp32", "found_inf": "*fp32", "finite": "*i1"},
    }
    constants: dict[str, dict[str, Any]] = {
        "update": {"PARAM": dtypes["param"], "GRAD": dtypes["param"], "STATE": dtypes["state"], "HAS_MU": True}
        | {"RAW": False, "EPS_FIRST": False, "HAS_FINITE": True, "IS_PART": False, "MOVES": True, "TAIL": tail}
        | {"HAS_CHANGE": False, "HAS_NORM": False, "OF_ROWS": 0}
        | {"CHUNK": shape.chunk, "BLOCK": shape.block},
        "squares": {"GRAD": dtypes["param"], "TAIL": tail, "CHUNK": of_grads.chunk, "BLOCK": of_grads.block},
    }
    constants["update, micro-batch"] = constants["update"] | {"RAW": True, "IS_PART": True, "MOVES": False}
    if tail:  # a model's biases have a tail
        limited = constants["update"] | {"HAS_CHANGE": True}
        constants["update, rows of 256"] = limited | {"OF_ROWS": 1 << WIDTHS.index(256)}
        constants["update, longer rows"] = limited | {"OF_ROWS": 1 << LONG}
        constants["update, odd rows"] = limited | {"OF_ROWS": 1 << ODD + WIDTHS.index(256)}
    for batches in BATCHES:
        flags = {"HAS_SCALE": True, "HAS_FOUND": True, "SKIPS": True}
        constants[f"judge, {batches} batches"] = flags | {"BATCHES": batches, "BLOCK": JUDGE_BLOCK}
    warps = {"update": shape.warps, "squares": of_grads.warps, "judge": JUDGE_THREADS // 32}
    for name, values in constants.items():
        function = name.partition(",")[0]
        yield (
            name,
            source(kernels, function, pointers[function], values),
            warps[function] * (2 if "rows" in name else 1),
        )


def coded_sources(kernels: Any, name: str, tail: bool) -> Iterator[tuple[str, ASTSource, int]]:
    """Yield the kernel for tensors kept in fewer bits, without and with limits on rows."""
    param, states, low = CODES[name]
    dtypes = [getattr(kernels.tl, str(x).removeprefix("torch.")) for x in (param, param, *states)]
    values = dict(zip(("PARAM", "GRAD", "M", "V", "MU"), dtypes, strict=True))
    values |= {"LOW": low, "ROUNDS": False, "HAS_MU": True, "RAW": False, "EPS_FIRST": False}
    values |= {"HAS_FINITE": True, "IS_PART": False, "MOVES": True, "TAIL": tail}
    values |= {"HAS_CHANGE": False, "HAS_NORM": False, "OF_ROWS": 0, "CHUNK": CODED.chunk, "BLOCK": CODED.block}
    cases = {"": values}
    if tail and name == LIMITED:
        limited = values | {"HAS_CHANGE": True}
        cases[", rows of 256"] = limited | {"OF_ROWS": 1 << WIDTHS.index(256)}
        cases[", longer rows"] = limited | {"OF_ROWS": 1 << LONG}
    for case, constants in cases.items():
        made = source(kernels, "update_coded", UPDATE, constants)
        yield f"update_coded, {name}{case}", made, CODED.warps


def source(kernels: Any, name: str, pointers: dict[str, str], values: dict[str, Any]) -> ASTSource:
    """Return a kernel with its constants, for aligned pointers."""
    function = getattr(kernels, name)
    kinds = {arg: pointers.get(arg) or "i32" for arg in function.arg_names}
    aligned = [i for i, arg in enumerate(function.arg_names) if kinds[arg].startswith("*")]
    return ASTSource(
        fn=function,
        signature=kinds | dict.fromkeys(values, "constexpr"),
        constexprs=values,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def compiled(target: str, param: torch.dtype, state: torch.dtype, tail: bool) -> Iterator[Code]:
    for name, source, warps in sources(gpu.kernels(), param, state, tail):
        yield code_of(target, name, source, warps, param, tail)


def coded(target: str, name: str, tail: bool) -> Iterator[Code]:
    for case, source, warps in coded_sources(gpu.kernels(), name, tail):
        yield code_of(target, case, source, warps, CODES[name][0], tail)


def code_of(target: str, name: str, source: ASTSource, warps: int, param: torch.dtype, tail: bool) -> Code:
    # on every GPU gpu.py launches `squares` and `update` with the same number of warps, and `judge` of threads
    given = warps * 32 // TARGETS[target].warp_size if name.startswith("judge") else warps
    asm = triton.compile(source, target=TARGETS[target], options={"num_warps": given, "enable_fp_fusion": False}).asm
    counts: list[int | None] = [None] * 8
    if "ptx" in asm:
        counts = [*resources(asm["cubin"]), *accesses(asm["ptx"], "ld"), *accesses(asm["ptx"], "st")]
    return Code(name, target, str(param).removeprefix("torch."), tail, *counts)


def accesses(ptx: str, instruction: str) -> tuple[int, int, int]:
    """Count loads or stores of global memory: those of 16 bytes, those of one number by all threads, and all others."""
    wide = scalar = other = 0
    for line in ptx.splitlines():
        if found := re.search(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", line):
            size = int(found[1] or 1) * int(found[2])
            wide += size == 128
            scalar += size != 128 and not found[1]
            other += size != 128 and bool(found[1])
    return wide, scalar, other


def resources(cubin: bytes) -> tuple[int, int]:
    """Return a thread's registers, and its bytes of local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", path]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def has(target: str, param: torch.dtype) -> bool:
    return target != "sm_75" or param != torch.bfloat16


def all_codes() -> list[Code]:
    cases = [
        partial(compiled, target, *dtypes, tail)
        for target in TARGETS
        for dtypes in DTYPES
        for tail in (False, True)
        if has(target, dtypes[0])
    ]
    cases += [
        partial(coded, target, name, tail)
        for target in TARGETS
        for name in (CODES if target == THOROUGH else ["int8"])
        for tail in ((False, True) if name == LIMITED else (True,))
    ]
    shown = track(cases, "compiling", console=Console(stderr=True), transient=True)
    return [code for case in shown for code in case()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="as a list of objects, for programs")
    given = parser.parse_args()
    codes = all_codes()
    if given.json:
        print(json.dumps([code._asdict() for code in codes]))
        return
    table = Table(*(name.replace("_", " ") for name in Code._fields))
    for code in codes:
        table.add_row(*("–" if value is None else str(value) for value in code))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
