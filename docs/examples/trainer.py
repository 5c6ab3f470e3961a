"""A tiny language model on film reviews with Hugging Face Trainer, resumed half way: python docs/examples/trainer.py

It takes less than a minute on two cores. trainer.png shows the run: the model learns its few reviews by heart, the
gap between the losses opens, and the filter's memory α becomes shorter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from text import model, reviews
from transformers import Trainer, TrainingArguments, set_seed

from grokadamw import Monitor
from grokadamw.huggingface import GrokAdamWCallback


def main(picture: Path = Path("trainer.png"), steps: int = 400) -> None:
    samples, letters = reviews(60_000)
    data = [{"input_ids": sample, "labels": sample} for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            optim="grokadamw",
            optim_args="lamb=1.0",
            learning_rate=3e-3,
            weight_decay=0.1,
            max_grad_norm=0.0,  # the optimizer clips
            per_device_train_batch_size=32,
            max_steps=steps,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=20,
            save_steps=steps // 2,
            report_to="none",
        )

        def trainer() -> Trainer:
            set_seed(0)
            half = len(data) // 2
            return Trainer(
                model(letters),
                arguments,
                train_dataset=data[:half],
                eval_dataset=data[half:],
                callbacks=[Watch()],
            )

        class Watch(GrokAdamWCallback):
            """Keeps a record, too: there is no optimizer before training begins."""

            def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
                super().on_train_begin(args, state, control, **kwargs)
                monitors.append(Monitor(kwargs["optimizer"], every=10))

        monitors: list[Monitor] = []
        trainer().train()
        trainer().train(
            resume_from_checkpoint=str(Path(folder, f"checkpoint-{steps // 2}"))
        )
    whole, resumed = monitors
    assert (
        whole.rows[-1] == resumed.rows[-1]
    )  # the resumed run is the uninterrupted one
    whole.plot(picture)
    last = whole.rows[-1]
    print(
        f"losses {last['train_loss']:.2f} and {last['eval_loss']:.2f}, α {last['alpha']:.3f}; see {picture}"
    )


if __name__ == "__main__":
    main()
