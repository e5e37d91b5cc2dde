"""PastNet：傅里叶支路（块 → 谱域的滤波 → 格点）加离散的时空支路（编码 → 记忆库 → 传播 → 解码），两路的输出相加。

论文：Wu et al. 2024（ACM MM），PastNet: Introducing Physical Inductive Biases for Spatio-temporal Video Prediction。
传播就是 SimVP 的 Inception 翻译器。与公开的代码不同之处：
* 它算了 commitment 又丢掉；这里按 `commitment` 的权重加进损失。
* 感知机的第二个 Linear 它从未用到（由 2 倍宽取相邻两个的平均回到原宽），这里没有；码本与它的滑动平均是 buffer。
* 滤波第二层的虚部它用了已被改写的实部；这里是真的复数乘法，全部波数，网格可以是长方形。
  经度上不到三块时，虚部的偏置没有梯度（正负波数的贡献相消），构造时就拒绝。
* 尺寸不写死：网格、通道数、latent_dim、patch 任意（能整除即可）。
* T_out ≠ T_in：传播的最后一块给出 T_out·D 个通道；傅里叶支路逐帧时取输入的最后 T_out 帧，输出更长时余下的都接最后一帧。
* `fourier_frames`：each 如原版，傅里叶支路逐帧，第 j 帧输出只看一帧输入，看不见变化；all 把历史叠进通道，一次给出各帧。
* `padding: circular_lon` 时卷积的经度是一圈；傅里叶支路没有接缝，但它的偏置与 ReLU 认得经度，转一圈格子结果不同。
* 它的预训练已不能运行；这里 `task: reconstruct` 只造编码器、记忆库、解码器，逐帧重建，再由 `train.init` 带进预报，
  `freeze_memory` 冻结编码器与码本。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格，D = latent_dim，h×w = H/4 × W/4，N 帧的总数，d = fourier_dim。
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from models.layers.batch_norm import BatchNorm2d
from models.layers.forcings import Inputs
from models.layers.frames import partner_frames, to_state
from models.layers.inception import GROUPS, KERNELS, Inception, InceptionTranslator
from models.layers.losses import refuse_members, target_mse
from models.layers.members import Generators
from models.layers.memory_bank import MemoryBank
from models.layers.padding import PaddedConv2d, PaddedConvTranspose2d, Padding, check_padding
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Strict

SHRINK = 4  # 编码器把边长缩小几倍；傅里叶支路前两层转置卷积也放大这么多
BLOCKS = 4  # 谱域滤波的分块对角
COLUMNS = 3  # 经度上至少几块，见文件开头
Addend = Literal["released", "identity"]
EXPAND = 2  # 傅里叶支路感知机的宽度，随后取相邻 EXPAND 个的平均


class Config(Strict):
    """PastNet 的选项，名字取自原版；task、fourier_frames 见文件开头。第一层的宽度是 width 的一半。"""

    task: Literal["forecast", "reconstruct"] = "forecast"
    """reconstruct: encoder, memory bank and decoder alone, for train.init; it has no keys of the other parts"""
    width: int = Field(128, ge=2, multiple_of=2)
    """channels of encoder and decoder"""
    res_units: PositiveInt = 32
    """channels inside a residual unit"""
    res_layers: PositiveInt = 4
    """residual units"""
    residual: Addend = "identity"
    """what a residual unit adds to: x, or relu(x) as the released code"""
    latent_dim: int = Field(64, ge=GROUPS, multiple_of=GROUPS)
    """numbers of a code"""
    codebook_size: int = Field(512, ge=2)
    """codes"""
    commitment: float = Field(0.25, ge=0)
    """weight of the commitment loss"""
    padding: Padding = "zeros"
    hid_T: int = Field(256, ge=2 * GROUPS, multiple_of=2 * GROUPS)  # 块内是 hid_T / 2 个通道
    """channels of the propagation"""
    N_T: int = Field(8, ge=2)
    """blocks of the propagation, down and up"""
    patch: list[PositiveInt] = Field([16, 16], min_length=2, max_length=2)
    """[rows, columns] of grid points in a patch of the Fourier branch, multiples of 4 that divide the grid"""
    fourier_dim: int = Field(128, ge=BLOCKS, multiple_of=BLOCKS)
    """width of the Fourier branch"""
    fourier_frames: Literal["each", "all"] = "each"
    """Fourier branch: each frame by itself, or all of history together"""
    predict: Predict = "state"
    freeze_memory: bool = False
    """encoder and codes do not learn; with train.init"""

    @field_validator("hid_T", "N_T", "patch", "fourier_dim", "fourier_frames", "predict", "freeze_memory")
    @classmethod
    def _belongs_to_forecast(cls, value: object, info: ValidationInfo) -> object:  # 只在写了这个键时才查
        if info.data.get("task") == "reconstruct":
            raise ValueError("has no meaning for model.task = reconstruct; leave it out")
        return value


class Halve(nn.Conv2d):
    """4 × 4、步长 2 的卷积，边长恰好减半；circular_lon 时经度是一圈。"""

    def __init__(self, channels_in: int, channels_out: int, padding: Padding) -> None:
        super().__init__(channels_in, channels_out, 4, stride=2, padding=1)
        self.circular = padding == "circular_lon"

    def forward(self, input: Tensor) -> Tensor:  # (N, C, 2h, 2w) → (N, C', h, w)
        if not self.circular:
            return super().forward(input)
        wrapped = F.pad(input, (1, 1, 0, 0), mode="circular")
        return F.conv2d(wrapped, self.weight, self.bias, self.stride, (1, 0))


class Residual(nn.Module):
    """[ReLU、3 × 3、BN、ReLU、1 × 1、BN]，加回；加的是 x，还是公开代码的 relu(x)，见 Config。"""

    def __init__(self, width: int, hidden: int, padding: Padding, residual: Addend) -> None:
        super().__init__()
        self.released = residual == "released"
        self.block = nn.Sequential(
            nn.ReLU(),
            PaddedConv2d(width, hidden, 3, padding, bias=False),
            BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False),
            BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x.relu() if self.released else x) + self.block(x)


def make_encoder(channels: int, config: Config) -> nn.Sequential:
    """(N, C, H, W) → (N, D, h, w)，逐帧。"""
    width, padding = config.width, config.padding
    return nn.Sequential(
        Halve(channels, width // 2, padding),
        nn.ReLU(),
        Halve(width // 2, width, padding),
        nn.ReLU(),
        PaddedConv2d(width, width, 3, padding),
        *(Residual(width, config.res_units, padding, config.residual) for _ in range(config.res_layers)),
        nn.ReLU(),
        nn.Conv2d(width, config.latent_dim, 1),
    )


def make_decoder(channels: int, config: Config) -> nn.Sequential:
    """(N, D, h, w) → (N, C, H, W)，逐帧。"""
    width, padding = config.width, config.padding
    return nn.Sequential(
        PaddedConv2d(config.latent_dim, width, 3, padding),
        *(Residual(width, config.res_units, padding, config.residual) for _ in range(config.res_layers)),
        nn.ReLU(),
        PaddedConvTranspose2d(width, width // 2, 4, 2, padding),
        nn.ReLU(),
        PaddedConvTranspose2d(width // 2, channels, 4, 2, padding),
    )


class ComplexLinear(nn.Module):
    """复数的线性层，权重分块对角；实部、虚部分开存放（第一维），参数仍是实数。"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        size = dim // BLOCKS
        self.weight = nn.Parameter(0.02 * torch.randn(2, BLOCKS, size, size))
        self.bias = nn.Parameter(0.02 * torch.randn(2, BLOCKS, size))

    def forward(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        """(…, BLOCKS, d / BLOCKS) 的实部与虚部 → 同形。"""
        return (
            self._mix(real, 0) - self._mix(imag, 1) + self.bias[0],
            self._mix(imag, 0) + self._mix(real, 1) + self.bias[1],
        )

    def _mix(self, x: Tensor, part: int) -> Tensor:
        return torch.einsum("...bi,bio->...bo", x, self.weight[part])


class FourierFilter(nn.Module):
    """谱域的滤波：各波数过同一个两层的复数网络，中间对实部、虚部各作 ReLU（Guibas et al. 2022，AFNO）。"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = ComplexLinear(dim), ComplexLinear(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, h', w', d) → 同形，float32。"""
        with torch.autocast(x.device.type, enabled=False):  # 半精度没有 FFT
            spectrum = torch.fft.rfft2(x.float(), dim=(1, 2), norm="ortho")  # (N, h', w'/2 + 1, d)
            real, imag = (part.unflatten(-1, (BLOCKS, -1)) for part in (spectrum.real, spectrum.imag))
            real, imag = self.first(real, imag)
            real, imag = self.second(real.relu(), imag.relu())
            return torch.fft.irfft2(torch.complex(real, imag).flatten(-2), x.shape[1:3], dim=(1, 2), norm="ortho")


class FourierBranch(nn.Module):
    """块的嵌入与位置编码 → 一层（滤波、感知机，各自残差）→ 三层转置卷积回到格点。"""

    def __init__(self, channels: tuple[int, int], grid: tuple[int, int], dim: int, patch: tuple[int, int]) -> None:
        """channels：进、出的通道数；grid：网格的边长。"""
        super().__init__()
        channels_in, channels_out = channels
        size = grid[0] // patch[0], grid[1] // patch[1]
        last = (patch[0] // SHRINK, patch[1] // SHRINK)
        self.embed = nn.Conv2d(channels_in, dim, patch, patch)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(*size, dim), std=0.02))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.filter = FourierFilter(dim)
        self.widen = nn.Linear(dim, EXPAND * dim)
        nn.init.trunc_normal_(self.widen.weight, std=0.02)
        nn.init.zeros_(self.widen.bias)
        self.to_grid = nn.Sequential(
            nn.ConvTranspose2d(dim, 16 * channels_out, 2, 2),
            nn.Tanh(),
            nn.ConvTranspose2d(16 * channels_out, 4 * channels_out, 2, 2),
            nn.Tanh(),
            nn.ConvTranspose2d(4 * channels_out, channels_out, last, last),
        )

    def forward(self, frames: Tensor) -> Tensor:
        """(N, channels_in, H, W) → (N, channels_out, H, W)。"""
        x = self.embed(frames).movedim(1, -1) + self.position  # (N, H/p, W/q, d)
        x = x + self.filter(self.norm1(x))
        x = x + F.gelu(self.widen(self.norm2(x))).unflatten(-1, (-1, EXPAND)).mean(-1)
        return self.to_grid(self.norm3(x).movedim(-1, 1))


