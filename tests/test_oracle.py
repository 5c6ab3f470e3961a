"""The whole optimizer against the NumPy oracle, under random everything."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokadamw import GrokAdamW

from .models import IMPLEMENTATIONS, running
from .oracle import Oracle, combined_signal, layer_numbers

NAMES = [
    "embed.weight",
    "module.embed.bias",
    "_orig_mod.layers.0.attn.weight",
    "layers.0.mlp.2.weight",
    "layers.1.norm.weight",
    "layers.10._checkpoint_wrapped_module.mlp.bias",
    "module._orig_mod.layers.1.norm.bias",
    "head.out.weight",
    "scale",
]


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


hyper_parameters = st.fixed_dictionaries(
    {
        "lr": between(0, 0.1),
        "betas": st.tuples(between(0, 0.99), between(0, 0.9999)),
        # where v is 0, as with β2 = 0 after micro-batches that hold NaN, θ moves by lr m / ε, and a limit on rows cuts
        # that back: with a smaller ε what is left of it is rounding
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
signal_values = st.none() | st.sampled_from([np.nan, np.inf, -1.0, 0.0, 1e30]) | between(0, 3)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Groups with hyper-parameters, shapes and layers, and what happens at each step."""
    count = draw(st.integers(1, 3))
    named = draw(st.booleans())
    names = list(draw(st.permutations(NAMES)))
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
    @settings(max_examples=50 if implementation == "gpu" else 150)  # as interpreted kernels are slow
    @given(problem=problems())
    def check(problem: dict[str, Any]) -> None:
        every_step_is_the_oracles(problem, options)

    with running(implementation) as options:
        check()


def every_step_is_the_oracles(problem: dict[str, Any], options: dict[str, Any]) -> None:
    rng = np.random.default_rng(problem["seed"])
    groups = problem["groups"]

    def tensor(shape: tuple[int, ...], is_complex: bool) -> torch.Tensor:
        value = rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0.0)
        return torch.as_tensor(value, dtype=torch.complex128 if is_complex else torch.float64)

    params = [
        [torch.nn.Parameter(tensor(*each)) for each in zip(group["shapes"], group["complex"], strict=True)]
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
            {**h, "values": [p.detach().numpy() for p in ps], "layers": ls}
            for h, ps, ls in zip(hyper, params, layers, strict=True)
        ],
        **problem["mode"],
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
        warnings.simplefilter("ignore")  # of signals left out, layers and skipped steps, which have tests of their own
        for step in problem["steps"]:
            said[:] = step["signals"]
            for group, ps, missing, ours, theirs in zip(
                groups, params, step["missing"], optimizer.param_groups, oracle.groups, strict=True
            ):
                if step["lamb"] is not None:
                    ours["lamb"] = theirs["lamb"] = step["lamb"]
                for p, is_complex, none in zip(ps, group["complex"], missing, strict=True):
                    p.grad = None if none else tensor(tuple(p.shape), is_complex)
                    if step["poison"] and p.grad is not None and p.numel():
                        p.grad.view(-1)[0] = np.nan
            before = [None if p.grad is None else p.grad.clone() for ps in params for p in ps]
            optimizer.step()
            oracle.step(
                [[None if p.grad is None else p.grad.numpy() for p in ps] for ps in params],
                combined_signal(step["signals"], problem["combine"]),
            )
            for p, grad in zip([p for ps in params for p in ps], before, strict=True):
                assert (p.grad is None and grad is None) or torch.equal(p.grad.nan_to_num(), grad.nan_to_num())
    metrics = optimizer.metrics()
    assert metrics["skipped_steps"] == oracle.skipped
    np.testing.assert_allclose(metrics["alpha"], min(oracle.alphas), rtol=1e-12)
    for ps, group in zip(params, oracle.groups, strict=True):
        for p, value, state in zip(ps, group["values"], group["state"], strict=True):
            close(p.detach(), value)
            ours = optimizer.state.get(p, {})
            assert ours.get("step", torch.zeros(())).item() == state["t"]
            if ours:
                close(ours["exp_avg"], state["m"])
                close(ours["exp_avg_sq"], state["v"])
                if state["mu"] is not None:
                    close(ours["grok_ema"], state["mu"])
                else:  # a step for the state alone may have made it
                    assert not ours.get("grok_ema", torch.zeros(())).any()


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    real = torch.view_as_real(ours) if ours.is_complex() else ours
    # m / √v of a small ĝ, after large ones, magnifies rounding
    np.testing.assert_allclose(real.numpy(), theirs, rtol=1e-9, atol=1e-10)
