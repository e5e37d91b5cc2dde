"""训练循环：续训与没中断时逐位相同，随时被杀都有好检查点，坏事一行说清。"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.training import loop
from engine.training.preflight import smoke
from engine.training.state import train_step
from engine.versions import versions
from tests.engine.runs import checkpoint, losses, run_script, start_script, state_digests, train_here, write_run
from tests.holding import held_elsewhere, two_at_once
from util.checkpoint import load_checkpoint
from util.config import load_config

pytestmark = pytest.mark.usefixtures("unrendered")
RANDOM = {"dropout": 0.1}  # 让每一步都用到随机数
DRAWN = {"query": "resampled"}  # 拿掉的区块、遮挡、query：损失里的随机数都有
FIXED = {"random_patchify": False, "mask_ratio": 1.0}  # 损失不含随机数，才比得出高低
EVERYTHING = {
    "epochs": 3,
    "accumulate": 2,
    "ema_decay": 0.9,
    "clip_norm": 1.0,
    "schedule": {"name": "onecycle"},
    "precision": "bf16-mixed",
}
ROLLED = {  # 停在滚两步的中间：一轮 10 步
    "epochs": 4,
    "lr": 0.05,
    "accumulate": 2,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "final_weight_decay": 0.3,
    "schedule": {"name": "plateau", "factor": 0.5, "patience": 0},
    "objective": {"rollout": {"schedule": [[0, 1], [8, 2], [30, 3]]}},
}


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "tree"
    return make_tree(root, ("t2m", "z_level_00"), (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture
def tree_run(tree, tmp_path):
    """写一份运行 YAML 的函数。"""
    data = {**tree.data, "pressure_hpa": [50.0]}
    return lambda **changes: write_run(tmp_path, tree._replace(data=data), **changes)


def same_weights(a: dict, b: dict) -> bool:
    return a["model"].keys() == b["model"].keys() and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def interrupt_at(monkeypatch, step: int, signum: int = signal.SIGINT) -> None:
    """第 step 步之后给自己发一个信号。"""

    def stepping(fabric, state, config, batches):
        value = train_step(fabric, state, config, batches)
        if state.progress.step + 1 == step:
            os.kill(os.getpid(), signum)
        return value

    monkeypatch.setattr(loop, "train_step", stepping)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_saving_changes_nothing(tree_run, tmp_path, options):
    """每一步之前都存（包括一步没走的时候）与从不存，损失逐位相同。"""
    config = tree_run(model=RANDOM, train={**options, "epochs": 1})
    train_here(config, "run.name=never")
    train_here(config, "run.name=always", "checkpoint.every_minutes=1e-9")
    assert losses(tmp_path, "always") == losses(tmp_path, "never")


@pytest.mark.parametrize(
    ("options", "every"),
    [({}, False), (EVERYTHING, False), (ROLLED, False), pytest.param(EVERYTHING, True, marks=pytest.mark.soak)],
    ids=["plain", "everything", "rolled", "at every step"],
)
def test_resume_equals_uninterrupted(tree_run, tmp_path, monkeypatch, options, every):
    """停在一轮的中间，或者每一步之后都停一次。"""
    config = tree_run(model={**RANDOM}, train=options)
    assert train_here(config, "run.name=whole") == 0
    whole = losses(tmp_path, "whole")
    cuts = range(1, len(whole)) if every else [len(whole) // 2 + 1]
    resume = None
    for cut in cuts:
        with monkeypatch.context() as patch:
            interrupt_at(patch, cut)
            assert train_here(config, "run.name=cut", resume=resume) == 130
        assert len(losses(tmp_path, "cut")) == cut
        torch.manual_seed(7)  # 换了进程，全局随机状态自然不同
        resume = "auto"
    assert train_here(config, "run.name=cut", resume=resume) == 0
    assert losses(tmp_path, "cut") == whole
    assert losses(tmp_path, "cut", "val", "loss") == losses(tmp_path, "whole", "val", "loss")
    assert losses(tmp_path, "cut", name="lr") == losses(tmp_path, "whole", name="lr")
    assert same_weights(checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "cut"))
    measured = ("seconds", "peak_memory", "climatology")  # 量出来的；气候态末了才拟合，头一个运行没有。其余逐个相同
    one, two = ({**checkpoint(tmp_path, run)["progress"], **dict.fromkeys(measured)} for run in ("whole", "cut"))
    assert one == two


def test_interrupted_during_validation_resumes_there(tree_run, tmp_path, monkeypatch):
    config = tree_run(model=RANDOM)
    assert train_here(config, "run.name=whole") == 0
    steps = len(losses(tmp_path, "whole")) // 2
    with monkeypatch.context() as patch:
        interrupt_at(patch, steps, signal.SIGTERM)  # 最后一步之后：验证里停下
        assert train_here(config, "run.name=cut") == 143
    assert train_here(config, "run.name=cut", resume=str(tmp_path / "checkpoints/cut/last.ckpt")) == 0
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    assert losses(tmp_path, "cut", "val", "loss") == losses(tmp_path, "whole", "val", "loss")


def test_preflight_leaves_the_run_untouched(tree_run, tmp_path):
    config = tree_run(model=RANDOM, train={"epochs": 1})
    train_here(config, "run.name=without")
    train_here(config, "run.name=with", "train.preflight=true")
    assert losses(tmp_path, "with") == losses(tmp_path, "without")
    assert "preflight passed" in (tmp_path / "log/with/train.log").read_text(encoding="utf-8")


def test_two_smokes_at_once(tree_run, tmp_path):
    """写在同一个文件夹里，各用各的名字，都走完，什么也不留下。"""
    caches = tmp_path / "caches"
    config = load_config(tree_run(data={"cache_dir": str(caches)}), smoke=True)
    two_at_once(lambda: smoke(config))
    assert list(caches.iterdir()) == []


def test_what_a_killed_smoke_left_is_removed(tree_run, tmp_path):
    """还有主人的、刚建立的不动。"""
    caches = tmp_path / "caches"
    left, held, new = (caches / f".smoke.{letter * 16}.tmp" for letter in "abc")
    (left / ".preflight.0123456789abcdef.tmp").mkdir(parents=True)
    new.mkdir()
    with held_elsewhere(held):
        for place in (left, held):
            os.utime(place, (0, 0))
        assert smoke(load_config(tree_run(data={"cache_dir": str(caches)}), smoke=True)) == 0
        assert {path.name for path in caches.iterdir()} == {held.name, new.name}


def test_workers_do_not_change_the_losses(tree_run, tmp_path):
    config = tree_run(model=RANDOM, train={"epochs": 1})
    train_here(config, "run.name=none")
    train_here(config, "run.name=two", "data.workers=2")
    assert losses(tmp_path, "two") == losses(tmp_path, "none")


def test_accumulated_batches_equal_one_big_batch(tree_run, tmp_path):
    """随机数属于窗口与全局批：怎样切成小批，每一步的损失都一样。"""
    config = tree_run(model=DRAWN, train={"epochs": 1})
    train_here(config, "run.name=big")
    train_here(config, "run.name=small", "train.accumulate=4")
    big, small = losses(tmp_path, "big"), losses(tmp_path, "small")
    assert (len(big), len(small)) == (8, 7)  # 31 个窗口：最后一批三个，分不成四份，不要
    assert [v for _, v in small] == pytest.approx([v for _, v in big][:7], rel=1e-5)


def test_rolled_steps_are_cut_read_and_preflighted_like_any_other(make_tree, tmp_path):
    """有空缺的窗口、只算末一步：切成小批、留在设备上、预检过，每一步的损失都一样。"""
    tree = make_tree(tmp_path / "tree", ("t2m", "z_level_00"), (8, 16), "2000-01-01", "2000-02-20")
    for day in range(2, 30, 3):
        (tree.root / f"t2m_npy/2000/2000-{24 * day:04d}.npy").unlink()
    tree = tree._replace(data={**tree.data, "pressure_hpa": [50.0], "max_missing": 0.5})
    rolled = {"steps": 2, "loss_on": "last"}
    config = write_run(tmp_path, tree, train={"epochs": 1, "objective": {"rollout": rolled}})
    train_here(config, "run.name=big")
    others = ("train.accumulate=2", "data.residency=device", "train.preflight=true")
    train_here(config, "run.name=small", *others, "train.objective.rollout.checkpoint=false")
    big, small = losses(tmp_path, "big"), losses(tmp_path, "small")
    assert len(big) == len(small) == 8  # 31 个窗口：最后一批三个，分成两份只走两个
    assert [v for _, v in small[:7]] == pytest.approx([v for _, v in big[:7]], rel=1e-5)
    assert losses(tmp_path, "big", "val") != losses(tmp_path, "big", "val", "persistence")


def test_outputs_of_a_run(tree_run, tmp_path):
    train_here(
        tree_run(checkpoint={"dir": str(tmp_path / "checkpoints"), "every_epochs": 1}),
        "run.name=one",
        "log.figures=1",
        reproducible=True,
    )
    assert not torch.are_deterministic_algorithms_enabled()
    folder = tmp_path / "log/one"
    text = (folder / "train.log").read_text(encoding="utf-8")
    for part in (
        "token_size",
        "versions",
        "parameters",
        "split train: 124 samples",
        "decoder.head",
        "test split",
        "deterministic",
    ):
        assert part in text, part
    for name in (
        "config.yaml",
        "metrics.csv",
        "metrics.json",
        "missing.csv",
        "figures/curves.png",
        "figures/curves.pdf",
        "test/metrics.json",
        "test/statistics.nc",
        "test/figures/rmse.png",
        "report.html",
        "figures/test-1.png",
    ):
        assert (folder / name).is_file(), name
    cost = json.loads((folder / "metrics.json").read_text())["cost"]
    content = checkpoint(tmp_path, "one")
    assert content["versions"] == versions() and {"torch", "platform"} < versions().keys()
    assert cost["parameters"] == sum(v.numel() for k, v in content["model"].items() if "codes" not in k)
    assert cost["training_seconds"] == content["progress"]["seconds"] > 0 and cost["flops_per_sample"] > 0
    assert content["progress"]["samples"] == 2 * 31  # 两轮，各 124 // 4 个窗口
    names = {p.name for p in (tmp_path / "checkpoints/one").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "epoch-0001.ckpt", "epoch-0002.ckpt"}


def test_a_log_folder_removed_meanwhile_is_made_again(tree_run, tmp_path, monkeypatch, caplog):
    """下一次记数时就重建，说一次；写过的数、配置、日志都在。"""
    log_dir = tmp_path / "log/one"

    def stepping(fabric, state, config, batches):
        if state.progress.step == 3:
            shutil.rmtree(log_dir)
        if state.progress.step == 6:  # 一步的数晚一步才记
            assert (log_dir / "config.yaml").exists() and "was removed during the run" in caplog.text
        return train_step(fabric, state, config, batches)

    monkeypatch.setattr(loop, "train_step", stepping)
    assert train_here(tree_run(train={"epochs": 1}), "run.name=one") == 0
    steps = [step for step, _ in losses(tmp_path, "one")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 6
    assert caplog.text.count("was removed during the run and is made anew") == 1
    text = (log_dir / "train.log").read_text(encoding="utf-8")
    assert "resolved config" in text and "done: " in text
    assert {"metrics.json", "report.html", "config.yaml"} <= {path.name for path in log_dir.iterdir()}


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.soak)])
def test_kill_9_leaves_loadable_checkpoints(tree_run, tmp_path, kills):
    """每一步都在存的训练，反复在写临时文件的当口 kill -9；留下的都能读、不倒退，续完的与没有被杀过的逐位相同。"""
    config = tree_run(
        train={"epochs": 20 * kills}, checkpoint={"dir": str(tmp_path / "checkpoints"), "every_minutes": 1e-6}
    )
    folder = tmp_path / "checkpoints/kill"
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    arguments = ["train.py", "--config", str(config), "--resume", "auto", "run.name=kill"]
    saved, step = None, 0
    for _ in range(kills):
        process = start_script(*arguments)
        deadline = time.monotonic() + 60
        # 上一次的临时文件还在：这一次的要等它自己存过一回才算
        try:
            while not (best.exists() and last.stat().st_mtime_ns != saved and list(folder.glob(".last*"))):
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
        finally:
            process.kill()
            process.communicate()
        for path in (last, best):
            assert load_checkpoint(path)["progress"]["step"] > 0
        saved, before, step = last.stat().st_mtime_ns, step, load_checkpoint(last)["progress"]["step"]
        assert step >= before
    more = load_checkpoint(last)["progress"]["epoch"] + 1
    done = run_script(*arguments, f"train.epochs={more}")
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob(".last*"))
    assert train_here(config, "run.name=whole", f"train.epochs={more}") == 0
    assert state_digests(checkpoint(tmp_path, "kill")) == state_digests(checkpoint(tmp_path, "whole"))


def test_sigterm_saves_and_says_how_to_resume(tree_run, tmp_path):
    config = tree_run(train={"epochs": 1000}, data={"workers": 1})
    process = start_script("train.py", "--config", str(config), "run.name=term", "model.dim=24")  # 自成一个进程组
    metrics = tmp_path / "log/term/metrics.csv"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    for _ in range(2):  # 发给整个组、而且发两遍，作业系统就是这样
        os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert checkpoint(tmp_path, "term")["progress"]["step"] > 0
    printed = output[output.index("resume with: python") :].split()[3:]  # 照它说的做，改过的键也还在
    assert printed[0] == "train.py"
    done = run_script(*printed[:5], "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path, "term", "best")["config"]["model"]["dim"] == 24


def test_non_finite_loss_stops_before_the_weights(tree_run, tmp_path):
    config = tree_run(train={"lr": 1e30, "epochs": 3})
    with pytest.raises(ValueError, match=r"not finite at step 2 \(epoch 1, batch 2; windows from 2000-01-"):
        train_here(config, "run.name=nan")


def test_early_stop_and_ema(tree_run, tmp_path):
    config = tree_run(train={"epochs": 30, "lr": 1e-9, "early_stop_epochs": 2, "ema_decay": 0.5})
    assert train_here(config, "run.name=early") == 0
    saved = checkpoint(tmp_path, "early")
    assert saved["progress"]["epoch"] < 30
    assert saved["ema"] is not None


@pytest.mark.parametrize("name", ["persistence", "climatology"])
def test_baselines_run_like_any_model(tree_run, tmp_path, name):
    config = tree_run()
    text = config.read_text(encoding="utf-8")
    start = text.index("model:")
    end = text.index("run:")
    config.write_text(text[:start] + f"model: {{name: {name}}}\n" + text[end:], encoding="utf-8")
    assert train_here(config, f"run.name={name}", "train.epochs=0", "train.preflight=true") == 0
    table = json.loads((tmp_path / "log" / name / "test/metrics.json").read_text())
    assert set(table["scores"]) == {"persistence", "climatology"}
    if name == "climatology":  # 检查点里就是解好的系数
        assert checkpoint(tmp_path, name)["model"]["coefficients"].abs().sum() > 0


def test_resume_refuses_another_model_or_data(tree_run, tmp_path):
    config = tree_run(train={"epochs": 1})
    train_here(config, "run.name=first")
    for override, message in (
        ("model.depth=2", "model.depth = 1 in the checkpoint, 2 now"),
        ("train.lr=1e-5", "train.lr = 0.001 in the checkpoint, 1e-05 now"),
        ("train.ema_decay=0.9", "train.ema_decay = None in the checkpoint"),
        ("run.seed=1", "run.seed = 42 in the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(config, "run.name=first", override, resume="auto")
    written_out = "model.mask_radio=0.8"  # 把默认值写出来不算改
    assert (
        train_here(config, "run.name=first", written_out, "train.epochs=2", "data.max_missing=0.5", resume="auto") == 0
    )
    with pytest.raises(ValueError, match="has checkpoints already"):
        train_here(config, "run.name=first")
    with pytest.raises(ValueError, match="no checkpoint"):
        train_here(config, resume=str(tmp_path / "none.ckpt"))


def test_bad_checkpoints_are_refused(tree_run, tmp_path):
    import pickle

    train_here(tree_run(train={"epochs": 1}), "run.name=good")
    good = tmp_path / "checkpoints/good/best.ckpt"
    content = good.read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in (0, 10, len(content) // 2, len(content) - 50):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut.ckpt: truncated, damaged"):
            load_checkpoint(cut)
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    for write in (lambda f: torch.save({"format": 1, "model": Evil()}, f), lambda f: pickle.dump(Evil(), f)):
        with (tmp_path / "evil.ckpt").open("wb") as file:
            write(file)
        with pytest.raises(ValueError, match="nothing .*was executed"):
            load_checkpoint(tmp_path / "evil.ckpt")
    assert not marker.exists()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not an ar_pred checkpoint"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_test_scores_equal_numpy(tree_run, tree, tmp_path):
    """metrics.json 的持续性预报 RMSE 等于直接从原始场算出来的（纬度权重按余弦积分）。"""
    train_here(tree_run(train={"epochs": 1}), "run.name=scores")
    table = json.loads((tmp_path / "log/scores/test/metrics.json").read_text())
    fields = tree.fields[-40:].astype(np.float64)  # 二月 11–20 日
    edges = np.deg2rad(np.linspace(90, -90, 9))
    weights = np.sin(edges[:-1]) - np.sin(edges[1:])
    weights /= weights.mean()
    error = (fields[3:] - fields[2:-1]) ** 2 * weights[:, None]
    expected = np.sqrt(error.mean((0, 2, 3)))
    found = [table["scores"]["persistence"][c]["rmse"][0] for c in tree.channels]
    assert found == pytest.approx(expected, rel=1e-4)
    assert table["pairs"] == {"t2m": [37], "z_level_00": [37]}


def test_resume_refuses_changed_statistics(make_tree, tmp_path):
    """mean_std.json 换了，同样的权重就是另一个意思。"""
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree, train={"epochs": 1}, data={"standardize": "yes"})
    train_here(config, "run.name=first")
    path = tree.root / "t2m_npy/mean_std.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "mean": [values["mean"][0] + 1]}))
    with pytest.raises(ValueError, match="trained with mean"):
        train_here(config, "run.name=first", "train.epochs=2", resume="auto")


def test_real_input(real_data, tmp_path):
    """真实的 NCEP 气温：导入、训练、计分一条路走完；持续性预报的成绩等于用 xarray 与 NumPy 直接算的。"""
    import xarray as xr

    from util.commands import import_fields

    source = next((real_data / "ncep_air_namerica_6h").glob("*.zarr"))
    splits = {
        "train": ("2013-01-01", "2014-04-30"),
        "val": ("2014-05-01", "2014-06-30"),
        "test": ("2014-07-01", "2014-12-31"),
    }
    arguments = ["--source", str(source), "--root", str(tmp_path / "tree"), "--variable", "air=air"]
    arguments += ["--rows", "0:24", "--cols", "0:48", "--yaml", str(tmp_path / "set.yaml")]
    import_fields.main([*arguments, *(a for name, span in splits.items() for a in (f"--{name}", *span))])
    overrides = ["model.dim=16", "model.depth=1", "model.decoder_depth=1", "model.decoder_width=16", "run.name=real"]
    overrides += [
        f"checkpoint.dir={tmp_path}",
        f"log.dir={tmp_path / 'log'}",
        f"data.cache_dir={tmp_path}",
        "log.figures=0",
    ]
    overrides += ["train.epochs=2", "train.schedule={name: constant}", f"data.set={tmp_path / 'set.yaml'}"]
    overrides += [
        f"data.root={tmp_path / 'tree'}",
        "data.workers=0",
        "log.wandb.mode=disabled",
        "train.preflight=false",
    ]
    assert train_here(Path("config/real_ncep_air.yaml"), *overrides) == 0
    table = json.loads((tmp_path / "log/real/test/metrics.json").read_text())
    air = xr.open_zarr(source, consolidated=False)["air"].sel(time=slice("2014-07-01", "2014-12-31"))[:, :24, :48]
    edges = np.deg2rad(np.append(air["lat"].values + 1.25, air["lat"].values[-1] - 1.25))
    weights = np.sin(edges[:-1]) - np.sin(edges[1:])
    error = np.diff(air.values.astype(np.float64), axis=0)[6:] ** 2 * (weights / weights.mean())[:, None]
    assert table["scores"]["persistence"]["air"]["rmse"][0] == pytest.approx(np.sqrt(error.mean()), rel=1e-5)
    assert table["pairs"]["air"] == [736 - 7]
    assert np.isfinite(table["scores"]["ar_pred_video_vanilla"]["air"]["rmse"][0])


@pytest.mark.parametrize("stale", [False, True])
def test_killed_between_saving_and_copying_best(tree_run, tmp_path, stale):
    """last 已存、best 还没有复制（或还是旧的）时被杀：续训补上。"""
    import shutil

    config = tree_run(
        model=FIXED,
        train={"epochs": 2, "lr": 1e-2},  # 第二轮确比第一轮好
        checkpoint={"dir": str(tmp_path / "checkpoints"), "every_epochs": 1},
    )
    train_here(config, "run.name=cut")
    folder = tmp_path / "checkpoints/cut"
    assert checkpoint(tmp_path, "cut", "best")["progress"]["step"] == 16
    (folder / "best.ckpt").unlink()
    if stale:
        shutil.copy(folder / "epoch-0001.ckpt", folder / "best.ckpt")
    (folder / "epoch-0002.ckpt").unlink()
    assert train_here(config, "run.name=cut", resume="auto") == 0
    assert checkpoint(tmp_path, "cut", "best")["progress"]["step"] == 16
    assert (folder / "epoch-0002.ckpt").exists()
    assert len(losses(tmp_path, "cut", "test", "test_loss")) == 1


def test_too_many_bad_files_save_first_and_can_be_allowed(make_tree, tmp_path):
    """读坏的文件超过上限：先存档再停；放宽上限可以接着跑。"""
    from util.data.tree_files import field_path

    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree, data={"standardize": "yes"})
    for i in range(10, 120, 12):
        field_path(tree.root, "t2m", tree.hours[i]).write_bytes(b"broken")
    with pytest.raises(ValueError, match="above data.max_missing = 0.01"):
        train_here(config, "run.name=bad")
    assert checkpoint(tmp_path, "bad")["progress"]["step"] >= 0
    assert train_here(config, "run.name=bad", "data.max_missing=0.2", resume="auto") == 0


def test_changed_files_restart_the_epoch(make_tree, tmp_path, monkeypatch):
    """停在一轮中间之后删了一天的文件，窗口变了：这一轮从头走，并在日志里说。"""
    from util.data.tree_files import field_path

    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree, data={"max_missing": 0.2, "max_gap_hours": 12})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert train_here(config, "run.name=cut") == 130
    for hour in tree.hours[40:48]:
        field_path(tree.root, "t2m", hour).unlink()
    assert train_here(config, "run.name=cut", resume="auto") == 0
    assert "this epoch starts again" in (tmp_path / "log/cut/train.log").read_text(encoding="utf-8")


def test_non_finite_gradient_without_clipping_stops_as_if_before_that_step(tree_run, tmp_path, monkeypatch):
    """损失有限而梯度不是：不裁剪也要发现。存下的与走完前两步就停下的相同，虽然发现时第四步已经走了。"""
    config = tree_run(train={"ema_decay": 0.9, "schedule": {"name": "onecycle"}})

    def poisoned(fabric, state, config, batches):
        if state.progress.step == 2:
            state.model.embed.weight.register_hook(lambda g: g * float("nan"))
        return train_step(fabric, state, config, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        with pytest.raises(ValueError, match="gradient norm is not finite at step 3 .*; no weights were changed"):
            train_here(config, "run.name=nan")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert train_here(config, "run.name=stopped") == 130
    assert losses(tmp_path, "nan") == losses(tmp_path, "stopped")
    nan, stopped = (checkpoint(tmp_path, run) for run in ("nan", "stopped"))
    for content in (nan, stopped):
        content["progress"]["seconds"] = content["scheduler"]["_step_count"] = 0  # 量出来的；只供 torch 查次序
    assert nan["progress"] == stopped["progress"] and nan["scheduler"] == stopped["scheduler"]
    for part in ("model", "ema"):
        torch.testing.assert_close(nan[part], stopped[part], rtol=0, atol=0)
    torch.testing.assert_close(nan["optimizer"]["state"], stopped["optimizer"]["state"], rtol=0, atol=0)
    assert nan["optimizer"]["param_groups"] == stopped["optimizer"]["param_groups"]  # 学习率也回去了


def test_interrupted_one_pass_model_says_run_again(tree_run, tmp_path, monkeypatch, caplog):
    config = tree_run(train={"epochs": 0})
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text[: text.index("model:")] + "model: {name: climatology}\n" + text[text.index("run:") :], encoding="utf-8"
    )
    fit = loop.fit_one_pass

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        fit(*arguments)

    monkeypatch.setattr(loop, "fit_one_pass", interrupted)
    assert train_here(config, "run.name=clim") == 130
    assert "nothing to resume, run it again" in caplog.text
    assert not list(tmp_path.glob("checkpoints/clim/*"))
