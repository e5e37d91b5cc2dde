"""比较几个运行：只用大家都有的（起报时间，时效，通道），基线各列一次；写成表、CSV、图和一页报告。"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from engine.comparison.text import as_markdown, as_text, comparison_blocks, span_of
from engine.evaluation.baselines import BASELINES, FITTED
from engine.evaluation.glimpse import MAP_CHANNELS, MAP_LEADS, evenly
from engine.evaluation.page import (
    channels_section,
    models_section,
    page_leads,
    phrase,
    scores_sections,
    spectra_section,
)
from engine.evaluation.results import Table, add_spectral_distance
from engine.loading import versions
from util.atomic import replacing
from util.calendar import time_text
from util.logger import setup_logging
from util.plot.scores import scores_figure
from util.plot.style import save_figures
from util.report import write_report
from util.scores.bootstrap import block_sums
from util.scores.common import Common, Contender, common_pairs
from util.scores.statistics_file import Statistics
from util.scores.tabulate import tabulate, write_csv

log = logging.getLogger("ar_pred")
BASELINE_NAMES = (*BASELINES, FITTED)
SAME = 1e-4  # 同一个基线在两份评测里的 RMSE 至多相差这么多（相对）：float32 与设备的舍入之上
ORIGIN = (
    "run",
    "checkpoint",
    "step",
    "split",
    "stride",
    "steps",
    "model",
    "members",
    "perturb",
    "smooth",
    "set",
)  # 两个文件里都有的来历


class Entry(NamedTuple):
    """一个参加比较的评测：label 是表上的名字，folder 里有 table（metrics.json）与 file（statistics.nc）。"""

    label: str
    folder: Path
    table: Table
    file: Statistics

    @property
    def report(self) -> Path:
        """训练留下的 test/ 的报告是整个运行的，在上一层。"""
        own = self.folder / "report.html"
        return self.folder.parent / "report.html" if self.folder.name == "test" and not own.is_file() else own

    def holds(self, base: str) -> bool:
        """文件里有这个基线。扰动初值的持续性预报是集合，不是基线。"""
        own_ensemble = self.table["model"] == base and self.table["members"] > 1
        return base in self.file.models and not own_ensemble

    def rmse(self, model: str, common: Common) -> np.ndarray:
        """共同的场上的 RMSE (L, C)，物理单位；没有场的地方为 NaN。"""
        blocks = block_sums(Contender(model, self.file, model), common, ["square"])
        with np.errstate(invalid="ignore"):
            mean = blocks.sums["square"].sum(0) / blocks.counts.sum(0)
        return np.sqrt(mean) * blocks.std


def compare_runs(
    folders: Sequence[Path],
    out: Path,
    reproduce: Sequence[str] = (),
    names: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """比较这些运行或评测的文件夹，结果写进 out。

    Args:
        reproduce: 报告里写的参数；默认是 --runs 与这些文件夹。
        names: 表上的名字，与 folders 对齐；默认是运行名。
        notes: 也要写在结果里的说明。

    Raises:
        ValueError: 不是一次评测，没有共同的部分，或真值不是同一份。
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    with ExitStack() as stack:
        entries = open_entries(stack, folders, names)
        setup_logging(out / "compare.log")
        sources = choose_contenders(entries)
        table = make_comparison(entries, sources, notes)
        text = as_text(comparison_blocks(table))
        log.info("comparison of %d run(s)\n%s", len(entries), text)
        command = reproduce or ["--runs", *map(str, folders), "--out", str(out)]
        content = page_content(entries, sources, table, out)
    content["reproduce"] = [f"python compare.py {shlex.join(command)}"]
    write_outputs(out, table, text, content)
    log.info("comparison: %s", out / "report.html")


