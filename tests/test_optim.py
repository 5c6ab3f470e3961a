"""Tests that torch's own optimizers pass, family by family, under the names that torch's test/test_optim.py has.

As in torch, an `OptimizerInfo` declares what the optimizer accepts and refuses, and each family of tests goes through
all of it. Torch only asks that a step works after loading or copying. Here it must be the step of the uninterrupted
run, bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from grokadamw import GrokAdamW
from grokadamw.signals import SlowGradient

from .models import network, running

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal import common_optimizers  # noqa: E402
from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
)
from torch.testing._internal.common_utils import TestCase  # noqa: E402

settings.load_profile("default")  # the import above loads torch's profile for all tests

Kwargs: TypeAlias = dict[str, Any]

CHECK = TestCase()  # a TensorTracker compares with it
assert_close = CHECK.assertEqual  # takes state dicts; torch.testing's refuses text and None
assert_same = partial(assert_close, rtol=0, atol=0)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    kwargs: dict[str, Kwargs] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "no filter": {"lamb": 0.0},
        "one beta1": {"gamma": 0.0},
        "no clipping": {"gradient_clipping": 0.0},
        "tight clipping": {"gradient_clipping": 0.01},
        "raw second moment": {"second_moment": "raw"},
        "late filter": {"amplify_after": 2},
        "signal": {"grokking_signal_fns": SlowGradient(every=2)},
        "no norm": {"nonfinite": "propagate", "gradient_clipping": 0.0},
        # its state has the parameter's dtype, in which the default eps is 0
        "0.1.2": {"compat": "0.1.2"} | ({"eps": 0.1} if dtype == torch.float16 else {}),
        "Tensor lr": {"lr": torch.tensor(0.001)},
        "Tensor alpha_init": {"alpha_init": torch.tensor(0.9)},
    }
    if device == "cuda":
        kwargs |= {
            "raise": {"nonfinite": "raise"},
            "capturable": {"capturable": True},
            "capturable, late filter": {"weight_decay": 0.1, "amplify_after": 2, "capturable": True},
            "capturable, Tensor lr": {"lr": torch.tensor(0.001), "capturable": True},
            "capturable, signal": {"grokking_signal_fns": SlowGradient(every=2), "capturable": True},
            "capturable, 0.1.2": {**kwargs["0.1.2"], "capturable": True},
        }
    return [OptimizerInput(params=None, kwargs=value, desc=desc) for desc, value in kwargs.items()]


def errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    def parameter(grad: Tensor | None = None) -> nn.Parameter:
        p = nn.Parameter(torch.ones(2, 2, device=device, dtype=dtype))
        p.grad = grad
        return p

    grad = torch.ones(2, 2, device=device, dtype=dtype)
    constructed: list[tuple[type[Exception], str, Kwargs]] = [
        (ValueError, r"betas\[0\]=1.0 is out of range", {"betas": (1.0, 0.0)}),
        (ValueError, r"betas\[1\]=1.0 is out of range", {"betas": (0.0, 1.0)}),
        (ValueError, r"betas\[1\]=-0.1 is out of range", {"betas": (0.9, -0.1)}),
        (TypeError, r"betas=0.9 is not a pair", {"betas": 0.9}),
        (ValueError, "lr=-1 is out of range", {"lr": -1}),
        (ValueError, "lr=-1.0 is out of range", {"lr": torch.tensor(-1.0)}),
        (ValueError, "weight_decay=-1 is out of range", {"weight_decay": -1}),
        (ValueError, "eps=-1 is out of range", {"eps": -1}),
        (ValueError, "lamb=-1 is out of range", {"lamb": -1}),
        (ValueError, "gamma=1 is out of range", {"gamma": 1}),
        (ValueError, "alpha_init=1.1 is out of range", {"alpha_init": 1.1}),
        (ValueError, "Tensor alpha_init must be 1-element", {"alpha_init": torch.tensor([0.9, 0.9])}),
        (ValueError, "grokking_signal_decay_rate=-1 is out of range", {"grokking_signal_decay_rate": -1}),
        (TypeError, "gradient_clipping=None is not a number; 0 switches it off", {"gradient_clipping": None}),
        (ValueError, "max_row_norm=1.0 with compat='0.1.2'", {"max_row_norm": 1.0, "compat": "0.1.2"}),
        (ValueError, "max_row_change=0.5 with compat='0.1.2'", {"max_row_change": 0.5, "compat": "0.1.2"}),
        (ValueError, r"max_row_norm=-0\.1 is out of range", {"max_row_norm": -0.1}),
        (ValueError, r"max_row_change=-0\.1 is out of range", {"max_row_change": -0.1}),
        (TypeError, "max_row_change=None is not a number; 0 switches it off", {"max_row_change": None}),
        (TypeError, "max_row_norm=None is not a number; 0 switches it off", {"max_row_norm": None}),
        (TypeError, "amplify_after=0.5 is not an integer", {"amplify_after": 0.5}),
        (ValueError, "second_moment='cooked' is unknown", {"second_moment": "cooked"}),
        (ValueError, "compat='0.1.1' is unknown", {"compat": "0.1.1"}),
        (ValueError, "nonfinite='raise' with compat='0.1.2'", {"nonfinite": "raise", "compat": "0.1.2"}),
        (
            ValueError,
            "lr as a Tensor is not supported for capturable=False and foreach=True",
            {"lr": torch.tensor(0.001), "foreach": True},
        ),
        (ValueError, "foreach=True with differentiable=True", {"foreach": True, "differentiable": True}),
        (RuntimeError, "`fused` and `foreach` cannot be `True` together", {"fused": True, "foreach": True}),
        (RuntimeError, "`fused` does not support `differentiable`", {"fused": True, "differentiable": True}),
    ]
    in_a_group: list[tuple[str, Kwargs]] = [
        ("it holds for the whole optimizer", {"second_moment": "raw"}),
        ("it holds for the whole optimizer", {"nonfinite": "raise"}),
        ("it holds for the whole optimizer", {"compat": "0.1.2"}),
        ("it holds for the whole optimizer", {"differentiable": True}),
        ("shard_group=2 in a parameter group: it holds for the whole", {"shard_group": 2}),
        ("it holds for the whole optimizer", {"grokking_signal_fns": [SlowGradient()]}),
        ("weight_decay=-1 is out of range", {"weight_decay": -1}),
    ]
    in_a_step: list[tuple[str, Kwargs, Tensor]] = [
        ("parameter 0 of group 0: grokadamw does not support sparse gradients", {}, grad.to_sparse()),
        ("the gradients are not finite: parameter 0 of group 0", {"nonfinite": "raise"}, torch.inf * grad),
    ]
    if device == "cpu":
        regex = "If capturable=True, params and state_steps must be on supported devices"
        in_a_step += [(regex, {"capturable": True}, grad), (regex, {"capturable": True, "foreach": True}, grad)]
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        *(
            ErrorOptimizerInput(OptimizerInput(None, kwargs, str(kwargs)), error_type=error, error_regex=regex)
            for error, regex, kwargs in constructed
        ),
        *(
            ErrorOptimizerInput(
                OptimizerInput([{"params": [parameter()], **group}], {}, f"in a group: {[*group]}"),
                error_type=ValueError,
                error_regex=regex,
            )
            for regex, group in in_a_group
        ),
        *(
            ErrorOptimizerInput(
                OptimizerInput([parameter(grad)], kwargs, f"step: {regex}, {kwargs}"),
                error_on=OptimizerErrorEnum.STEP_ERROR,
                error_type=RuntimeError,
                error_regex=regex,
            )
            for regex, kwargs, grad in in_a_step
        ),
    ]


INFO = OptimizerInfo(
    GrokAdamW,
    optim_inputs_func=inputs,
    optim_error_inputs_func=errors,
    scheduler_inputs=next(info.scheduler_inputs for info in optim_db if info.optim_cls is Adam),
    supported_impls=("foreach", "differentiable", "fused"),
    supports_fused_on=("cpu",),
    # keys that release 0.1.2 did not have in its groups, or not from the start
    not_og_supported_flags=(
        *("foreach", "differentiable", "fused", "maximize", "capturable"),
        *("second_moment", "amplify_after", "nonfinite", "compat", "layer", "layers"),
        *("train_loss", "eval_loss", "train_acc", "eval_acc", "signal_state", "skipped_steps", "last_norm"),
    ),
    has_capturable_arg=True,
    supports_complex=True,
)
# options of the whole optimizer: a group that says otherwise is refused
IN_NO_GROUP = {"second_moment", "nonfinite", "compat", "grokking_signal_fns"}


def refused(kwargs: Kwargs) -> bool:
    """Return True if these arguments are refused, as torch's optimizers do. test_errors checks it."""
    return bool(kwargs.get("foreach")) and isinstance(kwargs.get("lr"), Tensor) and not kwargs.get("capturable")


