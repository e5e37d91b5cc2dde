"""离散的阶段一（VQVAE）另看两件事：码本用到了多少；只用头几个尺度重建时，还差多少。"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.codecs.table import TokenScores
from models.interface import TokenAutoencoder
from util.batch import DataSpec
from util.scores.metrics import area_mean, perplexity
from util.scores.tabulate import plain


class TokenSums(NamedTuple):
    """一些帧的和：codes (V,) 各码用了几次；squares (K, C) 只用头 k 个尺度重建的误差平方。"""

    codes: Tensor
    squares: Tensor


def by_scale(model: TokenAutoencoder, tokens: Sequence[Tensor]) -> Iterator[Tensor]:
    """各尺度的编号 → 只用头 1 … K 个尺度的重建 (N, C, H, W)；末一个是整个的。"""
    return (model.decode_tokens(list(tokens[:count])) for count in range(1, len(tokens) + 1))


def token_sums(model: TokenAutoencoder, truth: Tensor, valid: Tensor, weights: Tensor) -> TokenSums:
    """一批 truth (N, C, H, W)、valid (N, C)、纬度权重 (H,) → 这一批的和。"""
    tokens = model.encode_tokens(truth)
    codes = torch.bincount(torch.cat(tokens, 1).flatten(), minlength=model.quantizer.vocabulary)
    errors = (area_mean((made - truth).square(), weights) for made in by_scale(model, tokens))  # 各 (N, C)
    return TokenSums(codes.double(), torch.stack([e.masked_fill(~valid, 0).sum(0) for e in errors]))


def score_tokens(model: TokenAutoencoder, sums: TokenSums, counts: Tensor, spec: DataSpec) -> TokenScores:
    """全部帧的和 → 成绩；counts (C,) 有效的场数。"""
    quantizer, std = model.quantizer, torch.tensor(spec.std, dtype=torch.float64, device=counts.device)
    rmse = (sums.squares / counts).sqrt() * std  # (K, C)
    length = sum(quantizer.lengths)
    return TokenScores(
        vocabulary=quantizer.vocabulary,
        tokens=length,
        bits=length * math.log2(quantizer.vocabulary),
        used=float((sums.codes > 0).double().mean()),
        perplexity=float(perplexity(sums.codes / sums.codes.sum())),
        scales=list(quantizer.scales),
        rmse_by_scale={channel: plain(rmse[:, i].cpu().numpy()) for i, channel in enumerate(spec.channels)},
    )