def open_entries(stack: ExitStack, folders: Sequence[Path], names: Sequence[str]) -> list[Entry]:
    """打开各评测，定下表上的名字。"""
    places = [find_evaluation(folder) for folder in folders]
    for i, place in enumerate(places):
        if place.resolve() in [p.resolve() for p in places[:i]]:
            raise ValueError(f"{folders[i]} is given twice")
    files = [stack.enter_context(Statistics(place / "statistics.nc")) for place in places]
    tables = [read_table(place, file) for place, file in zip(places, files, strict=True)]
    labels = choose_labels(list(names) or [t["run"] for t in tables], places, tables)
    return [Entry(*parts) for parts in zip(labels, places, tables, files, strict=True)]


def find_evaluation(folder: Path) -> Path:
    """运行的文件夹（train.py 把测试成绩留在它的 test/）或 evaluate.py 的 --out → 有 statistics.nc 的那一个。"""
    for place in (folder, folder / "test"):
        if (place / "statistics.nc").is_file():
            return place
    raise ValueError(
        f"{folder}: no statistics.nc there or in its test/; give the log folder of a finished run, "
        "or a folder that evaluate.py --out has written"
    )


def read_table(folder: Path, file: Statistics) -> Table:
    """metrics.json；它与 statistics.nc 必须出自同一次评测。"""
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"no file {path}: that evaluation did not finish; run evaluate.py again")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); run evaluate.py again") from None
    for key in ORIGIN:
        if table.get(key) != file.attributes.get(key):
            raise ValueError(
                f"{path} has {key} = {table.get(key)}, statistics.nc beside it {file.attributes.get(key)}: "
                "a later evaluation did not finish; run evaluate.py again"
            )
    return table


def choose_labels(names: Sequence[str], places: Sequence[Path], tables: Sequence[Table]) -> list[str]:
    """表上的名字，互不相同。

    头一个被评的就是基线的运行即是那个基线的一行；同一运行来几次时加上文件夹的名字，还重就加整个路径。
    """
    forms = [(n, f"{n} ({p.name})", f"{n} ({p})") for n, p in zip(names, places, strict=True)]
    labels: list[str] = []
    for mine, table in zip(forms, tables, strict=True):
        model = table["model"]
        if model in BASELINE_NAMES and table["members"] == 1 and model not in labels:
            labels.append(model)
            continue
        label = next(form for k, form in enumerate(mine) if [other[k] for other in forms].count(form) == 1)
        labels.append(label if label not in BASELINE_NAMES else f"{label} (run)")
    return labels


def choose_contenders(entries: Sequence[Entry]) -> list[Contender]:
    """每个运行一行，基线排在后面：自己就是一个运行的取那个运行，其余的取自第一份有它的评测。"""
    rows = {e.label: Contender(e.label, e.file, e.table["model"]) for e in entries}
    for base in BASELINE_NAMES:
        holder = next((e for e in entries if e.holds(base)), None)
        if base in rows:
            rows[base] = rows.pop(base)
        elif holder is not None:
            rows[base] = Contender(base, holder.file, base)
    return list(rows.values())


def make_comparison(entries: Sequence[Entry], sources: Sequence[Contender], notes: Sequence[str] = ()) -> Table:
    """共同的场上的成绩表，加上来历、代价、各有多少场、说明（接在 notes 之后）。

    Raises:
        ValueError: 没有共同的部分，或真值不是同一份。
    """
    common = common_pairs(sources)
    notes = [*notes, *entry_notes(entries, common), *check_baselines(entries, sources, common)]
    baselines = [s.label for s in sources if s.label in BASELINE_NAMES]
    runs = [s.label for s in sources if s.label not in BASELINE_NAMES]
    table = tabulate(sources, baselines, runs[:1])
    if same_fields(entries, table):
        for source in sources:
            add_spectral_distance(table, source.file, {source.label: source.model})
        table["spectrum_label"] = entries[0].table["spectrum_label"]
    else:
        notes.append(
            "spectra and log-spectral distance are left out: they are means over all windows of a run, "
            "and the runs were not scored on the same windows and lead times"
        )
    for note in notes:
        log.warning("%s", note)
    return {
        "runs": [describe_entry(e, table) for e in entries],
        "notes": notes,
        "baselines": baselines,
        "first_initial_time": time_text(int(common.hours[0])),
        "last_initial_time": time_text(int(common.hours[-1])),
        **table,
    }


