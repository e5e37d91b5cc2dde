"""两种语言的一句话：字符串本身是英文（日志、JSON、文字表照常用它），中文带在旁边，报告按语言取。"""

from __future__ import annotations

SPLITS = {"train": "训练集", "val": "验证集", "test": "测试集"}


class Bilingual(str):
    """英文的字符串，chinese 是同一句的中文；拼接、格式化之后只剩英文。"""

    chinese: str

    def __new__(cls, english: str, chinese: str) -> Bilingual:
        made = super().__new__(cls, english)
        made.chinese = chinese
        return made

    def __reduce__(self) -> tuple[type[Bilingual], tuple[str, str]]:
        """复制、送到别的进程时也带着中文。"""
        return Bilingual, (str(self), self.chinese)


def chinese(text: str) -> str:
    """中文的写法；没有的照原样。"""
    return text.chinese if isinstance(text, Bilingual) else text


def split_text(split: str) -> Bilingual:
    """一个划分的名字。"""
    return Bilingual(split, SPLITS[split])
