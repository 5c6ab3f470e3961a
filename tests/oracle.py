"""The step in float64 NumPy, written from the table in CONTRIBUTING.md and not from the package."""

from __future__ import annotations

import re

import numpy as np

from . import formats_oracle

STATES = ("exp_avg", "exp_avg_sq", "grok_ema")


def layer_numbers(names: list[list[str]]) -> list[list[int]]:
    """Return the layers of groups of named parameters, numbered by the first appearance of a layer's path.

    The numbers count over all groups. Parameters outside all modules are in the first layer, too.
    """
    seen: list[str] = []
    for name in [name for group in names for name in group]:
        path = _layer_path(name)
        if path and path not in seen:
            seen.append(path)
    paths = [[_layer_path(name) for name in group] for group in names]
    return [[seen.index(path) if path else 0 for path in group] for group in paths]


def _layer_path(name: str) -> str:
    name = re.sub(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    module = re.sub(r"^(module\.)+", "", name).rpartition(".")[0]
    numbered = re.match(r"((?:[^.]*\.)*?\d+)(?:\.|$)", module)
    return numbered.group(1) if numbered else module


def combined_signal(values: list[float | None], combine: str) -> float | None:
    """Compute the stage `signal`."""
    usable = [value for value in values if value is not None and np.isfinite(value)]
    if not usable:
        return None
    return {"mean": np.mean, "max": np.max, "min": np.min}[combine](usable)


class Oracle:
    """All stages but `signal`, for groups of tensors.

    Each group is a dict of the optimizer's hyper-parameters, with `values`, a list of arrays, and `layers`, a list of
    numbers. Values and states may be kept in fewer bits; `half` is the dtype of 16-bit values.
    """

    def __init__(
        self,
        groups: list[dict],
        second_moment: str = "filtered",
        *,
        window_size: int | None = None,
        accumulation_steps: int = 1,
        amplify_by_signal: bool = False,
        state_dtype: str | dict = "float32",
        master_weight_bits: int | None = None,
        rounding: str = "nearest",
        half: str | None = None,
    ) -> None:
        self.formats = {name: state_dtype if isinstance(state_dtype, str) else state_dtype.get(name) for name in STATES}
        self.half, self.weight_bits = half, master_weight_bits or (16 if rounding == "stochastic" else 0)
        self.second_moment, self.window_size = second_moment, window_size
        self.accumulation_steps, self.amplify_by_signal = accumulation_steps, amplify_by_signal
        self.micro_step = 0  # micro-batches of this cycle so far
        self.skipped = 0
        self.alphas = [np.nan]
        self.groups = []
        for group in groups:
            self.add(group)

    def add(self, group: dict) -> None:
        group["has_rows"] = [value.ndim > 1 for value in group["values"]]
        group["is_complex"] = [np.iscomplexobj(value) for value in group["values"]]
        group["first"] = sum(len(other["values"]) for other in self.groups)  # the number of its first parameter
        group["values"] = [
            _real(value.astype(complex if np.iscomplexobj(value) else float)) for value in group["values"]
        ]
        group["state"] = [
            {"t": 0, "m": 0.0 * x, "v": 0.0 * x, "mu": None, "past": [], "micro": 0} for x in group["values"]
        ]
        self._fix(group, group["alpha_init"], self.groups[0]["fixed"]["gate"] if self.groups else 1.0)
        self.groups.append(group)

    def _fix(self, group: dict, alpha: float, gate: float, share: float = 0.0) -> None:
        """Fix the numbers that hold for all micro-batches of a cycle."""
        group["fixed"] = {name: group[name] for name in ("betas", "gamma")}
        group["fixed"] |= {"alpha": alpha, "lamb": group["lamb"], "gate": gate}
        group["fixed"]["boost"] = 1 + group.get("signal_boost", 0.0) * share
        group["fixed"]["decay_boost"] = 1 + group.get("decay_boost", 0.0) * share

    def rest(self) -> None:
        """Reset the micro-batch counts, so that the next step begins a cycle."""
        self.micro_step = 0
        for group in self.groups:
            for state in group["state"]:
                state["micro"] = 0

    def step(self, grads: list[list[np.ndarray | None]], signal: float | None) -> None:
        reals = [[None if g is None else _real(g) for g in group] for group in grads]
        is_last = self.micro_step + 1 >= self.accumulation_steps
        for group, of_group in zip(self.groups, reals, strict=True):
            for i, state in enumerate(group["state"]):
                if is_last and of_group[i] is None and state["micro"]:
                    of_group[i] = 0 * group["values"][i]  # earlier gradients of this cycle still move it
        given = [g for group in reals for g in group if g is not None]
        with np.errstate(over="ignore"):
            norm = np.sqrt(sum(np.sum(g**2) for g in given))
        if self.micro_step == 0:
            share = min(1.0, max(0.0, signal or 0.0))
            for g in self.groups:
                alpha = g["alpha_init"] * np.exp(-g["grokking_signal_decay_rate"] * max(signal or 0.0, 0.0))
                gate = share if self.amplify_by_signal else 1.0
                self._fix(g, alpha, gate, share)
        self.alphas = [group["fixed"]["alpha"] for group in self.groups]
        if not np.isfinite(norm):
            self.skipped += 1
            if self.accumulation_steps == 1:
                return
            reals = [[None if g is None else np.zeros_like(g) for g in group] for group in reals]
            norm = 0.0
        for group, gradients in zip(self.groups, reals, strict=True):
            clip = min(1.0, group["gradient_clipping"] / (norm + 1e-6)) if group["gradient_clipping"] else 1.0
            for i, g in enumerate(gradients):
                if g is not None:
                    self._update(group, i, clip * (-g if group["maximize"] else g), is_last)
        self.micro_step = 0 if is_last else self.micro_step + 1

    def _update(self, group: dict, i: int, g: np.ndarray, is_last: bool) -> None:
        """Apply the stages `slow_grad` to `limit_rows`; micro-batches follow https://kexue.fm/archives/8634."""
        k, state, fixed = self.accumulation_steps, group["state"][i], group["fixed"]
        (beta1, beta2), alpha = fixed["betas"], fixed["alpha"]
        beta1 = beta1 * (1 - fixed["gamma"]) ** group["layers"][i]
        keep_mu, keep_m, keep_v = (1, 1, 1) if state["micro"] else (alpha, beta1, beta2)
        state["micro"] = 0 if is_last else state["micro"] + 1
        t = state["t"] + 1
        if state["mu"] is None and fixed["lamb"] != 0:
            state["mu"], state["past"] = np.zeros_like(g), []
        amplified = g / k
        if state["mu"] is not None:
            if self.window_size is None:
                state["mu"] = keep_mu * state["mu"] + (1 - alpha) * g / k
            else:
                state["past"] = [*state["past"], g][-self.window_size :]
                state["mu"] = np.mean(state["past"], axis=0)
            if is_last and t > group["amplify_after"]:
                amplified = amplified + fixed["lamb"] * fixed["gate"] * state["mu"]
        state["m"] = keep_m * state["m"] + (1 - beta1) * amplified
        squared = g**2 / k if self.second_moment == "raw" else amplified**2
        state["v"] = keep_v * state["v"] + (1 - beta2) * squared
        m_hat, v_hat = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
        draw = (t - 1) * k + self.micro_step
        self._keep_states(group, i, draw)
        if not is_last:
            return
        state["t"] = t
        before, lr = group["values"][i], group["lr"] * fixed["boost"]
        theta = before * (1 - lr * group["weight_decay"] * fixed["decay_boost"])
        group["values"][i] = theta - lr * m_hat / (np.sqrt(v_hat) + group["eps"])
        if group["has_rows"][i] and theta.size:
            rows, old = group["values"][i].reshape(len(theta), -1), before.reshape(len(theta), -1)
            if group.get("max_row_change"):
                moved = np.maximum(np.linalg.norm(rows - old, axis=1), 1e-300)
                furthest = group["max_row_change"] * fixed["boost"] * np.maximum(np.linalg.norm(old, axis=1), 0.1)
                rows = old + (rows - old) * np.minimum(1, furthest / moved)[:, None]
            if group.get("max_row_norm"):
                norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
                rows = rows * np.minimum(1, group["max_row_norm"] / norms)[:, None]
            group["values"][i] = rows.reshape(theta.shape)
        if self.weight_bits and self.half and theta.size and not group["is_complex"][i]:
            rows = group["values"][i].reshape(len(theta) if group["has_rows"][i] else 1, -1)
            dithers = formats_oracle.words(group["first"] + i, draw, "param", *rows.shape)
            whole, _ = formats_oracle.weights(rows.astype(np.float32), self.half, self.weight_bits, dithers)
            group["values"][i] = whole.astype(float).reshape(theta.shape)

    def _keep_states(self, group: dict, i: int, draw: int) -> None:
        """Replace each state by what comes back after it is stored in its format."""
        for key, (name, form) in zip(("m", "v", "mu"), self.formats.items(), strict=True):
            x = group["state"][i][key]
            if x is None or not x.size or group["is_complex"][i] or form not in ("bfloat16", "int8"):
                continue
            rows = x.reshape(len(x) if group["has_rows"][i] else 1, -1).astype(np.float32)
            dithers = formats_oracle.words(group["first"] + i, draw, name, *rows.shape)
            if form == "bfloat16":
                rows = formats_oracle.bfloat16(rows, name, dithers)
            elif rows.shape[1] >= 32:
                rows = formats_oracle.decoded(*formats_oracle.encoded(rows, name, dithers), name)
            group["state"][i][key] = rows.astype(float).reshape(x.shape)


def _real(array: np.ndarray) -> np.ndarray:
    """Return a complex array as two reals per element, and a real one as it is."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else np.array(array, dtype=float)
