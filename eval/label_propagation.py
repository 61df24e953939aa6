"""First masks carried through videos: `python eval/label_propagation.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["label-propagation", *sys.argv[1:]]))
