"""导入的读入一侧：要什么（request）→ 打开（opening）→ 认坐标（axes）、时效（lead_time）。"""
