"""阶段一到阶段二：潜变量的统计量在训练之后求得；阶段二的检查点自己就够；随机的冻结参数不许训练。"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.evaluation.evaluate import evaluate_checkpoint
from engine.evaluation.task import Options
from engine.forecasting.forecast import Options as ForecastOptions
from engine.forecasting.forecast import forecast
from engine.loading import load_forecaster
from engine.training import know_latents
from engine.training.preflight import smoke
from engine.training.state import update_average
from models import check_first_stage
from models.interface import can_forecast, is_codec
from tests.engine.codecs import tiny_codec
from tests.engine.codecs.tiny_codec import register
from tests.engine.runs import checkpoint, losses, train_here, write_run
from tests.models.small import make_model, small_batch, small_spec
from util.checkpoint import forecast_weights, load_checkpoint, save_checkpoint
from util.config import load_config
from util.data.dataset import open_data

pytestmark = pytest.mark.usefixtures("unrendered")
CODEC = {"name": "tiny_codec", "scaling": "minmax"}
FORECASTER = {"name": "latent_unet", "base_channels": 8, "depth": 1}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def codec(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")


def train_stage(folder: Path, tree: Any, model: dict[str, Any], run: str, *overrides: str, **options: Any) -> int:
    """一轮；返回退出码。"""
    config = write_run(folder, tree, train={"epochs": 1})
    return train_here(config, f"model={model}", f"run.name={run}", *overrides, **options)


def best(folder: Path, run: str) -> Path:
    return folder / "checkpoints" / run / "best.ckpt"


@pytest.fixture(scope="module")
def stage_one(tree, tmp_path_factory):
    """训练好的阶段一，带 EMA。"""
    folder = tmp_path_factory.mktemp("stage_one")
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        train_stage(folder, tree, CODEC, "codec", "train.ema_decay=0.5")
    return folder


def with_first_stage(path: Path, **options: Any) -> dict[str, Any]:
    return {**FORECASTER, "first_stage": str(path), **options}


def test_latents_are_standardised_over_every_training_frame_once(tree, stage_one):
    content = load_checkpoint(best(stage_one, "codec"))
    model, spec = load_forecaster(content, CPU)
    assert isinstance(model, tiny_codec.Model)
    data = open_data(load_config(write_run(stage_one, tree)).data)
    (hours,) = data.segments["train"]
    assert spec.window == 4 and hours.size == 124
    frames = torch.from_numpy(np.stack([data.windows.reader.frame(int(hour)).fields for hour in hours]))
    with torch.no_grad():
        raw = model.latents.inverse(model.encode(frames)).double().numpy()
    np.testing.assert_allclose(model.latents.mean.flatten(), raw.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.latents.std.flatten(), raw.std((0, 2, 3)), rtol=1e-4)
    made = model.encode(frames).detach()
    assert made.mean().abs() < 1e-4 and abs(made.std() - 1) < 1e-2


def test_weights_and_ema_hold_the_same_statistics_and_the_rest_is_untouched(stage_one):
    found, last = (load_checkpoint(best(stage_one, "codec").with_name(f"{name}.ckpt")) for name in ("best", "last"))
    statistics = {"latents.mean", "latents.std", "latents.known"}
    for name, value in found["model"].items():
        assert torch.equal(value, last["model"][name]) == (name not in statistics)
        assert torch.equal(found["ema"][f"module.{name}"], last["ema"][f"module.{name}"]) == (name not in statistics)
    assert all(torch.equal(found["model"][name], found["ema"][f"module.{name}"]) for name in statistics)
    assert not torch.equal(found["model"]["encoder.weight"], found["ema"]["module.encoder.weight"])  # 是 EMA 的统计量
    assert found["model"]["scaling.low"].tolist() != [-1, -1]
    assert forecast_weights(found)["latents.known"]


def test_interrupted_in_the_latent_pass_resumes_to_the_same(tree, stage_one, tmp_path, monkeypatch):
    def interrupted(model: Any, batches: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        whole(model, batches)

    whole = know_latents.observe
    with monkeypatch.context() as patch:
        patch.setattr("engine.training.know_latents.observe", interrupted)
        assert train_stage(tmp_path, tree, CODEC, "codec", "train.ema_decay=0.5") == 130
    assert not checkpoint(tmp_path, "codec", "best")["model"]["latents.known"]
    with pytest.raises(ValueError, match="its training has not finished, the latents have no statistics"):
        train_stage(tmp_path, tree, with_first_stage(best(tmp_path, "codec")), "early")
    assert train_stage(tmp_path, tree, CODEC, "codec", "train.ema_decay=0.5", resume="auto") == 0
    found, expected = checkpoint(tmp_path, "codec", "best"), load_checkpoint(best(stage_one, "codec"))
    assert all(torch.equal(found["ema"][name], value) for name, value in expected["ema"].items())


def test_statistics_that_are_there_are_not_computed_again(tree, tmp_path, monkeypatch):
    """接着训练而没有更好：best.ckpt 没有换，统计量也不必重来。"""
    worse = itertools.count()
    monkeypatch.setattr("engine.training.loop.validation_loss", lambda *_: float(next(worse)))
    train_stage(tmp_path, tree, CODEC, "codec", "train.epochs=2")
    written = best(tmp_path, "codec").read_bytes()
    monkeypatch.setattr("engine.training.know_latents.observe", lambda *_: pytest.fail("computed again"))
    train_stage(tmp_path, tree, CODEC, "codec", "train.epochs=3", resume="auto")
    assert checkpoint(tmp_path, "codec")["progress"]["epoch"] == 3
    assert best(tmp_path, "codec").read_bytes() == written


@pytest.mark.parametrize(
    ("options", "train"),
    [
        ({}, []),
        ({}, ["train.ema_decay=0.5", "train.schedule={name: cosine, warmup_steps: 5}"]),
        ({"freeze_encoder": True, "freeze_decoder": True}, []),
    ],
    ids=["plain", "ema", "frozen"],
)
def test_pretrained_weights_need_no_gradient_step(tree, stage_one, tmp_path, options, train):
    """train.epochs=0：best.ckpt 里有极值与潜变量的统计量，权重原样；预训练的文件没有了也读得出。"""
    file = tmp_path / "pretrained.pt"
    source = load_checkpoint(best(stage_one, "codec"))
    pretrained = {k: v for k, v in forecast_weights(source).items() if k.startswith(("encoder.", "decoder."))}
    torch.save(pretrained, file)
    model = {**CODEC, "weights": str(file), **options}
    train_stage(tmp_path, tree, model, "codec", "train.epochs=0", "train.preflight=true", *train)
    file.unlink()
    content = load_checkpoint(best(tmp_path, "codec"))
    assert content["model_options"]["weights"] == "random" and content["config"]["model"]["weights"] == str(file)
    found, _ = load_forecaster(content, CPU)
    assert is_codec(found) and found.latents_known
    expected = forecast_weights(source)  # 同样的权重、同样的数据：统计量也相同
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_frozen_random_weights_are_refused(tree, tmp_path):
    frozen = {**CODEC, "freeze_encoder": True}
    with pytest.raises(ValueError, match=r"\d+ parameters of tiny_codec are frozen at their random start"):
        train_stage(tmp_path, tree, frozen, "frozen")
    written = write_codec(tmp_path, tree)
    for source, shown in ((str(written), str(written)), (CODEC, "{...}")):
        with pytest.raises(ValueError, match="random weights, for --smoke and tests only; train the first") as error:
            train_stage(tmp_path, tree, {**FORECASTER, "first_stage": source}, "random")
        assert str(error.value).startswith(f"model.first_stage = {shown}: ")


def write_codec(folder: Path, tree: Any) -> Path:
    """阶段一自己的 YAML。"""
    values = yaml.safe_load(write_run(folder, tree).read_text(encoding="utf-8"))
    path = folder / "codec.yaml"
    path.write_text(yaml.safe_dump({**values, "model": CODEC}), encoding="utf-8")
    return path


def test_preflight_takes_a_random_first_stage(tree, tmp_path):
    source = str(write_codec(tmp_path, tree))
    for model in (CODEC, {**FORECASTER, "first_stage": source}):
        assert smoke(load_config(write_run(tmp_path, tree), [f"model={model}"])) == 0


@pytest.mark.parametrize("fine_tuned", [False, True], ids=["frozen", "fine-tuned"])
def test_a_second_stage_checkpoint_works_alone(tree, stage_one, tmp_path, fine_tuned):
    """阶段一的检查点没有了：评测、预报、续训都照常，来处的 sha256 记着。"""
    source = tmp_path / "codec.ckpt"
    source.write_bytes(best(stage_one, "codec").read_bytes())
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    model = with_first_stage(source, freeze_encoder=not fine_tuned, freeze_decoder=not fine_tuned)
    train_stage(tmp_path, tree, model, "alone", "train.ema_decay=0.5", "train.preflight=true")
    held, given = checkpoint(tmp_path, "alone"), forecast_weights(load_checkpoint(source))
    source.unlink()
    assert held["first_stage"] == {"path": str(source), "sha256": sha256}
    assert held["config"]["model"]["first_stage"] == str(source)
    assert held["model_options"]["first_stage"]["name"] == "tiny_codec"
    for name, value in given.items():
        changed = fine_tuned and name.startswith(("encoder.", "decoder."))
        assert torch.equal(held["model"][f"first_stage.{name}"], value) != changed, name
    path = str(best(tmp_path, "alone"))
    assert evaluate_checkpoint(path, Options(stride=8), tmp_path / "scores") == 0
    assert forecast(path, ForecastOptions(("2000-02-12T00",), steps=2), tmp_path / "forecast") == 0
    assert np.isfinite(np.load(tmp_path / "forecast" / "forecast+012h.npy")).all()
    train_stage(tmp_path, tree, model, "alone", "train.ema_decay=0.5", "train.epochs=2", resume="auto")
    assert len(losses(tmp_path, "alone")) == 2 * 8
    again = checkpoint(tmp_path, "alone")
    assert again["first_stage"] == held["first_stage"] and again["model_options"] == held["model_options"]


def test_resume_equals_uninterrupted(tree, stage_one, tmp_path):
    """第二轮从检查点接着来，阶段一已经没有了；与没有中断的逐位相同。"""
    source = tmp_path / "codec.ckpt"
    source.write_bytes(best(stage_one, "codec").read_bytes())
    model = with_first_stage(source, freeze_decoder=False)
    train_stage(tmp_path, tree, model, "whole", "train.epochs=2")
    train_stage(tmp_path, tree, model, "cut")
    source.unlink()
    train_stage(tmp_path, tree, model, "cut", "train.epochs=2", resume="auto")
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")


def test_an_older_checkpoint_is_built_from_its_config(tmp_path):
    spec = small_spec()
    model = make_model({"name": "persistence"}, spec)
    content = {"config": {"model": {"name": "persistence"}}, "spec": spec.to_dict(), "model": model.state_dict()}
    save_checkpoint(tmp_path / "old.ckpt", {**content, "ema": None})
    found, _ = load_forecaster(load_checkpoint(tmp_path / "old.ckpt"), CPU)
    batch = small_batch(spec)
    assert can_forecast(found)
    assert torch.equal(found.forecast(batch.history, None), model.forecast(batch.history, None))


def test_a_first_stage_of_other_fields_or_another_kind_is_refused(tree, stage_one, tmp_path):
    path = best(stage_one, "codec")
    one = {"data.variables": "{t2m: single}"}
    with pytest.raises(ValueError, match="trained with other channels: "):
        train_stage(tmp_path, tree, with_first_stage(path), "other", *(f"{k}={v}" for k, v in one.items()))
    train_stage(tmp_path, tree, {"name": "persistence"}, "persistence")
    with pytest.raises(ValueError, match="persistence/best.ckpt: not an autoencoder"):
        train_stage(tmp_path, tree, with_first_stage(best(tmp_path, "persistence")), "kind")


def test_a_first_stage_of_another_version_is_one_line(tree, stage_one, tmp_path):
    content = load_checkpoint(best(stage_one, "codec"))
    for weights in (content["model"], content["ema"]):
        for name in [name for name in weights if name.endswith("latents.known")]:
            weights["latents.known".join(name.rsplit("latents.known", 1)) + "_before"] = weights.pop(name)
    save_checkpoint(tmp_path / "old.ckpt", content)
    with pytest.raises(ValueError, match=r"old.ckpt: made by another version, train it again: latents.known is absent"):
        train_stage(tmp_path, tree, with_first_stage(tmp_path / "old.ckpt"), "old")


def test_a_first_stage_of_changes_wants_the_same_interval(tree, stage_one, tmp_path, monkeypatch):
    source = with_first_stage(best(stage_one, "codec"))
    assert train_stage(tmp_path, tree, source, "twelve", "data.interval_hours=12") == 0
    monkeypatch.setattr(tiny_codec.Model, "encodes", "tendency")
    with pytest.raises(ValueError, match=r"encodes changes over 6 h; here a step is 12 h"):
        train_stage(tmp_path, tree, source, "again", "data.interval_hours=12")


def test_a_first_stage_that_is_not_there_is_found_before_the_data(tree, stage_one, tmp_path):
    folder = best(stage_one, "codec").parent
    missing = tmp_path / "vqvae" / "best.ckpt"
    for source, said in (
        (tmp_path / "none.ckpt", "no such file; python train.py --config config/sd_vae_small.yaml run.name=RUN trains"),
        (missing, "no such file; python train.py --config config/vqvae.yaml run.name=vqvae trains one"),
        (tmp_path / "none.yaml", "no such file; wanted: the YAML of a first stage"),
        (folder, f"a folder; give the file {folder / 'best.ckpt'}"),
    ):
        for opening in (check_first_stage, lambda options: make_model(options, small_spec())):
            with pytest.raises(ValueError) as error:  # noqa: PT011  下一行比对
                opening(with_first_stage(source))
            assert str(error.value).startswith(f"model.first_stage = {source}: {said}")
            assert "\n" not in str(error.value)
    for fine in (str(best(stage_one, "codec")), str(write_codec(tmp_path, tree)), CODEC, None):
        check_first_stage({**FORECASTER, "first_stage": fine})
    check_first_stage({"name": "persistence"})


def test_the_last_checkpoint_of_a_finished_run_points_to_the_best(tree, stage_one, tmp_path):
    held = best(stage_one, "codec")
    last = held.with_name("last.ckpt")
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        train_stage(tmp_path, tree, with_first_stage(last), "last")
    assert str(error.value) == (
        f"model.first_stage = {last}: holds no statistics of the latents, which only best.ckpt gets; give {held}"
    )


def test_a_trained_first_stage_writes_its_reconstruction(stage_one):
    folder = stage_one / "log/codec"
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    table = json.loads((folder / "reconstruction/metrics.json").read_text(encoding="utf-8"))
    assert summary["reconstruction"] == table["codecs"]["codec"] and table["split"] == "test"
    assert summary["reconstruction"]["latent_shape"] == [4, 2, 4]
    assert summary["reconstruction"]["compression"] == 4 * 2 * 4 / (2 * 8 * 16)
    assert (folder / "reconstruction/figures/codec.png").is_file() and not (folder / "test").exists()
    assert "reconstruction RMSE, t2m" in (folder / "report.html").read_text(encoding="utf-8")


def test_statistics_are_found_again_after_train_init(tree, stage_one, tmp_path: Path) -> None:
    """阶段一接着学：抄来的统计量已经过时，要重新看一遍，恰是新权重的。"""
    init = f"train.init={best(stage_one, 'codec')}"
    assert train_stage(tmp_path, tree, CODEC, "more", init, "train.lr=0.05") == 0
    old, new = (load_checkpoint(best(folder, run)) for folder, run in ((stage_one, "codec"), (tmp_path, "more")))
    assert not torch.equal(old["model"]["latents.std"], new["model"]["latents.std"])
    model, _ = load_forecaster(new, CPU)
    assert is_codec(model)
    config = load_config(tmp_path / "run.yaml", ())
    data = open_data(config.data)
    hours = np.concatenate(data.segments["train"])
    whole = hours[: hours.size // data.spec.window * data.spec.window].reshape(-1, data.spec.window)[:, 0]
    batch = data.windows.__getitems__(whole.tolist())
    with torch.no_grad():
        latents = model.encode(torch.cat([batch.history, batch.future], 1).flatten(0, 1))
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_train_init_does_not_replace_another_first_stage(tree, stage_one, tmp_path: Path) -> None:
    first = f"model={ {**FORECASTER, 'first_stage': str(best(stage_one, 'codec'))} }"
    assert train_here(write_run(tmp_path, tree, train={"epochs": 1}), first, "run.name=a") == 0
    assert train_stage(tmp_path, tree, CODEC, "other", "run.seed=7") == 0
    second = f"model={ {**FORECASTER, 'first_stage': str(best(tmp_path, 'other'))} }"
    config = write_run(tmp_path, tree, train={"epochs": 0})
    assert train_here(config, second, "run.name=b", f"train.init={best(tmp_path, 'a')}") == 0
    made, other, before = (load_checkpoint(best(tmp_path, run)) for run in ("b", "other", "a"))
    held = forecast_weights(other)
    assert all(torch.equal(made["model"][f"first_stage.{name}"], value) for name, value in held.items())
    own = [name for name in made["model"] if not name.startswith("first_stage.")]
    assert own and all(torch.equal(made["model"][name], before["model"][name]) for name in own)


def test_the_average_copies_integers() -> None:
    """整数的 buffer 平均了会截断（SigLIP 的位置编号）。"""
    model, places = torch.nn.Module(), torch.arange(256)
    model.register_buffer("places", places)
    model.weight = torch.nn.Parameter(torch.zeros(3))
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(4):
        model.weight.data.fill_(step)
        places += 1
        update_average(average, model, ("places",), 0.9978, torch.tensor(True))
    weight = average.module.get_parameter("weight")
    assert torch.equal(average.module.get_buffer("places"), torch.arange(4, 260))
    expected = 0.0
    for step in range(1, 4):
        expected = 0.9978 * expected + (1 - 0.9978) * step
    assert torch.allclose(weight, torch.full((3,), expected))
