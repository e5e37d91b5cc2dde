"""场 → 可平均的统计量 → statistics.nc → 成绩与置信区间。"""
