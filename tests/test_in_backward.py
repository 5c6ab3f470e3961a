"""Tests of gradient release: parameters are updated in the backward pass, and other things may interfere."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA, decay_groups, step_in_backward
from grokadamw.signals import AccuracyGap, SlowGradient, loss_gap
from grokadamw.step.norm import NormSoFar

from .models import batch as numbers
from .models import network, running, same, saved_and_loaded

K3 = {"accumulation_steps": 3, "second_moment": "raw"}
FREE: dict[str, Any] = {"gradient_clipping": 0.0}
PASSES = 9


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.cumsum(1) / 8)
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    """A model of blocks between an embedding and a head, which share their weights if `tied`."""

    def __init__(self, blocks: int = 2, width: int = 64, vocabulary: int = 96, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.embed(x)))
        return y


def loss_of(model: Transformer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, model.embed.num_embeddings, (4, 9), generator=generator)
    return functional.cross_entropy(model(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())


def passes(model: Any, optimizer: Any, seeds: range, loss: Any = loss_of) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        value = loss(model, seed)
        optimizer.record(train_loss=value.detach(), eval_loss=2 * value.detach())
        value.backward()
        optimizer.step()


def is_plain(model: nn.Module, optimizer: GrokAdamW) -> None:
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert optimizer._run.in_backward is None


def equal(ours: tuple[nn.Module, GrokAdamW], expected: tuple[nn.Module, GrokAdamW]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert same(a.state_dict(), b.state_dict())
    a, b = ours[1].metrics(), expected[1].metrics()
    assert a.pop("grad_norm") == pytest.approx(b.pop("grad_norm"), rel=1e-12, nan_ok=True)  # summed in another order
    assert same(a, b)


# it computes the same as step()

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no filter": {"lamb": 0.0},
    "micro-batches": K3,
    "boosted": {"signal_boost": 1.0, "max_row_change": 0.02, "decay_boost": 4.0},
    "boosted micro-batches": {"signal_boost": 1.0, "decay_boost": 4.0, **K3},
    "int8": {"state_dtype": "int8"},
    "int8, micro-batches": {"state_dtype": "int8", **K3},
    "a window": {"window_size": 4},
    "limits": {"max_row_change": 0.02, "max_row_norm": 1.0, "maximize": True},
    "NaN passes": {"nonfinite": "propagate", "amplify_by_signal": True},
    "raises": {"nonfinite": "raise", "second_moment": "raw"},
}


@pytest.mark.parametrize("which", ["groups", "preset", "bfloat16", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_step_to_the_bit(case: str, which: str) -> None:
    made = []
    for _ in range(2):
        model = Transformer()
        options = {**FREE, **CASES[case]}
        if which == "bfloat16":
            model = model.to(torch.bfloat16)
            options |= {"master_weight_bits": 24}
        if which == "frozen":
            model.blocks[0].requires_grad_(False)
        if which == "preset":
            made.append((model, GrokAdamW.for_grokking(model, **{"max_row_change": 0.035} | options)))
        elif which == "groups":
            groups = decay_groups(model, weight_decay=0.3)
            groups[1] |= {"lr": 0.003, "lamb": 0.0}
            made.append((model, GrokAdamW(groups, lr=0.01, **options)))
        else:
            made.append((model, GrokAdamW(model.named_parameters(), lr=0.01, **options)))
    handle = step_in_backward(made[0][1])
    for model, optimizer in made:
        passes(model, optimizer, range(PASSES))
    equal(*made)
    handle.remove()
    is_plain(*made[0])
    for model, optimizer in made:
        passes(model, optimizer, range(PASSES, PASSES + 2))
    equal(*made)


@pytest.mark.parametrize("options", [{}, K3], ids=["steps", "micro-batches"])
def test_groups_have_alphas_and_boosts_of_their_own(options: dict[str, Any]) -> None:
    made = []
    for early in (True, False):
        model = network()
        first, *others = model.parameters()
        groups = [{"params": [first], "alpha_init": 0.5, "signal_boost": 0.5}, {"params": others, "signal_boost": 2.0}]
        optimizer = GrokAdamW(groups, lr=0.01, **FREE, **options)
        if early:
            step_in_backward(optimizer)
        passes(model, optimizer, range(4), mse)
        made.append((model, optimizer))
    equal(*made)


@pytest.mark.parametrize("implementation", ["gpu", "blocks", "reference"])
@pytest.mark.parametrize("options", [{}, K3], ids=["steps", "micro-batches"])
def test_every_implementation(implementation: str, options: dict[str, Any]) -> None:
    with running(implementation) as how:
        made = []
        for early in (True, False):
            model = network()
            optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **FREE, **options, **how)
            if early:
                step_in_backward(optimizer)
            passes(model, optimizer, range(4), mse)
            made.append((model, optimizer))
    equal(*made)


def mse(model: nn.Module, seed: int) -> Tensor:
    x, y = numbers(seed)
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("options", [{}, K3], ids=["steps", "micro-batches"])
def test_parameters_without_a_gradient(options: dict[str, Any]) -> None:
    """Heads take turns. With micro-batches, a head whose turn came earlier in the cycle moves when the cycle ends."""
    made = []
    for early in (True, False):
        model = nn.ModuleList([network(), nn.Linear(3, 2), nn.Linear(3, 2)])
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **FREE, **options)
        if early:
            step_in_backward(optimizer)
        for turn in (1, 2, 2, 1, 1, 1, 2, 1, 2):
            before = [p.clone() for p in model[3 - turn].parameters()]
            passes(model, optimizer, range(1), lambda m, _, t=turn: m[t](m[0](numbers(t)[0])).square().mean())
            if not options:
                assert all(map(torch.equal, before, model[3 - turn].parameters()))
        made.append((model, optimizer))
    equal(*made)


def test_what_is_frozen_or_added_later_joins() -> None:
    made = []
    for early in (True, False):
        model = network()
        model[0].requires_grad_(False)
        optimizer = GrokAdamW([p for n, p in model.named_parameters() if n[0] != "4"], lr=0.01, **FREE)
        if early:
            step_in_backward(optimizer)
        passes(model, optimizer, range(2), mse)
        model[0].requires_grad_(True)
        passes(model, optimizer, range(2, 4), mse)
        optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.1})
        model.zero_grad()  # the added parameters had gradients from earlier passes
        passes(model, optimizer, range(4, 6), mse)
        if early:
            assert all(p.grad is None for p in model.parameters())
        made.append((model, optimizer))
    equal(*made)


def test_a_parameter_that_left_its_group_is_left_alone() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE)
    step_in_backward(optimizer)
    for name in ("params", "param_names", "layers"):
        optimizer.param_groups[0][name].pop()
    *others, left = model.parameters()
    before = left.detach().clone()
    passes(model, optimizer, range(2), mse)
    assert torch.equal(left, before)
    assert left.grad is not None
    assert {*optimizer.state} == {*others}


def test_gradients_of_what_joined_are_freed_at_once() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = GrokAdamW(model.named_parameters(), **FREE)
    step_in_backward(optimizer)
    model[0].requires_grad_(True)
    passes(model, optimizer, range(1), mse)
    mse(model, 1).backward()
    assert all(p.grad is None for p in model.parameters())


# the end of a pass


def test_step_ends_a_pass_for_schedulers_hooks_and_signals() -> None:
    heard: list[str] = []
    model = network()
    optimizer = GrokAdamW(
        model.named_parameters(), lr=0.1, grokking_signal_fns=lambda: heard.append("s") or 0.5, **FREE
    )
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    schedule = CosineAnnealingLR(optimizer, 10)
    with warnings.catch_warnings(), step_in_backward(optimizer) as handle:
        warnings.simplefilter("error")
        for i in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            mse(model, i).backward()
            assert not any(map(torch.equal, before, model.parameters()))
            assert all(p.grad is None for p in model.parameters())
            at = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert all(map(torch.equal, at, model.parameters()))
            assert optimizer.stepped
            schedule.step()
        assert heard == ["s", "before", "after"] * 3
        assert optimizer.metrics()["step"] == 3
        assert optimizer.metrics()["signal"] == 0.5
    is_plain(model, optimizer)
    handle.remove()  # a second call
    with pytest.warns(UserWarning, match="found no gradient"):
        optimizer.step()


def test_a_closure_runs_first() -> None:
    made = []
    for early in (True, False):
        model = network()
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **FREE)
        if early:
            step_in_backward(optimizer)
        for i in range(3):

            def closure(model: Any = model, i: int = i, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = mse(model, i)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
        made.append((model, optimizer))
    equal(*made)


def test_stepped_says_when_a_cycle_ends() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE, **K3)
    with step_in_backward(optimizer):
        said = []
        for i in range(6):
            passes(model, optimizer, range(i, i + 1), mse)
            said.append(optimizer.stepped)
    assert said == [False, False, True] * 2


def test_leaving_ends_a_pass_that_is_not_over() -> None:
    made = []
    for early in (True, False):
        model = network()
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **FREE, **K3)
        for i in range(6):
            if early:
                with step_in_backward(optimizer):
                    mse(model, i).backward()
            else:
                optimizer.zero_grad()
                mse(model, i).backward()
                optimizer.step()
        made.append((model, optimizer))
    equal(*made)


def test_a_gradient_that_another_hook_takes_is_none() -> None:
    taken, other = params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    taken.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    optimizer = GrokAdamW(params, **FREE)
    step_in_backward(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (taken.sum() + other.sum()).backward()
        optimizer.step()
    assert torch.equal(taken, torch.ones(3))
    assert list(optimizer.state) == [other]


# clipping


def test_clipping_wants_a_choice() -> None:
    model = network()
    optimizer = GrokAdamW(model.parameters())
    with pytest.raises(ValueError, match=r'gradient_clipping=1 .* Choose clip_by="last", or set gradient_clipping=0'):
        step_in_backward(optimizer)
    is_plain(model, optimizer)
    with pytest.raises(ValueError, match="clip_by='first' is unknown"):
        step_in_backward(optimizer, clip_by="first")
    optimizer.param_groups[0]["gradient_clipping"] = 0.0
    step_in_backward(optimizer)
    optimizer.param_groups[0]["gradient_clipping"] = 0.1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"gradient_clipping=0\.1 with step_in_backward"):
        mse(model, 0).backward()
    assert same(before, dict(model.state_dict()))


def test_the_norm_of_the_last_pass_keeps_its_precision() -> None:
    c = NormSoFar(torch.tensor(1 / 3, dtype=torch.float64)).clip(0.1)
    assert isinstance(c, torch.Tensor)
    assert float(c) == 0.1 / (1 / 3 + 1e-6)


def test_the_larger_of_the_last_norm_and_this_ones_so_far_clips() -> None:
    ours, expected = network(torch.float64), network(torch.float64)
    optimizer = GrokAdamW(ours.named_parameters(), lr=0.01, gradient_clipping=0.1)
    plain = GrokAdamW(expected.named_parameters(), lr=0.01, gradient_clipping=0.0)
    order: list[str] = []
    for name, p in ours.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    step_in_backward(optimizer, clip_by="last")
    last = 0.0
    for i in range(5):
        for model in (ours, expected):
            x, y = numbers(i, torch.float64)
            ((1 + i % 2) * (model(x) - y).square().mean()).backward()
        squares, named = 0.0, dict(expected.named_parameters())
        for name in order:
            squares += float(named[name].grad.square().sum())
            named[name].grad *= min(1.0, 0.1 / (max(last, squares**0.5) + 1e-6))
        clip, last = 0.1 / (max(last, squares**0.5) + 1e-6), squares**0.5
        optimizer.step()
        plain.step()
        plain.zero_grad()
        order.clear()
        assert optimizer.metrics()["grad_norm"] == pytest.approx(last)
        assert optimizer.metrics()["clip_coefficient"] == pytest.approx(clip)
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_gradients_of_groups_without_a_limit_are_in_the_norm(nonfinite: str) -> None:
    found = []
    for early in (False, True):
        params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
        groups = [{"params": [p], "gradient_clipping": limit} for p, limit in zip(params, (1.0, 0.0, 0.0), strict=True)]
        optimizer = GrokAdamW(groups, lr=0.1, nonfinite=nonfinite)
        handle = step_in_backward(optimizer, clip_by="last") if early else None
        for _ in range(3):
            optimizer.zero_grad()
            (0.1 * params[0].sum() + 100 * params[1].sum()).backward()
            params[2].grad = torch.full((3,), 10.0)  # no hook sees this one
            optimizer.step()
        assert (handle is not None) == early
        metrics = optimizer.metrics()
        found.append((metrics["grad_norm"], metrics["clip_coefficient"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2, "second_moment": "raw"}])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_group_may_be_added_between_backward_and_step(options: dict[str, Any], has_gradient: bool) -> None:
    found = []
    for early in (False, True):
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = GrokAdamW(params[:1], gradient_clipping=0.0, gamma=0.0, grokking_signal_fns=lambda: 0.5, **options)
        handle = step_in_backward(optimizer) if early else None
        for step in range(4):
            optimizer.zero_grad()
            (params[0].square().sum() + (params[1].square().sum() if has_gradient else 0)).backward()
            if step == 2:
                optimizer.add_param_group({"params": params[1:], "lr": 0.02, "weight_decay": 0.1})
            optimizer.step()
            params[1].grad = None
        assert (handle is not None) == early
        found.append(params)
    assert all(map(torch.equal, *found))


def test_a_pass_without_gradients_keeps_the_last_norm() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), gradient_clipping=0.1)
    step_in_backward(optimizer, clip_by="last")
    passes(model, optimizer, range(1), mse)
    last = optimizer.param_groups[0]["last_norm"]
    assert last > 0
    with pytest.warns(UserWarning, match="found no gradient"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["last_norm"] == last
    passes(model, optimizer, range(1, 2), mse)


# non-finite gradients


@pytest.mark.parametrize("poisoned", [math.nan, math.inf])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("all_of_it", [False, True])
@pytest.mark.filterwarnings("ignore:gradients hold NaN", "ignore:a step was skipped")
def test_a_pass_that_is_not_finite_keeps_the_last_norm(
    poisoned: float, on_device: bool, all_of_it: bool, request: pytest.FixtureRequest
) -> None:
    """The norm of only the finite gradients is too small, and would clip less than the run's gradients need."""
    if on_device:
        request.getfixturevalue("nothing_is_free_to_read")
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), gradient_clipping=0.1)
    step_in_backward(optimizer, clip_by="last")
    passes(model, optimizer, range(1), mse)
    last = optimizer.state_dict()["param_groups"][0]["last_norm"]
    assert last > 0
    if not all_of_it:
        model[0].weight.register_hook(lambda grad: grad * poisoned)
    ((poisoned if all_of_it else 1) * mse(model, 1)).backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["last_norm"] == last


