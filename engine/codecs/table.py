"""阶段一重建的成绩表：metrics.json 与 metrics.csv 的样子，和给人看的文字。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

from util.cli import number


@dataclass(frozen=True)
class ChannelScores:
    """一个通道的成绩，RMSE 与 MAE 为物理单位，PSNR 为分贝；None：没有有效的场，或没有定义。"""

    rmse: float | None
    mae: float | None
    correlation: float | None
    ssim: float | None
    psnr: float | None


@dataclass(frozen=True)
class TokenScores:
    """离散的阶段一另有的。

    used: 用到的码占几成，至少一次就算；perplexity: 均匀地用时是 vocabulary；
    rmse_by_scale: 通道 → 只用头 1 … K 个尺度重建的 RMSE，物理单位；scales: 各尺度的 (h, w)。
    """

    vocabulary: int
    tokens: int
    bits: float
    used: float
    perplexity: float
    scales: list[tuple[int, int]]
    rmse_by_scale: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class CodecScores:
    """一个自编码器：潜变量 (c, h, w)，占一帧场的几分之几（数的个数），通道 → 成绩；source 是它的检查点或 YAML。"""

    latent_shape: tuple[int, int, int]
    compression: float
    scores: dict[str, ChannelScores]
    tokens: TokenScores | None = None
    source: str


@dataclass(frozen=True)
class Reconstruction:
    """各自编码器在同样的帧（encodes = tendency 时是差）上的成绩；fields: 通道 → 有效的场数。"""

    split: str
    stride: int
    encodes: Literal["state", "tendency"]
    channels: list[str]
    units: dict[str, str]
    fields: dict[str, int]
    codecs: dict[str, CodecScores]


RECONSTRUCTION_METRICS = tuple(field.name for field in fields(ChannelScores))
COLUMNS = ("codec", "channel", "unit", "fields", *RECONSTRUCTION_METRICS, "compression")  # metrics.csv 的


def table_rows(table: Reconstruction) -> list[dict[str, str | float | None]]:
    """每个通道、每个自编码器一行，键是 COLUMNS。"""
    return [
        {
            "codec": name,
            "channel": channel,
            "unit": table.units[channel],
            "fields": table.fields[channel],
            **asdict(found.scores[channel]),
            "compression": found.compression,
        }
        for channel in table.channels
        for name, found in table.codecs.items()
    ]


def reconstruction_text(table: Reconstruction) -> str:
    """对齐的文字表。"""
    rows = [["channel", "codec", *RECONSTRUCTION_METRICS, "latent", "values"]]
    for channel in table.channels:
        for name, found in table.codecs.items():
            scores = asdict(found.scores[channel])
            latent = " x ".join(map(str, found.latent_shape))
            numbers = (number(scores[metric], ".5g") for metric in RECONSTRUCTION_METRICS)
            label, size = f"{channel} [{table.units[channel]}]", f"{found.compression:.3g} of the field"
            rows.append([label, name, *numbers, latent, size])
    what = "frames" if table.encodes == "state" else "changes between frames"
    title = f"reconstruction of the {table.split} split, {max(table.fields.values())} {what}"
    discrete = {name: found.tokens for name, found in table.codecs.items() if found.tokens is not None}
    tokens = [tokens_text(name, found, table.units) for name, found in discrete.items()]
    return "\n".join(
        [f"{title}; RMSE, MAE latitude-weighted, physical units; PSNR in dB", *left_aligned(rows), *tokens]
    )


def tokens_text(name: str, found: TokenScores, units: Mapping[str, str]) -> str:
    """一行码本，一张逐尺度的表。"""
    first = (
        f"{name}: {found.tokens} tokens ({found.bits:.0f} bits), {100 * found.used:.1f}% of "
        f"{found.vocabulary} codes used, perplexity {found.perplexity:.0f}; RMSE with the scales up to"
    )
    rows = [["channel", *("x".join(map(str, scale)) for scale in found.scales)]]
    for channel, values in found.rmse_by_scale.items():
        rows.append([f"{channel} [{units[channel]}]", *(number(value, ".4g") for value in values)])
    return "\n".join([first, *left_aligned(rows)])


def left_aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """各列左对齐的行。"""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
