"""dataset.py import：把 NetCDF、Zarr 或 GRIB 导入成目录树（--root）或存档（--store）。"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from util.atomic import replacing
from util.cli import Parser
from util.config import Axis
from util.data.index import SPLITS
from util.exchange.into_store import import_to_store
from util.exchange.into_tree import write_fields
from util.exchange.plan import ImportPlan, plan_import
from util.exchange.regrid import Method, Target
from util.exchange.static import (
    Cut,
    Placed,
    describe_static,
    read_static_fields,
    refuse_misplaced,
    refuse_other_grid,
    write_static_fields,
)
from util.exchange.summary import data_yaml, summarize
from util.exchange.survey import Survey, refuse_other_units
from util.files.zarr_metadata import FILE_TYPES
from util.source.axes import listed
from util.source.collection import Source, find_sources
from util.source.request import Request, read_request
from util.source.wanted import open_named, open_wanted
from util.workers import recorded_command


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dataset.py import",
        description="Write NetCDF, Zarr or GRIB fields into a tree of .npy files, or into a packed store.",
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        action="extend",
        nargs="+",
        metavar="PATH",
        help="any mix of NetCDF, GRIB and ZIP files, Zarr stores, folders of them, patterns such as 't2m_*.nc' "
        "and addresses of files and Zarr stores (https://, s3://, gs://; no folders, no patterns there); "
        "the files of a variable are joined in time, and not every file must hold every variable",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--root", help="the tree to write, e.g. data/my_set")
    text = (
        "the packed store to write, without a tree in between; the same again goes on with one that was interrupted, "
    )
    text += "and later sources beside the earlier ones, with the same --train, make it grow; "
    text += "needs about as much room as the fields as float32"
    where.add_argument("--store", type=Path, help=text)
    text = "with --store: how values are stored (%(default)s)"
    add("--dtype", choices=FILE_TYPES, default="float32", help=text)
    several = "variable in the file and its name in the tree, all its levels; repeatable"
    add("--variable", action="append", default=[], metavar="SOURCE=NAME", help=several)
    text = "a field that is constant in time (orography, land-sea mask) into TREE/static/NAME.npy; repeatable"
    add("--static", action="append", default=[], metavar="SOURCE=NAME", help=text)
    add("--map", metavar="FILE", help="YAML with variables, levels and conversions, instead of --variable")
    text = "what a known archive calls its variables (config/maps/NAME.yaml); --variable NAME takes some of them"
    add("--preset", metavar="NAME", help=text)
    add("--levels", nargs="+", type=float, default=[], metavar="HPA", help="these levels, as level_00, level_01, ...")
    add("--dates", nargs=2, default=[], metavar=("START", "END"), help="only these dates, both included")
    add("--select", action="append", default=[], metavar="DIM=VALUE", help="take one member, step, ...; repeatable")
    text = "choose GRIB messages, e.g. typeOfLevel=isobaricInhPa; repeatable"
    add("--filter", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "Zarr chunks that were never written: their fill_value is data, or they are missing"
    add("--absent-chunks", choices=["data", "missing"], help=text)
    for name in SPLITS:
        text = f"dates of the {name} split, both included" + ("; mean_std.json is from them" if name == "train" else "")
        add(f"--{name}", nargs=2, metavar=("START", "END"), help=text)
    add("--crop", metavar="HxW", help="keep the middle H rows and W columns")
    add("--rows", metavar="A:B", help="keep rows A to B-1 of the file, counted from 0")
    add("--cols", metavar="A:B", help="keep columns A to B-1 of the file, counted from 0")
    add("--regrid", choices=get_args(Method), help="to the even grid that --latitude and --longitude give")
    for name in ("latitude", "longitude"):
        text = "cell centres of the new grid, degrees; with --regrid"
        add(f"--{name}", nargs=3, type=float, metavar=("FIRST", "STEP", "COUNT"), help=text)
    add("--yaml", metavar="FILE", help="write the data-set YAML there (otherwise it is printed)")
    add("--overwrite", action="store_true", help="replace files of a tree, and the --yaml, that exist")
    return parser


def main(argv: Sequence[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.yaml and Path(args.yaml).exists() and not args.overwrite:
        raise ValueError(f"--yaml {args.yaml} exists; leave --yaml out (it is printed), or give --overwrite")
    narrowed = args.preset, args.levels, args.dates
    request = read_request(
        args.map, args.variable, args.select, args.filter, args.absent_chunks, args.static, *narrowed
    )
    cut = Cut(args.crop, args.rows, args.cols, read_target(args.regrid, args.latitude, args.longitude))
    with ExitStack() as stack:
        sources = find_sources(args.source, stack)
        if not request.variables and not request.static:
            _refuse_nothing(sources, request)
        if args.yaml and not request.variables:
            raise ValueError("--yaml is for the variables; --static alone writes no data-set YAML")
        if args.levels and not request.variables:
            raise ValueError("--levels is for the variables; a field of --static has no levels")
        static = read_static_fields(sources, request, cut, stack)
        if args.root:
            refuse_misplaced(args.root, static, args.overwrite)
        if request.variables:
            _import_variables(args, argv, request, sources, cut, static, stack)
        elif args.root:
            write_static_fields(args.root, static, args.overwrite)
        else:
            raise ValueError("--static alone writes into a tree (--root); a store takes it together with --variable")
    print(*describe_static(static), sep="\n", end="\n" if static else "")
    return 0


def _import_variables(
    args: argparse.Namespace,
    argv: Sequence[str],
    request: Request,
    sources: Sequence[Source],
    cut: Cut,
    static: Mapping[str, Placed],
    stack: ExitStack,
) -> None:
    """各变量导入成树或存档，连同不随时间变的场；写出或印出数据集的 YAML。"""
    splits = {name: getattr(args, name) for name in SPLITS}
    if absent := [f"--{name} START END" for name, dates in splits.items() if dates is None]:
        raise ValueError(f"{listed(absent)}: needed for the variables; only --static does without dates")
    held, unused = open_wanted(sources, request, stack)
    if lacking := [f"{request.source(name)} ({name})" for name in request.variables if name not in held]:
        print(f"lacking   not in the source: {listed(lacking)}")
        request = request.model_copy(update={"variables": {name: request.variables[name] for name in held}})
    root = args.root or args.source[0]  # 存档里没有树，记着导自哪里
    plan = plan_import(held, root, request, splits, *cut, into_store=args.store is not None)
    refuse_other_grid(static, plan.config.latitude, plan.config.longitude)
    refuse_other_units(plan)
    found = _write(plan, args, argv, static)
    unused = [source for source in unused if source not in {place.source for place in static.values()}]
    text = data_yaml(plan, args.store)
    print("\n".join(summarize(plan, found, [source.name for source in unused])))
    if args.yaml:
        with replacing(Path(args.yaml)) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"data set  written to {args.yaml}")
    else:
        print(f"data set  put this into a file such as config/data/NAME.yaml\n{text}", end="")


def _write(plan: ImportPlan, args: argparse.Namespace, argv: Sequence[str], static: Mapping[str, Placed]) -> Survey:
    """写目录树或存档；返回过一遍所得。"""
    if args.store is None:
        if args.dtype != "float32":
            raise ValueError(f"--dtype {args.dtype} is for --store; the files of a tree are float32")
        found = write_fields(plan, args.overwrite)
        write_static_fields(args.root, static, args.overwrite)
        return found
    from util.logger import setup_logging

    setup_logging(None)
    command = recorded_command("import", argv)
    fields = {name: place.field for name, place in static.items()}
    return import_to_store(plan, args.store, args.dtype, command, fields)


def read_target(
    method: Method | None, latitude: Sequence[float] | None, longitude: Sequence[float] | None
) -> Target | None:
    """命令行的 --regrid、--latitude、--longitude → 目标网格；都没有给是 None。

    Raises:
        ValueError: 三个没有给全，COUNT 不是正整数。
    """
    if not method and latitude is None and longitude is None:
        return None
    if not method or latitude is None or longitude is None:
        raise ValueError("--regrid METHOD, --latitude FIRST STEP COUNT and --longitude FIRST STEP COUNT go together")
    axes = []
    for name, (first, step, count) in (("--latitude", latitude), ("--longitude", longitude)):
        if count < 1 or count != int(count) or step == 0:
            raise ValueError(f"{name} {first:g} {step:g} {count:g}: COUNT must be a whole number, STEP not 0")
        axes.append(Axis(first=first, step=step, count=int(count)))
    return Target(method, *axes)


def _refuse_nothing(sources: Sequence[Source], request: Request) -> None:
    """没有说要什么变量：列出各来源里有的。"""
    there: dict[str, None] = {}
    for source in sources:
        with open_named(source, request.filter) as dataset:
            there |= dict.fromkeys(map(str, dataset.data_vars))
    if not there:
        raise ValueError(f"{sources[0].name}: no variables")
    first = next(iter(there))
    raise ValueError(f"no --variable; choose at least one of {listed(there)}, e.g. --variable {first}={first}")
