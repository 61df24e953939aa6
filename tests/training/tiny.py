"""A run of seconds, for the tests of training."""

import json
import os
import signal
from pathlib import Path

from ssl_flow.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from ssl_flow.training.flow_task import FlowTask


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


def stop_at_step_four(monkeypatch):
    """Have the loop receive SIGTERM while it makes its fourth batch."""
    real, calls = FlowTask.batch, []

    def stop_at_four(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(FlowTask, "batch", stop_at_four)
