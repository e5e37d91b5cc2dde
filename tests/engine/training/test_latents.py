"""潜变量的统计量与验证损失：与 NumPy 写开的相同；两个进程各看一份等于一个进程看全部。"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.objective import Objective
from engine.training.validation import validation_loss
from models.layers.frames import frames_of
from models.layers.latents import LatentScaling
from models.layers.losses import field_errors
from tests.engine.codecs import tiny_codec
from tests.engine.runs import checkpoint, run_script, train_here, write_run
from util.batch import Batch, encoded_fields
from util.config import load_config
from util.data.batches import every_frame
from util.data.dataset import open_data
from util.data.tree_files import field_path


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    made = make_tree(tmp_path_factory.mktemp("tree") / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    for back in (6, 20):  # 测试集里的两个场：插值得来，不计
        field_path(made.root, "t2m", made.hours[-back]).unlink()
    return made


@pytest.mark.parametrize(("encodes", "stride"), [("state", 1), ("tendency", 1), ("tendency", 3)])
def test_every_frame_or_every_change_once(tree, tmp_path: Path, encodes: Any, stride: int) -> None:
    """窗口 4 帧：一段 n 帧，每帧一次；编码差时相邻的窗口共用一帧，n − 1 个差每个一次（段首凑不满的不要）。"""
    data = open_data(load_config(write_run(tmp_path, tree)).data)
    (hours,) = data.segments["train"]
    window, every = data.spec.window, data.spec.interval_hours
    starts = [
        start
        for batch in every_frame(data.segments["train"], data.spec.window, 3, stride, encodes == "tendency")
        for start in batch
    ]
    assert window == 4 and starts == sorted(starts)
    apart = window if encodes == "state" else window - 1
    assert set(np.diff(starts)) == {apart * every * stride}
    if stride == 1:
        seen = [start + i * every for start in starts for i in range(apart)]  # 差由它的前一帧代表
        last = hours if encodes == "state" else hours[:-1]
        assert seen == last[len(last) % apart :].tolist()
    assert starts[-1] + (window - 1) * every <= hours[-1]


def parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 + 2 * torch.randn(size, 3, 4, 5, generator=generator) for size in (4, 4, 1)]


def share(rank: int, folder: str) -> None:
    """子进程：各看一份；全归零号，一号一帧也没有；潜变量没有变化。"""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for name, mine in (("halves", parts()[rank::2]), ("all", [] if rank else parts())):
        scaling = LatentScaling((3, 1, 1))
        for part in mine:
            scaling.observe(part)
        scaling.solve()
        torch.save(scaling.state_dict(), f"{folder}/{name}-{rank}.pt")
    dead = LatentScaling((3, 1, 1))
    dead.observe(torch.zeros(1 + rank, 3, 4, 5))
    with pytest.raises(ValueError, match="3 of 3 latent values are the same"):
        dead.solve()
    dist.destroy_process_group()


def test_two_processes_share_the_frames_and_the_error(tmp_path: Path) -> None:
    spawn(share, (str(tmp_path),), nprocs=2)
    whole = torch.cat(parts()).double().numpy()
    for name, rank in product(("halves", "all"), range(2)):
        saved = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        np.testing.assert_allclose(saved["mean"].flatten(), whole.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(saved["std"].flatten(), whole.std((0, 2, 3)), rtol=1e-6)
        assert saved["known"]


def test_a_run_of_two_processes_has_the_statistics_of_one(tree, tmp_path: Path) -> None:
    """同样的随机权重，一步不走：best.ckpt 里只有统计量是看出来的。"""
    architecture = {"block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2}
    model = {"name": "sd_vae", "weights": "random", "architecture": architecture}
    config = write_run(tmp_path, tree, train={"epochs": 0})
    written = f"model={model}"
    train_here(config, written, "run.name=one")
    two = ("run.name=two", "run.devices=2", "run.strategy=ddp")
    done = run_script("train.py", "--config", str(config), written, *two)
    assert done.returncode == 0, done.stderr
    one, other = (checkpoint(tmp_path, name, "best")["model"] for name in ("one", "two"))
    assert other["latents.known"]
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7)


class Shrinks(tiny_codec.Model):
    """重建是场的一半；损失照 sd_vae、rae，对有效的场取平均。"""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        fields = frames_of(batch)
        return {"loss": field_errors(fields / 2, fields, batch.valid.flatten(0, 1))[0]}


def test_the_validation_loss_of_a_codec_is_the_mean_over_all_valid_fields(tree, tmp_path: Path) -> None:
    """窗口 3 + 1 帧，每批 4 个：按目标加权就不是全部有效场的平均。"""
    config = load_config(write_run(tmp_path, tree, data={"max_missing": 1.0}))
    data = open_data(config.data)
    model: Any = Shrinks(tiny_codec.Config(), data.spec)
    found = validation_loss(
        model, Objective(), data, "test", config, Fabric(accelerator="cpu", devices=1), lambda: None
    )
    (hours,) = data.segments["test"]
    total, number = 0.0, 0
    for start in hours[: hours.size - data.spec.window + 1].tolist():
        batch = data.windows[int(start)]
        fields, valid = frames_of(batch).double().numpy(), batch.valid.flatten(0, 1).numpy()
        total += np.abs(fields / 2).mean((2, 3))[valid].sum()
        number += int(valid.sum())
    assert number < (hours.size - 3) * 8
    assert found == pytest.approx(total / number, rel=1e-6)


class ShrinksChanges(Shrinks):
    """同上，看的是相邻两帧之差。"""

    encodes = "tendency"

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        changes, valid = encoded_fields(batch, "tendency")
        return {"loss": field_errors(changes / 2, changes, valid)[0]}


def test_the_validation_loss_of_changes_is_the_mean_over_all_valid_changes(tree, tmp_path: Path) -> None:
    """两帧都有效的差才数：按有效的帧加权就不是全部有效的差的平均。"""
    config = load_config(write_run(tmp_path, tree, data={"max_missing": 1.0}))
    data = open_data(config.data)
    model: Any = ShrinksChanges(tiny_codec.Config(), data.spec)
    found = validation_loss(
        model, Objective(), data, "test", config, Fabric(accelerator="cpu", devices=1), lambda: None
    )
    total, number = 0.0, 0
    (hours,) = data.segments["test"]
    for start in hours[: hours.size - data.spec.window + 1].tolist():
        batch = data.windows[int(start)]
        window, valid = torch.cat([batch.history, batch.future], 1)[0].double().numpy(), batch.valid[0].numpy()
        for n, c in np.ndindex(data.spec.window - 1, 2):
            if valid[n, c] and valid[n + 1, c]:
                total += np.abs(window[n + 1, c] - window[n, c]).mean() / 2
                number += 1
    assert number < (hours.size - 3) * 6
    assert found == pytest.approx(total / number, rel=1e-6)
