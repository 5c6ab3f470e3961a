"""The command line: grokadamw env, memory --params N, and convert IN OUT [--to adamw]; also python -m grokadamw."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import GrokAdamW, __version__
from .checkpoints import StateDict, is_state_dict, to_adamw, to_grokadamw
from .options import FORMATS
from .state.sizes import KINDS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. A command that fails prints a sentence on stderr and returns 1."""
    parser = argparse.ArgumentParser(prog="grokadamw")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser(
        "env",
        help="which versions and implementations run here",
        description="Print the versions that matter, and for each device the implementation that runs there.",
    )
    convert = commands.add_parser(
        "convert",
        help="rewrite the optimizer state in a checkpoint file",
        description="Rewrite every optimizer state dict in a file that torch.save wrote, at any depth, and leave the "
        "rest as it is. Reads state dicts of torch.optim.AdamW and Adam, and of grokadamw from 0.1.2 on. Refuses a "
        "file that holds more than tensors and plain data, because reading it could run code.",
    )
    convert.add_argument("source", metavar="IN", type=Path, help="a file that torch.save wrote")
    convert.add_argument("target", metavar="OUT", type=Path, help="may be IN; written next to OUT first, then renamed")
    convert.add_argument("--to", choices=["grokadamw", "adamw"], default="grokadamw", help="default: %(default)s")
    memory = commands.add_parser(
        "memory",
        help="how much memory training will take",
        description="Print how much memory weights, gradients and optimizer state take for N parameters, compared "
        "with torch's AdamW in bfloat16 and in mixed precision (float32 weights). Activations are not included.",
    )
    memory.add_argument(
        "--params", type=_count, required=True, metavar="N", help="parameters of the model, such as 7e9"
    )
    memory.add_argument("--param-dtype", choices=list(_DTYPES), default="float32", help="default: %(default)s")
    memory.add_argument("--state", choices=FORMATS, default="float32", help="state_dtype; default: %(default)s")
    memory.add_argument("--master-weight-bits", type=int, choices=[24, 32], help="of bfloat16 or float16")
    memory.add_argument("--no-filter", action="store_true", help="lamb=0, which keeps no slow gradient")
    memory.add_argument("--ranks", type=_count, default=1, metavar="N", help="ranks that share all, as with FSDP2")
    parsed = parser.parse_args(arguments)
    if parsed.command == "memory":
        if parsed.master_weight_bits and parsed.param_dtype == "float32":
            memory.error(
                f"--master-weight-bits {parsed.master_weight_bits} is for parameters of 16 bits: give --param-dtype "
                "bfloat16 or float16, too"
            )
        print(memory_table(parsed))
        return 0
    if parsed.command == "env":
        print(environment())
        return 0
    try:
        count = convert_file(parsed.source, parsed.target, {"grokadamw": to_grokadamw, "adamw": to_adamw}[parsed.to])
    except RecursionError:
        print(f"{parser.prog}: {parsed.source}: a part of it contains itself", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        reason, path = (error.strerror, error.filename) if isinstance(error, OSError) else (error, None)
        print(f"{parser.prog}: {path or parsed.source}: {reason or error}", file=sys.stderr)
        return 1
    print(f"{parsed.target}: {count} optimizer state dict{'s' * (count > 1)} for {parsed.to}")
    return 0


def _count(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < 2**60 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1, such as 7e9")
    return int(value)


def memory_table(parsed: argparse.Namespace) -> str:
    """Return the table of `grokadamw memory`: memory on each rank, by kind. One tensor stands for all parameters."""
    share = -(-parsed.params // parsed.ranks)
    options = {"state_dtype": parsed.state, "master_weight_bits": parsed.master_weight_bits}
    if parsed.no_filter:
        options["lamb"] = 0.0

    def outline(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.nn.Parameter(torch.empty(share, dtype=dtype, device="meta"))]

    ours = GrokAdamW(outline(_DTYPES[parsed.param_dtype]), **options).memory()
    columns = {"GrokAdamW": ours}
    for name, dtype in (("AdamW, bfloat16", torch.bfloat16), ("AdamW, mixed", torch.float32)):
        count = share * dtype.itemsize
        same = dict.fromkeys(("parameters", "gradients", "exp_avg", "exp_avg_sq"), count)
        columns[name] = {**dict.fromkeys(KINDS, 0), **same, "total": 4 * count}
    return _table(columns, parsed.params, parsed.ranks)


def _table(columns: Mapping[str, Mapping[str, int]], parameters: float, ranks: int) -> str:
    """Return a table of several optimizers' sizes, in GB or MB on each rank, without kinds that none of them has."""
    rows = [kind for kind in KINDS if kind != "step" and any(column[kind] for column in columns.values())]
    unit, size = ("GB", 1e9) if all(column["total"] >= 1e8 for column in columns.values()) else ("MB", 1e6)
    lines = [f"{parameters:,.0f} parameters, {unit}" + (f" on each of {ranks} ranks" if ranks > 1 else "")]
    widths = {name: max(len(name), 9) + 3 for name in columns}
    lines.append(" " * 20 + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for kind in (*rows, "total"):
        lines.append(f"{kind:20}" + "".join(f"{columns[name][kind] / size:>{w}.2f}" for name, w in widths.items()))
    shares = {name: column["total"] * ranks / parameters for name, column in columns.items()}
    lines.append(f"{'bytes per parameter':20}" + "".join(f"{shares[name]:>{w}.2f}" for name, w in widths.items()))
    notes = "AdamW, mixed: weights, gradients and moments in float32; autocast adds copies."
    return "\n".join([*lines, "", notes])


def environment() -> str:
    """Return the versions, and a line for each device with the implementation that updates parameters there."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    lines = {
        "grokadamw": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": triton,
    }
    # without the check of is_available(), torch 2.6 raises an error on a machine without an accelerator
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator else 0
    for name in ("cpu", *(f"{accelerator}:{i}" for i in range(count))):
        title = f"{torch.cuda.get_device_name(name)}, " if name.startswith("cuda") else ""
        lines[name] = title + GrokAdamW([torch.zeros(1, device=name)]).implementation()
    return "\n".join(f"{name:11}{line}" for name, line in lines.items())


def convert_file(source: Path, target: Path, conversion: Callable[[StateDict], StateDict]) -> int:
    """Apply a conversion to every optimizer state dict in a file, and return how many there were.

    Raises:
        OSError: the source cannot be read, or the target cannot be written. The target is then left as it was.
        ValueError: the source was not written by torch.save, holds more than tensors and plain data, or holds no state
            dict that can be converted.
    """
    content = _read(source)
    converted, count = _converted(content, conversion)
    if count == 0:
        raise ValueError("it holds no optimizer state dict: nothing in it has 'state' and 'param_groups'")
    target = target.resolve()  # a link stays a link
    beside = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        with open(beside, "wb") as file:
            torch.save(converted, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(getattr(error, "errno", None), f"cannot be written: {reason}", str(target)) from None
    finally:
        beside.unlink(missing_ok=True)
    return count


def _read(source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)  # so that the file cannot run code
    except OSError:
        raise
    except Exception as error:  # a file of another format may raise any exception
        try:
            names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source)))
        except Exception:
            raise ValueError(f"torch.save did not write this file ({type(error).__name__})") from None
        raise ValueError(
            f"it holds {names or error}: only tensors and plain data are read, as anything else could run code. If you "
            "trust it, load it yourself, and give its state dict to grokadamw.checkpoints.to_grokadamw"
        ) from None


def _converted(value: Any, conversion: Callable[[StateDict], StateDict]) -> tuple[Any, int]:
    """Return the value with all state dicts inside it converted, and the number of state dicts."""
    if is_state_dict(value):
        return conversion(value), 1
    if isinstance(value, dict):
        pairs = {key: _converted(item, conversion) for key, item in value.items()}
        count = sum(n for _, n in pairs.values())
        if count:
            value = copy.copy(value)  # it may be an OrderedDict
            value.update((key, item) for key, (item, _) in pairs.items())
        return value, count
    if type(value) in (list, tuple):
        items = [_converted(item, conversion) for item in value]
        count = sum(n for _, n in items)
        return (type(value)(item for item, _ in items) if count else value), count
    return value, 0


if __name__ == "__main__":
    sys.exit(main())
