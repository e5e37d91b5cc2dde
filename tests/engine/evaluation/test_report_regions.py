"""报告里选区域与时段，在真的 Chromium 里：各段换成那一格的数，三角照它的技巧；没有 chromium 时跳过。"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.util.report.report_browser import CHROMIUM, DRIVER, choose, open_browser, plotted, visit
from tests.util.report.report_example import example
from util.report import write_report

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
PLACES = (("all", "DJF"), ("tropics", "all"), ("tropics", "DJF"), ("my-box", "all"))


def scaled(values: Any, scale: float) -> Any:
    if isinstance(values, dict):
        return {key: scaled(one, scale) for key, one in values.items()}
    return (np.array(values, float) * scale).tolist()


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """每格的成绩是整个网格的几倍，技巧是几分之一；一格的误差更大（向下的三角），一格不显著。"""
    content = example("evaluation", (8, 16), 6, 3)
    content["cells"] = [
        {"region": region, "period": period, "scores": scaled(content["scores"], i + 2),
         "skill": scaled(content["skill"], (0.5, -0.5, 0.25, 1.0)[i]), "fields": content["fields"]}
        for i, (region, period) in enumerate(PLACES)
    ]  # fmt: skip
    unsure = content["cells"][3]["skill"]["AR_pred"]["persistence"]["t2m"]["rmse"]
    unsure |= {"value": [0.05] * 3, "low": [-0.1] * 3, "high": [0.2] * 3}
    return content


@pytest.fixture(scope="module")
def page(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("report") / "cells.html"
    write_report(path, copy.deepcopy(content))
    browser = open_browser(tmp_path_factory.mktemp("profile"))
    visit(browser, Path(path))
    browser.execute_script("setLanguage('en')")
    yield browser
    assert browser.get_log("browser") == []
    browser.quit()


def test_a_region_changes_every_section(page: Any, content: dict[str, Any]) -> None:
    choose(page, "scores", "region", "tropics")
    choose(page, "scores", "period", "DJF")
    page.execute_script("drawDirty(() => true)")
    cell = content["cells"][2]
    names = [m["name"] for m in content["models"]]
    for name, line in zip(names, plotted(page, "scores-plot"), strict=False):
        np.testing.assert_allclose(json.loads(line), cell["scores"][name]["t2m"]["rmse"], rtol=1e-5)
    skill = [json.loads(line) for line in plotted(page, "skill-plot")]
    wanted = cell["skill"]["AR_pred"]["persistence"]["t2m"]["rmse"]["value"]
    assert any(len(line) == 3 and np.allclose(line, wanted, rtol=1e-5) for line in skill)
    titles = page.execute_script("return [...document.querySelectorAll('.tabletitle')].map((n) => n.textContent)")
    assert any(title.endswith("· tropics · DJF") for title in titles)
    choose(page, "table", "region", "my-box")  # 没有 DJF：回到全部时间
    page.execute_script("drawDirty(() => true)")
    (first, *_) = plotted(page, "scores-plot")
    np.testing.assert_allclose(json.loads(first), content["cells"][3]["scores"][names[0]]["t2m"]["rmse"], rtol=1e-5)
    choose(page, "scores", "region", "Whole grid")
    choose(page, "scores", "period", "All times")
    np.testing.assert_allclose(
        json.loads(plotted(page, "scores-plot")[0]), content["scores"][names[0]]["t2m"]["rmse"], rtol=1e-5
    )


def test_triangles_are_the_skill(page: Any, content: dict[str, Any]) -> None:
    choose(page, "cards", "cardsReference", "persistence")
    choose(page, "cards", "period", "All times")
    page.execute_script("drawDirty(() => true)")
    heads = page.execute_script("return [...document.querySelectorAll('#cards thead tr')].map((r) => r.innerText)")
    assert heads[0].split("\t")[1:] == ["Whole grid", "tropics", "my-box"]
    rows = page.execute_script(
        "return [...document.querySelectorAll('#cards tbody tr')].map((r) => [...r.querySelectorAll('td')]"
        ".map((c) => [c.textContent, c.title]))"
    )
    parts = [content, content["cells"][1], content["cells"][3]]
    for channel, row in zip(content["scores"]["AR_pred"], rows, strict=True):
        assert len(row) == 9
        for (glyph, _), (part, i) in zip(row, ((part, i) for part in parts for i in range(3)), strict=True):
            one = part["skill"]["AR_pred"]["persistence"][channel]["rmse"]
            sure = float(one["low"][i]) * float(one["high"][i]) > 0
            assert (
                glyph
                == {(True, True): "▲", (True, False): "△", (False, True): "▼", (False, False): "▽"}[
                    bool(one["value"][i] >= 0), sure
                ]
            )
    assert rows[0][6] == ["△", "t2m, my-box, +6 h: −5.0 % (−20 to +10)"]
    page.execute_script("setLanguage('zh'); drawDirty(() => true)")
    text = page.execute_script("return document.getElementById('cards').innerText")
    assert "分区评分卡" in text and "热带" in text and "my-box" in text and "undefined" not in text
    page.execute_script("setLanguage('en')")