class Poisoned(torch.autograd.Function):
    """The identity function, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.nan


def poisoned(model: Any, seed: int) -> Tensor:
    """Return a loss whose gradient is NaN for the first layer and finite for the others."""
    x, y = numbers(seed)
    return (model[2:](Poisoned.apply(model[:2](x))) - y).square().mean()


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_error_says_if_parameters_were_updated(is_first: bool, in_step: bool) -> None:
    a, b = params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = GrokAdamW(params, nonfinite="raise", **FREE)
    step_in_backward(optimizer)
    if not is_first:
        a.sum().backward()
    stops = (b * torch.nan).sum().backward
    if in_step:
        b.grad, stops = torch.full((3,), torch.nan), optimizer.step
    what = "Nothing was written" if is_first else "Earlier parameters of this pass were updated"
    with pytest.raises(RuntimeError, match=f"are not finite: .*{what}"):
        stops()
    assert torch.equal(a, torch.ones(3)) == is_first


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_nonfinite_is_each_parameters(nonfinite: str) -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), nonfinite=nonfinite, **FREE)
    step_in_backward(optimizer)
    before = copy.deepcopy(dict(model.state_dict()))
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match=r"not finite: 0\.\w+\. Earlier parameters of this pass were updated"):
            poisoned(model, 0).backward()
        optimizer.zero_grad()
        optimizer.step()
    else:
        poisoned(model, 0).backward()
        if nonfinite == "skip":
            with pytest.warns(RuntimeWarning, match=r"parameters were skipped, .* infinity: 0\.\w+, 0\.\w+$"):
                optimizer.step()
        else:
            optimizer.step()
    for name, p in model.named_parameters():
        if name[0] != "0":
            assert p.isfinite().all()
            assert not torch.equal(p, before[name])
        elif nonfinite == "propagate":
            assert p.isnan().all()
        else:
            assert torch.equal(p, before[name])
            assert p not in optimizer.state
    assert optimizer.metrics()["skipped_steps"] == (2 if nonfinite == "skip" else 0)
    passes(model, optimizer, range(1, 2), mse)
    assert optimizer.metrics()["step"] == 2


def test_a_pass_that_updates_nothing_is_no_step() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], **FREE)
    step_in_backward(optimizer)
    (p * torch.nan).sum().backward()
    with pytest.warns(RuntimeWarning, match="parameters were skipped"):
        optimizer.step()
    assert not optimizer.stepped
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second skip is only counted
        (p * torch.nan).sum().backward()
        optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 2
    p.sum().backward()
    optimizer.step()
    assert optimizer.stepped


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_skips_that_were_not_read_back_yet_are_counted_with_the_later_ones() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], **FREE)
    p.grad = torch.full((3,), torch.nan)
    optimizer.step()
    optimizer.zero_grad()
    step_in_backward(optimizer)
    for factor in (1.0, torch.nan, 1.0):
        (p * factor).sum().backward()
        optimizer.step()
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert optimizer.metrics()["skipped_steps"] == 2


# errors


def test_what_is_set_wrong_by_hand_is_refused_before_the_first_update() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE)
    step_in_backward(optimizer)
    before = copy.deepcopy(dict(model.state_dict()))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"in param_groups\[0\]: lr=-1\.0"):
        mse(model, 0).backward()
    assert same(before, dict(model.state_dict()))


def test_a_second_gradient_before_step() -> None:
    model, twin = network(), network()
    optimizer, plain = (GrokAdamW(m.named_parameters(), lr=0.01, **FREE) for m in (model, twin))
    step_in_backward(optimizer)
    mse(model, 0).backward()
    mse(twin, 0).backward()
    plain.step()
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(
        RuntimeError, match=r"4\.\w+ got a second gradient before optimizer\.step\(\).*accumulation_steps"
    ):
        mse(model, 1).backward()
    assert same(before, dict(model.state_dict()))
    optimizer.zero_grad()
    optimizer.step()
    for m, o in ((model, optimizer), (twin, plain)):
        passes(m, o, range(2, 4), mse)
    assert same(model.state_dict(), twin.state_dict())


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("broken")


def broken(model: Any, seed: int) -> Tensor:
    x, y = numbers(seed)
    return (model[2:](Broken.apply(model[:2](x))) - y).square().mean()


@pytest.mark.parametrize("options", [{}, K3], ids=["steps", "micro-batches"])
@pytest.mark.parametrize("how", ["step", "leave", "load"])
def test_after_a_pass_that_failed(options: dict[str, Any], how: str) -> None:
    """The layers behind the fault had a gradient, and the first had none, just as with the plain optimizer."""
    made = []
    for early in (True, False):
        model = network()
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **FREE, **options)
        handle = step_in_backward(optimizer) if early else None
        passes(model, optimizer, range(2), mse)
        saved = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if handle and how == "leave":
            with pytest.raises(KeyError, match="broken"), handle:
                broken(model, 2).backward()
            is_plain(model, optimizer)
        else:
            optimizer.zero_grad()
            with pytest.raises(KeyError, match="broken"):
                broken(model, 2).backward()
            if handle and how == "step":
                with pytest.raises(
                    RuntimeError, match=r"a backward pass that failed, call optimizer\.zero_grad\(\) and"
                ):
                    mse(model, 3).backward()
            if how == "load":
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            else:
                optimizer.step()
        passes(model, optimizer, range(4, 8), mse)
        made.append((model, optimizer))
    equal(*made)


def test_leaving_after_an_error_raises_no_other() -> None:
    """The gradient that was refused is dropped, and not used to end the pass."""
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], nonfinite="raise", **FREE)
    with pytest.raises(RuntimeError, match="are not finite") as caught, step_in_backward(optimizer):
        (p * torch.nan).sum().backward()
    assert caught.value.__context__ is None
    assert p.grad is None


def test_a_graph_that_needs_what_was_updated_raises() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE)
    step_in_backward(optimizer)
    x, y = numbers(0)
    hidden = functional.linear(model[:4](x), model[4].weight.detach(), model[4].bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (model(x) - y + hidden * model[4].weight.detach().sum()).square().mean().backward()


@pytest.mark.parametrize("option", [{"compat": "0.1.2"}, {"differentiable": True}, {"capturable": True}])
def test_options_that_do_not_go_together_with_it(option: dict[str, Any]) -> None:
    optimizer = GrokAdamW(network().parameters(), **FREE, **option)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* with step_in_backward: leave one of them out"):
        step_in_backward(optimizer)


def test_signals_that_read_gradients_do_not_either() -> None:
    """Such signals are refused both before and after step_in_backward, and a refusal changes nothing."""
    model = network()
    slow = SlowGradient()
    for signals in (slow, [loss_gap, slow]):
        optimizer = GrokAdamW(model.parameters(), grokking_signal_fns=signals, **FREE)
        with pytest.raises(ValueError, match="SlowGradient with step_in_backward: it reads the gradients"):
            step_in_backward(optimizer)
        is_plain(model, optimizer)
        optimizer.set_signals([loss_gap, AccuracyGap()])
        before = optimizer._run.signals
        with step_in_backward(optimizer):
            with pytest.raises(ValueError, match="Choose another signal, or leave step_in_backward out"):
                optimizer.set_signals(signals)
            assert optimizer._run.signals is before
            passes(model, optimizer, range(2), mse)
        optimizer.set_signals(signals)


@pytest.mark.parametrize("wrap", [Grokfast, GrokfastMA, lambda optimizer: Accumulate(optimizer, 2)])
def test_wrappers_make_gradients_that_it_would_not_see(wrap: Any) -> None:
    """Wrappers are refused whichever comes first, and also if there are two."""
    model = network()
    optimizer = GrokAdamW(model.parameters(), **FREE)
    wrapped = wrap(optimizer)
    outer = wrapped if isinstance(wrapped, Accumulate) else Accumulate(wrapped, 1)
    with step_in_backward(optimizer):
        with pytest.raises(
            ValueError, match="does not work with step_in_backward, which updates parameters before .* leave one"
        ):
            wrap(optimizer)
        for wrapper in (wrapped, outer):
            mse(model, 0).backward()
            with pytest.raises(ValueError, match=f"{type(wrapper).__name__} does not work with step_in_backward"):
                wrapper.step()
            optimizer.step()
    outer.zero_grad()
    mse(model, 1).backward()
    wrapped.step()


def test_it_takes_one_grokadamw_once() -> None:
    optimizer = GrokAdamW(network().parameters(), **FREE)
    with pytest.raises(TypeError, match="of type Accumulate: give a GrokAdamW, without Accumulate or Grokfast around"):
        step_in_backward(Accumulate(optimizer, 2))  # type: ignore[arg-type]
    step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="already on"):
        step_in_backward(optimizer)


@pytest.mark.parametrize("options", [{}, {"fused": True}, K3], ids=["scaled before", "fused", "micro-batches"])
def test_a_gradscaler_is_refused(options: dict[str, Any]) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = GrokAdamW(model.parameters(), **FREE, **options)
    handle = step_in_backward(optimizer)
    model[0].requires_grad_(True)  # its scaled gradient is still there when the pass ends
    scaler = GradScaler("cpu")
    scaler.scale(mse(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler with step_in_backward"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    assert all(p.grad is None for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    handle.remove()  # this is what the error advises
    assert same(dict(model.state_dict()), dict(before))
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(options)
    mse(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    off = GradScaler("cpu", enabled=False)
    step_in_backward(optimizer)
    off.scale(mse(model, 0)).backward()
    off.step(optimizer)


def test_remove_takes_the_hooks_off_even_if_the_pass_cannot_end() -> None:
    model = network()
    optimizer = GrokAdamW(model.parameters(), **FREE, nonfinite="raise")
    handle = step_in_backward(optimizer)
    first = next(model.parameters())
    mse(model, 0).backward()
    first.grad = torch.full_like(first, torch.nan)
    with pytest.raises(RuntimeError, match="not finite|NaN"):
        handle.remove()
    optimizer.zero_grad()
    mse(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    step_in_backward(optimizer).remove()


@contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_ddp_and_dtensors_are_refused() -> None:
    with one_rank():
        model = network()
        optimizer = GrokAdamW(model.parameters(), **FREE)
        step_in_backward(optimizer)  # before DDP wraps the model
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = copy.deepcopy(dict(model.state_dict()))
        with pytest.raises(ValueError, match="in DistributedDataParallel, which averages"):
            mse(wrapped, 0).backward()
        assert same(before, dict(model.state_dict()))
        with pytest.raises(ValueError, match="in DistributedDataParallel, which averages"):
            step_in_backward(GrokAdamW(wrapped.parameters(), **FREE))
        own = type("Own", (nn.parallel.DistributedDataParallel,), {})(network())
        with pytest.raises(ValueError, match="in DistributedDataParallel, which averages"):
            step_in_backward(GrokAdamW(own.parameters(), **FREE))
        del wrapped, own

        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="DTensors"):
            step_in_backward(GrokAdamW([sharded], **FREE))


def test_threads_take_turns() -> None:
    """Autograd has a thread for each device. The first begins the pass, and the others wait until it has begun."""
    heard: list[str] = []
    second = threading.Event()

    def signal() -> float:
        heard.append(threading.current_thread().name)
        second.set()
        time.sleep(0.3)  # meanwhile the other thread arrives
        return 0.5

    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = GrokAdamW(params, grokking_signal_fns=signal, **FREE)
    step_in_backward(optimizer)

    def other() -> None:
        second.wait()
        params[1].sum().backward()

    thread = threading.Thread(target=other)
    thread.start()
    params[0].sum().backward()
    thread.join()
    optimizer.step()
    assert len(heard) == 1
    assert all(optimizer.state[p]["step"] == 1 for p in params)


# state, checkpoints and references


def test_the_step_that_builds_state_does_nothing_else() -> None:
    """torch.distributed.checkpoint takes such a step."""
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE)
    step_in_backward(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert [state["step"].item() for state in optimizer.state.values()] == [0.0] * 6
    assert not optimizer.stepped


@pytest.mark.parametrize("options", [{}, K3, {"state_dtype": "int8"}], ids=["steps", "micro-batches", "int8"])
def test_a_resumed_run_is_the_uninterrupted_one(options: dict[str, Any]) -> None:
    made = []
    for saves in (True, False):
        model = Transformer()
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, gradient_clipping=0.2, **options)
        step_in_backward(optimizer, clip_by="last")
        passes(model, optimizer, range(4))
        if saves:
            saved = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            model = Transformer()
            optimizer = GrokAdamW(model.named_parameters(), gradient_clipping=0.2, **options)
            step_in_backward(optimizer, clip_by="last")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        passes(model, optimizer, range(4, 9))
        made.append((model, optimizer))
    equal(*made)
    assert made[0][1].param_groups[0]["last_norm"] > 0


def test_dithers_follow_the_numbers_of_parameters() -> None:
    """If the groups' order changes, dithers match those of a new handle, and of a new optimizer after a checkpoint."""
    runs = []
    for is_kept in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2), strict=True)]
        optimizer = GrokAdamW(groups, **FREE, state_dtype="int8")
        handle = step_in_backward(optimizer)
        for factor in torch.randn(2, 64, 64):
            torch.stack([(p * factor).sum() for p in params]).sum().backward()
            optimizer.step()
            optimizer.param_groups.reverse()
            if not is_kept:
                handle.remove()
                handle = step_in_backward(optimizer)
        runs.append([optimizer.state[p]["exp_avg"] for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_within_a_micro_batch_nothing_is_saved() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE, **K3)
    step_in_backward(optimizer)
    mse(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.step\(\) before you save"):
        optimizer.state_dict()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["micro_step"] == 1
    other = network()
    plain = GrokAdamW(other.named_parameters(), **FREE)
    step_in_backward(plain)
    mse(other, 0).backward()
    assert plain.state_dict()["param_groups"][0]["micro_step"] == 0  # without micro-batches nothing is half done


def test_copies_are_plain_and_nothing_is_kept_alive() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **FREE)
    step_in_backward(optimizer)
    passes(model, optimizer, range(2), mse)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._run.in_backward is None
        assert not any(p._post_accumulate_grad_hooks for g in other.param_groups for p in g["params"])
        assert not getattr(other, "_step_supports_amp_scaling", False)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    before = copy.deepcopy(dict(model.state_dict()))
    mse(model, 0).backward()
    assert same(before, dict(model.state_dict()))
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_that_leaves_the_groups_is_forgotten() -> None:
    """The parameter is not updated, gets gradients as without the optimizer, and is not kept alive."""
    stays, leaves, new = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = GrokAdamW([stays, leaves], **FREE)
    step_in_backward(optimizer)
    (stays + leaves).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"][1] = new
    del optimizer.state[leaves]
    (stays + new).sum().backward()
    optimizer.step()
    before = leaves.detach().clone()
    leaves.sum().backward()
    assert leaves.grad is not None
    assert torch.equal(leaves, before)
    alive = weakref.ref(leaves)
    del leaves
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("options", [{}, K3], ids=["steps", "micro-batches"])
def test_a_models_worth_of_gradients_is_never_there(options: dict[str, Any]) -> None:
    """The test counts gradient tensors that are still alive. The largest matrix of the 12 blocks is a 37th of all."""
    model = Transformer(blocks=12, width=64, vocabulary=64, tied=False)
    total = sum(p.nbytes for p in model.parameters())
    live: list[weakref.ref[Tensor]] = []
    most = [0]

    def count(p: Tensor) -> None:
        live.append(weakref.ref(p.grad))
        most[0] = max(most[0], sum(grad.nbytes for reference in live if (grad := reference()) is not None))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
    optimizer = GrokAdamW(model.named_parameters(), **FREE, **options)
    passes(model, optimizer, range(1))
    assert most[0] == total  # without step_in_backward all are there
    optimizer.zero_grad()
    with step_in_backward(optimizer):
        most[0] = 0
        passes(model, optimizer, range(3))
    assert 0 < most[0] <= 0.05 * total
    assert len(hooks) * 4 == len(live)


# frameworks


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, early: bool) -> None:
            super().__init__()
            self.net, self.early = network(), early

        def training_step(self, batch: Any, index: int) -> Tensor:
            return mse(self.net, int(batch))

        def configure_optimizers(self) -> Any:
            optimizer = GrokAdamW(self.net.named_parameters(), lr=0.01, **FREE)
            if self.early:
                step_in_backward(optimizer)
            return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 6), "interval": "step"}]

    made = []
    for early in (True, False):
        module = Module(early)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(max_steps=6, accelerator="cpu", barebones=False, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(torch.arange(6), batch_size=1))
        made.append((module, trainer.optimizers[0]))
        assert early == all(p.grad is None for p in module.parameters())
    equal(*made)


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, seed: Tensor) -> dict[str, Tensor]:
            return {"loss": mse(self.net, int(seed))}

    made = []
    for early in (True, False):
        model = Net()
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **FREE)
        schedule = CosineAnnealingLR(optimizer, 6)
        if early:
            step_in_backward(optimizer)
        arguments = transformers.TrainingArguments(
            output_dir="unused", max_steps=6, per_device_train_batch_size=1, max_grad_norm=0.0, use_cpu=True,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        data = [{"seed": i} for i in range(6)]
        transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule)).train()
        made.append((model, optimizer))
    equal(*made)