def each(
    *,
    skip: Sequence[str] = (),
    devices: Sequence[str] = DEVICES,
    where: Callable[[Kwargs], bool] = lambda kwargs: True,
) -> pytest.MarkDecorator:
    """Parametrize by device, input and implementation: none asked for, and each that is not in `skip`."""
    # torch lists foreach for GPUs only; ours also runs on the CPU
    with patch.object(common_optimizers, "_get_foreach_kernels_supported_devices", return_value=["cpu", "cuda"]):
        cases = [
            pytest.param(device, case.kwargs, id=f"{device}: {case.desc}")
            for device in devices
            for case in _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, INFO, skip=skip)
            if where(case.kwargs) and not refused(case.kwargs)
        ]
    return pytest.mark.parametrize(("device", "kwargs"), cases)


def make(params: Any, kwargs: Kwargs, **changes: Any) -> GrokAdamW:
    """Return an optimizer with copies of tensors, which schedulers write to, and of signals, which have memory."""
    return GrokAdamW(params, **copy.deepcopy(kwargs | changes))


@pytest.fixture(autouse=True)
def _seed() -> None:
    # if CUDA is not initialized, torch.manual_seed notes its caller's stack, which takes longer than most tests
    torch.manual_seed(0) if "cuda" in DEVICES else torch.default_generator.manual_seed(0)


