"""dataset.py：第一个词选命令，余下的都是那个词的参数。用到哪个词才引入哪个，--help 才快。"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from util.strict import nearest


class Word(NamedTuple):
    """module 里有 make_parser() 与 main(argv)，后者返回退出码。"""

    module: str
    line: str


WORDS = {
    "sample": Word("util.commands.sample", "write a sample tree from a small simulation of the atmosphere"),
    "import": Word(
        "util.commands.import_fields", "turn NetCDF, Zarr or GRIB into a tree of .npy files or a packed store"
    ),
    "check": Word("util.commands.check", "read every file of a tree and list what is wrong"),
    "scan": Word("util.commands.scan", "list which files of a tree are there, by name, without reading them"),
    "statistics": Word("util.commands.statistics", "mean, std, min and max of every channel over the training dates"),
    "pack": Word("util.commands.pack", "pack a tree into one Zarr folder, which reads many times faster"),
    "verify": Word("util.commands.verify", "compare every file of a packed store with its checksum"),
    "export": Word("util.commands.export", "write a packed store back as a tree or as NetCDF"),
}
HELP = "\n".join(
    [
        "usage: dataset.py WORD [options]\n",
        "Make, import, check and pack data; dataset.py WORD --help lists the options of a word.\n",
        *(f"  {word:<12}{line}" for word, (_, line) in WORDS.items()),
    ]
)


def dataset_command(argv: Sequence[str] | None = None) -> int:
    """dataset.py；一个词也没有给时列出各词，退出码 2。

    Raises:
        ValueError: 没有这个词，或那个词的参数、数据不对。
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if not given or given[0] in ("-h", "--help"):
        print(HELP, file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    word, *rest = given
    if word not in WORDS:
        raise ValueError(f"dataset.py has no word {word!r}; {nearest(word, WORDS)}")
    return import_module(WORDS[word].module).main(rest)
