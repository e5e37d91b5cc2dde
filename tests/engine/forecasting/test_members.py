"""集合的成员：种子只看运行的种子、起报时间、成员的序号；分批、抽稀、成员数、进程数、哪个命令都不改变抽的数。"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from torch import Generator, Tensor, nn

from engine.commands import evaluate_command, inference_command
from engine.forecasting import members
from engine.forecasting.members import Ensemble, ensemble, member_seed
from models.layers import var_sampling
from tests.engine.runs import ROOT, SMALL_MODEL, train_here, write_run
from tests.models.small import make_model, rollout, small_batch, small_spec
from util.batch import DataSpec
from util.checkpoint import load_checkpoint, save_checkpoint
from util.cli import run_command

STAGE = {
    "name": "vqvae", "width": 8, "groups": 4, "multipliers": [1, 2], "blocks": 1, "attention": False,
    "middle_attention": False, "latent_dim": 4, "vocabulary": 16, "scales": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "perturbed": SMALL_MODEL,
    "latent_diffusion": {
        "name": "latent_diffusion", "base_channels": 8, "multipliers": [1, 2], "depth": 1, "attention_levels": [],
        "sampler": "ddpm", "sampling_steps": 4, "sample_chunk": 2,
    },
    "dit": {
        "name": "dit", "size": None, "dim": 16, "depth": 1, "heads": 2, "patch": 4, "sampling_steps": 3,
        "sample_chunk": 2,
    },
    "var": {
        "name": "var", "first_stage": STAGE, "depth": 2, "width": 16, "heads": 2,
        "sampling": {"cfg": 0.0, "top_k": None, "top_p": 1.0},
    },
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
ROUNDING = 5e-5  # 标准差的几倍，文件里单精度的开尔文也在内；抽的数若不同，差在百倍以上
EQUAL_TOKENS = 0.99  # 舍入偶尔换掉 VAR 的一个编号，后面的跟着变
STEPS, MEMBERS, TIME = 2, 3, "2000-02-12T00"
STARTS = 16 - 3 - STEPS + 1  # 测试段四天
Draws = dict[int, bytes]  # 种子 → 发生器用过之后的状态：同样的种子、同样的状态，抽的就是同样的数


def made(name: str, spec: DataSpec) -> Any:
    """权重随机而大小适中的模型：看得见历史，各编号的概率相差得开。"""
    torch.manual_seed(0)
    model = make_model(MODELS[name], spec)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
    if name == "var":
        nn.init.normal_(model.first_stage.quantizer.codebook.weight, std=0.3)
        nn.init.normal_(model.net.head.weight, std=0.4)
    return model.eval()


def wanted(name: str, count: int = MEMBERS, seed: int = 42) -> Ensemble:
    noise, smooth = (1.0, 20.0) if name == "perturbed" else (0.0, 0.0)
    return Ensemble(count, noise, smooth, seed)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Draws]:
    """从上一次问起，用过的各个发生器。"""
    kept: list[Generator] = []

    def keep() -> Generator:
        kept.append(Generator())
        return kept[-1]

    def used() -> Draws:
        states = {g.initial_seed(): state_of(g) for g in kept if state_of(g) != fresh(g)}
        kept.clear()
        return states

    monkeypatch.setattr(members, "Generator", keep)
    return used


def state_of(generator: Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def fresh(generator: Generator) -> bytes:
    return state_of(Generator().manual_seed(generator.initial_seed()))


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """种子 → VAR 依次抽到的编号。"""
    found: dict[int, list[Tensor]] = {}
    draw = var_sampling.draw

    def noting(logits: Tensor, generators: Any) -> Tensor:
        codes = draw(logits, generators)
        for generator, row in zip(generators, codes, strict=True):
            found.setdefault(generator.initial_seed(), []).append(row)
        return codes

    monkeypatch.setattr(var_sampling, "draw", noting)
    return found


def equal_share(one: dict[int, list[Tensor]], other: dict[int, list[Tensor]]) -> float:
    """两边都有的成员里，相同的编号占多少。"""
    both = one.keys() & other.keys()
    assert both
    return torch.cat([torch.cat(one[seed]) == torch.cat(other[seed]) for seed in both]).double().mean().item()


def test_seeds_differ_and_stay() -> None:
    seeds = {
        member_seed(run, hour, member) for run in (0, 42, 2**63) for hour in (-6, 0, 6, 2**40) for member in range(5)
    }
    assert len(seeds) == 3 * 4 * 5
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert member_seed(42, 263_000, 1) == 1028318653490839325  # 换一种算法，从前的集合就重做不出来


@every_model
def test_members_do_not_depend_on_the_batch(
    name: str, drawn: Callable[[], Draws], tokens: dict[int, list[Tensor]]
) -> None:
    """三个起报时间一起、分开、隔一个、一次一个样本、多要几个成员：抽的数逐位相同，场到舍入为止。"""
    spec = small_spec()
    model, batch = made(name, spec), small_batch(spec)
    found: list[tuple[Tensor, Draws, dict[int, list[Tensor]]]] = []

    def run(windows: slice, count: int = MEMBERS, limit: int | None = None, seed: int = 42) -> Tensor:
        time = batch.time[windows, : spec.frames_in]
        frames = ensemble(model, batch.history[windows], time, STEPS, spec, wanted(name, count, seed), limit)
        with torch.no_grad():
            fields = torch.stack(list(frames), 2)  # (B, M, L, C, H, W)
        found.append((fields, drawn(), dict(tokens)))
        tokens.clear()
        return fields

    whole = run(slice(None))
    everything = found[0]
    assert whole.shape[:3] == (3, MEMBERS, STEPS)
    for windows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3, 2)):
        near(run(windows), whole[windows])
    for limit in (1, 2, 4):
        near(run(slice(None), limit=limit), whole)
    near(run(slice(None), count=5)[:, :MEMBERS], whole)
    for _, draws, codes in found[1:]:
        assert draws and all(draws[seed] == state for seed, state in everything[1].items() if seed in draws)
        if name == "var":
            assert equal_share(codes, everything[2]) >= EQUAL_TOKENS
    assert found[-1][1].keys() > everything[1].keys()
    other = run(slice(None), seed=43)
    assert not found[-1][1].keys() & everything[1].keys()
    first = 1 if name == "perturbed" else 0  # 零号成员不加扰动
    apart = [whole[:, a] - whole[:, b] for a in range(MEMBERS) for b in range(a)] + [(other - whole)[:, first:]]
    assert min(float(part.flatten(1).std(1).min()) for part in apart) > 100 * ROUNDING


def near(one: Tensor, other: Tensor) -> None:
    assert ((one - other).abs().max() / other.std()).item() < ROUNDING


def test_noise_depends_on_the_start_alone(drawn: Callable[[], Draws]) -> None:
    """同样的历史、不同的起报时间，成员不同；不知道时刻时以 0 代替。"""
    spec = small_spec()
    model, history = made("dit", spec), small_batch(spec, count=1).history
    back = torch.arange(1 - spec.frames_in, 1)[None] * spec.interval_hours

    def run(time: Tensor | None) -> Tensor:
        with torch.no_grad():
            return torch.stack(list(ensemble(model, history, time, 1, spec, wanted("dit"))))

    one, two, epoch, unknown = run(back + 240), run(back + 246), run(back), run(None)
    assert (one - two).std() > 0.1
    assert torch.equal(epoch, unknown)


def test_perturbed_members_of_a_probabilistic_model_draw_on() -> None:
    """先扰动初值，模型接着从同一个发生器抽；不碰全局的随机数。"""
    spec = small_spec()
    model, batch = made("dit", spec), small_batch(spec)
    before = torch.get_rng_state()
    with torch.no_grad():
        frames = list(ensemble(model, batch.history, batch.time[:, :3], 2, spec, Ensemble(2, 0.1, 0.0, 42)))
        hours = batch.time[:, 2].tolist()
        generators = [Generator().manual_seed(member_seed(42, hour, m)) for hour in hours for m in range(2)]
        noise = torch.stack([torch.randn(batch.history.shape[1:], generator=g) for g in generators]) * 0.1
        noise[::2] = 0
        history, time = (part.repeat_interleave(2, 0) for part in (batch.history, batch.time[:, :3]))
        expected = rollout(model, history + noise, time, 2, spec, generators)  # (B·M, 1, L, C, H, W)
    torch.testing.assert_close(torch.stack(frames, 2).flatten(0, 1), expected[:, 0])
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- 两个命令


@pytest.fixture(scope="module")
def trained(make_tree, tmp_path_factory) -> Path:
    """一次小的训练；别的模型的检查点由它改成。"""
    folder = tmp_path_factory.mktemp("run")
    tree = make_tree(folder / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-14")
    config = write_run(folder, tree, train={"epochs": 1})
    splits = "{train: [2000-01-01, 2000-01-31], val: [2000-02-01, 2000-02-10], test: [2000-02-11, 2000-02-14]}"
    train_here(config, "run.name=small", f"data.splits={splits}")
    return folder / "checkpoints/small/best.ckpt"


@pytest.fixture(scope="module")
def checkpoints(trained: Path) -> dict[str, Path]:
    """每个模型两个检查点：`名字` 一批装下全部窗口，`名字-N` 一次 N 个样本。"""
    content = load_checkpoint(trained)
    spec, found = DataSpec.from_dict(content["spec"]), {}
    for name in MODELS:
        model = made(name, spec)
        options = model.portable_options() if name == "var" else MODELS[name]
        for size in (1000, 1, 2 * MEMBERS):
            label = name if size == 1000 else f"{name}-{size}"
            config = {**content["config"], "model": MODELS[name]}
            config["train"] = {**config["train"], "batch_size": size}
            found[label] = trained.with_name(f"{label}.ckpt")
            changes = {"config": config, "model_options": options, "model": model.state_dict()}
            save_checkpoint(found[label], {**content, **changes})
    return found


def arguments(checkpoint: Path, out: Path) -> list[str]:
    noise = ["--perturb", "1", "--smooth", "20"] if checkpoint.stem.startswith("perturbed") else []
    size = ["--steps", str(STEPS), "--members", str(MEMBERS)]
    return ["--checkpoint", str(checkpoint), "--out", str(out), *size, *noise]


def check_members_equal(whole: Path, other: Path) -> int:
    """两个文件夹的 forecast.nc：后者的每个起报时间，成员都与前者的相同，到舍入为止；返回起报时间的个数。"""
    one, two = (xr.open_dataset(folder / "forecast.nc", decode_timedelta=True) for folder in (whole, other))
    found, expected = two["t2m"], one["t2m"].sel(time=two.time)
    assert found.dims == expected.dims and found.sizes["number"] == MEMBERS
    assert float(abs(found - expected).max() / one["t2m"].std()) < ROUNDING
    return two.sizes["time"]


@every_model
def test_evaluation_and_inference_make_the_same_members(
    name: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    drawn: Callable[[], Draws],
    tokens: dict[int, list[Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """评测一批全部窗口、一次一个样本而隔一个起点取一个，与在其中一个时刻的预报。"""
    commands: dict[str, tuple[str, Callable[[list[str]], int], list[str]]] = {
        "whole": (name, evaluate_command, []),
        "strided": (f"{name}-1", evaluate_command, ["--stride", "2"]),
        "inference": (name, inference_command, ["--time", TIME]),
    }
    results: dict[str, tuple[Draws, dict[int, list[Tensor]]]] = {}
    for out, (label, command, more) in commands.items():
        assert command([*arguments(checkpoints[label], tmp_path / out), *more]) == 0
        results[out] = drawn(), dict(tokens)
        tokens.clear()
    draws, codes = results["whole"]
    assert len(draws) == MEMBERS * STARTS
    for out, starts in (("strided", (STARTS + 1) // 2), ("inference", 1)):
        own, own_codes = results[out]
        assert len(own) == MEMBERS * starts and all(draws[seed] == state for seed, state in own.items())
        if name == "var":
            share = equal_share(own_codes, codes)
            with capsys.disabled():
                print(f"\nvar, {out}: {share:.2%} of the tokens equal")
            assert share >= EQUAL_TOKENS
            if share < 1:
                continue
        assert check_members_equal(tmp_path / "whole", tmp_path / out) == starts


def test_two_processes_make_the_members_of_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """torchrun 起两个进程，依次评测各个模型，每批两个窗口；一个进程是一批全部窗口。"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(checkpoints[f"{name}-{2 * MEMBERS}"]) for name in MODELS]
    command = [*torchrun, "-m", "tests.engine.forecasting.test_members", str(tmp_path / "two"), *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in MODELS:
        one = checkpoints[name]
        assert evaluate_command(arguments(one, tmp_path / name)) == 0
        assert check_members_equal(tmp_path / name, tmp_path / "two" / f"{name}-{2 * MEMBERS}") == STARTS


def evaluate_all() -> None:
    for path in map(Path, sys.argv[2:]):
        evaluate_command(arguments(path, Path(sys.argv[1]) / path.stem))


if __name__ == "__main__":  # torchrun 之下
    run_command(evaluate_all)
