"""VAR：下一尺度预测。场先由多尺度 VQVAE 换成由粗到细的编号，一个 Transformer 按尺度逐个预报它们；抽几次就是几个成员。

论文：Tian et al. 2024（NeurIPS），Visual Autoregressive Modeling；网络与初值见 models/layers/var_blocks.py，条件见
var_condition.py，采样见 var_sampling.py，编号怎样来见 multiscale.py。天气上没有公开的先例，历史条件是这里加的：

* `condition: history`：条件是过去几帧的潜变量，四条路（总看得见的 token、调制、起始向量、各处的输入）各有开关。
  一个金字塔是一帧：预报几帧就滚几次，生成的帧接进历史再编码，与引擎滚动同一条路，所以一份权重可以报任意远；训练时每个窗口随机取一个
  时效作目标，它前面的真实各帧作历史。（另一种做法是几帧叠在通道里共用一个金字塔：阶段一要另为几帧训练，时效也定死了。）
  阶段一编码差（vqvae 的 `encodes: tendency`）时，生成的是下一帧与最后一帧之差，条件是切成块的场与差（patches_of）。
* `condition: month`：原版的类别条件，类别是目标所在的月份。它不看历史，「预报」就是那个月的气候的一个样本，
  照没有历史的预报如实计分。

损失：教师强制，各尺度的交叉熵，一个 token 的份量是 1 / L，训练时可以标签平滑。一帧里有一个通道无效，整帧不作目标：
潜变量混着各个通道。阶段一总是冻结的。

字母：B 批，M 成员，N 样本数，T_in / T_out 帧数，n 历史帧数，C 通道，H×W 网格；L token 数，K 尺度数，V 码数。
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from models.interface import Autoencoder, TokenAutoencoder
from models.layers.attention import check_heads
from models.layers.draws import Draws
from models.layers.latents import encode_frames, require_states
from models.layers.members import Generators, sample_generators
from models.layers.var_blocks import ScaleTransformer, initialise
from models.layers.var_condition import MONTHS, TABLES, HistoryCondition, LabelCondition, month_of, patches_of
from models.layers.var_sampling import Sampling, sample
from util.batch import Batch, DataSpec
from util.strict import PositiveInt, Strict

LEAST_WEIGHT = 0.01  # 新加的尺度起步时的份量


class History(Strict):
    """历史条件，见 HistoryCondition。"""

    frames: PositiveInt | None = None
    """last frames of history that are seen; null: all"""
    context: bool = True
    """as tokens seen by all scales"""
    adaln: bool = True
    """as a vector that modulates the layers"""
    start: bool = True
    """as the input of the first scale"""
    local: bool = True
    """as the surroundings of each place, added to the input of each scale"""

    @model_validator(mode="after")
    def _some_way(self) -> History:
        if not (self.context or self.adaln or self.start or self.local):
            raise ValueError("context, adaln, start and local are all false: nothing of the history is seen")
        return self


class Progressive(Strict):
    """由粗到细地训练：尺度从 first_scales 个起，到 until 为止均匀地一个个加入。"""

    first_scales: PositiveInt
    """scales at the beginning"""
    until: float = Field(gt=0, lt=1)
    """share of the training after which there are all"""
    warmup_steps: int = Field(default=0, ge=0)
    """updates in which a new scale's weight rises from 0.01 to 1"""


