"""Tests with the real Trainer, on a tiny language model."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from grokadamw import Accumulate, GrokAdamW, Monitor, step_in_backward
from grokadamw.signals import AccuracyGap, SlowGradient, loss_gap

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from grokadamw.huggingface import GrokAdamWCallback  # noqa: E402

STEPS, SAVE_AT = 12, 6
NO_WARNING_OF_CLIPS = {"max_grad_norm": 0.0}


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        attention_dropout=0.1,  # dropout needs the random state on resuming
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def data(seed: int, count: int = 64) -> list[dict[str, Any]]:
    tokens = torch.randint(13, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(
    folder: Path,
    *callbacks: Any,
    eval_sets: Any = None,
    make: Any = None,
    compute_metrics: Any = None,
    kind: Any = transformers.Trainer,
    **arguments: Any,
) -> Any:
    arguments = {
        "optim": "grokadamw",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_steps": STEPS,
        "logging_steps": 2,
        "save_steps": SAVE_AT,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **NO_WARNING_OF_CLIPS,
        **arguments,
    }
    return kind(
        model(),
        transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=data(0),
        eval_dataset=data(1, 16) if eval_sets is None else eval_sets,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=make,
        compute_metrics=compute_metrics,
    )


def grokadamw_of(trainer: Any) -> GrokAdamW:
    return trainer.optimizer.optimizer


def ratio(train_loss: float, eval_loss: float) -> float:
    """Return a signal that is above 0 whenever there are losses."""
    return eval_loss / train_loss


def signals() -> list[Any]:
    return [loss_gap, SlowGradient(every=4)]


def run(folder: Path, *, killed: bool) -> None:
    """Train. With `killed`, the process kills itself between two checkpoints."""

    class Killed(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if killed and state.global_step == SAVE_AT + 2:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer(folder, GrokAdamWCallback(signals=signals(), betas=(0.8, 0.98)), Killed()).train()


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(tmp_path,), kwargs={"killed": True})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole = trainer(tmp_path / "whole", GrokAdamWCallback(signals=signals(), betas=(0.8, 0.98)))
    whole.train()
    resumed = trainer(tmp_path, GrokAdamWCallback(signals=signals(), betas=(0.8, 0.98)))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_AT}"))
    for (name, a), b in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    one, other = grokadamw_of(resumed), grokadamw_of(whole)
    assert one.param_groups[0]["betas"] == (0.8, 0.98)
    assert alphas(resumed) == alphas(whole)
    assert len(set(alphas(whole))) > 3  # α changes, so a resumed run could differ
    assert json.loads(one.state_dict()["param_groups"][0]["signal_state"])["SlowGradient"]["calls"] == STEPS
    assert one.metrics() == pytest.approx(other.metrics(), rel=0, abs=0, nan_ok=True)
    assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def alphas(trainer: Any) -> list[float]:
    return [logs["grok_alpha"] for logs in trainer.state.log_history if "grok_alpha" in logs]


@pytest.mark.filterwarnings("error::UserWarning:grokadamw")
def test_evaluation_reaches_alpha(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(signals=ratio), eval_steps=5, save_strategy="no")
    it.train()
    # steps 2 and 4 are logged before the evaluation at step 5
    assert alphas(it)[:2] == [0.98, 0.98]
    assert all(alpha < 0.98 for alpha in alphas(it)[2:])
    logs = next(logs for logs in it.state.log_history if logs["step"] == 6 and "loss" in logs)
    assert logs["grok_signal"] > 0
    assert logs["grok_grad_norm"] > 0
    assert 0 < logs["grok_clip_coefficient"] <= 1
    assert logs["grok_skipped_steps"] == 0
    assert logs["grok_decay_boost"] == 1
    json.dumps(it.state.log_history, allow_nan=False)


def test_evaluation_at_the_start_of_a_resumed_run(tmp_path: Path) -> None:
    """An evaluation on resuming must not replace the checkpoint's, which the uninterrupted run goes on with."""
    runs = []
    for _ in range(2):
        runs.append(trainer(tmp_path, GrokAdamWCallback(signals=ratio), eval_on_start=True, eval_steps=4))
        runs[-1].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_AT}") if runs[:-1] else None)
    assert alphas(runs[1]) == alphas(runs[0])
    for a, b in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_run_begins_with_signals_as_they_were(tmp_path: Path) -> None:
    gap = AccuracyGap()
    gap.record(eval=0.25)
    callback = GrokAdamWCallback(signals=[gap, SlowGradient(every=5)])
    found = []
    for _ in range(2):
        it = trainer(tmp_path, callback, max_steps=8, eval_strategy="no", save_strategy="no")
        it.train()
        found.append(alphas(it))
        gap.record(train=0.75, eval=0.5)
    assert found[0] == found[1]
    assert gap.state_dict() == {"train": 0.75, "eval": 0.5}  # the user's own object


