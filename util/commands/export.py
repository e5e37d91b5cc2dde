"""dataset.py export：把存档还原成目录树、NetCDF，或两样都要。"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.cli import Parser
from util.exchange.export import export


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dataset.py export", description="Write a packed store back as a tree of .npy fields or as NetCDF."
    )
    parser.add_argument("--store", type=Path, required=True, help="what dataset.py pack has written")
    parser.add_argument("--root", type=Path, metavar="TREE", help="the tree to write")
    parser.add_argument("--netcdf", type=Path, metavar="FILE", help="the NetCDF file to write, in physical units")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = make_parser().parse_args(argv)
    if arguments.root is None and arguments.netcdf is None:
        raise ValueError("nothing to write; give --root TREE, --netcdf FILE or both")
    fields = export(arguments.store, arguments.root, arguments.netcdf, arguments.overwrite)
    places = " and ".join(str(place) for place in (arguments.root, arguments.netcdf) if place is not None)
    print(f"{fields} fields of {arguments.store} written to {places}")
    return 0
