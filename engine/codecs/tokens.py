"""离散的阶段一（VQVAE）另看两件事：码本用到了多少；只用头几个尺度重建时，还差多少。engine/codecs.py 的一部分。"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.interface import TokenAutoencoder
from util.batch import DataSpec
from util.scores.metrics import area_mean, perplexity
from util.scores.tabulate import plain


def by_scale(model: TokenAutoencoder, tokens: Sequence[Tensor]) -> Iterator[Tensor]:
    """各尺度的编号 → 只用头 1 … K 个尺度的重建 (N, C, H, W)；末一个是整个的。"""
    return (model.decode_tokens(list(tokens[:count])) for count in range(1, len(tokens) + 1))


def token_sums(model: TokenAutoencoder, truth: Tensor, valid: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """一批 truth (N, C, H, W)、valid (N, C)、纬度权重 (H,) → 这一批的和。

    codes (V,) 各码用了几次；squares (K, C) 只用头 k 个尺度重建的误差平方。
    """
    tokens = model.encode_tokens(truth)
    codes = torch.bincount(torch.cat(tokens, 1).flatten(), minlength=model.quantizer.vocabulary)
    errors = (area_mean((made - truth).square(), weights) for made in by_scale(model, tokens))  # 各 (N, C)
    return {"codes": codes.double(), "squares": torch.stack([e.masked_fill(~valid, 0).sum(0) for e in errors])}


def describe_tokens(
    model: TokenAutoencoder, sums: Mapping[str, Tensor], counts: Tensor, spec: DataSpec
) -> dict[str, Any]:
    """token_sums 的总和 → 写进 metrics.json 的；counts (C,) 有效的场数。

    used：用到的码占几成，至少一次就算；perplexity 均匀地用时是 vocabulary；rmse_by_scale 为物理单位。
    """
    quantizer, std = model.quantizer, torch.tensor(spec.std, dtype=torch.float64, device=counts.device)
    rmse = (sums["squares"] / counts).sqrt() * std  # (K, C)
    by_channel = {channel: plain(rmse[:, i].cpu().numpy()) for i, channel in enumerate(spec.channels)}
    length = sum(quantizer.lengths)
    return {
        "vocabulary": quantizer.vocabulary,
        "tokens": length,
        "bits": length * math.log2(quantizer.vocabulary),
        "used": float((sums["codes"] > 0).double().mean()),
        "perplexity": float(perplexity(sums["codes"] / sums["codes"].sum())),
        "scales": [list(scale) for scale in quantizer.scales],
        "rmse_by_scale": by_channel,
    }


def tokens_text(name: str, found: Mapping[str, Any], units: Mapping[str, str]) -> str:
    """文字：一行码本，一张逐尺度的表。"""
    first = (
        f"{name}: {found['tokens']} tokens ({found['bits']:.0f} bits), {100 * found['used']:.1f}% of "
        f"{found['vocabulary']} codes used, perplexity {found['perplexity']:.0f}; RMSE with the scales up to"
    )
    rows = [["channel", *("x".join(map(str, scale)) for scale in found["scales"])]]
    for channel, values in found["rmse_by_scale"].items():
        numbers = ["-" if value is None else format(value, ".4g") for value in values]
        rows.append([f"{channel} [{units[channel]}]", *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([first, *lines])
