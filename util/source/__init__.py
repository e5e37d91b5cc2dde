"""导入的读入一侧：要什么（request）、是哪些文件（collection）→ 打开（opening）→ 哪个变量在哪几个里（wanted）→
认坐标（axes）、时效（lead_time）。"""
