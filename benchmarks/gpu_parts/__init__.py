"""`benchmarks/gpu.py` 的各部分：函数收下 Scene，返回「量 → 数或一句话」。"""
