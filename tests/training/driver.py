"""Trains in processes of its own that are killed or signalled at given steps; run by the tests.

    python driver.py '[{"argv": [...], "at": 3, "signal": 9}, ...]'    -> exit statuses, as JSON

One import for all runs: each is a fork, made before any thread is. `run_in` instead of `--resume`
in `argv` goes on with the one run in a folder.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 (once, not in each fork)
import torch
import torch.utils.tensorboard

from ssl_flow.training import train_command


def run(argv, out, at=None, sent=signal.SIGKILL, resume=False, group=False):
    """Exit status of a training process (negative: the signal that ended it)."""
    existing = sorted(Path(out).glob("2*"))
    argv = ["--resume", str(existing[-1]), *argv] if resume else [*argv, "--out", out]
    child = os.fork()
    if child == 0:
        os.setsid()
        torch.set_num_threads(1)
        os._exit(train_command(argv))
    if at is not None:
        while _step(out) < at:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended before step {at}"
            time.sleep(0.002)
        (os.killpg if group else os.kill)(child, sent)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _step(out):
    runs = sorted(Path(out).glob("2*/metrics.jsonl"))
    rows = runs[-1].read_text().splitlines() if runs else []
    return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0


if __name__ == "__main__":
    print("statuses", json.dumps([run(**job) for job in json.loads(sys.argv[1])]))
