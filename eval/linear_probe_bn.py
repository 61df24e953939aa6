"""Linear probe with BatchNorm, as DINOv3's: `python eval/linear_probe_bn.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["linear-probe-bn", *sys.argv[1:]]))
