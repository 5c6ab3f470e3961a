"""The demonstration's task, model and command, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.grokking import demo, parts
from benchmarks.grokking.modular import P, Transformer, products


def test_the_split_is_all_products_once() -> None:
    data = products(seed=0)
    assert [len(part.answers) for part in data] == [4656, 465, 4191]
    tokens, answers = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert len(tokens.unique(dim=0)) == len(tokens) == P * (P - 1)
    assert torch.equal(tokens[:, 0] * tokens[:, 2] % P, answers)
    assert torch.equal(products(seed=0).signal.tokens, data.signal.tokens)
    assert not torch.equal(products(seed=1).signal.tokens, data.signal.tokens)


def test_the_model_computes_what_full_attention_would() -> None:
    """The last block leaves out what is thrown away; torch's own attention says what must remain."""
    torch.manual_seed(0)
    model, tokens = Transformer(), products(seed=0).signal.tokens[:7]
    assert sum(p.numel() for p in model.parameters()) == 422_656
    embedding, *blocks, head = model.layers
    x = embedding(tokens)
    for block in blocks:
        normed = block.norm1(x)
        q, (k, v) = block.q(normed), block.kv(normed).chunk(2, dim=-1)
        heads = [y.view(7, 4, 4, 32).transpose(1, 2) for y in (q, k, v)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + block.out(attended.transpose(1, 2).reshape(7, 4, 128))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model(tokens), head(x))


def test_the_command_prints_a_table_and_writes_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--steps", "20", "--out", str(tmp_path), "--seed", "3"])
    printed = capsys.readouterr().out
    assert "GrokAdamW" in printed
    assert "> 20" in printed
    assert (tmp_path / "demo-seed3.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "demo-seed3.json").read_text())
    assert [arm["arm"] for arm in results["arms"]] == [arm.name for arm in demo.ARMS]
    grok = results["arms"][-1]
    assert grok["steps"] == [10, 20]
    assert 0 < grok["alpha"][1] < 0.98  # the signal has arrived
    assert results["arms"][0]["alpha"] == [None, None]
    assert grok["steps_to_95"] == {"training": None, "validation": None, "sustained": None}


def test_reached_and_sustained() -> None:
    curve = demo.Curve("", "", steps=list(range(10, 110, 10)), validation=[0.5, 0.96, 0.5, *[0.97] * 7])
    assert curve.reached(curve.validation) == 20
    assert curve.sustained() == 40


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "5"])
    assert "--steps 5" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "file")])
    assert "name another" in capsys.readouterr().err


def test_parts_are_the_demonstration_but_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Transformer()
    whole, *others = (arm.make(model).param_groups[0] for arm in parts.PARTS[1:])
    demonstrated = demo.ARMS[-1].make(model).param_groups[0]
    keys = set(whole) - {"params", "param_names"}
    assert all(whole[key] == demonstrated[key] for key in keys)
    changed = [{key for key in keys if group[key] != whole[key]} for group in others]
    assert changed == [{"lamb"}, {"gamma"}, {"gamma"}, set(), {"gradient_clipping"}]
    parts.main(["--steps", "10", "--seeds", "1", "--out", str(tmp_path)])
    assert "without the filter" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "parts.json").read_text())["arms"]) == [arm.name for arm in parts.PARTS]
