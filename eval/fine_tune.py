"""Encoders fine-tuned with a segmentation decoder: `python eval/fine_tune.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["fine-tune", *sys.argv[1:]]))
