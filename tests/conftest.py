"""What must be so before any test runs."""

import os
import signal

# Tests in parallel (pytest -n): one thread each, or they and what they start wait for one another.
# Before torch, which reads the variable.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Before anything imports Triton: without a CUDA device its kernels run interpreted, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell that starts the tests in the background (nohup, some CI) has them and all that they start
# ignore Ctrl-C, which several of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)
