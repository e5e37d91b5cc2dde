"""config/ 里每份 YAML 都要守的约定；新模型只要放进文件与 YAML，就自动受检。大小取自 YAML 的 smoke 段。

做不到的事由模型自己说：构造函数的 ValueError、can_forecast、probabilistic、有没有可训练的参数；这里没有名单。
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import models
from engine.imagined import imagined_spec
from engine.one_pass import solve_one_pass
from engine.reference.configs import listed
from models import build_config, build_model, change_options, model_names
from models.interface import Autoencoder, ForecastModel, OnePass, Stacked, StartsAnew, can_forecast, is_codec
from models.layers.codebook import Codebook
from models.layers.latents import LatentScaling
from tests.engine.runs import ROOT
from tests.models.small import TINY, rollout, small_batch, small_spec, terms_of
from util.batch import Batch, DataSpec
from util.checkpoint import load_checkpoint, save_checkpoint
from util.config import RunConfig, load_config
from util.strict import Strict

CONFIGS = listed(".")
SMALL = small_spec(channels=2, grid=(16, 32))  # 3 → 1
OTHERS = {
    "7 to 1, 16 x 32, 9 channels": small_spec(channels=9, grid=(16, 32), frames_in=7, frames_out=1),
    "12 to 4, 32 x 64, 1 channel": small_spec(channels=1, grid=(32, 64), frames_in=12, frames_out=4),
}
MOST_STEPS, LR, FALL = 500, 1e-3, 0.9  # 记住一批：损失至多走这么多步就要降掉九成
INDUCTOR = (pytest.mark.inductor, pytest.mark.soak)
every_config = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
NAMES = {path: yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["name"] for path in CONFIGS}
FIRST = {NAMES[path]: path for path in reversed(CONFIGS)}  # 模型 → 它的头一份 YAML；编译要几秒的，其余的在久测里
one_config_a_model = pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if FIRST[name] == p else pytest.mark.soak, id=p.stem) for p, name in NAMES.items()],
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # data.set 是从仓库根目录算起的路径


@cache
def small_config(path: Path) -> RunConfig:
    """缩小之后的整份配置。"""
    return load_config(path, smoke=True)


def make(path: Path, spec: DataSpec = SMALL) -> Any:
    """由同一个种子造出的模型；要先看一遍数据的，看过了。"""
    torch.manual_seed(0)
    model = build_model(small_config(path).model, spec)
    if isinstance(model, OnePass):
        seen = [small_batch(spec, count=2, seed=seed) for seed in range(2)]
        solve_one_pass(model, seen, seen)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: Any, batch: Batch) -> Tensor:
    """随机数总是同一串：扩散的时间与噪声、丢弃、拿掉的区块，每次都相同。"""
    torch.manual_seed(0)
    return terms_of(model, batch)["loss"]


def forecast_of(model: Any, batch: Batch, members: int = 1) -> Tensor:
    """不求导；概率模型的随机数只来自给它的发生器。"""
    with torch.no_grad():
        return model.forecast(batch.history, batch.time, members, torch.Generator().manual_seed(0))


def shape_of(spec: DataSpec, count: int, members: int = 1) -> tuple[int, ...]:
    return count, members, spec.frames_out, spec.num_channels, spec.height, spec.width


def waves(spec: DataSpec) -> Batch:
    """两个窗口，各是几个行波：记得住的那种数据。"""
    rows, columns = torch.arange(spec.height)[:, None], torch.arange(spec.width)
    step = torch.arange(spec.window)[:, None, None, None]
    speed = torch.tensor([1.0, 2.0])[:, None, None, None, None]  # (B, 1, 1, 1, 1)
    phase = torch.arange(spec.num_channels)[:, None, None]
    fields = torch.sin((columns - 4 * speed * step) * 0.2 + rows * 0.1 + phase)  # (B, t, C, H, W)
    batch = small_batch(spec, count=2)
    return batch._replace(history=fields[:, : spec.frames_in], future=fields[:, spec.frames_in :])


def test_every_model_has_a_config() -> None:
    assert {small_config(path).model["name"] for path in CONFIGS} == set(model_names())


@every_config
def test_file_holds_a_strict_config_and_a_forecast_model(path: Path) -> None:
    options, model = small_config(path).model, make(path)
    assert isinstance(build_config(options), Strict)
    assert isinstance(model, nn.Module) and isinstance(model, ForecastModel) != isinstance(model, Autoencoder)
    assert list(inspect.signature(type(model)).parameters) == ["config", "spec", "first_stage"]
    if not is_codec(model):
        assert isinstance(model.probabilistic, bool) and isinstance(model.can_forecast, bool)
    with pytest.raises(ValueError, match=r"unknown key model\.no_such_key = 1; (nearest|valid keys): "):
        build_config({**options, "no_such_key": 1})


@every_config
def test_its_own_shape_works(path: Path) -> None:
    spec = imagined_spec(small_config(path).data)
    check_training_and_forecast(make(path, spec), spec)


@every_config
@pytest.mark.parametrize("spec", OTHERS.values(), ids=OTHERS)
def test_other_shapes_work_or_are_refused_in_the_constructor(path: Path, spec: DataSpec) -> None:
    try:
        model = make(path, spec)
    except ValueError as error:
        refusal = str(error)
        assert re.fullmatch(r".*(model|data)\.\w+ = .+", refusal)  # 一行，写明哪个键的哪个值不合
    else:
        check_training_and_forecast(model, spec)


def check_training_and_forecast(model: Any, spec: DataSpec) -> None:
    """损失有限，每个可训练的参数都有梯度；预报的形状对，与全局的随机状态无关，重复得出来。"""
    model.train()
    for seed in range(3):  # 随机拿掉的区块不同，几次之后都轮得到
        loss = terms_of(model, small_batch(spec, count=2, seed=seed))["loss"]
        assert loss.shape == () and loss.isfinite()
        if trainable(model):
            loss.backward()
    for name, p in trainable(model).items():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    model.eval()
    batch = small_batch(spec, count=2)
    assert torch.equal(loss_of(model, batch), loss_of(model, batch))
    if is_codec(model):
        return
    if not model.can_forecast:
        with pytest.raises(ValueError, match="forecast"):
            forecast_of(model, batch)
        return
    made = forecast_of(model, batch)
    torch.manual_seed(1)
    assert torch.equal(made, forecast_of(model, batch))
    assert made.shape == shape_of(spec, 2) and made.dtype == torch.float32 and made.isfinite().all()


@every_config
def test_the_one_pass_takes_batches_from_the_processor(path: Path) -> None:
    """引擎给的批在 CPU 上，模型可以在显卡上：这里换成 meta，混着两种设备的运算一样报错。"""
    torch.manual_seed(0)
    model = build_model(small_config(path).model, SMALL).to(torch.device("meta"))
    if isinstance(model, OnePass):
        model.accumulate(small_batch(SMALL))


def starting_anew(model: object) -> tuple[str, ...]:
    return model.starts_anew if isinstance(model, StartsAnew) else ()


@every_config
def test_what_starts_anew_is_every_statistic_of_its_own_and_every_mark_of_a_codebook(path: Path) -> None:
    """train.init 不抄的：自己的（不是阶段一的）潜变量的统计量，码本记下要换的；按层数出来的与模型说的相同。"""
    model = make(path)
    told = starting_anew(model)
    wanted: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, LatentScaling) and not name.startswith("first_stage."):
            wanted |= {f"{name}.{part}" for part in module.state_dict()}
        elif isinstance(module, Codebook):
            wanted |= {f"{name}.dead", f"{name}.replacements"}
    names = model.state_dict().keys()
    assert {name for name in names if name.startswith(told)} == wanted
    assert all(any(name.startswith(prefix) for name in names) for prefix in told)


@every_config
def test_blocks_hold_their_parameters_to_themselves(path: Path) -> None:
    """块没有在走的时候，里面的参数全是 NaN 也不碍事：分片之后，那时本来就没有它们。"""
    model, batch = make(path).eval(), small_batch(SMALL)
    if not isinstance(model, Stacked):
        return
    inside = [module for block in model.blocks for module in block.modules()]
    assert model.blocks and len(inside) == len(set(inside))
    with torch.no_grad():
        expected = loss_of(model, batch)
        for block in model.blocks:
            hide_when_idle(block)
        assert torch.equal(loss_of(model, batch), expected)


def hide_when_idle(block: nn.Module) -> None:
    """参数只在块自己的 __call__ 里是真的。"""
    held = [(p, p.clone()) for p in block.parameters()]

    def show(*_: object) -> None:
        for parameter, shown in held:
            parameter.copy_(shown)

    def hide(*_: object) -> None:
        for parameter in block.parameters():
            parameter.fill_(torch.nan)

    block.register_forward_pre_hook(show)
    block.register_forward_hook(hide)
    hide()


@every_config
def test_members_come_from_the_model_or_from_perturb(path: Path) -> None:
    model, batch = make(path).eval(), small_batch(SMALL)
    if not can_forecast(model):
        return
    if model.probabilistic:
        assert forecast_of(model, batch, members=3).shape == shape_of(SMALL, 3, members=3)
    else:
        with pytest.raises(ValueError, match="--perturb"):
            forecast_of(model, batch, members=3)


@every_config
def test_members_do_not_depend_on_how_the_engine_cuts(path: Path) -> None:
    """两个窗口各三个成员：窗口分开要、成员分几次要、后面没有窗口，都是同样的；末几位随批的大小变。"""
    model, batch = make(path).eval(), small_batch(SMALL, count=2)
    if not can_forecast(model) or not model.probabilistic:
        return
    time = batch.time[:, : SMALL.frames_in]

    def made(windows: int, limit: int | None = None) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3 * windows)]
        with torch.no_grad():
            return rollout(model, batch.history[:windows], time[:windows], 1, SMALL, generators, limit)

    whole = made(2)
    for found in (made(2, 3), made(2, 2), made(2, 1), made(1)):
        torch.testing.assert_close(found, whole[: len(found)], rtol=1e-3, atol=1e-3)
    flat = whole.flatten(0, 1).flatten(1)  # (6, ...)
    assert (flat[:, None] - flat).abs().amax(2)[~torch.eye(6, dtype=torch.bool)].min() > 1e-2  # 个个不同


@every_config
def test_loss_ignores_invalid_targets(path: Path) -> None:
    model, batch = make(path).eval(), small_batch(SMALL)
    if not can_forecast(model):  # 重建：目标也是输入，改了它别处的输出也变
        return
    channels = slice(None) if model.probabilistic else 1  # 扩散的输入里有加了噪声的目标，各通道相干
    batch.valid[0, -1, channels] = False
    changed = batch.future.clone()
    changed[0, -1, channels] += 100
    with torch.no_grad():
        assert torch.equal(loss_of(model, batch._replace(future=changed)), loss_of(model, batch))


@every_config
def test_checkpoint_carries_the_whole_model(path: Path, tmp_path: Path) -> None:
    """写进文件再读回，装进另一个种子的模型：预报（不能预报的，损失）逐位相同。"""
    one, batch = make(path), small_batch(SMALL)
    loss_of(one.train(), batch)  # 归一化的滑动平均离开初值
    save_checkpoint(tmp_path / "one.ckpt", {"model": one.state_dict()})
    torch.manual_seed(1)
    other = build_model(small_config(path).model, SMALL)
    other.load_state_dict(load_checkpoint(tmp_path / "one.ckpt")["model"])
    compare = forecast_of if can_forecast(one) else loss_of
    assert torch.equal(compare(one.eval(), batch), compare(other.eval(), batch))


@every_config
def test_training_overfits_one_batch(path: Path) -> None:
    """均方误差的下限是 0：降掉的份额就是损失本身的。没有梯度步的模型不必。"""
    model, batch = make(path).train(), waves(SMALL)
    if not trainable(model):
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    goal = (1 - FALL) * loss_of(model, batch).item()
    for _ in range(MOST_STEPS):
        loss = loss_of(model, batch)
        if loss.item() < goal:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss {loss_of(model, batch).item():.3g} after {MOST_STEPS} steps, not below {goal:.3g}")


@cache
def lstm_in_bf16() -> bool:
    """这个处理器上 torch 的 LSTM 走不走得了半精度：有的指令集，oneDNN 没有这个核。"""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(4, 4)(torch.zeros(1, 1, 4))
    except RuntimeError:
        return False
    return True


@every_config
def test_bf16_autocast_trains_and_forecasts(path: Path) -> None:
    if path.stem.startswith("lstm") and not lstm_in_bf16():
        pytest.skip("oneDNN has no bf16 LSTM for this processor")
    batch = waves(SMALL)
    whole = loss_of(make(path).train(), batch).item()
    model = make(path).train()  # 另造一个：训练模式的一次前向就会动码本
    learnt = trainable(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(model, batch)
        if learnt:
            half.backward()
        made = forecast_of(model.eval(), batch) if can_forecast(model) else half
    assert half.item() == pytest.approx(whole, rel=0.02)
    assert made.isfinite().all()
    for name, p in learnt.items():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.filterwarnings("default")  # 编译器自己的警告，不是模型的
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.soak])]
)
@one_config_a_model
def test_compiled_loss_and_gradients_are_the_same(path: Path, backend: str) -> None:
    torch._dynamo.reset()
    model, batch = make(path).eval(), small_batch(SMALL)
    found = []
    for loss_function in (terms_of, torch.compile(terms_of, backend=backend)):
        torch.manual_seed(0)
        loss = loss_function(model, batch)["loss"]
        gradients = torch.autograd.grad(loss, list(trainable(model).values())) if trainable(model) else ()
        found.append([loss.detach(), *gradients])
    torch.manual_seed(1)
    if backend == "inductor" and not torch.equal(terms_of(model, batch)["loss"], found[0][0]):
        assert all(
            one.isfinite().all() for one in found[1]
        )  # 损失里抽随机数的：编译出来的是另一套，逐值的比较在 aot_eager
    else:
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_an_unknown_model_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no such model; nearest: persistence"):
        build_model({"name": "persistance"}, SMALL)
    with pytest.raises(ValueError, match="no such model; models: ar_pred_video_vanilla, climatology"):
        build_model({}, SMALL)


def test_only_how_it_samples_may_change_after_training() -> None:
    options = {"name": "var", "depth": 4, "sampling": {"cfg": 0.0, "top_k": None}}
    found = change_options(options, ["model.sampling.cfg=1.5", "model.sampling.top_k=40"])
    assert found == {**options, "sampling": {"cfg": 1.5, "top_k": 40}} and options["sampling"]["cfg"] == 0.0
    assert change_options(options, []) == options
    for name, text, message in (
        (
            "var",
            "model.depth=5",
            r"--set model\.depth=5: the weights were trained with it; .*var: model\.sampling$",
        ),
        ("latent_diffusion", "train.lr=1", r"for latent_diffusion: model\.sampler, model\.sampling_steps, "),
        ("cnn", "model.depth=5", r"what may change for cnn: nothing"),
        ("var", "sampling.cfg=1", r"--set sampling\.cfg=1: "),
    ):
        with pytest.raises(ValueError, match=message):
            change_options({"name": name}, [text])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**TINY, "depth": 10**9}, "has more than 1000 layers and parameters"),
        ({**TINY, "depth": 10**5}, "has more than 1000 layers and parameters"),
        ({"name": "weather_transformer", "dim": 10**12}, "does not fit into the memory"),
        ({**TINY, "depth": 20, "dim": 1024}, "does not fit into the memory"),
    ],
)
def test_a_model_too_large_is_one_line(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str) -> None:
    """停在造到一半的时候，不等内存用尽。"""
    monkeypatch.setattr(models, "MOST_PARTS", 1000)
    monkeypatch.setattr(models, "available_memory", lambda: 10**8)
    with pytest.raises(ValueError, match=rf"model.name = {options['name']}: the model {said}.*too large"):
        build_model(options, small_spec())
    assert not torch.nn.modules.module._global_module_registration_hooks
