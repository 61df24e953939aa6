"""`train.py` with GroupNorm for BatchNorm: nothing mixes the images of a batch."""

import sys

import torch
from torch import nn

from ssl_flow.training import train_command

if __name__ == "__main__":
    torch.set_num_threads(1)
    nn.BatchNorm2d = lambda channels: nn.GroupNorm(1, channels)
    sys.exit(train_command(sys.argv[1:]))
