"""report.html 在真的 Chromium 里打开：选择与滑块都要改变图。没有 chromium 或 chromedriver 时跳过。"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.evaluation.page import Page
from tests.util.report.report_browser import CHROMIUM, DRIVER, choose, drag, open_browser, plotted, visit
from tests.util.report.report_example import CHANNELS, encode_field, example, make_world
from util import report
from util.files.records import as_json
from util.plot.scores import BASELINE_COLOR
from util.plot.style import MODEL_COLORS
from util.report import write_report
from util.scores.final import metric_unit

in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
SHAPE, TIMES, LEADS = (18, 36), 6, 3
EVIL = "</script><script>window.evil = 1</script><!-- <img src=x onerror='window.evil = 1'> & \"quotes\""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "evaluation.html", example("evaluation", SHAPE, TIMES, LEADS))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """评估的页面，回到刚打开的样子；用完时控制台里不能有任何消息。"""
    if browser.current_url != (folder / "evaluation.html").as_uri():
        visit(browser, folder / "evaluation.html")
    browser.execute_script("""
        Object.assign(state, {channel: null, lead: null, metric: "rmse", cardMetric: null, time: 0, hidden: new Set()});
        setLanguage("en");""")
    yield browser
    assert browser.get_log("browser") == []


@in_browser
def test_nothing_is_fetched_and_nothing_goes_wrong(browser, folder):
    visit(browser, folder / "evaluation.html")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = ("data:", "blob:", "chrome:", "chrome-untrusted:")  # 后两种是浏览器自己的新标签页
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
    rmse = np.sqrt(((forecast - truth) ** 2 * weights).sum() / (weights.sum() * SHAPE[1]))  # 不是由压过的图算的
    aside = page.find_elements("css selector", "#maps .aside")[2].text
    assert float(re.findall(r"RMSE ([\d.,]+)", aside)[0].replace(",", "")) == float(f"{rmse:.3g}")
    strip = json.loads(plotted(page, "map-errors")[0])
    assert strip[4] == pytest.approx(rmse, rel=1e-6)


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
        const look = setInterval(() => {
            if (state.time !== 5) return;
            clearInterval(look);
            document.getElementById("maps-play").click();  // 在页面里停：等到这边来按，忙的时候已经走过了
            done();
        }, 20);"""
    )
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
    chinese = ["zh-CN", "概要", "AR_pred持续性预报气候态", "概要", "时效 (h)", "t2m — 2 米气温"]
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
def test_a_panel_is_a_record_and_a_script(browser, tmp_path, monkeypatch):
    """加一节：Page 多一栏，util/report/ 里多一个 .js；标题、菜单、两种语言、画法都在那一个文件里。"""

    @dataclass(frozen=True, kw_only=True)
    class WithRain(Page):
        rain: dict[str, float] | None = None

    monkeypatch.setattr(report, "ASSETS", shutil.copytree(report.ASSETS, tmp_path / "assets"))
    (report.ASSETS / "rain.js").write_text(
        """Object.assign(WORDS, {
  rain: ["Rain", "降水"],
});
section("rain", content.rain, (body) => {
  const line = body.appendChild(el("p"));
  return () => { line.textContent = `${content.rain.total} mm`; };
});
""",
        encoding="utf-8",
    )
    page = WithRain(kind="run", title="wet", facts=[("split", "test")], config="a: 1", rain={"total": 3.5})
    write_report(tmp_path / "wet.html", as_json(page))
    visit(browser, tmp_path / "wet.html")
    browser.execute_script("drawDirty(() => true)")
    texts = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    assert browser.execute_script(texts, "#menu a") == ["Rain", "Reproduce"]
    assert browser.execute_script(texts, "#rain h2, #rain p") == ["Rain", "3.5 mm"]
    assert browser.get_log("browser") == []


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
    """对比：多个模型；训练：只有一个时效，曲线变成横柱。缺的值、缺的区间、缺的真值都不出错。

    发表的成绩有线、有行，时效不全的连起来，但不争最好。
    """
    content = example(kind, SHAPE, TIMES, LEADS)
    first = content["models"][0]["name"]
    content["scores"][first]["t2m"]["acc"] = [None] * len(content["lead_hours"])
    for by_channel in content["skill"][first].values():
        by_channel["t2m"]["rmse"] = {"value": by_channel["t2m"]["rmse"]["value"]}
    if kind == "run":
        content["maps"]["fields"]["t2m"][0][0] |= {"truth": None, "error": None}
        content["maps"]["fields"]["t2m"][0][0]["forecast"] = encode_field(np.full(SHAPE, 280.0))
    if kind == "comparison":
        content["models"].append({"name": "far (published)", "role": "published"})
        content["scores"]["far (published)"] = {"t2m": {"rmse": [1e-3, None, 2e-3]}}
    write_report(folder / f"{kind}.html", content)
    visit(browser, folder / f"{kind}.html")
    assert set(plotted(browser, "scores-plot", "type")) == {'"bar"' if kind == "run" else '"scatter"'}
    headline = browser.find_element("css selector", ".headline").text
    assert ("is the best of 3 models" in headline) == (kind == "comparison")
    if kind == "run":
        assert "[[null" in plotted(browser, "map-truth", "z")[0]
    else:
        assert plotted(browser, "scores-plot")[-1] == "[0.001,null,0.002]"
        assert plotted(browser, "scores-plot", "connectgaps")[-2:] == ["false", "true"]
        assert not [td for td in browser.find_elements("css selector", "#table td.best") if "0.001" in td.text]
        assert "far" not in headline + browser.find_element("css selector", ".rankrows").text
        choose(browser, "scores", "channel", "u10")
        assert "18 pairs" in browser.find_element("id", "summary").text
    assert browser.get_log("browser") == []


