"""比较几个运行：python compare.py --runs log/A log/B；训练并比较一整套：--suite config/suites/NAME.yaml"""

from engine.commands import compare_command
from util.cli import run_command

if __name__ == "__main__":
    run_command(compare_command)
