"""个例的一页，在真的 Chromium 里打开；图是真渲染的。没有 chromium 时跳过。"""

from __future__ import annotations

import pytest
import yaml

from engine.commands import evaluate_command
from tests.engine.cases.test_cases import CASES, CHANNELS
from tests.engine.runs import train_small
from tests.util.report.report_browser import CHROMIUM, DRIVER, choose, open_browser, visit


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
def test_the_page_opens(make_tree, tmp_path):
    """真渲染的一页：两种语言，选通道、等值线换图，控制台没有消息；从主页点过去、点回来。"""
    tree = make_tree(tmp_path / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")
    trained = train_small(tmp_path, tree, data={"pressure_hpa": [50.0]})
    cases = tmp_path / "cases.yaml"
    cases.write_text(yaml.safe_dump(CASES), encoding="utf-8")
    words = ("--steps", "3", "--members", "3", "--perturb", "0.2", "--save", "none", "--cases", str(cases))
    assert evaluate_command(["--checkpoint", str(trained), "--out", str(tmp_path / "out"), *words]) == 0
    browser = open_browser(tmp_path / "profile")
    try:
        visit(browser, tmp_path / "out/report.html")
        browser.execute_script("[...document.querySelectorAll('.links a')].find((a) => a.text === 'greenwich').click()")
        browser.execute_script("setLanguage('en'); drawDirty(() => true)")
        text = browser.execute_script("return document.body.innerText")
        assert "Spaghetti" in text and "Plume" in text and "undefined" not in text

        def shown(section: str) -> str:
            browser.execute_script("drawDirty(() => true)")
            return browser.execute_script(f"return document.querySelector('#{section} img').alt")

        def drawn(section: str) -> int:
            script = f"const i = document.querySelector('#{section} img'); return i.complete ? i.naturalWidth : 0"
            return browser.execute_script(script)

        assert shown("caseMaps").startswith("Maps · z_level_00 — geopotential · 2000-02-1")
        choose(browser, "caseMaps", "channel", "t2m")
        assert shown("caseMaps").startswith("Maps · t2m") and shown("casePlume").startswith("Plume · t2m")
        choose(browser, "caseSpaghetti", "contour", "280")
        assert shown("caseSpaghetti").endswith(" · 280")
        for section in ("casePlume", "caseMaps", "caseSpaghetti", "caseMembers"):
            assert drawn(section) > 500
        browser.execute_script("setLanguage('zh'); drawDirty(() => true)")
        text = browser.execute_script("return document.body.innerText")
        assert "羽状图" in text and "面条图" in text and "undefined" not in text
        browser.execute_script("document.querySelector('.links a').click()")
        assert browser.current_url.endswith("out/report.html")
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
