"""report.html 这个文件：自足、大小、转义、数值；不用浏览器。"""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.util.report.report_example import content_of, example, make_world
from tests.util.report.report_full import full_content
from util import report
from util.report import MAX_BYTES, write_report
from util.report.bilingual import Bilingual, chinese
from util.scores.final import METRICS, Metric

EVIL = '</script><!-- <b> & "quotes"'


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
    content = example("evaluation", (18, 36), 3, 3)
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


def test_the_largest_report_stays_below_its_size(tmp_path, caplog):
    """69 个通道、40 个时效、十二个区域、四季、50 个成员：取舍之后不必再舍去哪一节。"""
    content = full_content(channels=69, grid=(64, 128), leads=40, regions=12, members=50)
    write_report(tmp_path / "large.html", content)
    assert (tmp_path / "large.html").stat().st_size < MAX_BYTES
    assert caplog.records == []


def test_what_does_not_fit_is_left_out_in_order(tmp_path, monkeypatch):
    content = {"title": "x"} | {key: {"data": "a" * 100_000} for key in ("maps", "roll", "series", "sphere")}
    whole = write(tmp_path / "whole.html", **content)
    assert "left_out" not in json.loads(whole.texts["content"])
    monkeypatch.setattr(report, "MAX_BYTES", (tmp_path / "whole.html").stat().st_size - 150_000)
    found = json.loads(write(tmp_path / "r.html", **content).texts["content"])
    assert found["left_out"] == ["sphere", "series"] and set(found) == {"title", "maps", "roll", "left_out"}
    assert (tmp_path / "r.html").stat().st_size <= report.MAX_BYTES


def test_too_large(tmp_path):
    with pytest.raises(ValueError, match=r"would have 1\d\.\d MB, more than 10 MB; .* is config with 6\.0 MB"):
        write_report(tmp_path / "r.html", {"title": "x", "config": "a" * 6_000_000})
    assert not list(tmp_path.iterdir())


def test_a_panel_is_one_file_here(tmp_path, monkeypatch):
    """放进文件夹的 .js 就在页面里，在图的后面、表的前面；它自己的文字也认得。"""
    assets = shutil.copytree(report.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(report, "ASSETS", assets)
    (assets / "rain.js").write_text('Object.assign(WORDS, {\n  rainNote: ["Wet", "湿"],\n});\n', encoding="utf-8")
    assert report.scripts()[-3:] == ["rain.js", "tables.js", "page.js"]
    write(tmp_path / "r.html", title="x", facts=[["rain", 3]])
    assert "rainNote" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_metric_has_its_name_in_the_page(tmp_path, monkeypatch):
    more = Metric("nmse", "NMSE", "归一化均方误差", "", "lower", lambda m: m.of["square"])
    monkeypatch.setattr(report, "METRICS", (*METRICS, more))
    write(tmp_path / "r.html", title="x")
    assert '["nmse","NMSE","归一化均方误差","","lower"]];' in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_sentence_carries_both_languages(tmp_path):
    said = Bilingual("2 of 3 channels", "3 个通道中的 2 个")
    page = write(tmp_path / "r.html", title="x", facts=[["windows", said]], notes=[f"plain {said}"])
    found = json.loads(page.texts["content"])
    assert found["facts"] == [["windows", {"en": "2 of 3 channels", "zh": "3 个通道中的 2 个"}]]
    assert found["notes"] == ["plain 2 of 3 channels"]
    assert copy.deepcopy(said).chinese == said.chinese
    assert json.dumps([said]) == '["2 of 3 channels"]' and chinese(said) == "3 个通道中的 2 个" and chinese("x") == "x"


def test_example_is_deterministic():
    one, two = (content_of(make_world((6, 12), 3, 2, {"m": 0.2}, seed=1)) for _ in range(2))
    np.testing.assert_array_equal(one["scores"]["m"]["t2m"]["rmse"], two["scores"]["m"]["t2m"]["rmse"])


def test_no_word_is_written_twice():
    found: dict[str, list[str]] = {"WORDS": [], "LABELS": []}
    for script in report.scripts():
        text, table = (report.ASSETS / script).read_text(encoding="utf-8"), None
        for line in text.splitlines():
            if line.startswith(("const WORDS", "Object.assign(WORDS")):
                table = "WORDS"
            elif line.startswith(("const LABELS", "Object.assign(LABELS")):
                table = "LABELS"
            elif line.startswith("}"):
                table = None
            elif table and (key := re.match(r'  ("[^"]+"|\w+): ', line)):
                found[table].append(key[1])
    assert len(found["WORDS"]) > 100 and len(found["LABELS"]) > 50
    for keys in found.values():
        assert len(set(keys)) == len(keys), sorted({key for key in keys if keys.count(key) > 1})
