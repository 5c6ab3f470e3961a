"""Tests of events in random order: after each one the optimizer must agree with the oracle."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from grokadamw import GrokAdamW
from grokadamw.checkpoints import to_adamw

from .models import IMPLEMENTATIONS, running
from .oracle import Oracle, combined_signal, layer_numbers
from .test_oracle import NAMES, between, close, hyper_parameters, modes, shapes, signal_values

seeds = st.integers(0, 2**31)


class Lifetime(RuleBasedStateMachine):
    options: dict[str, Any]

    @initialize(count=st.integers(1, 2), mode=modes, data=st.data())
    def begin(self, count: int, mode: dict[str, Any], data: Any) -> None:
        self.unused = list(NAMES)
        self.names: list[list[str]] = []
        self.params: list[list[nn.Parameter]] = []
        self.frozen: set[str] = set()
        self.said: list[float | None] = [None]
        self.losses: tuple[float | None, float | None] = (None, None)
        self.mode = mode
        self.oracle = Oracle([], **mode)
        for _ in range(count):
            self._new_group(data)
        self.optimizer = self._optimizer()

    def _new_group(self, data: Any) -> None:
        hyper = data.draw(hyper_parameters)
        rng = np.random.default_rng(data.draw(seeds))
        drawn = data.draw(st.lists(shapes, min_size=1, max_size=2))
        self.names.append([self.unused.pop(0) for _ in drawn])
        self.params.append([nn.Parameter(torch.tensor(rng.normal(size=shape))) for shape in drawn])
        self.oracle.add(hyper | {"values": [p.detach().numpy() for p in self.params[-1]]})
        for group, layers in zip(self.oracle.groups, layer_numbers(self.names), strict=True):
            group["layers"] = layers

    def _hyper(self, i: int) -> dict[str, Any]:
        of_oracle = ("values", "has_rows", "layers", "state", "fixed")
        return {name: value for name, value in self.oracle.groups[i].items() if name not in of_oracle}

    def _group(self, i: int, **hyper: Any) -> dict[str, Any]:
        return {"params": list(zip(self.names[i], self.params[i], strict=True)), **hyper}

    def _optimizer(self, **changes: Any) -> GrokAdamW:
        def gap(train_loss: float, eval_loss: float) -> float:
            return max(0.0, eval_loss - train_loss)

        return GrokAdamW(
            [self._group(i, **self._hyper(i) | changes) for i in range(len(self.params))],
            grokking_signal_fns=[lambda: self.said[0], gap],
            **self.options,
            **self.mode,
        )

    def _set_gradients(self, seed: int, poison: float | None = None) -> list[list[np.ndarray | None]]:
        rng = np.random.default_rng(seed)
        for names, params in zip(self.names, self.params, strict=True):
            for name, p in zip(names, params, strict=True):
                p.grad = None
                if name not in self.frozen and rng.integers(4):
                    p.grad = torch.tensor(rng.normal(size=tuple(p.shape)))
                    if poison is not None and p.numel():
                        p.grad.view(-1)[0], poison = poison, None
        return [[None if p.grad is None else p.grad.numpy() for p in params] for params in self.params]

    def _signal(self) -> float | None:
        train_loss, eval_loss = self.losses
        gap = None if train_loss is None or eval_loss is None else max(0.0, eval_loss - train_loss)
        return combined_signal([self.said[0], gap], "mean")

    @rule(seed=seeds, said=signal_values)
    def step(self, seed: int, said: float | None) -> None:
        self.said[0] = said
        grads = self._set_gradients(seed)
        self.optimizer.step()
        self.oracle.step(grads, self._signal())

    @rule(seed=seeds, poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e200]))
    def skip(self, seed: int, poison: float) -> None:
        grads = self._set_gradients(seed, poison)
        self.optimizer.step()
        self.oracle.step(grads, self._signal())

    @rule(train_loss=st.none() | between(0, 10), eval_loss=st.none() | between(0, 10))
    def record(self, train_loss: float | None, eval_loss: float | None) -> None:
        self.optimizer.record(train_loss=train_loss, eval_loss=eval_loss)
        given = zip((train_loss, eval_loss), self.losses, strict=True)
        self.losses = tuple(old if new is None else new for new, old in given)  # type: ignore[assignment]

    @rule(changed=st.booleans())
    def save_and_load(self, changed: bool) -> None:
        """Load the state dict into a new optimizer. With `changed`, its constructor gets other numbers."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer = self._optimizer(**{"lr": 0.5, "lamb": 1.5, "gamma": 0.25} if changed else {})
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        self.oracle.alphas = [np.nan]  # unknown until the next step

    @precondition(lambda self: len(self.unused) >= 2 and len(self.params) < 4)
    @rule(data=st.data())
    def add_a_group(self, data: Any) -> None:
        self._new_group(data)
        i = len(self.params) - 1
        self.optimizer.add_param_group(self._group(i, **self._hyper(i)))

    @rule(which=seeds)
    def freeze_or_unfreeze(self, which: int) -> None:
        names = [name for group in self.names for name in group]
        self.frozen ^= {names[which % len(names)]}

    @rule(which=seeds, hyper=hyper_parameters, name=st.sampled_from(sorted(hyper_parameters.wrapped_strategy.mapping)))
    def change_a_number(self, which: int, hyper: dict[str, Any], name: str) -> None:
        i = which % len(self.params)
        self.optimizer.param_groups[i][name] = self.oracle.groups[i][name] = hyper[name]

    @rule()
    def free_the_slow_gradient(self) -> None:
        self.optimizer.free_slow_gradient()
        for group in self.oracle.groups:
            for state in group["state"]:
                state["mu"] = None

    @rule(steps=st.integers(0, 2), seed=seeds)
    def go_to_adamw_and_back(self, steps: int, seed: int) -> None:
        adamw = torch.optim.AdamW([self._group(i) for i in range(len(self.params))])
        adamw.load_state_dict(to_adamw(self.optimizer.state_dict()))
        self.free_the_slow_gradient()
        kept = [dict(group) for group in self.oracle.groups]
        mode = self.oracle.accumulation_steps, self.oracle.amplify_by_signal
        self.oracle.accumulation_steps, self.oracle.amplify_by_signal = 1, False
        self.oracle.rest()
        ours = ("lamb", "gamma", "gradient_clipping", "max_row_norm", "max_row_change")
        for group in self.oracle.groups:
            group.update(dict.fromkeys(ours, 0.0))
        for i in range(steps):
            grads = self._set_gradients(seed + i)
            adamw.step()
            self.oracle.step(grads, None)
        for group, old in zip(self.oracle.groups, kept, strict=True):
            group.update({name: old[name] for name in ours})
        self.oracle.accumulation_steps, self.oracle.amplify_by_signal = mode
        self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(adamw.state_dict())
        self.oracle.skipped, self.oracle.alphas = 0, [np.nan]
        self.losses = (None, None)

    @invariant()
    def is_where_the_oracle_is(self) -> None:
        metrics = self.optimizer.metrics()
        assert metrics["skipped_steps"] == self.oracle.skipped
        np.testing.assert_allclose(metrics["alpha"], min(self.oracle.alphas), rtol=1e-12)
        for params, group in zip(self.params, self.oracle.groups, strict=True):
            for p, value, expected in zip(params, group["values"], group["state"], strict=True):
                close(p.detach(), value)
                ours = self.optimizer.state.get(p, {})
                assert ours.get("step", torch.zeros(())).item() == expected["t"]
                if ours:
                    close(ours["exp_avg"], expected["m"])
                    close(ours["exp_avg_sq"], expected["v"])
                if expected["mu"] is not None:
                    close(ours["grok_ema"], expected["mu"])
                else:
                    assert not ours.get("grok_ema", torch.zeros(())).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("examples", [20, pytest.param(600, marks=pytest.mark.long)])
def test_lifetimes(implementation: str, examples: int) -> None:
    machine = type("Lifetime", (Lifetime,), {"options": IMPLEMENTATIONS[implementation]}).TestCase
    machine.settings = settings(max_examples=examples, stateful_step_count=25)
    with warnings.catch_warnings(), running(implementation):
        warnings.simplefilter("ignore")  # skipped steps, signals and layers have tests of their own
        machine("runTest").runTest()
