"""Several protocols at once: `python eval/suite.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["suite", *sys.argv[1:]]))
