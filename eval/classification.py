"""Image classification with frozen encoders: `python eval/classification.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["classification", *sys.argv[1:]]))
