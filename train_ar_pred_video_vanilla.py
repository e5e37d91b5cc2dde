"""训练 AR_pred：默认读 config/ar_pred_video_vanilla.yaml；换别的配置用 --config。"""

from functools import partial

from engine.commands import train_command
from util.cli import run_command

if __name__ == "__main__":
    run_command(partial(train_command, default_config="config/ar_pred_video_vanilla.yaml"))
