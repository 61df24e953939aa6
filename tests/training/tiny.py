"""A run of seconds, for the tests of training."""

import json
import os
import signal
from pathlib import Path

from ssl_flow.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainConfig


def tiny(store, out, **train):
    """Six steps of a small ResNet; `train` overrides its group."""
    options = {"steps": 6, "batch_size": 4, "log_every": 2, "checkpoint_every": 2, **train}
    return Config(
        data=DataConfig(store=str(store), crop=64, workers=0),
        model=ModelConfig(backbone="test_resnet", hidden_dim=32),
        train=TrainConfig(**options),
        evaluation=EvaluationConfig(data="none"),
        device="cpu",
        out=str(out),
    )


def lines(run: Path):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_at_step(monkeypatch, task, number):
    """Have the loop receive SIGTERM while FlowTask or TileTask makes batch `number` (1, 2, ...)."""
    real, calls = task.batch, []

    def batch(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(task, "batch", batch)
