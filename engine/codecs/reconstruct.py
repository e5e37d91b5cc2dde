"""比较自编码器的重建：`python -m engine.codecs.reconstruct --checkpoint CKPT | --config YAML …`。

在潜变量上训练之前，先看阶段一丢了多少：阶段二再好，也好不过它的解码。每个自编码器每个通道一行：纬度加权的 RMSE、MAE
（物理单位）与相关系数，SSIM 与 PSNR（像素范围与评测相同，±3 倍训练标准差）；只算有效的场。
相关系数是全部格点、全部场合在一起的皮尔逊相关，不先减气候态。
一个划分里每帧（或每个差）看一次；--stride N：每 N 个窗口取一个。
--config：没有训练过、权重是预训练的自编码器，只看一遍训练数据求它自己的缩放。
数据来自第一个自编码器的配置，其余的必须是同样的通道、网格与统计量；数据搬了家，写 data.root=… 之类。
成绩怎样算在 scores.py；离散的（VQVAE）另有码本的用量与逐尺度的误差（tokens.py）。
编码差的（vqvae 的 model.encodes = tendency）比的是相邻两帧之差，只与同类的一起比；差的 SSIM、PSNR 也以场的范围计。
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from util.atomic import reserved
from util.cli import Parser, run_command

if TYPE_CHECKING:  # --help 不必等 torch
    import torch

    from models.interface import Autoencoder, Learner
    from util.batch import DataSpec
    from util.config import RunConfig

log = logging.getLogger("ar_pred")
SPLITS = ("train", "val", "test")


class Codec(NamedTuple):
    """一个自编码器；source 是它的检查点或 YAML。"""

    model: Autoencoder
    spec: DataSpec
    config: RunConfig
    source: str


def open_checkpoint(path: str, overrides: Sequence[str], device: torch.device) -> tuple[str, Codec]:
    """训练过的自编码器与它的名字（运行名）。

    Raises:
        ValueError: 检查点不对，或不是自编码器。
    """
    from engine.loading import checkpoint_config, load_forecaster, run_name
    from util.files.training_checkpoint import load_training

    content = load_training(path)
    config = checkpoint_config(content, path, overrides)
    model, spec = load_forecaster(content, device)
    return run_name(content, path), Codec(require_codec(model, config, path), spec, config, path)


def open_config(path: str, overrides: Sequence[str], device: torch.device) -> tuple[str, Codec]:
    """没有训练过的自编码器与它的名字（文件名）；它自己的缩放由训练数据求得。

    Raises:
        ValueError: 配置、数据、权重不对；不是自编码器；有的权重没有训练过。
    """
    from engine.one_pass import fit_one_pass
    from models import build_model
    from models.interface import OnePass, Pretrained
    from util.config import eval_batch_size, load_config
    from util.data.dataset import open_data

    config = load_config(path, overrides)
    data = open_data(config.data)
    model = require_codec(build_model(config.model, data.spec), config, path).to(device).eval()
    if not (isinstance(model, Pretrained) and model.all_are_trained):
        raise ValueError(
            f"{path}: not all of its weights are trained; train it and give --checkpoint checkpoints/RUN/best.ckpt"
        )
    if isinstance(model, OnePass) and model.needs_pass:
        fit_one_pass(model, data, eval_batch_size(config))
    return Path(path).stem, Codec(model, data.spec, config, path)


def require_codec(model: Learner, config: RunConfig, source: str) -> Autoencoder:
    """Raises ValueError: 不是阶段一。"""
    from models.interface import is_codec

    if not is_codec(model):
        raise ValueError(f"{source}: {config.model['name']} is not an autoencoder; sd_vae, rae and vqvae are")
    return model


def unique_names(opened: Sequence[tuple[str, str]]) -> list[str]:
    """(名字, 来处) → 各不相同的名字：一次运行的两个检查点写明是哪一个，还相同的从 2 数起。"""
    names: list[str] = []
    for name, source in opened:
        same = sum(other == name for other, _ in opened) > 1
        plain = f"{name}-{Path(source).stem}" if same else name
        numbered = (f"{plain}-{number}" for number in count(2))
        names.append(next(label for label in chain([plain], numbered) if label not in names))
    return names


def compare_codecs(
    checkpoints: Sequence[str], configs: Sequence[str], overrides: Sequence[str], split: str, stride: int, out: Path
) -> int:
    """命令本身：打开各自编码器 → 同样的帧上的成绩 → 表、图。

    Raises:
        ValueError: 检查点、配置不对，或各自的数据不同。
    """
    import torch

    from engine.codecs.results import draw_reconstruction, write_reconstruction
    from engine.codecs.scores import score_codecs
    from engine.codecs.table import reconstruction_text
    from engine.loading import check_same_data, says_where
    from util.config import eval_batch_size
    from util.data.dataset import open_data
    from util.logger import setup_logging

    setup_logging(out / "reconstruct.log")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = [text for text in overrides if says_where(text) or not configs]  # 其余的是给 --config 的
    opened = [open_checkpoint(path, moved, device) for path in checkpoints]
    opened += [open_config(path, overrides, device) for path in configs]
    names = unique_names([(name, codec.source) for name, codec in opened])
    codecs = {name: codec for name, (_, codec) in zip(names, opened, strict=True)}
    config = opened[0][1].config
    data = open_data(config.data)
    for codec in codecs.values():  # 帧数不必相同，编码场的间隔也不必：逐帧重建
        ours = data.spec
        free = [
            "frames_in",
            "frames_out",
            "starts_every_hours",
            *(["interval_hours"] if codec.model.encodes == "state" else []),
        ]
        frames = {key: getattr(ours, key) for key in free}
        check_same_data(replace(codec.spec, **frames), ours, codec.source)
    models = {name: codec.model for name, codec in codecs.items()}
    sources = {name: codec.source for name, codec in codecs.items()}
    table = score_codecs(models, sources, data, split, stride, eval_batch_size(config), device)
    write_reconstruction(out, table)
    log.info("%s", reconstruction_text(table))
    pictures = draw_reconstruction(table, models, data, device, out / "figures")
    log.info("scores: %s; pictures: %s", out / "metrics.json", ", ".join(map(str, pictures)))
    return 0


def reconstruct_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m engine.codecs.reconstruct",
        description="Compare autoencoders by what is left of a field after encoding and decoding.",
    )
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="FILE", help="a trained autoencoder; may be repeated"
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE",
        help="run YAML of an autoencoder with pretrained weights, used untrained; may be repeated",
    )  # fmt: skip
    parser.add_argument("--split", choices=SPLITS, default="test", help="which dates (default: test)")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th window (default: every one)")
    parser.add_argument("--out", type=Path, default=Path("log/reconstruction"), help="folder (default: %(default)s)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override keys of the --config files; of checkpoints, where the data are (data.root=...)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口，返回退出码。

    Raises:
        ValueError: 参数写错，或见 compare_codecs。
    """
    args = reconstruct_parser().parse_intermixed_args(argv)
    if not (args.checkpoint or args.config):
        raise ValueError("give --checkpoint checkpoints/RUN/best.ckpt or --config YAML, of an autoencoder")
    if args.stride < 1:
        raise ValueError(f"--stride {args.stride}: must be at least 1")
    with reserved(args.out):
        return compare_codecs(args.checkpoint, args.config, args.overrides, args.split, args.stride, args.out)


if __name__ == "__main__":
    run_command(main)
