"""Tests of the Trainer's arguments: the preset takes them, and warnings name those that do not reach the optimizer."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from grokadamw import GrokAdamW
from grokadamw.signals import AccuracyGap, SlowGradient, loss_gap

from .test_huggingface import GrokAdamWCallback, grokadamw_of, model, trainer, transformers

from grokadamw.huggingface import for_grokking  # isort: skip

BRIEF = {"max_steps": 2, "save_strategy": "no"}
PRESET = {"learning_rate": 2e-3, "weight_decay": 1.5}


def with_preset(folder: Path, *callbacks: Any, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    given = transformers.TrainingArguments(str(folder), **{**PRESET, **arguments})
    make = for_grokking(given, **options or {})
    return trainer(folder, *callbacks, make=make, **{**BRIEF, **PRESET, **arguments})


def said_by(train: Any) -> list[str]:
    """Return the warnings that this package issued."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(warning.message) for warning in caught if warning.filename == __file__]


def test_the_preset_has_the_trainers_learning_rate_weight_decay_and_schedule(tmp_path: Path) -> None:
    lrs: list[list[float]] = []

    class Watches(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lrs.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    schedule = {"lr_scheduler_type": "linear", "max_steps": 4}
    it = with_preset(tmp_path, GrokAdamWCallback(), Watches(), options={"lamb": 0.5}, **schedule)
    assert said_by(it.train) == []
    expected = GrokAdamW.for_grokking(model(), lr=2e-3, weight_decay=1.5, lamb=0.5)
    for group, other in zip(grokadamw_of(it).param_groups, expected.param_groups, strict=True):
        assert group["param_names"] == other["param_names"]
        assert group["layers"] == other["layers"]
        for name in ("weight_decay", "lamb", "gamma", "betas", "alpha_init", "max_row_change"):
            assert group[name] == other[name], name
    assert len(lrs) == 4
    for i, now in enumerate(lrs):  # the schedule multiplies each group's lr
        assert now == pytest.approx([group["lr"] * (1 - i / 4) for group in expected.param_groups])


def test_the_preset_has_the_numbers_of_the_time_when_it_is_made(tmp_path: Path) -> None:
    """hyperparameter_search changes the Trainer's arguments from trial to trial."""
    given = transformers.TrainingArguments(str(tmp_path), **PRESET)
    make = for_grokking(given)
    for copy in (make, pickle.loads(pickle.dumps((given, make)))[1]):  # some backends of the search pickle the Trainer
        arguments = copy[0].args[0]
        for lr, decay in ((1e-3, 0.5), (4e-3, 1.0)):
            arguments.learning_rate, arguments.weight_decay = lr, decay
            it = transformers.Trainer(model(), arguments, optimizer_cls_and_kwargs=copy)
            found = it.create_optimizer().param_groups
            expected = GrokAdamW.for_grokking(model(), lr=lr, weight_decay=decay).param_groups
            for name in ("lr", "weight_decay"):
                assert [group[name] for group in found] == [group[name] for group in expected]


@pytest.mark.parametrize("arguments", ["run", None, transformers.TrainingArguments])
def test_the_preset_takes_the_trainers_arguments_alone(arguments: Any) -> None:
    with pytest.raises(TypeError, match="arguments is (a|the class) .*: give for_grokking the TrainingArguments that"):
        for_grokking(arguments)


def test_a_run_of_the_preset_resumes(tmp_path: Path) -> None:
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = with_preset(tmp_path, GrokAdamWCallback(), **steps)
    whole.train()
    resumed = with_preset(tmp_path / "resumed", GrokAdamWCallback(), **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_the_trainers_defaults_are_no_preset(name: str, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), **{k: v for k, v in PRESET.items() if k != name})
    with pytest.raises(ValueError, match=f"{name}=.* is the Trainer's default.*learning_rate=3e-3, weight_decay=1.0"):
        for_grokking(arguments)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_the_trainers_numbers_are_given_to_the_trainer(name: str, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), **PRESET)
    with pytest.raises(ValueError, match=f"{name}=0.5 is the Trainer's: give it in TrainingArguments"):
        for_grokking(arguments, **{name: 0.5})


def test_a_trainer_that_makes_optimizers_without_the_model_is_told_another_way(tmp_path: Path) -> None:
    """Some releases of transformers pass parameter groups instead of the model."""
    make, options = for_grokking(transformers.TrainingArguments(str(tmp_path), **PRESET))
    with pytest.raises(TypeError, match=r"Trainer\(optimizers=\(GrokAdamW.for_grokking\(model, lr=…"):
        make([{"params": list(model().parameters())}], **options)


