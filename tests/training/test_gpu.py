"""What only a CUDA device shows."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import lines, stop_at_step, tiny

from ssl_flow.config import Config, DataConfig
from ssl_flow.losses import CrossPixelFlowLoss
from ssl_flow.models import create_encoder
from ssl_flow.training import loop, pretrain
from ssl_flow.training.distributed import World
from ssl_flow.training.flow_task import Batch, FlowTask, Objective
from ssl_flow.training.safety import Interrupted
from ssl_flow.training.step import Shadow, make_optimizer, take_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_compiles_and_autocasts(store, tmp_path, monkeypatch):
    real, types = loop.take_step, set()

    def spy(*arguments):
        result = real(*arguments)
        types.add(result.embedding.dtype)
        return result

    monkeypatch.setattr(loop, "take_step", spy)
    torch._dynamo.utils.counters.clear()
    config = tiny(store, tmp_path, compile=True, accumulate=2, checkpoint_activations=True)
    run = pretrain(replace(config, device="cuda"))
    assert all(math.isfinite(row["loss"]) for row in lines(run))
    assert types == {torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_float16_steps_with_the_fused_optimizer_and_a_scaled_loss():
    torch.manual_seed(0)
    device = torch.device("cuda")
    encoder = create_encoder("test_resnet", 8, 16).to(device)
    module = Objective(encoder, CrossPixelFlowLoss().to(device), torch.float16).train()
    optimizer = make_optimizer(Config(data=DataConfig(crop=32)), module)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    images = torch.randn(4, 3, 32, 32, device=device)
    flow = torch.randn(4, 2, 8, 8, device=device)
    batch = Batch(images, flow, torch.ones(4, 8, 8, device=device))
    buffers, losses, taken = Shadow(module.buffers()), [], []
    for _ in range(60):
        before = [tensor.clone() for tensor in module.state_dict().values()]
        result = take_step(module, batch, optimizer, scaler, 1, World(device), buffers)
        after = module.state_dict().values()
        assert result.taken != all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        taken.append(result.taken)
        losses.append(result.loss)
    assert not taken[0]
    assert all(taken[-10:])
    assert losses[-1] < losses[0]


def test_a_stopped_run_goes_on(store, tmp_path, monkeypatch):
    def config(name):
        train = {"steps": 6, "log_every": 1, "amp": "float16", "ema": 0.5}
        return replace(tiny(store, tmp_path / name, **train), device="cuda")

    whole = pretrain(config("whole"))
    stop_at_step(monkeypatch, FlowTask, 4)
    with pytest.raises(Interrupted):
        pretrain(config("stopped"))
    (run,) = (tmp_path / "stopped").iterdir()
    assert len(lines(run)) == 4
    pretrain(config("stopped"), resume=run)
    assert [row["step"] for row in lines(run)] == list(range(1, 7))
    for found, expected in zip(lines(run), lines(whole), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2)