def backward(model: nn.Module) -> Tensor:
    """Run a network of 5 inputs forward and backward, and return the loss."""
    model.zero_grad()
    x = torch.linspace(-1, 1, 15, device=next(model.parameters()).device).reshape(3, 5)
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def advance(model: nn.Module, optimizer: GrokAdamW, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()


def params_of(model: nn.Module, named: bool) -> Iterator[Any]:
    return model.named_parameters() if named else model.parameters()


def assert_same_run(model: nn.Module, optimizer: GrokAdamW, twin: nn.Module, other: GrokAdamW, steps: int = 3) -> None:
    """Check that both runs go on alike, and that their states agree except for names."""
    for _ in range(steps):
        advance(model, optimizer, 1)
        advance(twin, other, 1)
        assert_same(list(twin.parameters()), list(model.parameters()))
    assert_same(without_names(other.state_dict()), without_names(optimizer.state_dict()))


def without_names(state_dict: Kwargs) -> Kwargs:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


# arguments


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_optim_infos_do_not_specify_global_cliquey_kwargs(device: str) -> None:
    for case in INFO.optim_inputs_func(device=device):
        assert {"foreach", "fused", "differentiable"}.isdisjoint(case.kwargs), case


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{device}: {case.optimizer_error_input.desc}")
        for device in DEVICES
        for case in INFO.optim_error_inputs_func(device=device, dtype=torch.float32)
    ],
)
def test_errors(case: ErrorOptimizerInput) -> None:
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            GrokAdamW(params, **kwargs)
        return
    if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(case.error_type, match=case.error_regex):
            GrokAdamW(params, **kwargs)
        return
    optimizer = GrokAdamW(params, **kwargs)
    before = copy.deepcopy(params)
    with pytest.raises(case.error_type, match=case.error_regex):
        optimizer.step()
    assert not optimizer.state
    assert_same(params, before)


@each()
def test_optimizer_can_be_printed(device: str, kwargs: Kwargs) -> None:
    printed = repr(make(nn.Linear(2, 2, device=device).parameters(), kwargs))
    assert printed.startswith("GrokAdamW (")
    for name, value in kwargs.items():
        if name != "grokking_signal_fns":
            assert f" {name}: {value}\n" in printed


# the direction


def step_all(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))


@pytest.mark.parametrize("schedulers", [[], *INFO.scheduler_inputs])
@pytest.mark.parametrize("contiguous", [True, False])
@each(skip=["foreach", "differentiable"])
def test_forloop_goes_right_direction(device: str, kwargs: Kwargs, contiguous: bool, schedulers: Any) -> None:
    model = nn.Linear(5, 10, device=device)
    if not contiguous:
        for name, p in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(torch.randn(*p.shape, 2, device=device)[..., 0]))
    assert model.weight.is_contiguous() == contiguous
    optimizer = make(model.parameters(), kwargs, foreach=False)
    made = [scheduler(optimizer) for scheduler in schedulers]
    start = backward(model).item()
    for _ in range(20):
        loss = backward(model)
        optimizer.step()
        step_all(made, loss)
    assert (backward(model).item() > start) if kwargs.get("maximize") else (backward(model).item() < start)


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs)
@pytest.mark.parametrize("device", DEVICES)
def test_param_group_with_lrscheduler_goes_right_direction(device: str, schedulers: Any) -> None:
    model = nn.Linear(5, 10, device=device)
    optimizer = GrokAdamW([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}])
    made = [scheduler(optimizer) for scheduler in schedulers]
    before, lrs = copy.deepcopy(list(model.parameters())), [group["lr"] for group in optimizer.param_groups]
    start = backward(model).item()
    for i in range(20):
        loss = optimizer.step(lambda: backward(model))
        if i == 0:  # a first step is as long as the group's learning rate
            moved = [(p - old).abs().max().item() for p, old in zip(model.parameters(), before, strict=True)]
            assert moved == pytest.approx(lrs, rel=0.02)
        step_all(made, loss)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * optimizer.param_groups[0]["lr"])
    assert backward(model).item() < start


