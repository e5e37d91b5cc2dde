"""命令行：每个命令的参数在这里、也只在这里；重的库等参数看完再引入，--help 才快。"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from util.atomic import reserved
from util.cli import Parser, loading
from util.config import load_config

Arguments = Sequence[str] | None
DIGITS = 6  # 步数、成员：更多的先把内存用尽


def train_parser(default_config: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(description="Train a forecast model from one YAML file.")
    parser.add_argument("--config", default=default_config, help="run YAML, see config/README.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--resume", metavar="auto|PATH", help="continue from a checkpoint; auto: the newest of this config"
    )
    what.add_argument("--smoke", action="store_true", help="preflight only, with the smoke overrides; needs no data")
    what.add_argument(
        "--estimate", action="store_true", help="the memory a step needs, part by part, without allocating it; no data"
    )
    what.add_argument(
        "--explain", nargs="?", const="", metavar="KEY",
        help="what a key of the YAML means, its values, its default: train.lr, train, cnn (a model); without KEY all",
    )  # fmt: skip
    _add_no_verify(parser)
    parser.add_argument(
        "--deterministic", action="store_true", help="only algorithms that give the same result every time; slower"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override existing keys, e.g. train.epochs=10"
    )
    return parser


def train_command(argv: Arguments = None, default_config: str | None = None) -> int:
    """train.py、train_ar_pred_video_vanilla.py。"""
    args = train_parser(default_config).parse_intermixed_args(argv)
    if args.explain is not None:
        from engine.reference.keys import explain

        return explain(args.explain)
    if args.config is None:
        raise ValueError("give --config, a run YAML; config/README.md lists them")
    if args.no_verify and not args.resume:
        raise ValueError("--no-verify is about the checkpoint of --resume: give that with it")
    config = load_config(args.config, args.overrides, smoke=args.smoke)
    if args.smoke:
        from engine.training.preflight import smoke
        from models import build_config
        from util.logger import setup_logging

        setup_logging(None)
        build_config(config.model, args.config)
        return smoke(config)
    if args.estimate:
        from engine.memory.table import show_estimate
        from models import build_config

        build_config(config.model, args.config)
        return show_estimate(config)
    with loading():
        from engine.training.loop import train

    return train(config, args.config, args.resume, verify=not args.no_verify, reproducible=args.deterministic)


def inference_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Forecast from a checkpoint.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="e.g. checkpoints/RUN/best.ckpt, or a folder that --package wrote")
    source.add_argument("--program", metavar="FILE.pt2", help="what --export wrote, instead of a checkpoint")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--export", type=Path, metavar="FILE.pt2|FILE.onnx",
        help="write the checkpoint's model as a program of torch.export (or as ONNX), and nothing else",
    )  # fmt: skip
    instead.add_argument(
        "--card", action="store_true",
        help="print the checkpoint's model card (Markdown), or write it to the file --out, and nothing else",
    )  # fmt: skip
    instead.add_argument(
        "--package", type=Path, metavar="DIR",
        help="write a folder to share (weights, config, card, program), which --checkpoint takes, and nothing else",
    )  # fmt: skip
    parser.add_argument(
        "--time", nargs="+", default=[], metavar="TIME",
        help="initial time in UTC: the last input frame, e.g. 2015-06-01T00; or FROM TO EVERY: a forecast every EVERY "
        "hours, both ends included, e.g. 2015-06-01T00 2015-06-30T18 6",
    )  # fmt: skip
    parser.add_argument(
        "--inputs", nargs="+", default=[], metavar="FILE.npy",
        help="frames (H, W, k), or one (T_in, H, W, k), standardised or raw as the training tree was",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for npy, NetCDF, PNG and scores")
    parser.add_argument(
        "--steps", type=_positive, default=None, help="frames to roll on (default: one call of the model)"
    )
    parser.add_argument(
        "--save",
        choices=("zarr",),
        help="zarr: also add the forecast to OUT/forecast.zarr, and its truth to truth.zarr",
    )
    _add_overwrite(parser)
    _add_ensemble(parser)
    _add_compile(parser)
    _add_no_verify(parser)
    _add_data_overrides(parser)
    return parser


def inference_command(argv: Arguments = None) -> int:
    """inference.py、inference_ar_pred_video_vanilla.py。"""
    args = inference_parser().parse_intermixed_args(argv)
    if args.export or args.card or args.package:
        return _describe(args)
    times = [text for text in args.time if "=" not in text]
    moved = [text for text in args.time if "=" in text]  # 写在时刻后面的 data.KEY=VALUE
    if not times and not args.inputs:
        raise ValueError("give --time (frames from the tree of the checkpoint's config) or --inputs (npy files)")
    if args.out is None:
        raise ValueError("give --out: the folder for the forecast")
    if args.save and not times:
        raise ValueError("--save zarr adds a forecast by its initial time: give --time beside --inputs")
    _check_overwrite(args)
    with loading():
        from engine.forecasting.forecast import Options, forecast

    options = Options(
        time=tuple(times),
        inputs=tuple(args.inputs),
        steps=args.steps,
        members=args.members,
        perturb=args.perturb,
        smooth=args.smooth,
        set=tuple(args.set),
        overrides=(*args.overrides, *moved),
        zarr=args.save == "zarr",
        overwrite=args.overwrite,
        program=args.program is not None,
        verify=not args.no_verify,
        compile=args.compile,
    )
    with reserved(args.out):
        return forecast(args.program or args.checkpoint, options, args.out)


def _describe(args: argparse.Namespace) -> int:
    """不预报的三样，都只看检查点。"""
    given = {"--export": args.export, "--package": args.package, "--card": args.card and ""}
    name, value = next((name, value) for name, value in given.items() if value not in (None, False))
    words = [name, *([str(value)] if value else [])]
    out = ["--out", str(args.out)] if args.card and args.out else []
    alone = inference_parser().parse_args(["--checkpoint", args.checkpoint or "", *words, *out])
    if args.checkpoint is None or vars(args) != vars(alone):
        raise ValueError(f"{' '.join(words)} goes with --checkpoint alone: leave out the other options")
    with loading():
        from engine.forecasting.program import export_program
        from engine.sharing.card import show_card
        from engine.sharing.package import write_folder
        from util.logger import setup_logging

    if args.card:
        return show_card(args.checkpoint, args.out)
    setup_logging(None)
    return export_program(args.checkpoint, args.export) if args.export else write_folder(args.checkpoint, args.package)


def evaluate_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Score a checkpoint beside the baselines.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="e.g. checkpoints/RUN/best.ckpt, or a folder that inference.py --package wrote",
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="which dates (default: test)")
    parser.add_argument(
        "--steps", type=_positive, default=None, help="frames to roll on (default: one call of the model)"
    )
    parser.add_argument(
        "--stride", type=_positive, default=1, help="score every n-th window start (default: every one)"
    )
    _add_ensemble(parser)
    _add_compile(parser)
    parser.add_argument(
        "--thresholds", nargs="+", default=[], type=_threshold, metavar="CHANNEL=VALUE[,VALUE]",
        help="events for the Brier score, in physical units, e.g. t2m=273.15 tp=0.001,0.005",
    )  # fmt: skip
    parser.add_argument(
        "--events", nargs="?", const="", metavar="YAML",
        help="also score events (climatological quantiles, --thresholds: reliability, ROC, economic value, CSI, ETS, "
        "SEDI, FSS), SEEPS, tails, energy and variogram scores, spherical spectra, drift; YAML changes the defaults",
    )  # fmt: skip
    parser.add_argument(
        "--cases", type=Path, metavar="YAML",
        help="a page for each of these cases (name, dates, box, channels): maps, members, spaghetti, plume, scores "
        "of the box; e.g. config/cases.yaml",
    )  # fmt: skip
    parser.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="LAT,LON",
        help="places of the time series, e.g. 39.9N,116.4E 33.9S,151.2E",
    )
    parser.add_argument(
        "--regions", type=Path, metavar="YAML", help="score each of these regions too, e.g. config/regions.yaml"
    )
    _add_by(parser)
    parser.add_argument(
        "--save", nargs="+", choices=("netcdf", "zarr", "npy", "none"), default=["netcdf"],
        help="fields to keep: netcdf (forecast.nc, truth.nc; the default), zarr (added to forecast.zarr, truth.zarr), "
        "npy (inputs, trues, preds), none",
    )  # fmt: skip
    _add_overwrite(parser)
    _add_no_verify(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder for scores, figures and report.html")
    _add_data_overrides(parser)
    return parser


def evaluate_command(argv: Arguments = None) -> int:
    """evaluate.py。"""
    args = evaluate_parser().parse_intermixed_args(argv)
    if "none" in args.save and len(args.save) > 1:
        raise ValueError(f"--save {' '.join(args.save)}: none stands alone")
    _check_overwrite(args)
    with loading():
        from engine.evaluation.evaluate import evaluate_checkpoint
        from engine.evaluation.task import Options

    options = Options(
        split=args.split,
        stride=args.stride,
        steps=args.steps,
        members=args.members,
        perturb=args.perturb,
        smooth=args.smooth,
        thresholds=merge_thresholds(args.thresholds),
        save=tuple(kind for kind in args.save if kind != "none"),
        overwrite=args.overwrite,
        points=tuple(args.points),
        regions=args.regions,
        by=tuple(dict.fromkeys(args.by)),
        events=args.events,
        cases=args.cases,
        set=tuple(args.set),
        overrides=tuple(args.overrides),
        verify=not args.no_verify,
        compile=args.compile,
    )
    return evaluate_checkpoint(args.checkpoint, options, args.out)


def merge_thresholds(given: list[tuple[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """同一个通道写了几次就合在一起。"""
    merged: dict[str, tuple[float, ...]] = {}
    for channel, values in given:
        merged[channel] = tuple(sorted({*merged.get(channel, ()), *values}))
    return merged


def compare_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Compare runs on the (initial time, lead time) pairs all have.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--runs", nargs="+", type=Path, metavar="DIR",
        help="log folders of finished runs, e.g. log/A log/B, or folders that evaluate.py --out has written",
    )  # fmt: skip
    what.add_argument(
        "--suite", type=Path, metavar="YAML", help="train, score and compare a list: config/suites/*.yaml"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder (default: log/comparison, or log/suite-NAME for a suite)"
    )
    parser.add_argument(
        "--reference", nargs="+", type=Path, default=[], metavar="CSV",
        help="published scores to put beside the runs, e.g. docs/reference_scores.csv",
    )  # fmt: skip
    parser.add_argument(
        "--files", nargs="+", default=[], metavar="FILE",
        help="forecasts made elsewhere (NetCDF, Zarr; names as in WeatherBench), scored as the first of --runs was",
    )  # fmt: skip
    _add_by(parser)
    parser.add_argument(
        "--scorecard", metavar="NAME", help="a scorecard of every run against this run or baseline, e.g. climatology"
    )
    return parser


def compare_command(argv: Arguments = None) -> int:
    """compare.py。"""
    args = compare_parser().parse_args(argv)
    by = tuple(dict.fromkeys(args.by))
    if args.suite and args.files:
        raise ValueError("--files stands beside --runs: the first of them gives split and truth")
    if args.suite:
        from engine.comparison.suite import run_suite

        return run_suite(args.suite, args.out, args.reference, by, args.scorecard)
    with loading():
        from engine.comparison.compare import compare_runs

    out = args.out or Path("log/comparison")
    with reserved(out):
        compare_runs(args.runs, out, reference=args.reference, by=by, scorecard=args.scorecard, files=args.files)
    return 0


def _add_ensemble(parser: argparse.ArgumentParser) -> None:
    """预报与评测的集合是同一个集合；怎样采样也在这里改。"""
    parser.add_argument("--members", type=_positive, default=1, help="ensemble members (default: 1)")
    parser.add_argument("--perturb", type=_not_negative, default=0.0, help="initial noise, in standard deviations")
    parser.add_argument(
        "--smooth", type=_not_negative, default=0.0, metavar="DEGREES", help="smooth that noise over this length"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="model.KEY=VALUE",
        help="change how a probabilistic model samples, e.g. model.sampling.cfg=1.5",
    )  # fmt: skip


def _add_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by", nargs="+", choices=("season", "month", "hour"), default=[],
        help="score each season, month or hour of day too, by valid time (UTC)",
    )  # fmt: skip


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile", action="store_true", help="compile the model's blocks first; equal to rounding, for long forecasts"
    )


def _add_no_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-verify", action="store_true", help="take a checkpoint as it is, without looking whether it is damaged"
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="write initial times anew that forecast.zarr holds already"
    )


def _check_overwrite(args: argparse.Namespace) -> None:
    if args.overwrite and "zarr" not in (args.save or ()):
        raise ValueError(
            "--overwrite is about forecast.zarr: give --save zarr with it; other files are replaced anyway"
        )


def _add_data_overrides(parser: argparse.ArgumentParser) -> None:
    """数据搬了家：写在别的选项之前，或写在只收一个值的选项（--out）之后。"""
    parser.add_argument(
        "overrides", nargs="*", metavar="data.KEY=VALUE",
        help="where the data are now and how to read them, e.g. data.root=/new/place data.workers=0",
    )  # fmt: skip


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() and len(text) <= DIGITS else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer of at most {DIGITS} digits")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def _threshold(text: str) -> tuple[str, tuple[float, ...]]:
    channel, equals, values = text.partition("=")
    try:
        numbers = tuple(sorted({float(value) for value in values.split(",")}))
    except ValueError:
        numbers = ()
    if not (channel and equals and numbers and all(map(math.isfinite, numbers))):
        raise argparse.ArgumentTypeError(f"{text} is not CHANNEL=VALUE[,VALUE], e.g. t2m=273.15")
    return channel, numbers
