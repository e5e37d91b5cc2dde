"""config/ 的一页：每份 YAML 都在，任务、成绩是它现在的，代价是当场数的。"""

from __future__ import annotations

import re

from engine.reference.configs import CONFIG, PAGE, RUNS, cost_of, listed, page, said, written_costs

TEXT = PAGE.read_text(encoding="utf-8")


def test_every_yaml_is_listed():
    links = re.findall(r"^\| \[([^\]]+)\]\(\1\) \|", TEXT, re.MULTILINE)
    assert sorted(links) == sorted(path.relative_to(CONFIG).as_posix() for path in CONFIG.rglob("*.yaml"))


def test_the_page_is_of_these_files():
    costs = written_costs(TEXT)
    assert set(costs) == {path.relative_to(CONFIG).as_posix() for folder in RUNS for path in listed(folder)}
    assert page(costs) == TEXT, "run python -m engine.reference.write (--texts: keep the costs)"


def test_task_and_score_are_the_first_sentence_and_the_scored_one(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# 卷积网络 a|b，示例数据。另一句。\n# 命令：…\n# 成绩：测试年 0.5、\n# 0.6。没有了。\ndata: {}\n")
    assert said(path) == ("卷积网络 a\\|b，示例数据", "测试年 0.5、0.6")
    path.write_text("# 卷积网络；看成绩用别的命令。\n# 没有在这里训练过：要显卡。\ndata: {}\n")
    assert said(path) == ("卷积网络；看成绩用别的命令", "没有训练过")


def test_a_cost_is_counted_anew():
    """1.08 百万个参数：README 的。"""
    found = cost_of(CONFIG / "quickstart.yaml")
    assert found == written_costs(TEXT)["quickstart.yaml"]
    assert round(int(found.parameters.replace(",", "")) / 1e6, 2) == 1.08
