"""给任一检查点打分：python evaluate.py --checkpoint checkpoints/RUN/best.ckpt --split test --out DIR"""

from engine.commands import evaluate_command
from util.cli import run_command

if __name__ == "__main__":
    run_command(evaluate_command)
