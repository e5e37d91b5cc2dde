"""各进程：怎样起的、零号进程替大家做的、归约。"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from torch.distributed import ReduceOp

from engine.device import to_host
from util.signals import Interrupted

T = TypeVar("T")
STEP_TASKS = "SLURM_STEP_NUM_TASKS"  # srun 起了几个；只申请了分配、直接 python 的没有
SHELLS = ("bash", "interactive")  # 作业叫这两个名字的，Lightning 当作一个交互的 shell，不是 srun 起的一组进程
OPERATIONS = {"mean": ReduceOp.SUM, "sum": ReduceOp.SUM, "max": ReduceOp.MAX}
COUNTS = {"torchrun": "--nnodes {} --nproc-per-node {}", "srun": "--nodes={} --ntasks-per-node={}"}


def launched_processes() -> tuple[str, int] | None:
    """(torchrun 或 srun, 起了几个进程)；None 是由我们自己起。"""
    if torch.distributed.is_torchelastic_launched():
        return "torchrun", int(os.environ["WORLD_SIZE"])
    shell = os.environ.get("SLURM_JOB_NAME") in SHELLS and os.environ.get("SLURM_PROCID") == "0"
    return None if shell or STEP_TASKS not in os.environ else ("srun", int(os.environ[STEP_TASKS]))


def check_launch(devices: int, num_nodes: int) -> None:
    """外面起的进程数要与配置的相同：多了，每一个都会以为只有自己；少了，就一直等下去。

    Raises:
        ValueError: 不同。
    """
    found = launched_processes()
    if found is None:
        return
    launcher, count = found
    right = f"{launcher} {COUNTS[launcher].format(num_nodes, devices)}"
    if count != devices * num_nodes:
        raise ValueError(
            f"{launcher} started {count} process(es), but devices x num_nodes = {devices} x {num_nodes} = "
            f"{devices * num_nodes}; start it with {right}, or set run.devices and run.num_nodes of the training"
        )
    if launcher == "srun" and count > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError(f"Lightning counts the tasks of srun by --ntasks-per-node; start it with {right}")


def environment() -> LightningEnvironment | None:
    """给 Fabric 的 plugins：分配里直接 python 的，Lightning 会当成 srun 起的，去等不会来的进程。"""
    return LightningEnvironment() if "SLURM_NTASKS" in os.environ and launched_processes() is None else None


class WholeInputs(MixedPrecision):
    """bf16-mixed，而送进模型的一批不动：Fabric 替 DDP 把它也换成半精度，目标就不准了，与一个设备时也不同。"""

    def convert_input(self, data: Any) -> Any:
        return data


def plugins(precision: str, device: str) -> list[Precision | ClusterEnvironment | CheckpointIO]:
    """给 Fabric 的 plugins；精度不是单精度时也在里面。"""
    ours = environment()
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    cast = WholeInputs(precision, kind) if precision == "bf16-mixed" else None
    return [plugin for plugin in (ours, cast) if plugin is not None]


def from_main(fabric: Fabric, action: Callable[[], T]) -> T:
    """零号进程做，结果给每个进程；做不成也一样，大家一起停，没有谁在等。

    Raises:
        ValueError, OSError, Interrupted: action 抛的。
    """
    outcome: Any = _attempt(action) if fabric.is_global_zero else (None, None)
    result, failure = fabric.broadcast(outcome)
    if failure is not None:
        raise failure
    return result


def from_first_here(fabric: Fabric, action: Callable[[], T]) -> T:
    """每台机器上的头一个进程各做一次，结果给同机的各个；哪一台做不成，大家一起停。

    Raises:
        ValueError, OSError: action 抛的。
    """
    outcome = _attempt(action) if fabric.local_rank == 0 else (None, None)
    outcomes: list[Any] = [outcome]
    if fabric.world_size > 1:
        outcomes = [None] * fabric.world_size
        torch.distributed.all_gather_object(outcomes, outcome)
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise failures[0]
    return outcomes[fabric.global_rank - fabric.local_rank][0]


def _attempt(action: Callable[[], object]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except (ValueError, OSError, Interrupted) as error:
        return None, error


def together(fabric: Fabric, check: Callable[[], None]) -> Callable[[], None]:
    """各进程走同样多次的循环里每次调的 check：谁的抛了 Interrupted，下一次大家在同一处一起抛；主机不等设备。"""
    if fabric.world_size == 1:
        return check
    heard = to_host(torch.zeros(1))

    def ask() -> None:
        nonlocal heard
        (signum,) = heard()
        if signum:  # 自己收到的要等大家都知道
            raise Interrupted(int(signum))
        _, stop = _attempt(check)
        own = stop.signum if isinstance(stop, Interrupted) else 0
        heard = to_host(reduce_tensor(fabric, torch.tensor([float(own)]), "max"))

    return ask


def reduce_tensor(fabric: Fabric, value: torch.Tensor, how: str) -> torch.Tensor:
    """各进程的同形张量合成一个（mean、sum、max）；一个进程时原样。"""
    reduced = value.to(fabric.device, non_blocking=True, copy=True)
    if fabric.world_size > 1:  # 不用 fabric.all_reduce：它每次先让各进程碰头，主机要等设备
        torch.distributed.all_reduce(reduced, OPERATIONS[how])
    return reduced / fabric.world_size if how == "mean" else reduced
