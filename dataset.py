"""造、导入、检查、打包、导出数据：python dataset.py WORD …；各词见 python dataset.py --help。"""

from util.cli import run_command
from util.commands.dataset import dataset_command

if __name__ == "__main__":
    run_command(dataset_command)