def describe_entry(entry: Entry, table: Table) -> dict[str, Any]:
    """一个运行的来历、代价和它自己有多少场。"""
    own = entry.table
    return {
        "name": entry.label,
        "folder": str(entry.folder),
        **{key: own[key] for key in ORIGIN if key in own},  # 没有改过采样的没有 set
        "initial_times": own["initial_times"],
        "lead_hours": own["lead_hours"],
        "pairs": {c: sum(own["pairs"][c]) for c in table["channels"]},
        "cost": own["cost"],
    }


def entry_notes(entries: Sequence[Entry], common: Common) -> list[str]:
    """哪些通道不是人人都有；标准差不同时，以标准差为尺的成绩不能比。"""
    notes = []
    for entry in entries:
        if extra := [c for c in entry.file.channels if c not in common.channels]:
            names = ", ".join(extra)
            notes.append(f"not compared, because not every run has them in the same unit: {names} of {entry.label}")
    first = entries[0]
    for other in entries[1:]:
        for c in common.channels:
            one, two = (e.file.std[e.file.channels.index(c)] for e in (first, other))
            if not np.isclose(one, two, rtol=SAME):
                notes.append(
                    f"SSIM and PSNR do not compare between {first.label} and {other.label}: they count in standard "
                    f"deviations, which for {c} are {one:.6g} and {two:.6g}"
                )
                break
    return notes


def check_baselines(entries: Sequence[Entry], sources: Sequence[Contender], common: Common) -> list[str]:
    """各评测里的同一个基线应当一样：持续性预报只由真值决定，不同就是真值不同；别的只是说明用的是谁的。

    Raises:
        ValueError: 持续性预报不同。
    """
    notes = []
    for base, holders in ((b, [e for e in entries if e.holds(b)]) for b in BASELINE_NAMES):
        shown = next((e for s in sources if s.label == base for e in holders if e.file is s.file), None)
        if base == BASELINES[0]:
            notes += [f"{e.label}: no plain {base} to check its truth by" for e in entries if e not in holders]
        if shown is None:
            continue
        reference = shown.rmse(base, common)  # (L, C)
        for other in (e for e in holders if e is not shown):
            values = other.rmse(base, common)
            differs = ~np.isclose(values, reference, rtol=SAME, atol=0, equal_nan=True)
            if not differs.any():
                continue
            c = int(differs.any(0).argmax())
            lead = int(differs[:, c].argmax())
            found = (
                f"RMSE of {base} for {common.channels[c]} at +{common.leads[lead]} h is {reference[lead, c]:.6g} in "
                f"{shown.folder}, {values[lead, c]:.6g} in {other.folder}"
            )
            if base == BASELINES[0]:
                raise ValueError(
                    f"{shown.label} and {other.label} were scored against different truth (another tree, or other "
                    f"units?): {found}, on the same pairs"
                )
            notes.append(f"{found} (fitted to other data); shown is the one of {shown.folder}{own_normal(base)}")
    return notes


def own_normal(base: str) -> str:
    """距平是相对各自的气候态的。"""
    return "; ACC and activity ratio of each run refer to its own" if base == "climatology" else ""


def same_fields(entries: Sequence[Entry], table: Table) -> bool:
    """每个运行自己的场恰好就是共同的场：共同的是各自的子集，所以时效与场数相同就够了。"""
    return all(
        e.table["lead_hours"] == table["lead_hours"]
        and all(e.table["pairs"][c] == table["pairs"][c] for c in table["channels"])
        for e in entries
    )


