import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import lines, tiny
from torch import nn

from ssl_flow.config import Config, TrainConfig, save_config
from ssl_flow.training import loop, pretrain
from ssl_flow.training.distributed import World

SCRIPT = Path(__file__).with_name("without_batchnorm.py")


def test_two_processes_learn_what_one_does_and_one_goes_on_with_their_run(tmp_path, monkeypatch):
    train = {"log_every": 1, "checkpoint_every": 100, "amp": "none", "ema": 0.5, "accumulate": 2}
    config = tiny("synthetic:2", tmp_path / "two", steps=12, **train)
    config = replace(
        config,
        model=replace(config.model, backbone="test_convnext"),
        loss=replace(config.loss, ridge_weight=0.4, deep_weight=0.5),
    )
    save_config(config, tmp_path / "c.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, str(SCRIPT), str(tmp_path / "c.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (runs := list((tmp_path / "two").glob("*/metrics.jsonl"))) or (
        runs[0].read_text().count("\n") < 6
    ):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert printed.count("SIGTERM at step") == 1, printed  # process 0 alone speaks
    for rank in range(2):  # none leaves before the checkpoint is there
        assert f"process {rank} ends with 143, checkpoints: 1" in printed, printed
    (run,) = (tmp_path / "two").iterdir()
    by_two = len(lines(run))
    assert 6 <= by_two < 12

    monkeypatch.setattr(nn, "BatchNorm2d", lambda channels: nn.GroupNorm(1, channels))
    data = replace(config.data, store=str(run / "flow"))
    one = pretrain(replace(config, data=data, out=str(tmp_path / "one")))
    pretrain(config, resume=run)
    assert len(lines(run)) == len(lines(one)) == 12
    for two_row, one_row in zip(lines(run), lines(one), strict=True):
        for key in ("loss", "kl", "constant_loss", "random_loss", "ridge", "deep", "gradient_norm"):
            assert two_row[key] == pytest.approx(one_row[key], rel=1e-4), (key, one_row["step"])
    weights = [load_file(r / "encoder" / "model.safetensors") for r in (run, one)]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_size": 6, "accumulate": 2}, "batch_size is 6; expected a multiple of 4"),
        ({"batch_size": 3}, "batch_size is 3; expected a multiple of 2"),
        ({"batch_size": 4, "sync_batchnorm": True}, "sync_batchnorm works on GPUs only"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(train, message):
    config = Config(train=TrainConfig(**train))
    with pytest.raises(ValueError, match=message):
        loop._share(config, World(torch.device("cpu"), 0, 2))
