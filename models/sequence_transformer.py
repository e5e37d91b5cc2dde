"""序列 Transformer 家族：把场当成序列来读。三种，由 variant 选。

transformer：一帧展平成一个 token，Linear → 正余弦位置 → depth 层编码器，取最后一步 →
    LayerNorm – Dropout – Linear(D → D/2) – ReLU – Dropout – Linear(D/2 → τ·F)。
seq2seq：同样的编码器；解码器由 τ 个可学习的 query（加未来时刻的位置编码）一次给出各帧，各自 Linear(D → F)。
spatial：每个格点是一个 token，特征是那里的 T·C 个数；编码器之后逐点 Linear(D → τ·C)。代价随格点数的平方增长：
    超过 WARN_TOKENS 个时提醒，超过 MAX_TOKENS 个时拒绝。

来源：需求「天气模型详解」的 Transformer（序列建模）；块是 Vaswani et al. 2017 的（残差之后归一化）。前两种展平了空间，
邻近格点的关系要从头学，在需求的表里落在气候态之后；它们是对照，不是推荐。
需求没有写明而由我们定下的：感知机 4 倍宽、GELU；q、k、v 没有偏置；spatial 的尺寸同 transformer 而没有 dropout，位置用
二维正余弦（models/layers/position.py），没有它各点分不出彼此；seq2seq 的 dropout 同为 0.2。

字母：B 批，T 历史帧数，C 通道，H×W 网格，F = C·H·W，N = H·W，D 宽度，τ 未来帧数 T_out；channels：一帧进网络的通道数。
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from models.layers.attention import check_heads
from models.layers.forcings import Inputs
from models.layers.frames import to_state
from models.layers.losses import refuse_members
from models.layers.members import Generators
from models.layers.position import sincos_codes
from models.layers.transformer import DecoderLayer, EncoderLayer, sinusoid
from util.batch import DataSpec, Predict
from util.strict import PositiveInt, Strict

log = logging.getLogger("ar_pred")
MLP_RATIO = 4
WARN_TOKENS = 4096  # 64 x 64 个格点
MAX_TOKENS = 16384  # 128 x 128 个格点：注意力写开来每个头 1 GiB（float32），数运算次数时、没有融合核的设备上真要写开
DEFAULTS = {  # 各 variant 的默认值；spatial 不丢弃：CPU 上丢弃注意力要把 N × N 写开，慢三倍
    "transformer": {"dim": 128, "heads": 4, "depth": 3, "dropout": 0.2},
    "seq2seq": {"dim": 256, "heads": 8, "depth": 4, "decoder_depth": 4, "dropout": 0.2},
    "spatial": {"dim": 128, "heads": 4, "depth": 3, "dropout": 0.0},
}


class Config(Strict):
    """不写的取 DEFAULTS。"""

    variant: Literal["transformer", "seq2seq", "spatial"] = "transformer"
    """a token is a whole frame (transformer, seq2seq) or a grid point (spatial)"""
    dim: PositiveInt
    """width; seq2seq: 256 by default"""
    heads: PositiveInt
    """attention heads; must divide dim; seq2seq: 8 by default"""
    depth: PositiveInt
    """layers of the encoder; seq2seq: 4 by default"""
    decoder_depth: PositiveInt | None = None
    """layers of seq2seq's decoder, 4 by default; the others have none"""
    dropout: float = Field(ge=0, lt=1)
    """of attention, MLPs and head; spatial: 0.0 by default"""
    predict: Predict = "state"

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        variant = values.get("variant", "transformer")
        known = variant if isinstance(variant, str) and variant in DEFAULTS else "transformer"  # 拼错的由 Literal 报
        return {**DEFAULTS[known], **values}

    @field_validator("dim")
    @classmethod
    def _half(cls, dim: int, info: ValidationInfo) -> int:
        if info.data.get("variant") == "transformer" and dim < 2:
            raise ValueError("variant transformer has a layer of dim / 2: must be at least 2")
        return dim

    @field_validator("heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        return check_heads(heads, info.data.get("dim", heads))  # 宽度自己就写错时，只报宽度

    @field_validator("decoder_depth")
    @classmethod
    def _has_decoder(cls, depth: int | None, info: ValidationInfo) -> int | None:
        variant = info.data.get("variant", "seq2seq")  # variant 自己就写错时，只报 variant
        if (depth is None) == (variant == "seq2seq"):
            raise ValueError("seq2seq needs one" if depth is None else f"variant {variant} has no decoder; remove it")
        return depth


class Encoder(nn.Module):
    """token 的特征 → Linear → 加位置编码 → depth 层。"""

    def __init__(self, features: int, positions: Tensor, config: Config) -> None:
        """positions: (N, D)。"""
        super().__init__()
        self.embed = nn.Linear(features, config.dim)
        self.positions = nn.Buffer(positions, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(config.dim, config.heads, MLP_RATIO * config.dim, config.dropout) for _ in range(config.depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, 特征) → (B, N, D)。"""
        x = self.drop(self.embed(tokens) + self.positions)
        for layer in self.layers:
            x = layer(x)
        return x


class LastStep(nn.Module):
    """transformer。"""

    def __init__(self, config: Config, spec: DataSpec, channels: int) -> None:
        super().__init__()
        points, dim = spec.height * spec.width, config.dim
        self.shape = spec.frames_out, spec.num_channels, spec.height, spec.width
        self.encoder = Encoder(channels * points, sinusoid(spec.frames_in, dim), config)
        self.head = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Dropout(config.dropout),
            nn.Linear(dim, dim // 2),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(dim // 2, math.prod(self.shape)),
        )

    def forward(self, history: Tensor) -> Tensor:
        """(B, T, channels, H, W) → (B, τ, C, H, W)。"""
        encoded = self.encoder(history.flatten(2))  # (B, T, D)
        return self.head(encoded[:, -1]).unflatten(1, self.shape)


class Seq2Seq(nn.Module):
    """seq2seq。"""

    def __init__(self, config: Config, spec: DataSpec, channels: int) -> None:
        super().__init__()
        assert config.decoder_depth is not None
        self.shape, dim = (spec.num_channels, spec.height, spec.width), config.dim
        past, future = sinusoid(spec.window, dim).split([spec.frames_in, spec.frames_out])  # (T 或 τ, D)
        self.encoder = Encoder(channels * spec.height * spec.width, past, config)
        self.future = nn.Buffer(future, persistent=False)
        self.query = nn.Parameter(0.02 * torch.randn(spec.frames_out, dim))  # 小，不淹没未来时刻的编码
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, config.heads, MLP_RATIO * dim, config.dropout) for _ in range(config.decoder_depth)
        )
        self.head = nn.Linear(dim, math.prod(self.shape))

    def forward(self, history: Tensor) -> Tensor:
        """(B, T, channels, H, W) → (B, τ, C, H, W)。"""
        memory = self.encoder(history.flatten(2))  # (B, T, D)
        query = (self.query + self.future).expand(len(history), -1, -1)  # (B, τ, D)
        for layer in self.decoder:
            query = layer(query, memory)
        return self.head(query).unflatten(2, self.shape)


class Spatial(nn.Module):
    """spatial。"""

    def __init__(self, config: Config, spec: DataSpec, channels: int) -> None:
        super().__init__()
        _check_tokens(spec)
        places = torch.cartesian_prod(torch.arange(spec.height), torch.arange(spec.width))  # (N, 2)
        self.encoder = Encoder(spec.frames_in * channels, sincos_codes(places, config.dim), config)
        self.sizes = {"h": spec.height, "c": spec.num_channels}
        self.head = nn.Linear(config.dim, spec.frames_out * spec.num_channels)

    def forward(self, history: Tensor) -> Tensor:
        """(B, T, channels, H, W) → (B, τ, C, H, W)。"""
        encoded = self.encoder(rearrange(history, "b t c h w -> b (h w) (t c)"))  # (B, N, D)
        return rearrange(self.head(encoded), "b (h w) (t c) -> b t c h w", **self.sizes)


class Model(nn.Module):
    """见文件开头。"""

    probabilistic = False
    can_forecast = True
    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        """Raises ValueError: spatial 的格点多于 MAX_TOKENS。"""
        super().__init__()
        network = {"transformer": LastStep, "seq2seq": Seq2Seq, "spatial": Spatial}[config.variant]
        self.inputs = Inputs(spec)
        self.network = network(config, spec, self.inputs.channels)
        self.predict: Predict = config.predict

    @property
    def blocks(self) -> list[nn.Module]:
        """编码器、解码器的各层。"""
        return [module for module in self.modules() if isinstance(module, EncoderLayer | DecoderLayer)]

    def forward(self, history: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, T, C, H, W)、时刻 → (B, τ, C, H, W)。"""
        return to_state(self.network(self.inputs(history, time)), self.inputs.base(history), self.predict)

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T, C, H, W) → (B, 1, τ, C, H, W)；num_members > 1 是 ValueError。"""
        refuse_members("sequence_transformer", num_members)
        return self(history, time)[:, None]


def _check_tokens(spec: DataSpec) -> None:
    tokens = spec.height * spec.width
    if tokens > MAX_TOKENS:
        patch = _patch(spec)
        raise ValueError(
            f"model.variant = spatial makes every grid point a token: {spec.height} x {spec.width} = {tokens}, at most "
            f"{MAX_TOKENS}; variants that work on this grid: transformer, seq2seq; attention over patches: "
            f"model.name = weather_transformer with patch = {patch}"
        )
    if tokens > WARN_TOKENS:
        log.warning(
            "model.variant = spatial: %d x %d = %d tokens; attention costs tokens squared, %.1f times that of %d",
            spec.height, spec.width, tokens, (tokens / WARN_TOKENS) ** 2, WARN_TOKENS,
        )  # fmt: skip


def _patch(spec: DataSpec) -> list[int]:
    """整除网格的块里，离 4 x 8 最近的。"""

    def nearest(length: int, side: int) -> int:
        return min((n for n in range(1, length + 1) if length % n == 0), key=lambda n: abs(n - side))

    return [nearest(spec.height, 4), nearest(spec.width, 8)]
