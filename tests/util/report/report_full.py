"""一份各节都有的评测报告，数是随机的，取舍照引擎的规矩：几个区域、几季、事件、长滚动、一年的序列；多大都行。"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np

from engine.evaluation.glimpse import Glimpse, Reel, choose_glimpse, parse_points
from engine.evaluation.metrics_file import Cost
from engine.evaluation.page import (
    ComparisonFacts,
    Page,
    Spectra,
    add_cells,
    add_table,
    cost_line,
    model_lines,
    page_leads,
)
from engine.evaluation.page_facts import Curves, DataFacts, windows_text
from engine.evaluation.page_fields import ColorBar, Colors, Maps, MapScore, Panels, Picture, Place, Series
from engine.verification.page import Drift, EventCurves, EventsPage
from tests.models.small import small_spec
from util.files.records import as_json
from util.plot.coast import coastlines
from util.plot.style import plotly_scale
from util.report.bilingual import Bilingual, split_text
from util.scores.final import METRICS
from util.scores.table import Cell, ScoreTable, Skill
from util.verification.events import LOSS_RATIOS

MODELS = ("AR_pred", "persistence", "climatology")
REGIONS = ("tropics", "northern-hemisphere", "europe", "east-asia", *(f"box-{i}" for i in range(20)))
SEASONS = ("DJF", "MAM", "JJA", "SON")
SKILLS = ("rmse", "crps", "crps_lower", "crps_upper")
FIRST = np.datetime64("2020-01-01T00", "m")


class Full:
    """一份内容的造法；各方法是一节。channels、grid、leads、regions、members: 多大。"""

    def __init__(
        self, channels: int, grid: tuple[int, int], leads: int, regions: int, windows: int = 1460, members: int = 10
    ) -> None:
        self.rng = np.random.default_rng(0)
        spec = small_spec(channels=channels, grid=grid)
        names = tuple(f"{v}_level_{i // 5:02d}" for i, v in zip(range(channels), "tuvzr" * channels, strict=False))
        self.spec = replace(spec, channels=("t2m", "tp", *names)[:channels])
        self.leads, self.regions, self.windows, self.members = leads, REGIONS[:regions], windows, members
        self.view: Glimpse = choose_glimpse(self.spec, windows, leads, parse_points([], self.spec))
        self.drawn = [self.spec.channels[c] for c in self.view.channels]

    def numbers(self, *shape: int) -> list[Any]:
        return self.rng.normal(1.0, 0.3, shape).tolist()

    def parts(self) -> dict[str, Any]:
        names = [m.name for m in METRICS] + ["brier>280"]

        def skill() -> Skill:
            value = self.rng.normal(0.2, 0.3, self.leads)
            return Skill(value.tolist(), self.numbers(self.leads), (value - 0.1).tolist(), (value + 0.1).tolist())

        skills = {b: {c: {m: skill() for m in SKILLS} for c in self.spec.channels} for b in MODELS[1:]}
        return {
            "bootstrap_blocks": 52,
            "pairs": {c: [self.windows] * self.leads for c in self.spec.channels},
            "scores": {
                m: {c: {n: self.numbers(self.leads) for n in names} for c in self.spec.channels} for m in MODELS
            },
            "skill": {MODELS[0]: skills},
            "mean_rmse_ratio": {},
        }

    def table(self) -> tuple[ScoreTable, list[Cell]]:
        left_out = {c: [0] * self.leads for c in self.spec.channels}
        table = ScoreTable(
            channels=[*self.spec.channels], units=dict.fromkeys(self.spec.channels, "K"), left_out=left_out,
            lead_hours=self.spec.leads(self.leads), initial_times=self.windows, **self.parts(),
        )  # fmt: skip
        places = [(r, p) for r in ("all", *self.regions) for p in ("all", *SEASONS) if (r, p) != ("all", "all")]
        parts = self.parts()  # 各格的数相同：造得快
        return table, [Cell(region=r, period=p, **parts) for r, p in places if self.regions]

    def spectra(self, label: str, count: int) -> Spectra:
        hours = [6 * (i + 1) for i in self.view.leads]

        def power() -> dict[str, Any]:
            return {c: np.abs(self.rng.normal(size=(len(hours), count))).round(4).tolist() for c in self.drawn}

        return Spectra(label, hours, list(range(1, count + 1)), power(), {m: power() for m in MODELS})

    def series(self) -> Series:
        rows, leads = self.view.series_rows, self.view.leads
        points = [Place("area mean", None, None)]
        points += [Place(p.name, p.latitude, p.longitude) for p in self.view.points]
        waves = 280 + 10 * np.sin(np.arange(len(rows)) / 60)

        def values() -> dict[str, Any]:
            noise = self.rng.normal(0, 1, (len(self.drawn), len(leads), len(points), len(rows)))
            return dict(zip(self.drawn, (waves + noise).round(2).tolist(), strict=True))

        times = [[str(FIRST + 360 * (row + 1 + lead)) for row in rows] for lead in leads]
        return Series(points, [6 * (i + 1) for i in leads], times, values(), {MODELS[0]: values()})

    def maps(self, reel: Reel) -> Maps:
        latitudes, longitudes = self.view.axes(reel)

        def picture() -> Picture:
            data = self.rng.integers(0, 256, len(latitudes) * len(longitudes), dtype=np.uint8)
            return Picture(base64.b64encode(data.tobytes()).decode(), -1.0, 1.0)

        names = [self.spec.channels[c] for c in reel.channels]
        count = len(reel.rows)
        bar = ColorBar(plotly_scale("temperature"), -1.0, 1.0)
        return Maps(
            latitudes=latitudes.tolist(), longitudes=longitudes.tolist(), channels=names,
            times=[str(FIRST + 360 * row) for row in reel.rows], lead_hours=[6 * (i + 1) for i in reel.leads],
            note=[Bilingual("2 of 3 channels", "3 个通道中的 2 个")],
            fields={c: [[Panels(picture(), picture(), picture()) for _ in range(count)] for _ in reel.leads]
                    for c in names},
            colors=dict.fromkeys(names, Colors(bar, bar)),
            scores={c: [[MapScore(1.5 + lead / 9 + row, 0.1) for row in range(count)] for lead in reel.leads]
                    for c in names},
        )  # fmt: skip

    def events(self) -> EventsPage:
        sizes, names = [3, 5, 9], [">q0.95", ">q0.98", "<q0.02", "<q0.05", ">273.15"]
        hours = [6 * (i + 1) for i in self.view.leads]

        def curves(members: int) -> EventCurves:
            rising = np.linspace(0, 1, members + 1).round(4).tolist()
            falling = np.linspace(1, 0, members + 2).round(4).tolist()
            value = self.rng.uniform(-0.1, 0.9, len(LOSS_RATIOS)).round(4).tolist()
            return EventCurves(rising, [0.2] * (members + 1), falling, falling, value, [0.3, 0.5, 0.8])

        return EventsPage(hours, LOSS_RATIOS.tolist(), sizes, {
            m: {c: {e: [curves(self.members if m == MODELS[0] else 1) for _ in hours] for e in names}
                for c in self.drawn} for m in MODELS
        })  # fmt: skip

    def page(self) -> Page:
        table, cells = self.table()
        shown = page_leads(table)
        page = add_cells(add_table(Page(kind="evaluation", title="", facts=[]), table, shown), table, cells, shown)
        drift = {m: {c: self.numbers(len(shown)) for c in self.spec.channels} for m in ("truth", *MODELS)}
        cost = Cost(
            parameters=123456, flops_per_sample=2_500_000_000, inference_samples_per_second=12.0,
            inference_peak_memory_bytes=300_000_000, device="cpu",
        )  # fmt: skip
        ranks = self.rng.uniform(0.5, 1.5, (len(self.drawn), len(shown), self.members + 1))
        share = (ranks / ranks.sum(-1, keepdims=True)).round(4).tolist()
        return replace(
            page,
            title=Bilingual("small: test split", "small：测试集"),
            subtitle="ar_pred_video_vanilla",
            facts=[("split", split_text("test")), ("windows", windows_text(self.windows, "2020-01-01", "2020-12-31")),
                   *page.facts],
            models=model_lines([*MODELS], MODELS[1:]),
            scorecard="climatology",
            ranks=dict(zip(self.drawn, share, strict=True)),
            spectra=self.spectra("zonal wavenumber", self.spec.width // 2),
            sphere=self.spectra("total wavenumber", self.spec.height - 1),
            events=self.events(),
            drift=Drift(drift, drift, {m: {"u10, v10": one["t2m"]} for m, one in drift.items()}),
            series=self.series(),
            maps=self.maps(self.view.reels["maps"]),
            roll=self.maps(self.view.reels["roll"]) if "roll" in self.view.reels else None,
            coast=[line.round(2).tolist() for line in coastlines(-2.0, 358.0, -90, 90)],
            costs=[cost_line(MODELS[0], cost)],
            comparison=ComparisonFacts(self.windows, [Bilingual("A note on both runs.", "两个运行的一条说明。")]),
            curves=Curves([(i, 1 / (i + 1)) for i in range(400)], [(i, 1.2 / (i + 1)) for i in range(0, 400, 50)], 0.9),
            data=DataFacts([("root", "data/sample"), ("files standardised", Bilingual("yes", "是"))],
                           [("t2m", 2, "2020-03-01T06", "2020-03-02T00", "missing")]),
            config="data: {root: data/sample}\nmodel: {name: cnn}  # small\n",
            reproduce=["python evaluate.py --checkpoint checkpoints/small/best.ckpt --out log/small/evaluation"],
            environment={"ar_pred": "0.1", "python": "3.11", "torch": "2.13"},
        )  # fmt: skip


def full_content(**size: Any) -> dict[str, Any]:
    return as_json(Full(**size).page())


def small_content() -> dict[str, Any]:
    """小而全的一份。"""
    return full_content(channels=4, grid=(8, 16), leads=6, regions=2)