def test_a_trainer_resumes_what_it_has_trained(tmp_path: Path) -> None:
    """The checkpoint's state of the signals holds, though this callback and this optimizer have trained before."""
    it = trainer(tmp_path, GrokAdamWCallback(signals=[loss_gap, SlowGradient(every=5)]))
    it.train()
    whole = alphas(it)
    it.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_AT}"))
    assert alphas(it) == whole
    assert len(set(whole)) > 3


class Remembers:
    """A signal that gives away its own state, and takes what it is given."""

    def __init__(self) -> None:
        self.state = {"calls": 0}

    def __call__(self) -> float:
        self.state["calls"] += 1
        return 0.0

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


def test_a_signal_may_share_its_state(tmp_path: Path) -> None:
    signal = Remembers()
    callback = GrokAdamWCallback(signals=signal)
    for _ in range(3):
        trainer(tmp_path, callback, max_steps=2, eval_strategy="no", save_strategy="no").train()
        assert signal.state == {"calls": 2}


def test_it_can_be_pickled_at_any_time(tmp_path: Path) -> None:
    """An unpickled callback begins a run like the original, with signals as they were when its first run began."""
    callback = GrokAdamWCallback(signals=[loss_gap, SlowGradient(every=5)], betas=(0.5, 0.9))
    pickles = {"new": pickle.dumps(callback)}

    class Pickles(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pickles["in training"] = pickle.dumps(callback)

    def run(*callbacks: Any) -> list[float]:
        it = trainer(tmp_path, *callbacks, max_steps=8, save_strategy="no")
        it.train()
        assert grokadamw_of(it).param_groups[0]["betas"] == (0.5, 0.9)
        return alphas(it)

    expected = run(callback, Pickles())
    assert len(set(expected)) > 1
    pickles["used"] = pickle.dumps(callback)
    for when, pickled in pickles.items():
        assert run(pickle.loads(pickled)) == expected, when


def test_evaluation_at_the_start(tmp_path: Path) -> None:
    callback = GrokAdamWCallback(signals=ratio)
    it = trainer(tmp_path, callback, eval_on_start=True, eval_strategy="no", save_strategy="no")
    it.train()
    assert grokadamw_of(it).param_groups[0]["eval_loss"] > 0
    assert set(alphas(it)) == {0.98}  # there was no training loss to compare with


def test_the_training_loss_is_of_the_evaluations_time(tmp_path: Path) -> None:
    heard = {}

    class Hears(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard[state.global_step] = kwargs["optimizer"].optimizer.param_groups[0]["train_loss"]

    it = trainer(tmp_path, GrokAdamWCallback(), Hears(), logging_steps=1, eval_steps=5, save_strategy="no")
    it.train()
    logged = {log["step"]: log["loss"] for log in it.state.log_history if "loss" in log}
    assert [heard[i] for i in (5, 6, 10, 11)] == [None, logged[5], logged[5], logged[10]]


def test_a_callback_that_is_added_in_training_begins_then(tmp_path: Path) -> None:
    ours = GrokAdamWCallback()

    class Adds(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                it.add_callback(ours)

    it = trainer(tmp_path, Adds(), eval_steps=5, logging_steps=5, save_strategy="no")
    it.train()
    last = [log["eval_loss"] for log in it.state.log_history if "eval_loss" in log][-1]
    assert grokadamw_of(it).param_groups[0]["eval_loss"] == last


def test_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"easy": data(0, 16), "hard": data(1, 16)}
    it = trainer(tmp_path, GrokAdamWCallback("eval_hard_loss"), eval_sets=sets, save_strategy="no")
    it.train()
    last = [logs["eval_hard_loss"] for logs in it.state.log_history if "eval_hard_loss" in logs][-1]
    assert grokadamw_of(it).param_groups[0]["eval_loss"] == last
    easy = [logs["eval_easy_loss"] for logs in it.state.log_history if "eval_easy_loss" in logs][-1]
    assert last != easy
    it.evaluate({"hard": data(2, 16)})  # an evaluation after training does not count
    assert grokadamw_of(it).param_groups[0]["eval_loss"] == last


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    sets = {"easy": data(0, 16), "hard": data(1, 16)}
    it = trainer(tmp_path, GrokAdamWCallback(), eval_sets=sets, save_strategy="no")
    with pytest.warns(UserWarning, match="'eval_loss'.*eval_easy_loss, eval_hard_loss") as caught:
        it.train()
    assert sum("eval_easy_loss" in str(warning.message) for warning in caught) == 1
    assert set(alphas(it)) == {0.98}


def warnings_of_losses(it: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
    assert all(warning.filename == __file__ for warning in caught if "training loss" in str(warning.message))
    return [str(warning.message) for warning in caught if "training loss" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "said", "compared", "way_out"),
    [
        ({"logging_steps": 500}, "^logging_steps=500: .* step 0 and .* step 3,", "stay silent", "logging_steps=3 or"),
        (
            {"logging_strategy": "no"},
            '^logging_strategy="no": ',
            "stay silent",
            'strategy="steps" and logging_steps=3 ',
        ),
        ({"logging_steps": 8, "logging_first_step": True}, "step 3 and .* step 6,", "an older one", "steps=3 or less"),
        ({"logging_steps": 500, "eval_strategy": "epoch"}, "step 0 and .* step 8,", "silent", 'strategy="epoch"'),
        ({"logging_steps": 500, "eval_on_start": True}, "step 0 and .* step 3,", "stay silent", "logging_steps=3 or"),
    ],
)
def test_evaluations_without_a_new_training_loss_are_warned_of_once(
    arguments: dict[str, Any], said: str, compared: str, way_out: str, tmp_path: Path
) -> None:
    """The signals would compare the evaluation's loss with an old training loss, or with none."""
    it = trainer(tmp_path, GrokAdamWCallback(signals=loss_gap), max_steps=20, save_strategy="no", **arguments)
    (found,) = warnings_of_losses(it)
    assert re.search(f"{said}.*{compared}.*{way_out}", found)
    assert warnings_of_losses(it) == []


class Records(transformers.TrainerCallback):
    """A user's callback that records training losses itself."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].optimizer.record(train_loss=5.0 - state.global_step / 10)


@pytest.mark.parametrize(
    ("signals", "callbacks", "arguments"),
    [
        (loss_gap, [], {"logging_steps": 3}),
        (loss_gap, [], {"logging_steps": 3, "eval_on_start": True}),
        (loss_gap, [], {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
        (loss_gap, [], {"logging_steps": 500, "eval_steps": 20}),  # evaluates once, and no step follows
        (loss_gap, [], {"logging_steps": 6, "eval_steps": 6, "max_steps": 10}),  # the Trainer evaluates at the end, too
        (loss_gap, [Records()], {"logging_steps": 500, "logging_first_step": True}),
        (SlowGradient(every=4), [], {"logging_steps": 500}),
        ([], [], {"logging_steps": 500}),
    ],
)
def test_who_has_a_new_training_loss_or_needs_none_is_not_warned(
    signals: Any, callbacks: list[Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    options = {"max_steps": 20, "save_strategy": "no", **arguments}
    it = trainer(tmp_path, GrokAdamWCallback(signals=signals), *callbacks, **options)
    assert warnings_of_losses(it) == []
    if callbacks:
        assert grokadamw_of(it).param_groups[0]["train_loss"] == 3.0


@pytest.mark.parametrize("extra", [[5], [5, 9], [5, 6, 7]])
def test_evaluations_beside_the_schedule(extra: list[int], tmp_path: Path) -> None:
    """Extra evaluations have no new training loss. Single ones are harmless, and logging_steps are not to blame."""
    callback = transformers.TrainerCallback()

    def evaluate(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step in extra

    callback.on_step_end = evaluate  # type: ignore[method-assign]
    it = trainer(
        tmp_path, GrokAdamWCallback(), callback, max_steps=12, logging_steps=4, eval_steps=4, save_strategy="no"
    )
    said = warnings_of_losses(it)
    assert len(said) == (extra == [5, 6, 7])
    assert all("set control.should_log where a callback sets control.should_evaluate" in sentence for sentence in said)
    assert [log["step"] for log in it.state.log_history if "eval_loss" in log] == sorted([4, *extra, 8, 12])


@pytest.mark.parametrize(("bad", "is_nan"), [((5, 6), True), ((6,), False), ((), False)])
def test_losses_that_are_nan_are_no_signal_of_memorising(bad: tuple[int, ...], is_nan: bool, tmp_path: Path) -> None:
    """The Trainer logs 0 for steps whose losses are all NaN, which would look like a training loss of 0."""

    class Fails(transformers.Trainer):
        def compute_loss(self, model: Any, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(model, *arguments, **options)
            return loss * math.nan if model.training and self.state.global_step + 1 in bad else loss

    it = trainer(tmp_path, GrokAdamWCallback(), max_steps=6, eval_steps=6, save_strategy="no", kind=Fails)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the optimizer skips steps
        it.train()
    assert it.state.log_history[2]["loss"] > 0 or is_nan
    assert math.isnan(grokadamw_of(it).param_groups[0]["train_loss"]) == is_nan


def test_a_resumed_run_knows_the_last_evaluation(tmp_path: Path) -> None:
    """A log between evaluation and checkpoint counts. An evaluation at the start of the resumed run does not."""
    options = {"logging_steps": 6, "eval_steps": 4, "max_steps": 10, "save_steps": 6, "eval_on_start": True}
    whole, resumed = (trainer(tmp_path, GrokAdamWCallback(signals=ratio), **options) for _ in range(2))
    (said,) = warnings_of_losses(whole)
    assert "between step 0 and the evaluation at step 4," in said
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    losses = [grokadamw_of(it).param_groups[0]["train_loss"] for it in (whole, resumed)]
    assert losses[0] == losses[1] == next(log["loss"] for log in whole.state.log_history if "loss" in log)


def test_other_evaluations_are_none_of_its_business(tmp_path: Path) -> None:
    class Tests(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            it.evaluate(data(2, 8), metric_key_prefix="test")

    it = trainer(tmp_path, GrokAdamWCallback(), Tests(), save_strategy="no")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback waits")
        it.train()


def test_parameters_beside_the_model(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), max_steps=1, eval_strategy="no", save_strategy="no")
    own = torch.nn.Parameter(torch.ones(3))
    it.optimizer = GrokAdamW([*it.model.parameters(), own], gamma=0.0)
    with pytest.warns(UserWarning, match="layers stay as they were .*this LlamaForCausalLM has no parameter"):
        it.train()
    assert grokadamw_of(it).param_groups[0]["layers"] == list(range(len(list(it.model.parameters())) + 1))


def test_it_goes_first_only_where_it_is(tmp_path: Path) -> None:
    inner = GrokAdamWCallback()

    class Holds(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            inner.on_train_begin(*args, **kwargs)

    it = trainer(tmp_path, Holds(), max_steps=1, eval_strategy="no", save_strategy="no")
    it.train()
    assert inner not in it.callback_handler.callbacks
    it = trainer(tmp_path, inner, max_steps=1, eval_strategy="no", save_strategy="no")
    it.train()
    assert it.callback_handler.callbacks[0] is inner
    assert it.callback_handler.callbacks.count(inner) == 1


def test_layers(tmp_path: Path) -> None:
    plain = trainer(tmp_path, eval_strategy="no", save_strategy="no", max_steps=1)
    with pytest.warns(UserWarning, match=r"call optimizer\.set_layers\(model\)"):
        plain.train()
    for group in grokadamw_of(plain).param_groups:
        assert group["layers"] == list(range(len(group["params"])))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*layer")
        it = trainer(tmp_path, GrokAdamWCallback(), eval_strategy="no", save_strategy="no", max_steps=1)
        it.train()
    decay, no_decay = grokadamw_of(it).param_groups
    assert decay["weight_decay"] == 0.1
    assert no_decay["weight_decay"] == 0.0
    expected = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": 2, "model.layers.2": 3}
    expected |= {"model.norm": 4, "lm_head": 5}
    names = {param: name for name, param in it.model.named_parameters()}
    for group in (decay, no_decay):
        assert group["params"]
        for param, layer in zip(group["params"], group["layers"], strict=True):
            path = next(path for path in expected if names[param].startswith(f"{path}."))
            assert layer == expected[path]
    assert "model.layers.1.mlp.down_proj.weight" in grokadamw_of(it).layer_table()[2].names


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_step_begin"])
def test_a_group_that_is_added_gets_the_models_layers_and_the_callbacks_settings(hook: str, tmp_path: Path) -> None:
    callback, found = transformers.TrainerCallback(), []

    def unfreeze(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            layers = it.model.model.layers
            layers.requires_grad_(True)
            kwargs["optimizer"].add_param_group({"params": list(layers.parameters()), "lr": 1e-4})
            kwargs["lr_scheduler"].base_lrs.append(1e-4)
            kwargs["lr_scheduler"].lr_lambdas.append(lambda step: 1.0)

    def look(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        found.append([set(group["layers"]) for group in groups])
        assert {(group["betas"], group["lamb"]) for group in groups} == {((0.9, 0.98), 0.5)}

    setattr(callback, hook, unfreeze)
    callback.on_step_end = look  # type: ignore[method-assign]
    settings = GrokAdamWCallback(betas=(0.9, 0.98), lamb=0.5)
    it = trainer(tmp_path, settings, callback, save_strategy="no", max_steps=12)
    it.model.model.layers.requires_grad_(False)
    it.train()
    assert found == [[{0, 5}, {4}]] * 8 + [[{0, 5}, {4}, {1, 2, 3}]] * 4


@pytest.mark.filterwarnings("error:layer")
def test_the_presets_gamma_is_not_warned_of(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), max_steps=1, eval_strategy="no", save_strategy="no")
    it.optimizer = GrokAdamW.for_grokking(it.model, lr=0.01, weight_decay=0.1)
    it.train()
    assert grokadamw_of(it).layer_table()[-1].beta1 < 0.01


def test_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    callback = GrokAdamWCallback(
        signals=lambda: 0.5, betas=[0.5, 0.9], amplify_after=3, max_row_norm=2, gradient_clipping=0
    )
    it = trainer(tmp_path, callback, optim_args="lamb=1.5,gamma=0.05", max_steps=2, save_strategy="no")
    it.train()
    for group in grokadamw_of(it).param_groups:
        assert (group["lamb"], group["gamma"]) == (1.5, 0.05)
        assert group["betas"] == (0.5, 0.9)
        assert (group["amplify_after"], group["max_row_norm"], group["gradient_clipping"]) == (3, 2.0, 0.0)
    assert grokadamw_of(it).metrics()["signal"] == 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_rank")
def test_inside_of_zero(tmp_path: Path) -> None:
    """ZeRO's groups also get the options, as they replace those of its inner GrokAdamW at each step."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    it = trainer(tmp_path, GrokAdamWCallback(signals=ratio, betas=(0.5, 0.9)), save_strategy="no", logging_steps=3)
    it.optimizer = ZeroRedundancyOptimizer(it.model.parameters(), GrokAdamW, lr=0.01)
    it.optimizer.consolidate_state_dict()  # Accelerate asks for its state
    zero = it.optimizer
    it.train()
    for group in (*zero.param_groups, *zero.optim.param_groups):
        assert group["betas"] == (0.5, 0.9)
        assert set(group["layers"]) == set(range(6))
        assert group["eval_loss"] > 0
    assert zero.optim.metrics()["alpha"] < 0.98


def test_what_holds_for_the_whole_optimizer(tmp_path: Path) -> None:
    make = (GrokAdamW, {"lr": 0.01, "window_size": 4, "second_moment": "raw"})
    whole, half = tmp_path / "whole", tmp_path / "half"
    runs = {folder: trainer(folder, GrokAdamWCallback(), make=make) for folder in (whole, half)}
    runs[whole].train()
    runs[half].train(resume_from_checkpoint=str(whole / f"checkpoint-{SAVE_AT}"))
    assert grokadamw_of(runs[half]).defaults["window_size"] == 4
    for a, b in zip(runs[half].model.parameters(), runs[whole].model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lamb": -1.0}, ValueError, "lamb=-1.0"),
        ({"gama": 0.1}, TypeError, "gama=0.1 is not an argument"),
        ({"layer": 3}, TypeError, "layer=3 is not an argument"),
        ({"params": []}, TypeError, r"params=\[\] is not an argument"),
        ({"window_size": 3}, ValueError, "window_size=3.*optimizer_cls_and_kwargs"),
        ({"lr": 0.1}, ValueError, "lr=0.1.*TrainingArguments"),
        ({"signals": 3}, TypeError, "^signals=3 is neither"),
        ({"combine": "max"}, ValueError, "combine='max'"),
        ({"eval_loss": None}, TypeError, "eval_loss=None"),
        ({"eval_acc": 0.9}, TypeError, "eval_acc=0.9 is not the name of a metric"),
        ({"train_acc": True}, TypeError, "train_acc=True is not the name of a metric"),
        ({"eval_loss": GrokAdamW([torch.zeros(1)])}, TypeError, "^eval_loss=<GrokAdamW> is not the name of a metric"),
        ({"eval_acc": torch.zeros(99)}, TypeError, "^eval_acc=<Tensor> is not the name of a metric"),
        ({"eval_acc": torch.zeros(2, 2)}, TypeError, "^eval_acc=<Tensor> is not the name of a metric"),
        ({"lamda": 1}, TypeError, "^lamda=1 is not an argument of .*: give lamb$"),
        ({"beta1": 0.8}, TypeError, "^beta1=0.8 is not an argument of .*: give betas$"),
        ({"max_grad_norm": 1}, TypeError, "^max_grad_norm=1 is not an argument of .*: give gradient_clipping$"),
        ({"max_row_chang": 1}, TypeError, "^max_row_chang=1 is not an argument of .*: give max_row_change$"),
        ({"layers": 1}, TypeError, "^layers=1 is not an argument of .* may set$"),
        ({"foo": 1}, TypeError, "^foo=1 is not an argument of .* may set$"),
        ({"learning_rate": 0.1}, ValueError, "^learning_rate=0.1 is the Trainer's: give it in TrainingArguments"),
        ({"wd": 0.1}, ValueError, "^wd=0.1 is the Trainer's: give it in TrainingArguments"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GrokAdamWCallback(**arguments)


def test_an_option_that_excludes_the_optimizers_is_refused_before_anything_has_changed(tmp_path: Path) -> None:
    make = (GrokAdamW, {"lr": 0.01, "compat": "0.1.2"})
    it = trainer(tmp_path, GrokAdamWCallback(lamb=3.0, max_row_norm=1.0), make=make)
    with pytest.raises(ValueError, match="max_row_norm=1.0 with compat='0.1.2'"):
        it.train()
    assert {(group["lamb"], group["max_row_norm"]) for group in grokadamw_of(it).param_groups} == {(2.0, 0.0)}


def test_another_optimizer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match='AdamW, and no GrokAdamW.*optim="grokadamw"'):
        trainer(tmp_path, GrokAdamWCallback(), optim="adamw_torch").train()


@pytest.mark.parametrize(
    ("limit", "acts"), [(0.5, "max_grad_norm"), (5.0, "gradient_clipping"), (1.0, None), (0.0, None)]
)
def test_who_clips(limit: float, acts: str | None, tmp_path: Path) -> None:
    it = trainer(
        tmp_path, GrokAdamWCallback(), max_grad_norm=limit, eval_strategy="no", save_strategy="no", max_steps=1
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
        it.train()
    said = [warning for warning in caught if "clipped twice" in str(warning.message)]
    assert len(said) == (acts is not None)
    if acts:
        assert f"Only {acts} takes effect," in str(said[0].message)
        assert said[0].filename == __file__


def said_of_clipping(it: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
    return [str(warning.message) for warning in caught if "max_grad_norm" in str(warning.message)]


@pytest.mark.parametrize("other", [0.0, 2.0])
def test_the_smallest_limit_of_the_groups_counts(other: float, tmp_path: Path) -> None:
    options = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1}
    it = trainer(tmp_path, GrokAdamWCallback(signals=[]), max_grad_norm=1.0, **options)
    first, *rest = it.model.parameters()
    groups = [{"params": [first], "gradient_clipping": other}, {"params": rest, "gradient_clipping": 0.5}]
    it.optimizer = GrokAdamW(groups, lr=0.01, weight_decay=0.1)
    (said,) = said_of_clipping(it)
    assert "by the optimizer to gradient_clipping=0.5." in said


@pytest.mark.parametrize(
    ("own", "limit", "says"), [(0.0, 0.5, True), (0.5, 2.0, True), (0.5, 0.5, False), (0.5, 0.0, False)]
)
def test_clipping_after_step_in_backward_has_no_effect(own: float, limit: float, says: bool, tmp_path: Path) -> None:
    options = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1}
    it = trainer(tmp_path, GrokAdamWCallback(signals=[]), max_grad_norm=limit, **options)
    it.optimizer = GrokAdamW(it.model.named_parameters(), lr=0.01, weight_decay=0.1, gradient_clipping=own)
    step_in_backward(it.optimizer, clip_by="last" if own else None)
    said = said_of_clipping(it)
    assert len(said) == says
    if says:
        assert said[0].startswith(f"max_grad_norm={limit:g} has no effect: step_in_backward has used the gradients")
        assert (
            'Give max_grad_norm=0; to clip, give GrokAdamW a gradient_clipping, and step_in_backward clip_by="last'
            in said[0]
        )


@pytest.mark.parametrize(
    ("steps", "own", "limit", "says"),
    [(2, 1.0, 1.0, True), (2, 0.0, 1.0, True), (2, 1.0, 0.0, False), (1, 1.0, 1.0, False)],
)
def test_clipping_of_micro_batches(steps: int, own: float, limit: float, says: bool, tmp_path: Path) -> None:
    options = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1}
    it = trainer(tmp_path, GrokAdamWCallback(signals=[]), max_grad_norm=limit, **options)
    inner = GrokAdamW(it.model.named_parameters(), lr=0.01, weight_decay=0.1, gradient_clipping=own)
    it.optimizer = Accumulate(inner, steps)
    said = said_of_clipping(it)
    assert len(said) == says
    if says:
        assert said[0].startswith("max_grad_norm=1 clips the gradients of each micro-batch, before Accumulate takes")


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"save_steps": 3}, True),
        ({"save_steps": 4}, False),
        ({"save_steps": 3, "save_only_model": True}, False),
        ({"save_steps": 3, "eval_strategy": "no"}, False),
        ({"save_steps": 3, "signals": []}, False),
        ({"save_steps": 3, "lamb": 0.0}, False),
    ],
)
def test_checkpoints_that_forget_the_running_loss(options: dict[str, Any], warns: bool, tmp_path: Path) -> None:
    """It matters only if that loss is recorded, and a signal hears it."""
    callback = GrokAdamWCallback(**{name: options[name] for name in ("signals", "lamb") if name in options})
    it = trainer(tmp_path, callback, max_steps=7, **{k: v for k, v in options.items() if k not in ("signals", "lamb")})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
    said = [str(warning.message) for warning in caught if "checkpoint is saved" in str(warning.message)]
    assert len(said) == warns


