"""For Lightning: losses for the signals, layers from the model, and what the optimizer does in the logs.

```python
Trainer(callbacks=[GrokAdamWCallback()], ...).fit(module)
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import trainers
from .grokadamw import GrokAdamW
from .notices import warn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError("grokadamw.lightning needs lightning: pip install 'grokadamw[lightning]'") from error

__all__ = ["GrokAdamWCallback"]


class GrokAdamWCallback(Callback):
    """Makes Lightning's Trainer and GrokAdamW work together, with automatic and with manual optimization.

    - Layers are the module's, or of several optimizers those of the smallest module that has all that it optimizes.
    - The loss of every training batch, and that of every validation, go to the signals: α adapts.
    - ``grok_alpha``, ``grok_signal``, ``grok_grad_norm``, ``grok_clip_coefficient`` and ``grok_skipped_steps`` are
      logged every ``log_every_n_steps``, as far as they are known; those of a second optimizer as ``grok_alpha_1``, ….

    It warns, once, where Lightning clips gradients, too, and where a loss that it waits for is not there.

    Signals are given where the optimizer is made, in ``configure_optimizers``.

    Args:
        eval_loss: the name under which ``validation_step`` logs the loss.
        train_loss: the key of the loss in what ``training_step`` returns, or the name under which it logs it.

    Raises:
        TypeError: an argument is no name; or, when training begins, no optimizer is a GrokAdamW.
    """

    def __init__(self, eval_loss: str = "val_loss", train_loss: str = "loss") -> None:
        super().__init__()
        for name, value in (("eval_loss", eval_loss), ("train_loss", train_loss)):
            if not isinstance(value, str):
                raise TypeError(f"{name}={value!r} is not the name of a loss, as in {name}='loss'")
        self._train_loss, self._eval_loss = train_loss, eval_loss
        self._optimizers: list[GrokAdamW] = []
        self._logged_at = -1
        self._said: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [trainers.grokadamw_in(optimizer) for optimizer in trainer.optimizers]
        self._optimizers = [optimizer for optimizer in found if optimizer is not None]
        if not self._optimizers:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
            raise TypeError(
                f"GrokAdamWCallback found {names}, and no GrokAdamW: return one from configure_optimizers, or leave "
                "the callback out"
            )
        for optimizer in self._optimizers:
            optimizer.set_layers(trainers.smallest_with(optimizer, pl_module))
        limit = trainer.gradient_clip_val
        if limit and trainer.gradient_clip_algorithm != "value" and self._says("clips"):
            trainers.say_who_clips(self._optimizers[0], float(limit), "gradient_clip_val")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        returned = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
        self._record("train_loss", returned.get(self._train_loss), trainer, self._train_loss)
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and step != self._logged_at:
            self._logged_at = step
            for i, optimizer in enumerate(self._optimizers):
                which = f"_{i}" if i else ""
                pl_module.log_dict({f"{name}{which}": x for name, x in trainers.readings(optimizer).items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizers and not trainer.sanity_checking:
            self._record("eval_loss", None, trainer, self._eval_loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizers = []

    def _record(self, which: str, loss: Any, trainer: Trainer, name: str) -> None:
        logged = trainer.callback_metrics
        loss = logged.get(name) if loss is None else loss
        if loss is not None:
            for optimizer in self._optimizers:
                optimizer.record(**{which: loss})
        elif self._says(which):
            warn(
                f"GrokAdamWCallback waits for {which}={name!r}, and what is logged is "
                f"{', '.join(sorted(logged)) or 'nothing'}: signals of losses stay silent; log it under this name, or "
                f"give another",
                UserWarning,
            )

    def _says(self, what: str) -> bool:
        """Whether it is the first time."""
        is_first = what not in self._said
        self._said.add(what)
        return is_first