@pytest.mark.parametrize("shape", [(), (1,)])
@each(skip=["differentiable"], where=lambda kwargs: "lr" not in kwargs)
def test_tensor_lr(device: str, kwargs: Kwargs, shape: tuple[int, ...]) -> None:
    """A tensor gives the same run as a number, also if it is changed in place."""
    lr = torch.full(shape, 0.02, dtype=torch.float64)
    model = network().to(device)
    twin = copy.deepcopy(model)
    if refused(kwargs | {"lr": lr}):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            make(model.parameters(), kwargs, lr=lr)
        return
    optimizer, other = make(model.parameters(), kwargs, lr=lr), make(twin.parameters(), kwargs, lr=lr.item())
    for _ in range(5):
        advance(model, optimizer, 1)
        advance(twin, other, 1)
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
        assert optimizer.param_groups[0]["lr"].shape == shape
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(other.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"].mul_(0.5)
        other.param_groups[0]["lr"] *= 0.5


# parameter groups


@each(skip=["differentiable"], where=lambda kwargs: IN_NO_GROUP.isdisjoint(kwargs))
def test_param_groups_weight_decay(device: str, kwargs: Kwargs) -> None:
    model = nn.Linear(5, 10, device=device)
    twin, start = copy.deepcopy(model), model.weight.detach().clone()
    decay, none = {"weight_decay": 0.1} | copy.deepcopy(kwargs), copy.deepcopy(kwargs) | {"weight_decay": 0.0}
    optimizer = GrokAdamW([{"params": [model.weight], **decay}, {"params": [model.bias], **none}])
    other = GrokAdamW([{"params": [twin.weight], **none}, {"params": [twin.bias], **none}])
    first = backward(model).item()
    advance(model, optimizer, 1)
    advance(twin, other, 1)
    lr = float(optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(model.weight, twin.weight - lr * decay["weight_decay"] * start, rtol=1e-6, atol=1e-7)
    assert_same(model.bias, twin.bias)
    advance(model, optimizer, 19)
    assert (backward(model).item() > first) if kwargs.get("maximize") else (backward(model).item() < first)


@each(skip=["differentiable"], where=lambda kwargs: IN_NO_GROUP.isdisjoint(kwargs))
def test_param_groups_lr(device: str, kwargs: Kwargs) -> None:
    model = nn.Linear(5, 10, device=device)
    irrelevant = nn.Parameter(torch.randn(2, device=device))
    before = irrelevant.detach().clone()
    group = {"lr": 1e-3} | copy.deepcopy(kwargs)
    optimizer = GrokAdamW([{"params": model.parameters(), **group}, {"params": [irrelevant]}], lr=1e-28)
    first = backward(model).item()
    for _ in range(20):
        irrelevant.grad = torch.rand_like(irrelevant)
        advance(model, optimizer, 1)
    assert (backward(model).item() > first) if kwargs.get("maximize") else (backward(model).item() < first)
    assert_same(irrelevant.detach(), before)
    assert optimizer.state[irrelevant]["step"] == 20


# complex parameters


@each(skip=["differentiable"])
def test_complex(device: str, kwargs: Kwargs) -> None:
    """Complex parameters, with a real one among them, step like their real and imaginary parts."""
    kinds = [((10, 5), torch.complex64), ((10,), torch.complex64), ((10, 5), torch.float32)]
    params = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape, dtype in kinds]
    parts = [as_real(p).clone().requires_grad_() for p in params]
    optimizer, other = make(params, kwargs), make(parts, kwargs)
    # bit for bit the same, except with foreach: a list has one dtype, and lists of other lengths may round otherwise
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if kwargs["foreach"] else {"rtol": 0, "atol": 0}
    for _ in range(3):
        for p, part in zip(params, parts, strict=True):
            p.grad = torch.randn_like(p)
            part.grad = as_real(p.grad).clone()
        optimizer.step()
        other.step()
        for p, part in zip(params, parts, strict=True):
            expected = {name: as_real(x) for name, x in optimizer.state[p].items()}
            assert_close((as_real(p), expected), (part.detach(), dict(other.state[part])), **tolerance)


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


# All are in one layer, on which γ acts. Otherwise real and imaginary parts would be in different layers. Release 0.1.2
# counts layers and clips by tensor, so a complex tensor differs there from the two tensors of its parts.
@each(skip=["differentiable"], where=lambda kwargs: "compat" not in kwargs)
def test_complex_2d(device: str, kwargs: Kwargs) -> None:
    z = torch.randn(2, device=device, dtype=torch.complex64, requires_grad=True)
    real, imag = (part.detach().clone().requires_grad_() for part in (z.real, z.imag))
    one = make([{"params": [z], "layer": 2}], kwargs)
    two = make([{"params": [real, imag], "layer": 2}], kwargs)
    tracker = TensorTracker()
    for _ in range(4):
        one.zero_grad()
        two.zero_grad()
        rosenbrock(z).backward()
        for tensor in (z.real, z.imag, rosenbrock(z), z.grad.real, z.grad.imag):  # type: ignore[union-attr]
            tracker.add(tensor)
        tracker.pop_check_set(real, CHECK)
        tracker.pop_check_set(imag, CHECK)
        loss = rosenbrock(torch.complex(real, imag))
        loss.backward()
        for tensor in (loss, real.grad, imag.grad):
            tracker.pop_check_set(tensor, CHECK)
        one.step()
        two.step()
        torch.testing.assert_close(z.real, real)
        torch.testing.assert_close(z.imag, imag)
    assert tracker.all_popped()


def rosenbrock(z: Tensor) -> Tensor:
    x, y = z
    return ((1 - x).square() + 100 * (y - x.square()).square()).abs()


# implementations


def assert_is_the_loop(
    implementation: str, params: list[Tensor], give_gradients: Callable[[list[Tensor], int], None], kwargs: Kwargs
) -> None:
    """Compare seven steps. Both sides begin each step with the same numbers, so that rounding does not add up."""
    lists = params, [p.detach().clone().requires_grad_() for p in params]
    other = {"foreach": None, "fused": None, implementation: True}
    if refused(kwargs | other):
        other = {"foreach": None, "fused": False}  # this comes to the same
    optimizers = make(lists[0], kwargs, foreach=False, fused=None), make(lists[1], kwargs, **other)
    for i in range(7):
        for tensors, optimizer in zip(lists, optimizers, strict=True):
            optimizer.zero_grad()
            give_gradients(tensors, i)
            optimizer.step()
        for p, q in zip(*lists, strict=True):
            state, other = optimizers[0].state[p], optimizers[1].state[q]
            assert state.keys() == other.keys()
            assert state["step"].dtype == other["step"].dtype == torch.float32
            widened = p.dtype if "compat" in kwargs else torch.promote_types(p.dtype, torch.float32)
            assert {x.dtype for x in state.values()} == {torch.float32, widened}
            for loop, at_once in ((p, q), *((state[name], other[name]) for name in state)):
                assert loop.isfinite().all()
                # tighter than torch's tolerance, which would miss an error in a number as small as v
                rounding = 16 * torch.finfo(loop.dtype).eps
                tracker = TensorTracker({"rtol": rounding, "atol": rounding * 1e-3})
                tracker.add(loop)
                tracker.pop_check_set(at_once, CHECK)


def two_layers(device: str, dtype: torch.dtype) -> tuple[list[Tensor], Callable[[list[Tensor], int], None]]:
    """Return parameters, one a single number and one empty, and a function that sets the gradients of a step."""
    shapes: list[tuple[int, ...]] = [(3, 2), (3,), (1, 3), (1,), (), (0,)]
    params = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    x = torch.linspace(0.1, 0.6, 6, device=device, dtype=dtype).reshape(3, 2)

    def give_gradients(params: list[Tensor], i: int) -> None:
        for p in params[2:4]:
            p.requires_grad_(i not in (3, 4))  # frozen for two steps
        if i == 2:  # no parameter has a gradient
            return
        w, b, u, c, scale, empty = params
        y = linear(linear(x, w, b).sigmoid(), u, c).sigmoid()
        (scale * y.sum() + empty.sum()).backward()

    return params, give_gradients


@pytest.mark.parametrize(
    ("device", "dtype", "kwargs"),
    [
        pytest.param(device, dtype, case.kwargs, id=f"{device}, {dtype}: {case.desc}")
        for device in DEVICES
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        for case in INFO.optim_inputs_func(device=device, dtype=dtype)
    ],
)
def test_foreach_matches_forloop(device: str, dtype: torch.dtype, kwargs: Kwargs) -> None:
    assert_is_the_loop("foreach", *two_layers(device, dtype), kwargs)


@pytest.mark.parametrize("implementation", ["cpu", "blocks"])
@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        pytest.param(dtype, case.kwargs, id=f"{dtype}: {case.desc}")
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        for case in INFO.optim_inputs_func(device="cpu", dtype=dtype)
    ],
)
def test_fused_matches_forloop(implementation: str, dtype: torch.dtype, kwargs: Kwargs) -> None:
    """The test covers the native kernel, and its replacement if it was not built."""
    with running(implementation):
        assert_is_the_loop("fused", *two_layers("cpu", dtype), kwargs)


