"""两种语言的一句话：字符串本身是英文（日志、JSON、文字表照常用它），中文带在旁边，报告按语言取。"""

from __future__ import annotations


class Bilingual(str):
    """英文的字符串，chinese 是同一句的中文；拼接、格式化之后只剩英文。"""

    chinese: str

    def __new__(cls, english: str, chinese: str) -> Bilingual:
        made = super().__new__(cls, english)
        made.chinese = chinese
        return made


def chinese(text: str) -> str:
    """中文的写法；没有的照原样。"""
    return text.chinese if isinstance(text, Bilingual) else text