class Config(Strict):
    """VAR 的选项；尺度与码本来自阶段一。原版的 width = 64·depth，heads = depth。condition = month 时不看 history。"""

    first_stage: str | dict[str, Any]
    """checkpoint of a vqvae"""
    condition: Literal["history", "month"] = "history"
    """history: the frames before; month: that of the target alone"""
    history: History = History()
    """which way history is seen; at least one of the four"""
    depth: PositiveInt = 16
    """blocks; the original has width = 64 depth, heads = depth"""
    width: PositiveInt = 1024
    """width"""
    heads: PositiveInt = 16
    """attention heads; must divide width"""
    shared_adaln: bool = False
    """one modulation for all layers, which add offsets"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """chance that the last block's branches are left out"""
    residual_gain: float = Field(1e-3, gt=0)
    """gain of the residuals at the beginning"""
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """training: chance that the condition is hidden, which sampling.cfg needs"""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """of the cross-entropy, in training"""
    progressive: Progressive | None = None
    """train from coarse to fine; null: all scales at once"""
    sampling: Sampling = Sampling()
    """how members are drawn; may change after training (--set)"""

    @model_validator(mode="after")
    def _unconditional(self) -> Config:
        if self.sampling.cfg and not self.condition_dropout:
            raise ValueError(
                f"sampling.cfg = {self.sampling.cfg:g} guides away from the unconditional branch, which "
                "condition_dropout = 0 never trains; give condition_dropout, e.g. 0.1"
            )
        return self

    @field_validator("heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        return check_heads(heads, info.data["width"], "width") if "width" in info.data else heads


class Model(nn.Module):
    """阶段一、条件、Transformer。Portable：检查点里内嵌阶段一的选项与权重；Scheduled：由粗到细地训练。

    Raises:
        ValueError: 阶段一给不出多尺度的编号；历史没有那么多帧；尺度没有那么多。
    """

    probabilistic = True
    can_forecast = True
    field_loss = weighs_fields = False
    at_inference = ("sampling",)
    starts_anew = ("first_stage.quantizer.codebook.dead", "first_stage.quantizer.codebook.replacements")

    def __init__(self, config: Config, spec: DataSpec, first_stage: Autoencoder) -> None:
        super().__init__()
        self.config = config
        self.first_stage = check_tokens(config, first_stage).requires_grad_(False)
        self.frames_in, self.frames_out = spec.frames_in, spec.frames_out
        self.frames = check_frames(config, spec)
        self.tendency = first_stage.encodes == "tendency"
        quantizer = self.first_stage.quantizer
        lengths = [h * w for h, w in quantizer.scales]
        check_progressive(config.progressive, len(lengths))
        self.net = ScaleTransformer(
            lengths, quantizer.width, quantizer.vocabulary, config.width, config.depth, config.heads,
            config.drop_path, config.shared_adaln,
        )  # fmt: skip
        if config.condition == "month":
            self.condition = LabelCondition(MONTHS, config.width)
        else:
            ways = config.history.model_dump(exclude={"frames"})
            channels, height, width = first_stage.latent_shape
            if self.tendency:
                channels = spec.num_channels * spec.height * spec.width // (height * width)
            frame = (channels, height, width)
            self.condition = HistoryCondition(
                self.frames, frame, quantizer.scales, config.width, **ways, padding=quantizer.padding
            )
        initialise([self.net, self.condition], self.net, config.residual_gain)
        self.active = len(lengths)  # 训练到几个尺度；份量各是多少（张量：天天在变而不必重新编译）
        self.weights = nn.Buffer(torch.ones(len(lengths)), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> Model:
        """阶段一是冻结的，永远 eval。"""
        super().train(mode)
        self.first_stage.eval()
        return self

    def at_step(self, step: int, total_steps: int) -> None:
        """这一步训练头几个尺度，份量各是多少。

        Raises:
            ValueError: 到训练末了，最细的尺度一步也没有足份地训练过。
        """
        plan = self.config.progressive
        if plan is not None:
            last = scale_weights(total_steps - 1, total_steps, plan, len(self.weights))
            if len(last) < len(self.weights) or last[-1] < 1:
                raise ValueError(
                    f"model.progressive: until = {plan.until:g} and warmup_steps = {plan.warmup_steps} leave the "
                    f"finest scale no step at full weight; the training has {total_steps} steps"
                )
            weights = scale_weights(step, total_steps, plan, len(self.weights))
            self.active = len(weights)
            self.weights[: self.active] = torch.tensor(weights, device=self.weights.device)

    def portable_options(self) -> dict[str, Any]:
        """阶段一的检查点换成它自己的选项。"""
        return {"name": "var", **self.config.model_dump(), "first_stage": self.first_stage.portable_options()}

    @property
    def blocks(self) -> list[nn.Module]:
        """各层。"""
        return list(self.net.blocks)

    @property
    def no_decay(self) -> list[str]:
        """不衰减的参数：位置与尺度的编码。"""
        return [name for name, _ in self.named_parameters() if name.rpartition(".")[2] in TABLES]

    def network_call(self, history: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """各尺度编号的 logits；输入是历史（或月份）与编号。"""
        given = history.new_zeros(len(history)).long() if self.config.condition == "month" else history
        return ScaleLogits(self), (given, history.new_zeros(len(history), sum(self.net.lengths)).long())

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """有效目标帧的交叉熵；另给出各尺度的交叉熵、命中率，与预报用到了几成的码。

        训练时每个窗口随机取一个时效，评测时各个时效都算，一个个地来：峰值内存与训练的相同。
        """
        count = len(batch.history)
        if self.training:
            draws = Draws(batch)
            kept = draws.uniform() >= self.config.condition_dropout
            return self._loss(*self._pairs(batch, draws.integers(self.frames_out)), kept)
        leads = torch.arange(self.frames_out, device=batch.time.device)
        pairs = [self._pairs(batch, lead.expand(count)) for lead in leads]
        everyone = torch.ones(count, dtype=torch.bool, device=batch.time.device)
        parts = [self._loss(*pair, everyone) for pair in pairs]
        shares = torch.stack([valid.sum() for _, _, valid in pairs]).float()
        shares = shares / shares.sum().clamp(min=1)
        return {name: (torch.stack([part[name] for part in parts]) * shares).sum() for name in parts[0]}

    def _loss(self, frames: Tensor, hours: Tensor, valid: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """_pairs 与哪些样本看得见条件 kept (N,) → 各项。阶段一不在自动的半精度里算：预报时也不在，编号才是同样的。"""
        with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
            month = self.config.condition == "month"
            given = month_of(hours) if month else self._given(self._kept(frames[:, :-1]))
            target = frames[:, -1] - frames[:, -2] if self.tendency else frames[:, -1]
            indices = self.first_stage.encode_tokens(target)
        active = self.active if self.training else len(self.weights)
        weights = self.weights[:active] if self.training else torch.ones_like(self.weights)
        indices, lengths = indices[:active], self.net.lengths[:active]
        logits = self.net(self.condition(given, kept), self.first_stage.quantizer.teacher_inputs(indices))
        targets = torch.cat(indices, 1)  # (N, n)
        smoothing = self.config.label_smoothing if self.training else 0.0
        entropy = F.cross_entropy(logits.mT, targets, label_smoothing=smoothing, reduction="none")  # (N, n)
        share = valid.to(entropy.dtype)[:, None] / valid.sum().clamp(min=1)
        per_token = (entropy * share).sum(0)  # (n,) 有效样本的平均
        sums = torch.stack([part.sum() for part in per_token.split(lengths)])  # 各尺度
        loss = (sums * weights).sum() / sum(self.net.lengths)
        return {"loss": loss, **self._terms(logits.detach(), targets, per_token.detach(), share, lengths)}

    def _pairs(self, batch: Batch, lead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """各窗口的时效 lead (B,) → 目标帧与它前面的 n 帧 (B, n + 1, C, H, W)、目标的时刻 (B,)、目标是否全有效 (B,)。"""
        window = torch.cat([batch.history, batch.future], 1)
        row = torch.arange(len(window), device=window.device)
        target = self.frames_in + lead
        back = torch.arange(-self.frames, 1, device=window.device)
        valid = batch.valid[row, target].all(-1)
        if self.tendency:  # 与阶段一相同：两帧都有效的差才是目标
            valid = valid & batch.valid[row, target - 1].all(-1)
        return window[row[:, None], target[:, None] + back], batch.time[row, target], valid

    def _kept(self, frames: Tensor) -> Tensor:
        """历史 (N, n, C, H, W) → 滚动时留着的：编码差时是场本身；编码场时是潜变量 (N, n, c, h, w)，一帧只编码一次。"""
        return frames if self.tendency else encode_frames(self.first_stage, frames)

    def _given(self, kept: Tensor) -> Tensor:
        """_kept → HistoryCondition 要的 (N, n, ·, h, w)。"""
        _, height, width = self.first_stage.latent_shape
        return patches_of(kept, self.first_stage.inputs, height, width) if self.tendency else kept

    def _terms(
        self, logits: Tensor, targets: Tensor, per_token: Tensor, share: Tensor, lengths: list[int]
    ) -> dict[str, Tensor]:
        """各尺度的平均；尺度从 1 数起，末一个就是公开代码日志里的 tail。"""
        guess = logits.argmax(-1)  # (N, n)
        hit = ((guess == targets) * share).sum(0)
        used = torch.zeros(logits.shape[-1], device=logits.device).index_fill_(0, guess.flatten(), 1.0)
        terms = {"predicted_codes": used.mean()}
        for k, (losses, hits) in enumerate(zip(per_token.split(lengths), hit.split(lengths), strict=True), 1):
            terms[f"loss_scale_{k}"], terms[f"accuracy_scale_{k}"] = losses.mean(), hits.mean()
        return terms

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)；一帧一个金字塔。

        Raises:
            ValueError: condition = month 而不知道时刻。
        """
        stage, month = self.first_stage, self.config.condition == "month"
        if month and time is None:
            raise ValueError("var with model.condition = month needs the time of the forecast: give --time")
        generators = sample_generators(len(history) * num_members, generator)
        kept = None if month else self._kept(history[:, -self.frames :]).repeat_interleave(num_members, 0)
        last = history[:, -1].repeat_interleave(num_members, 0)  # (B·M, C, H, W)
        made: list[Tensor] = []
        for lead in range(self.frames_out):
            if kept is None:
                assert time is not None
                given = month_of(time[:, self.frames_in + lead]).repeat_interleave(num_members)
            else:
                if made:
                    kept = torch.cat([kept[:, 1:], self._kept(last[:, None])], 1)
                given = self._given(kept)
            f_hat = sample(self.net, stage.quantizer, self.condition, given, self.config.sampling, generators)
            decoded = stage.decode_latents(f_hat)
            last = last + decoded if self.tendency else decoded
            made.append(last)
        return torch.stack(made, 1).unflatten(0, (len(history), num_members))


class ScaleLogits(nn.Module):
    """Transformer 的一次调用，条件与编号的嵌入在内：一个尺度只看得见更粗的，所以逐尺度采样时后面的编号随便填。"""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor, indices: Tensor) -> Tensor:
        """历史 (N, T_in, C, H, W)（condition = month 时是月份 (N,)）、各尺度的编号 (N, n) → (N, n, V)。"""
        model = self.model
        if model.config.condition != "month":
            given = model._given(model._kept(given[:, -model.frames :]))
        inputs = model.first_stage.quantizer.teacher_inputs(indices.split(model.net.lengths, 1))
        everyone = torch.ones(len(given), dtype=torch.bool, device=given.device)
        return model.net(model.condition(given, everyone), inputs)


def scale_weights(step: int, total_steps: int, progressive: Progressive, num_scales: int) -> list[float]:
    """第 step 步（从 0 数）各尺度的份量，长度就是几个尺度；第 i 个新尺度在 until·total_steps·i / 新尺度数 步时加入。"""
    new = num_scales - progressive.first_scales
    last = progressive.until * total_steps
    joins = [math.ceil(last * i / new) for i in range(1, new + 1)]
    added = sum(step >= join for join in joins)
    weights = [1.0] * (progressive.first_scales + added)
    if added:
        since, warmup = step - joins[added - 1], progressive.warmup_steps
        weights[-1] = 1.0 if since >= warmup else max(LEAST_WEIGHT, since / warmup)
    return weights


def check_tokens(config: Config, first_stage: Autoencoder) -> TokenAutoencoder:
    """阶段一要给得出多尺度的编号；给月份的，要编码场。

    Raises:
        ValueError: 给不出（SD VAE、RAE）；编码差而条件是月份。
    """
    if not isinstance(first_stage, TokenAutoencoder):
        source = config.first_stage if isinstance(config.first_stage, str) else config.first_stage.get("name")
        raise ValueError(
            f"model.first_stage = {source}: gives no tokens of several scales; config/vqvae.yaml trains one"
        )
    if config.condition == "month":
        require_states(first_stage)
    return first_stage


def check_frames(config: Config, spec: DataSpec) -> int:
    """条件用几帧历史；month 时不用。

    Raises:
        ValueError: 历史没有那么多帧。
    """
    if config.condition == "month":
        return 0
    frames = config.history.frames or spec.frames_in
    if frames > spec.frames_in:
        raise ValueError(f"data.frames_in = {spec.frames_in}: model.history.frames = {frames} asks for more")
    return frames


def check_progressive(progressive: Progressive | None, num_scales: int) -> None:
    """起初的尺度要比全部的少。

    Raises:
        ValueError: 不比全部的少。
    """
    if progressive is not None and progressive.first_scales >= num_scales:
        raise ValueError(
            f"model.progressive = {progressive.model_dump()}: the first stage has {num_scales} scales, so first_scales "
            f"is at most {num_scales - 1}"
        )
