"""Four problems of modular.py with each architecture, in batches of 512: add97/llama, s5/deep, …"""

from __future__ import annotations

from functools import partial

from .. import architectures
from . import Task, starts
from .modular import compose, divide, pairs

# numbers, operation, share of the pairs for training, whether y = 0 is left out
PROBLEMS = {
    "add97": ("x + y mod 97", 97, lambda x, y: (x + y) % 97, 0.5, False),
    "div97": ("x / y mod 97", 97, divide, 0.5, True),
    "add113": ("x + y mod 113, 30% of all pairs", 113, lambda x, y: (x + y) % 113, 0.3, False),
    "s5": ("composition in S5", 120, compose, 0.5, False),
}

TASKS = [
    Task(
        f"{name}/{architecture.name}",
        f"{about}; {architecture.about}",
        starts(partial(architecture.make, numbers), partial(pairs, numbers, operation, share, nonzero), 512),
    )
    for architecture in architectures.load().values()
    for name, (about, numbers, operation, share, nonzero) in PROBLEMS.items()
]
