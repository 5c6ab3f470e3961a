"""A tiny language model on film reviews with Lightning: python docs/examples/with_lightning.py

It takes less than a minute on two cores. with_lightning.png shows the run: the model learns its few reviews by
heart, the gap between the losses opens, and the filter's memory α becomes shorter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning
from text import model, reviews
from torch import Tensor
from torch.utils.data import DataLoader

from grokadamw import GrokAdamW, Monitor, decay_groups
from grokadamw.lightning import GrokAdamWCallback


class Reviews(lightning.LightningModule):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.model = model(letters)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> GrokAdamW:
        optimizer = GrokAdamW(decay_groups(self, weight_decay=0.1), lr=3e-3, lamb=1.0)
        self.monitor = Monitor(optimizer, every=10)
        return optimizer


def main(picture: Path = Path("with_lightning.png"), epochs: int = 28) -> None:
    samples, letters = reviews(60_000)
    half = len(samples) // 2
    lightning.seed_everything(0)
    module = Reviews(letters)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=[GrokAdamWCallback()],
            default_root_dir=folder,
            logger=False,
            accelerator="cpu",
        )
        trainer.fit(
            module,
            DataLoader(samples[:half], batch_size=32, shuffle=True),
            DataLoader(samples[half:], batch_size=64),
        )
    module.monitor.plot(picture)
    last = module.monitor.rows[-1]
    print(
        f"losses {last['train_loss']:.2f} and {last['eval_loss']:.2f}, α {last['alpha']:.3f}; see {picture}"
    )


if __name__ == "__main__":
    main()
