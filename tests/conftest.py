"""Before anything imports Triton: without a CUDA device its kernels run interpreted, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
