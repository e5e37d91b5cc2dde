"""模型与引擎之间的约定，只有 Protocol 与两句判断：不给实现，也就不会积攒代码。

引擎造出来的不是预报模型就是阶段一（Learner）；其余的 Protocol 是各有各的本事，没有的不必写。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from models.layers.members import Generators
from util.batch import Batch, Predict

if TYPE_CHECKING:
    from typing_extensions import Self, TypeIs

    from models.layers.padding import Padding


class Network(Protocol):
    """nn.Module 里引擎用到的部分；要真的 nn.Module 的地方（Fabric、EMA、存取）先 assert isinstance。"""

    training: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def to(self, device: torch.device) -> Self: ...


class Forecaster(Protocol):
    """预报用得到的部分：模型，或由它导出的程序。"""

    probabilistic: bool
    can_forecast: bool  # 这一配置能不能预报；AR_pred 的区块不是一帧、PastNet 只训练记忆库时只能重建

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) 标准化的历史 → (B, M, T_out, C, H, W)。

        time: (B, T_in + T_out) int64 UTC 小时；只给了输入文件而不知时刻时为 None。
        generator: 引擎给 B·M 个 CPU 上的发生器，窗口在前、成员在后；每个样本的随机数只取自自己的那一个，
            滚动的下一步接着取，成员因此与怎样分批无关（layers/members.py 的 sample_generators 收下它）。
            只有一个、没有给的，B·M 个种子依次取自它、取自全局。确定性的模型不看。

        Raises:
            ValueError: 确定性模型要求 num_members > 1（集合预报用引擎的 --perturb）；需要时刻而没有；不能预报。
        """
        ...


@runtime_checkable
class ForecastModel(Network, Forecaster, Protocol):
    """预报模型。文件里与 `Model(config, spec, first_stage=None)` 并列一个严格的 `Config`。

    直接给出场的（is_direct）没有自己的 loss：forecast 求得了导，训练用的就是它，与目标的距离由引擎算
    （engine/objective.py）；别的是 OwnObjective。
    做不到的事（AR_pred 只能 T_out = 1、网格不能整除）在构造函数里以 ValueError 说明。
    """


@runtime_checkable
class OwnObjective(ForecastModel, Protocol):
    """有自己的训练目标的预报模型：遮挡重建，去噪，编号的交叉熵。"""

    weighs_fields: bool  # 这一配置的 loss 是场的误差，收得下 weights；编号、潜变量的没有通道与纬度
    field_loss: bool  # 这一配置评测时的 loss 正是预报的场的均方误差：别的距离由引擎在 forecast 上算，持续性预报比得

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """训练目标：键 `loss` 参与求导，其余只记录；随机数由 batch.seeds 定（layers/draws.py），dropout 除外。

        weights: (C, H)，平均为 1，误差逐点乘它；None 是处处相同。
        全局批切成几份走时，各份按 loss 平均了几个数加权：有效的目标场数，不是的由键 `count` 说（不记录）。
        """
        ...


@runtime_checkable
class TeacherForced(Protocol):
    """训练时的预报与使用时的不同的直接模型：看得见真值（ConvLSTM 的 seq2seq）。"""

    def forced_forecast(self, batch: Batch) -> Tensor:
        """(B, 1, T_out, C, H, W)，只在训练时叫。"""
        ...


@runtime_checkable
class Forced(Protocol):
    """接得住外强迫（data.forcings）与只预报、不喂回来的通道（data.roles）的模型，见 layers/forcings.py。"""

    takes_forcings: bool  # 是类的属性，不必造出模型就读得到


@runtime_checkable
class LeadConditioned(Protocol):
    """一次可以走几种时效（data.lead_hours）的模型：走哪一种由目标的时刻看出，见 layers/lead_codes.py。"""

    takes_leads: bool  # 是类的属性，不必造出模型就读得到


@runtime_checkable
class Portable(Protocol):
    """造的时候要读别的文件（预训练的权重、阶段一的检查点）的模型：检查点里另存一份不必读它们的选项。"""

    def portable_options(self) -> dict[str, Any]:
        """与 YAML 的 model 段同样写法，build_model 由它造出同样大小、冻结同样参数的模型，权重另从检查点来。"""
        ...


