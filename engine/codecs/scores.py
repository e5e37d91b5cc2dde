"""自编码器重建的成绩：同样的帧（或差）编码再解码，逐批累加可平均的统计量，平均之后才开方、相除。

成绩表的样子与文字在 table.py，离散的另有的两件在 tokens.py，落盘与图在 results.py，命令在 reconstruct.py。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from engine.codecs.table import ChannelScores, CodecScores, Reconstruction
from engine.codecs.tokens import TokenSums, score_tokens, token_sums
from models.interface import Autoencoder, TokenAutoencoder
from util.batch import DataSpec, Predict, encoded_fields
from util.data.batches import every_frame
from util.data.dataset import WeatherData
from util.data.feed import feed
from util.grid import latitude_weights
from util.scores.metrics import IMAGE_RANGE, area_mean, errors, in_pieces, similarity
from util.scores.tabulate import plain


def frame_statistics(made: Tensor, truth: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """(N, C, H, W) 两批 → 各个可平均的统计量 (N, C) float64，标准化单位。"""
    return {
        **errors(made, truth, weights),
        "ssim": in_pieces(similarity, made, truth),
        "made": area_mean(made, weights),
        "truth": area_mean(truth, weights),
        "made_square": area_mean(made.square(), weights),
        "truth_square": area_mean(truth.square(), weights),
        "product": area_mean(made * truth, weights),
    }


def reconstruction_scores(means: Mapping[str, Tensor], spec: DataSpec) -> dict[str, ChannelScores]:
    """统计量的平均 (C,) → 通道 → 成绩，RMSE 与 MAE 为物理单位；均方根与相关都在这里才算。"""
    std = torch.tensor(spec.std, dtype=torch.float64, device=means["square"].device)
    covariance = means["product"] - means["made"] * means["truth"]
    variances = [means[f"{name}_square"] - means[name].square() for name in ("made", "truth")]
    columns = {
        "rmse": means["square"].sqrt() * std,
        "mae": means["absolute"] * std,
        "correlation": covariance / (variances[0] * variances[1]).sqrt(),
        "ssim": means["ssim"],
        "psnr": 10 * (IMAGE_RANGE**2 / means["plain_square"]).log10(),
    }
    numbers = {name: plain(values.cpu().numpy()) for name, values in columns.items()}
    return {c: ChannelScores(**{name: v[i] for name, v in numbers.items()}) for i, c in enumerate(spec.channels)}


def score_codecs(
    codecs: Mapping[str, Autoencoder],
    sources: Mapping[str, str],
    data: WeatherData,
    split: str,
    stride: int,
    batch_size: int,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Reconstruction:
    """各自编码器在同样的帧上的成绩；codecs: 名字 → 模型，sources: 名字 → 它的检查点或 YAML。

    Raises:
        ValueError: 重建里有非有限值。
    """
    spec, encodes = data.spec, what_they_encode(codecs)
    weights = latitude_weights(spec.latitudes).to(device)
    batches = every_frame(data.segments[split], data.spec.window, batch_size, stride, encodes == "tendency")
    loader = feed(data, batches, device)
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in codecs}
    tokens: dict[str, TokenSums] = {}
    counts = torch.zeros(spec.num_channels, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in tqdm(loader, f"reconstruct {split}", len(batches), leave=False):
            check()
            truth, valid = encoded_fields(batch, encodes)
            counts += valid.sum(0)
            for name, model in codecs.items():
                made = reconstruction(model, truth, name)
                for key, values in frame_statistics(made, truth, weights).items():
                    sums[name][key] = sums[name].get(key, 0) + values.masked_fill(~valid, 0).sum(0)
                if isinstance(model, TokenAutoencoder):
                    more = token_sums(model, truth, valid, weights)
                    tokens[name] = TokenSums(*map(torch.add, tokens[name], more)) if name in tokens else more
    found = {
        name: score_one(model, sums[name], tokens.get(name), counts, spec, sources[name])
        for name, model in codecs.items()
    }
    return Reconstruction(
        split=split,
        stride=stride,
        encodes=encodes,
        channels=list(spec.channels),
        units=dict(zip(spec.channels, spec.units, strict=True)),
        fields=dict(zip(spec.channels, map(int, counts.tolist()), strict=True)),
        codecs=found,
    )


def score_one(
    model: Autoencoder,
    sums: Mapping[str, Tensor],
    tokens: TokenSums | None,
    counts: Tensor,
    spec: DataSpec,
    source: str,
) -> CodecScores:
    """一个自编码器全部帧的和 → 成绩；counts (C,) 有效的场数。"""
    discrete = None
    if tokens is not None and isinstance(model, TokenAutoencoder):
        discrete = score_tokens(model, tokens, counts, spec)
    return CodecScores(
        latent_shape=model.latent_shape,
        compression=math.prod(model.latent_shape) / (spec.num_channels * spec.height * spec.width),
        scores=reconstruction_scores({key: total / counts for key, total in sums.items()}, spec),
        tokens=discrete,
        source=source,
    )


def what_they_encode(codecs: Mapping[str, Autoencoder]) -> Predict:
    """各自编码器编码的是场还是差。

    Raises:
        ValueError: 不是同一种。
    """
    kinds: dict[str, Predict] = {name: model.encodes for name, model in codecs.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(f"the autoencoders do not encode the same ({listed}); compare those of one kind")
    return next(iter(kinds.values()))


def reconstruction(model: Autoencoder, fields: Tensor, name: str) -> Tensor:
    """编码再解码。

    Raises:
        ValueError: 有非有限值。
    """
    made = model.decode(model.encode(fields)).float()
    if not made.isfinite().all():
        raise ValueError(f"{name}: the reconstruction holds non-finite values")
    return made
