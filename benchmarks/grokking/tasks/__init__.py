"""What there is to learn. Each file here has a list TASKS; a new task is a new file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Split:
    """Inputs (n, …) and targets (n, …)."""

    inputs: Tensor
    targets: Tensor

    def __getitem__(self, which: Any) -> Split:
        return Split(self.inputs[which], self.targets[which])

    def to(self, device: str) -> Split:
        return Split(self.inputs.to(device), self.targets.to(device))

    def __len__(self) -> int:
        return len(self.targets)


class Data(NamedTuple):
    """A tenth of the held-out data is for signals, and the rest for the report alone."""

    train: Split
    signal: Split
    report: Split


class Start(NamedTuple):
    """Where a run begins: the same for every method, as it depends on the seed alone."""

    model: nn.Module
    data: Data
    batches: Iterator[Split]


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the answer's, (n,)."""
    return (logits.argmax(dim=-1) == targets).float()


@dataclass(frozen=True)
class Task:
    """A model, its data, and when it counts as learnt.

    A task without such a level has `solved=math.inf`: a run then takes its whole budget, and its best score counts.
    A loss is a score with a minus in front.
    """

    name: str
    about: str
    start: Callable[[int], Start]  # seed → model and data
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    score: Callable[[Tensor, Tensor], Tensor] = right  # of each example, (n,); what is judged is the mean
    solved: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 10  # steps
    budget: int = 3000  # steps, unless a run says otherwise
    evaluate_every: int = 10  # steps
    clip: float = 0.0  # of the gradients' norm, by the recipe, whatever the method; 0 is off


def starts(
    model: Callable[[], nn.Module], data: Callable[[int], Data], batch_size: int | None
) -> Callable[[int], Start]:
    """What most tasks need: `seed → model and data`, each of which depends on the seed alone. None: one batch."""

    def start(seed: int) -> Start:
        found = data(seed)
        torch.manual_seed(seed)
        return Start(model(), found, shuffled(found.train, batch_size, seed))

    return start


def split(inputs: Tensor, targets: Tensor, train: int, seed: int) -> Data:
    """Shuffled by the seed and cut: the first `train` for training."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    signal = (len(order) - train) // 10
    everything = Split(inputs, targets)
    return Data(*(everything[part] for part in order.tensor_split([train, train + signal])))


def shuffled(data: Split, batch_size: int | None, seed: int) -> Iterator[Split]:
    """Batches for ever, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while batch_size is None:
        yield data
    while True:
        for batch in torch.randperm(len(data), generator=generator).split(batch_size):
            yield data[batch]


def packaged(package: str, path: str) -> Path:
    """A file that an installed package carries. The package is not imported, nor has what it needs to be there."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"its data is in the package {package}: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0], path)


@cache
def load() -> dict[str, Task]:
    """All tasks, by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {task.name: task for module in modules for task in module.TASKS}
