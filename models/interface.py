"""模型与引擎之间的约定，只有 Protocol：不给实现，也就不会积攒代码。"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Generator, Tensor

from util.batch import Batch

if TYPE_CHECKING:
    from models.layers.frames import Predict
    from models.layers.multiscale import MultiScaleQuantizer


@runtime_checkable
class ForecastModel(Protocol):
    """预报模型。文件里与 `Model(config, spec, first_stage=None)` 并列一个严格的 `Config`。

    做不到的事（AR_pred 只能 T_out = 1、网格不能整除）在构造函数里以 ValueError 说明。
    """

    probabilistic: bool
    can_forecast: bool  # 这一配置能不能预报；AR_pred 的区块不是一帧时只能训练重建

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """训练目标：键 `loss` 参与求导，其余只记录；随机数取自全局发生器。"""
        ...

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) 标准化的历史 → (B, M, T_out, C, H, W)。

        time: (B, T_in + T_out) int64 UTC 小时；只给了输入文件而不知时刻时为 None。

        Raises:
            ValueError: 确定性模型要求 num_members > 1（集合预报用引擎的 --perturb）；需要时刻而没有。
        """
        ...


@runtime_checkable
class OnePass(Protocol):
    """先把训练数据看一遍的模型（气候态、岭回归、像素 U-Net 的极值）：在任何梯度步之前求解，续训时不再看。"""

    needs_pass: bool  # 这一配置要不要看；像素 U-Net 不缩放时不必

    def accumulate(self, batch: Batch) -> None:
        """收下一批步长为 1 的训练窗口。"""
        ...

    def solve(self) -> None:
        """看完之后求解，结果存为 buffer。"""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """每一步之前有事要做的模型（VAR 由粗到细，VQVAE 换码）：走到哪里由引擎说，续训与累积都不会数错。"""

    def at_step(self, step: int, total_steps: int) -> None:
        """第 step 次参数更新（从 0 数，共 total_steps 次）之前。"""
        ...


@runtime_checkable
class Autoencoder(Protocol):
    """阶段一：场 ⇄ 潜变量；与 ForecastModel 一样有 loss（各帧摊平了重建），can_forecast 为假。

    潜变量出来时已经标准化，统计量是 buffer：梯度步走完之后，引擎用最优的权重把训练的每一帧看一遍（observe_latents、
    solve_latents）。阶段二里的同一个对象，权重与统计量都随阶段二的检查点走。
    """

    encodes: Predict  # 编码的是场本身，还是相邻两帧之差（标准化的场之差）：encode、decode 里的「场」就是它
    latent_shape: tuple[int, int, int]  # (c, h, w)
    latents_known: bool  # 统计量有了没有
    frozen_are_trained: bool  # 冻结的参数来自预训练的权重；随机的权重冻结起来，引擎不肯训练

    def freeze(self, encoder: bool, decoder: bool) -> None:
        """encode、decode 各自用到的参数学不学；自己的选项与阶段二的选项都走这里。"""
        ...

    def encode(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) 标准化的场 → (N, c, h, w) 标准化的潜变量；确定性的。"""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """encode 的逆：(N, c, h, w) → (N, C, H, W)。"""
        ...

    def observe_latents(self, batch: Batch) -> None:
        """收下一批训练窗口的潜变量。"""
        ...

    def solve_latents(self) -> None:
        """统计量求出来，存为 buffer。"""
        ...


@runtime_checkable
class Pretrained(Protocol):
    """可以不训练就用的阶段一。RAE 不是：读不读预训练的权重，解码器的输出层都是随机的。"""

    all_are_trained: bool  # 全部权重都来自预训练，不只是冻结的那些


@runtime_checkable
class TokenAutoencoder(Autoencoder, Protocol):
    """离散的阶段一（VQVAE）：场 ⇄ 各尺度的编号，由粗到细，第 k 个尺度 (N, h_k·w_k) int64。

    encode、decode 走的是量化之后的潜变量（标准化过的 f̂）；编号之间怎样由粗到细，都在 quantizer 里。
    """

    quantizer: MultiScaleQuantizer

    def encode_tokens(self, fields: Tensor) -> list[Tensor]:
        """(N, C, H, W) 标准化的场 → 各尺度的编号；确定性的。"""
        ...

    def decode_tokens(self, indices: list[Tensor]) -> Tensor:
        """各尺度的编号 → (N, C, H, W) 标准化的场。"""
        ...

    def decode_latents(self, f_hat: Tensor) -> Tensor:
        """quantizer 给出的 f̂ (N, c, h, w)，没有标准化过 → (N, C, H, W) 标准化的场。"""
        ...


@runtime_checkable
class Portable(Protocol):
    """造的时候要读别的文件（预训练的权重、阶段一的检查点）的模型：检查点里另存一份不必读它们的选项。"""

    def portable_options(self) -> dict[str, Any]:
        """与 YAML 的 model 段同样写法，build_model 由它造出同样大小、冻结同样参数的模型，权重另从检查点来。"""
        ...


def is_codec(model: Any) -> bool:
    """是不是阶段一；能预报的（RAE 直接预报）虽有编码解码，潜变量没有人用。"""
    return not model.can_forecast and isinstance(model, Autoencoder)
