"""Write a checkpoint, with the weights that its run reaches later: python write.py grokadamw|adamw FILE [resumed].

This script wrote the files in its folder, each under the release in its name. They must not change, because what a
release wrote must always load. With `resumed`, the run is saved, loaded and continued before the checkpoint.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train alike under every release: losses are set in the groups, where 0.1.2 expects them."""
    for step in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (net(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean()
        loss.backward()
        if type(optimizer).__name__ == "GrokAdamW" and step % 2 == 0:
            for group in optimizer.param_groups:
                group["train_loss"], group["eval_loss"] = loss.item(), loss.item() + 0.1 * step
        optimizer.step()


def groups(net: nn.Module, named: bool) -> list[dict[str, Any]]:
    """Return a group of weights, which decay, and one of biases, which do not."""
    params: Any = list(net.named_parameters()) if named else [(None, p) for p in net.parameters()]
    split = [[pair for pair in params if (pair[1].ndim > 1) is decays] for decays in (True, False)]
    listed = [pairs if named else [p for _, p in pairs] for pairs in split]
    return [{"params": listed[0]}, {"params": listed[1], "weight_decay": 0.0}]


def main() -> None:
    optimizer_name, path, *resumed = sys.argv[1:]
    if optimizer_name == "grokadamw":
        import grokadamw

        make: Any = grokadamw.GrokAdamW
        named = grokadamw.__version__ != "0.1.2"
    else:
        make, named = torch.optim.AdamW, True
    net = model()
    optimizer = make(groups(net, named), **SETTINGS)
    train(net, optimizer, range(2))
    if resumed:
        state, optimizer = optimizer.state_dict(), make(groups(net, named), **SETTINGS)
        optimizer.load_state_dict(state)
    train(net, optimizer, range(2, 5))
    saved = copy.deepcopy({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, range(5, 10))
    torch.save(saved | {"later": net.state_dict()}, path)


if __name__ == "__main__":
    main()
