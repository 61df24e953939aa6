"""Encoders of a map's tiles, judged (Loc2Vec): `python eval/loc2vec.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["loc2vec", *sys.argv[1:]]))
