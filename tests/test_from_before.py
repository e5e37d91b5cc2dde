"""从前的文件照样能用：检查点、存档、缓存是 91b66f4 的代码写的，在 tests/from_before/，只有数据。

做法（当时的代码，一个线程的 CPU，在一个临时文件夹里，所以配置里全是相对的路径）：
* 存档 stores.zip（测试里解开）：tests.conftest 的小树（t2m、z_level_00，8 × 16，十二天，seed 0），弄坏三个 t2m 的文件，
  用 tests.stores.pack_small 打包，每块 20 行，float32 与 bfloat16 各一份。
* 检查点：engine.train 用 float32 的那份训练，批 2、lr 1e-3。ar_pred 是 last.ckpt，两轮、EMA、dropout，
  在第二轮的第一步之后被 SIGINT 停下；以后的损失是接着训练到三轮的（当时与没有中断的逐位相同）。
  其余是 best.ckpt，去掉了优化器的状态（只为小）；latent_unet 的阶段一是 sd_vae，var 的就是这里的 vqvae。
* 缓存：write_tree 写的树，场换成正态随机数，open_data 与 fit_baselines 留下的两个文件。
* 损失里的随机数后来改属窗口与全局批（engine/seeds.py）：ar_pred 接着训练的损失、latent_diffusion 的损失是那时重录的。
* expected.npz：存档测试段的两个窗口，各模型由它们给出的数，存档全部窗口的 sha256。
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric

from engine.evaluation.baselines import fit_baselines
from engine.loading import load_forecaster
from engine.training.loop import train
from util.batch import Batch
from util.calendar import parse_time
from util.checkpoint import load_checkpoint
from util.config import DataConfig, RunConfig, load_config
from util.data.batches import all_starts
from util.data.dataset import WeatherData, open_data
from util.data.index import scan
from util.data.store_origin import Store
from util.files.zarr_metadata import chunk_name
from util.logger import read_metrics
from util.training_config import TrainConfig

HERE = Path(__file__).resolve().parent / "from_before"
CPU = torch.device("cpu")
STOPPED_AT = 4  # ar_pred.ckpt 是第几步之后的

TREE_TIME = 10**18  # 纳秒；树里的文件与文件夹都是这时写的，缓存的键里有它
TREE_CHANNELS = {"t2m": "t2m_npy", "z_level_00": "z_npy/level_00"}
TREE_HOURS = range(0, 12 * 24, 6)
TREE_TIMES = 10_000 * 24 + 6 * (torch.arange(4)[:, None] + torch.arange(4))  # 四个窗口，末一帧各在一个钟点
UNUSED = 7 * 24  # 验证段里的一个时刻：气候态的指纹不看它


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(HERE / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def batch(expected: dict[str, np.ndarray]) -> Batch:
    return Batch(
        history=torch.from_numpy(expected["history"]),
        future=torch.from_numpy(expected["future"]),
        time=torch.from_numpy(expected["time"]),
        valid=torch.from_numpy(expected["valid"]),
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """解开了的两个存档：float32 与 bfloat16。"""
    folder = tmp_path_factory.mktemp("stores")
    shutil.unpack_archive(HERE / "stores.zip", folder)
    return folder


def load(name: str) -> Any:
    return load_forecaster(load_checkpoint(HERE / f"{name}.ckpt"), CPU)[0]


def assert_close(made: Any, wanted: np.ndarray) -> None:
    """别的处理器舍入得不一样，所以不是逐位。"""
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ar_pred", "latent_unet", "pixel_unet", "linear_regression"])
def test_a_checkpoint_gives_the_same_forecast(name: str, expected: dict[str, np.ndarray], batch: Batch) -> None:
    with torch.no_grad():
        made = load(name).forecast(batch.history, batch.time)
    assert_close(made, expected[f"{name}.forecast"])


@pytest.mark.parametrize("name", ["var", "latent_diffusion"])
def test_a_generative_checkpoint_gives_the_same_loss(name: str, expected: dict[str, np.ndarray], batch: Batch) -> None:
    """只比损失：集合成员的种子怎样来，可以再改。"""
    model = load(name)
    torch.manual_seed(5)
    with torch.no_grad():
        made = model.loss(batch)["loss"]
    assert_close(made, expected[f"{name}.loss"])


def test_a_codec_checkpoint_gives_the_same_tokens_and_fields(expected: dict[str, np.ndarray], batch: Batch) -> None:
    codec = load("vqvae")
    with torch.no_grad():
        tokens = codec.encode_tokens(batch.history.flatten(0, 1))
        made = codec.decode_tokens(tokens)
    np.testing.assert_array_equal(torch.cat(tokens, 1), expected["vqvae.tokens"])
    assert_close(made, expected["vqvae.decoded"])


def test_a_checkpoint_resumes_to_the_same_losses(stores: Path, tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    """优化器、EMA、随机状态、窗口的次序都接得上；配置是检查点里的那一份，一轮中间停下的。"""
    checkpoint = tmp_path / "checkpoints" / "ar_pred" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    for path in (checkpoint, checkpoint.with_name("best.ckpt")):
        shutil.copyfile(HERE / "ar_pred.ckpt", path)
    content = load_checkpoint(checkpoint)
    assert content["progress"]["step"] == STOPPED_AT and content["progress"]["batches"] == 1
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content["config"]), encoding="utf-8")
    moved = {
        "data.store": stores / "float32",
        "data.cache_dir": tmp_path / "cache",
        "checkpoint.dir": tmp_path / "checkpoints",
        "log.dir": tmp_path / "log",
        "train.epochs": 3,
    }
    overrides = [f"{key}={value}" for key, value in moved.items()]
    assert train(load_config(config, overrides), str(config), str(checkpoint)) == 0
    rows = read_metrics(tmp_path / "log" / "ar_pred" / "metrics.csv")
    steps = [row.step for row in rows if (row.split, row.name) == ("train", "loss")]
    assert steps == list(range(STOPPED_AT + 1, STOPPED_AT + 1 + expected["ar_pred.losses"].size))
    # epoch_loss 里还有停下之前的那一步，验证用的是 EMA
    for key, which in {
        "losses": ("train", "loss"),
        "epoch_losses": ("train", "epoch_loss"),
        "validation": ("val", "loss"),
    }.items():
        made = [row.value for row in rows if (row.split, row.name) == which]
        assert_close(made, expected[f"ar_pred.{key}"])
    assert load_checkpoint(checkpoint)["progress"]["step"] == steps[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_reads_bit_for_bit(dtype: str, stores: Path, expected: dict[str, np.ndarray]) -> None:
    data = load_checkpoint(HERE / "ar_pred.ckpt")["config"]["data"]
    opened = open_data(DataConfig(**{**data, "store": str(stores / dtype)}))
    assert digest(opened) == str(expected[f"{dtype}.sha256"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [9.96921e36, -9999.0])
def test_fills_in_a_store_are_found_on_reading(dtype: str, value: float, stores: Path, tmp_path: Path) -> None:
    """那时还不认填充值：只在测试段里的，统计量看不出，读到就停，说怎样办。"""
    shutil.copytree(stores / dtype, tmp_path / "store")
    data = load_checkpoint(HERE / "ar_pred.ckpt")["config"]["data"]
    config = DataConfig(**{**data, "store": str(tmp_path / "store"), "verify": "never"})
    store = Store(config)
    plan, row = store.plan, store.hours.tolist().index(parse_time("2000-01-11"))
    field = torch.full((8, 16), value).sub(plan.mean[0]).div(plan.std[0]).to(store.dtype)
    with (tmp_path / "store/fields" / chunk_name(row // plan.chunk_rows, 4)).open("r+b") as file:
        file.seek(row % plan.chunk_rows * len(plan.channels) * field.nbytes)
        file.write(field.view(torch.uint8).numpy().tobytes())
    with pytest.raises(ValueError, match=r"t2m at .*: 128 of 128 values are .* run the command that wrote"):
        digest(open_data(config))


def digest(data: WeatherData) -> str:
    """全部窗口的每一位：场、时刻、有效与否；有几个窗口用到插值。"""
    found = hashlib.sha256()
    for split in ("train", "val", "test"):
        starts = all_starts(data.segments[split], data.spec.window)
        for part in data.windows.__getitems__(starts.tolist()).tensors:
            found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_the_index_is_hit_and_the_climatology_is_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, np.ndarray]
) -> None:
    """索引的缓存仍然认得：树里少一个文件而键看不出来，索引说它在，就是从缓存来的。

    气候态的缓存从前只抽查每个通道二百个文件，改坏了的、修好了的可能看不出，所以如今的键里有用到的每个文件：
    从前的那一份不再拿来用，也不去动它；由同样的数重新拟合，差在舍入之内。
    """
    monkeypatch.chdir(tmp_path)  # 气候态的指纹里有 data.root，相对的才到处一样
    rng = np.random.default_rng(0)  # 当时的数
    write_tree(Path("tree"), lambda: rng.standard_normal((4, 8), dtype=np.float32), {UNUSED})
    cache = Path("cache")
    cache.mkdir()
    # 索引的键里是绝对的路径，所以这里照当时的规矩算
    key = [str(tmp_path.resolve() / "tree"), list(TREE_CHANNELS), [2000], [TREE_TIME] * len(TREE_CHANNELS)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    shutil.copyfile(HERE / "index.npz", cache / f"index-{name}.npz")
    (climatology,) = HERE.glob("climatology-*.ckpt")
    shutil.copyfile(climatology, cache / climatology.name)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    config = tree_config()
    assert scan(config, list(TREE_CHANNELS), [2000]).present[:, list(TREE_HOURS)].all()
    run = RunConfig(data=config, model={"name": "persistence"}, train=TrainConfig(epochs=0, batch_size=1))
    models = fit_baselines(open_data(config), run, 4, Fabric(accelerator="cpu", devices=1))
    made = models["climatology"].forecast(torch.zeros(4, 3, 2, 4, 8), TREE_TIMES)
    assert_close(made, expected["climatology.forecast"])
    assert made.abs().max() > 0.1
    after = {path.name: path.read_bytes() for path in cache.iterdir()}
    (new,) = after.keys() - before.keys()
    assert new.startswith("climatology-") and {name: after[name] for name in before} == before


def write_tree(root: Path, draw: Callable[[], np.ndarray], skipped: set[int]) -> None:
    """两个通道、十二天；不借别处的代码：缓存的键里有每个文件的大小与时刻，要到处一样。"""
    for folder in TREE_CHANNELS.values():
        year = root / folder / "2000"
        year.mkdir(parents=True)
        for hour in TREE_HOURS:
            field = draw()
            if hour not in skipped:
                path = year / f"2000-{hour:04d}.npy"
                np.save(path, field)
                os.utime(path, ns=(TREE_TIME, TREE_TIME))
        os.utime(year, ns=(TREE_TIME, TREE_TIME))
        (year.parent / "mean_std.json").write_text('{"mean": [280.5], "std": [12.25]}', encoding="utf-8")


def tree_config() -> DataConfig:
    """当前文件夹里的 tree 与 cache。"""
    values: dict[str, Any] = {
        "root": "tree",
        "variables": {"t2m": "single", "z": ["level_00"]},
        "pressure_hpa": [50.0],
        "latitude": {"first": 67.5, "step": -45.0, "count": 4},
        "longitude": {"first": 0.0, "step": 45.0, "count": 8},
        "splits": {
            "train": ["2000-01-01", "2000-01-06"],
            "val": ["2000-01-07", "2000-01-09"],
            "test": ["2000-01-10", "2000-01-12"],
        },
        "standardize": "no",
        "frames_in": 3,
        "workers": 0,
        "pin_memory": False,
        "cache_dir": "cache",
    }
    return DataConfig(**values)
