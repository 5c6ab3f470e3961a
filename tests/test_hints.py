"""Tests of the hints that mistyped or mixed-up arguments get, and of warnings about signals that hear nothing."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.signals import AccuracyGap, loss_gap, memorisation


def model() -> nn.Module:
    return nn.Linear(2, 2)


def used_up() -> Any:
    parameters = model().parameters()
    list(parameters)
    return parameters


def steps(optimizer: GrokAdamW, count: int, before_step: Callable[[], None] = lambda: None) -> list[str]:
    """Return the warnings of `count` steps with gradients."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(count):
            before_step()
            optimizer.step()
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        *[(name, "lamb") for name in ("lamda", "lambd", "lambda_")],
        *[("alpha", "alpha_init"), ("learning_rate", "lr"), ("beta1", "betas"), ("epsilon", "eps")],
        *[("weightdecay", "weight_decay"), ("weigth_decay", "weight_decay"), ("max_grad_norm", "gradient_clipping")],
    ],
)
def test_an_unknown_argument_gets_the_name_that_is_meant(name: str, instead: str) -> None:
    with pytest.raises(TypeError, match=f"GrokAdamW has no argument {name}: give {instead}$"):
        GrokAdamW(model().parameters(), **{name: 0.1})
    with pytest.raises(TypeError, match=f"no argument {name}: give {instead}$"):
        GrokAdamW.for_grokking(model(), **{name: 0.1})


@pytest.mark.parametrize(
    ("name", "reason"),
    [("amsgrad", "as there is no AMSGrad here"), ("decoupled_weight_decay", "as weight decay is always decoupled")],
)
@pytest.mark.parametrize("value", [False, True])
def test_what_only_adamw_takes_is_left_out(name: str, value: bool, reason: str) -> None:
    with pytest.raises(TypeError, match=f"GrokAdamW has no argument {name}: leave it out, {reason}$"):
        GrokAdamW(model().parameters(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        *[("val_loss", "give eval_loss"), ("valid_loss", "give eval_loss"), ("training_loss", "give train_loss")],
        *[(name, "it takes train_loss, eval_loss, train_acc, eval_acc") for name in ("loss", "test_loss", "accuracy")],
    ],
)
def test_what_is_recorded_under_an_unknown_name(name: str, way_out: str) -> None:
    optimizer = GrokAdamW(model().parameters())
    with pytest.raises(TypeError, match=f"^record has no argument {name}: {way_out}$"):
        optimizer.record(**{name: 0.1})
    assert "eval_loss" in inspect.signature(optimizer.record).parameters


@pytest.mark.parametrize("wrapper", [Grokfast, GrokfastMA, functools.partial(Accumulate, steps=2)])
@pytest.mark.parametrize("instance", [False, True])
def test_what_the_inner_optimizer_takes(wrapper: Any, instance: bool) -> None:
    """A wrapper takes an optimizer. Arguments such as lr belong to the optimizer."""
    name = getattr(wrapper, "func", wrapper).__name__
    optimizer: Any = torch.optim.SGD(model().parameters()) if instance else torch.optim.SGD
    way_out = rf"as in {name}\(torch.optim.AdamW\(params, (lr|learning_rate)=…\)\)$"
    for unknown in ("lr", "learning_rate"):
        with pytest.raises(TypeError, match=f"^{name} has no argument {unknown}: if the optimizer takes .*{way_out}"):
            wrapper(optimizer, **{unknown: 0.1})
    if not instance:
        with pytest.raises(TypeError, match="^optimizer is the class SGD, and not .*: make one from your parameters"):
            wrapper(optimizer)


def test_a_misspelt_argument_of_a_wrapper() -> None:
    optimizer = torch.optim.SGD(model().parameters())
    with pytest.raises(TypeError, match="^Grokfast has no argument lamda: give lamb$"):
        Grokfast(optimizer, lamda=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="^Accumulate has no argument max_norm: give gradient_clipping$"):
        Accumulate(optimizer, 2, max_norm=1.0)  # type: ignore[call-arg]


def test_any_other_is_pythons_affair() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmup'"):
        GrokAdamW(model().parameters(), warmup=3)  # type: ignore[call-arg]


def test_tools_still_see_the_arguments() -> None:
    assert {"params", "lr", "max_row_change"} <= set(inspect.signature(GrokAdamW).parameters)


