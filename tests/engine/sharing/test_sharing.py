"""卡片与分享的文件夹：里面没有机器的路径，别的工具读得懂，由它预报的逐位相同。"""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import xarray as xr
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from engine.commands import evaluate_command, inference_command
from engine.forecasting.api import load_forecaster
from engine.training.resume import claim_run
from engine.training.start import read_initial
from models import open_first_stage
from tests.engine.runs import ROOT
from util.batch import DataSpec
from util.checkpoint import file_sha256, forecast_weights, load_checkpoint, save_checkpoint
from util.config import RunConfig
from util.files.package import nameless
from util.files.training_checkpoint import load_training

BEFORE = ROOT / "tests/from_before"
ELSEWHERE = "/elsewhere/somebody"
pytestmark = pytest.mark.usefixtures("unrendered")


def run(*words: str | Path) -> None:
    assert inference_command([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """另一台机器上训练的：路径都是那里的。"""
    content = load_checkpoint(BEFORE / "ar_pred.ckpt")
    content["config"]["data"] |= {"root": f"{ELSEWHERE}/era5", "store": f"{ELSEWHERE}/packed/", "cache_dir": ELSEWHERE}
    content["config"]["log"]["dir"] = content["config"]["checkpoint"]["dir"] = ELSEWHERE
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "mine"
    folder.mkdir()  # 空的收得下
    run("--checkpoint", checkpoint, "--package", folder)
    return folder


@pytest.fixture(scope="module")
def history() -> xr.Dataset:
    rng = np.random.default_rng(3)
    dims = ("time", "latitude", "longitude")
    spec = DataSpec.from_dict(load_checkpoint(BEFORE / "ar_pred.ckpt")["spec"])
    times = np.datetime64("2000-01-10T00", "ns") + np.timedelta64(6, "h") * np.arange(-2, 1)
    fields = {
        name: (dims, (mean + std * rng.standard_normal((3, 8, 16))).astype(np.float32), {"units": units})
        for name, mean, std, units in zip(("t2m", "z50"), spec.mean, spec.std, spec.units, strict=True)
    }
    return xr.Dataset(fields, {"time": times, "latitude": list(spec.latitudes), "longitude": list(spec.longitudes)})


def test_the_same_forecast_to_the_bit(checkpoint: Path, package: Path, history: xr.Dataset) -> None:
    wishes = {"steps": 2, "members": 2, "perturb": 0.1}
    here, there = (load_forecaster(path).forecast(history, **wishes) for path in (checkpoint, package))
    xr.testing.assert_equal(there, here)


def test_nothing_of_the_machine_is_in_it(package: Path) -> None:
    assert {path.name for path in package.iterdir()} == {"README.md", "config.json", "model.pt2", "model.safetensors"}
    assert len({path.stat().st_mode for path in package.iterdir()}) == 1
    texts = [path.read_bytes() for path in package.iterdir()]
    with ZipFile(package / "model.pt2") as held:
        texts += [held.read(name) for name in held.namelist()]
    for word in (ELSEWHERE, str(ROOT), str(package.parent), "site-packages"):
        assert not [text for text in texts if word.encode() in text], word
    data = json.loads((package / "config.json").read_text())["config"]["data"]
    assert (data["root"], data["store"]) == ("era5", "packed")


def test_other_tools_read_it(checkpoint: Path, package: Path, history: xr.Dataset) -> None:
    weights, expected = load_file(package / "model.safetensors"), forecast_weights(load_checkpoint(checkpoint))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    card = ModelCard.load(package / "README.md")
    assert card.data.to_dict() == {
        "library_name": "ar_pred",
        "pipeline_tag": "time-series-forecasting",
        "tags": ["weather", "pytorch", "ar_pred_video_vanilla"],
    }
    assert "python inference.py --checkpoint mine --time" in card.text
    made, program = (load_forecaster(path).forecast(history) for path in (package, package / "model.pt2"))
    xr.testing.assert_allclose(program, made, rtol=1e-5)


def test_scores_by_it_stand_on_the_card(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with ZipFile(BEFORE / "stores.zip") as stores:
        stores.extractall()
    words = ["--checkpoint", str(package), "--save", "none", "--steps", "2", "--out", "log/ar_pred/evaluation"]
    assert evaluate_command([*words, "data.store=float32"]) == 0
    capsys.readouterr()
    Path("log/ar_pred/missing.csv").write_bytes(Path("log/ar_pred/evaluation/missing.csv").read_bytes())
    run("--card", "--checkpoint", package)
    card = capsys.readouterr().out
    scores = json.loads(Path("log/ar_pred/evaluation/metrics.json").read_text())["scores"]
    order = ("ar_pred_video_vanilla", "persistence", "climatology")
    cells = [" / ".join(f"{scores[who]['t2m']['rmse'][i]:.4g}" for who in order) for i in (0, 1)]
    assert f"| t2m | K | {cells[0]} | {cells[1]} |" in card
    assert "Files found missing or unreadable in training: t2m 3." in card
    assert "| lowest validation loss | 1.177 | at step 3 |" in card


def test_the_card(checkpoint: Path, tmp_path: Path) -> None:
    run("--card", "--checkpoint", checkpoint, "--out", tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert card.startswith("# ar_pred\n\nA weather model of ar_pred (`ar_pred_video_vanilla`): from 3 frames 6 h apart")
    for said in (
        "| weights | exponential moving average over the steps |",
        "| source | packed |",
        "| train dates | 2000-01-01 to 2000-01-06 |",
        "| z_level_00 | geopotential | m2 s-2 | 50 hPa | 53702 | 2561.08 |",
        "| steps | 4, 8 windows in 0.00 h |",
        "torch 2.13.0+cpu",
        "This checkpoint has not been evaluated",
        "The history is 3 frames every 6 h, none missing.",
        "python inference.py --checkpoint best.ckpt --time 2000-01-10T00 --steps 4 --out OUT data.store=STORE",
    ):
        assert said in card, said
    assert ELSEWHERE not in card
    run("--card", "--checkpoint", BEFORE / "vqvae.ckpt", "--out", tmp_path / "codec.md")
    assert "it encodes and reconstructs fields, and does not forecast" in (tmp_path / "codec.md").read_text()


def test_without_a_program(tmp_path: Path) -> None:
    """阶段一导不出，也能分享，给阶段二用；VAR 导得出的只是它的网络。"""
    for name, exported in (("var", True), ("vqvae", False)):
        run("--checkpoint", BEFORE / f"{name}.ckpt", "--package", tmp_path / name)
        assert (tmp_path / name / "model.pt2").exists() is exported
        assert ("torch.export" in (tmp_path / name / "README.md").read_text()) is exported
    stage = open_first_stage(str(tmp_path / "vqvae"), load_forecaster(tmp_path / "var").spec)
    weights = forecast_weights(load_checkpoint(BEFORE / "vqvae.ckpt"))
    assert all(torch.equal(stage.state_dict()[key], value) for key, value in weights.items())


def test_training_from_it(package: Path) -> None:
    assert read_initial(str(package)).sha256 == file_sha256(package / "model.safetensors")
    with pytest.raises(ValueError, match="a folder; name a checkpoint in it, or train.init="):
        claim_run(RunConfig.model_construct(), "x", str(package), None)  # type: ignore[arg-type]


def test_mistakes_are_one_line(checkpoint: Path, package: Path, tmp_path: Path) -> None:
    def refuse(message: str, *words: str | Path) -> None:
        with pytest.raises(ValueError, match=message):
            run(*words)

    refuse("mine: there already, and not an empty folder", "--checkpoint", checkpoint, "--package", package)
    refuse("--card goes with --checkpoint alone", "--checkpoint", checkpoint, "--card", "--steps", "2")
    refuse("--package a goes with --checkpoint alone", "--program", "a.pt2", "--package", "a")
    refuse("a folder without config.json, so no package; there: best.ckpt", "--checkpoint", checkpoint.parent, "--card")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((package / name).read_bytes()[:-9])
        refuse("damaged package", "--checkpoint", tmp_path, "--card")
        (tmp_path / name).write_bytes((package / name).read_bytes())
    flipped = bytearray((package / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(flipped)
    refuse(r"model\.safetensors: model\..* is damaged, it is not what was saved", "--checkpoint", tmp_path, "--card")
    (tmp_path / "config.json").write_text("{}")
    refuse(r"config\.json: not written by inference\.py --package", "--checkpoint", tmp_path, "--card")


def test_what_is_a_path() -> None:
    machine = {"a": ["/x/y/era5/", "~/era5", r"C:\data\era5", "../era5", "file:///era5"], "units": {"q": "/day"}}
    assert nameless(machine) == {"a": ["era5"] * 5, "units": {"q": "/day"}}
    kept = ["data/era5", "facebook/dinov2-base", "t h w", "checkpoints/a/best.ckpt"]
    assert nameless(kept) == kept


def test_everything_a_checkpoint_says_is_read_back(package: Path, checkpoint: Path) -> None:
    read, held = load_training(package), load_checkpoint(checkpoint)
    assert {key: read[key] for key in ("run", "spec", "progress", "versions")} == {
        key: held[key] for key in ("run", "spec", "progress", "versions")
    }
    assert read["config"]["train"] == held["config"]["train"]
