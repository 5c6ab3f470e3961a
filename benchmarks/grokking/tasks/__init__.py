"""The tasks. Each file here has a list TASKS; a new task is a new file."""

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
    """Training data and held-out data. A tenth of the latter is for signals, and the rest for the report alone."""

    train: Split
    signal: Split
    report: Split


class Start(NamedTuple):
    """The start of a run. It depends on the seed alone, so it is the same for every method."""

    model: nn.Module
    data: Data
    batches: Iterator[Split]


def right(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (n,): 1 for an example whose largest logit is the answer's, else 0."""
    return (logits.argmax(dim=-1) == targets).float()


@dataclass(frozen=True)
class Task:
    """A model, its data, and the score at which the task counts as learnt.

    A task without such a level has `solved=math.inf`: a run then takes its whole budget, and its best score counts.
    A loss with a minus in front is a score.
    """

    name: str
    about: str
    start: Callable[[int], Start]  # seed → model and data
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    score: Callable[[Tensor, Tensor], Tensor] = right  # of each example, (n,); the mean is judged
    solved: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 10  # steps
    budget: int = 3000  # steps, unless a run says otherwise
    evaluate_every: int = 10  # steps
    clip: float = 0.0  # the recipe's limit on the gradients' norm, if the method has none; 0 is off


def starts(
    model: Callable[[], nn.Module], data: Callable[[int], Data], batch_size: int | None
) -> Callable[[int], Start]:
    """Return a function from a seed to model and data, which depend on the seed alone."""

    def start(seed: int) -> Start:
        found = data(seed)
        torch.manual_seed(seed)
        return Start(model(), found, shuffled(found.train, batch_size, seed))

    return start


def split(inputs: Tensor, targets: Tensor, train: int, seed: int) -> Data:
    """Shuffle the examples by the seed, and split them. The first `train` are for training."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    signal = (len(order) - train) // 10
    everything = Split(inputs, targets)
    return Data(*(everything[part] for part in order.tensor_split([train, train + signal])))


def shuffled(data: Split, batch_size: int | None, seed: int) -> Iterator[Split]:
    """Yield batches without end, in a new order each epoch. A size of None means all data in one batch."""
    generator = torch.Generator().manual_seed(seed)
    while batch_size is None:
        yield data
    while True:
        for batch in torch.randperm(len(data), generator=generator).split(batch_size):
            yield data[batch]


def packaged(package: str, path: str) -> Path:
    """Return the path of a file in an installed package, which is not imported; its dependencies may be missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"its data is in the package {package}: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0], path)


@cache
def load() -> dict[str, Task]:
    """Return all tasks, by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {task.name: task for module in modules for task in module.TASKS}
