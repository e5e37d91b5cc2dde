"""dataset.py check：检查整棵目录树。退出码：0 没有毛病，1 有，2 命令或配置写错。"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from util.atomic import replacing
from util.cli import Parser
from util.config import load_config
from util.inspection.check import check_static, check_tree, describe_bad, report_json, table
from util.workers import add_workers_option, check_worker_options

LINES_SHOWN = 20


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="dataset.py check", description="Check a whole tree of .npy fields.")
    parser.add_argument("--config", required=True, help="run YAML; its channels and split dates say what is checked")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument("--out", type=Path, help="write a JSON report there, with every bad file")
    add_workers_option(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """返回退出码。

    Raises:
        ValueError: 配置或参数写错。
    """
    arguments = make_parser().parse_args(argv)
    check_worker_options(arguments.workers)
    config = load_config(arguments.config, arguments.overrides).data
    if arguments.out:  # 先试写：查了一夜才发现写不下去就晚了
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.touch()
        except OSError as error:
            raise ValueError(f"--out {arguments.out}: cannot be written ({error.strerror})") from None
    reports, bad = check_tree(config, arguments.workers)
    print(table(reports))
    lines = describe_bad(bad, config.sampling[0])
    print(*lines[:LINES_SHOWN], sep="\n", end="\n" if lines else "")
    if len(lines) > LINES_SHOWN:
        print(f"... and {len(lines) - LINES_SHOWN} more lines like these; --out FILE keeps every one")
    wrong = [r for r in reports if r.problems]
    for report in wrong:
        print(f"{report.channel}: {'; '.join(report.problems)}")
    for report in reports:
        for remark in report.remarks:
            print(f"{report.channel}: {remark}")
    static = check_static(config)
    print(*(found.line for found in static), sep="\n", end="\n" if static else "")
    if arguments.out:
        content = report_json(arguments.config, config, reports, bad, static)
        with replacing(arguments.out) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    total = sum(r.expected for r in reports)
    outside = sum(r.outside for r in reports)
    print(
        f"{total} files of {len(reports)} channels checked: {len(bad)} bad, {len(wrong)} channels with problems"
        + (f", {outside} files with points outside the plausible range (kept as data)" if outside else "")
    )
    return 1 if wrong or any(found.problem for found in static) else 0