def test_a_model_is_not_its_parameters() -> None:
    with pytest.raises(TypeError, match=r"params is a Linear: give its parameters, model.named_parameters\(\)"):
        GrokAdamW(model())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            model().parameters,
            TypeError,
            r"params is a method, which must be called: give a list, or model.named_parameters\(\)",
        ),
        (None, TypeError, "params is a NoneType: give a list, or"),
        (dict(model().named_parameters()), TypeError, "params is a dict: give a list"),
        ([{"params": model()}], TypeError, "params is a Linear: give its parameters"),
        ([{"param": []}], ValueError, "a parameter group has 'param', but no 'params': give its parameters under that"),
        ([{}], ValueError, "a parameter group has no keys, but no 'params'"),
    ],
    ids=["a method", "None", "a dict", "a model in a group", "misspelt", "an empty group"],
)
def test_what_has_no_parameters(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GrokAdamW(params)
    if isinstance(params, list):
        optimizer = GrokAdamW(model().parameters())
        with pytest.raises(error, match=message):
            optimizer.add_param_group(*params)
        assert len(optimizer.param_groups) == 1


def test_whatever_can_be_iterated_over_has_parameters() -> None:
    class Only:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, i: int) -> nn.Parameter:
            return [nn.Parameter(torch.ones(1))][i]

    assert len(GrokAdamW(Only()).param_groups[0]["params"]) == 1  # type: ignore[arg-type]
    for alone in (torch.ones(2), torch.ones(())):
        assert len(GrokAdamW([{"params": nn.Parameter(alone)}]).param_groups[0]["params"]) == 1


@pytest.mark.parametrize("nothing", [[], (), used_up()], ids=["list", "tuple", "used up"])
def test_nothing_to_optimize(nothing: Any) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list: .* used up before"):
        GrokAdamW(nothing)


def test_losses_are_recorded_by_name() -> None:
    with pytest.raises(TypeError, match=r"by name: record\(train_loss=…, eval_loss=…\)"):
        GrokAdamW(model().parameters()).record(0.1, 0.2)


@pytest.mark.parametrize(("key", "meant"), [("weigth_decay", "weight_decay"), ("beta", "betas"), ("lambda", "lamb")])
def test_a_misspelt_key_of_a_group_is_warned_of(key: str, meant: str) -> None:
    with pytest.warns(UserWarning, match=f"has '{key}', which has no effect: did you mean {meant}"):
        GrokAdamW([{"params": model().parameters(), key: 0.1}])


@pytest.mark.parametrize("key", ["lr_scale", "weight_decay_mult", "name", "initial_lr", "max_lr", "tag"])
def test_other_peoples_keys_are_theirs(key: str, recwarn: pytest.WarningsRecorder) -> None:
    GrokAdamW([{"params": model().parameters(), key: 0.1}])
    assert not recwarn.list


def test_a_step_without_a_gradient_is_warned_of_once() -> None:
    optimizer = GrokAdamW(model().parameters())
    with pytest.warns(UserWarning, match=r"found no gradient, and changed nothing: call loss.backward\(\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{"grokking_signal_fns": loss_gap}, {"amplify_by_signal": True}, {"signal_boost": 1.0}]
)
def test_signals_that_hear_nothing_are_warned_of_once(options: dict[str, Any]) -> None:
    optimizer = GrokAdamW(model().parameters(), **options)
    assert steps(optimizer, 99) == []
    (said,) = steps(optimizer, 1)
    assert "wait for train_loss and eval_loss: call optimizer.record(train_loss=…, eval_loss=…)" in said
    assert "for accuracies instead give grokking_signal_fns=AccuracyGap(), from grokadamw.signals" in said
    assert steps(optimizer, 1000) == []


@pytest.mark.parametrize(("options", "patience"), [({}, 1000), ({"decay_boost": 1.0}, 100)])
def test_training_losses_alone_are_half_of_it(options: dict[str, Any], patience: int) -> None:
    """An evaluation may come late. But with a boost, waiting 1,000 steps for it would take up much of a run."""
    optimizer = GrokAdamW(model().parameters(), **options)
    assert steps(optimizer, patience - 1, lambda: optimizer.record(train_loss=1.0)) == []
    (said,) = steps(optimizer, 1, lambda: optimizer.record(train_loss=1.0))
    assert "wait for eval_loss: call optimizer.record(eval_loss=…)" in said


def test_evaluation_losses_alone_are_the_other_half() -> None:
    """The preset warns early if it gets no `train_loss`, as most runs on small tasks end before 1,000 steps."""
    network = model()
    optimizer = GrokAdamW.for_grokking(network)
    assert steps(optimizer, 99, lambda: optimizer.record(eval_loss=2.0)) == []
    (said,) = steps(optimizer, 200, lambda: optimizer.record(eval_loss=2.0))
    assert "wait for train_loss: call optimizer.record(train_loss=…)" in said


