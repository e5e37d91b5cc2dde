"""多尺度 VQVAE，VAR 的阶段一：场 ⇄ 由粗到细各尺度的编号；网络是 VQGAN 的，量化是多尺度的残差量化。

论文：Tian et al. 2024（NeurIPS），Visual Autoregressive Modeling。
网络见 layers/vqvae_gan.py，量化见 layers/multiscale.py。
与原版不同之处：
* 网格与尺度是长方形；尺度可以只给个数，由潜变量的网格推出（rectangular_scales），也可以逐个写明。
* 进出的是标准化的场，C 个通道一起，不缩放到 [-1, 1]，也不裁剪。
* 损失是 L1、均方误差、量化的损失，可加经向频谱的振幅；没有感知损失与判别器，它们是为照片准备的。
* 没有用的码可以换成数据里的向量（restart）。
encode 给出的是**量化之后**的潜变量 f̂，逐通道标准化；decode 倒过来，所以不量化的阶段二（潜空间 U-Net、扩散）也接得上。
`encodes: tendency`：编码的不是场，是相邻两帧之差，各通道按训练窗口上自己的均值与标准差标准化。编号只有几千位，
用在场上，连一天之内的变化也分辨不出；用在差上，就全用来说变化。只有 VAR 接得上它。

字母：N 帧数，C 通道，H×W 网格，c = latent_dim，h×w 潜变量的网格，K 尺度数。
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, cat, channels_last, nn, no_grad
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.layers.codebook import Learned
from models.layers.latents import LatentScaling, in_chunks, solve_tendency
from models.layers.losses import field_errors, zonal_amplitudes
from models.layers.multiscale import MultiScaleQuantizer, Scales, check_scales, rectangular_scales
from models.layers.padding import PaddedConv2d, Padding, check_padding
from models.layers.vqvae_gan import ResBlock, SelfAttention, Shape, make_decoder, make_encoder
from util.batch import Batch, DataSpec, Predict, encoded_fields
from util.strict import PositiveInt, Strict


class Config(Strict):
    """选项；默认的尺寸与权重是 VAR 原版的（损失的权重取自它的作者的单尺度训练代码）。

    width … dropout 见 vqvae_gan.Shape；phi、beta 见 multiscale；codebook、restart 见 codebook.Codebook。
    """

    encodes: Predict = "state"
    """state: fields; tendency: differences of neighbouring frames, which var alone can use"""
    width: PositiveInt = 160
    """channels of the finest level"""
    multipliers: list[PositiveInt] = Field([1, 1, 2, 2, 4], min_length=1)
    """channels of each level over width; sides halve from one to the next"""
    blocks: PositiveInt = 2
    """residual blocks of each level of the encoder; the decoder has one more"""
    groups: PositiveInt = 32
    """groups of the normalisation; must divide the channels"""
    attention: bool = True
    """after each residual block of the deepest level"""
    middle_attention: bool = True
    """between the two middle blocks"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """inside residual blocks"""
    padding: Padding = "zeros"
    latent_dim: PositiveInt = 32
    """numbers of a code"""
    vocabulary: int = Field(4096, ge=2)
    """codes"""
    scales: PositiveInt | list[int | list[int]] = 10
    """how many, or a list of them, coarse to fine: n (n x n) or [rows, columns]"""
    phi: int = Field(4, ge=0)
    """convolutions after enlarging that the scales share; 0: one for each scale"""
    beta: float = Field(0.25, ge=0)
    """weight of the term that draws encodings to their codes"""
    codebook: Learned = "gradient"
    """gradient: codes are learned; ema: they follow the mean of their vectors"""
    restart: float = Field(0.0, ge=0, lt=1)
    """a code used less than this share of an even use is replaced by a vector of the data; 0: never"""
    l1_weight: float = Field(0.2, ge=0)
    """weight of the L1 error"""
    l2_weight: float = Field(1.0, ge=0)
    """weight of the mean square"""
    spectral_weight: float = Field(0.0, ge=0)
    """weight of the error of zonal spectra"""
    vae_batch_size: PositiveInt = 16
    """most frames encoded or decoded at once; memory only"""

    @model_validator(mode="after")
    def _normalises(self) -> Config:
        odd = [width for width in self.shape.widths if width % self.groups]
        if odd:
            raise ValueError(f"groups = {self.groups} does not divide the widths {odd}")
        return self

    @property
    def shape(self) -> Shape:
        """编码器与解码器的尺寸。"""
        held = {name: getattr(self, name) for name in Shape._fields}
        return Shape(**{**held, "multipliers": tuple(self.multipliers)})


class Model(nn.Module):
    """TokenAutoencoder、Portable、Scheduled（换码）；编码差时 OnePass：先看一遍训练窗口，求差的均值与标准差。

    Raises:
        ValueError: 网格不能逐次减半；尺度不合；circular_lon 而经度不成一圈。
    """

    starts_anew = ("inputs.", "latents.", "quantizer.codebook.dead", "quantizer.codebook.replacements")

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        height, width = latent_grid(config, spec)
        self.config = config
        self.encodes: Predict = config.encodes
        self.needs_pass = config.encodes == "tendency"
        self.inputs = LatentScaling((spec.num_channels, 1, 1))  # 差的均值与标准差；state 时原样
        self.latent_shape = (config.latent_dim, height, width)
        self.encoder = make_encoder(spec.num_channels, config.latent_dim, config.shape)
        self.quant_conv = PaddedConv2d(config.latent_dim, config.latent_dim, 3, config.padding)
        self.quantizer = MultiScaleQuantizer(
            config.vocabulary,
            config.latent_dim,
            scales_of(config, height, width),
            config.phi,
            config.beta,
            config.codebook,
            config.restart,
            config.padding,
        )
        self.post_quant_conv = PaddedConv2d(config.latent_dim, config.latent_dim, 3, config.padding)
        self.decoder = make_decoder(config.latent_dim, spec.num_channels, config.shape)
        self.latents = LatentScaling((config.latent_dim, 1, 1))
        convert_conv2d_weight_memory_format(self, channels_last)  # 通道排在末尾，处理器上卷积快些

    def freeze(self, encoder: bool, decoder: bool) -> None:
        """encode（连同码本与 φ）、decode 各自用到的参数学不学；码本的统计量在 eval 时才不动。"""
        for layer in (self.encoder, self.quant_conv, self.quantizer):
            layer.requires_grad_(not encoder)
        for layer in (self.post_quant_conv, self.decoder):
            layer.requires_grad_(not decoder)

    def at_step(self, step: int, total_steps: int) -> None:
        """换掉上一步发现没有用的码；走到哪里无关。"""
        self.quantizer.codebook.revive()

    @property
    def no_decay(self) -> list[str]:
        """不衰减的参数：码本，没有用到的码会缩向原点。"""
        return ["quantizer.codebook.weight"] if self.config.codebook == "gradient" else []

    @property
    def blocks(self) -> list[nn.Module]:
        """编码器、解码器的各块。"""
        return [module for module in self.modules() if isinstance(module, ResBlock | SelfAttention)]

    @property
    def latents_known(self) -> bool:
        """潜变量的统计量求出来没有。"""
        return bool(self.latents.known)

    def portable_options(self) -> dict[str, Any]:
        """不读别的文件，就是自己的选项。"""
        return {"name": "vqvae", **self.config.model_dump()}

    def accumulate(self, batch: Batch) -> None:
        """收下一批训练窗口里相邻两帧之差；有通道无效的不看。"""
        changes, valid = encoded_fields(batch, self.encodes)
        whole = valid.all(-1)
        if whole.any():
            self.inputs.observe(changes[whole].to(self.inputs.mean.device))

    def solve(self) -> None:
        """差的均值与标准差。

        Raises:
            ValueError: 没有两帧都有效的差；某个通道从不变化。
        """
        solve_tendency(self.inputs, "model.encodes")

    def observe_latents(self, batch: Batch) -> None:
        """收下一批训练窗口的 f̂；插值得来的帧也算，阶段二照样编码它们。"""
        self.latents.observe(self._quantised(encoded_fields(batch, self.encodes)[0]))

    def solve_latents(self) -> None:
        """见 LatentScaling.solve。"""
        self.latents.solve()

    def encode(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) 标准化的场 → f̂ (N, c, h, w)，标准化过；梯度直通到编码器。"""
        return self.latents(self._quantised(fields))

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) 标准化的潜变量 → (N, C, H, W) 标准化的场。"""
        return self.decode_latents(self.latents.inverse(latents))

    @no_grad()
    def encode_tokens(self, fields: Tensor) -> list[Tensor]:
        """(N, C, H, W) 标准化的场 → 各尺度的编号 (N, h_k·w_k)。"""
        parts = [self.quantizer.indices(self._continuous(part)) for part in fields.split(self._chunk)]
        return [cat(scale) for scale in zip(*parts, strict=True)]

    def decode_tokens(self, indices: list[Tensor]) -> Tensor:
        """各尺度的编号 → (N, C, H, W) 标准化的场；只给头几个尺度时，是到那里为止的重建。"""
        return self.decode_latents(self.quantizer.reconstruct(indices))

    def decode_latents(self, f_hat: Tensor) -> Tensor:
        """f̂ (N, c, h, w) → (N, C, H, W) 标准化的场。"""
        return self.inputs.inverse(self._decoded(f_hat))

    def _decoded(self, f_hat: Tensor) -> Tensor:
        """f̂ (N, c, h, w) → 网络的输出 (N, C, H, W)，差还是标准化过的。"""
        return in_chunks(lambda part: self.decoder(self.post_quant_conv(part)), f_hat, self._chunk).float()

    @property
    def _chunk(self) -> int:
        return self.config.vae_batch_size

    def _continuous(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) → 量化之前的 f (N, c, h, w)。"""
        return in_chunks(lambda part: self.quant_conv(self.encoder(self.inputs(part))), fields, self._chunk)

    def _quantised(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) → f̂ (N, c, h, w)。"""
        return in_chunks(lambda part: self.quantizer.quantize(self._continuous(part)), fields, self._chunk)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """有效的场的重建误差（标准化空间，差按它自己的标准差）加量化的损失；插值得来的场也编码、也量化。

        记录的 residual_hxw 是累加到那个尺度之后，潜变量还剩下几成没有表示出来。
        """
        fields, valid = encoded_fields(batch, self.encodes)  # (N, C, H, W)、(N, C)
        f = self._continuous(fields)
        quantized = self.quantizer(f)
        made, fields = self._decoded(quantized.f_hat), self.inputs(fields)
        l1, l2 = field_errors(made, fields, valid)
        terms = {"l1": l1, "l2": l2, "vq": quantized.loss}
        loss = self.config.l1_weight * l1 + self.config.l2_weight * l2 + quantized.loss
        if self.config.spectral_weight:
            terms["spectral"] = field_errors(zonal_amplitudes(made), zonal_amplitudes(fields), valid)[0]
            loss = loss + self.config.spectral_weight * terms["spectral"]
        shares = quantized.errors / f.detach().float().square().mean()
        left = {f"residual_{h}x{w}": shares[k] for k, (h, w) in enumerate(self.quantizer.scales)}
        return {"loss": loss, **terms, "usage": quantized.usage, "perplexity": quantized.perplexity, **left}


def latent_grid(config: Config, spec: DataSpec) -> tuple[int, int]:
    """潜变量的网格 (h, w)。

    Raises:
        ValueError: 网格不能逐次减半。
    """
    factor = 2 ** (len(config.multipliers) - 1)
    if spec.height % factor or spec.width % factor:
        raise ValueError(
            f"model.multipliers = {config.multipliers} halves the grid {len(config.multipliers) - 1} times; "
            f"{spec.height} x {spec.width} must be multiples of {factor}"
        )
    return spec.height // factor, spec.width // factor


def scales_of(config: Config, height: int, width: int) -> Scales:
    """配置里的尺度 → (h, w) 的序列。

    Raises:
        ValueError: 见 rectangular_scales、check_scales；不是一对。
    """
    if isinstance(config.scales, int):
        return rectangular_scales(height, width, config.scales)
    pairs = [[side, side] if isinstance(side, int) else side for side in config.scales]
    odd = [pair for pair in pairs if len(pair) != 2 or min(pair) < 1]
    if odd or not pairs:
        raise ValueError(f"model.scales = {config.scales}: every scale is a side or a pair [h, w], at least 1")
    scales = tuple((h, w) for h, w in pairs)
    check_scales(scales, height, width)
    return scales
