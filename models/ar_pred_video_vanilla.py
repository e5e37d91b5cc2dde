"""AR_pred video vanilla：t 帧切成 token，按区块编码，拿掉一个区块，由其余区块和它的位置编码把它预测出来。

训练：随机拿掉一帧（每个窗口各抽一次），目标是它的原始像素；验证、测试、推理：拿掉最后一帧，即由前 t-1 帧预报第 t 帧。
编码器是 ViT 式的块，注意力逐区块因果：看得见自己和更早的区块，更晚的按 mask_ratio 遮住。
解码器只有交叉注意力（CrossMAE 式），query 是参数加上被拿掉区块的位置编码，与编码器同一张表。
需求没有写明而补上的开关：spatial_position、query、predict、last_group_share、eval_mask、attention；
理由见 docs/architecture.md。

字母：B 批，t 帧数，k 通道，H×W 网格，p×q 一个 token，h×w = (H/p)×(W/q)，N = t·h·w 个 token，
G 个区块、每块 n 个 token，P = p·q·k，D 编码宽度，E 解码宽度。
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.layers.ar_pred_video_vanilla_tokens import PositionCodes, RemoveGroup, ToFrame, Tokenize
from models.layers.attention import (
    FLEX_BLOCK,
    FLEX_HEAD,
    CrossAttention,
    GroupAttention,
    block_mask,
    check_heads,
    token_mask,
)
from models.layers.draws import Draws
from models.layers.forcings import Inputs
from models.layers.members import Generators
from models.layers.noise import NoiseOption, condition_norms, forecast_members, normalise
from models.layers.position import token_places
from models.layers.recompute import through
from models.layers.transformer import FeedForward
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Share, Strict

log = logging.getLogger("ar_pred")
QUERY_STD = 0.02  # query 自己的随机部分要小，位置编码才不被淹没


class Grouping(Strict):
    """token 排成一列的次序，和每个区块取相邻的几个。"""

    order: str = "t h w"
    """order of the tokens: t, h and w once each"""
    size: Literal["frame"] | PositiveInt = "frame"
    """tokens of a group; frame: one group a frame, which alone can forecast"""

    @field_validator("order")
    @classmethod
    def _permutation(cls, order: str) -> str:
        if sorted(order.split()) != ["h", "t", "w"]:
            raise ValueError("must name t, h and w once each, e.g. 't h w'")
        return " ".join(order.split())

    @field_validator("size", mode="before")
    @classmethod
    def _one_rule(cls, size: object) -> object:  # 否则报错只提联合类型的第一种
        if size != "frame" and (type(size) is not int or size < 1):
            raise ValueError("must be frame or a positive number of tokens")
        return size


class Config(Strict):
    """AR_pred 的全部选项；t 和 k 来自 data 段，不在这里重写。"""

    token_size: list[PositiveInt] = Field([16, 16], min_length=2, max_length=2)
    """[rows, columns] of grid points in a token; must divide the grid"""
    grouping: Grouping = Grouping()
    """how tokens are put into groups"""
    dim: PositiveInt = 768
    """width of the encoder, d"""
    depth: PositiveInt = 8
    """encoder blocks, m"""
    heads: PositiveInt = Field(12, validate_default=True)
    """attention heads of the encoder; must divide dim"""
    mlp_ratio: float = Field(4.0, gt=0)
    """width inside an MLP, over its width"""
    decoder_depth: PositiveInt = 4
    """decoder blocks"""
    decoder_width: PositiveInt = 512
    """width of the decoder"""
    decoder_heads: PositiveInt = Field(8, validate_default=True)
    """its attention heads; must divide decoder_width"""
    mask_ratio: Share = 0.8
    """training: chance that a later group is hidden, per layer, step and pair (mask_radio is accepted)"""
    eval_mask: Literal["causal", "none"] = "causal"
    """evaluation: causal hides all later groups, none hides none"""
    random_patchify: bool = True
    """training removes a random group; false: always the last"""
    last_group_share: Share = 0.0
    """share of windows whose last group is removed whatever the draw"""
    spatial_position: Literal["sincos", "learned", "none"] = "sincos"
    """codes of the place inside a frame"""
    query: Literal["learned", "resampled"] = "learned"
    """decoder queries: a learned parameter, or noise drawn anew each step"""
    predict: Predict = "state"
    """state: the frame; tendency: its difference to the nearest visible frame"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """of attention and MLPs"""
    act: Literal["GELU", "ReLU", "SiLU"] = "GELU"
    """activation of the MLPs"""
    norm: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """normalisation of the blocks"""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """auto: FlexAttention on CUDA where it fits, which skips hidden blocks"""
    noise: NoiseOption = None

    @model_validator(mode="before")
    @classmethod
    def _requirement_spelling(cls, values: object) -> object:
        if isinstance(values, dict) and "mask_radio" in values:  # 需求里的拼法
            if "mask_ratio" in values:
                raise ValueError("mask_ratio and mask_radio are two spellings of one key; give one of them")
            values = dict(values)
            values["mask_ratio"] = values.pop("mask_radio")
        return values

    @field_validator("heads", "decoder_heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        key = {"heads": "dim", "decoder_heads": "decoder_width"}[str(info.field_name)]
        return check_heads(heads, info.data.get(key, heads), key)  # 宽度自己就写错时，只报宽度


def feed_forward(config: Config, width: int) -> FeedForward:
    return FeedForward(width, int(width * config.mlp_ratio), config.dropout, getattr(nn, config.act))


class EncoderBlock(nn.Module):
    """Norm – 逐区块自注意力 – 残差 – Norm – MLP – 残差。"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        norm = getattr(nn, config.norm)
        self.norm1, self.norm2 = norm(config.dim), norm(config.dim)
        self.attention = GroupAttention(config.dim, config.heads, config.dropout)
        self.mlp = feed_forward(config, config.dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None, noise: Tensor | None = None) -> Tensor:
        norm1, norm2 = (partial(normalise, norm, noise=noise) for norm in (self.norm1, self.norm2))
        x = x + self.drop(through(norm1, partial(self.attention, mask=mask), x))
        return x + self.drop(through(norm2, self.mlp, x))


