"""模型的名字就是文件名：models/<name>.py 里的 Config 与 Model；加一个模型不必改任何已有文件。"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from models.interface import (
    Adjustable,
    Autoencoder,
    Forced,
    LeadConditioned,
    Learner,
    Network,
    Portable,
    Stacked,
    is_codec,
)
from util.batch import DataSpec
from util.checkpoint import forecast_weights
from util.cli import one_line, out_of_memory
from util.config import apply_overrides, load_config
from util.data.resident import available_memory
from util.files.package import CONFIG
from util.files.training_checkpoint import load_training
from util.strict import Strict, nearest, validate

NOT_MODELS = {"__init__", "interface"}
MOST_PARTS = 100_000  # 最大的模型几千个


def model_names() -> list[str]:
    """models/ 下全部可用的名字。"""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_MODELS)


def build_config(options: Mapping[str, Any], where: str = "model") -> Strict:
    """YAML 的 model 段 → 该模型的 Config（严格）。

    Raises:
        ValueError: 没有 name、没有这个模型、键或类型不对。
    """
    name = options.get("name")
    if name not in model_names():
        raise ValueError(
            f"{where}: model.name = {name!r}: no such model; {nearest(str(name), model_names(), 'models')}"
        )
    return validate(config_class(str(name)), {k: v for k, v in options.items() if k != "name"}, where, "model")


def config_class(name: str) -> type[Strict]:
    """那个模型的 Config。"""
    return importlib.import_module(f"models.{name}").Config


def build_model(options: Mapping[str, Any], spec: DataSpec) -> Learner:
    """造出模型（随机数取自全局发生器）。

    Raises:
        ValueError: 配置不对，或这个模型做不到 spec 要求的事（由构造函数说明；接不住外强迫的在这里）。
    """
    config, kind, source = build_config(options), _kind(options), options.get("first_stage")
    _check_inputs(options["name"], spec)
    with _limited(options["name"]):
        return kind(config, spec) if source is None else kind(config, spec, open_first_stage(source, spec.bare))


@contextmanager
def _limited(name: str) -> Iterator[None]:
    """里面造一个模型，一边造一边数。

    Raises:
        ValueError: 层与参数太多，或内存里放不下：选项里的大小多写了几个零。
    """
    parts, room = count(1), available_memory()

    def register(_owner: nn.Module, _key: str, part: nn.Module | nn.Parameter | None) -> None:
        nonlocal room
        if isinstance(part, nn.Parameter) and not isinstance(part.data, FakeTensor):
            room -= part.nbytes
        if next(parts) > MOST_PARTS or room < 0:
            reached = (
                f"has more than {MOST_PARTS} layers and parameters" if room >= 0 else "does not fit into the memory"
            )
            raise ValueError(f"model.name = {name}: the model {reached}; its sizes in the config are too large")

    hooks = [register_module_module_registration_hook(register), register_module_parameter_registration_hook(register)]
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"model.name = {name}: the model does not fit into the memory ({one_line(error) or 'MemoryError'}); its "
            "sizes in the config are too large"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()


def without_files(options: Mapping[str, Any], spec: DataSpec) -> dict[str, Any]:
    """同样的模型不必读文件的选项：阶段一的检查点换成它记着的；预训练的权重读一遍，留下结构。

    Raises:
        ValueError: 见 build_model；first_stage 的文件不在、不是阶段一。
    """
    if file := first_stage_file(options):
        check_first_stage(options)
        return {**options, "first_stage": _first_stage_content(file)["model_options"]}
    if options.get("first_stage") is None and isinstance(_kind(options), Portable):
        model = build_model(options, spec)
        assert isinstance(model, Portable)
        return model.portable_options()
    return dict(options)


def has_blocks(options: Mapping[str, Any]) -> bool:
    """激活丢得了吗：是不是由块叠成的（Stacked）。"""
    return isinstance(_kind(options), Stacked)


def change_options(options: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """检查点里模型的选项，改过预报时才用到的（模型的 at_inference 点名：采样的步数、引导的强度）。

    Args:
        changes: model.KEY=VALUE，写法与训练的覆盖相同。

    Raises:
        ValueError: 那个选项属于训练好的权重。
    """
    name, kind = options["name"], _kind(options)
    free = kind.at_inference if isinstance(kind, Adjustable) else ()
    for text in changes:
        section, _, key = text.partition("=")[0].strip().partition(".")
        if section != "model" or key.partition(".")[0] not in free:
            works = ", ".join(f"model.{key}" for key in free) or "nothing"
            raise ValueError(f"--set {text}: the weights were trained with it; what may change for {name}: {works}")
    return apply_overrides({"model": dict(options)}, changes)["model"]


def first_stage_file(options: Mapping[str, Any]) -> str | None:
    """first_stage 指的检查点；是 YAML、是内嵌的选项、没有这个键时为 None。"""
    source = options.get("first_stage")
    return source if isinstance(source, str) and Path(source).suffix not in (".yaml", ".yml") else None


def check_first_stage(options: Mapping[str, Any]) -> None:
    """model 段里 first_stage 写的文件在不在；不必等数据打开。

    Raises:
        ValueError: 文件不在（写明怎样训练一个），或给的是文件夹。
    """
    source = options.get("first_stage")
    if not isinstance(source, str) or Path(source).is_file() or (Path(source) / CONFIG).is_file():
        return
    path, where = Path(source), f"model.first_stage = {source}"
    if path.is_dir():
        raise ValueError(f"{where}: a folder; give the file {path / 'best.ckpt'}")
    if first_stage_file(options) is None:
        raise ValueError(f"{where}: no such file; wanted: the YAML of a first stage, or checkpoints/RUN/best.ckpt")
    # checkpoints/vqvae/best.ckpt 由 config/vqvae.yaml 训练；从运行名看不出来时给最小的
    run = path.parent.name
    known = (Path(__file__).parent.parent / "config" / f"{run}.yaml").is_file()
    yaml, name = (run, run) if known else ("sd_vae_small", "RUN")
    raise ValueError(f"{where}: no such file; python train.py --config config/{yaml}.yaml run.name={name} trains one")


def open_first_stage(source: str | Mapping[str, Any], spec: DataSpec) -> Autoencoder:
    """阶段二的 first_stage → 造好的阶段一。

    Args:
        source: 阶段一的检查点；或一份 YAML（按它的 smoke 段缩小，随机的权重，只供预检与测试）；
            或它的选项本身（阶段二的检查点里存的，权重随后从那里来）。

    Raises:
        ValueError: 文件不在、不是阶段一、阶段一的统计量还没有、数据不同。
    """
    if not isinstance(source, str):
        return _checked(build_model(source, spec), str(source.get("name")))
    check_first_stage({"first_stage": source})
    if first_stage_file({"first_stage": source}) is None:
        return _checked(build_model(load_config(source, smoke=True).model, spec), source)
    content = _first_stage_content(source)
    check_same_fields(DataSpec.from_dict(content["spec"]), spec, source)
    stage = _checked(build_model(content["model_options"], spec), source)
    weights = forecast_weights(content)
    check_weights(stage, weights, f"model.first_stage = {source}: made by another version, train it again")
    stage.load_state_dict(weights)
    hours = content["spec"]["interval_hours"]
    if stage.encodes == "tendency" and hours != spec.interval_hours:
        raise ValueError(
            f"model.first_stage = {source}: encodes changes over {hours} h; here a step is {spec.interval_hours} h"
        )
    if not stage.latents_known:
        where, best = f"model.first_stage = {source}", Path(source).with_name("best.ckpt")
        if best.is_file() and best.name != Path(source).name:
            raise ValueError(f"{where}: holds no statistics of the latents, which only best.ckpt gets; give {best}")
        raise ValueError(f"{where}: its training has not finished, the latents have no statistics")
    return stage


def check_weights(model: Network, weights: Mapping[str, Any], what: str) -> None:
    """检查点的权重与模型的名字、形状都相同。

    Raises:
        ValueError: 头一处不同；what 是这句话的开头。
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "absent"
        expected = tuple(own[name].shape) if name in own else "absent"
        if found != expected:
            raise ValueError(f"{what}: {name} is {found} in the checkpoint, {expected} here")


