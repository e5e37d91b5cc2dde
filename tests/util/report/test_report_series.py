"""序列：一打开是末尾三十天，缩略图上的窗口用键盘、鼠标移动与缩放；新的几节画的就是内容里的数。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.util.report.report_browser import CHROMIUM, DRIVER, choose, open_browser, plotted, visit
from tests.util.report.report_full import full_content
from util.report import write_report

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
FRAMES = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return full_content(channels=3, grid=(8, 16), leads=2, regions=1)


@pytest.fixture(scope="module")
def page(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("report") / "series.html"
    write_report(path, content)
    browser = open_browser(tmp_path_factory.mktemp("profile"))
    visit(browser, Path(path))
    browser.execute_script("setLanguage('en'); drawDirty(() => true)")
    yield browser
    assert browser.get_log("browser") == []
    browser.quit()


def shown(page: Any) -> tuple[float, float]:
    """窗口的两端，离序列起点几天。"""
    first = page.execute_script("return instant(content.series.valid_times[0][0])")
    return tuple((time - first) / 86400e3 for time in page.execute_script("return shownSpan(wholeOf())"))  # type: ignore[return-value]


def test_the_last_thirty_days_come_first(page: Any, content: dict[str, Any]) -> None:
    page.execute_script("window.wholeOf = () => [0, -1].map((i) => instant(content.series.valid_times[0].at(i)))")
    times = [datetime.fromisoformat(time) for time in content["series"]["valid_times"][0]]
    days = (times[-1] - times[0]).days
    assert days > 300
    begin, end = shown(page)
    assert end - begin == 30 and end == pytest.approx((times[-1] - times[0]).total_seconds() / 86400)
    (truth, forecast) = (json.loads(line) for line in plotted(page, "series-plot"))
    kept = [time for time in times if times[-1] - time <= timedelta(days=30)]
    for line, table in ((truth, content["series"]["truth"]), (forecast, content["series"]["models"]["AR_pred"])):
        wanted = table["t2m"][0][0]
        assert len(kept) <= len(line) <= len(kept) + 2
        np.testing.assert_allclose(line, wanted[len(wanted) - len(line) :], rtol=1e-6)
    title = page.execute_script("return document.getElementById('series-plot-title').textContent")
    assert title.endswith(f" to {times[-1]:%Y-%m-%d}")


def test_keys_and_mouse_move_the_window(page: Any) -> None:
    pane = page.find_element("id", "series-window")
    page.execute_script("state.span = null; redraw(); drawDirty(() => true)")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", pane)
    left, right, minus, home = "\ue012", "\ue014", "-", "\ue011"
    begin, end = shown(page)

    def press(*keys: str) -> tuple[float, float]:
        for key in keys:
            pane.send_keys(key)
            page.execute_async_script(FRAMES)
        return shown(page)

    assert press(left, left) == pytest.approx((begin - 6, end - 6))  # 每次十分之一
    assert press(right) == pytest.approx((begin - 3, end - 3))
    low, high = press(minus)
    assert high - low == pytest.approx(27)
    assert press(home)[0] == 0 and pane.get_attribute("aria-valuenow") == "0"
    assert pane.get_attribute("aria-valuetext") == "2020-01-01 to 2020-01-28"
    for _ in range(60):
        pane.send_keys("+")
    page.execute_async_script(FRAMES)
    low, high = shown(page)
    assert low == 0 and high > 300  # 不出两头
    choose(page, "series", "channel", "tp")
    assert shown(page) == (low, high)  # 换通道，看的一段不变
    page.execute_script("state.span = null; redraw(); drawDirty(() => true)")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", pane)
    box = page.execute_script(
        "const b = document.querySelector('.brush .strip').getBoundingClientRect(); return [b.left, b.top, b.width]"
    )
    drag = [("mousePressed", box[0] + box[2] / 2), ("mouseMoved", box[0] + box[2] / 4), ("mouseReleased", 0)]
    for kind, x in drag:
        event = {"type": kind, "x": x or box[0] + box[2] / 4, "y": box[1] + 20, "button": "left", "clickCount": 1}
        page.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    page.execute_async_script(FRAMES)
    begin, end = shown(page)
    assert end - begin == pytest.approx(30)
    assert (begin + end) / 2 == pytest.approx(high / 4, abs=3)


def test_events_are_the_contents(page: Any, content: dict[str, Any]) -> None:
    choose(page, "events", "channel", "t2m")
    choose(page, "events", "event", ">q0.98")
    choose(page, "events", "lead", "+12 h")
    page.execute_script("drawDirty(() => true)")
    one = content["events"]["curves"]["AR_pred"]["t2m"][">q0.98"][1]
    for plot, x, y in (
        ("reliability-plot", np.linspace(0, 1, len(one["observed"])), one["observed"]),
        ("roc-plot", one["false"], one["hit"]),
        ("value-plot", content["events"]["ratios"], one["value"]),
        ("fss-plot", content["events"]["sizes"], one["fss"]),
    ):
        np.testing.assert_allclose(json.loads(plotted(page, plot)[0]), y, rtol=1e-6)
        np.testing.assert_allclose(json.loads(plotted(page, plot, "x")[0]), x, rtol=1e-6)
    sizes = json.loads(plotted(page, "reliability-plot", "marker")[0])["size"]
    assert len(sizes) == len(one["share"]) and min(sizes) > 0
    choose(page, "drift", "quantity", "kinetic")
    assert json.loads(plotted(page, "drift-plot")[0]) == pytest.approx(
        content["drift"]["energy"]["truth"]["u10, v10"], rel=1e-5
    )


def test_a_cell_holds_some_leads(page: Any, content: dict[str, Any]) -> None:
    """一格只有几个时效的数，摊开在页面的时效上。"""
    (places, cell) = (content["cell_leads"], content["cells"][0])
    spread = page.execute_script("return cells[0].scores.AR_pred.t2m.rmse")
    assert [spread[i] for i in places] == pytest.approx(cell["scores"]["AR_pred"]["t2m"]["rmse"])
    choose(page, "scores", "channel", "t2m")
    choose(page, "scores", "region", "tropics")
    wanted = next(c for c in content["cells"] if (c["region"], c["period"]) == ("tropics", "all"))
    line = json.loads(plotted(page, "scores-plot")[0])
    assert [line[i] for i in places] == pytest.approx(wanted["scores"]["AR_pred"]["t2m"]["rmse"])
