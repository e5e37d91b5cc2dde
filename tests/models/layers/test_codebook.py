"""码本：用量的直方图、滑动平均、换掉没有用的码，都与写开的循环相比；一个进程不碰 torch.distributed，两个等于一个。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from models.layers.codebook import EARLY, USED
from models.layers.multiscale import MultiScaleQuantizer

SCALES = ((1, 2), (2, 3))
V, WIDTH = 7, 3


def make(**options: Any) -> Any:
    """训练模式；码铺开，各有各的邻居。"""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(V, WIDTH, SCALES, phi=1, **options).train()
    with torch.no_grad():
        quantizer.codes.normal_()
        if quantizer.codebook.bank is not None:
            quantizer.codebook.bank.sums.copy_(quantizer.codes)
    return quantizer


def latents(seed: int = 1, count: int = 4) -> Tensor:
    return torch.randn(count, WIDTH, 2, 3, generator=torch.Generator().manual_seed(seed))


def vectors_of(quantizer: Any, f: Tensor) -> np.ndarray:
    """这一次前向量化的全部向量 (n, width)。"""
    return torch.cat([v for _, v, _ in quantizer._walk(f)]).detach().double().numpy()


def test_usage_is_the_written_out_average() -> None:
    quantizer = make()
    hits = np.zeros((2, V))
    for step in range(EARLY + 5):
        f = latents(step, count=1)
        made = quantizer(f)
        counts = np.array([np.bincount(index.flatten(), minlength=V) for index in made.indices])
        rate = 1.0 if step == 0 else 0.1 if step < EARLY else 0.01
        hits = (1 - rate) * hits + rate * counts / counts.sum(1, keepdims=True)
        together = counts.sum(0) / counts.sum()
        entropy = -(together[together > 0] * np.log(together[together > 0])).sum()
        assert float(made.perplexity) == pytest.approx(np.exp(entropy), rel=1e-5)
        used = (2 * hits[0] + 6 * hits[1]) / 8 >= USED / V  # 按 token 数合起来
        assert float(made.usage) == pytest.approx(used.mean())
    np.testing.assert_allclose(quantizer.codebook.hits.numpy(), hits, rtol=1e-3, atol=1e-7)


def test_a_code_never_chosen_is_not_used() -> None:
    quantizer = make()
    with torch.no_grad():
        quantizer.codes[2:5] = 100.0
    used = [float(quantizer(latents(step)).usage) for step in range(3)]
    assert 0 < round(used[-1] * V) <= V - 3
    assert not quantizer.codebook.hits[:, 2:5].any()


def test_ema_follows_as_the_written_out_average() -> None:
    quantizer = make(codebook="ema")
    codes, counts = quantizer.codes.double().numpy(), np.ones(V)
    sums = codes.copy()
    for step in range(5):
        f = latents(step)
        found, shown = np.zeros(V), np.zeros((V, WIDTH))
        for vector in vectors_of(quantizer, f):
            nearest = int(((vector - codes) ** 2).sum(1).argmin())
            found[nearest] += 1
            shown[nearest] += vector
        before = quantizer.codes.clone()
        made = quantizer(f)
        expected = make(codebook="ema").eval()  # 先量化，后走：f̂ 用的是走之前的码
        expected.load_state_dict({**quantizer.state_dict(), "codebook.bank.codes": before})
        assert torch.equal(made.f_hat, expected(f).f_hat)
        counts, sums = 0.99 * counts + 0.01 * found, 0.99 * sums + 0.01 * shown
        codes = sums / counts[:, None]
        np.testing.assert_allclose(quantizer.codes.numpy(), codes, rtol=1e-4, atol=1e-6)
    assert [name for name, _ in quantizer.codebook.named_parameters()] == []


@pytest.mark.parametrize("learned", ["gradient", "ema"])
def test_dead_codes_come_back_from_the_data(learned: Any) -> None:
    quantizer = make(codebook=learned, restart=0.2)
    with torch.no_grad():
        quantizer.codes[2:5] = 100.0
        if learned == "ema":
            quantizer.codebook.bank.sums[2:5] = 100.0
        quantizer.codebook.alive.fill_(1.0)
    alive, moved = np.ones(V), []
    for step in range(170):  # 0.99¹⁶⁰ = 0.200
        f = latents(step % 9)
        data = vectors_of(quantizer, f)
        before = quantizer.codes.detach().clone()
        made = quantizer(f)
        quantizer.codebook.revive()  # 平时在下一步之前
        counts = np.bincount(torch.cat([index.flatten() for index in made.indices]), minlength=V)
        alive = 0.99 * alive + 0.01 * V * counts / counts.sum()
        dead = np.flatnonzero(alive < 0.2)
        alive[dead] = 1.0
        for code in dead:
            where = np.abs(data - quantizer.codes[code].detach().double().numpy()).max(1)
            assert where.min() < 1e-6  # 就是这一批里的一个向量
        kept = np.setdiff1d(np.arange(V), dead)
        if learned == "gradient":
            assert torch.equal(quantizer.codes[kept].detach(), before[kept])
        moved += [(step, int(code)) for code in dead]
    np.testing.assert_allclose(quantizer.codebook.alive.numpy(), alive, rtol=1e-3)
    assert {(160, 2), (160, 3), (160, 4)} <= set(moved)
    assert quantizer.codes.abs().max().item() < 10


def test_codes_unused_by_the_first_batch_start_from_the_data() -> None:
    quantizer = make(restart=0.1)
    with torch.no_grad():
        quantizer.codes[2:] = 9.0
    f = latents()
    data = torch.from_numpy(vectors_of(quantizer, f)).float()
    used = torch.cat([index.flatten() for index in quantizer(f).indices]).unique()
    quantizer.codebook.revive()
    rest = [code for code in range(V) if code not in used.tolist()]
    assert {2, 3, 4, 5, 6} <= set(rest)
    assert all((data - quantizer.codes[code]).abs().amax(1).min() < 1e-6 for code in rest)


def test_without_restart_codes_stay_and_no_random_number_is_drawn() -> None:
    quantizer = make()
    before, state = quantizer.codes.detach().clone(), torch.random.get_rng_state()
    for step in range(300):
        quantizer(latents(step % 7, count=1))
    assert torch.equal(quantizer.codes, before) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("learned", ["gradient", "ema"])
def test_a_forward_pass_moves_only_buffers(learned: Any) -> None:
    """引擎丢掉坏的一步时还原 buffer：码要等下一步才换，坏的向量就换不进来。"""
    quantizer, f = make(codebook=learned, restart=0.5), latents()
    quantizer.codebook.alive.fill_(0.0)  # 人人该换
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    f[0, 0, 0, 0] = torch.nan
    quantizer(f)
    for name, parameter in quantizer.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert quantizer.codebook.dead.all()
    quantizer.load_state_dict(before)
    data = torch.from_numpy(vectors_of(quantizer, latents(1))).float()
    quantizer(latents(1))
    quantizer.codebook.revive()
    assert all((data - code).abs().amax(1).min() < 1e-6 for code in quantizer.codes)
    assert not quantizer.codebook.dead.any()


@pytest.mark.parametrize("options", [{"restart": 0.1}, {"codebook": "ema", "restart": 0.1}])
def test_evaluation_leaves_it_alone_and_state_carries_it(options: dict[str, Any]) -> None:
    quantizer = make(**options)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()(latents())
    quantizer.indices(latents())
    quantizer.train().quantize(latents())
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    quantizer(latents())
    other = make(**options)
    other.load_state_dict(quantizer.state_dict())
    for each in (quantizer, other):
        torch.manual_seed(3)
        each(latents(2))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_backward_works_after_the_codes_were_replaced() -> None:
    quantizer = make(restart=0.5)
    quantizer.codebook.alive.fill_(0.0)
    quantizer(latents(1))
    quantizer.codebook.revive()  # 全换掉
    f = latents().requires_grad_()
    made = quantizer(f)
    (made.loss + made.f_hat.square().sum()).backward()
    assert f.grad is not None and quantizer.codes.grad.any()


OPTIONS: list[dict[str, Any]] = [{}, {"restart": 0.9}, {"codebook": "ema"}, {"codebook": "ema", "restart": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_process_never_touches_distributed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("torch.distributed was called")

    for name in ("all_reduce", "broadcast", "get_world_size", "get_rank", "all_gather", "barrier"):
        monkeypatch.setattr(dist, name, refuse)
    quantizer = make(**options)
    for step in range(3):
        quantizer.codebook.revive()
        quantizer(latents(step)).loss.backward()


def one_of_two(rank: int, folder: str) -> None:
    """子进程：两个进程各看一半的帧，再各自评测（评测时各进程的批数不同，不能等别人）。"""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for i, options in enumerate(OPTIONS):
        quantizer = make(**options)
        torch.manual_seed(rank)  # 各进程的随机数不同
        for step in range(3):
            quantizer.codebook.revive()
            quantizer(latents(step)[2 * rank : 2 * rank + 2])
        if rank == 0:
            quantizer.eval()(latents())
        torch.save(quantizer.state_dict(), f"{folder}/{i}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """换码时用零号进程抽的，与一个进程抽的不同，但处处一样；不换时与一个进程的也相同。"""
    spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for i, options in enumerate(OPTIONS):
        quantizer = make(**options)
        for step in range(3):
            quantizer.codebook.revive()
            quantizer(latents(step))
        saved = [torch.load(tmp_path / f"{i}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name, value in quantizer.state_dict().items():
            assert torch.equal(saved[0][name], saved[1][name]), name
            if "restart" not in options:
                torch.testing.assert_close(saved[0][name], value)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_is_the_same(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    one, other = make(**options), make(**options)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for step in range(2):
        found = []
        for each in (one, compiled):
            torch.manual_seed(step)
            found.append(each(latents(step)))
        torch.testing.assert_close(found[1].f_hat, found[0].f_hat)
        torch.testing.assert_close(found[1].loss, found[0].loss)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
