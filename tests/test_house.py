"""房子的规矩：引用只往一个方向走、没有环；文件、函数、文件夹的大小；测试与代码同一张平面图；层的名字。

每条规矩是 {相对路径: 正文} → 毛病的函数；每条都拿真的房子问一遍，再拿一处编造的毛病问一遍，看它认不认得出。
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house import (
    BEGIN,
    END,
    PAGE,
    PRODUCT,
    ROOT,
    House,
    arrows,
    between_units,
    bound,
    circles,
    functions,
    imports,
    length,
    parse,
    picture,
    read_house,
    tracked,
    wing_of,
)

FILE_LINES, FUNCTION_LINES, FOLDER_DEPTH, SIDE_BY_SIDE = 400, 60, 2, 14
FLOORS = ("script", "engine", "model", "models", "layers", "util")  # 由上到下；tests 与 benchmarks 看得见全部
STANDS_ON = {  # engine 的一翼站在底层上，此外只有这些
    "engine/evaluation": {"engine/cases", "engine/forecasting", "engine/verification"},
    "engine/comparison": {"engine/evaluation", "engine/forecasting"},  # 后者：别处做的预报怎样读
    "engine/reference": {"engine/evaluation", "engine/memory"},
    "engine/studies": {"engine/evaluation"},
    "engine/sharing": {"engine/evaluation", "engine/forecasting"},
    "engine/studies/replay.py": {"engine/training"},
    "engine/training": {"engine/memory"},
    "engine/training/finish.py": {"engine/evaluation", "engine/codecs"},
}
LATE = {  # 函数里才引用自己的文件：这些，因为
    "engine/commands.py": "--help",
    "engine/codecs/reconstruct.py": "--help",
    "engine/reference/write.py": "--help",
    "engine/studies/head_limit.py": "--help",
    "engine/studies/intrinsic_dimension.py": "--help",
    "engine/studies/replay.py": "--help",
    "engine/studies/stage1_direct.py": "--help",
    "models/__init__.py": "是哪个模型，YAML 里才写着",
    "util/exchange/export.py": "--help",
    "util/exchange/into_store.py": "torch：第一遍用不到，在另一个线程里引入",
    "util/commands/import_fields.py": "--help",
    "util/commands/pack.py": "--help",
    "util/commands/verify.py": "--help",
    "engine/comparison/suite.py": "它等着各次训练，几小时里不必占着 torch 的内存",
}
HEAVY = {  # 函数里才引用的库：引入要零点几秒到几秒，或不是人人装着
    "torch", "numpy", "scipy", "matplotlib", "xarray", "netCDF4", "h5netcdf", "h5py", "distributed", "diffusers",
    "safetensors", "plotly", "tqdm", "yaml", "cfgrib", "gribapi", "wandb", "zarr", "numcodecs", "aiohttp",
}  # fmt: skip
LISTS = {  # 不限个数的：这些，因为
    "": "工具与人都到根目录里找：命令、说明、环境、各种设置",
    "models": "一个挨一个的清单，一个模型一个文件",
    "models/layers": "一个挨一个的清单",
    "config": "一个挨一个的清单，一个模型至少一份",
    "util/report": "一页报告的每一节是一个脚本，放进去就在页面里",
}
DATA = {"tests/from_before": "从前的代码写下的文件，不是哪一翼的测试"}
MODEL_NAMES = {"model", "network", "codec", "forecaster", "autoencoder", "first_stage"}  # 引擎里叫这些的是模型
CODE_IN_TEXT = re.compile(
    r"\b(?:from ((?:engine|models|util|tests|benchmarks)[.\w]*) )?import ((?:[\w.]+(?: as \w+)?(?:, )?)+)"
)


def floor_of(path: str) -> str:
    """models/__init__.py 与 interface.py 是约定，models/ 的其余每个文件是一个模型。"""
    wing = wing_of(path)
    if wing == "models":
        return "models" if path in ("models/__init__.py", "models/interface.py") else "model"
    return {"": "script", "models/layers": "layers"}.get(wing, wing.partition("/")[0])


def one_way(house: House) -> list[str]:
    """楼层只往下看；模型之间互不引用；tests 与 benchmarks 谁也不能引用，测试除外。"""

    def allowed(mine: str, other: str) -> bool:
        if mine in ("tests", "benchmarks"):
            return other != "tests" or mine == "tests"
        if mine == other:
            return mine not in ("script", "model")
        return other in FLOORS[FLOORS.index(mine) + 1 :] or (mine, other) == ("models", "model")

    return [
        f"{path}:{i.line} imports {i.room}"
        for path in house
        for i in imports(house, path)
        if i.room and not allowed(floor_of(path), floor_of(i.room))
    ]


def between_wings(house: House) -> list[str]:
    """engine 的翼站在底层上（另有 STANDS_ON）；底层不看翼，commands.py 在函数里除外；翼之间没有环。"""
    found = []
    for path in house:
        mine, top = wing_of(path), path.partition("/")[0]
        mine_too = {mine, top} | STANDS_ON.get(mine, set()) | STANDS_ON.get(path, set())
        for i in imports(house, path):
            if i.room is None or not i.room.startswith(f"{top}/") or top not in ("engine", "util"):
                continue
            if path == "engine/commands.py":
                bad = wing_of(i.room) != "engine" and not i.late
            else:
                bad = wing_of(i.room) not in mine_too and (top == "engine" or mine == "util")
            if bad:
                found.append(f"{path}:{i.line} imports {i.room}")
    product = {path: text for path, text in house.items() if not path.startswith(("tests/", "benchmarks/"))}
    return found + [" -> ".join(circle) for circle in circles(between_units(arrows(product)))]


def no_circles(house: House) -> list[str]:
    return [" -> ".join(circle) for circle in circles(arrows(house))]


def late_imports(house: House) -> list[str]:
    """函数里只引用重的库，或 --help 不必等的自己的文件；表里不留用不着的。"""
    found, used = [], set()
    for path in (p for p in house if p.startswith(PRODUCT)):
        for i in (i for i in imports(house, path) if i.late):
            if i.room:
                used.add(path)
            if path not in LATE if i.room else i.name.partition(".")[0] not in HEAVY:
                found.append(f"{path}:{i.line} imports {i.name} inside a function")
    return found + [f"{path} is in LATE and imports nothing late" for path in sorted(set(LATE) - used)]


def contracts_only(house: House) -> list[str]:
    """引擎与命令只认约定，不认哪一个模型、哪一层。"""
    return [
        f"{path}:{i.line} imports {i.room}"
        for path in house
        for i in imports(house, path)
        if floor_of(path) in ("script", "engine") and i.room and floor_of(i.room) in ("model", "layers")
    ]


def nothing_vague(house: House) -> list[str]:
    """引擎与命令不用 getattr、hasattr 试探模型，模型的类型不写 Any，也不空着：要什么，在约定里说。"""
    return [
        f"{path}: {what}"
        for path, text in house.items()
        if floor_of(path) in ("script", "engine")
        for node in ast.walk(parse(text))
        if (what := _vague(node))
    ]


def _vague(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "vars"):
        asked = ast.unparse(node.args[0]) if node.args else ""
        return ast.unparse(node) if asked.rpartition(".")[2] in MODEL_NAMES else None
    if isinstance(node, ast.arg):
        name, kind = node.arg, node.annotation
    elif isinstance(node, ast.AnnAssign):
        name, kind = ast.unparse(node.target).rpartition(".")[2], node.annotation
    else:
        return None
    loose = kind is None or re.search(r"\bAny\b", re.sub(r"\b(dict|Mapping)\[str, Any\]", "", ast.unparse(kind)))
    return ast.unparse(node) if name in MODEL_NAMES and loose else None


def sizes(house: House) -> list[str]:
    """文件与函数的长短；测试不限。"""
    product = {path: text for path, text in house.items() if not path.startswith("tests/")}
    files = [f"{p} has {t.count(chr(10))} lines" for p, t in product.items() if t.count("\n") > FILE_LINES]
    return files + [
        f"{path}:{f.lineno} {f.name} has {length(f)} lines"
        for path, text in product.items()
        for f in functions(text)
        if length(f) > FUNCTION_LINES
    ]


def folders(house: House) -> list[str]:
    """从根目录（测试从 tests/）数起至多两层；并排的文件至多 14 个，不论哪一种，LISTS 与它们的测试除外。"""
    beside: dict[str, int] = {}
    for path in {*house, *tracked(ROOT)}:
        beside[wing_of(path)] = beside.get(wing_of(path), 0) + 1
    found = []
    for folder, count in beside.items():
        mirrored = folder.removeprefix("tests").removeprefix("/")
        if len(mirrored.split("/")) > FOLDER_DEPTH:
            found.append(f"{folder}/ is deeper than {FOLDER_DEPTH} folders")
        if count > SIDE_BY_SIDE and mirrored not in LISTS:
            found.append(f"{folder}/ holds {count} files, more than {SIDE_BY_SIDE}")
    return found


def mirrored(house: House) -> list[str]:
    """测试的每个文件夹都有代码里的那一个，都有 __init__.py（否则会顶掉同名的库）；代码的文件夹也都有。"""
    folders = {wing_of(path) for path in house if path.endswith(".py")} - {""}
    rooms = {folder for folder in folders if folder.partition("/")[0] != "tests"}
    tests = {wing_of(path) for path in {*house, *tracked(ROOT)} if path.count("/") > 1 and path.startswith("tests/")}
    return [f"{t}/ mirrors no folder" for t in sorted(tests - set(DATA)) if t.removeprefix("tests/") not in rooms] + [
        f"{folder}/ has no __init__.py" for folder in sorted(folders) if f"{folder}/__init__.py" not in house
    ]


def code_in_text(house: House) -> list[str]:
    """交给另一个进程的代码写在字符串里，引用的也要真有：模块，和模块里的名字。"""
    return [
        f"{path}:{node.lineno} imports {name} in a text"
        for path, text in house.items()
        if path.startswith(("tests/", "benchmarks/")) and path != "tests/test_house.py"  # 它的字符串是编造的毛病
        for node in ast.walk(parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for base, names in CODE_IN_TEXT.findall(node.value)
        for name in (f"{base}.{one}".strip(".").partition(" ")[0] for one in re.split(r",\s*", names) if one)
        if not _is_there(house, name)
    ]


def _is_there(house: House, name: str) -> bool:
    """别处的名字总算有；仓库里的，是一个文件，或是文件里写着的名字。"""
    top, inside = name.partition(".")[0], name.replace(".", "/")
    if top not in (*PRODUCT, "tests", "benchmarks"):
        return True
    places = {f"{inside}.py", f"{inside}/__init__.py"}
    base, _, last = inside.rpartition("/")
    around = [house[place] for place in (f"{base}.py", f"{base}/__init__.py") if place in house]
    return bool(places & house.keys()) or any(last in bound(text) for text in around)


def layer_names(house: House) -> list[str]:
    """只有一个模型用到的层（经别的层用到的也算），名字以那个模型的名字或它的末一个词开头；没有人用的不该在。"""
    graph = arrows(house)
    layers = [p for p in house if wing_of(p) == "models/layers" and not p.endswith("__init__.py")]
    users: dict[str, set[str]] = {layer: set() for layer in layers}
    for model in (path for path in house if floor_of(path) == "model"):
        ahead = [model]
        while ahead:
            for layer in graph[ahead.pop()]:
                if layer in users and model not in users[layer]:
                    users[layer].add(model)
                    ahead.append(layer)
    found = [f"{layer} is used by no model" for layer in layers if not users[layer]]
    for layer, (model,) in ((layer, users[layer]) for layer in layers if len(users[layer]) == 1):
        name, owner = Path(layer).stem, Path(model).stem
        if not f"{name}_".startswith((f"{owner}_", f"{owner.rpartition('_')[2]}_")):
            found.append(f"{layer} is used by {owner} alone and does not carry its name")
    return found


Rule = Callable[[House], list[str]]
RULES = (
    one_way, between_wings, no_circles, late_imports, contracts_only, nothing_vague, sizes, folders, mirrored,
    code_in_text, layer_names,
)  # fmt: skip


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(ROOT, (*PRODUCT, "tests", "benchmarks"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rules(house: House, rule: Rule):
    found = rule(house)
    assert not found, "\n".join(found)


MADE_UP: list[tuple[Rule, str, str]] = [
    (one_way, "util/scores/metrics.py", "import models.interface"),
    (one_way, "util/scores/metrics.py", "def f():\n    from engine import loading"),
    (one_way, "util/config.py", "from ..models import interface"),
    (one_way, "util/scores/metrics.py", "import importlib\nimportlib.import_module(f'models.{name}')"),
    (one_way, "util/scores/metrics.py", "import importlib\nimportlib.import_module(name='models.simvp')"),
    (one_way, "util/commands/dataset.py", "WORDS = {'rollout': ('engine.loading', 'a line')}"),
    (one_way, "models/layers/attention.py", "from models.simvp import Block"),
    (one_way, "models/layers/attention.py", "from models import interface"),
    (one_way, "models/simvp.py", "from models.ar_pred_video_vanilla import Model"),
    (one_way, "models/simvp.py", "from models import ar_pred_video_vanilla"),
    (one_way, "models/simvp.py", "from .ar_pred_video_vanilla import Model"),
    (one_way, "models/simvp.py", "from engine.training.loop import train"),
    (one_way, "models/interface.py", "import train"),
    (one_way, "engine/training/loop.py", "import train"),
    (one_way, "engine/training/loop.py", "from tests import conftest"),
    (one_way, "train.py", "from tests.conftest import CLIMATE"),
    (one_way, "benchmarks/codec.py", "import tests.conftest"),
    (between_wings, "engine/loading.py", "from engine.training.state import State"),
    (between_wings, "engine/loading.py", "def f():\n    from engine.training.state import State"),
    (between_wings, "engine/commands.py", "from engine.training.loop import train"),
    (between_wings, "engine/training/loop.py", "from engine.evaluation.cost import flops_per_sample"),
    (between_wings, "engine/evaluation/cost.py", "from engine.training.state import State"),
    (between_wings, "util/config.py", "from util.data import index"),
    (between_wings, "util/data/index.py", "from util.packing.pack import main"),
    (no_circles, "util/atomic.py", "import util.atomic_too"),
    (no_circles, "util/strict.py", "def f():\n    from util import config"),
    (no_circles, "models/simvp.py", "from models import build_model"),
    (no_circles, "util/commands/check.py", "from util.commands.dataset import WORDS"),
    (no_circles, "util/batch.py", "if TYPE_CHECKING:\n    from util.grid import OutputGrid"),
    (late_imports, "engine/loading.py", "def f():\n    from engine import parallel"),
    (late_imports, "engine/loading.py", "def f():\n    import json"),
    (late_imports, "engine/commands.py", "from engine.training.loop import train"),
    (contracts_only, "engine/training/start.py", "from models.layers.codebook import Codebook"),
    (contracts_only, "engine/training/start.py", "from models.simvp import Model"),
    (contracts_only, "engine/training/start.py", "def f():\n    from models import simvp"),
    (contracts_only, "engine/training/start.py", "KINDS = {'fast': 'models.simvp'}"),
    (contracts_only, "train.py", "import models.simvp"),
    (contracts_only, "train.py", "from models.layers import padding"),
    (nothing_vague, "engine/training/start.py", "getattr(model, part)"),
    (nothing_vague, "engine/training/start.py", "def f(self):\n    return hasattr(self.state.model, 'decoder')"),
    (nothing_vague, "engine/training/start.py", "def f(model: Any): ..."),
    (nothing_vague, "engine/training/start.py", "def f(*, codec: Any | None = None): ..."),
    (nothing_vague, "engine/training/start.py", "def f(model): ..."),
    (nothing_vague, "engine/training/start.py", "class State:\n    model: Any"),
    (nothing_vague, "train.py", "model: dict[str, Any] | Any = load()"),
    (sizes, "util/batch.py", "x = 1\n" * (FILE_LINES + 1)),
    (sizes, "util/batch.py", "class A:\n    def f():\n" + "        x = 1\n" * FUNCTION_LINES),
    (folders, "engine/training/steps/clip.py", ""),
    (folders, "tests/engine/training/steps/test_clip.py", ""),
    (mirrored, "tests/engine/training2/__init__.py", ""),
    (mirrored, "tests/utilities/test_batch.py", ""),
    (mirrored, "tests/old_files/scores.npz", ""),
    (mirrored, "tests/tests/test_batch.py", ""),
    (code_in_text, "tests/test_a.py", "CODE = 'import sys, util.old; print(sys)'"),
    (code_in_text, "tests/test_a.py", "CODE = 'from util.old import Batch'"),
    (code_in_text, "tests/test_a.py", "CODE = 'from util.batch import Old'"),
    (code_in_text, "tests/test_a.py", "CODE = 'from util.batch import Batch, Old as New'"),
    (code_in_text, "tests/test_a.py", "CODE = f'import sys\\nfrom util import old\\n{more}'"),
    (layer_names, "models/layers/swin.py", ""),
    (layer_names, "models/persistence.py", "from models.layers import swin"),
]


@pytest.mark.parametrize(("rule", "path", "text"), MADE_UP)
def test_a_made_up_violation_is_found(house: House, rule: Rule, path: str, text: str):
    extra = {"util/atomic_too.py": "import util.atomic", "models/layers/swin.py": "# 没有人用"}
    kept = {p: t for p, t in extra.items() if Path(p).stem in text}
    assert set(rule({**house, **kept, path: text})) - set(rule({**house, **kept})), (path, text)


def test_fifteen_files_side_by_side_are_found(house: House):
    crowded = {f"engine/crowded/part{n}.py": "" for n in range(SIDE_BY_SIDE + 1)}
    assert folders({**house, **crowded}) == [*folders(house), "engine/crowded/ holds 15 files, more than 14"]
    pictures = {f"util/plot/picture{n}.png": "" for n in range(SIDE_BY_SIDE)}
    assert set(folders({**house, **pictures})) - set(folders(house))
    assert folders({**house, **{f"models/model{n}.py": "" for n in range(SIDE_BY_SIDE)}}) == folders(house)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("train.py", "from engine.training.loop import train\nfrom util.cli import run_command"),
        ("engine/training/loop.py", "import torch, models\nfrom engine import loading\nfrom models.interface import X"),
        (
            "models/__init__.py",
            "import importlib\nimportlib.import_module(f'models.{name}')\nfrom models.simvp import X",
        ),
        ("models/simvp.py", "from models.layers.attention import Attention\nfrom util.batch import Batch"),
        ("models/layers/attention.py", "from models.layers import padding\nimport torch.nn as nn"),
        ("tests/engine/training/test_train.py", "import models.simvp, engine.loading, tests.conftest, train"),
    ],
)
def test_the_way_down_is_allowed(house: House, path: str, text: str):
    assert not [v for v in one_way({**house, path: text}) if v.startswith(path)]


def test_the_picture_is_of_this_house():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == picture(read_house(ROOT)), "run `make house`"
