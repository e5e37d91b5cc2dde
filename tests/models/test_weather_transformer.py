"""天气 Transformer：分解的注意力等于带遮罩的全注意力；切块、解码与 torch.nn 拼成的同一网络相等；代价与参数个数。"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import build_config
from models.layers.transformer import sinusoid
from models.weather_transformer import FactorisedLayer
from tests.models.layers.torch_layers import randomize, torch_attention, torch_decoder
from tests.models.small import make_model, small_batch, small_spec

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
SMALL = {
    "name": "weather_transformer",
    "patch": [4, 4],
    "dim": 12,
    "heads": 3,
    "depth": 2,
    "decoder_depth": 2,
    "dropout": 0.0,
}


def full_attention(layer: FactorisedLayer, x: Tensor) -> Tensor:
    """不分解的写法：T·N 个 token 一起做注意力，另一帧的、另一块的用遮罩挡住。x (B, T, N, D)。"""
    batch, frames, tokens, dim = x.shape
    frame = torch.arange(frames).repeat_interleave(tokens)  # 每个 token 在哪一帧、哪一块
    place = torch.arange(tokens).repeat(frames)
    y = x.reshape(batch, frames * tokens, dim)
    for attention, norm, where in ((layer.spatial, layer.norm1, frame), (layer.temporal, layer.norm2, place)):
        hidden = where[:, None] != where  # (T·N, T·N) 真 = 看不见
        y = norm(y + torch_attention(attention)(y, y, y, attn_mask=hidden)[0])
    first, last = layer.mlp[0], layer.mlp[3]
    y = layer.norm3(y + last(F.gelu(first(y))))
    return y.reshape(x.shape)


def test_factorised_attention_equals_full_attention_with_the_equivalent_mask() -> None:
    torch.manual_seed(0)
    layer = FactorisedLayer(12, 3, 0.0).double()
    randomize(layer)
    one = torch.randn(2, 5, 6, 12, dtype=torch.float64, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    found, expected = layer(one), full_attention(layer, two)
    torch.testing.assert_close(found, expected, **EXACT)
    seed = torch.randn_like(found)
    (found * seed).sum().backward()
    (expected * seed).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, **EXACT)


def test_one_layer_sees_its_frame_and_then_the_past_of_every_place() -> None:
    """一层之后：同一帧的变化到得了所有块，再由时间注意力到所有帧；只有空间注意力时到不了别的帧。"""
    torch.manual_seed(0)
    layer = FactorisedLayer(12, 3, 0.0)
    x = torch.randn(1, 4, 6, 12)
    changed = x.clone()
    changed[0, 1, 2] += 1
    assert ((layer(changed) - layer(x)).abs().amax(-1) > 1e-6).all()
    layer.temporal.out.load_state_dict({k: torch.zeros_like(v) for k, v in layer.temporal.out.state_dict().items()})
    moved = (layer(changed) - layer(x)).abs().amax(-1)[0] > 1e-6  # (T, N)
    assert moved[1].all() and not moved[[0, 2, 3]].any()


def test_attention_costs_t_n_squared_plus_n_t_squared() -> None:
    """注意力本身的乘加：T 次 N × N 与 N 次 T × T，各 4·D 次运算；其余是逐 token 的 Linear。"""
    frames, tokens, dim = 6, 20, 16
    layer = FactorisedLayer(dim, 4, 0.0).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, frames, tokens, dim))
    linear = 2 * frames * tokens * (2 * 4 * dim**2 + 2 * 4 * dim**2)  # 两个注意力的 q、k、v、out；两层感知机
    attention = 4 * dim * (frames * tokens**2 + tokens * frames**2)
    assert counter.get_total_flops() == linear + attention


def reference(model: Any, history: Tensor) -> Tensor:
    """整个网络，逐块、逐层写开：块一个个地切、乘嵌入的权重，编码器是全注意力，解码器是 torch.nn 的层。"""
    batch, frames, _, height, width = history.shape
    (p, q), tokens, dim = SMALL["patch"], len(model.place), SMALL["dim"]
    corners = [(row, column) for row in range(0, height, p) for column in range(0, width, q)]
    weight = model.embed.weight.flatten(1)  # (D, C·p·q)
    x = torch.empty(batch, frames, tokens, dim, dtype=history.dtype)
    for n, (row, column) in enumerate(corners):
        pixels = history[..., row : row + p, column : column + q].flatten(2)  # (B, T, C·p·q)
        x[:, :, n] = pixels @ weight.T + model.embed.bias
    codes = sinusoid(frames + len(model.query), dim).double()
    x = x + codes[:frames, None] + model.place
    for layer in model.encoder:
        x = full_attention(layer, x)
    memory = x.flatten(1, 2)
    query = (model.query + codes[frames:, None] + model.place).flatten(0, 1)[None].repeat(batch, 1, 1)
    for layer in model.decoder:
        query = torch_decoder(layer)(query, memory)
    made = F.linear(query, model.head.weight, model.head.bias).unflatten(1, (-1, tokens))
    out = torch.empty(batch, made.shape[1], *history.shape[2:], dtype=history.dtype)
    for n, (row, column) in enumerate(corners):
        out[..., row : row + p, column : column + q] = made[:, :, n].unflatten(-1, (-1, p, q))
    return out


def test_the_network_equals_the_one_built_from_torch_layers() -> None:
    torch.manual_seed(0)
    spec = small_spec(channels=3, grid=(8, 12), frames_in=4, frames_out=2)
    model = make_model(SMALL, spec).double()
    randomize(model)
    history = small_batch(spec).history.double()
    with torch.no_grad():
        torch.testing.assert_close(model.forecast(history, None)[:, 0], reference(model, history), **EXACT)


@pytest.mark.parametrize(("channels", "count"), [(1, 1_632_160), (9, 1_697_952)])
def test_parameter_count(channels: int, count: int) -> None:
    """默认尺寸，12 → 4，32 × 64；需求：约 1.6 M。"""
    dim, tokens, pixels = 128, 8 * 8, 4 * 8 * channels
    norm, attention, mlp = 2 * dim, 4 * dim**2 + dim, 8 * dim**2 + 5 * dim
    layer = 2 * attention + mlp + 3 * norm  # 编码器是空间与时间，解码器是自注意力与交叉注意力
    ends = (pixels + 1) * dim + (dim + 1) * pixels
    expected = (4 + 2) * layer + (1 + 4) * tokens * dim + ends
    model = make_model({"name": "weather_transformer"}, small_spec(channels, (32, 64), 12, 4))
    assert sum(p.numel() for p in model.parameters()) == expected == count


def test_a_query_first_looks_at_its_own_patch() -> None:
    """初值：交叉注意力的分数在同一块上最大；输出从零场起步。"""
    torch.manual_seed(0)
    model = make_model({"name": "weather_transformer"}, small_spec(1, (32, 64), 12, 4))
    with torch.no_grad():
        query, key = (model.future + model.place)[0], (model.past + model.place)[-1]  # (N, D)
        attention = torch_attention(model.decoder[0].cross)
        weights = attention(query[None], key[None], key[None])[1][0]  # (N, N)，各头平均
        made = model(small_batch(small_spec(1, (32, 64), 12, 4)).history)
    assert torch.equal(weights.argmax(1), torch.arange(len(query)))
    assert made.abs().max() < 0.1


def test_no_parameter_depends_on_the_length_of_the_history() -> None:
    """正余弦的时间编码：12 帧训练的权重原样装得进 20 帧的模型。"""
    torch.manual_seed(0)
    short, long = (make_model(SMALL, small_spec(grid=(8, 16), frames_in=n, frames_out=2)) for n in (12, 20))
    long.load_state_dict(short.state_dict())
    assert torch.equal(long.past[:12], short.past)


@pytest.mark.parametrize(
    ("patch", "grid", "said"),
    [
        ([4, 8], (30, 64), "the grid 30 x 64 in latitude: 30 / 4; sizes that work there: [1, 2, 3, 5, 6, 10, 15, 30]"),
        (
            [4, 8],
            (32, 36),
            "the grid 32 x 36 in longitude: 36 / 8; sizes that work there: [1, 2, 3, 4, 6, 9, 12, 18, 36]",
        ),
        ([64, 8], (32, 64), "the grid 32 x 64 in latitude: 32 / 64; sizes that work there: [1, 2, 4, 8, 16, 32]"),
    ],
)
def test_a_patch_that_does_not_divide_the_grid(patch: list[int], grid: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match="sizes that work there") as error:
        make_model({**SMALL, "patch": patch}, small_spec(grid=grid))
    assert str(error.value) == f"model.patch = {patch} does not divide {said}"


def test_mistakes_in_the_config() -> None:
    with pytest.raises(ValueError, match=r"model\.heads = 5: does not divide model\.dim = 12; heads that"):
        build_config({**SMALL, "heads": 5})
    with pytest.raises(ValueError, match=r"model\.heads = 4: does not divide model\.dim = 30"):
        build_config({"name": "weather_transformer", "dim": 30})
    with pytest.raises(ValueError, match=r"model\.patch"):
        build_config({**SMALL, "patch": [4]})
    with pytest.raises(ValueError, match=r"model\.dropout = 1\.0"):
        build_config({**SMALL, "dropout": 1.0})
