"""报告人人能用：两种语言都全，每个控件有名字，键盘走得到，对比度够，打印齐全；在真的 Chromium 里。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.util.report.report_browser import CHROMIUM, DRIVER, open_browser, visit
from tests.util.report.report_full import small_content
from util.report import write_report

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
SECTIONS = (
    "summary", "scorecard", "scores", "skill", "table", "cards", "curves", "maps", "roll", "series", "spectra",
    "sphere", "ranks", "events", "drift", "costs", "data", "reproduce",
)  # fmt: skip
# 看得见的与读屏念的文字；代码里的除外
TEXTS = """
    const found = [document.title], skipped = "script, style, noscript, code, [data-language]";
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode())
        if (!walk.currentNode.parentElement.closest(skipped)) found.push(walk.currentNode.textContent);
    for (const node of document.querySelectorAll("[aria-label], [title], [aria-valuetext]"))
        for (const name of ["aria-label", "title", "aria-valuetext"])
            if (!node.closest(skipped) && node.hasAttribute(name)) found.push(node.getAttribute(name));
    return found;"""
ENGLISH = re.compile(r"(?:[A-Za-z][a-z'’-]*[ ,;:]+){3,}[A-Za-z][a-z'’-]+")
CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
# 每个有文字的元素的颜色，与它身后头一个不透明的底色
COLORS = """
    const paints = [], solid = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor, parts = color.match(/[\\d.]+/g).map(Number);
            if (parts.length < 4 || parts[3] > 0.9) return color;
        }
        return getComputedStyle(document.body).backgroundColor;
    };
    for (const node of document.querySelectorAll("body *")) {
        if (!node.checkVisibility() || node.closest("noscript, option")) continue;
        if (![...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
        const own = getComputedStyle(node), inside = node.closest("svg");
        const opaque = (color) => (color.match(/[\\d.]+/g) ?? []).length < 4;
        if (inside && !opaque(own.fill)) continue;
        paints.push([inside ? own.fill : own.color, solid(node), node.textContent.slice(0, 30)]);
    }
    return paints;"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("report") / "full.html"
    write_report(path, small_content())
    browser = open_browser(tmp_path_factory.mktemp("profile"))
    visit(browser, Path(path))
    yield browser
    assert browser.get_log("browser") == []
    browser.quit()


def speak(page: Any, language: str) -> None:
    page.execute_script(f"setLanguage('{language}'); redraw(); drawDirty(() => true)")


def test_every_sentence_is_in_both_languages(page: Any) -> None:
    assert tuple(page.execute_script("return sections.map(({id}) => id)")) == SECTIONS
    speak(page, "zh")
    assert [text for text in page.execute_script(TEXTS) if ENGLISH.search(text)] == []
    assert page.execute_script("return document.documentElement.lang") == "zh-CN"
    speak(page, "en")
    assert [text for text in page.execute_script(TEXTS) if CHINESE.search(text)] == []
    assert page.execute_script("return [document.documentElement.lang, document.title]") == ["en", "small: test split"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_everything_has_a_name_for_a_screen_reader(page: Any, language: str) -> None:
    """由浏览器自己的无障碍树看：控件、图、表、段都有名字。"""
    speak(page, language)
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    wanted = {"button", "combobox", "slider", "link", "table", "image", "region", "navigation", "group"}
    seen: dict[str, int] = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role not in wanted:
            continue
        seen[role] = seen.get(role, 0) + 1
        about = {"backendNodeId": node["backendDOMNodeId"]}
        name = node.get("name", {}).get("value", "").strip()
        assert name, page.execute_cdp_cmd("DOM.getOuterHTML", about)["outerHTML"][:200]
    assert min(seen.get(role, 0) for role in wanted) > 0, seen
    sliders = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == "slider"]
    assert len(sliders) == 3 and len(set(sliders)) == 3  # 起报时间、时效、看的一段


def test_the_skeleton_of_the_page(page: Any) -> None:
    levels = page.execute_script("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    bad = "return [...document.querySelectorAll(arguments[0])].filter((n) => n.closest('table')).length"
    assert page.execute_script(bad, "thead th:not([scope]), tbody th:not([scope=row])") == 0
    tables, captions = (page.execute_script("return document.querySelectorAll(arguments[0]).length", s)
                        for s in ("table", "table > caption:first-child"))  # fmt: skip
    assert tables == captions > 3
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map((n) => n.id)")
    assert len(ids) == len(set(ids))
    broken = """return [...document.querySelectorAll("[aria-labelledby]")]
        .filter((n) => n.getAttribute("aria-labelledby").split(" ").some((id) => !document.getElementById(id)))"""
    assert page.execute_script(broken) == []
    page.find_element("css selector", "body").send_keys("\ue004")  # Tab：头一站是跳到正文
    focus = "const n = document.activeElement, s = getComputedStyle(n); return [n.id, s.outlineStyle, s.clipPath]"
    assert page.execute_script(focus) == ["skip", "solid", "none"]


def luminance(color: str) -> float:
    parts = [int(float(v)) / 255 for v in re.findall(r"[\d.]+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page: Any, scheme: str) -> None:
    """WCAG 2.2 AA：文字与底色的对比度不低于 4.5。"""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    speak(page, "en")
    faint = []
    for ink, ground, text in page.execute_script(COLORS):
        low, high = sorted((luminance(ink), luminance(ground)))
        if (high + 0.05) / (low + 0.05) < 4.5:
            faint.append((round((high + 0.05) / (low + 0.05), 2), ink, ground, text))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    dark = luminance(page.execute_script("return getComputedStyle(document.body).backgroundColor")) < 0.05
    assert faint == [] and not dark


def test_space_stops_the_maps(page: Any) -> None:
    speak(page, "en")
    page.execute_script("state.roll = 0; redraw(); drawDirty(() => true)")
    page.execute_script("document.getElementById('roll-play').click()")
    label = "return document.getElementById('roll-play').getAttribute('aria-label')"
    assert page.execute_script(label) == "Pause"
    page.execute_async_script("const done = arguments[0]; setInterval(() => { if (state.roll > 1) done(); }, 50)")
    page.find_element("css selector", "body").send_keys(" ")
    assert page.execute_script(label) == "Play"
    step = page.execute_script("return state.roll")
    clock = page.execute_script("return document.querySelector('#roll .clock').textContent")
    assert page.execute_script("return content.roll.lead_hours[state.roll]") == 6 * (step + 1)
    assert "Initial time 2020-" in clock and "Valid time 2020-" in clock


def test_paper(page: Any) -> None:
    """打印：各节都在、都画好，没有控件，浅底，宽不过纸。"""
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    visible = "return [...document.querySelectorAll(arguments[0])].filter((n) => n.checkVisibility()).length"
    assert page.execute_script(visible, "section") == len(SECTIONS)
    assert page.execute_script(visible, "select, input, button.play, button.copy, nav, .brush, .skip") == 0
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    state = "return [...document.querySelectorAll('.plot')].map((p) => [p._fullLayout.width, p.layout.paper_bgcolor])"
    plots = [p for p in page.execute_script(state) if p[0] > 0]
    assert len(plots) > 15 and all(width <= 700 and ground == "#ffffff" for width, ground in plots)
    rule = "return [...document.querySelectorAll('figure')].every((f) => getComputedStyle(f).breakInside === 'avoid')"
    assert page.execute_script(rule)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    page.execute_script("dispatchEvent(new Event('afterprint'))")