def page_content(entries: Sequence[Entry], sources: Sequence[Contender], table: Table, out: Path) -> dict[str, Any]:
    """报告的内容；地图与序列在各自的报告里，给出链接。"""
    shown = page_leads(table)
    thinned = "" if len(shown) == len(table["lead_hours"]) else f", {len(shown)} of them here, all in comparison.csv"
    first, last = table["first_initial_time"], table["last_initial_time"]
    return {
        "kind": "comparison",
        "title": "Comparison of "
        + (", ".join(e.label for e in entries) if len(entries) <= 4 else f"{len(entries)} runs"),
        "facts": [
            ["split", ", ".join(dict.fromkeys(r["split"] for r in table["runs"]))],
            ["windows", phrase("factWindows", table["initial_times"], first, last)],
            ["lead times", span_of(table["lead_hours"]) + thinned],
        ],
        "models": models_section([s.label for s in sources], table["baselines"]),
        "channels": channels_section(table),
        **scores_sections(table, shown),
        **({"spectra": joined_spectra(sources, table)} if "spectrum_label" in table else {}),
        "costs": [{"name": r["name"], **r["cost"]} for r in table["runs"]],
        "comparison": {
            "pairs": table["initial_times"] * len(table["lead_hours"]),
            "notes": [pairs_note(table), *table["notes"]],
        },
        "environment": versions(),
        "links": [
            [e.label, quote(Path(os.path.relpath(e.report, out)).as_posix())]
            for e in entries
            if linkable(e.report, out)
        ],
    }


def config_section(entries: Sequence[Entry]) -> dict[str, str]:
    """各运行的配置接在一起；评测的文件夹旁没有 config.yaml 的不列。"""
    paths = {e.label: e.folder.parent / "config.yaml" for e in entries}
    texts = [f"# {label}\n{path.read_text(encoding='utf-8')}" for label, path in paths.items() if path.is_file()]
    return {"config": "\n".join(texts)} if texts else {}


def linkable(report: Path, out: Path) -> bool:
    """只链接与 out 并列的报告：out 搬到别处（如 docs/）时，指回 log/ 的链接就断了。"""
    return report.is_file() and report.resolve().is_relative_to(out.resolve().parent)


def pairs_note(table: Table) -> str:
    """各运行自己有多少起报时间与时效。"""
    own = (f"{r['name']} {r['initial_times']} x {len(r['lead_hours'])}" for r in table["runs"])
    return f"Initial times x lead times of each run: {', '.join(own)}"


def joined_spectra(sources: Sequence[Contender], table: Table) -> dict[str, Any]:
    """各文件里的谱合成一节，通道与时效和单个报告取得一样多；真值的谱大家相同。"""
    channels = [table["channels"][i] for i in evenly(len(table["channels"]), MAP_CHANNELS)]
    leads = evenly(len(table["lead_hours"]), MAP_LEADS)
    parts = [spectra_section(table, s.file, {s.label: s.model}, channels, leads) for s in sources]
    return {**parts[0], "models": {label: one for part in parts for label, one in part["models"].items()}}


def write_outputs(out: Path, table: Table, text: str, content: Mapping[str, Any]) -> None:
    """comparison.{json,csv,md,txt}、figures/、report.html。"""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.txt": text,
        "comparison.md": as_markdown(comparison_blocks(table)),
        "comparison.json": json.dumps(table, indent=1, allow_nan=False),
    }
    for name, body in texts.items():
        with replacing(out / name) as temporary:
            temporary.write_text(body + "\n", encoding="utf-8")
    write_csv(out / "comparison.csv", table)
    rmse = {m: {c: scores["rmse"] for c, scores in one.items()} for m, one in table["scores"].items()}
    drawn = scores_figure(table["lead_hours"], table["units"], rmse, table["baselines"])
    save_figures(drawn, out / "figures" / "rmse")
    write_report(out / "report.html", content)
