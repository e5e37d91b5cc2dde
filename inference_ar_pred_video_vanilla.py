"""AR_pred 的预报：由检查点和 t-1 个已知样本，得到第 t 时刻的样本。检查点自带配置与统计量，与 inference.py 同一引擎。"""

from engine.commands import inference_command
from util.cli import run_command

if __name__ == "__main__":
    run_command(inference_command)