def test_a_weight_decay_that_the_trainers_groups_hide_is_named(tmp_path: Path) -> None:
    made_by = (GrokAdamW, {"lr": 3e-3, "weight_decay": 0.7})
    it = trainer(tmp_path, GrokAdamWCallback(), make=made_by, learning_rate=5e-5, weight_decay=0.0, **BRIEF)
    (sentence,) = said_by(it.train)
    assert sentence.startswith("the optimizer was given weight_decay=0.7, and the Trainer's groups have 0")


def test_what_the_trainer_drops_is_said_once(tmp_path: Path) -> None:
    callback = GrokAdamWCallback(eps=1e-6)
    dropped = {"adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-6}
    it = trainer(
        tmp_path, callback, optim_args="lamda=1.5, gamma=0.05, betas=3, window_size=2, lr=1", **dropped, **BRIEF
    )
    lamda, betas, window, lr, beta1, beta2 = said_by(it.train)
    assert lamda == "optim_args has 'lamda', which the Trainer drops: did you mean lamb?"
    assert betas.startswith("optim_args has 'betas', which the Trainer drops: it takes alpha_init, lamb, gamma, ")
    assert betas.endswith("gradient_clipping; give others to GrokAdamWCallback")
    assert window.endswith("gradient_clipping; give others by optimizer_cls_and_kwargs=(GrokAdamW, {...})")
    assert lr.endswith("gradient_clipping; give others in TrainingArguments")
    assert beta1 == "adam_beta1=0.8 does not reach the optimizer, which has 0.9: give betas to GrokAdamWCallback"
    assert beta2.startswith("adam_beta2=0.98 does not reach the optimizer, which has 0.999: ")
    assert said_by(it.train) == []


def test_what_the_trainer_hands_on_is_not_spoken_of(tmp_path: Path) -> None:
    callback = GrokAdamWCallback(betas=(0.8, 0.98))
    it = trainer(tmp_path, callback, optim_args="lamb=1.50,gamma=5e-2", adam_beta1=0.8, adam_beta2=0.98, **BRIEF)
    assert said_by(it.train) == []


def test_an_optimizer_that_was_made_elsewhere_has_other_numbers(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), optim_args="lamb=1.5,gamma=x", adam_epsilon=1e-6, **BRIEF)
    it.optimizer = GrokAdamW.for_grokking(it.model)
    lamb, gamma, eps, lr, decay = said_by(it.train)
    assert lamb.startswith("optim_args has lamb=1.5, and the optimizer has 2: the Trainer reads optim_args only if")
    assert gamma.startswith("optim_args has gamma=x, and the optimizer has 0.6")
    assert eps == "adam_epsilon=1e-06 does not reach the optimizer, which has 1e-08: give eps to GrokAdamWCallback"
    assert lr.startswith("learning_rate=0.01 does not reach the optimizer, which has 0.003: give lr where")
    assert decay.startswith("weight_decay=0.1 does not reach the optimizer, which has 1: give it where")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with learning_rate=0.01, weight_decay=0.1 and lamb=2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer(folder, GrokAdamWCallback(), max_steps=4, save_steps=2, optim_args="lamb=2").train()
    return folder / "checkpoint-2"


LR_STAYS = "learning_rate=0.005 is not used: the resumed run keeps 0.01. To change it, set lr and "
DECAY_STAYS = "weight_decay=0.3 is not used: the resumed run keeps 0.1. To change it, set weight_decay "
LAMB_STAYS = "optim_args has lamb=1, but the resumed run keeps 2: to change it, pass lamb to GrokAdamWC"


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ({}, {}, []),
        ({"learning_rate": 0.005}, {}, [LR_STAYS]),
        ({"weight_decay": 0.3}, {}, [DECAY_STAYS]),
        ({"optim_args": "lamb=1,gamma=0.1"}, {}, [LAMB_STAYS]),
        ({"optim_args": "lamb=1"}, {"lamb": 1.0}, []),
        ({"optim_args": "lamb=1"}, {"lamb": 0.5}, []),
        ({"optim_args": "lamb=2", "adam_beta1": 0.9}, {}, []),
        ({"lr_scheduler_type": "constant"}, {}, []),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {}, []),
    ],
)
def test_numbers_that_a_resumed_run_keeps(
    arguments: dict[str, Any], options: dict[str, Any], expected: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(**options), max_steps=4, save_strategy="no", **arguments)
    found = said_by(lambda: it.train(resume_from_checkpoint=str(checkpoint)))
    assert len(found) == len(expected)
    for sentence, start in zip(found, expected, strict=True):
        assert sentence.startswith(start)


