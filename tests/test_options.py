"""The table of options agrees with the constructor, the docstring and the contract, and all else follows from it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import grokadamw
from grokadamw import GrokAdamW
from grokadamw.checkpoints import to_adamw
from grokadamw.options import OPTIONS, STATES, may_be_coded
from grokadamw.param_groups import GROUP_KEYS

from .models import parameters

SIGNALS = {"grokking_signal_fns", "grokking_signal_fn", "combine", "shard_group"}  # arguments that a group does not set
OF_THE_OPTIMIZER = {
    *("second_moment", "nonfinite", "compat", "differentiable"),
    *("amplify_by_signal", "window_size", "window_dtype", "accumulation_steps"),
    *("state_dtype", "master_weight_bits", "rounding"),
}
HOW_TO_RUN = {"foreach", "fused", "capturable"}
WARNED_OF = {"second_moment", "compat", "amplify_by_signal", "window_size", "accumulation_steps"}
IN_GROUPS = [name for name in OPTIONS if name not in SIGNALS]
OF_GROUPS = [name for name in IN_GROUPS if name not in OF_THE_OPTIMIZER]
CANDIDATES = (True, "raw", "raise", "0.1.2", 2, 0.5, (0.5, 0.5), torch.float64, "int8", 24, "stochastic")
NEEDS: dict[str, dict[str, Any]] = {
    "window_dtype": {"window_size": 2},
    "accumulation_steps": {"second_moment": "raw"},
}


def another(name: str) -> Any:
    """Return an allowed value that is not the default."""
    for value in CANDIDATES:
        try:
            if OPTIONS[name].check(name, value) != OPTIONS[name].default:
                return value
        except (TypeError, ValueError):
            pass
    raise AssertionError(f"no candidate suits {name}")


def with_another(name: str) -> GrokAdamW:
    options = {} if name == "layer" else {name: another(name), **NEEDS.get(name, {})}
    optimizer = GrokAdamW(parameters(), **options)
    optimizer.param_groups[0][name] = another(name)
    return optimizer


# the constructor and the docstring agree


def test_the_constructor_has_the_same_options_and_defaults() -> None:
    _, _, *arguments = inspect.signature(GrokAdamW.__init__).parameters.values()
    assert [argument.name for argument in arguments] == [name for name in OPTIONS if name != "layer"]
    for argument in arguments:
        assert (argument.name, argument.default) == (argument.name, OPTIONS[argument.name].default)
        assert type(argument.default) is type(OPTIONS[argument.name].default)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_docstring_describes_every_option(name: str) -> None:
    described = inspect.getdoc(GrokAdamW) or ""
    assert re.search(rf"^    {name}: |``{name}``", described, re.MULTILINE)


@pytest.mark.parametrize("state_dtype", [{}, {"exp_avg": "float32"}, dict.fromkeys(STATES, "float32")])
@pytest.mark.parametrize("other", [{"compat": "0.1.2"}, {"differentiable": True}])
def test_the_default_format_may_be_spelt_out(state_dtype: dict[str, str], other: dict[str, Any]) -> None:
    optimizer = GrokAdamW(parameters(), state_dtype=state_dtype, **other)
    assert not may_be_coded(optimizer.defaults)


# defaults and groups


def test_groups_hold_the_same_keys_from_the_start_on() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    assert optimizer.param_groups[0].keys() == {"params", *GROUP_KEYS}
    assert optimizer.defaults.keys() == {*GROUP_KEYS} - {"layers"}
    assert SIGNALS & {*GROUP_KEYS} == {"grokking_signal_fns"}
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (saved,) = optimizer.state_dict()["param_groups"]
    assert saved.keys() == {"params", *GROUP_KEYS}
    for name in IN_GROUPS:
        assert saved[name] == OPTIONS[name].default
        assert type(saved[name]) is type(OPTIONS[name].default)
    keys = torch.optim.AdamW(params).param_groups[0].keys() | {"decoupled_weight_decay"}  # torch 2.6 has no such key
    assert to_adamw(optimizer.state_dict())["param_groups"][0].keys() == keys


@pytest.mark.parametrize("name", IN_GROUPS)
def test_what_is_no_value_is_refused_by_name(name: str) -> None:
    for value in (object(), "no", -1, float("nan")):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[0\])?="):
            GrokAdamW(parameters(), **{name: value}) if name != "layer" else GrokAdamW([{"params": [], "layer": value}])


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_group_may_have_its_own(name: str) -> None:
    first, second = parameters()
    groups = GrokAdamW([{"params": [first]}, {"params": [second], name: another(name)}]).param_groups
    assert [group[name] for group in groups] == [OPTIONS[name].default, another(name)]


@pytest.mark.parametrize("name", sorted(OF_THE_OPTIMIZER))
def test_a_group_may_not_have_its_own(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* in a parameter group: it holds for the whole optimizer"):
        GrokAdamW([{"params": parameters(), name: another(name)}])
    optimizer = GrokAdamW(parameters(), **{name: another(name)}, **NEEDS.get(name, {}))
    assert optimizer.param_groups[0][name] == another(name)


# checkpoints


@pytest.mark.parametrize("name", IN_GROUPS)
def test_loading_takes_what_a_group_may_set_and_keeps_the_rest(name: str) -> None:
    saved = with_another(name).state_dict()
    optimizer = GrokAdamW(parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    kept = name in OF_THE_OPTIMIZER | HOW_TO_RUN
    assert optimizer.param_groups[0][name] == (OPTIONS[name].default if kept else another(name))
    said = " ".join(str(warning.message) for warning in caught)
    assert (f"a run with {name}={another(name)!r}, and this optimizer keeps" in said) == (name in WARNED_OF)


@pytest.mark.parametrize("name", IN_GROUPS)
def test_what_an_older_version_did_not_know_stays_as_constructed_or_has_the_default(name: str) -> None:
    saved = GrokAdamW(parameters()).state_dict()
    del saved["param_groups"][0][name]
    optimizer = with_another(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] == another(name)

    pickled = pickle.loads(pickle.dumps(GrokAdamW(parameters()).__getstate__()))
    for where in (pickled["defaults"], *pickled["param_groups"]):
        del where[name]
    older = GrokAdamW.__new__(GrokAdamW)
    older.__setstate__(pickled)
    assert older.param_groups[0][name] == older.defaults[name] == OPTIONS[name].default


@pytest.mark.parametrize("name", IN_GROUPS)
def test_copies_keep_it(name: str) -> None:
    optimizer = with_another(name)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.param_groups[0][name] == another(name)
        assert other.defaults == optimizer.defaults


# a new option

ROW = """    "{name}": Option(0.5, partial(check_number, below=3), {scope}, {on_load}),
"""
USE = """
import copy, pickle, warnings
import torch
from grokadamw import GrokAdamW
from grokadamw.checkpoints import to_adamw