def test_fused_error_on_params_on_meta() -> None:
    with torch.device("meta"):
        p = nn.Parameter(torch.randn(2, 3))
        p.grad = torch.randn(2, 3)
    optimizer = GrokAdamW([p], fused=True)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of su"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("found_inf", [True, False])
@each(skip=["foreach", "differentiable"], devices=["cpu"], where=lambda kwargs: bool(kwargs.get("fused")))
def test_fused_does_not_step_if_foundinf(device: str, kwargs: Kwargs, found_inf: bool) -> None:
    """GradScaler reports infinities by attributes of the optimizer, as `fused` asks it to."""
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer = make([p], kwargs)
    assert optimizer._step_supports_amp_scaling
    p.grad = torch.full_like(p, 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(found_inf))
    optimizer.step()
    assert torch.equal(p, torch.ones(3)) == found_inf
    assert (p in optimizer.state) != found_inf


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
@each(skip=["foreach", "differentiable"])
def test_set_default_dtype_works_with_foreach(device: str, kwargs: Kwargs, default: torch.dtype) -> None:
    """Step counts are float32 with any default dtype, as float16 would stop counting at 2,048."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert_is_the_loop("foreach", *two_layers(device, torch.float64), kwargs)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore:layer .* of parameter group 0 has")  # each of the many tensors is a layer
@pytest.mark.parametrize(
    "devices", [["cpu"], pytest.param(["cuda"], marks=on_cuda), pytest.param(["cpu", "cuda"], marks=on_cuda)]
)
@pytest.mark.parametrize("case", INFO.optim_inputs_func(device="cuda", dtype=torch.float16), ids=lambda case: case.desc)
def test_mixed_device_dtype(devices: list[str], case: OptimizerInput) -> None:
    """One optimizer has every dtype, on the CPU, on a GPU, and on both."""
    if "cpu" in devices and case.kwargs.get("capturable"):
        pytest.skip("the CPU has no graphs to capture")
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    params = [torch.rand(2, 3, device=d, dtype=t).requires_grad_() for d in devices for t in dtypes]
    grads = [torch.rand_like(p) for p in params]

    def give_gradients(params: list[Tensor], i: int) -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    assert_is_the_loop("foreach", params, give_gradients, case.kwargs)
    if devices == ["cpu"]:
        assert_is_the_loop("fused", params, give_gradients, case.kwargs)


# steps with nothing to do


@each()
def test_step_is_noop_when_params_have_no_grad(device: str, kwargs: Kwargs) -> None:
    params = [torch.randn(2, 3, device=device), nn.Parameter(torch.randn(2, 3, device=device))]
    before = copy.deepcopy(params)
    optimizer = make(params, kwargs)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert_same(params, before)
    assert not optimizer.state


@each()
def test_step_is_noop_for_zero_grads(device: str, kwargs: Kwargs) -> None:
    """The step is only counted. Weight decay is off, as it needs no gradient."""
    p = torch.randn(5, 1, device=device)
    before = p.clone()
    p.grad = torch.zeros_like(p)
    optimizer = make([p], kwargs, weight_decay=0.0)
    assert optimizer.step(lambda: 1.5) == 1.5
    assert_same(p, before)
    assert {name: x.abs().sum() for name, x in optimizer.state[p].items()} == {
        "step": 1,
        **dict.fromkeys(moments(kwargs), 0),
    }


def moments(kwargs: Kwargs) -> list[str]:
    return ["exp_avg", "exp_avg_sq"] + ["grok_ema"] * (kwargs.get("lamb") != 0)


@each(skip=["foreach", "differentiable"])
def test_non_empty_state(device: str, kwargs: Kwargs) -> None:
    model = network().to(device)
    optimizer = make(model.parameters(), kwargs)
    advance(model, optimizer, 1)
    assert list(optimizer.state) == list(model.parameters())
    for state in optimizer.state.values():
        assert state.keys() == {"step", *moments(kwargs)}
        assert all(x.count_nonzero() > 0 for x in state.values())


# checkpoints


@pytest.mark.parametrize("names", [(a, b) for a in (True, False) for b in (True, False)], ids=str)
@each(skip=["differentiable"])
def test_state_dict_deterministic(device: str, kwargs: Kwargs, names: tuple[bool, bool]) -> None:
    model = network().to(device)
    optimizer = make(params_of(model, named=names[0]), kwargs)
    advance(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = make(params_of(twin, named=names[1]), kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_run(model, optimizer, twin, other)
    other.param_groups.extend(other.param_groups)  # pytorch#36831: a parameter that is listed again has the same id
    assert_same(
        without_names(other.state_dict())["param_groups"], 2 * without_names(optimizer.state_dict())["param_groups"]
    )


@each(skip=["differentiable"])
def test_can_load_older_state_dict(device: str, kwargs: Kwargs) -> None:
    """Settings that an older state dict lacks stay as they were."""
    model = network().to(device)
    optimizer = make(model.parameters(), kwargs)
    advance(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for name in INFO.not_og_supported_flags:
        del state_dict["param_groups"][0][name]
    if "grokking_signal_fns" in kwargs:  # an older state dict has no memory of signals, either
        other.set_signals(SlowGradient(every=2))
        optimizer.set_signals(SlowGradient(every=2))
    other.load_state_dict(state_dict)
    assert_same_run(model, optimizer, twin, other)


@pytest.mark.parametrize("names", [(a, b) for a in (True, False) for b in (True, False)], ids=str)
@each(skip=["differentiable"])
def test_can_load_from_to_named_state_dict(device: str, kwargs: Kwargs, names: tuple[bool, bool]) -> None:
    """Names that either side has are kept, and the layers are those of the checkpoint."""
    model = network().to(device)
    optimizer = make(params_of(model, named=names[0]), kwargs)
    advance(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = make(params_of(twin, named=names[1]), kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (group,) = other.state_dict()["param_groups"]
    assert group["layers"] == ([0, 0, 1, 1, 2, 2] if names[0] else [0, 1, 2, 3, 4, 5])
    assert group.get("param_names") == ([name for name, _ in model.named_parameters()] if any(names) else None)
    assert_same_run(model, optimizer, twin, other, steps=1)


@pytest.mark.parametrize("named", [True, False])
@each(skip=["differentiable"])
def test_save_load_equality_with_weights_only(device: str, kwargs: Kwargs, named: bool) -> None:
    model = network().to(device)
    optimizer = make(params_of(model, named), kwargs)
    advance(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    for weights_only in (True, False):
        file.seek(0)
        assert_same(torch.load(file, weights_only=weights_only), optimizer.state_dict())


@each(skip=["differentiable"])
def test_load_nontensor_step(device: str, kwargs: Kwargs) -> None:
    model = network().to(device)
    optimizer = make(model.parameters(), kwargs)
    advance(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = int(state["step"])
    other.load_state_dict(state_dict)
    assert_same_run(model, optimizer, twin, other)
    assert all(state["step"] == 6 for state in other.state.values())


@on_cuda
@each(skip=["differentiable"], devices=["cuda"])
def test_state_dict_with_cuda_params(device: str, kwargs: Kwargs) -> None:
    """State moves from the CPU to a GPU. Torch's step counts stay unless capturable; ours follow the parameters."""
    model = network()
    backward(model)
    twin = copy.deepcopy(model).to(device)
    optimizer = make(model.parameters(), kwargs, capturable=False, foreach=None)
    other = make(twin.parameters(), kwargs)
    for _ in range(3):
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.data.copy_(p)
        q.grad = p.grad.to(device)  # type: ignore[union-attr]
    state_dict = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(state_dict)
    assert_same(state_dict, optimizer.state_dict())
    assert {x.device.type for state in state_dict["state"].values() for x in state.values()} == {"cpu"}
    assert {x.device.type for state in other.state.values() for x in state.values()} == {device}
    assert other.param_groups[0]["capturable"] == kwargs.get("capturable", False)
    for _ in range(5):
        optimizer.step()
        other.step()
        assert_close(list(twin.parameters()), list(model.parameters()))
        assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=1e-5, atol=1e-8)


