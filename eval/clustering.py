"""Overclustering of frozen encoders' features: `python eval/clustering.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["clustering", *sys.argv[1:]]))
