"""重建的成绩：与 NumPy 写开的比较；只算有效的场；命令的表、图与报错。"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.codecs.reconstruct import main, unique_names
from engine.codecs.scores import score_codecs
from engine.codecs.table import Reconstruction, reconstruction_text
from tests.engine.codecs.tiny_codec import register
from tests.engine.runs import train_here, write_run
from tests.models.small import make_model
from tests.util.scores.test_metrics import ssim_loop
from util.config import load_config
from util.data.batches import every_frame
from util.data.dataset import WeatherData, open_data
from util.data.tree_files import field_path
from util.files.records import as_json
from util.grid import latitude_weights

CODEC = {"name": "tiny_codec", "scaling": "minmax"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def codec(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    made = make_tree(tmp_path_factory.mktemp("tree") / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    field_path(made.root, "t2m", made.hours[-6]).unlink()  # 测试集里的一个场：插值得来，不计
    return made


class Rounded:
    """取整：误差有大有小的「自编码器」。"""

    encodes = "state"
    latent_shape = (2, 4, 4)

    def encode(self, fields: torch.Tensor) -> torch.Tensor:
        return fields.round()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def scored(codecs: dict[str, Any], data: WeatherData, split: str, stride: int, size: int) -> Reconstruction:
    return score_codecs(codecs, dict.fromkeys(codecs, "here"), data, split, stride, size, CPU)


def test_scores_are_those_of_numpy_over_the_valid_frames(tree, tmp_path):
    """全部帧逐个读出来比：权重、平均、相关都写开；SSIM 用 test_metrics 的循环。"""
    data = open_data(config_of(tmp_path, tree).data)
    table = scored({"rounded": Rounded()}, data, "test", 1, 3)
    (hours,) = data.segments["test"]
    frames = [data.windows.reader.frame(int(hour)) for hour in hours]
    weights = latitude_weights(data.spec.latitudes).numpy()[:, None] * np.ones((8, 16))
    assert table.fields == {"t2m": hours.size - 2, "u10": hours.size}  # 插值的，与它沿用的前一个
    for i, channel in enumerate(data.spec.channels):
        used = [n for n in range(hours.size) if channel == "u10" or hours.size - n not in (6, 7)]
        truth = np.stack([frames[n].fields[i] for n in used]).astype(np.float64)
        made, weight = np.round(truth), np.broadcast_to(weights, truth.shape)
        centred = [f - np.average(f, weights=weight) for f in (made, truth)]
        covariance = np.average(centred[0] * centred[1], weights=weight)
        variances = [np.average(f**2, weights=weight) for f in centred]
        expected = {
            "rmse": np.sqrt(np.average((made - truth) ** 2, weights=weight)) * data.spec.std[i],
            "mae": np.average(np.abs(made - truth), weights=weight) * data.spec.std[i],
            "correlation": covariance / np.sqrt(variances[0] * variances[1]),
            "ssim": np.mean([ssim_loop(m / 6 + 0.5, t / 6 + 0.5, (7, 7)) for m, t in zip(made, truth, strict=True)]),
            "psnr": 10 * np.log10(36 / np.mean((made - truth) ** 2)),
        }
        assert asdict(table.codecs["rounded"].scores[channel]) == pytest.approx(expected, rel=1e-5)
    assert table.codecs["rounded"].compression == 2 * 4 * 4 / (2 * 8 * 16)


def test_codecs_of_changes_are_scored_on_the_valid_changes(tree, tmp_path):
    """相邻两帧之差，逐个写开；与编码场的不放在一张表里。"""
    changes = Rounded()
    changes.encodes = "tendency"
    data = open_data(config_of(tmp_path, tree).data)
    table = scored({"changes": changes}, data, "test", 1, 3)
    errors: dict[str, list[float]] = {"t2m": [], "u10": []}
    weights = latitude_weights(data.spec.latitudes).numpy()[:, None] * np.ones((8, 16))
    for start in (
        start for starts in every_frame(data.segments["test"], data.spec.window, 1, changes=True) for start in starts
    ):
        window = data.windows[start]
        fields, valid = torch.cat([window.history, window.future], 1)[0].double().numpy(), window.valid[0]
        for n, i in np.ndindex(data.spec.window - 1, 2):
            if valid[n, i] and valid[n + 1, i]:
                truth = fields[n + 1, i] - fields[n, i]
                errors[data.spec.channels[i]].append(float(np.average((np.round(truth) - truth) ** 2, weights=weights)))
    (hours,) = data.segments["test"]
    assert len(errors["u10"]) == hours.size - 1 > len(errors["t2m"])  # 缺一个场，前后的差不计
    assert table.encodes == "tendency" and table.fields == {c: len(found) for c, found in errors.items()}
    for i, channel in enumerate(data.spec.channels):
        expected = np.sqrt(np.mean(errors[channel])) * data.spec.std[i]
        assert table.codecs["changes"].scores[channel].rmse == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"do not encode the same \(one: tendency, two: state\)"):
        scored({"one": changes, "two": Rounded()}, data, "test", 1, 3)


def test_tokens_are_counted_and_scored_scale_by_scale(tree, tmp_path):
    """码的用量、困惑度数全部帧的编号；逐尺度的误差逐帧写开，末一个就是整个重建的。"""
    data = open_data(config_of(tmp_path, tree).data)
    torch.manual_seed(0)
    options = {"width": 8, "groups": 4, "multipliers": [1, 2], "blocks": 1, "latent_dim": 4, "vocabulary": 32}
    model = make_model({"name": "vqvae", **options, "scales": 4}, data.spec).eval()
    torch.nn.init.normal_(model.quantizer.codes, std=0.3)
    table = scored({"vq": model}, data, "test", 1, 3)
    found = table.codecs["vq"].tokens
    assert found is not None
    windows = [
        data.windows[start] for starts in every_frame(data.segments["test"], data.spec.window, 1) for start in starts
    ]
    used: list[int] = []
    squares: dict[int, list[float]] = {scale: [] for scale in range(4)}
    weights = latitude_weights(data.spec.latitudes).numpy()[:, None] * np.ones((8, 16))
    with torch.no_grad():
        for truth in torch.cat([frame for one in windows for frame in (one.history, one.future)], 1)[0].split(1):
            tokens = model.encode_tokens(truth)
            used += torch.cat(tokens, 1).flatten().tolist()
            for scale in squares:
                error = (model.decode_tokens(tokens[: scale + 1]) - truth)[0, 1].double().numpy()
                squares[scale].append(float(np.average(error**2, weights=weights)))
    shares = np.bincount(used) / len(used)
    shares = shares[shares > 0]
    assert 0.1 < found.used == len(shares) / 32 < 1
    assert found.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert (found.tokens, found.bits) == (1 + 2 + 8 + 32, 43 * 5)
    assert found.scales == [(1, 1), (1, 2), (2, 4), (4, 8)]
    expected = [np.sqrt(np.mean(values)) * data.spec.std[1] for values in squares.values()]
    assert found.rmse_by_scale["u10"] == pytest.approx(expected, rel=1e-4)
    for channel, scores in table.codecs["vq"].scores.items():
        assert found.rmse_by_scale[channel][-1] == pytest.approx(scores.rmse, rel=1e-4)
    *_, first, header, _, _ = reconstruction_text(table).splitlines()
    assert first.startswith("vq: 43 tokens (215 bits), ") and header.split()[-2:] == ["2x4", "4x8"]
    rounded = scored({"rounded": Rounded()}, data, "test", 4, 3).codecs["rounded"]
    assert "tokens" not in as_json(rounded)


def config_of(folder: Path, tree: Any) -> Any:
    return load_config(write_run(folder, tree, data={"max_missing": 1.0}))


def test_stride_takes_every_nth_window(tree, tmp_path):
    data = open_data(config_of(tmp_path, tree).data)
    table = scored({"rounded": Rounded()}, data, "test", 4, 3)
    assert table.fields["u10"] == 3 * 4  # 40 帧是 10 个首尾相接的窗口，取第 0、4、8 个


def test_a_perfect_codec_has_no_error_and_a_broken_one_is_named(tree, tmp_path, monkeypatch):
    data = open_data(config_of(tmp_path, tree).data)
    monkeypatch.setattr(Rounded, "encode", lambda _, fields: fields)
    found = scored({"same": Rounded()}, data, "val", 1, 3).codecs["same"].scores["u10"]
    assert (found.rmse, found.mae, found.psnr) == (0, 0, None)  # 无穷大的 PSNR 写 null
    assert found.correlation == pytest.approx(1) and found.ssim == pytest.approx(1)
    monkeypatch.setattr(Rounded, "decode", lambda _, latents: latents / 0)
    with pytest.raises(ValueError, match="broken: the reconstruction holds non-finite values"):
        scored({"broken": Rounded()}, data, "val", 1, 3)


def write_codec(folder: Path, tree: Any, name: str, **options: Any) -> Path:
    values = yaml.safe_load(write_run(folder, tree, data={"max_missing": 1.0}).read_text(encoding="utf-8"))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, "model": {**CODEC, **options}}), encoding="utf-8")
    return path


def test_the_command_compares_a_trained_and_a_pretrained_codec(tree, tmp_path, capsys):
    torch.manual_seed(1)
    spec = open_data(config_of(tmp_path, tree).data).spec
    torch.save(make_model(CODEC, spec).state_dict(), tmp_path / "pretrained.pt")
    trained = write_codec(tmp_path, tree, "trained")
    given = write_codec(tmp_path, tree, "given", weights=str(tmp_path / "pretrained.pt"))
    train_here(trained, "run.name=mine", "train.epochs=1")
    best = tmp_path / "checkpoints/mine/best.ckpt"
    out = tmp_path / "compared"
    assert main(["--checkpoint", str(best), "--config", str(given), "--out", str(out), "data.frames_in=1"]) == 0
    table = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert list(table["codecs"]) == ["mine", "given"]
    assert [table["codecs"][name]["source"] for name in table["codecs"]] == [str(best), str(given)]
    finished = json.loads((tmp_path / "log/mine/reconstruction/metrics.json").read_text(encoding="utf-8"))
    assert finished["codecs"]["mine"] == table["codecs"]["mine"]  # 训练末了写的与命令写的相同
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["channel"], r["codec"]) for r in rows] == [(c, n) for c in ("t2m", "u10") for n in ("mine", "given")]
    for row in rows:
        scores = table["codecs"][row["codec"]]["scores"][row["channel"]]
        assert {metric: float(row[metric]) for metric in scores} == scores
        assert row["unit"] == table["units"][row["channel"]]
    text = capsys.readouterr().err
    assert "latitude-weighted" in text and "4 x 2 x 4" in text and "0.125 of the field" in text
    for name in ("mine", "given"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
    twice = [str(best), str(best.with_name("last.ckpt"))]
    main(["--checkpoint", twice[0], "--checkpoint", twice[1], "--stride", "5", "--out", str(out)])
    assert list(json.loads((out / "metrics.json").read_text(encoding="utf-8"))["codecs"]) == ["mine-best", "mine-last"]


def test_mistakes_are_one_line(tree, tmp_path):
    random = str(write_codec(tmp_path, tree, "random"))
    other = str(write_run(tmp_path, tree, data={"max_missing": 1.0}))
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        ([], "give --checkpoint checkpoints/RUN/best.ckpt or --config YAML"),
        (["--config", random, "--stride", "0"], "--stride 0: must be at least 1"),
        (["--config", random], "random.yaml: not all of its weights are trained; train it and give --checkpoint"),
        (["--config", other], "run.yaml: ar_pred_video_vanilla is not an autoencoder; sd_vae, rae and vqvae are"),
        (["--config", random, "model.widht=3"], "unknown key model.widht = 3; nearest: model.width"),
        (["--checkpoint", "none.ckpt", "data.root=x"], "no checkpoint none.ckpt"),
        (["--checkpoint", str(tmp_path / "none.ckpt")], "no checkpoint"),
        (["--config", random, "--out", random], f"{random} is a file; give a folder"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  下一行比对
            main([*out, *arguments])
        assert message in str(error.value) and "\n" not in str(error.value)


def test_codecs_of_other_data_are_refused(tree, make_tree, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train_here(write_codec(one, tree, "codec"), "run.name=one", "train.epochs=0")
    train_here(write_codec(two, tree, "codec"), "run.name=two", "train.epochs=0", "data.variables={t2m: single}")
    paths = [str(folder / f"checkpoints/{folder.name}/best.ckpt") for folder in (one, two)]
    with pytest.raises(ValueError, match=r"two/best.ckpt was trained with channels = \['t2m'\], the data set has"):
        main(["--checkpoint", paths[0], "--checkpoint", paths[1], "--out", str(tmp_path / "out")])


def test_equal_names_are_numbered() -> None:
    """不同文件夹里同名的运行、同名的 YAML；编出来的名字已经有人用时接着数。"""
    opened = [("run", "a/best.ckpt"), ("run", "b/best.ckpt"), ("run", "b/last.ckpt"), ("one", "x.ckpt")]
    assert unique_names(opened) == ["run-best", "run-best-2", "run-last", "one"]
    taken = [("a", "x/a.yaml"), ("a", "y/a.yaml"), ("a-a-2", "b.yaml")]
    assert unique_names(taken) == ["a-a", "a-a-2", "a-a-2-2"]