@runtime_checkable
class Autoencoder(Network, Portable, Protocol):
    """阶段一：场 ⇄ 潜变量；不预报。

    潜变量出来时已经标准化，统计量是 buffer：梯度步走完之后，引擎用最优的权重把训练的每一帧看一遍（observe_latents、
    solve_latents）。阶段二里的同一个对象，权重与统计量都随阶段二的检查点走，选项也是（portable_options）。
    """

    encodes: Predict  # 编码的是场本身，还是相邻两帧之差（标准化的场之差）：encode、decode 里的「场」就是它
    latent_shape: tuple[int, int, int]  # (c, h, w)

    @property
    def latents_known(self) -> bool:
        """统计量有了没有。"""
        ...

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """训练目标：encodes 说的场逐个重建；其余同 OwnObjective.loss，没有 weights。"""
        ...

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


class Quantizer(Protocol):
    """多尺度的码本：各尺度的编号 ⇄ 累加的 f̂。由粗到细 K 个尺度，V 个码。"""

    vocabulary: int  # V
    width: int  # 码的维数
    scales: tuple[tuple[int, int], ...]  # 各尺度的 (h_k, w_k)，末一个是潜变量的网格
    lengths: list[int]  # 各尺度的 token 数
    padding: Padding

    @property
    def codes(self) -> Tensor:
        """(V, width)。"""
        ...

    def lookup(self, indices_k: Tensor, k: int) -> Tensor:
        """第 k 个尺度（从 0 数）的编号 (N, h_k·w_k) → 码 (N, width, h_k, w_k)。"""
        ...

    def add_scale(self, f_hat: Tensor, codes_k: Tensor, k: int) -> Tensor:
        """f̂ (N, width, h, w) 加上第 k 个尺度的码。"""
        ...

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """累加到第 k 个尺度的 f̂ → 第 k + 1 个尺度的输入 (N, width, h_{k+1}, w_{k+1})。"""
        ...

    def teacher_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """头几个（或全部）尺度的编号 → 其中第 2 个起各尺度的输入 (N, L − h_1·w_1, width)。"""
        ...


@runtime_checkable
class TokenAutoencoder(Autoencoder, Protocol):
    """离散的阶段一（VQVAE）：场 ⇄ 各尺度的编号，由粗到细，第 k 个尺度 (N, h_k·w_k) int64。

    encode、decode 走的是量化之后的潜变量（标准化过的 f̂）；编号之间怎样由粗到细，都在 quantizer 里。
    """

    quantizer: Quantizer
    inputs: nn.Module  # 编码差时，差的标准化；编码场时原样

    def encode_tokens(self, fields: Tensor) -> list[Tensor]:
        """(N, C, H, W) 标准化的场 → 各尺度的编号；确定性的。"""
        ...

    def decode_tokens(self, indices: list[Tensor]) -> Tensor:
        """各尺度的编号 → (N, C, H, W) 标准化的场；只给头几个尺度时，是到那里为止的重建。"""
        ...

    def decode_latents(self, f_hat: Tensor) -> Tensor:
        """quantizer 给出的 f̂ (N, c, h, w)，没有标准化过 → (N, C, H, W) 标准化的场。"""
        ...


Learner = ForecastModel | Autoencoder  # build_model 造出来的，引擎训练、存取的


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
class Tuned(Protocol):
    """求解之后还要看一遍验证段才定得下来的 OnePass（岭回归的惩罚）。"""

    tunes: bool  # 这一配置要不要看；惩罚给定了就不必

    def judge(self, batch: Batch) -> None:
        """收下一批步长为 1 的验证窗口；在 solve 之后。"""
        ...

    def choose(self) -> None:
        """看完之后定下来，结果存为 buffer。"""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """每一步之前有事要做的模型（VAR 由粗到细，VQVAE 换码）：走到哪里由引擎说，续训与累积都不会数错。"""

    def at_step(self, step: int, total_steps: int) -> None:
        """第 step 次参数更新（从 0 数，共 total_steps 次）之前。"""
        ...


