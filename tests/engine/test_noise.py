"""有成员的噪声的模型走完全程：crps 训练学得会离散，滚动时重算的成员不变，评测抽得出成员。"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from engine.commands import evaluate_command, inference_command
from engine.imagined import random_batch
from engine.objective import Objective, make_objective, objective_loss
from tests.engine.runs import SMALL_MODEL, train_here, write_run
from tests.models.small import make_model, small_batch, small_spec
from util.batch import Batch, Seeds
from util.scores.metrics import fair_crps
from util.training_config import ObjectiveConfig

CNN: dict[str, Any] = {"name": "cnn", "width": 8}
NOISE = {"noise": {"size": 4}}
SPEC = small_spec(channels=1, frames_in=1)


def objective(**options: Any) -> Objective:
    return make_objective(ObjectiveConfig.model_validate(options), SPEC, None, torch.device("cpu"))


def random_shifts(step: int, count: int) -> Batch:
    """真值是历史的一半，加上每个窗口一个谁也猜不到的数：最好的集合是 N(历史/2, 1)。"""
    batch, generator = small_batch(SPEC, count, seed=step), Generator().manual_seed(step)
    future = batch.history[:, -1:] / 2 + torch.randn(count, 1, 1, 1, 1, generator=generator)
    return batch._replace(future=future, seeds=Seeds(tuple(range(step * count, (step + 1) * count)), (), step))


def trained_forecast(model: Any, wanted: Objective, members: int, test: Batch) -> Tensor:
    """走 60 步，报测试的窗口：(B, M, C, H, W)。"""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        objective_loss(model.train(), random_shifts(step, 16), wanted)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval().forecast(test.history, None, members, Generator().manual_seed(0))[:, :, 0]


def test_crps_training_learns_the_spread() -> None:
    """成绩由 util/scores 算；理论上 MAE 是 √(2/π)，CRPS 是 1/√π。"""
    torch.manual_seed(0)
    test = random_shifts(1000, 64)
    truth = test.future[:, 0]
    single = trained_forecast(make_model(CNN, SPEC), objective(distance="mae"), 1, test)
    members = trained_forecast(make_model({**CNN, **NOISE}, SPEC), objective(distance="crps", members=2), 10, test)
    mae, crps = (single[:, 0] - truth).abs().mean(), fair_crps(members, truth).mean()
    spread = members.var(1).mean().sqrt()
    error = (members.mean(1) - truth).square().mean().sqrt()
    assert 0.95 * math.sqrt(1 / math.pi) < crps < 0.85 * mae
    assert 0.5 < math.sqrt(1.1) * spread / error < 2


@pytest.mark.parametrize("name", ["cnn", "convlstm seq2seq"])
def test_rolled_members_are_recomputed_with_their_own_noise(name: str) -> None:
    """三步的滚动，每步的激活在反向时重算：那时后面各步早已抽过了。"""
    options = CNN if name == "cnn" else {"name": "convlstm", "variant": "seq2seq", "hidden": 4}
    torch.manual_seed(0)
    batch = random_batch(SPEC, 2, 3)._replace(seeds=Seeds((5, 6), (0.0, 0.5), 7))

    def gradients(checkpoint: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = make_model({**options, **NOISE}, SPEC).train()
        wanted = objective(distance="crps", members=3, rollout={"steps": 3, "checkpoint": checkpoint})
        objective_loss(model, batch, wanted)["loss"].backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    kept, recomputed = gradients(False), gradients(True)
    assert any(grad.any() for grad in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.usefixtures("unrendered")
def test_it_trains_evaluates_and_forecasts_with_members(make_tree: Any, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    train = {"epochs": 1, "objective": {"distance": "crps"}, "activation_checkpointing": "blocks", "preflight": True}
    config = write_run(tmp_path, tree, train=train)
    for name, model in (("cnn", CNN), ("ar_pred", SMALL_MODEL)):
        assert train_here(config, f"model={ {**model, **NOISE} }", f"run.name={name}") == 0
        checkpoint, out = str(tmp_path / "checkpoints" / name / "best.ckpt"), tmp_path / f"{name}4"
        members = ["--checkpoint", checkpoint, "--members", "4", "--steps", "2"]
        assert evaluate_command([*members, "--stride", "9", "--save", "none", "--out", str(out)]) == 0
        scores = json.loads((out / "metrics.json").read_text())["scores"]
        found = scores[model["name"]]["t2m"]
        assert len(found["spread_skill"]) == 2 and min(found["spread_skill"]) > 0
    assert inference_command([*members, "--time", "2000-02-15T06", "--out", str(tmp_path / "one")]) == 0