def test_a_resumed_preset_has_the_numbers_that_were_given(tmp_path: Path) -> None:
    """No warning comes if some groups have the given numbers. If none has, a warning says so."""
    with_preset(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    for lr, says in ((2e-3, False), (1e-3, True)):
        it = with_preset(tmp_path, GrokAdamWCallback(), max_steps=4, learning_rate=lr)
        found = said_by(lambda: it.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))  # noqa: B023
        assert len(found) == says
        assert not says or "learning_rate=0.001 is not used: the resumed run keeps 0.002. To" in found[0]


def test_a_resumed_run_gets_the_numbers_as_it_is_told(checkpoint: Path, tmp_path: Path) -> None:
    class Sets(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = group["initial_lr"] = args.learning_rate
            kwargs["lr_scheduler"].base_lrs = [args.learning_rate] * 2

    options = {"max_steps": 4, "save_strategy": "no", "learning_rate": 0.005, "lr_scheduler_type": "constant"}
    it = trainer(tmp_path, Sets(), GrokAdamWCallback(), **options)
    assert said_by(lambda: it.train(resume_from_checkpoint=str(checkpoint))) == []
    assert [group["lr"] for group in grokadamw_of(it).param_groups] == [0.005, 0.005]


@pytest.mark.parametrize("optim_args", ["lamb=1,lamb=2", "lamb=x, lamb=2.0", "gama=1,lamb=1,gama=2,lamb=2"])
def test_the_last_entry_of_a_name_counts(optim_args: str, tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), optim_args=optim_args, **BRIEF)
    dropped = ["optim_args has 'gama', which the Trainer drops: did you mean gamma?"] if "gama" in optim_args else []
    assert said_by(it.train) == dropped
    assert grokadamw_of(it).param_groups[0]["lamb"] == 2.0


def test_groups_with_numbers_of_their_own(tmp_path: Path) -> None:
    """The optimizer got lr, though no group uses it. The message on weight decay names a number that a group has."""
    it = trainer(tmp_path, GrokAdamWCallback(), **BRIEF)
    group = {"params": list(it.model.parameters()), "lr": 0.5, "weight_decay": 0.0}
    it.optimizer = GrokAdamW([group], lr=0.01, gamma=0.0, weight_decay=0.25)
    (decay,) = said_by(it.train)
    assert decay.startswith(
        "weight_decay=0.1 does not reach the optimizer, which has 0: give it where the optimizer is"
    )


def test_numbers_that_only_the_constructor_got_or_that_are_rounded_are_not_missed(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), optim_args="lamb=1.5", **BRIEF)
    groups = [{"params": list(it.model.parameters()), "lamb": 0.5}]
    it.optimizer = GrokAdamW(groups, lr=torch.tensor(0.01), lamb=1.5, gamma=0.0, weight_decay=0.1)  # type: ignore[arg-type]
    assert said_by(it.train) == []


def test_numbers_that_nobody_chose_are_not_missed(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), learning_rate=5e-5, weight_decay=0.0, **BRIEF)
    it.optimizer = GrokAdamW.for_grokking(it.model)
    assert said_by(it.train) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, True),
        ({"signals": loss_gap}, True),
        ({"eval_acc": "eval_accuracy", "signals": AccuracyGap()}, True),
        ({"signals": []}, False),
        ({"signals": SlowGradient(every=2)}, False),
        ({"lamb": 0.0}, False),
    ],
    ids=["losses", "a signal of losses", "accuracies", "none", "no losses", "no filter"],
)
def test_without_an_evaluation_it_says_so_once(options: dict[str, Any], says: bool, tmp_path: Path) -> None:
    callback = GrokAdamWCallback(**options)
    said = []
    for _ in range(2):
        it = trainer(tmp_path, callback, eval_strategy="no", **BRIEF)
        said += said_by(it.train)
        optimizer = grokadamw_of(it)
        said += said_by(lambda: [optimizer.update_signals() for _ in range(1100)])  # noqa: B023
    assert len(said) == says
    if says:
        assert 'eval_strategy="no": no evaluation is planned' in said[0]


def test_one_evaluation_at_the_start_is_enough(tmp_path: Path) -> None:
    it = trainer(tmp_path, GrokAdamWCallback(), eval_strategy="no", eval_on_start=True, **BRIEF)
    assert said_by(it.train) == []