@on_cuda
@each(skip=["foreach", "differentiable"], devices=["cuda"])
def test_cpu_load_state_dict(device: str, kwargs: Kwargs) -> None:
    """A GPU optimizer loads a capturable optimizer's checkpoint that was moved to the CPU."""
    p = torch.tensor([0.1, 0.2])
    p.grad = torch.tensor([0.3, -0.4])
    optimizer = make([p], kwargs, capturable=False)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["capturable"] = True
    q = p.to(device)
    q.grad = p.grad.to(device)
    other = make([q], kwargs, capturable=True)
    other.load_state_dict(state_dict)
    optimizer.step()
    other.step()
    assert {x.device.type for x in other.state[q].values()} == {device}
    assert other.state[q]["step"] == 2
    torch.testing.assert_close(q.cpu(), p)


# copies


def public(optimizer: GrokAdamW) -> set[str]:
    return {name for name in vars(optimizer) if not name.startswith("_")}


@each(skip=["differentiable"])
def test_deepcopy_copies_all_public_attrs(device: str, kwargs: Kwargs) -> None:
    model = network().to(device)
    optimizer = make(model.named_parameters(), kwargs)
    advance(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    twin, other = copy.deepcopy((model, optimizer))
    assert public(other) == public(optimizer) >= {"defaults", "param_groups", "state"}
    assert_same(other.state_dict(), before)
    advance(twin, other, 1)
    assert_same(optimizer.state_dict(), before)  # nothing is shared
    advance(model, optimizer, 1)
    assert_same_run(model, optimizer, twin, other)


@each(skip=["differentiable"])
def test_pickle(device: str, kwargs: Kwargs) -> None:
    model = network().to(device)
    optimizer = make(model.named_parameters(), kwargs)
    advance(model, optimizer, 3)
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    if "grokking_signal_fns" in kwargs:  # pickles leave signals out, but not their memory
        other.set_signals(SlowGradient(every=2))
    assert public(other) == public(optimizer)
    assert_same_run(model, optimizer, twin, other)


# hooks


def one_parameter(device: str, kwargs: Kwargs) -> GrokAdamW:
    return make([torch.rand(2, 3, device=device, requires_grad=True)], kwargs)


@each()
def test_state_dict_pre_hook(device: str, kwargs: Kwargs) -> None:
    optimizer = one_parameter(device, kwargs)
    optimizer.register_state_dict_pre_hook(mark)
    assert optimizer.state_dict()["state"]["mark"] == 1


@each()
def test_state_dict_post_hook(device: str, kwargs: Kwargs) -> None:
    optimizer = one_parameter(device, kwargs)
    optimizer.register_state_dict_post_hook(unmarked)
    assert optimizer.state_dict() == {"marked": False}


@each()
def test_state_dict_pre_post_hook(device: str, kwargs: Kwargs) -> None:
    optimizer = one_parameter(device, kwargs)
    optimizer.register_state_dict_post_hook(unmarked)
    optimizer.register_state_dict_pre_hook(mark)
    assert optimizer.state_dict() == {"marked": True}


def mark(optimizer: Any) -> None:
    optimizer.state["mark"] = 1


def unmarked(optimizer: Any, state_dict: Kwargs) -> Kwargs:
    """Return another state dict in place of the given one."""
    return {"marked": "mark" in state_dict["state"]}


def lr_2(optimizer: Any, state_dict: Kwargs) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def lr_3(optimizer: Any, state_dict: Kwargs) -> Kwargs:
    """Return a changed copy in place of the given state dict."""
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


@each()
def test_load_state_dict_pre_hook_and_prepend(device: str, kwargs: Kwargs) -> None:
    optimizer = one_parameter(device, kwargs)
    state_dict = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lr_2)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    first = optimizer.register_load_state_dict_pre_hook(lr_3, prepend=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002  # lr_2 runs last
    first.remove()
    optimizer.register_load_state_dict_pre_hook(lr_3)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.003


@each()
def test_load_state_dict_post_hook(device: str, kwargs: Kwargs) -> None:
    """The hook finds everything loaded, also a state of more precision than its parameter."""
    p = torch.rand(2, 3, device=device, dtype=torch.bfloat16)
    p.grad = torch.rand_like(p)
    optimizer, seen = make([p], kwargs), []
    optimizer.step()
    expected = copy.deepcopy((optimizer.param_groups[0]["lr"], dict(optimizer.state[p])))
    optimizer.register_load_state_dict_post_hook(
        lambda optimizer: seen.append((optimizer.param_groups[0]["lr"], dict(optimizer.state[p])))
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(seen, [expected])


@each()
def test_load_state_dict_pre_post_hook(device: str, kwargs: Kwargs) -> None:
    optimizer, seen = one_parameter(device, kwargs), []
    optimizer.register_load_state_dict_pre_hook(lr_3)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.003]


@each()
def test_step_post_hook(device: str, kwargs: Kwargs) -> None:
    check_step_hook(device, kwargs, pre=False)


@each()
def test_step_pre_hook(device: str, kwargs: Kwargs) -> None:
    check_step_hook(device, kwargs, pre=True)


def check_step_hook(device: str, kwargs: Kwargs, pre: bool) -> None:
    """Check that a hook gets the step's own arguments, before or after the step, until it is removed."""
    p = torch.ones(2, device=device)
    p.grad = torch.ones_like(p)
    optimizer, seen = make([p], kwargs), []

    def hook(*given: Any) -> None:
        seen.append((given, int(optimizer.state[p]["step"]) if optimizer.state else 0))

    def closure() -> float:
        return 1.5

    handle = optimizer.register_step_pre_hook(hook) if pre else optimizer.register_step_post_hook(hook)
    optimizer.step(closure)
    optimizer.step(closure=closure)
    steps = (0, 1) if pre else (1, 2)
    given = (optimizer, (optimizer, closure), {}), (optimizer, (optimizer,), {"closure": closure})
    assert seen == list(zip(given, steps, strict=True))
    handle.remove()
    optimizer.step(closure)
    assert len(seen) == 2


@each()
def test_step_all_hooks(device: str, kwargs: Kwargs) -> None:
    """Hooks for all optimizers run outside the hooks of one optimizer."""
    params, seen = [torch.ones(2, device=device)], []

    def noting(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(noting("all pre")),
        register_optimizer_step_post_hook(noting("all post")),
    ]
    optimizers = make(params, kwargs), SGD(params)
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(noting("pre")))
        handles.append(optimizer.register_step_post_hook(noting("post")))
    try:
        for i in (0, 1, 0):
            seen.clear()
            optimizers[i].step()
            assert seen == ["all pre", "pre", "post", "all post"]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    for optimizer in optimizers:
        optimizer.step()
    assert seen == []
