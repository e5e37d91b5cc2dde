"""验证损失：训练的目标在一个划分上的平均；选优、早停与测试损失都用它。"""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from engine.objective import Objective, has_field_loss, objective_loss, rolled
from engine.one_pass import Check, fit_cache, has_fits, load_fit
from engine.parallel import from_main, reduce_tensor, together
from engine.seeds import validation_seeds
from models import build_model
from models.interface import Learner, Network, is_codec
from util.batch import Batch, Predict, encoded_fields
from util.config import RunConfig, eval_batch_size
from util.data.batches import all_starts, split_batches
from util.data.dataset import WeatherData
from util.data.feed import feed

BASELINES = ("persistence", "climatology")  # 旁边的；名字是 models/ 里的，也是 Progress 的栏、metrics.csv 里的


def baseline_losses(
    model: Learner, objective: Objective, data: WeatherData, config: RunConfig, fabric: Fabric, check: Check
) -> dict[str, float]:
    """各基线的验证损失，同样的距离与权重；模型的损失不是场的误差（扩散、编号、自编码器）时比不得，一个也没有。

    气候态要看一遍训练数据才拟合得出，所以只在存着时才有：同样的数据评测过一次（每次训练末了都评）就存着。
    """
    if not has_field_loss(model):
        return {}
    baselines = {name: build_model({"name": name}, data.spec.bare) for name in BASELINES}
    if not load_known_fit(baselines["climatology"], data, fabric):
        del baselines["climatology"]
    return {
        name: validation_loss(baseline.to(fabric.device), objective, data, "val", config, fabric, check)
        for name, baseline in baselines.items()
    }


def load_known_fit(climatology: Network, data: WeatherData, fabric: Fabric) -> bool:
    """存着的拟合装进气候态。各进程读同一份；一份也没有时不算指纹，大的目录树上那要几十秒。"""
    known = from_main(fabric, lambda: fit_cache("climatology", data) if has_fits("climatology", data) else None)
    return known is not None and load_fit(climatology, known)


def counted(batch: Batch, encodes: Predict | None) -> torch.Tensor:
    """损失平均了几个场：预报数有效的目标，阶段一（encodes）数有效的、它编码的。"""
    valid = encoded_fields(batch, encodes)[1] if encodes else batch.valid[:, batch.history.shape[1] :]
    return valid.sum()


def validation_loss(
    model: Learner,
    objective: Objective,
    data: WeatherData,
    split: str,
    config: RunConfig,
    fabric: Fabric,
    check: Check,
) -> float:
    """按有效的场数加权（预报数目标的，阶段一数它编码的），eval 模式；随机数属于窗口，不动全局的。

    滚动训练的总是滚最长的一次：各次验证才比得了，选出的才是滚得远的。
    """
    steps = config.train.objective.rollout.longest
    ahead = data.spec.ahead(steps)
    starts = all_starts(data.segments[split], data.spec.frames_in + ahead, config.data.eval_stride)
    mine, most = (
        split_batches(starts[rank :: fabric.world_size], eval_batch_size(config)) for rank in (fabric.global_rank, 0)
    )
    batches = mine + most[: len(most) - len(mine)]  # 分片的模型走一步要各进程都来：少一批的陪着走，不计
    seeds = validation_seeds(config.run.seed, starts.tolist(), batches)
    loader = feed(data, batches, fabric.device, ahead)
    total = torch.zeros(2, dtype=torch.float64)
    encodes = model.encodes if is_codec(model) else None
    training = model.training
    model.eval()
    check = together(fabric, check)
    with torch.inference_mode(), fabric.autocast():
        for number, batch in enumerate(tqdm(loader, split, len(batches), leave=False, disable=fabric.global_rank > 0)):
            check()
            batch = rolled(batch._replace(seeds=next(seeds)), steps, objective)
            weight = float(counted(batch, encodes)) if number < len(mine) else 0.0
            loss = objective_loss(model, batch, objective)["loss"]
            total += torch.tensor([float(loss) * weight, weight])
    model.train(training)
    loss_sum, count = reduce_tensor(fabric, total, "sum").tolist()
    return loss_sum / count if count else float("nan")