@in_browser
def test_every_option_of_every_select(browser, folder):
    """时效十个而谱、序列、地图只有四个，通道也只有几个：每个选项都走一遍，各段都画得出，数也是那一时效的。"""
    content = example("evaluation", (8, 16), 3, 10)
    content["maps"]["fields"]["t2m"][1][1] |= {"truth": None, "error": None}  # 真值是插值的
    content["maps"]["scores"]["t2m"][1][1] = None
    write_report(folder / "subset.html", content)
    visit(browser, folder / "subset.html")
    count = browser.execute_script("""
        let count = 0;
        const seen = new Set(); // 同名的选择联动：头一回画各段，以后只画它自己的段
        for (const box of document.querySelectorAll("select"))
            for (let i = 0; i < box.options.length; i++, count++) {
                box.selectedIndex = i;
                box.dispatchEvent(new Event("change"));
                const choice = `${box.dataset.key} ${box.value}`;
                drawDirty(seen.has(choice) ? ({ node }) => node.contains(box) : () => true);
                seen.add(choice);
            }
        return count;""")
    assert count > 80
    assert content["spectra"]["lead_hours"] == [6, 24, 42, 60]
    choose(browser, "spectra", "channel", "tp")
    choose(browser, "spectra", "lead", "+42 h")
    choose(browser, "series", "point", "Area mean")
    for plot, truth in (
        ("spectra-plot", content["spectra"]["truth"]["tp"][2]),
        ("series-plot", content["series"]["truth"]["tp"][2][0]),
    ):
        shown = np.array(json.loads(plotted(browser, plot)[0]))
        power = 10.0 ** np.round(np.log10(truth[0] / shown[0]))  # 序列提出了 10 的幂
        np.testing.assert_allclose(shown * power, truth, rtol=1e-6)
    choose(browser, "summary", "lead", "+24 h")
    choose(browser, "maps", "channel", "t2m")
    drag(browser, 1)
    assert "[[null" in plotted(browser, "map-truth", "z")[0]
    assert json.loads(plotted(browser, "map-errors")[0])[1] is None
    assert browser.find_elements("css selector", "#maps .aside")[2].text == ""
    assert browser.get_log("browser") == []


@in_browser
def test_only_metrics_the_channel_has(page):
    """只有 t2m 有 Brier 评分：换到别的通道就退回 RMSE；评分卡只列有它的通道。标题写明是什么，纸上也看得到。"""
    choose(page, "scores", "metric", "Brier")
    page.execute_script("drawDirty(() => true)")
    choose(page, "scorecard", "cardMetric", "Brier")
    rows = "return [...document.querySelectorAll('#scorecard tbody th')].map((c) => c.textContent)"
    assert page.execute_script(rows) == ["t2m"]
    title = "return document.querySelector(`#${arguments[0]} .tabletitle`).textContent"
    assert page.execute_script(title, "scorecard") == "Brier score, > 290, change against persistence · AR_pred"
    choose(page, "scores", "channel", "z_level_00")
    page.execute_script("drawDirty(() => true)")
    assert page.execute_script("return document.getElementById('scores-plot').layout.yaxis.title.text")[:4] == "RMSE"
    assert page.execute_script(title, "table").startswith("RMSE")
    options = page.execute_script(
        "return [...document.querySelectorAll('#scores [data-key=metric] option')].map(String)"
    )
    assert len(options) == len(example("evaluation", SHAPE, TIMES, LEADS)["scores"]["AR_pred"]["z_level_00"])


@in_browser
def test_sentences_of_the_engine_in_both_languages(page):
    hero = "return document.getElementById('hero').textContent"
    note = "return document.querySelector('#maps .note').textContent"
    assert "6, initial times 1981-07-01T00:00:00 to" in page.execute_script(hero)
    assert page.execute_script(note) == "3 of 4 channels; 3 of 3 lead times"
    page.execute_script("setLanguage('zh')")
    assert "10 个，初值噪声为 0.05 倍标准差" in page.execute_script(hero)
    assert page.execute_script(note) == "4 个通道中的 3 个；3 个时效中的 3 个"
