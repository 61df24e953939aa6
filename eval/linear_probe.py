"""Linear probe of frozen encoders: `python eval/linear_probe.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["linear-probe", *sys.argv[1:]]))