def test_tensorboard_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    it = trainer(tmp_path, GrokAdamWCallback(), report_to="tensorboard", save_strategy="no")
    it.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/grok_alpha")]
    assert [step for step, _ in curve] == list(range(2, STEPS + 1, 2))
    assert [value for _, value in curve] == pytest.approx(alphas(it), rel=1e-6)
    assert len({value for _, value in curve}) > 2
    for name in ("signal", "grad_norm", "clip_coefficient", "skipped_steps"):
        assert events.Scalars(f"train/grok_{name}")


def test_accuracies_as_a_signal(tmp_path: Path) -> None:
    """Another callback may pass accuracies, such as those of compute_metrics, to a signal."""
    gap = AccuracyGap()

    class Accuracy(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            gap.record(train=1.0, eval=0.25)

    it = trainer(tmp_path, GrokAdamWCallback(signals=gap), Accuracy(), save_strategy="no")
    it.train()
    assert grokadamw_of(it).metrics()["signal"] == 0.75


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the accuracy of the next token, for compute_metrics."""
    return {"accuracy": (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean()}


@pytest.mark.filterwarnings("error::UserWarning:grokadamw")
def test_what_compute_metrics_finds_is_recorded(tmp_path: Path) -> None:
    """Metrics are found by their keys. The training accuracy comes from an evaluation of training data."""
    sets = {"train": data(0, 16), "test": data(1, 16)}
    monitors = []

    class Monitored(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitors.append(Monitor(kwargs["optimizer"], every=1, solved=0.0))

    callback = GrokAdamWCallback(
        "eval_test_loss", eval_acc="eval_test_accuracy", train_acc="eval_train_accuracy", signals=AccuracyGap()
    )
    options = {"max_steps": 22, "learning_rate": 0.03, "save_strategy": "no"}
    it = trainer(tmp_path, callback, Monitored(), eval_sets=sets, compute_metrics=accuracy, **options)
    it.train()
    logged = {name: {} for name in ("eval_train_accuracy", "eval_test_accuracy")}
    for logs in it.state.log_history:
        for name in logged.keys() & logs.keys():
            logged[name][logs["step"]] = logs[name]
    assert len(set(logged["eval_train_accuracy"].values())) > 2
    rows = {row["step"]: row for row in monitors[0].rows}
    for step in (3, 6, 21):
        assert rows[step + 1]["train_acc"] == logged["eval_train_accuracy"][step]
        assert rows[step + 1]["eval_acc"] == logged["eval_test_accuracy"][step]
    gap = logged["eval_train_accuracy"][21] - logged["eval_test_accuracy"][21]
    assert grokadamw_of(it).metrics()["signal"] == pytest.approx(max(gap, 0.0))
    assert monitors[0].grokked_at == 3  # every third step is evaluated


@pytest.mark.filterwarnings("error::UserWarning:grokadamw")
def test_a_training_accuracy_that_is_logged(tmp_path: Path) -> None:
    class Logs(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                it.log({"right": 0.75})

    it = trainer(tmp_path, GrokAdamWCallback(train_acc="right"), Logs(), save_strategy="no")
    it.train()
    assert [group["train_acc"] for group in grokadamw_of(it).param_groups] == [0.75] * 2
    assert len(alphas(it)) == STEPS // 2  # a log without the loss has no readings
    it.remove_callback(Logs)
    with pytest.warns(UserWarning, match="waits for 'right', and no log had it"):  # in the second run
        it.train()


def test_a_training_accuracy_waits_for_the_evaluation(tmp_path: Path) -> None:
    """Progress of training since the last evaluation must not look like a gap."""
    recorded = []

    class Logs(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorded.append(grokadamw_of(it).param_groups[0]["train_acc"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            it.log({"right": state.global_step / 100})

    callback = GrokAdamWCallback(eval_acc="eval_accuracy", train_acc="right", signals=AccuracyGap())
    it = trainer(tmp_path, callback, Logs(), compute_metrics=accuracy, save_strategy="no", eval_steps=4, max_steps=10)
    it.train()
    assert recorded == [None] * 4 + [0.04] * 4 + [0.08] * 2


def test_accuracies_that_do_not_come(tmp_path: Path) -> None:
    callback = GrokAdamWCallback(eval_acc="eval_acuracy", train_acc="right")
    it = trainer(tmp_path, callback, compute_metrics=accuracy, save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
        it.train()
    first, second = (str(warning.message) for warning in caught if "waits for" in str(warning.message))
    assert "waits for 'eval_acuracy', and the evaluation has eval_accuracy, eval_loss, " in first
    assert first.endswith("AccuracyGap and Monitor.grokked_at stay silent; pass the name of one as eval_acc=")
    assert "waits for 'right', and no log had it" in second
    assert grokadamw_of(it).param_groups[0]["eval_loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "key", "has", "way_out", "eval_steps"),
    [
        ({"eval_acc": "accuracy"}, "'accuracy'", "eval_accuracy, eval_loss, ", "pass 'eval_accuracy' as eval_acc=", 3),
        ({"eval_acc": "acc"}, "'acc'", "eval_accuracy, eval_loss, ", "pass the name of one as eval_acc=", STEPS),
        ({"eval_loss": "loss"}, "'loss'", "eval_loss: ", "pass 'eval_loss' as eval_loss=", STEPS),
        ({"eval_loss": "test_loss"}, "'test_loss'", "eval_loss: ", "pass the name of one as eval_loss=", 3),
        ({"eval_acc": "eval"}, "'eval'", "eval_accuracy, eval_loss, ", "pass the name of one as eval_acc=", 3),
    ],
)
def test_a_key_that_no_evaluation_has_is_warned_of_once(
    arguments: dict[str, str], key: str, has: str, way_out: str, eval_steps: int, tmp_path: Path
) -> None:
    """The warning does not depend on how the key begins, and comes when training ends at the latest."""
    at = []

    class Counts(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            at.append(len([warning for warning in caught if "waits for" in str(warning.message)]))

    callbacks = GrokAdamWCallback(**arguments), Counts()
    it = trainer(tmp_path, *callbacks, compute_metrics=accuracy, eval_steps=eval_steps, save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
        it.train()
    (said,) = (str(warning.message) for warning in caught if "waits for" in str(warning.message))
    assert f"waits for {key}, and the evaluation has {has}" in said
    assert said.endswith(way_out)
    assert at.index(1) == eval_steps


@pytest.mark.parametrize("eval_steps", [3, STEPS])
def test_a_key_of_one_of_several_sets(eval_steps: int, tmp_path: Path) -> None:
    """A round of evaluation covers all sets, and one of them may have the key."""
    sets = {"a": data(0, 16), "test": data(1, 16)}
    for key, warns in (("eval_test_loss", False), ("test_loss", True)):
        it = trainer(tmp_path, GrokAdamWCallback(key), eval_sets=sets, eval_steps=eval_steps, save_strategy="no")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            it.train()
        said = [str(warning.message) for warning in caught if "waits for" in str(warning.message)]
        assert len(said) == warns
        if warns:
            assert "has eval_a_loss, eval_test_loss: " in said[0]
            assert said[0].endswith("pass 'eval_test_loss' as eval_loss=")


def test_without_signals_no_loss_is_missed(tmp_path: Path) -> None:
    sets = {"a": data(0, 16), "b": data(1, 16)}
    it = trainer(tmp_path, GrokAdamWCallback(signals=[]), eval_sets=sets, save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
    assert not [warning for warning in caught if "waits for" in str(warning.message)]


def test_a_metric_that_is_no_accuracy_stops_the_run(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(eval_acc="eval_loss"), save_strategy="no")
    with pytest.raises(ValueError, match="eval_acc=.* is not an accuracy: give a fraction"):
        it.train()


def test_accuracies_that_are_nan_are_warned_of_once(tmp_path: Path) -> None:
    """A NaN accuracy is not recorded, and the run goes on."""
    shares = iter([0.5, math.nan, math.nan, 0.25])

    class Logs(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            it.log({"right": 0.75 if state.global_step == 1 else math.nan})

    callbacks = GrokAdamWCallback(eval_acc="eval_accuracy", train_acc="right", signals=AccuracyGap()), Logs()
    it = trainer(tmp_path, *callbacks, compute_metrics=lambda _: {"accuracy": next(shares)}, save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.train()
    said = sorted(str(warning.message) for warning in caught if "nan" in str(warning.message))
    assert [sentence.partition(":")[0] for sentence in said] == [
        "eval_acc=nan is not recorded",
        "train_acc=nan is not recorded",
    ]
    group = grokadamw_of(it).param_groups[0]
    assert (group["train_acc"], group["eval_acc"]) == (0.75, 0.25)


@pytest.mark.filterwarnings("error::UserWarning:grokadamw")
def test_accuracies_resume_with_the_run(tmp_path: Path) -> None:
    """An evaluation at the start of the resumed run logs the training accuracy again, which changes nothing."""
    sets = {"train": data(0, 16), "test": data(1, 16)}
    runs = []
    for _ in range(2):
        callback = GrokAdamWCallback(
            "eval_test_loss", eval_acc="eval_test_accuracy", train_acc="eval_train_accuracy", signals=AccuracyGap()
        )
        options = {"eval_steps": 4, "learning_rate": 0.03, "eval_on_start": True, "max_steps": 11}
        runs.append(trainer(tmp_path, callback, eval_sets=sets, compute_metrics=accuracy, **options))
        runs[-1].train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_AT}") if runs[:-1] else None)
    assert alphas(runs[1]) == alphas(runs[0])
    assert len(set(alphas(runs[0]))) > 1
    for a, b in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_accuracy_that_was_logged_before_the_checkpoint_resumes_with_the_run(tmp_path: Path) -> None:
    """The accuracy waits for the next evaluation, and the run may be resumed in between."""

    class Logs(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, SAVE_AT - 1):
                it.log({"right": 0.5 if state.global_step == 1 else 0.75})
            if state.global_step == SAVE_AT:
                it.log({"right": math.nan})

    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{SAVE_AT}")):
        callback = GrokAdamWCallback(eval_acc="eval_accuracy", train_acc="right", signals=AccuracyGap())
        options = {"eval_steps": SAVE_AT + 1, "logging_steps": 1}
        it = trainer(tmp_path, callback, Logs(), compute_metrics=lambda _: {"accuracy": 0.25}, **options)
        it.train(resume_from_checkpoint=resume)
        runs.append(it)
    assert alphas(runs[1]) == alphas(runs[0])
    assert len(set(alphas(runs[0]))) > 1
    for a, b in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        assert torch.equal(a, b)
