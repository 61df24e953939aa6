"""Segmentation by retrieval with frozen encoders: `python eval/dense_knn.py --help`."""

import sys

from ssl_flow.evaluation.suite_command import eval_command

if __name__ == "__main__":
    sys.exit(eval_command(["dense-knn", *sys.argv[1:]]))
