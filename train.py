"""Pretrain an encoder: `python train.py [CONFIG] [--key.subkey VALUE]...` (= `ssl-flow train`)."""

import sys

from ssl_flow.training.command import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
