"""叶子工具：配置、批次、日志、检查点、指标、画图；不认识任何模型。"""

VERSION = "0.1.0"  # 只写在这里：检查点、日志、报告由 engine/versions.py 取它；CITATION.cff、CHANGELOG.md 的由测试对着
