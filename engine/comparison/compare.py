"""compare.py 命令：打开几个运行的评测，在共同的场上比较，写成表、CSV、图和一页报告。"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from engine.comparison.comparison import Comparison, make_comparison
from engine.comparison.entries import Entry, choose_contenders, find_evaluation, open_entries
from engine.comparison.files import check_names, score_file
from engine.comparison.published import add_published, read_published
from engine.comparison.text import as_markdown, as_text, comparison_blocks, span_of
from engine.evaluation.glimpse import MAP_CHANNELS, MAP_LEADS, evenly
from engine.evaluation.page import (
    ComparisonFacts,
    Page,
    Spectra,
    add_cells,
    add_table,
    cost_line,
    make_spectra,
    model_lines,
    page_leads,
)
from engine.evaluation.page_facts import windows_text
from engine.versions import versions
from util.atomic import replacing
from util.files.records import as_json
from util.logger import read_metrics, setup_logging
from util.plot.curves import runs_figure
from util.plot.scorecard import save_scorecards
from util.plot.scores import scores_figure
from util.plot.style import remove_figures, save_figures
from util.report import write_report
from util.report.bilingual import Bilingual, chinese, split_text
from util.scores.common import Contender
from util.scores.scorecard import make_cards, write_cards
from util.scores.tabulate import write_csv

log = logging.getLogger("ar_pred")


def compare_runs(
    folders: Sequence[Path],
    out: Path,
    reproduce: Sequence[str] = (),
    names: Sequence[str] = (),
    notes: Sequence[str] = (),
    reference: Sequence[Path] = (),
    by: Sequence[str] = (),
    scorecard: str | None = None,
    files: Sequence[str] = (),
) -> None:
    """比较这些运行或评测的文件夹，结果写进 out。

    Args:
        reproduce: 报告里写的参数；默认是 --runs 与这些文件夹。
        names: 表上的名字，与 folders 对齐；默认是运行名。
        notes: 也要写在结果里的说明。
        reference: 别人发表的成绩的表，放在旁边。
        by, scorecard: 同 make_comparison。
        files: 别处做的预报，见 score_file；在 folders 的头一个的划分、真值上计分，成绩在 out/files/。

    Raises:
        ValueError: 不是一次评测，没有共同的部分，真值不是同一份，或 reference 写得不对。
    """
    published = read_published(reference)
    check_names(files)
    made = [score_file(path, find_evaluation(folders[0]), out / "files") for path in files]
    with ExitStack() as stack:
        entries = open_entries(stack, [*folders, *made], names)
        setup_logging(out / "compare.log")
        contenders = choose_contenders(entries)
        comparison = make_comparison(entries, contenders, notes, by, scorecard)
        if reference:
            comparison = add_published(comparison, entries[0].file, published)
        text = as_text(comparison_blocks(comparison))
        log.info("comparison of %d run(s)\n%s", len(entries), text)
        command = [*(reproduce or ["--runs", *map(str, folders), "--out", str(out)])]
        command += ["--reference", *map(str, reference)] if reference else []
        command += ["--by", *by] if by else []
        command += ["--scorecard", scorecard] if scorecard else []
        command += ["--files", *files] if files else []
        page = comparison_page(entries, contenders, comparison, out, f"python compare.py {shlex.join(command)}")
    write_comparison(out, comparison, text, page)
    write_training(out, entries)
    log.info("comparison: %s", out / "report.html")


def comparison_page(
    entries: Sequence[Entry], contenders: Sequence[Contender], comparison: Comparison, out: Path, reproduce: str
) -> Page:
    """报告的内容；地图与序列在各自的报告里，给出链接。"""
    leads = comparison.lead_hours
    shown = page_leads(comparison)
    splits = list(dict.fromkeys(run.split for run in comparison.runs))
    some = len(shown) < len(leads)
    first, last = comparison.first_initial_time, comparison.last_initial_time
    names = [e.label for e in entries]
    what = (", ".join(names), "、".join(names)) if len(names) <= 4 else (f"{len(names)} runs", f"{len(names)} 个运行")
    page = Page(
        kind="comparison",
        title=Bilingual(f"Comparison of {what[0]}", f"{what[1]}的对比"),
        facts=[
            ("split", Bilingual(", ".join(splits), "、".join(chinese(split_text(split)) for split in splits))),
            ("windows", windows_text(comparison.initial_times, first, last)),
            (
                "lead times",
                Bilingual(
                    span_of(leads) + (f", {len(shown)} of them here, all in comparison.csv" if some else ""),
                    chinese(span_of(leads)) + (f"，本页 {len(shown)} 个，全部见 comparison.csv" if some else ""),
                ),
            ),
        ],
        reproduce=[reproduce],
        links=[
            (e.label, quote(Path(os.path.relpath(e.report, out)).as_posix()))
            for e in entries
            if linkable(e.report, out)
        ],
        models=model_lines([*comparison.scores], comparison.baselines, comparison.published),
        spectra=joined_spectra(contenders, comparison),
        costs=[cost_line(run.name, run.cost) for run in comparison.runs],
        comparison=ComparisonFacts(
            pairs=comparison.initial_times
            * sum(all(lead in run.lead_hours for run in comparison.runs) for lead in leads),
            notes=[pairs_note(comparison), *comparison.notes],
        ),
        environment=versions(),
    )
    page = replace(add_table(page, comparison, shown), scorecard=comparison.scorecard)
    return add_cells(page, comparison, comparison.cells, shown)


def linkable(report: Path, out: Path) -> bool:
    """只链接与 out 并列的报告：out 搬到别处（如 docs/）时，指回 log/ 的链接就断了。"""
    return report.is_file() and report.resolve().is_relative_to(out.resolve().parent)


def pairs_note(comparison: Comparison) -> str:
    """各运行自己有多少起报时间与时效。"""
    own = [f"{run.name} {run.initial_times} × {len(run.lead_hours)}" for run in comparison.runs]
    return Bilingual(
        f"Initial times × lead times of each run: {', '.join(own)}", f"各运行的起报时间 × 时效：{'，'.join(own)}"
    )


def joined_spectra(contenders: Sequence[Contender], comparison: Comparison) -> Spectra | None:
    """各文件里的谱合成一节，通道与时效和单个报告取得一样多。"""
    if comparison.spectrum_label is None:
        return None
    channels = [comparison.channels[i] for i in evenly(len(comparison.channels), MAP_CHANNELS)]
    return make_spectra(comparison.spectrum_label, contenders, channels, evenly(len(comparison.lead_hours), MAP_LEADS))


def write_comparison(out: Path, comparison: Comparison, text: str, page: Page) -> None:
    """comparison.{json,csv,md,txt}、scorecard.csv、figures/、report.html；上一次留下的图与评分卡先去掉。

    各区域、时段的只进 CSV 与页面，同 metrics.json。
    """
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.txt": text,
        "comparison.md": as_markdown(comparison_blocks(comparison)),
        "comparison.json": json.dumps(as_json(replace(comparison, cells=None)), indent=1, allow_nan=False),
    }
    for name, body in texts.items():
        with replacing(out / name) as temporary:
            temporary.write_text(body + "\n", encoding="utf-8")
    write_csv(out / "comparison.csv", comparison, comparison.cells)
    remove_figures(out / "figures", ("rmse", "scorecard", "training"))
    (out / "scorecard.csv").unlink(missing_ok=True)
    if comparison.scorecard:
        cards = make_cards(comparison, comparison.cells, comparison.scorecard)
        write_cards(out / "scorecard.csv", cards)
        save_scorecards(cards, "rmse", out / "figures" / "scorecard")
    rmse = {m: {c: s["rmse"] for c, s in one.items() if "rmse" in s} for m, one in comparison.scores.items()}
    drawn = scores_figure(comparison.lead_hours, comparison.units, rmse, comparison.baselines, comparison.published)
    save_figures(drawn, out / "figures" / "rmse")
    write_report(out / "report.html", as_json(page))


def write_training(out: Path, entries: Sequence[Entry]) -> None:
    """figures/training：各运行的学习曲线画在一起；一条也没有就不画。"""
    figure = runs_figure({e.label: read_metrics(e.training) for e in entries if e.training})
    if figure is not None:
        save_figures([figure], out / "figures" / "training")
