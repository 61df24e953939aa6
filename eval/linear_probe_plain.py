"""Plain linear probe, as Leopart's and NeCo's: `python eval/linear_probe_plain.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["linear-probe-plain", *sys.argv[1:]]))
