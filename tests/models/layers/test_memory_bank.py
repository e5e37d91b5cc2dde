"""记忆库：最近的码、直通的梯度、commitment、困惑度、滑动平均，都与写开的循环相比；两个进程等于一个。"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from models.layers.memory_bank import MemoryBank, perplexity

SIZE, DIM = 7, 3


def make(seed: int = 0) -> Any:
    """起步时码挤在原点；铺开才各有各的邻居。"""
    torch.manual_seed(seed)
    bank = MemoryBank(SIZE, DIM)
    bank.codes.normal_()
    bank.sums.copy_(bank.codes)
    return bank


def latents(seed: int = 1, count: int = 4) -> Tensor:
    return torch.randn(count, DIM, 2, 5, generator=torch.Generator().manual_seed(seed))


def rows(latent: Tensor) -> np.ndarray:
    """(N, D, h, w) → (n, D)。"""
    return latent.permute(0, 2, 3, 1).reshape(-1, DIM).double().numpy()


def test_every_vector_becomes_its_nearest_code() -> None:
    bank, latent = make().eval(), latents()
    made, commitment, used = bank(latent)
    codes, vectors = bank.codes.double().numpy(), rows(latent)
    index = [int(np.argmin([((v - c) ** 2).sum() for c in codes])) for v in vectors]
    np.testing.assert_allclose(rows(made), codes[index], atol=1e-6)
    assert float(commitment) == pytest.approx(((vectors - codes[index]) ** 2).mean(), rel=1e-5)
    shares = [index.count(i) / len(index) for i in range(SIZE)]
    assert float(used) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p)), rel=1e-5)


def test_perplexity_counts_the_codes_in_use() -> None:
    assert float(perplexity(torch.tensor([0.0, 1.0, 0.0]))) == 1
    assert float(perplexity(torch.full((8,), 1 / 8))) == pytest.approx(8)


def test_gradient_passes_straight_through_and_commitment_pulls_to_the_code() -> None:
    bank = make().eval()
    latent = latents().requires_grad_()
    made, commitment, _ = bank(latent)
    weight = torch.randn_like(made)
    (straight,) = torch.autograd.grad((made * weight).sum(), latent, retain_graph=True)
    assert torch.equal(straight, weight)
    (pull,) = torch.autograd.grad(commitment, latent)
    torch.testing.assert_close(pull, 2 * (latent - made).detach() / latent.numel(), rtol=1e-4, atol=1e-7)


def test_codes_follow_as_the_written_out_average() -> None:
    bank = make().train()
    codes, counts = bank.codes.double().numpy(), np.ones(SIZE)
    sums = codes.copy()
    for step in range(5):
        latent = latents(step)
        found, shown = np.zeros(SIZE), np.zeros((SIZE, DIM))
        made = np.zeros_like(rows(latent))
        for i, vector in enumerate(rows(latent)):
            nearest = int(np.argmin(((vector - codes) ** 2).sum(1)))
            found[nearest] += 1
            shown[nearest] += vector
            made[i] = codes[nearest]
        np.testing.assert_allclose(rows(bank(latent)[0]), made, atol=1e-5)  # 先量化，后走
        counts, sums = 0.99 * counts + 0.01 * found, 0.99 * sums + 0.01 * shown
        codes = sums / counts[:, None]
        for buffer, expected in ((bank.counts, counts), (bank.sums, sums), (bank.codes, codes)):
            np.testing.assert_allclose(buffer.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_an_unused_code_stays_where_it_is() -> None:
    bank = make().train()
    bank.codes[0] = bank.sums[0] = 50
    with torch.no_grad():
        for step in range(2500):  # 一次训练那么长：计数衰减到 1e-11
            bank(latents(step % 7, count=1))
    torch.testing.assert_close(bank.codes[0], torch.full((DIM,), 50.0), rtol=1e-3, atol=0)
    bank(torch.full((1, DIM, 2, 5), 49.0))
    assert bank.codes[0].allclose(torch.tensor(49.0), rtol=1e-3)  # 又用到了，马上跟过去


def test_evaluation_leaves_it_alone_and_state_carries_it() -> None:
    bank = make()
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    bank.eval()(latents())
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    bank.train()(latents())
    other = MemoryBank(SIZE, DIM)
    other.load_state_dict(bank.state_dict())
    for each in (bank, other.train()):
        each(latents(2))
    assert before.keys() == {"codes", "counts", "sums"} and not list(bank.parameters())
    assert all(torch.equal(a, b) for a, b in zip(bank.buffers(), other.buffers(), strict=True))


def test_half_precision_chooses_the_same_codes() -> None:
    one, other = make().train(), make().train()
    latent = latents().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        made = other(latent)
    assert all(value.dtype == torch.float32 for value in (*made, *other.buffers()))
    for half, whole in zip((*made, *other.buffers()), (*one(latent.float()), *one.buffers()), strict=True):
        assert torch.equal(half, whole)


def one_of_two(rank: int, folder: str) -> None:
    """子进程：两个进程各看一半的帧，再各自评测（评测时各进程的批数不同，不能等别人）。"""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    bank = make().train()
    for step in range(3):
        bank(latents(step)[2 * rank : 2 * rank + 2])
    if rank == 0:
        bank.eval()(latents())
    torch.save(bank.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    spawn(one_of_two, (str(tmp_path),), nprocs=2)
    bank = make().train()
    for step in range(3):
        bank(latents(step))
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in bank.state_dict().items():
            torch.testing.assert_close(saved[name], value)


def test_compiled_is_the_same() -> None:
    one, other = make().train(), make().train()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for step in range(2):
        for whole, made in zip(one(latents(step)), compiled(latents(step)), strict=True):
            torch.testing.assert_close(made, whole)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
