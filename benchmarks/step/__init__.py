"""训练的一步花在哪里：`benchmarks/train.py` 与 `benchmarks/gpu.py` 共用的部分。"""
