"""量时间与内存的命令；结果在 docs/benchmarks.md。"""