class DecoderBlock(nn.Module):
    """Norm – 交叉注意力 – 残差 – Norm – MLP – 残差；没有自注意力。"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        norm = getattr(nn, config.norm)
        width = config.decoder_width
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = CrossAttention(width, config.decoder_heads, config.dropout)
        self.mlp = feed_forward(config, width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, query: Tensor, memory: Tensor, noise: Tensor | None = None) -> Tensor:
        norm1, norm2 = (partial(normalise, norm, noise=noise) for norm in (self.norm1, self.norm2))
        query = query + self.drop(through(norm1, partial(self.attention, memory=memory), query))
        return query + self.drop(through(norm2, self.mlp, query))


class Decoder(nn.Module):
    """编码结果与被拿掉区块的位置编码 → 那个区块的像素。"""

    def __init__(self, config: Config, size: int, pixels: int) -> None:
        super().__init__()
        width, norm = config.decoder_width, getattr(nn, config.norm)
        self.resample = config.query == "resampled"
        self.memory = nn.Linear(config.dim, width)
        self.code = nn.Linear(config.dim, width)
        start = torch.empty(size, width)
        self.query = nn.Buffer(start) if self.resample else nn.Parameter(start)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.norm = norm(width)
        self.head = nn.Linear(width, pixels)

    def forward(self, encoded: Tensor, code: Tensor, draws: Draws | None, noise: Tensor | None) -> Tensor:
        """encoded (B, (G-1)·n, D)、被拿掉区块的位置编码 code (B, n, D) → (B, n, P)。"""
        query = self.query.expand(len(encoded), -1, -1)
        if self.resample and draws is not None:  # 每步重新随机；评测、预报时用存下的一份，结果才能重复
            query = QUERY_STD * draws.normal_like(query)
        query = query + self.code(code)  # (B, n, E)
        memory = self.memory(encoded)  # (B, (G-1)·n, E)
        for block in self.blocks:
            query = block(query, memory, noise)
        return self.head(normalise(self.norm, query, noise))


class Model(nn.Module):
    """见文件开头。frames_out 只能是 1；网格须能被 token 整除，token 总数须能被区块整除。"""

    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        """Raises ValueError: T_out ≠ 1、网格不能整除、区块不能整除、tendency 而区块不是一帧、flex 用不了。"""
        super().__init__()
        self.config, self.spec, self.probabilistic = config, spec, config.noise is not None
        rows, cols = _token_grid(config, spec)
        self.size = rows * cols if config.grouping.size == "frame" else config.grouping.size
        self.groups = _num_groups(config, spec, rows * cols, self.size)
        self.can_forecast = self.size == rows * cols and config.grouping.order.startswith("t")
        self.field_loss = self.weighs_fields = self.can_forecast  # 评测时拿掉的是最后一帧
        if config.predict == "tendency" and not self.can_forecast:
            raise ValueError("model.predict = tendency needs one group per frame: grouping {order: t h w, size: frame}")
        head = config.dim // config.heads
        self.flex_fits = self.size % FLEX_BLOCK == 0 and head >= FLEX_HEAD and config.dropout == 0
        if config.attention == "flex" and not self.flex_fits:
            raise ValueError(
                f"model.attention = flex needs groups of a multiple of {FLEX_BLOCK} tokens (found {self.size}), "
                f"heads >= {FLEX_HEAD} wide (found {head}) and dropout 0 (found {config.dropout:g}); use auto or sdpa"
            )
        places = token_places(config.grouping.order, spec.window, rows, cols)  # (N, 3)：t, h, w
        self.token_time = nn.Buffer(places[:, 0].clone(), persistent=False)
        places = places.unflatten(0, (self.groups, self.size))
        coded = places[:1, :, 1:] if self.can_forecast else places  # 区块跨帧时，时间也要由 token 自己带着
        pixels = config.token_size[0] * config.token_size[1] * spec.num_channels
        self.tokenize = Tokenize(config.token_size, spec.num_channels, config.grouping.order)
        self.inputs = Inputs(spec)
        self.tokenize_inputs = Tokenize(config.token_size, self.inputs.channels, config.grouping.order)
        self.embed = nn.Linear(pixels // spec.num_channels * self.inputs.channels, config.dim)
        self.position = PositionCodes(self.groups, coded, config.dim, config.spatial_position)
        self.remove_group = RemoveGroup(self.size)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))
        self.decoder = Decoder(config, self.size, pixels)
        self.to_frame = ToFrame(config.token_size, rows, spec.num_channels, config.grouping.order, self.can_forecast)
        self.init_weights()
        condition_norms(self, config.noise)
        values, numbers = self.size * pixels, self.size * config.decoder_width
        log.info(
            "a group of %d values leaves the decoder through %d numbers, ratio %.2f", values, numbers, values / numbers
        )

    def init_weights(self) -> None:
        """Linear：Xavier 均匀、偏置 0；区块编码：单位方差，与 token 嵌入同量级（0.02 起步时区块分不开）；
        可学习的空间编码与 query：0.02。下面三条使位置从第一步起就对得上，缺一条都长久停在持续性预报
        （docs/LOG.md）：q 与 k 同一初值；解码器两个 Linear 同一初值；输出层 0.001，免得先学会闭嘴。"""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.position.group)
        nn.init.normal_(self.decoder.query, std=QUERY_STD)
        nn.init.normal_(self.decoder.head.weight, std=0.001)
        with torch.no_grad():
            self.decoder.code.weight.copy_(self.decoder.memory.weight)
            for module in self.modules():
                if isinstance(module, GroupAttention):
                    query, key, _ = module.qkv.weight.chunk(3)
                    key.copy_(query)
                elif isinstance(module, CrossAttention):
                    module.kv.weight[: len(module.q.weight)] = module.q.weight

    @property
    def blocks(self) -> list[nn.Module]:
        """编码器、解码器的各块。"""
        return [*self.encoder, *self.decoder.blocks]

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """被拿掉区块的均方误差（标准化空间）；训练时随机拿，评测时拿最后一块；无效的场不计，count 是计了几个数。"""
        raw, tokens = self._tokens(torch.cat([batch.history, batch.future], 1), batch.time)  # (B, N, P)、(B, N, D)
        draws = Draws(batch)
        removed = self._draw_removed(draws)  # (B,)
        kept = self.remove_group(tokens, removed)  # (B, (G-1)·n, D)
        noise = None if self.config.noise is None else draws.normal(self.config.noise.size)  # (B, size)
        predicted = self._reconstruct(kept, removed, draws if self.training else None, noise)  # (B, n, P)
        if self.config.predict == "tendency":
            predicted = predicted + self._base(self._take_group(raw, torch.where(removed > 0, removed - 1, 1)))
        error = self.to_frame(predicted) - self.to_frame(self._take_group(raw, removed))  # (B, H, W, k)
        valid = self._take_group(batch.valid[:, self.token_time], removed)[:, :, None]  # (B, n, 1, k)
        if self.can_forecast:
            valid = valid[:, :1]  # (B, 1, 1, k)：一帧里的 token 同真同假
        weight = valid.to(error.dtype).expand_as(error)
        square = error.square() if weights is None else error.square() * weights.mT[:, None]  # (H, 1, k)
        return {"loss": (square * weight).sum() / weight.sum().clamp(min=1), "count": weight.sum()}

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, t-1, k, H, W) → (B, M, 1, k, H, W)，标准化空间；没有噪声而 M > 1、区块不是一帧是 ValueError。"""
        if not self.can_forecast:
            raise ValueError(
                f"grouping {self.config.grouping.model_dump()} trains masked reconstruction only; "
                "a forecast needs one group per frame: {order: t h w, size: frame}"
            )
        return forecast_members(
            self._last_frame, "ar_pred_video_vanilla", self.config.noise, history, time, num_members, generator
        )

    def _last_frame(self, history: Tensor, time: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """(B, t-1, k, H, W)、时刻、噪声 (B, size) → (B, 1, k, H, W)。"""
        raw, tokens = self._tokens(history, time)  # (B, (t-1)·n, P)、(B, (t-1)·n, D)
        removed = torch.full((len(raw),), self.groups - 1, device=raw.device)
        predicted = self._reconstruct(tokens, removed, None, noise)  # (B, n, P)
        if self.config.predict == "tendency":
            predicted = predicted + self._base(raw[:, -self.size :])
        return rearrange(self.to_frame(predicted), "b h w k -> b 1 k h w")

    def _tokens(self, frames: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, k, H, W) → 切成块的场 (B, T·h·w, P)，与加了位置编码的 token (B, T·h·w, D)。"""
        seen = self.inputs(frames, time, wraps=True)
        raw = self.tokenize(rearrange(frames, "b t k h w -> b h w (t k)"))
        if seen is not frames:
            return raw, self.position(self.embed(self.tokenize_inputs(rearrange(seen, "b t k h w -> b h w (t k)"))))
        return raw, self.position(self.embed(raw))

    def _base(self, tokens: Tensor) -> Tensor:
        """(B, n, P) → 差加在上面的。"""
        return self.inputs.base(tokens.unflatten(-1, (-1, self.spec.num_channels)), dim=-1).flatten(-2)

    def _reconstruct(self, tokens: Tensor, removed: Tensor, draws: Draws | None, noise: Tensor | None) -> Tensor:
        """(B, (G-1)·n, D)、(B,) → (B, n, P)；没有 draws 时照 eval_mask。"""
        for block in self.encoder:
            tokens = block(tokens, self._mask(tokens.device, draws), noise)
        return self.decoder(tokens, self.position.of(removed), draws, noise)

    def _draw_removed(self, draws: Draws) -> Tensor:
        """(B,) 各窗口拿掉哪一块。"""
        last = torch.full((draws.count,), self.groups - 1, device=draws.device)
        if not (self.training and self.config.random_patchify):
            return last
        return torch.where(draws.uniform() < self.config.last_group_share, last, draws.integers(self.groups))

    def _take_group(self, tokens: Tensor, which: Tensor) -> Tensor:
        """(B, G·n, X)、(B,) → (B, n, X)。"""
        blocks = tokens.unflatten(1, (self.groups, self.size))
        return blocks[torch.arange(len(which), device=which.device), which]

    def _mask(self, device: torch.device, draws: Draws | None) -> Tensor | BlockMask | None:
        """这一层的遮挡：训练时每对「更晚的区块」按 mask_ratio 各抽一次（全局批共用），评测、预报时全遮或全不遮。"""
        count = self.groups - 1
        later = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
        if draws is not None:
            hidden = later & (torch.rand(count, count, generator=draws.step, device=device) < self.config.mask_ratio)
        elif self.config.eval_mask == "causal":
            hidden = later
        else:
            return None
        return block_mask(hidden, self.size) if self._use_flex(device) else token_mask(hidden, self.size)

    def _use_flex(self, device: torch.device) -> bool:
        """auto：只在 CUDA 上，而且尺寸与 dropout 是 FlexAttention 做得到的，才用它。"""
        chosen = self.config.attention
        if chosen == "flex" and self.training and device.type == "cpu":
            raise ValueError("model.attention = flex cannot train on a CPU (no backward there); use auto or sdpa")
        return chosen == "flex" or (chosen == "auto" and device.type == "cuda" and self.flex_fits)


def _token_grid(config: Config, spec: DataSpec) -> tuple[int, int]:
    if spec.frames_out != 1:
        raise ValueError(f"ar_pred_video_vanilla predicts one frame: data.frames_out = {spec.frames_out}, must be 1")
    p, q = config.token_size
    for length, side, name in ((spec.height, p, "latitude"), (spec.width, q, "longitude")):
        if length % side:
            works = [n for n in range(1, length + 1) if length % n == 0]
            raise ValueError(
                f"model.token_size = {config.token_size} does not divide the grid {spec.height} x {spec.width} "
                f"in {name}: {length} / {side}; sizes that work there: {works}"
            )
    return spec.height // p, spec.width // q


def _num_groups(config: Config, spec: DataSpec, per_frame: int, size: int) -> int:
    total = spec.window * per_frame
    if total % size or total // size < 2:
        works = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
        works = sorted({*works, *(total // n for n in works if n > 1)})
        raise ValueError(
            f"model.grouping.size = {config.grouping.size}: {total} tokens do not split into two or more groups "
            f"of {size}; sizes that work: {works}"
        )
    return total // size