class Model(nn.Module):
    """两条支路，或（task: reconstruct）只有离散支路的编码器、记忆库、解码器；两种任务里同名的部分形状相同。

    Raises:
        ValueError: 网格不能缩小 4 倍，或 patch 不合；一圈的经度比核还窄。
    """

    probabilistic = False
    field_loss = False  # 另有 commitment
    weighs_fields = True
    takes_forcings = True
    latent_step = GROUPS

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        self.config = config
        self.can_forecast = config.task == "forecast"
        _check_grid(config, spec)
        self.inputs = Inputs(spec)
        self.encoder = make_encoder(self.inputs.channels, config)
        self.memory = MemoryBank(config.codebook_size, config.latent_dim)
        self.decoder = make_decoder(spec.num_channels, config)
        if not self.can_forecast:
            return
        self.partners = partner_frames(spec.frames_in, spec.frames_out)
        sizes = spec.frames_in * config.latent_dim, spec.frames_out * config.latent_dim
        self.propagation = InceptionTranslator(*sizes, config.hid_T, config.N_T, config.padding)
        together = config.fourier_frames == "all"
        channels = (
            spec.frames_in * self.inputs.channels if together else self.inputs.channels,
            spec.frames_out * spec.num_channels if together else spec.num_channels,
        )
        patch = config.patch[0], config.patch[1]
        self.fourier = FourierBranch(channels, (spec.height, spec.width), config.fourier_dim, patch)
        if config.freeze_memory:
            self.encoder.requires_grad_(False)
            self.train()  # 从第一次前向起就不走

    def train(self, mode: bool = True) -> Model:
        """冻结时编码器的 BatchNorm 与码本也不再走。"""
        super().train(mode)
        if self.config.freeze_memory:
            self.encoder.eval()
            self.memory.eval()
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """离散支路的各块。"""
        return [module for module in self.modules() if isinstance(module, Residual | Inception)]

    def forward(self, history: Tensor, time: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T_in, C, H, W)、时刻 → 预报 (B, T_out, C, H, W)、commitment、困惑度。"""
        count, seen = len(history), self.inputs(history, time)
        codes, commitment, perplexity = self.memory(self.encoder(seen.flatten(0, 1)))  # (B·T_in, D, h, w)
        codes = self.propagation(codes.unflatten(0, (count, -1)).flatten(1, 2))  # (B, T_out·D, h, w)
        codes = codes.unflatten(1, (len(self.partners), -1)).flatten(0, 1)  # (B·T_out, D, h, w)
        fields = self.decoder(codes).unflatten(0, (count, -1)) + self.filtered(seen)  # (B, T_out, C, H, W)
        return to_state(fields, self.inputs.base(history), self.config.predict), commitment, perplexity

    def filtered(self, history: Tensor) -> Tensor:
        """傅里叶支路的一份：网络看的 (B, T_in, channels, H, W) → (B, T_out, C, H, W)。"""
        if self.config.fourier_frames == "all":
            return self.fourier(history.flatten(1, 2)).unflatten(1, (len(self.partners), -1))
        return self.fourier(history[:, self.partners].flatten(0, 1)).unflatten(0, (len(history), -1))

    def reconstruct(self, window: Tensor, time: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C, H, W)、时刻 → 逐帧的重建、commitment、困惑度。"""
        seen = self.inputs(window, time).flatten(0, 1)
        codes, commitment, perplexity = self.memory(self.encoder(seen))  # (B·T, D, h, w)
        return self.decoder(codes).unflatten(0, window.shape[:2]), commitment, perplexity

    def latents(self, frames: Tensor, time: Tensor | None) -> Tensor:
        """(B, T, C, H, W)、时刻 → (B·T·h·w, D)：每个位置上量化之前的编码，估计内在维数用。"""
        return self.encoder(self.inputs(frames, time).flatten(0, 1)).movedim(1, -1).flatten(0, -2)

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """有效场的均方误差（标准化空间）加 commitment；reconstruct 重建整个窗口。"""
        if self.can_forecast:
            made, commitment, perplexity = self(batch.history, batch.time)
        else:
            window = torch.cat([batch.history, batch.future], 1)
            batch = batch._replace(future=window)
            made, commitment, perplexity = self.reconstruct(window, batch.time)
        error = target_mse(made, batch, weights)
        logged = {"mse": error.detach(), "commitment": commitment.detach(), "perplexity": perplexity}
        return {"loss": error + self.config.commitment * commitment, **logged}

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)；num_members > 1、只作重建的模型是 ValueError。"""
        refuse_members("pastnet", num_members)
        if not self.can_forecast:
            raise ValueError("model.task = reconstruct trains the memory bank only; a forecast needs task: forecast")
        return self(history, time)[0][:, None]


def _check_grid(config: Config, spec: DataSpec) -> None:
    grid = f"the grid {spec.height} x {spec.width}"
    sides = {"latitude": spec.height, "longitude": spec.width}
    for name, length in sides.items():
        if length % SHRINK:
            raise ValueError(
                f"model.name = pastnet shrinks {grid} by a factor of {SHRINK}, which {length} in {name} does not "
                f"allow; sides that work: multiples of {SHRINK}"
            )
    if config.task == "reconstruct":
        return
    for patch, (name, length), least in zip(config.patch, sides.items(), (1, COLUMNS), strict=True):
        works = [n for n in range(SHRINK, length // least + 1, SHRINK) if length % n == 0]
        if patch not in works:
            raise ValueError(
                f"model.patch = {config.patch} does not fit {grid} in {name}: {patch} must divide {length}, be a "
                f"multiple of {SHRINK} and leave at least {least}; sizes that work there: {works or 'none'}"
            )
    reach, columns = max(KERNELS) // 2, spec.width // SHRINK
    if config.padding == "circular_lon" and columns < reach:
        raise ValueError(
            f"model.padding = circular_lon: kernels of the propagation reach {reach} columns, the latent of {grid} "
            f"has {columns}; use zeros"
        )