def test_a_signal_of_accuracies_that_gets_losses_is_warned_of_once() -> None:
    optimizer = GrokAdamW(model().parameters(), grokking_signal_fns=AccuracyGap(), signal_boost=1.0)
    (said,) = steps(optimizer, 1200, lambda: optimizer.record(train_loss=1.0, eval_loss=2.0))
    assert "wait for train_acc and eval_acc: call optimizer.record(train_acc=…, eval_acc=…)" in said
    signal = AccuracyGap()
    heard = GrokAdamW(model().parameters(), grokking_signal_fns=[signal, loss_gap])
    signal.record(train=1.0, eval=0.5)
    assert steps(heard, 1200, lambda: heard.record(train_loss=1.0, eval_loss=2.0)) == []


@pytest.mark.parametrize(
    ("kind", "before", "words", "signal"),
    [
        ("loss", 2.0, "Record both losses together:", None),
        ("acc", 0.5, "Record both accuracies together:", AccuracyGap()),
    ],
)
def test_an_evaluation_of_long_ago_is_warned_of_once(kind: str, before: float, words: str, signal: Any) -> None:
    """A model that has learnt since the evaluation would look like memorising, and take longer steps."""
    optimizer = GrokAdamW(model().parameters(), signal_boost=1.0, grokking_signal_fns=signal)
    train, both = {f"train_{kind}": 1.0}, {f"train_{kind}": 1.0, f"eval_{kind}": before}
    optimizer.record(**both)
    assert steps(optimizer, 99, lambda: optimizer.record(**train)) == []
    optimizer.record(**both)
    assert steps(optimizer, 99, lambda: optimizer.record(**train)) == []
    (said,) = steps(optimizer, 1, lambda: optimizer.record(**train))
    assert f"{words} optimizer.record(train_{kind}=…, eval_{kind}=…)" in said
    optimizer.record(**both)
    assert steps(optimizer, 300, lambda: optimizer.record(**train)) == []
    assert steps(copied := copy.deepcopy(optimizer), 300, lambda: copied.record(**train)) == []


def test_who_does_not_use_an_old_evaluation_hears_nothing_of_it() -> None:
    for options in ({}, {"signal_boost": 1.0, "grokking_signal_fns": []}):
        optimizer = GrokAdamW(model().parameters(), **options)
        optimizer.record(train_loss=2.0, eval_loss=2.0)
        assert steps(optimizer, 150, lambda optimizer=optimizer: optimizer.record(train_loss=1.0)) == []


def test_squared_errors_that_are_not_scaled_are_warned_of_once() -> None:
    """With 97 one-hot answers these losses begin at 0.01, so the preset's signal would never see memorising."""
    optimizer = GrokAdamW.for_grokking(model())
    optimizer.record(train_loss=0.01, eval_loss=0.01)
    assert steps(optimizer, 5, lambda: optimizer.record(train_loss=0.002, eval_loss=0.012)) == []
    (said,) = steps(optimizer, 5, lambda: optimizer.record(train_loss=0.001, eval_loss=0.012))
    assert "train_loss=0.001 is far below eval_loss=0.012" in said
    assert "Record both divided by the targets' variance" in said
    assert "grokking_signal_fns=AccuracyGap()" in said


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ([(0.69, 0.69), (1e-3, 5.0), (1e-4, 0.02)], {}),  # cross entropy of two answers that are learnt
        ([(1.0, 1.0), (0.01, 0.8), (0.01, 0.2)], {}),  # squared errors of scaled targets
        ([(0.1, 0.1), (0.03, 0.08)], {}),  # training and evaluation fall together
        ([(0.3, 0.4), (0.02, 1.5)], {}),  # cross entropy that is first evaluated after an epoch
        ([(0.3, 0.4), (0.02, 0.7)], {}),  # the same, where the signal is still middling
        ([(0.55, 0.55), (1e-3, 0.3)], {}),  # cross entropy of an answer that is mostly the same
        ([(-1.0, -1.0)], {}),  # log likelihood of densities
        ([(0.01, 0.01), (1e-4, 0.01)], {"grokking_signal_fns": AccuracyGap()}),
        ([(0.01, 0.01), (1e-4, 0.01)], {"grokking_signal_fns": loss_gap}),
        ([(0.01, 0.01), (1e-4, 0.01)], {"grokking_signal_fns": [memorisation, AccuracyGap()]}),
        ([(0.01, 0.01), (1e-4, 0.01)], {"signal_boost": 0.0, "decay_boost": 0.0}),
    ],
)
def test_other_losses_are_not_taken_for_them(losses: list[tuple[float, float]], options: dict[str, Any]) -> None:
    optimizer = GrokAdamW.for_grokking(model(), **options)
    for train_loss, eval_loss in losses:
        assert steps(optimizer, 1, lambda t=train_loss, e=eval_loss: optimizer.record(train_loss=t, eval_loss=e)) == []


