"""在真的 Chromium 里看报告：打开、选择、拖动、读出画板上的数。"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--force-prefers-reduced-motion", "--window-size=1280,900",
)  # fmt: skip


def open_browser(profile: Path) -> Any:
    """profile: 浏览器自己的文件夹。"""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    browser.set_script_timeout(300)  # 机器忙的时候，画全部的图要一会儿
    return browser


def visit(browser: Any, path: Path) -> None:
    """打开一页，画出所有的图（平时滚到跟前才画）。"""
    browser.get(path.as_uri())
    browser.execute_script("drawDirty(() => true)")


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
