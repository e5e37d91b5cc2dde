"""内在维数：已知的流形、写开的循环、从检查点到打印的整条命令。"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.studies.intrinsic_dimension import advise_size, advise_width, intrinsic_dimension, main, measure
from tests.engine.runs import train_here, write_run
from tests.models.small import make_model
from util.checkpoint import load_checkpoint, save_checkpoint

PASTNET = {
    "name": "pastnet", "task": "reconstruct", "width": 8, "res_units": 4, "res_layers": 1,
    "latent_dim": 8, "codebook_size": 16,
}  # fmt: skip


def embedded(points: torch.Tensor, features: int) -> torch.Tensor:
    """等距地放进更高维的空间，再平移。"""
    return points @ torch.linalg.qr(torch.randn(features, points.shape[1])).Q.T + 7


@pytest.mark.parametrize("dimension", [1, 2, 4, 8])
def test_a_gaussian_has_the_dimension_it_was_drawn_in(dimension: int) -> None:
    torch.manual_seed(0)
    points = embedded(torch.randn(1500, dimension), 30)
    assert intrinsic_dimension(points, 20) == pytest.approx(dimension, rel=0.08)


def test_a_circle_is_a_line() -> None:
    torch.manual_seed(0)
    angle = 2 * math.pi * torch.rand(1500)
    assert intrinsic_dimension(embedded(torch.stack([angle.cos(), angle.sin()], 1), 12), 20) == pytest.approx(
        1, rel=0.05
    )


def test_it_equals_the_written_out_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.studies.intrinsic_dimension.ROWS", 7)  # 分块不改变结果
    points = np.random.default_rng(0).normal(size=(40, 3))
    inverse = []
    for i, point in enumerate(points):
        distances = sorted(float(np.sqrt(((point - other) ** 2).sum())) for j, other in enumerate(points) if j != i)
        inverse.append(sum(math.log(distances[4] / distances[j]) for j in range(4)) / 4)
    assert intrinsic_dimension(torch.from_numpy(points), 5) == pytest.approx(1 / np.mean(inverse), rel=1e-9)


def test_duplicates_count_once_and_too_few_points_are_refused() -> None:
    torch.manual_seed(0)
    points = torch.randn(60, 3)
    assert intrinsic_dimension(points.repeat(2, 1), 5) == pytest.approx(intrinsic_dimension(points, 5), rel=1e-9)
    with pytest.raises(ValueError, match="1 different latents, 5 neighbours of each need more"):
        intrinsic_dimension(torch.ones(60, 3), 5)
    with pytest.raises(ValueError, match="too close together"):
        intrinsic_dimension(torch.eye(6), 5)  # 两两一样远


@pytest.mark.parametrize(
    ("estimate", "latent_dim", "sentence"),
    [
        (17.3, 24, "the latents fill model.latent_dim = 24: 32 may keep more"),
        (17.3, 64, "model.latent_dim = 64 has room to spare: 24 would do"),
        (2.0, 8, "the latents fill model.latent_dim = 8: 16 may keep more"),
        (16.0, 24, "model.latent_dim = 24 has room to spare: 16 would do"),
    ],
)
def test_advice_on_the_width(estimate: float, latent_dim: int, sentence: str) -> None:
    assert advise_width(estimate, latent_dim, 8) == sentence


@pytest.mark.parametrize(("used", "sentence"), [(17.3, "36 would do"), (33.0, "128 may keep more")])
def test_advice_on_the_size(used: float, sentence: str) -> None:
    assert advise_size(used, 64) == f"codes in use (perplexity) {used:.1f} of model.codebook_size = 64: {sentence}"


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")


def test_points_are_the_latents_of_evenly_spaced_training_windows(tree, tmp_path: Path) -> None:
    from util.config import load_config
    from util.data.batches import all_starts
    from util.data.dataset import open_data

    data = open_data(load_config(write_run(tmp_path, tree)).data)
    model = make_model(PASTNET, data.spec).eval()
    found = measure(model, data, 5, 3, batch_size=2, device=torch.device("cpu"))
    starts = all_starts(data.segments["train"], data.spec.window)
    chosen = [int(starts[round(i * (len(starts) - 1) / 4)]) for i in range(5)]
    with torch.no_grad():
        points = torch.cat([model.latents(data.windows[start].history[:, -1:], None) for start in chosen])
        made = model.memory(model.encoder(torch.cat([data.windows[start].history[:, -1] for start in chosen])))
    assert (found.points, found.features) == (5 * 2 * 4, 8)
    assert found.perplexity == pytest.approx(float(made[2]))
    assert found.dimension == pytest.approx(intrinsic_dimension(points, 3), rel=1e-6)
    halves = intrinsic_dimension(points[:16], 3), intrinsic_dimension(points[16:], 3)  # 前两个窗口，后三个
    assert found.halves == pytest.approx(halves, rel=1e-6)
    with pytest.raises(ValueError, match=r"--windows 999: data.splits.train has 121"):
        measure(model, data, 999, 3, batch_size=2, device=torch.device("cpu"))


def test_the_command_on_a_checkpoint(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path, tree, train={"epochs": 1})
    train_here(config, f"model={PASTNET}", "run.name=memory")
    path = str(tmp_path / "checkpoints/memory/best.ckpt")
    assert main(["--checkpoint", path, "--windows", "6", "--neighbours", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "48 latents of 8 numbers, 6 frames, 4 neighbours"
    assert lines[1].startswith("intrinsic dimension ") and "(halves of the windows: " in lines[1]
    assert lines[2].startswith("the latents fill model.latent_dim = 8")
    assert lines[3].startswith("codes in use (perplexity) ") and " of model.codebook_size = 16: " in lines[3]
    content = load_checkpoint(path)
    content["config"]["model"] = content["model_options"] = {"name": "persistence"}
    save_checkpoint(tmp_path / "other.ckpt", {**content, "model": {}})
    with pytest.raises(ValueError, match="persistence has no latents to measure; pastnet has"):
        main(["--checkpoint", str(tmp_path / "other.ckpt")])
    with pytest.raises(ValueError, match="--neighbours 1: must be at least 2"):
        main(["--checkpoint", path, "--neighbours", "1"])
