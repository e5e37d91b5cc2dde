"""便宜的激活不留到反向：数逐位不变，内存真的放开；外面整段重算时让路。"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers.recompute import through


class Watched(nn.Module):
    """记下结果的存储，看它活到几时；数走了几遍。"""

    def __init__(self, cheap: nn.Module) -> None:
        super().__init__()
        self.cheap = cheap
        self.made: list[weakref.ref[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.cheap(x)
        self.made.append(weakref.ref(y.untyped_storage()))
        return y


def parts(cheap: nn.Module) -> tuple[nn.Linear, Watched, nn.Module, Tensor]:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return first, Watched(cheap), second, torch.randn(2, 5, 6)


@pytest.mark.parametrize("cheap", [nn.GELU(), nn.LayerNorm(8), nn.Sequential(nn.LayerNorm(8), nn.SiLU())])
def test_bits_are_those_of_the_plain_way(cheap: nn.Module) -> None:
    first, watched, second, x = parts(cheap)
    modules = nn.ModuleList([first, watched, second])
    found = []
    for plain in (True, False):
        modules.zero_grad()
        hidden = first(x)
        y = second(watched(hidden)) if plain else through(watched, second, hidden)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in modules.parameters())])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_what_is_cheap_is_not_held() -> None:
    first, watched, second, x = parts(nn.GELU())
    y = through(watched, second, first(x))
    assert watched.made[0]() is None
    y.sum().backward()
    assert len(watched.made) == 2


def test_nothing_to_do_without_gradients() -> None:
    first, watched, second, x = parts(nn.GELU())
    with torch.no_grad():
        assert torch.equal(through(watched, second, first(x)), second(watched(first(x))))


def test_gradients_of_gradients() -> None:
    first, watched, second, x = parts(nn.GELU())
    x.requires_grad_()
    found = []
    for plain in (True, False):
        hidden = first(x)
        y = second(watched(hidden)) if plain else through(watched, second, hidden)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), first.weight)[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_checkpoint_around_it_keeps_nothing_inside() -> None:
    first, watched, second, x = parts(nn.GELU())
    inside: list[weakref.ref[Any]] = []

    def whole(x: Tensor) -> Tensor:
        inner = first(x)
        inside.append(weakref.ref(inner.untyped_storage()))
        return through(watched, second, inner)

    x.requires_grad_()
    y = checkpoint(whole, x, use_reentrant=False)
    assert isinstance(y, Tensor) and inside[0]() is None and watched.made[0]() is None
    y.sum().backward()
    mine = x.grad
    x.grad = None
    second(watched(first(x))).sum().backward()
    assert mine is not None and x.grad is not None and torch.equal(mine, x.grad)


def test_half_precision_is_recomputed_as_it_was() -> None:
    """噪声调制的归一化里有矩阵乘：重算也要在自动的半精度里。"""
    first, cheap, second, x = parts(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    modules, found = nn.ModuleList([first, cheap, second]), []
    for plain in (True, False):
        modules.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = first(x)
            y = second(cheap(hidden)) if plain else through(cheap, second, hidden)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad for p in modules.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
