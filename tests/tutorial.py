"""docs/tutorial/ 里的每条命令真的走一遍：`python -m tests.tutorial`（`make docs`），输出与图写回页里。

在一个空文件夹里，只有仓库的文件；三页依次走，后面的用前面留下的。页里的写法：

* ```bash 的一段：一起走，停在头一个出错的；写着 ```bash show 的，后面接上输出（头尾几行，进度与时刻去掉）。
* `<!-- file: NAME -->` 后面的一段：写成那个文件。
* `<!-- exits: N -->` 后面的一段 bash：应当以 N 结束。
* `<!-- picture: NAME images/X.png 说明 -->`：后面接上由走出来的那个文件缩小而成的图。
* ```sh 的一段不走（要集群的）。
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.image
import numpy as np

from tests.house import ROOT, tracked

FOLDER = ROOT / "docs/tutorial"
PAGES = ("first_day.md", "own_data.md", "own_model.md")
PART = re.compile(
    r"(?:<!-- (?:file: (?P<file>\S+)|exits: (?P<status>\d+)) -->\n)?"
    r"```(?P<kind>bash|yaml|python)(?P<show> show)?\n(?P<body>.*?)```(?:\n\n```text\n.*?```)?"
    r"|<!-- picture: (?P<made>\S+) (?P<image>\S+) (?P<about>[^\n]*) -->(?:\n!\[[^\n]*)?",
    re.DOTALL,
)
HEAD, TAIL, WIDTH = 3, 12, 150  # 输出留头几行、末几行、几个字
PIXELS = 900  # 图的宽
MOMENT = re.compile(r"^\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2} (INFO )?")
PROGRESS = re.compile(r"^\s*(\S.*:\s+)?\d+%\|")
Small = Callable[[str], str]


def run_pages(folder: Path, small: Small = lambda command: command, names: tuple[str, ...] = PAGES) -> dict[str, str]:
    """各页在 folder 里走一遍，返回填上了输出的页；图留在 folder/images。

    small: 命令、文件的内容 → 换小了的（测试用）；页里写的仍是原来的。

    Raises:
        AssertionError: 一条命令没有照页里说的结束。
    """
    return {name: run_page((FOLDER / name).read_text(encoding="utf-8"), folder, small) for name in names}


def run_page(text: str, folder: Path, small: Small) -> str:
    def fill(part: re.Match[str]) -> str:
        body, own = part["body"], part[0].partition("\n\n```text\n")[0]
        if part["made"]:
            shrink(folder / part["made"], folder / part["image"])
            return f"{part[0].partition(chr(10))[0]}\n![{part['about']}]({part['image']})"
        if part["file"]:
            path = folder / part["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(small(body), encoding="utf-8")
        if part["kind"] != "bash":
            return part[0]
        said = run(small(body), folder, expected=int(part["status"] or 0))
        return f"{own}\n\n```text\n{said}```" if part["show"] else own

    return PART.sub(fill, text)


def run(commands: str, folder: Path, expected: int) -> str:
    """bash 里走；返回留下的输出。python 就是正在用的这一个。"""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "WANDB_MODE": "offline", "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-eu", "-c", commands], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == expected, f"{commands}exit status {done.returncode}:\n{done.stdout[-3000:]}"
    return shortened(done.stdout, folder)


def shortened(output: str, folder: Path) -> str:
    """进度、时刻、W&B 的话、机器上的路径去掉，只留头尾。"""
    lines = [line.rpartition("\r")[2].rstrip() for line in output.replace(str(folder), "").split("\n")]
    lines = [MOMENT.sub("", line)[:WIDTH] for line in lines if line.strip()]
    lines = [line for line in lines if not PROGRESS.match(line) and "wandb" not in line.lower()]
    if len(lines) > HEAD + TAIL + 1:
        lines = [*lines[:HEAD], "…", *lines[-TAIL:]]
    return "".join(f"{line}\n" for line in lines)


def shrink(source: Path, target: Path) -> None:
    """PNG 缩到 PIXELS 宽：邻近的平均；小的照抄。"""
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = matplotlib.image.imread(source)
    step = pixels.shape[1] // PIXELS
    if step < 2:
        shutil.copyfile(source, target)
        return
    rows, columns = (size // step for size in pixels.shape[:2])
    blocks = pixels[: rows * step, : columns * step].reshape(rows, step, columns, step, -1)
    matplotlib.image.imsave(target, np.ascontiguousarray(blocks.mean((1, 3))))


def copy_repository(folder: Path) -> None:
    """仓库里的文件（没有提交的也算）抄进 folder。"""
    for path in tracked(ROOT):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)


def write(pages: Mapping[str, str], folder: Path) -> None:
    for name, text in pages.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    shutil.copytree(folder / "images", FOLDER / "images", dirs_exist_ok=True)


def main() -> int:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_repository(folder)
        write(run_pages(folder), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
