"""Frozen encoders' features against true flow: `python eval/correspondence.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["correspondence", *sys.argv[1:]]))
