"""命令行：参数是封闭的一组，多一个少一个都要先改这里；用户的错误一行、退出码 2。"""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

from engine.codecs.reconstruct import reconstruct_parser
from engine.commands import compare_parser, evaluate_parser, inference_parser, train_command, train_parser
from tests.engine.runs import run_script, write_run
from util.commands.dataset import WORDS

FLAGS = {
    train_parser: {
        "--config",
        "--resume",
        "--smoke",
        "--estimate",
        "--explain",
        "--no-verify",
        "--deterministic",
        "overrides",
    },
    inference_parser: {
        *("--checkpoint", "--time", "--inputs", "--out", "--steps", "--members", "--perturb", "--smooth", "--set"),
        *("--save", "--overwrite", "overrides", "--export", "--program", "--card", "--package", "--no-verify"),
        "--compile",
    },
    evaluate_parser: {
        *("--checkpoint", "--split", "--steps", "--stride", "--out", "--members", "--perturb", "--smooth"),
        *("--thresholds", "--points", "--save", "--overwrite", "--set", "--no-verify", "overrides"),
        *("--regions", "--by", "--compile", "--events", "--cases"),
    },
    compare_parser: {"--runs", "--suite", "--out", "--reference", "--by", "--scorecard", "--files"},
    reconstruct_parser: {"--checkpoint", "--config", "--split", "--stride", "--out", "overrides"},
}
DATA_FLAGS = {
    "sample": {
        *("--root", "--grid", "--years", "--train-years", "--interval", "--levels", "--seed", "--standardize"),
        *("--drop", "--corrupt", "--overwrite", "--first-hour"),
    },
    "import": {
        *("--source", "--root", "--store", "--dtype", "--variable", "--map", "--select", "--filter"),
        *("--train", "--val", "--test", "--crop", "--rows", "--cols", "--regrid", "--latitude", "--longitude"),
        *("--yaml", "--overwrite", "--absent-chunks", "--static", "--preset", "--levels", "--dates"),
    },
    "check": {"--config", "overrides", "--out", "--workers"},
    "scan": {"--config", "overrides", "--rebuild"},
    "statistics": {"--config", "overrides", "--write", "--overwrite", "--tendency", "--workers", "--scheduler"},
    "pack": {"--config", "overrides", "--out", "--dtype", "--workers", "--scheduler"},
    "verify": {"--out", "--workers"},
    "export": {"--store", "--root", "--netcdf", "--overwrite"},
}


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {(a.option_strings or [a.dest])[0] for a in parser._actions} - {"-h"}


@pytest.mark.parametrize("parser", FLAGS, ids=lambda p: p.__name__)
def test_flags_are_closed(parser):
    assert flags(parser()) == FLAGS[parser]


def test_no_verify_is_about_a_checkpoint():
    with pytest.raises(ValueError, match="--no-verify is about the checkpoint of --resume"):
        train_command(["--config", "config/quickstart.yaml", "--no-verify"])


def test_words_of_dataset_are_closed():
    parsers = {name: import_module(word.module).make_parser() for name, word in WORDS.items()}
    assert {name: flags(parser) for name, parser in parsers.items()} == DATA_FLAGS
    assert {name: parser.prog for name, parser in parsers.items()} == {name: f"dataset.py {name}" for name in WORDS}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.headz=3", "unknown key model.headz = 3; nearest"),
        ("train.epochs=many", "train.epochs = 'many'"),
        ("model.heads=3", "model.heads = 3: does not divide model.dim = 16; heads that work: [1, 2, 4, 8]"),
        ("model.mask_ratio=1.5", "model.mask_ratio = 1.5"),
        ("model.token_size=[5,4]", "does not divide the grid 8 x 16 in latitude: 8 / 5; sizes that work there"),
        ("data.frames_in=0", "data.frames_in = 0"),
        ("data.frames_out=2", "data.frames_out = 2, must be 1"),
        ("data.frames_in=60", "a window needs data.frames_in + data.frames_out = 61"),
        ("data.root=nowhere", "data.root nowhere is not a directory"),
        ("data.variables={t2n: single}", "no 't2n'"),
        ("data.splits.test=[2001, 2001]", "no year 2001"),
        ("model.name=ar_pred_video", "no such model; nearest: ar_pred_video_vanilla"),
        ("train.accumulate=3", "must be a multiple of devices x train.accumulate = 3"),
    ],
)
def test_mistakes_are_one_line(make_tree, tmp_path, override, message):
    from engine.commands import train_command

    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree)
    with pytest.raises(ValueError) as error:  # noqa: PT011  内容在下面查
        train_command(["--config", str(config), override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_exit_status_and_one_line_on_stderr(tmp_path):
    done = run_script("train.py", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no file")
    assert done.stderr.count("\n") == 1


def test_smoke_needs_no_data(tmp_path):
    done = run_script("train_ar_pred_video_vanilla.py", "--smoke", f"data.cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "preflight passed" in done.stderr
