"""逐块编译、逐块丢弃激活：数一样，名字一样，不每步重新编译，内存少；做不到的一行说清。"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engine import blocks
from engine.blocks import checkpoint_blocks, compile_blocks
from engine.commands import evaluate_command, inference_command
from models import build_model
from models.layers.attention import block_mask, token_mask
from tests.engine.runs import checkpoint, losses, train_here, write_run
from tests.models.small import small_batch, small_spec, terms_of, tiny_model
from util.batch import Batch, Seeds

pytestmark = pytest.mark.filterwarnings("default")  # 编译器自己的警告
CONVLSTM = {"name": "convlstm", "hidden": 8, "layers": 2}


@pytest.fixture
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """编译只到图（不生成核）；返回的函数数到现在为止编译了几份。eager 重算时不还原随机状态，丢弃激活的要 aot_eager。"""
    monkeypatch.setattr(blocks, "check_compiler", lambda device, key: None)  # 不生成核，用不到 C++ 编译器
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance(force_backend=getattr(request, "param", "eager")):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def seeded(batch: Batch, step: int) -> Batch:
    count = len(batch.history)
    return batch._replace(seeds=Seeds(tuple(range(count)), tuple(i / count for i in range(count)), step))


def gradients(model: Any, batch: Batch) -> list[Tensor]:
    torch.manual_seed(3)
    loss = terms_of(model, batch)["loss"]
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_a_new_mask_does_not_recompile(graphs) -> None:
    """遮挡每步、每层都新抽：两种块各编译一次，几层共用；批的大小变了才多一份，再变也不再多。"""
    spec = small_spec()
    model = tiny_model(spec, depth=3, decoder_depth=2, dropout=0.1)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    found = []
    for step, count in enumerate((2, 2, 2, 3, 4, 2)):
        batch = seeded(small_batch(spec, count), step)
        for one, other in zip(gradients(compiled, batch), gradients(model, batch), strict=True):
            assert torch.equal(one, other)
        found.append(graphs())
    assert found[:3] == [2, 2, 2] and found[3] <= 6 and found[3:] == [found[3]] * 3
    assert compiled.state_dict().keys() == model.state_dict().keys()


def test_a_new_block_mask_does_not_recompile(graphs) -> None:
    """FlexAttention 在编译了的块里：遮挡是输入，整块是一张图。"""
    model = tiny_model(small_spec(channels=1, grid=(8, 16)), token_size=[1, 1], dim=32, depth=1).eval()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    x = torch.randn(2, 384, 32)
    for seed in range(3):
        hidden = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)).lt(0.5).triu(1)
        with torch.no_grad():
            found = compiled.encoder[0](x, block_mask(hidden, 128))
            torch.testing.assert_close(found, model.encoder[0](x, token_mask(hidden, 128)))
    assert graphs() == 1 and not counters["graph_break"]


@pytest.mark.parametrize("graphs", ["aot_eager"], indirect=True)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["ar_pred", "convlstm"])
def test_checkpointing_gives_the_same_gradients_in_less_memory(name: str, compiled: bool, graphs) -> None:
    """dropout、遮挡、拿掉的区块重算时都是同样的；一块被调用几次的（ConvLSTM 的一步）也对。"""
    spec = small_spec()
    model: Any = tiny_model(spec, depth=3, dropout=0.2) if name == "ar_pred" else build_model(CONVLSTM, spec)
    lean = copy.deepcopy(model)
    checkpoint_blocks(lean)
    if compiled:
        compile_blocks(lean)
    batch = seeded(small_batch(spec), 1)
    for one, other in zip(gradients(lean, batch), gradients(model, batch), strict=True):
        assert torch.equal(one, other)
    assert bool(graphs()) is compiled
    assert lean.state_dict().keys() == model.state_dict().keys()
    if not compiled:  # 编译了的由编译器留，数不到
        assert saved_bytes(lean, batch) < 0.6 * saved_bytes(model, batch)
        again = copy.deepcopy(lean)  # 副本的块用的是副本的权重
        with torch.no_grad():
            for parameter in lean.parameters():
                parameter.zero_()
        assert torch.equal(gradients(again, batch)[0], gradients(model, batch)[0])


def saved_bytes(model: Any, batch: Batch) -> int:
    """前向留给反向的，权重除外。"""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = terms_of(model, batch)["loss"]
    del loss
    return sum(held.values())


def test_a_run_that_compiles_gives_the_same_losses_and_checkpoint(make_tree, tmp_path: Path, graphs) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree, model={"query": "resampled"}, train={"ema_decay": 0.9, "epochs": 1})
    assert train_here(config, "run.name=plain") == 0
    assert graphs() == 0
    assert train_here(config, "run.name=compiled", "train.compile=true", "train.preflight=true") == 0
    assert 0 < graphs() <= 6  # 两种块，整批、末一批、验证
    assert losses(tmp_path, "compiled") == losses(tmp_path, "plain")
    plain, compiled = checkpoint(tmp_path, "plain"), checkpoint(tmp_path, "compiled")
    for part in ("model", "ema"):
        torch.testing.assert_close(compiled[part], plain[part], rtol=0, atol=0)
    assert all(
        "encoder.0.attention.qkv" in (tmp_path / f"log/{run}/train.log").read_text() for run in ("plain", "compiled")
    )
    assert "matrix products: precision highest" in (tmp_path / "log/compiled/train.log").read_text()


@pytest.mark.parametrize("model", [{"name": "lstm", "hidden": 4}, {"name": "persistence"}])
def test_a_model_without_blocks_is_refused(model: dict[str, Any]) -> None:
    built = build_model(model, small_spec())
    with pytest.raises(ValueError, match=f"^train.compile = true works block by block, and {model['name']} has no"):
        compile_blocks(built)
    with pytest.raises(ValueError, match="^train.activation_checkpointing = blocks works block by block"):
        checkpoint_blocks(built)


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def nothing() -> str:
        raise InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    with pytest.raises(ValueError, match=r"^train.compile = true needs a C\+\+ compiler here; install g\+\+"):
        compile_blocks(tiny_model(small_spec()))


def test_compiled_forecasts_are_the_same(make_tree, tmp_path: Path, graphs) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    train_here(write_run(tmp_path, tree, train={"epochs": 1}), "run.name=a")
    arguments = ["--checkpoint", str(tmp_path / "checkpoints/a/best.ckpt")]
    when = ["--time", "2000-02-15T06", "--steps", "2"]
    for words in ([], ["--compile"]):
        assert not graphs()
        out = str(tmp_path / "".join(["forecast", *words]))
        assert inference_command([*arguments, *when, *words, "--out", out]) == 0
    assert graphs()
    for lead in ("006", "012"):
        made, expected = (
            np.load(tmp_path / way / f"forecast+{lead}h.npy") for way in ("forecast--compile", "forecast")
        )
        np.testing.assert_allclose(made, expected, rtol=1e-5)
    evaluated = str(tmp_path / "evaluation")
    assert evaluate_command([*arguments, "--compile", "--save", "none", "--out", evaluated]) == 0
    assert "--compile" in (tmp_path / "evaluation/report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="^--compile: a program of torch.export runs as it was exported"):
        inference_command(["--program", "a.pt2", "--compile", *when, "--out", evaluated])
