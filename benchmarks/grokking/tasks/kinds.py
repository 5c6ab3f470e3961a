"""Other kinds of models, small and quick to train."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architectures import pre_norm
from . import Data, Task, split, starts
from .modular import Operation, pairs

WIDTH, HIDDEN = 64, 192


class MLP(nn.Module):
    """A network from (batch, 2) numbers x, y to logits: their embeddings side by side, then two hidden layers."""

    def __init__(self, numbers: int, answers: int, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.embedding = nn.Embedding(numbers, WIDTH)
        self.layers = layers(2 * WIDTH, HIDDEN, answers, norm)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens).flatten(1))


def layers(inputs: int, hidden: int, outputs: int, norm: type[nn.Module]) -> nn.Sequential:
    between = [module for width in (inputs, hidden) for module in (nn.Linear(width, hidden), norm(hidden), nn.ReLU())]
    return nn.Sequential(*between, nn.Linear(hidden, outputs))


class Quadratic(nn.Module):
    """One hidden layer of squares on one-hot numbers, without biases (arXiv:2301.02679)."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.first, self.second = nn.Linear(2 * numbers, 256, bias=False), nn.Linear(256, numbers, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.first(F.one_hot(tokens, self.numbers).flatten(1).float()).square())


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of one-hot answers, divided by their variance."""
    n = outputs.shape[1]
    return F.mse_loss(outputs, F.one_hot(targets, n).float()) * n**2 / (n - 1)


class Recurrent(nn.Module):
    """An LSTM or GRU that reads x, y and an equals sign, one after the other."""

    def __init__(self, numbers: int, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.numbers, self.embedding = numbers, nn.Embedding(numbers + 1, WIDTH)
        self.layer, self.head = kind(WIDTH, 128, batch_first=True), nn.Linear(128, numbers)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(F.pad(tokens, (0, 1), value=self.numbers)))[0][:, -1])


class Mixer(nn.Module):
    """An MLP-Mixer with two blocks and RMSNorm, over x, y and an equals sign (arXiv:2105.01601)."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.embedding = numbers, nn.Embedding(numbers + 1, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(3, WIDTH))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(4))
        self.over_tokens = nn.ModuleList(gelu(3, 16) for _ in range(2))
        self.over_width = nn.ModuleList(gelu(WIDTH, 2 * WIDTH) for _ in range(2))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, numbers, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(F.pad(tokens, (0, 1), value=self.numbers)) + self.positions
        for i, (over_tokens, over_width) in enumerate(zip(self.over_tokens, self.over_width, strict=True)):
            x = x + over_tokens(self.norms[2 * i](x).mT).mT
            x = x + over_width(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def gelu(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def tied(numbers: int) -> nn.Module:
    """Return a transformer of one block whose head is its embedding, with GPT-2's small initial weights."""
    model = pre_norm.model(numbers, 1, WIDTH)
    model.head = nn.Linear(WIDTH, numbers + 1, bias=False)
    model.head.weight = model.token.weight
    for embedding in (model.token, model.positions):
        nn.init.normal_(embedding.weight, std=0.02)
    return model


class Convolutions(nn.Module):
    """A network from (batch, 16) bits on a ring to logits: three convolutions, then a hidden layer."""

    def __init__(self, answers: int, channels: int = 32) -> None:
        super().__init__()
        convolutions = (nn.Conv1d(c, channels, 3, padding=1, padding_mode="circular") for c in (1, channels, channels))
        self.convolutions = nn.Sequential(*(module for layer in convolutions for module in (layer, nn.ReLU())))
        self.head = nn.Sequential(nn.Linear(16 * channels, 128), nn.ReLU(), nn.Linear(128, answers))

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.convolutions(bits[:, None]).flatten(1))


class Isomorphism(nn.Module):
    """A graph isomorphism network with BatchNorm: (batch, n, n) adjacency → logits (arXiv:1810.00826)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(1, width), nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            for _ in range(3)
        )
        self.logits = nn.Linear(width, 2)

    def forward(self, adjacency: Tensor) -> Tensor:
        x = self.first(adjacency.sum(-1, keepdim=True) / 4)
        for layer in self.layers:
            x = layer((x + adjacency @ x).flatten(0, 1)).view_as(x)
        return self.logits(self.head(x.sum(1) / 4))


def group(elements: list[tuple[int, ...]]) -> Operation:
    """Return the composition of a group's numbered permutations, which applies y first, and then x."""
    number = {element: i for i, element in enumerate(elements)}
    table = torch.tensor([[number[tuple(x[i] for i in y)] for y in elements] for x in elements])
    return lambda x, y: table[x, y]


def alternating() -> list[tuple[int, ...]]:
    """Return the even permutations of five."""

    def swaps(p: tuple[int, ...]) -> int:
        return sum(p[i] > p[j] for j in range(len(p)) for i in range(j))

    return [p for p in permutations(range(5)) if swaps(p) % 2 == 0]


def dihedral(n: int) -> list[tuple[int, ...]]:
    """Return the rotations and reflections of a regular n-gon."""
    return [tuple((sign * i + k) % n for i in range(n)) for sign in (1, -1) for k in range(n)]


def parities(seed: int) -> Data:
    bits = torch.randint(2, (3000, 30), generator=torch.Generator().manual_seed(seed))
    return split(2.0 * bits - 1, bits[:, :3].sum(1) % 2, 700, seed)


def rings(seed: int) -> Data:
    """Return rings of 16 bits, and how often 101 occurs on each, modulo 3."""
    bits = torch.randint(2, (4000, 16), generator=torch.Generator().manual_seed(seed))
    found = (bits & (1 - bits.roll(-1, 1)) & bits.roll(-2, 1)).sum(1)
    return split(2.0 * bits - 1, found % 3, 1000, seed)


def graphs(seed: int) -> Data:
    """Return graphs of ten nodes, half of them connected, and whether each is connected."""
    edges = torch.rand(6000, 10, 10, generator=torch.Generator().manual_seed(seed)) < 0.28
    adjacency = edges.triu(1).float()
    adjacency = adjacency + adjacency.mT
    reached = torch.linalg.matrix_power(adjacency + torch.eye(10), 9) > 0
    connected = reached[:, 0].all(-1)
    kept = torch.cat([(connected == answer).nonzero()[:1250, 0] for answer in (True, False)])
    return split(adjacency[kept], connected[kept].long(), 150, seed)


def table(numbers: int, operation: Operation, share: float = 0.5) -> partial[Data]:
    return partial(pairs, numbers, operation, share, False)


TASKS = [
    Task("add59/mlp", "x + y mod 59, an MLP", starts(partial(MLP, 59, 59), table(59, lambda x, y: (x + y) % 59), None)),
    Task(
        "gcd64/mlp",
        "the greatest common divisor of two numbers up to 64, an MLP",
        starts(partial(MLP, 64, 65), table(64, lambda x, y: torch.gcd(x + 1, y + 1)), 128),
    ),
    Task(
        "add53/quadratic",
        "x + y mod 53, a hidden layer of squares, squared errors",
        starts(partial(Quadratic, 53), table(53, lambda x, y: (x + y) % 53, 0.35), None),
        loss=squared_error,
    ),
    Task(
        "sub59/lstm",
        "x − y mod 59, an LSTM",
        starts(partial(Recurrent, 59, nn.LSTM), table(59, lambda x, y: (x - y) % 59), 512),
    ),
    Task(
        "add59/gru",
        "x + y mod 59, a GRU",
        starts(partial(Recurrent, 59, nn.GRU), table(59, lambda x, y: (x + y) % 59), 512),
    ),
    Task(
        "ring16/cnn", "how often 101 is on a ring of bits, convolutions", starts(partial(Convolutions, 3), rings, 128)
    ),
    Task(
        "a5/mlp-layernorm",
        "composition of even permutations of five, an MLP with LayerNorm",
        starts(partial(MLP, 60, 60, nn.LayerNorm), table(60, group(alternating()), 0.6), 512),
    ),
    Task(
        "d30/mlp-batchnorm",
        "composition of symmetries of a 30-gon, an MLP with BatchNorm",
        starts(partial(MLP, 60, 60, nn.BatchNorm1d), table(60, group(dihedral(30))), 512),
    ),
    Task(
        "parity30/mlp-layernorm",
        "the parity of 3 of 30 bits, an MLP with LayerNorm",
        starts(partial(layers, 30, 128, 2, nn.LayerNorm), parities, 128),
    ),
    Task(
        "mul60/mixer",
        "x · y mod 60, an MLP-Mixer with RMSNorm",
        starts(partial(Mixer, 60), table(60, lambda x, y: x * y % 60), 512),
    ),
    Task(
        "add59/tied",
        "x + y mod 59, a transformer whose head is its embedding",
        starts(partial(tied, 59), table(59, lambda x, y: (x + y) % 59), 512),
    ),
    Task(
        "squares59/tied",
        "x² + y² mod 59 from a quarter of all pairs, a transformer whose head is its embedding",
        starts(partial(tied, 59), table(59, lambda x, y: (x * x + y * y) % 59, 0.25), 512),
    ),
    Task("connected10/gnn", "whether a graph is connected, a GNN with BatchNorm", starts(Isomorphism, graphs, 128)),
]