# numbers on a device, for which the host would have to wait


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("options", [{}, K3], ids=["steps", "micro-batches"])
def test_nothing_is_read_back_from_a_device(
    options: dict[str, Any], nonfinite: str, request: pytest.FixtureRequest
) -> None:
    made = []
    for waits in (False, True):
        if waits:
            request.getfixturevalue("nothing_is_free_to_read")
        model = network()
        settings = {"gradient_clipping": 0.1, "nonfinite": nonfinite, **options}
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **settings)
        step_in_backward(optimizer, clip_by="last")
        for i in range(6):
            optimizer.record(train_loss=1.0, eval_loss=2.0)
            (poisoned if i == 2 and nonfinite == "skip" else mse)(model, i).backward()
            optimizer.step()
            norm = optimizer.param_groups[0]["last_norm"]
            assert isinstance(norm, Tensor) == waits
        saved = optimizer.state_dict()["param_groups"][0]["last_norm"]
        assert type(saved) is float
        assert saved == pytest.approx(float(norm))
        made.append((model, optimizer))
    for a, b in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    first, second = (optimizer.metrics() for _, optimizer in made)
    assert first == pytest.approx(second, nan_ok=True, rel=1e-4)
    assert first["skipped_steps"] == (2 if nonfinite == "skip" else 0)


@pytest.mark.filterwarnings("error")
def test_a_handle_that_was_removed_leaves_the_next_one_alone() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], **FREE)
    first = step_in_backward(optimizer)
    first.remove()
    with step_in_backward(optimizer):
        first.remove()
        p.sum().backward()
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