def test_a_resumed_run_has_not_begun_with_small_losses() -> None:
    optimizer = GrokAdamW.for_grokking(model())
    optimizer.record(train_loss=0.69, eval_loss=0.69)
    resumed = GrokAdamW.for_grokking(model())
    resumed.load_state_dict(optimizer.state_dict())
    assert steps(resumed, 5, lambda: resumed.record(train_loss=1e-4, eval_loss=0.02)) == []


def test_who_asked_for_no_signal_or_has_one_without_losses_hears_nothing() -> None:
    for options in ({}, {"grokking_signal_fns": lambda: 0.5}, {"grokking_signal_fns": []}):
        assert steps(GrokAdamW(model().parameters(), **options), 150) == []
    heard = GrokAdamW(model().parameters(), grokking_signal_fns=loss_gap)
    assert steps(heard, 150, lambda: heard.record(train_loss=1.0, eval_loss=2.0)) == []


def test_it_is_printed_without_what_is_kept_for_checkpoints() -> None:
    shown = repr(GrokAdamW([{"params": model().parameters(), "name": "all"}]))
    assert "    lr: 0.001\n" in shown
    assert "    name: all\n" in shown
    assert not {"cycle", "layers", "signal_state", "skipped_steps", "train_loss"} & set(shown.replace(":", " ").split())


def test_its_signals_are_printed() -> None:
    optimizer = GrokAdamW(model().parameters(), grokking_signal_fns=[loss_gap, AccuracyGap()])
    assert "grokking_signal_fns: ['loss_gap', 'AccuracyGap']" in repr(optimizer)
    optimizer.set_signals([])
    assert "grokking_signal_fns: []" in repr(optimizer)


def test_a_group_without_names_beside_one_with_them_is_told_what_to_give() -> None:
    network = model()
    optimizer = GrokAdamW(network.named_parameters())
    with pytest.raises(ValueError, match=r"give \(name, parameter\) pairs"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("wrapper", [Grokfast, lambda optimizer: Accumulate(optimizer, 2)])
def test_losses_recorded_with_another_optimizer(wrapper: Any) -> None:
    with pytest.raises(AttributeError, match="only GrokAdamW has record"):
        wrapper(torch.optim.SGD(model().parameters())).record(train_loss=1.0)


ACCUMULATING: dict[str, Any] = {
    "Accumulate": lambda params: Accumulate(torch.optim.SGD(params), 3),
    "accumulation_steps": lambda params: GrokAdamW(params, accumulation_steps=3, second_moment="raw"),
}
ZEROING: dict[str, Any] = {
    "once a step": lambda i, optimizer, network: optimizer.zero_grad() if i % 3 == 0 else None,
    "never": lambda i, optimizer, network: None,
    "to None": lambda i, optimizer, network: optimizer.zero_grad(),
    "in place": lambda i, optimizer, network: network.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("clips", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("zeroing", ZEROING)
@pytest.mark.parametrize("accumulating", ACCUMULATING)
def test_gradients_that_count_several_times_are_warned_of_once(accumulating: str, zeroing: str, clips: bool) -> None:
    """Torch's usual loop zeroes the gradients once a step. Where the optimizer accumulates, that is silently wrong."""
    network = model()
    optimizer = ACCUMULATING[accumulating](network.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(9):
            ZEROING[zeroing](i, optimizer, network)
            network(torch.ones(2, 2)).sum().backward()
            if clips and zeroing in ("to None", "in place"):  # clipping writes to the gradients, and so hides the fault
                nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            optimizer.step()
    found = [str(warning.message) for warning in caught if "not zeroed" in str(warning.message)]
    assert len(found) == (zeroing in ("once a step", "never"))


def test_a_parameter_that_a_micro_batch_does_not_use_is_no_sign_of_gradients_that_count_again() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = ACCUMULATING["accumulation_steps"]([*first.parameters(), *second.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(6):
            optimizer.zero_grad(set_to_none=False)
            second(first(torch.ones(2, 2)) if i % 3 == 0 else torch.ones(2, 2)).sum().backward()
            optimizer.step()


def test_a_misspelt_key_that_is_set_later_is_doubted_once() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = GrokAdamW([p])
    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lambda"] = 0.0
    with pytest.warns(UserWarning, match="'lambda', which has no effect: did you mean lamb"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_groups_without_parameters_miss_no_gradient() -> None:
    GrokAdamW([{"params": []}]).step()


def test_a_misspelt_key_is_not_warned_of_again_by_the_first_step() -> None:
    with pytest.warns(UserWarning, match="did you mean weight_decay"):
        optimizer = GrokAdamW([{"params": model().parameters(), "weight_decays": 0.1}])
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