@runtime_checkable
class Stacked(Protocol):
    """由同样的块叠成的模型：编译、丢弃激活以一块为单位；没有块的模型用不了这两样。"""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """各块，互不包含；每一块都是经它的 __call__ 走的，参数只在那里面用到。"""
        ...


@runtime_checkable
class Undecayed(Protocol):
    """有的参数是二维的却不是矩阵（位置、尺度的表，码本），权重不该衰减。"""

    @property
    def no_decay(self) -> Sequence[str]:
        """它们在 named_parameters 里的名字。"""
        ...


@runtime_checkable
class StartsAnew(Protocol):
    """权重里有的不能从 train.init 抄：权重接着学就会过时的统计量，上一批数据留下的记号。"""

    starts_anew: tuple[str, ...]  # 它们在 state_dict 里的名字，以点结尾的是下面的全部


@runtime_checkable
class PartlyPretrained(Protocol):
    """可以有参数来自预训练的权重的模型。"""

    frozen_are_trained: bool  # 冻结的都是；随机的权重冻结起来，引擎不肯训练


@runtime_checkable
class Pretrained(Protocol):
    """可以不训练就用的阶段一。RAE 不是：读不读预训练的权重，解码器的输出层都是随机的。"""

    all_are_trained: bool  # 全部权重都来自预训练，不只是冻结的那些


@runtime_checkable
class Adjustable(Protocol):
    """有的选项只在预报时才用到（采样的步数、引导的强度），训练好了也可以改。"""

    at_inference: tuple[str, ...]  # 它们的名字；是类的属性，不必造出模型就读得到


@runtime_checkable
class Sampled(Protocol):
    """采样时一次次调同一个网络的模型：导出的就是那个网络。"""

    def network_call(self, history: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """(B, T_in, C, H, W) → 那个网络，与它的一次输入，如加了噪声的未来叠着编码过的历史、时间。"""
        ...


class Memory(Protocol):
    """记忆库：K 个 D 维的码。"""

    @property
    def codes(self) -> Tensor:
        """(K, D)。"""
        ...

    def nearest(self, vectors: Tensor) -> Tensor:
        """(n, D) → (n,) 最近的码。"""
        ...

    def shares(self, index: Tensor) -> Tensor:
        """(n,) 用了哪些码 → 各码所占的份额 (K,)。"""
        ...


@runtime_checkable
class Memorising(Protocol):
    """把一帧的每个位置编成 D 个数、再换成记忆库里最近的码的模型（PastNet）：内在维数量的就是这些编码。"""

    memory: Memory
    latent_step: int  # D 只能是它的倍数

    def latents(self, frames: Tensor, time: Tensor | None) -> Tensor:
        """(B, T, C, H, W)、时刻 (B, ≥ T) → (B·T·h·w, D)：每个位置上量化之前的编码。"""
        ...


@runtime_checkable
class Donor(Protocol):
    """两头训练好了、给别的模型用的（rae_direct）：权重由 engine.studies.stage1_direct 分开存。"""

    @property
    def decoder(self) -> nn.Module:
        """潜变量 → 场。"""
        ...

    @property
    def in_adapter(self) -> nn.Module:
        """历史 → 主干看的三个通道。"""
        ...


def is_codec(model: object) -> TypeIs[Autoencoder]:
    """是不是阶段一；预报的若也能编码解码，潜变量没有人用，不算。"""
    return isinstance(model, Autoencoder) and not isinstance(model, ForecastModel)


def is_direct(model: object) -> TypeGuard[ForecastModel]:
    """直接给出场、没有自己的训练目标的。"""
    return isinstance(model, ForecastModel) and not isinstance(model, OwnObjective)


def can_forecast(model: object) -> TypeGuard[ForecastModel]:
    """预报得了吗；预报模型也有只能训练重建的配置。"""
    return isinstance(model, ForecastModel) and model.can_forecast