def check_same_fields(theirs: DataSpec, ours: DataSpec, source: str) -> None:
    """阶段一与阶段二的场要相同；帧数不必，间隔只有编码差的才要相同（open_first_stage）。

    Raises:
        ValueError: 头一处不同。
    """
    for key in ("channels", "latitudes", "longitudes", "mean", "std"):
        held, asked = getattr(theirs, key), getattr(ours, key)
        if held != asked:
            raise ValueError(f"model.first_stage = {source}: trained with other {key}: {held}, here {asked}")


def _first_stage_content(source: str) -> dict[str, Any]:
    content = load_training(source)
    if "model_options" not in content:  # 缓存的基线，或从前的检查点
        raise ValueError(f"model.first_stage = {source}: not an autoencoder; wanted: sd_vae, rae or vqvae")
    return content


def _kind(options: Mapping[str, Any]) -> Any:
    """模型的类。"""
    return importlib.import_module(f"models.{options['name']}").Model


def _check_inputs(name: str, spec: DataSpec) -> None:
    asked = {"forcings": spec.forcings, "roles": spec.diagnostic, "lead_hours": spec.lead_hours or ()}
    for key, value in asked.items():
        able = LeadConditioned if key == "lead_hours" else Forced
        if value and not isinstance(_kind({"name": name}), able):
            works = ", ".join(other for other in model_names() if isinstance(_kind({"name": other}), able))
            text = ", ".join(map(str, value))
            raise ValueError(f"data.{key} = {text}: {name} cannot take them; models that can: {works}")


def _checked(model: Learner, source: str) -> Autoencoder:
    if not is_codec(model):
        raise ValueError(f"model.first_stage = {source}: not an autoencoder; wanted: sd_vae, rae or vqvae")
    return model
