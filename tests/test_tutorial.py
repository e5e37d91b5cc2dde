"""docs/tutorial/ 的三页在小的数据上从头走到尾：命令、选项、文件名都还在。"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.commands import compare_parser, evaluate_parser, inference_parser, train_parser
from tests.house import ROOT
from tests.models.small import small_batch, small_spec
from tests.tutorial import FOLDER, PAGES, PART, copy_repository, run_page, run_pages, shortened, shrink
from util.commands import check, pack, sample
from util.config import load_config

CHANNELS = ("t2m", "u10", "v10", "z_level_00")
SPLITS = {
    "train": ["1981-06-01", "1981-06-14"], "test": ["1981-06-28", "1981-07-06"], "val": ["1981-07-07", "1981-07-10"],
}  # fmt: skip


def page(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.soak
def test_every_command_of_the_tutorial_works(make_tree: Any, tmp_path: Path) -> None:
    copy_repository(tmp_path)
    tree = make_tree(tmp_path / "data/sample", CHANNELS, (8, 16), "1981-06-01", "1981-07-10")
    data = {**tree.data, "root": "data/sample", "splits": SPLITS, "pressure_hpa": [1000.0]}

    def small(text: str) -> str:
        if text.startswith("root: "):
            return json.dumps(data)
        text = text.replace("python dataset.py sample --root data/sample\n", "").replace("epochs: 8", "epochs: 1")
        return text.replace("width: 24", "width: 4").replace("warmup_steps: 50, ", "").replace("dim: 96", "dim: 16")

    (tmp_path / "config/data/sample.yaml").write_text(json.dumps(data))
    pages = run_pages(tmp_path, small)
    for name, text in pages.items():
        assert PART.sub("", text) == PART.sub("", page(name))  # 只有输出换过


def commands() -> list[list[str]]:
    """各页里 python 的命令，续行与管道之前的。"""
    bash = [part["body"] for name in PAGES for part in PART.finditer(page(name)) if part["kind"] == "bash"]
    lines = [line.strip() for body in bash for line in body.splitlines()]
    found = [re.split(r" (?:\||2>)", line)[0] for line in lines if re.match(r"(python \w+\.py|torchrun) ", line)]
    return [shlex.split(line)[1 if line.startswith("python") else 4 :] for line in found]


def test_every_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """完整走一遍在久测里；这里只问选项还在不在。"""
    tables = {"check": check, "pack": pack, "sample": sample}
    parsers = {
        "train.py": train_parser(), "evaluate.py": evaluate_parser(), "inference.py": inference_parser(),
        "compare.py": compare_parser(), "train_ar_pred_video_vanilla.py": train_parser("config/x.yaml"),
    }  # fmt: skip
    assert {name for name, *_ in commands()} == {*parsers, "dataset.py"}
    for script, *words in commands():
        parser = tables[words.pop(0)].make_parser() if script == "dataset.py" else parsers[script]
        parser.parse_intermixed_args(words)


def test_the_files_of_the_pages_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    files = {part["file"]: part["body"] for name in PAGES for part in PART.finditer(page(name)) if part["file"]}
    for name, body in files.items():
        path = tmp_path / Path(name).name
        path.write_text(body, encoding="utf-8")
        if "model:" in body and path.suffix == ".yaml":
            load_config(path)
    found = importlib.util.spec_from_file_location("neighbours", tmp_path / "neighbours.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "neighbours", module)
    found.loader.exec_module(module)
    model, batch = module.Model(module.Config(width=4), small_spec()), small_batch(small_spec())
    made = model.forecast(batch.history, batch.time)
    assert made.shape == batch.future[:, None].shape
    around = batch.history[:, -1].amax((-2, -1)), batch.history[:, -1].amin((-2, -1))
    assert (made[:, 0, 0].amax((-2, -1)) <= around[0]).all() and (made[:, 0, 0].amin((-2, -1)) >= around[1]).all()


def test_output_and_pictures_are_written_in(tmp_path: Path) -> None:
    import matplotlib.image

    matplotlib.image.imsave(tmp_path / "a.png", np.zeros((2, 2, 3)))
    before = """text

<!-- file: b/c.yaml -->
```yaml
x: 1
```

```bash show
cat b/c.yaml
```

<!-- exits: 3 -->
```bash
exit 3
```

<!-- picture: a.png images/a.png A picture -->
end
"""
    after = run_page(before, tmp_path, lambda text: text.replace("1", "2"))
    assert "cat b/c.yaml\n```\n\n```text\nx: 2\n```\n\n<!-- exits" in after and "x: 1" in after
    assert "-->\n![A picture](images/a.png)\nend" in after and (tmp_path / "images/a.png").is_file()
    assert run_page(after, tmp_path, lambda text: text.replace("1", "2")) == after


def test_output_is_shortened() -> None:
    numbers = "".join(f"{n}\n" for n in range(20))
    said = f"2026-01-02 03:04:05 INFO a /some/log\nepoch 1/2:  50%|##  | 1/2\rb\n\n{numbers}"
    lines = shortened(said, Path("/some")).splitlines()
    assert lines[:4] == ["a /log", "b", "0", "…"] and lines[-1] == "19" and len(lines) == 16


def test_pictures_are_shrunk_by_averaging(tmp_path: Path) -> None:
    import matplotlib.image

    pixels = np.random.default_rng(0).random((4, 3600, 3)).round()
    matplotlib.image.imsave(tmp_path / "a.png", pixels)
    shrink(tmp_path / "a.png", tmp_path / "b.png")
    found = matplotlib.image.imread(tmp_path / "b.png")[..., :3]
    assert found.shape == (1, 900, 3)
    expected = [[pixels[0:4, 4 * n : 4 * n + 4, c].mean() for c in range(3)] for n in range(900)]
    np.testing.assert_allclose(found[0], expected, atol=1 / 255)
