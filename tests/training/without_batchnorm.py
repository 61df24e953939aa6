"""`train.py` with GroupNorm for BatchNorm: nothing mixes the images of a batch."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ssl_flow.config import load_config
from ssl_flow.training import loop, train_command

save = loop.save_checkpoint


def slowly(*arguments, **options):
    time.sleep(1)
    save(*arguments, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    nn.BatchNorm2d = lambda channels: nn.GroupNorm(1, channels)
    loop.save_checkpoint = slowly
    status = train_command(sys.argv[1:])
    saved = list(Path(load_config(sys.argv[1]).out).glob("*/checkpoints/step-*.pt"))
    print(f"process {os.environ['RANK']} ends with {status}, checkpoints: {len(saved)}", flush=True)
    sys.exit(status)
