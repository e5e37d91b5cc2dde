"""图：只用 Figure 对象（Agg），不碰 pyplot 的全局状态。"""