warnings.simplefilter("error")
a, b = torch.zeros(2), torch.zeros(2)
for name in ("sharpness", "roughness"):
    default, given = GrokAdamW([a, b]), GrokAdamW([a, b], **{name: 2})
    assert default.param_groups[0][name] == 0.5 and given.param_groups[0][name] == 2
    saved = given.state_dict()
    assert name not in to_adamw(saved)["param_groups"][0]
    try:
        GrokAdamW([a], **{name: 3})
    except ValueError as error:
        print(error)
    try:
        group = GrokAdamW([{"params": [a], name: 1}]).param_groups[0]
    except ValueError as error:
        print(error)
    try:
        default.load_state_dict(saved)
    except UserWarning as warning:
        print(warning)
    print(default.param_groups[0][name])
    older = copy.deepcopy(saved)
    del older["param_groups"][0][name]
    given.load_state_dict(older)
    assert given.param_groups[0][name] == 2
    state = given.__getstate__()
    for where in (state["defaults"], *state["param_groups"]):
        del where[name]
    older = GrokAdamW.__new__(GrokAdamW)
    older.__setstate__(state)
    assert older.param_groups[0][name] == 0.5
"""


def test_a_new_option_is_a_row_and_an_argument(tmp_path: Path) -> None:
    """The test adds an option of groups and one of the whole optimizer to a copy of the package."""
    package = shutil.copytree(Path(grokadamw.__file__).parent, tmp_path / "grokadamw")
    rows = [("sharpness", "GROUP", "TAKE"), ("roughness", "OPTIMIZER", "WARN")]
    for file, before, new in (
        (
            "options.py",
            '    "foreach": ',
            [ROW.format(name=name, scope=scope, on_load=how) for name, scope, how in rows],
        ),
        (
            "grokadamw.py",
            "        foreach: bool | None = None,\n",
            [f"        {name}: float = 0.5,\n" for name, *_ in rows],
        ),
    ):
        source = (package / file).read_text()
        assert source.count(before) == 1
        (package / file).write_text(source.replace(before, "".join(new) + before))
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "sharpness=3 is out of range: give a number in [0, 3)",
        "2.0",
        "roughness=3 is out of range: give a number in [0, 3)",
        "roughness=1 in a parameter group: it holds for the whole optimizer, where it is 0.5; pass it to "
        "GrokAdamW(...)",
        "state_dict is of a run with roughness=2.0, and this optimizer keeps roughness=0.5, as constructed",
        "0.5",
    ]
