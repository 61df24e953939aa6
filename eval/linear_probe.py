"""Linear probe of frozen encoders: `python eval/linear_probe.py --help`."""

import sys

from ssl_flow.evaluation import linear_probe_command

if __name__ == "__main__":
    sys.exit(linear_probe_command(sys.argv[1:]))
