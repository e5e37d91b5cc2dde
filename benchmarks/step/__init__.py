"""训练的一步花在哪里：`benchmarks/train.py` 的各部分。"""
