"""自编码器重建的成绩：同样的帧（或差）编码再解码，逐批累加可平均的统计量，平均之后才开方、相除。

engine/reconstruct.py 是命令、表与图；离散的另有的两件在 engine/tokens.py。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.codecs.tokens import describe_tokens, token_sums
from models.interface import TokenAutoencoder
from util.batch import DataSpec, Predict, encoded_fields
from util.data.batches import every_frame
from util.data.dataset import WeatherData
from util.data.feed import feed
from util.grid import latitude_weights
from util.scores.metrics import IMAGE_RANGE, area_mean, errors, in_pieces, structural_similarity
from util.scores.tabulate import plain

Table = dict[str, Any]


def frame_statistics(made: Tensor, truth: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """(N, C, H, W) 两批 → 各个可平均的统计量 (N, C) float64，标准化单位。"""
    return {
        **errors(made, truth, weights),
        "ssim": in_pieces(structural_similarity, made, truth),
        "made": area_mean(made, weights),
        "truth": area_mean(truth, weights),
        "made_square": area_mean(made.square(), weights),
        "truth_square": area_mean(truth.square(), weights),
        "product": area_mean(made * truth, weights),
    }


def final_scores(means: Mapping[str, Tensor], std: Tensor) -> dict[str, Tensor]:
    """统计量的平均 (C,) → 成绩 (C,)，RMSE 与 MAE 为物理单位；均方根与相关都在这里才算。"""
    covariance = means["product"] - means["made"] * means["truth"]
    variances = [means[f"{name}_square"] - means[name].square() for name in ("made", "truth")]
    return {
        "rmse": means["square"].sqrt() * std,
        "mae": means["absolute"] * std,
        "correlation": covariance / (variances[0] * variances[1]).sqrt(),
        "ssim": means["ssim"],
        "psnr": 10 * (IMAGE_RANGE**2 / means["plain_square"]).log10(),
    }


def score_codecs(
    codecs: Mapping[str, Any],
    data: WeatherData,
    split: str,
    stride: int,
    batch_size: int,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Table:
    """各自编码器在同样的帧上的成绩；codecs: 名字 → 模型。

    Raises:
        ValueError: 重建里有非有限值。
    """
    spec, encodes = data.spec, what_they_encode(codecs)
    weights = latitude_weights(spec.latitudes).to(device)
    batches = every_frame(data.segments[split], data.spec.window, batch_size, stride, encodes == "tendency")
    loader = feed(data, batches, device)
    sums, tokens = ({name: dict[str, Any]() for name in codecs} for _ in range(2))
    counts = torch.zeros(spec.num_channels, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in tqdm(loader, f"reconstruct {split}", len(batches), leave=False):
            check()
            truth, valid = encoded_fields(batch, encodes)
            counts += valid.sum(0)
            for name, model in codecs.items():
                made = reconstruction(model, truth, name)
                found = frame_statistics(made, truth, weights)
                add(sums[name], {key: values.masked_fill(~valid, 0).sum(0) for key, values in found.items()})
                if isinstance(model, TokenAutoencoder):
                    add(tokens[name], token_sums(model, truth, valid, weights))
    std = torch.tensor(spec.std, dtype=torch.float64, device=device)
    described = {}
    for name, model in codecs.items():
        scores = final_scores({key: total / counts for key, total in sums[name].items()}, std)
        described[name] = {**describe_latents(model, spec), "scores": by_channel(scores, spec)}
        if isinstance(model, TokenAutoencoder):
            described[name]["tokens"] = describe_tokens(model, tokens[name], counts, spec)
    return {
        "split": split,
        "stride": stride,
        "encodes": encodes,
        "channels": list(spec.channels),
        "units": dict(zip(spec.channels, spec.units, strict=True)),
        "fields": dict(zip(spec.channels, map(int, counts.tolist()), strict=True)),
        "codecs": described,
    }


def what_they_encode(codecs: Mapping[str, Any]) -> Predict:
    """各自编码器编码的是场还是差。

    Raises:
        ValueError: 不是同一种。
    """
    kinds = {name: model.encodes for name, model in codecs.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(f"the autoencoders do not encode the same ({listed}); compare those of one kind")
    return next(iter(kinds.values()))


def add(held: dict[str, Any], found: Mapping[str, Tensor]) -> None:
    """各项累加到 held。"""
    for key, total in found.items():
        held[key] = held.get(key, 0) + total


def reconstruction(model: Any, fields: Tensor, name: str) -> Tensor:
    """编码再解码。

    Raises:
        ValueError: 有非有限值。
    """
    made = model.decode(model.encode(fields)).float()
    if not made.isfinite().all():
        raise ValueError(f"{name}: the reconstruction holds non-finite values")
    return made


def describe_latents(model: Any, spec: DataSpec) -> dict[str, Any]:
    """潜变量的大小，与它占一帧场的几分之几（数的个数）。"""
    field = spec.num_channels * spec.height * spec.width
    return {"latent_shape": list(model.latent_shape), "compression": math.prod(model.latent_shape) / field}


def by_channel(scores: Mapping[str, Tensor], spec: DataSpec) -> dict[str, dict[str, float | None]]:
    """成绩 → (C,) 换成通道 → 成绩 → 数；没有有效的场时为 None。"""
    columns = {metric: plain(values.cpu().numpy()) for metric, values in scores.items()}
    return {c: {metric: values[i] for metric, values in columns.items()} for i, c in enumerate(spec.channels)}
