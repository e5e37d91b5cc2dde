"""把坏的一步再走一遍：`python -m engine.studies.replay checkpoints/RUN/bad-step-N.ckpt [data.KEY=VALUE ...]`。

损失或梯度不是有限值时，训练留下那一步之前的权重与重走它要的（engine/training/run.py 的 keep_bad_step）。
这里照样走一步，说出头一个不是有限值的：数据里的、哪一层的输出、哪个参数的梯度。总是一个进程：几个进程训练的，
切成同样大的小批依次走，随机数属于窗口的都相同，dropout 的只与零号进程的相同。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from util.cli import Parser, loading, run_command

if TYPE_CHECKING:  # --help 不必等 torch
    from torch import Tensor, nn

    from engine.loading import Content
    from util.batch import Batch, DataSpec
    from util.config import RunConfig


@dataclass
class Culprits:
    """走的时候看见的；各只记头一个。"""

    layer: str | None = None
    gradient: str | None = None


def not_finite(value: object) -> str | None:
    """value（张量，或其中有张量的元组、列表、字典）里不是有限值的有几个；没有就是 None。"""
    tensors = floats(value)
    bad, count = sum(int((~t.isfinite()).sum()) for t in tensors), sum(t.numel() for t in tensors)
    return f"{bad} of {count} values not finite" if bad else None


def largest(value: object) -> float:
    """value 里绝对值最大的。"""
    return max((float(t.abs().max()) for t in floats(value) if t.numel()), default=0.0)


def floats(value: object) -> list[Tensor]:
    import torch
    from torch.utils._pytree import tree_leaves

    tensors = [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@contextmanager
def watched(model: nn.Module) -> Iterator[Culprits]:
    """`with watched(model) as found:` 里走一步；里层先走完，所以头一个就是最里面的那一层。"""
    found, handles = Culprits(), []

    def look(name: str) -> Any:
        def leave(module: nn.Module, inputs: object, output: object) -> None:
            if found.layer is None and (said := not_finite(output)):
                given = not_finite(inputs) or f"finite, at most {largest(inputs):.3g}"
                own = dict(module.named_parameters(recurse=False))
                weights = not_finite(own) or (f"finite, at most {largest(own):.3g}" if own else "none of its own")
                found.layer = f"{name} ({type(module).__name__}): output: {said}; input: {given}; weights: {weights}"

        return leave

    def grew(name: str) -> Any:
        def accumulated(parameter: Tensor) -> None:
            if found.gradient is None and (said := not_finite(parameter.grad)):
                found.gradient = f"{name}: {said}"

        return accumulated

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(look(name or "(model)")))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(grew(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def bad_fields(batches: Sequence[Batch], spec: DataSpec) -> list[str]:
    """送进模型的场里不是有限值的，各通道一行。"""
    lines = []
    for c, channel in enumerate(spec.channels):
        fields = [frames[:, :, c] for batch in batches for frames in (batch.history, batch.future)]
        if said := not_finite(fields):
            lines.append(f"data: {channel}: {said}")
    return lines


def walk_again(content: Content, config: RunConfig, path: str) -> tuple[str, Culprits | None]:
    """(走了一步的各项与数据里的毛病, 看见的)；走得通时后者是 None。"""
    import torch

    from engine.device import float32_matmuls
    from engine.loading import check_same_data
    from engine.objective import make_objective
    from engine.training.loop import frames_ahead, prepared
    from engine.training.run import epoch_batches, make_fabric
    from engine.training.snapshot import restore
    from engine.training.state import NonFinite, build_state, train_step
    from util.batch import DataSpec
    from util.checkpoint import set_random_state
    from util.data.batches import share_batches
    from util.data.dataset import open_data

    fabric, data = make_fabric(config), open_data(config.data)
    check_same_data(DataSpec.from_dict(content["spec"]), data.spec, path)
    count = len(epoch_batches(config, data, fabric, content["progress"]["epoch"]))
    state = build_state(fabric, config, data.spec, config.train.epochs * count, saved=content)
    changes = content["progress"].get("changes")
    state.objective = make_objective(config.train.objective, data.spec, changes, fabric.device)
    restore(fabric, state, content)
    starts = content["bad_step"]
    pieces = list(share_batches([starts], 0, 1, config.train.accumulate))
    windows = data.windows.with_future(frames_ahead(config, data, state.progress, count))
    batches = [fabric.to_device(windows.__getitems__(piece)) for piece in pieces]
    lines = bad_fields(batches, data.spec)
    set_random_state(content["random"][0])
    stance = torch.compiler.set_stance("force_eager")  # 编译了就看不见各层
    with float32_matmuls(config.train.matmul_precision), stance, watched(state.module) as found:
        step = train_step(fabric, state, config, prepared(batches, pieces, starts, config, state))
    terms = ", ".join(f"{name} {value:.6g}" for name, value in zip(step.names, step.values(), strict=True))
    said = "\n".join([f"step {state.progress.step + 1} of {content['run']} again: {terms}", *lines])
    try:
        step.terms()
    except NonFinite:
        return said, found
    return said, None


def replay(path: str, overrides: Sequence[str]) -> int:
    """重走一步，印出头一个坏的；又坏了是 0，这里走得通是 1。

    Raises:
        ValueError: 不是留下的坏的一步；数据不在、不同。
    """
    from engine.loading import checkpoint_config
    from util.config import least_batch
    from util.files.training_checkpoint import load_training
    from util.logger import setup_logging

    content = load_training(path)
    if "bad_step" not in content:
        raise ValueError(f"{path} holds no bad step; give a bad-step-N.ckpt, as a non-finite loss leaves it")
    setup_logging(None)
    config = checkpoint_config(content, path, overrides)
    run = config.run.model_copy(update={"devices": 1, "num_nodes": 1, "strategy": "auto"})
    train = config.train.model_copy(update={"accumulate": least_batch(config), "ema_decay": None})
    said, found = walk_again(content, config.model_copy(update={"run": run, "train": train}), path)
    print(said)
    if found is None:
        print("here the step is finite: another device, other data, or the dropout of another process made it differ")
        return 1
    print(f"first layer: {found.layer}" if found.layer else "the output of every layer is finite")
    if found.gradient:
        print(f"first gradient, from the loss backwards: {found.gradient}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口，返回退出码。"""
    parser = Parser(
        prog="python -m engine.studies.replay",
        description="Walk a training step again whose loss or gradient was not finite; name the first layer.",
    )
    parser.add_argument("checkpoint", metavar="bad-step-N.ckpt", help="what the training has left beside last.ckpt")
    parser.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help="where the data are now")
    arguments = parser.parse_args(argv)
    with loading():
        return replay(arguments.checkpoint, arguments.overrides)


if __name__ == "__main__":
    run_command(main)
