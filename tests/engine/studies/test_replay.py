"""头一个不是有限值的：最里面的一层，从损失往回的头一个梯度；数据里的各通道一行。"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine.studies.replay import bad_fields, main, watched
from tests.models.small import small_batch, small_spec
from util.checkpoint import save_checkpoint


class Exp(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.exp()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(2, 2), nn.Sequential(Exp())
        self.root = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.middle(self.first(x))["y"].sum() + self.root.sqrt().sum()


def test_the_innermost_layer_is_named() -> None:
    net = Net()
    nn.init.constant_(net.first.weight, 1000.0)
    with watched(net) as found:
        net(torch.ones(3, 2))
    assert found.layer is not None and found.layer.startswith(
        "middle.0 (Exp): output: 6 of 6 values not finite; input: "
    )
    assert "finite, at most 2e+03" in found.layer and found.layer.endswith("weights: none of its own")
    assert not net.first._forward_hooks and not net.root._post_accumulate_grad_hooks


def test_a_gradient_is_named_when_every_layer_is_finite() -> None:
    net = Net()
    with watched(net) as found:
        net(torch.ones(3, 2)).backward()
    assert found.layer is None and found.gradient == "root: 1 of 1 values not finite"


def test_what_comes_with_the_data_is_said() -> None:
    spec = small_spec()
    batch = small_batch(spec)
    assert bad_fields([batch], spec) == []
    batch.future[0, 0, 1, 0, :2] = math.nan
    assert len(lines := bad_fields([batch, batch], spec)) == 1
    assert lines[0].startswith(f"data: {spec.channels[1]}: 4 of ")


def test_another_checkpoint_is_refused(tmp_path) -> None:
    save_checkpoint(tmp_path / "x.ckpt", {"model": {}, "ema": None})
    with pytest.raises(ValueError, match=r"x.ckpt"):
        main([str(tmp_path / "x.ckpt")])
