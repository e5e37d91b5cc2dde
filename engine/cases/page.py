"""写出个例：OUT/cases/NAME/ 里的成绩、羽状图的数、图，与一页自足的 report.html；只在零号进程。"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.cases.collect import CaseFound
from engine.cases.figures import KINDS, Picture, draw_case
from engine.cases.plan import Plan
from engine.cases.result import case_scores, write_plume, write_scores
from util.calendar import moment_of, time_text
from util.report import channel_line, write_report
from util.report.bilingual import Bilingual, chinese, split_text
from util.scores.table import ScoreTable

log = logging.getLogger("ar_pred")
FOLDER = "cases"
FILES = ("scores.csv", "scores.json", "plume.csv", "report.html")
PICTURE_BYTES = 3_200_000  # 页面里的图一共多少字节，base64 之前：整页不过 10 MB


class About(NamedTuple):
    """这次评测的几样：被评的模型与气候态在表上的名字，各窗口的起报时间，时效有几个，来历，主页的标题与命令。"""

    judged: str
    normal: str
    inits: np.ndarray
    steps: int
    origin: Mapping[str, Any]
    title: str
    reproduce: Sequence[str]


def write_cases(out: Path, plans: Sequence[Plan], founds: Sequence[CaseFound], about: About) -> tuple[list[Path], list]:
    """各个例一个文件夹；返回 PNG 的路径，与主页上的链接（文字，地址）。"""
    paths: list[Path] = []
    links = []
    for plan, found in zip(plans, founds, strict=True):
        name, folder = plan.case.name, out / FOLDER / plan.case.name
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        table = case_scores(plan, found, about.judged, about.steps)
        first, last = map(time_text, plan.case.dates)
        facts = {"case": name, "first": first, "last": last, "box": box_text(plan), **about.origin}
        write_scores(folder, plan, table, facts)
        write_plume(folder / "plume.csv", plan, found, about.judged, about.inits)
        pictures = [*draw_case(plan, found, about.judged, about.normal, about.inits, folder / "figures")]
        write_report(folder / "report.html", page_content(plan, found, table, pictures, about))
        log.info("case %s: %s", name, folder / "report.html")
        paths += [picture.path for picture in pictures]
        links.append((name, f"{FOLDER}/{name}/report.html"))
    return paths, links


def remove_cases(out: Path) -> None:
    """上一次评测写下的个例：与这一次不是一回事。别的文件不动。"""
    for folder in [path for path in (out / FOLDER).glob("*") if (path / "scores.json").is_file()]:
        figures = [p for kind in KINDS for end in ("png", "pdf") for p in folder.glob(f"figures/{kind}-*.{end}")]
        for path in (*figures, *(folder / name for name in FILES)):
            path.unlink(missing_ok=True)
        for empty in (folder / "figures", folder, out / FOLDER):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


def page_content(
    plan: Plan, found: CaseFound, table: ScoreTable, pictures: Sequence[Picture], about: About
) -> dict[str, Any]:
    """页面的 JSON；写法同 engine/evaluation/page.py 的 Page，另有 pictures。"""
    baselines = [name for name in table.scores if name != about.judged]
    first, last = (f"{moment_of(hour):%Y-%m-%d %H}" for hour in plan.case.dates)
    box = box_text(plan)
    members = found.values[about.judged].shape[1]
    facts: list[tuple[str, Any]] = [("model", about.judged), ("split", split_text(about.origin["split"]))]
    facts += [("initial times", table.initial_times), ("grid points", f"{plan.spec.height} x {plan.spec.width}")]
    facts += [("members", members)] if members > 1 else []
    shown = within_budget(pictures)
    count = sum(map(len, shown.values()))
    whole = len(pictures)
    english = f"{count} of {whole} on this page, all in figures/"
    said = Bilingual(english, f"本页 {count} 张，共 {whole} 张，全部在 figures/")
    facts += [("figures", said)] if count < len(pictures) else []
    return {
        "kind": "case",
        "title": plan.case.name,
        "subtitle": Bilingual(f"{first} – {last} UTC, {box}", f"{first} – {last} UTC，{chinese(box)}"),
        "facts": facts,
        "links": [(about.title, "../../report.html")],
        "models": [
            {"name": about.judged, "role": "model"},
            *({"name": name, "role": "baseline"} for name in baselines),
        ],
        "channels": [channel_line(name, unit) for name, unit in table.units.items()],
        "lead_hours": table.lead_hours,
        "scores": table.scores,
        "fields": {c: {"scored": table.pairs[c], "left_out": table.left_out[c]} for c in table.channels},
        "pictures": {KINDS[kind]: lines for kind, lines in shown.items() if lines},
        "reproduce": list(about.reproduce),
    }


def within_budget(pictures: Sequence[Picture]) -> dict[str, list[dict[str, Any]]]:
    """放进页面的图，一种一列；放不下的依 KINDS 的次序舍去后面的，它们在 figures/ 里。"""
    room, lines = PICTURE_BYTES, {kind: [] for kind in KINDS}
    for kind in KINDS:
        for picture in (one for one in pictures if one.kind == kind):
            room -= len(picture.small)
            if room < 0:
                return lines
            lines[kind].append(
                {
                    "channel": picture.channel,
                    "time": None if picture.hour is None else f"{moment_of(picture.hour):%Y-%m-%dT%H:%M}",
                    "contour": picture.contour,
                    "name": picture.path.stem,
                    "data": base64.b64encode(picture.small).decode("ascii"),
                }
            )
    return lines


def box_text(plan: Plan) -> str:
    """框里的格点到哪里为止。"""
    spec = plan.spec
    if plan.case.latitude is None and plan.case.longitude is None:
        return Bilingual("whole grid", "整个网格")
    south, north = min(spec.latitudes), max(spec.latitudes)
    west, east = spec.longitudes[0], spec.longitudes[-1]
    return Bilingual(
        f"latitude {south:g} to {north:g}, longitude {west:g} to {east:g}",
        f"纬度 {south:g} 至 {north:g}，经度 {west:g} 至 {east:g}",
    )
