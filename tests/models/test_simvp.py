"""SimVP：参数个数与公开的相等；块与 NumPy 写法相比；感受野与跳接由扰动看出；T_out ≠ T_in；经度一圈；写错的配置。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from torch import Tensor, nn

from models import build_model
from models.layers.inception import Inception
from models.simvp import DropPath, GatedBlock, UpConv
from tests.models.layers.numpy_layers import batch_norm, conv, group_norm, values
from tests.models.small import count, on_paper, small_batch, small_spec

SMALL = {"name": "simvp", "hid_S": 8, "hid_T": 16, "N_S": 2, "N_T": 2}
GATED = {**SMALL, "translator": "gsta"}


def small(spec: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({**SMALL, **options}, spec).eval()


@pytest.mark.parametrize(
    ("shape", "hid_S", "hid_T", "N_S", "total"),
    [
        ((10, 1, 64, 64), 64, 256, 4, 15_778_433),  # Moving-MNIST，main.py 的默认值
        ((10, 1, 64, 64), 64, 512, 4, 57_761_409),
        ((10, 1, 64, 64), 16, 256, 4, 13_866_401),  # 类的默认值
        ((4, 2, 32, 32), 64, 256, 2, 14_323_714),  # TaxiBJ
        ((12, 1, 32, 64), 32, 256, 2, 14_647_489),
        ((12, 2, 32, 64), 32, 256, 2, 14_647_810),
        ((12, 3, 32, 64), 32, 256, 2, 14_648_131),
        ((12, 4, 32, 64), 32, 256, 2, 14_648_452),
        ((12, 12, 32, 64), 32, 256, 2, 14_651_020),
        ((4, 1, 32, 64), 32, 256, 2, 13_776_065),
        ((4, 4, 32, 64), 32, 256, 2, 13_777_028),
        ((4, 12, 32, 64), 32, 256, 2, 13_779_596),
        ((12, 1, 32, 64), 64, 256, 4, 16_214_145),
        ((12, 4, 32, 64), 64, 256, 4, 16_216_068),
    ],
)
def test_parameter_counts_equal_the_public_ones(
    shape: tuple[int, int, int, int], hid_S: int, hid_T: int, N_S: int, total: int
) -> None:
    assert count(on_paper("simvp", shape, hid_S=hid_S, hid_T=hid_T, N_S=N_S, N_T=8)) == total


def test_each_part_has_the_public_count() -> None:
    model = on_paper("simvp", (10, 1, 64, 64), hid_S=64, hid_T=256, N_S=4, N_T=8)
    assert [count(part) for part in (model.encoder, model.translator, model.decoder)] == [111_936, 15_481_344, 185_153]


@pytest.mark.parametrize(
    ("shape", "hid_S", "hid_T", "N_S", "total", "around"),
    [  # around：OpenSTL 自己的编码器与解码器（PixelShuffle 上采样、跳接相加），逐层写开
        ((12, 1, 32, 64), 32, 256, 2, 12_758_305, 384 + 9_312 + 37_056 + 9_312 + 33),
        ((4, 12, 32, 64), 32, 256, 2, 9_964_268, 3_552 + 9_312 + 37_056 + 9_312 + 396),
        ((4, 12, 32, 64), 32, 512, 2, 37_868_780, 3_552 + 9_312 + 37_056 + 9_312 + 396),
        ((10, 1, 64, 64), 64, 512, 4, 46_769_665, 768 + 3 * 37_056 + 2 * 147_840 + 2 * 37_056 + 65),
    ],
)
def test_the_gated_translator_has_the_public_count(
    shape: tuple[int, int, int, int], hid_S: int, hid_T: int, N_S: int, total: int, around: int
) -> None:
    model = on_paper("simvp", shape, translator="gsta", hid_S=hid_S, hid_T=hid_T, N_S=N_S, N_T=8)
    assert count(model.translator) == total - around


def test_other_numbers_of_frames_out_change_only_the_last_block() -> None:
    per_channel = 204 * 256 // 2 // 8 + 4 * 3  # 3² + 5² + 7² + 11² = 204；四个偏置、四个 GroupNorm
    fewer = on_paper("simvp", (12, 1, 32, 64), frames_out=4, hid_S=32, hid_T=256, N_S=2, N_T=8)
    more = on_paper("simvp", (12, 1, 32, 64), frames_out=20, hid_S=32, hid_T=256, N_S=2, N_T=8)
    assert count(fewer) == 14_647_489 - 8 * 32 * per_channel
    assert count(more) == 14_647_489 + 8 * 32 * per_channel


def test_inception_equals_the_written_out_sum() -> None:
    torch.manual_seed(0)
    block = Inception(3, 16, 24, "zeros").double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    squeezed, expected = conv(values(x), block.squeeze), np.zeros((2, 24, 5, 7))
    for branch, kernel in zip(block.branches, (3, 5, 7, 11), strict=True):
        convolution, norm, _ = branch.children()
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.GroupNorm)
        assert (convolution.kernel_size[0], convolution.groups, norm.num_groups) == (kernel, 8, 8)
        made = group_norm(conv(squeezed, convolution), norm)
        expected += np.where(made > 0, made, 0.2 * made)
    np.testing.assert_allclose(values(block(x)), expected, rtol=1e-9, atol=1e-9)


def test_translator_skips_run_backwards() -> None:
    model = small(small_spec(), N_T=3).translator
    x = torch.randn(2, 24, 4, 8)
    one = model.down[0](x)
    two = model.down[1](one)
    up = model.up[0](model.down[2](two))
    up = model.up[1](torch.cat([up, two], 1))
    assert torch.equal(model(x), model.up[2](torch.cat([up, one], 1)))


def test_gated_block_equals_the_written_out_formulas() -> None:
    torch.manual_seed(0)
    block: Any = GatedBlock(4, 0.5, "zeros").double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    for norm in (block.attention[0], block.mlp[0]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 9, 13, dtype=torch.float64)
    gate, y = block.attention[1], values(x)
    inner = batch_norm(y, block.attention[0])
    mixed = conv(conv(gelu(conv(inner, gate.before)), gate.near), gate.far)
    both = conv(mixed, gate.gate)
    inner = inner + conv(both[:, :4] * expit(both[:, 4:]), gate.after)
    y = y + values(block.attention_scale) * inner
    norm, widen, spread, _, narrow = block.mlp
    y = y + values(block.mlp_scale) * conv(gelu(conv(conv(batch_norm(y, norm), widen), spread)), narrow)
    assert (gate.far.kernel_size, gate.far.dilation, widen.out_channels) == ((7, 7), (3, 3), 32)
    np.testing.assert_allclose(values(block(x)), y, rtol=1e-9, atol=1e-9)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def without_norms(module: nn.Module) -> Any:
    """GroupNorm 的均值把全场连在一起；拿掉它才看得见卷积的感受野。"""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, nn.Identity())
        else:
            without_norms(child)
    return module


def changed_by(model: Any, history: Tensor, frame: int, row: int, column: int) -> np.ndarray:
    """动一个格点的全部通道，哪些输出变了：(T_out, H, W) 布尔。"""
    other = history.clone()
    other[:, frame, :, row, column] += 100
    with torch.no_grad():
        return (model(other) != model(history)).any(2)[0].numpy()


def near(seen: np.ndarray, reach: int, circular: bool) -> np.ndarray:
    """(H, W) 布尔：上下左右 reach 格之内有真的格点。"""
    made = np.zeros_like(seen)
    columns = seen.shape[1]
    for row, column in np.argwhere(seen):
        for x in range(column - reach, column + reach + 1):
            if circular or 0 <= x < columns:
                made[max(0, row - reach) : row + reach + 1, x % columns] = True
    return made


def doubled(seen: np.ndarray, circular: bool) -> np.ndarray:
    """3 × 3、步长 2 的转置卷积：偶数格只看自己，奇数格看两侧。"""
    rows, columns = seen.shape
    below = np.vstack([seen[1:], np.zeros((1, columns), bool)])
    made = np.zeros((2 * rows, columns), bool)
    made[::2], made[1::2] = seen, seen | below
    right = np.roll(made, -1, 1)
    if not circular:
        right[:, -1] = False
    wide = np.zeros((2 * rows, 2 * columns), bool)
    wide[:, ::2], wide[:, 1::2] = made, made | right
    return wide


@pytest.mark.parametrize("padding", ["zeros", "circular_lon"])
@pytest.mark.parametrize(("translator", "reaches"), [("inception", [5, 5, 5, 5]), ("gsta", [11, 1, 11, 1])])
def test_receptive_field_is_that_of_the_kernels(padding: str, translator: str, reaches: list[int]) -> None:
    circular = padding == "circular_lon"
    spec = small_spec(channels=1, grid=(8, 128), frames_in=2, frames_out=2)
    model = without_norms(small(spec, padding=padding, translator=translator)).double()
    history = small_batch(spec, count=1).history.double()
    expected = np.zeros((8, 128), bool)
    expected[2, 7] = True
    expected = near(near(expected, 1, circular), 1, circular)[::2, ::2]  # 编码：第二层步长 2
    for reach in reaches:
        expected = near(expected, reach, circular)
    expected = near(doubled(expected, circular), 1, circular)
    assert not expected.all()
    for changed in changed_by(model, history, 1, 2, 7):
        np.testing.assert_array_equal(changed, expected)


def test_encoder_sees_one_frame_at_a_time() -> None:
    spec = small_spec(frames_in=4)
    model, history = small(spec), small_batch(spec, count=1).history[0]
    other = history.clone()
    other[2] += 1
    for before, after in zip(model.encoder(history), model.encoder(other), strict=True):
        assert [torch.equal(before[i], after[i]) for i in range(4)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("frames_in", "frames_out", "partner"),
    [(3, 3, [0, 1, 2]), (4, 2, [2, 3]), (3, 1, [2]), (2, 4, [0, 1, 1, 1])],
)
def test_the_skip_joins_each_output_to_its_own_input_frame(frames_in: int, frames_out: int, partner: list[int]) -> None:
    spec = small_spec(frames_in=frames_in, frames_out=frames_out)
    model = without_norms(small(spec)).double()
    history = small_batch(spec, count=1).history.double()
    model.translator.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    around = np.zeros((8, 16), bool)
    around[2:7, 3:8] = True  # 编码第一层与解码最后一层各伸出一格
    for frame in range(frames_in):
        for j, changed in enumerate(changed_by(model, history, frame, 4, 5)):
            np.testing.assert_array_equal(changed, around if partner[j] == frame else np.zeros_like(around))


@pytest.mark.parametrize("options", [SMALL, GATED])
def test_circular_longitude_has_no_seam(options: dict[str, Any]) -> None:
    spec = small_spec(grid=(8, 32), frames_out=2)
    history = small_batch(spec).history
    for padding in ("circular_lon", "zeros"):
        model = small(spec, **options, padding=padding)
        with torch.no_grad():
            turned, made = model(history.roll(6, -1)), model(history).roll(6, -1)  # 6 是下采样步长的倍数
        assert torch.allclose(turned, made, atol=1e-5) == (padding == "circular_lon")


def test_circular_upsampling_equals_plain_on_a_field_laid_out_three_times() -> None:
    torch.manual_seed(0)
    up, plain = UpConv(3, 4, "circular_lon"), UpConv(3, 4, "zeros")
    plain.load_state_dict(up.state_dict())
    x = torch.randn(2, 3, 5, 6)
    made = up(x)
    assert made.shape == (2, 4, 10, 12)
    assert torch.allclose(made, plain(x.repeat(1, 1, 1, 3))[..., 12:24], atol=1e-6)
    assert plain(x).shape == (2, 4, 10, 12)


def test_drop_path_grows_with_depth_and_keeps_the_mean() -> None:
    model = small(small_spec(), translator="gsta", N_T=4, drop_path=0.1)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    np.testing.assert_allclose(rates, [0.01, 0.04, 0.07, 0.1], rtol=1e-6)
    torch.manual_seed(0)
    path, ones = DropPath(0.2), torch.ones(4000, 2, 1, 1)
    dropped = path(ones)
    assert torch.equal(dropped[:, 0], dropped[:, 1]) and set(dropped.flatten().tolist()) == {0.0, 1.25}
    assert abs(float(dropped.mean()) - 1) < 0.03
    assert torch.equal(path.eval()(ones), ones)
    assert all(m.rate == 0 for m in small(small_spec(), translator="gsta").modules() if isinstance(m, DropPath))


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"N_S": 4}, (30, 64), "model.N_S = 4 halves the grid 30 x 64 2 times, which 30 in latitude does not allow"),
        ({"N_S": 4}, (32, 62), "62 in longitude does not allow; values that work: [1, 2, 3]"),
        ({"hid_S": 6}, (8, 16), "model.hid_S = 6 with data.frames_out = 1: 6 channels leave the inception translator"),
        ({"hid_S": 6}, (8, 16), "not a multiple of its 8 groups; hid_S that work: [8], or model.translator = gsta"),
        ({"hid_S": 12}, (8, 16), "hid_S that work: [8, 16]"),
        ({"hid_S": 7}, (8, 16), "model.hid_S = 7: must be even (2 normalisation groups), e.g. 8"),
        ({"hid_T": 40}, (8, 16), "model.hid_T = 40: the inception translator needs a multiple of 16, e.g. 32 or 48"),
        ({"N_T": 1}, (8, 16), "model.N_T = 1: input should be greater than or equal to 2"),
        ({"drop_path": 0.1}, (8, 16), "model.drop_path = 0.1: only the gsta translator drops paths"),
        (
            {"padding": "circular_lon", "N_S": 4},
            (8, 16),
            "inception translator reach 5 columns, but N_S = 4 leaves 4 of 16; use zeros, or one of N_S = [1, 2, 3]",
        ),
        ({"padding": "circular_lon", "translator": "gsta"}, (8, 16), "reach 9 columns, but N_S = 2 leaves 8 of 16"),
        ({"translater": "gsta"}, (8, 16), "unknown key model.translater = 'gsta'; nearest: model.translator"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(options: dict[str, Any], grid: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        small(small_spec(grid=grid), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_frames_out_times_width_is_what_must_split_into_groups() -> None:
    small(small_spec(frames_out=4), hid_S=6)  # 4 × 6 = 24
    small(small_spec(frames_in=7, frames_out=8), hid_S=2)
    small(small_spec(), hid_S=6, translator="gsta", hid_T=10)
