"""训练 models/ 下的任一模型：python train.py --config config/NAME.yaml [key=value ...]"""

from engine.commands import train_command
from util.cli import run_command

if __name__ == "__main__":
    run_command(train_command)
