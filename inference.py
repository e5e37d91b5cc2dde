"""用任一检查点作预报：python inference.py --checkpoint checkpoints/RUN/best.ckpt --time 2015-06-01T00 --out DIR"""

from engine.commands import inference_command
from util.cli import run_command

if __name__ == "__main__":
    run_command(inference_command)
