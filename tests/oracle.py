"""The step in float64 NumPy, written from the table of CONTRIBUTING.md and not from the package."""

from __future__ import annotations

import re

import numpy as np


def layer_numbers(names: list[list[str]]) -> list[list[int]]:
    """Layers of groups of named parameters: first appearance, over all groups, of the path that names the layer."""
    seen: list[str] = []
    for name in [name for group in names for name in group]:
        path = _layer_path(name)
        if path not in seen:
            seen.append(path)
    return [[seen.index(_layer_path(name)) for name in group] for group in names]


def _layer_path(name: str) -> str:
    name = re.sub(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    module = name.rpartition(".")[0]
    numbered = re.match(r"((?:[^.]*\.)*?\d+)(?:\.|$)", module)
    return numbered.group(1) if numbered else module


def combined_signal(values: list[float | None], combine: str) -> float | None:
    """Row 4."""
    usable = [value for value in values if value is not None and np.isfinite(value)]
    if not usable:
        return None
    return {"mean": np.mean, "max": np.max, "min": np.min}[combine](usable)


class Oracle:
    """Rows 1 to 3 and 5 to 10 for groups of tensors.

    Each group is a dict of the optimizer's hyper-parameters, with lists of `values`, arrays, and of `layers`, numbers.
    """

    def __init__(self, groups: list[dict], second_moment: str = "filtered") -> None:
        self.second_moment = second_moment
        self.skipped = 0
        self.has_state = False
        self.alphas = [np.nan]
        self.groups = []
        for group in groups:
            self.add(group)

    def add(self, group: dict) -> None:
        group["values"] = [
            _real(value.astype(complex if np.iscomplexobj(value) else float)) for value in group["values"]
        ]
        group["state"] = [{"t": 0, "m": 0.0 * x, "v": 0.0 * x, "mu": None} for x in group["values"]]
        self.groups.append(group)

    def step(self, grads: list[list[np.ndarray | None]], signal: float | None) -> None:
        reals = [[None if g is None else _real(g) for g in group] for group in grads]
        given = [g for group in reals for g in group if g is not None]
        with np.errstate(over="ignore"):
            norm = np.sqrt(sum(np.sum(g**2) for g in given))
        if given and not self.has_state and norm == 0 and all(group["lr"] == 0 for group in self.groups):
            self.has_state = True  # a step that has the state made, and does nothing else
            return
        self.alphas = [
            g["alpha_init"] * np.exp(-g["grokking_signal_decay_rate"] * max(signal or 0.0, 0.0)) for g in self.groups
        ]
        if not np.isfinite(norm):
            self.skipped += 1
            return
        self.has_state = self.has_state or bool(given)
        for group, gradients, alpha in zip(self.groups, reals, self.alphas, strict=True):
            clip = min(1.0, group["gradient_clipping"] / (norm + 1e-6)) if group["gradient_clipping"] else 1.0
            for i, g in enumerate(gradients):
                if g is not None:
                    self._update(group, i, clip * (-g if group["maximize"] else g), alpha)

    def _update(self, group: dict, i: int, g: np.ndarray, alpha: float) -> None:
        state, beta2, lr = group["state"][i], group["betas"][1], group["lr"]
        beta1 = group["betas"][0] * (1 - group["gamma"]) ** group["layers"][i]
        state["t"] += 1
        t = state["t"]
        if state["mu"] is None and group["lamb"] != 0:
            state["mu"] = np.zeros_like(g)
        amplified = g
        if state["mu"] is not None:
            state["mu"] = alpha * state["mu"] + (1 - alpha) * g
            amplified = g + (group["lamb"] if t > group["amplify_after"] else 0.0) * state["mu"]
        state["m"] = beta1 * state["m"] + (1 - beta1) * amplified
        squared = (g if self.second_moment == "raw" else amplified) ** 2
        state["v"] = beta2 * state["v"] + (1 - beta2) * squared
        m_hat, v_hat = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
        theta = group["values"][i] * (1 - lr * group["weight_decay"])
        group["values"][i] = theta - lr * m_hat / (np.sqrt(v_hat) + group["eps"])


def _real(array: np.ndarray) -> np.ndarray:
    """A complex array as two reals an element."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else np.array(array, dtype=float)
