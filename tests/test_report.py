"""report.html：自足、大小、转义、数值；再在真的 Chromium 里打开，选择与滑块都要改变图。

没有 chromium 或 chromedriver 时跳过浏览器的部分。
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report_example import CHANNELS, content_of, encode_field, example, make_world
from util.plot import MODEL_COLORS
from util.plot_scores import BASELINE_COLOR
from util.report import MAX_BYTES, write_report
from util.scores import metric_unit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--force-prefers-reduced-motion", "--window-size=1280,900",
)  # fmt: skip
SHAPE, TIMES, LEADS = (18, 36), 6, 3
EVIL = "</script><script>window.evil = 1</script><!-- <img src=x onerror='window.evil = 1'> & \"quotes\""


class Page(HTMLParser):
    """页面里各元素的名字与属性，和 id 为 content 的那段文字、title 的文字。"""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.texts: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1]
        name = attributes.get("id") or tag
        self.texts[name] = self.texts.get(name, "") + data


def write(path: Path, **content: Any) -> Page:
    write_report(path, content)
    return Page(path)


def test_one_file_that_needs_nothing_else(tmp_path):
    content = example("evaluation", SHAPE, TIMES, LEADS)
    page = write(tmp_path / "new" / "report.html", **content)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]  # 没有留下临时文件
    assert (tmp_path / "new" / "report.html").stat().st_size < MAX_BYTES
    links = [a.get(key) or "#" for _, a in page.elements for key in ("src", "href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in page.elements)
    found = json.loads(page.texts["content"])
    assert found.keys() == content.keys()
    sent, kept = (one["maps"]["fields"]["t2m"][1][2]["truth"] for one in (content, found))
    assert kept == {"data": sent["data"], "low": pytest.approx(sent["low"]), "high": pytest.approx(sent["high"])}


def test_values_are_plain(tmp_path):
    page = write(
        tmp_path / "r.html",
        title="x",
        lead_hours=(np.int64(6), 12),
        curves={"train": np.array([[1, np.nan], [2, 1 / 3]]), "val": [[1, float("inf")]]},
        numbers=[np.float32(0.1), 54321.21875, 3, True, None],
    )
    found = json.loads(page.texts["content"])
    assert found["lead_hours"] == [6, 12]
    assert found["curves"] == {"train": [[1, None], [2, 0.3333333]], "val": [[1, None]]}
    assert found["numbers"] == [0.1, 54321.22, 3, True, None]


def test_text_cannot_break_out(tmp_path):
    page = write(tmp_path / "r.html", title=EVIL, config=EVIL)
    assert [tag for tag, _ in page.elements].count("script") == 3  # 数据、plotly、我们的
    assert page.texts["title"].strip() == EVIL
    assert json.loads(page.texts["content"]) == {"title": EVIL, "config": EVIL}


def test_too_large(tmp_path):
    with pytest.raises(ValueError, match=r"would have 1\d\.\d MB, more than 10 MB; .* is config with 6\.0 MB"):
        write_report(tmp_path / "r.html", {"title": "x", "config": "a" * 6_000_000})
    assert not list(tmp_path.iterdir())


def test_scripts_are_listed():
    from util import report

    assert set(report.SCRIPTS) == {path.name for path in report.ASSETS.glob("*.js")}


# ——— 以下在浏览器里 ———


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "evaluation.html", example("evaluation", SHAPE, TIMES, LEADS))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def visit(browser: Any, path: Path) -> None:
    """打开一页，画出所有的图（平时滚到跟前才画）。"""
    browser.get(path.as_uri())
    browser.execute_script("drawDirty(() => true)")


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """评估的页面，回到刚打开的样子；用完时控制台里不能有任何消息。"""
    if browser.current_url != (folder / "evaluation.html").as_uri():
        visit(browser, folder / "evaluation.html")
    browser.execute_script("""
        Object.assign(state, {channel: null, lead: null, metric: "rmse", time: 0, hidden: new Set()});
        setLanguage("en");""")
    yield browser
    assert browser.get_log("browser") == []


def plotted(page: Any, plot: str, key: str = "y") -> list[Any]:
    """画板上各条线的数；这一段若还没按现在的状态画，先画。"""
    return page.execute_script(
        """const node = document.getElementById(arguments[0]);
        const part = sections.find((s) => s.node.contains(node));
        if (part.dirty) part.draw();
        return node.data.map((t) => JSON.stringify(t[arguments[1]]));""",
        plot,
        key,
    )


def choose(page: Any, section: str, key: str, text: str) -> None:
    """在下拉框里选以 text 开头的一项。"""
    from selenium.webdriver.support.ui import Select

    page.execute_script("sections.find((s) => s.id === arguments[0]).draw()", section)
    box = Select(page.find_element("css selector", f"#{section} select[data-key={key}]"))
    box.select_by_visible_text(next(o.text for o in box.options if o.text.startswith(text)))


def drag(page: Any, time: int) -> None:
    """把滑块放到第 time 个起报时间，等下一帧。"""
    page.execute_async_script(
        """const [time, done] = arguments, slider = document.getElementById("maps-time");
        slider.value = time;
        slider.dispatchEvent(new Event("input"));
        requestAnimationFrame(() => requestAnimationFrame(done));""",
        time,
    )


@in_browser
def test_nothing_is_fetched_and_nothing_goes_wrong(browser, folder):
    visit(browser, folder / "evaluation.html")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = ("data:", "blob:", "chrome:")  # chrome: 是浏览器自己的新标签页
    assert [url for url in urls if not url.startswith(own)] == [(folder / "evaluation.html").as_uri()]
    assert browser.get_log("browser") == []


@in_browser
@pytest.mark.parametrize(
    ("section", "plot", "key", "text"),
    [
        ("scores", "scores-plot", "channel", "u10"),
        ("scores", "scores-plot", "metric", "ACC"),
        ("skill", "skill-plot", "reference", "climatology"),
        ("series", "series-plot", "point", "Paris"),
        ("series", "series-plot", "lead", "+18 h"),
        ("spectra", "spectra-plot", "channel", "tp"),
        ("spectra", "ratio-plot", "lead", "+12 h"),
        ("ranks", "ranks-plot", "lead", "+18 h"),
    ],
)
def test_selectors_change_the_picture(page, section, plot, key, text):
    before = plotted(page, plot)
    choose(page, section, key, text)
    assert plotted(page, plot)[:2] != before[:2]


@in_browser
def test_selectors_are_linked_and_numbers_are_the_contents(page):
    content = example("evaluation", SHAPE, TIMES, LEADS)
    choose(page, "maps", "channel", "z_level_00")
    choose(page, "scores", "metric", "MAE")
    expected = [content["scores"][m["name"]]["z_level_00"]["mae"] for m in content["models"]]
    shown = [json.loads(y) for y in plotted(page, "scores-plot")]
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    page.execute_script("drawDirty(() => true)")
    layout = page.execute_script("return document.getElementById('scores-plot').layout")
    assert layout["yaxis"]["title"]["text"] == "MAE (m² s⁻²)"
    assert layout["xaxis"]["title"]["text"] == "lead time (h)"
    assert "m² s⁻²" in plotted(page, "scores-plot", "customdata")[0]
    cells = page.execute_script("return [...document.querySelectorAll('#table td')].map((c) => c.textContent)")
    assert [float(c) for c in cells[:LEADS]] == pytest.approx(expected[0], rel=1e-3)


@in_browser
@pytest.mark.parametrize("channel", ["t2m", "z_level_00"])
def test_maps_show_the_fields(page, channel):
    world = make_world(SHAPE, TIMES, LEADS, {"AR_pred": 0.18}, seed=0)
    c, (mean, std) = list(CHANNELS).index(channel), CHANNELS[channel]
    truth = mean + std * world.truth[4 + 2, c]  # 起报时刻 4，第二个时效
    forecast = mean + std * world.forecasts["AR_pred"][4, 1, c]
    choose(page, "maps", "channel", channel)
    choose(page, "maps", "lead", "+12 h")
    drag(page, 4)
    for panel, field in (("truth", truth), ("forecast", forecast), ("error", forecast - truth)):
        rows = page.execute_script(f"return document.getElementById('map-{panel}').data[0].z.map((row) => [...row])")
        step = np.ptp(field) / 255
        np.testing.assert_allclose(rows, field, atol=step, rtol=1e-6)
    note = page.find_element("css selector", "#maps .clock").text
    assert "1981-07-02 00 UTC" in note
    assert "1981-07-02 12 UTC" in note
    weights = np.cos(np.radians(world.latitudes))[:, None]
    rmse = np.sqrt(((forecast - truth) ** 2 * weights).sum() / (weights.sum() * SHAPE[1]))
    aside = page.find_elements("css selector", "#maps .aside")[2].text
    assert float(re.findall(r"RMSE ([\d.,]+)", aside)[0].replace(",", "")) == pytest.approx(rmse, rel=0.01)


@in_browser
def test_slider_and_play_change_the_maps(page):
    page.execute_script("document.getElementById('maps').scrollIntoView({behavior: 'instant'})")
    figure = page.find_element("id", "map-truth")
    before, picture = plotted(page, "map-truth", "z"), figure.screenshot_as_png
    drag(page, 3)
    assert plotted(page, "map-truth", "z") != before
    assert figure.screenshot_as_png != picture

    button = page.find_element("id", "maps-play")
    button.click()
    page.execute_async_script(
        """const done = arguments[0];
        const look = setInterval(() => { if (state.time === 5) { clearInterval(look); done(); } }, 20);"""
    )
    button.click()
    assert page.find_element("id", "maps-time").get_attribute("value") == "5"
    drag(page, 0)
    assert plotted(page, "map-truth", "z") == before
    assert page.find_element("id", "maps-play").get_attribute("aria-label") == "Play"


@in_browser
def test_language(page):
    def labels() -> list[str]:
        return page.execute_script("""return [
            document.documentElement.lang, document.querySelector("#summary h2").textContent,
            document.querySelector("#scores .legend").textContent, document.querySelector("#menu a").textContent,
            document.getElementById("scores-plot").layout.xaxis.title.text,
            document.querySelector("#scores option").textContent]""")

    def press(language: str) -> None:
        page.find_element("css selector", f"[data-language={language}]").click()
        page.execute_script("drawDirty(() => true)")

    english = labels()
    assert english == [
        "en", "Summary", "AR_predpersistenceclimatology", "Summary", "lead time (h)", "t2m — 2 metre temperature",
    ]  # fmt: skip
    press("zh")
    chinese = ["zh-CN", "概要", "AR_pred持续性预报气候态", "概要", "时效 (h)", "t2m — 2 metre temperature"]
    assert labels() == chinese
    assert page.find_element("css selector", "#series .caption").text.startswith("黑线为真值")
    page.refresh()
    page.execute_script("drawDirty(() => true)")
    assert labels() == chinese  # 记得住
    press("en")
    assert labels() == english


@in_browser
def test_every_label_has_both_languages(page):
    pairs = page.execute_script("return [...Object.values(WORDS), ...METRICS.map((m) => m.slice(1, 3))]")
    assert all(len(pair) == 2 and all(pair) for pair in pairs)
    holes = [[sorted(re.findall(r"\{\d\}", text)) for text in pair] for pair in pairs]
    assert all(english == chinese for english, chinese in holes)


@in_browser
def test_colours_and_units_are_those_of_the_figures_and_tables(page):
    assert page.execute_script("return COLORS") == list(MODEL_COLORS)
    assert page.execute_script("return BASELINE") == BASELINE_COLOR
    units = dict(page.execute_script("return METRICS.map(([m]) => [m, metricUnit(m, 't2m')])"))
    written = {metric: metric_unit(metric, "K") for metric in units}
    assert units == {metric: {"1": "", "(K)2": "K²"}.get(unit, unit) for metric, unit in written.items()}


@in_browser
def test_the_menu_lands_on_its_section(browser, folder):
    """中间的段要到快看见时才画、画出来会变高：落点不能因此偏开。"""
    top = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
    motion = {"name": "prefers-reduced-motion", "value": "no-preference"}  # 平滑地滚过去时，一路上的段都会画
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [motion]})
    for entry, way in (("spectra", "menu"), ("maps", "menu"), ("series", "address")):
        browser.get("about:blank")
        browser.get((folder / "evaluation.html").as_uri() + (f"#{entry}" if way == "address" else ""))
        if way == "menu":
            browser.find_element("css selector", f"#menu a[href='#{entry}']").click()
        time.sleep(1.5)
        assert 0 <= browser.execute_script(top, entry) < 120, entry
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@in_browser
def test_legend_hides_a_model_everywhere(page):
    page.execute_script("drawDirty(() => true)")
    count = {plot: len(plotted(page, plot)) for plot in ("scores-plot", "series-plot", "spectra-plot")}
    page.execute_script("document.querySelectorAll('#scores .legend button')[1].click()")
    assert {plot: len(plotted(page, plot)) for plot in count} == {plot: n - 1 for plot, n in count.items()}
    page.execute_script("document.querySelectorAll('#series .legend button')[1].click()")
    assert {plot: len(plotted(page, plot)) for plot in count} == count


@in_browser
def test_table_sorts(page):
    page.execute_script("drawDirty(() => true)")

    def names() -> list[str]:
        return page.execute_script("return [...document.querySelectorAll('#table tbody th')].map((c) => c.textContent)")

    assert names() == ["AR_pred", "persistence", "climatology"]
    rmse = {m: v["t2m"]["rmse"][2] for m, v in example("evaluation", SHAPE, TIMES, LEADS)["scores"].items()}
    up = sorted(rmse, key=lambda name: rmse[name])
    for expected in (up, up[::-1]):
        page.execute_script("document.querySelectorAll('#table thead button')[3].click()")
        assert names() == expected


@in_browser
def test_phone_and_paper(page):
    wide = """return [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, pre, nav, svg"))
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    for language in ("en", "zh"):
        page.execute_script(f"setLanguage('{language}'); redraw(); drawDirty(() => true)")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        assert page.execute_script(wide) == []
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_script("dispatchEvent(new Event('beforeprint'))")  # 打印前所有的图都画好，不宽于纸
    widths = page.execute_script("return [...document.querySelectorAll('.plot')].map((p) => p._fullLayout.width)")
    assert len(widths) == 11
    assert max(widths) <= 700
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert page.execute_script("return document.getElementById('scores-plot').clientWidth") > 1000


@in_browser
def test_only_what_the_content_has(browser, folder):
    content = {
        "title": EVIL,
        "config": f"name: {EVIL}",
        "links": [["bad", "javascript:alert(1)"], ["good", "../x.html"]],
        "curves": {"train": [[1, 1.0], [2, 0.5]], "val": []},
    }
    write_report(folder / "small.html", content)
    visit(browser, folder / "small.html")
    ids = "return [...document.querySelectorAll(arguments[0])].map((e) => e.id || e.textContent)"
    assert browser.execute_script(ids, "section") == ["curves", "reproduce"]
    assert browser.execute_script(ids, "#menu a") == ["Loss", "Reproduce"]
    assert browser.execute_script(ids, "h3") == ["Configuration"]
    assert browser.execute_script("return [window.evil, document.title, document.querySelector('h1').textContent]") == [
        None, EVIL, EVIL,
    ]  # fmt: skip
    assert [a.get_attribute("href") for a in browser.find_elements("css selector", ".links a")] == [
        (folder.parent / "x.html").as_uri()
    ]
    assert browser.get_log("browser") == []


@in_browser
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_other_kinds(browser, folder, kind):
    """对比：多个模型；训练：只有一个时效，曲线变成横柱。缺的值、缺的区间、缺的真值都不出错。"""
    content = example(kind, SHAPE, TIMES, LEADS)
    first = content["models"][0]["name"]
    content["scores"][first]["t2m"]["acc"] = [None] * len(content["lead_hours"])
    for by_channel in content["skill"][first].values():
        by_channel["t2m"]["rmse"] = {"value": by_channel["t2m"]["rmse"]["value"]}
    if kind == "run":
        content["maps"]["fields"]["t2m"][0][0] |= {"truth": None, "error": None}
        content["maps"]["fields"]["t2m"][0][0]["forecast"] = encode_field(np.full(SHAPE, 280.0))
    write_report(folder / f"{kind}.html", content)
    visit(browser, folder / f"{kind}.html")
    assert set(plotted(browser, "scores-plot", "type")) == {'"bar"' if kind == "run" else '"scatter"'}
    headline = browser.find_element("css selector", ".headline").text
    assert ("is the best of 3 models" in headline) == (kind == "comparison")
    if kind == "run":
        assert "[[null" in plotted(browser, "map-truth", "z")[0]
    else:
        choose(browser, "scores", "channel", "u10")
        assert "18 pairs" in browser.find_element("id", "summary").text
    assert browser.get_log("browser") == []


def test_example_is_deterministic():
    one, two = (content_of(make_world((6, 12), 3, 2, {"m": 0.2}, seed=1)) for _ in range(2))
    np.testing.assert_array_equal(one["scores"]["m"]["t2m"]["rmse"], two["scores"]["m"]["t2m"]["rmse"])
