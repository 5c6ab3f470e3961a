"""Tests of the whole optimizer against the NumPy oracle, on random problems."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from grokadamw import GrokAdamW
from grokadamw.options import STATES
from grokadamw.state import formats

from .models import IMPLEMENTATIONS, running
from .oracle import Oracle, combined_signal, layer_numbers

NAMES = [
    "embed.weight",
    "embed.bias",
    "_orig_mod.layers.0.attn.weight",
    "layers.0.mlp.2.weight",
    "layers.1.norm.weight",
    "layers.10._checkpoint_wrapped_module.mlp.bias",
    "_orig_mod.layers.1.norm.bias",
    "head.out.weight",
    "scale",
]


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


hyper_parameters = st.fixed_dictionaries(
    {
        "lr": between(0, 0.1),
        "betas": st.tuples(between(0, 0.99), between(0, 0.9999)),
        # if v is 0, as with β2 = 0 after micro-batches that hold NaN, θ moves by lr m / ε, and a limit on rows cuts
        # that back; with a smaller ε only rounding would be left
        "eps": between(1e-8, 1e-3),
        "weight_decay": between(0, 1),
        "alpha_init": between(0, 1),
        "lamb": st.sampled_from([0.0, 1.0, 2.0]) | between(0, 5),
        "gamma": st.just(0.0) | between(0, 0.9),
        "grokking_signal_decay_rate": between(0, 2),
        "gradient_clipping": st.just(0.0) | between(0.01, 10),
        "max_row_norm": st.just(0.0) | between(0.1, 3),
        "max_row_change": st.just(0.0) | between(1e-3, 0.5),
        "amplify_after": st.integers(0, 3),
        "signal_boost": st.just(0.0) | between(0, 3),
        "decay_boost": st.just(0.0) | between(0, 30),
        "maximize": st.booleans(),
    }
)
modes = st.fixed_dictionaries({"second_moment": st.sampled_from(["filtered", "raw"])}) | st.one_of(
    st.fixed_dictionaries(
        {
            "second_moment": st.sampled_from(["filtered", "raw"]),
            "window_size": st.integers(1, 4),
            "amplify_by_signal": st.booleans(),
        }
    ),
    st.fixed_dictionaries(
        {
            "second_moment": st.just("raw"),
            "accumulation_steps": st.integers(1, 4),
            "amplify_by_signal": st.booleans(),
        }
    ),
)
# formats of states and parameters: the dtype of the parameters, and the optimizer's options
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.float32, {"state_dtype": "bfloat16"}),
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "int8 and bfloat16": (torch.float32, {"state_dtype": {"exp_avg": "bfloat16", "exp_avg_sq": "int8"}}),
    "bfloat16 of 32 bits, int8": (torch.bfloat16, {"master_weight_bits": 32, "state_dtype": "int8"}),
    "bfloat16 of 24 bits": (torch.bfloat16, {"master_weight_bits": 24, "state_dtype": {"grok_ema": "int8"}}),
    "float16 of 32 bits": (torch.float16, {"master_weight_bits": 32}),
    "float16 of 24 bits, bfloat16": (torch.float16, {"master_weight_bits": 24, "state_dtype": "bfloat16"}),
    "bfloat16, rounded": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "int8"}),
    "float16, rounded": (torch.float16, {"rounding": "stochastic"}),
}
signal_values = st.none() | st.sampled_from([np.nan, np.inf, -1.0, 0.0, 1e30]) | between(0, 3)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
wide_shapes = shapes | st.tuples(st.integers(1, 3), st.sampled_from([33, 64, 97])) | st.tuples(st.integers(30, 200))


@st.composite
def problems(draw: Any, shapes: st.SearchStrategy = shapes) -> dict[str, Any]:
    """Draw groups with hyper-parameters, shapes and layers, and the events of each step."""
    count = draw(st.integers(1, 3))
    named = draw(st.booleans())
    in_ddp = draw(st.sampled_from(["", "module."]))
    names = [in_ddp + name for name in draw(st.permutations(NAMES))]
    groups = []
    for _ in range(count):
        group = draw(hyper_parameters)
        group["shapes"] = draw(st.lists(shapes, min_size=int(named), max_size=3))
        group["complex"] = [draw(st.booleans()) for _ in group["shapes"]]
        group["names"] = [names.pop() for _ in group["shapes"]] if named else None
        group["layer"] = None if named else draw(st.none() | st.integers(0, 5))
        groups.append(group)
    mode = draw(modes)
    signals = draw(st.integers(int(mode.get("amplify_by_signal", False)), 3))
    steps = [
        {
            "signals": [draw(signal_values) for _ in range(signals)],
            "missing": [[draw(st.integers(0, 4)) == 0 for _ in group["shapes"]] for group in groups],
            "poison": draw(st.integers(0, 5)) == 0,
            "lamb": draw(st.sampled_from([None, None, 0.0, 2.0])),
        }
        for _ in range(draw(st.integers(1, 9)))
    ]
    return {
        "groups": groups,
        "signals": signals,
        "combine": draw(st.sampled_from(["mean", "max", "min"])),
        "mode": mode,
        "steps": steps,
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_step_is_the_oracles(implementation: str) -> None:
    most = settings().max_examples

    @settings(max_examples=most // 2 if implementation == "gpu" else most)  # interpreted kernels are slow
    @given(problem=problems())
    def check(problem: dict[str, Any]) -> None:
        every_step_is_the_oracles(problem, options)

    with running(implementation, chunk=32) as options:
        check()


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name != "gpu"]
)  # gpu leaves these formats to cpu
def test_every_step_in_fewer_bits_is_the_oracles(
    implementation: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "SMALL", 1)
    dtype, how = FORMATS[kept]

    @settings(max_examples=settings().max_examples // 4, phases=[Phase.generate])
    @given(problem=problems(wide_shapes), beta2=between(0.9, 0.9999))
    def check(problem: dict[str, Any], beta2: float) -> None:
        for group in problem["groups"]:  # a small v magnifies rounding, and float32 rounds more
            group["betas"] = group["betas"][0], beta2
        if "state_dtype" in how and "window_size" in problem["mode"]:
            problem["mode"] = {"second_moment": "raw", "accumulation_steps": 2}
        every_step_is_the_oracles(problem, {**options, **how}, dtype)

    with running(implementation) as options:
        check()


def every_step_is_the_oracles(
    problem: dict[str, Any], options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> None:
    """Check every step. With fewer bits than float64 the oracle begins each step with the optimizer's numbers.

    So rounding does not add up, and a code is at most a neighbour of the oracle's.
    """
    rng = np.random.default_rng(problem["seed"])
    groups, half = problem["groups"], None if dtype.itemsize > 2 else str(dtype).removeprefix("torch.")
    how = {name: options[name] for name in ("state_dtype", "master_weight_bits", "rounding") if name in options}

    def tensor(shape: tuple[int, ...], is_complex: bool) -> torch.Tensor:
        value = rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0.0)
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.as_tensor(value).to(wide if is_complex else dtype)

    params = [
        [torch.nn.Parameter(tensor(*shape)) for shape in zip(group["shapes"], group["complex"], strict=True)]
        for group in groups
    ]
    hyper = [{k: v for k, v in group.items() if k not in ("shapes", "complex", "names")} for group in groups]
    if groups[0]["names"] is not None:
        layers = layer_numbers([group["names"] for group in groups])
    else:
        layers = [
            [i if group["layer"] is None else group["layer"] for i in range(len(group["shapes"]))] for group in groups
        ]
    oracle = Oracle(
        [
            {**h, "values": [in_float64(p) for p in ps], "layers": ls}
            for h, ps, ls in zip(hyper, params, layers, strict=True)
        ],
        **problem["mode"],
        **how,
        half=half,
    )
    said: list[float | None] = [None] * problem["signals"]
    optimizer = GrokAdamW(
        [
            {**h, "params": list(zip(group["names"], ps, strict=True)) if group["names"] else ps}
            for h, group, ps in zip(hyper, groups, params, strict=True)
        ],
        grokking_signal_fns=[lambda i=i: said[i] for i in range(len(said))],
        combine=problem["combine"],
        **problem["mode"],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signals left out, layers and skipped steps have tests of their own
        for step in problem["steps"]:
            said[:] = step["signals"]
            for group, ps, missing, ours, expected in zip(
                groups, params, step["missing"], optimizer.param_groups, oracle.groups, strict=True
            ):
                if step["lamb"] is not None:
                    ours["lamb"] = expected["lamb"] = step["lamb"]
                for p, is_complex, none in zip(ps, group["complex"], missing, strict=True):
                    p.grad = None if none else tensor(tuple(p.shape), is_complex)
                    if step["poison"] and p.grad is not None and p.numel():
                        p.grad.view(-1)[0] = np.nan
            before = [None if p.grad is None else p.grad.clone() for ps in params for p in ps]
            optimizer.step()
            oracle.step(
                [[None if p.grad is None else in_float64(p.grad) for p in ps] for ps in params],
                combined_signal(step["signals"], problem["combine"]),
            )
            for p, grad in zip([p for ps in params for p in ps], before, strict=True):
                assert (p.grad is None and grad is None) or torch.equal(p.grad.nan_to_num(), grad.nan_to_num())
            if dtype != torch.float64:
                agree(optimizer, params, oracle, half)
    metrics = optimizer.metrics()
    assert metrics["skipped_steps"] == oracle.skipped
    np.testing.assert_allclose(metrics["alpha"], min(oracle.alphas), rtol=1e-12)
    agree(optimizer, params, oracle, half)


def agree(optimizer: GrokAdamW, params: list[list[torch.nn.Parameter]], oracle: Oracle, half: str | None) -> None:
    """Check all values and states. The oracle goes on with ours if they have fewer bits than float64."""
    for ps, group in zip(params, oracle.groups, strict=True):
        for i, (p, state) in enumerate(zip(ps, group["state"], strict=True)):
            ours = optimizer.state.get(p, {})
            whole, bits = p.detach(), "float32" if p.is_complex() or half is None else half
            if "param_low" in ours:
                whole, bits = formats.full(whole, ours["param_low"]), f"{8 * ours['param_low'].itemsize + 16} bits"
            group["values"][i] = close(whole, group["values"][i], bits, 1e-4)
            assert ours.get("step", torch.zeros(())).item() == state["t"]
            if state["mu"] is None:  # a step that only builds state may have made it
                assert not ours.get("grok_ema", torch.zeros(())).any()
            for key, name in zip(("m", "v", "mu"), STATES, strict=True):
                if ours and state[key] is not None:
                    x, scales = ours[name], ours.get(f"{name}_scale")
                    form = "int8" if scales is not None else "bfloat16" if x.dtype == torch.bfloat16 else "float32"
                    if scales is not None:
                        rows = formats.as_rows(x)
                        x = formats.decode(rows, scales.view(len(rows), -1), name).view(x.shape)
                    state[key] = close(x, state[key], f"{name} in {form}" if form == "int8" else form, 1e-5)


# format → the largest distance between neighbouring numbers around x, which has the rows of a tensor
GAPS: dict[str, Callable[[np.ndarray], Any]] = {
    "float32": lambda x: 0.0,
    "32 bits": lambda x: 2.0**-40,
    "24 bits": lambda x: abs(x) / 2**15 + 2.0**-31,
    "bfloat16": lambda x: abs(x) / 100 + 2.0**-126,
    "float16": lambda x: abs(x) / 1000 + 2.0**-24,
    "exp_avg in int8": lambda x: largest(x) / 125 + 2.0**-100,
    "grok_ema in int8": lambda x: largest(x) / 125 + 2.0**-100,
    "exp_avg_sq in int8": lambda x: np.sqrt(largest(x)) / 250 * (2 * np.sqrt(x) + np.sqrt(largest(x)) / 250),
}


def largest(x: np.ndarray) -> np.ndarray:
    """Return, for each element, the largest magnitude in its block."""
    rows = x.reshape(len(x) if x.ndim > 1 else 1, -1)
    blocks = [np.abs(rows[:, i : i + 64]) for i in range(0, rows.shape[1], 64)]
    return np.concatenate([np.full(b.shape, b.max(1, keepdims=True)) for b in blocks], axis=1).reshape(x.shape)


def close(ours: torch.Tensor, expected: np.ndarray, form: str = "float32", tolerance: float = 0.0) -> np.ndarray:
    """Check equality up to rounding, except for a few neighbouring codes. Return the values to go on with."""
    real = torch.view_as_real(ours) if ours.is_complex() else ours
    if real.dtype == torch.float64:
        # after large ĝ, m / √v of a small ĝ magnifies rounding
        np.testing.assert_allclose(real.numpy(), expected, rtol=1e-9, atol=1e-10)
        return expected
    x = real.double().numpy()
    if x.size:
        off = np.abs(x - expected) - tolerance * (1 + np.abs(expected))
        assert (off <= GAPS[form](np.maximum(np.abs(x), np.abs(expected)))).all()
        assert (off > 0).mean() <= 0.02 + 2 / x.size
    return x


def in_float64(x: torch.Tensor) -> np.ndarray:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).numpy()
