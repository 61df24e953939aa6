import copy
import math
import multiprocessing
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import lines, tiny
from torch import nn

from ssl_flow.config import Config, DataConfig, TrainConfig
from ssl_flow.data.pairs import Window, collate
from ssl_flow.losses import CrossPixelFlowLoss, RidgeFlowLoss
from ssl_flow.models import create_encoder
from ssl_flow.training import loop, pretrain
from ssl_flow.training.batches import Share, crop_side, make_loader, reading
from ssl_flow.training.distributed import World
from ssl_flow.training.flow_task import Batch, FlowTask, Objective, pool_flow
from ssl_flow.training.initial import checkpoint_activations, try_step
from ssl_flow.training.step import (
    Shadow,
    step_seed,
    take_step,
    update_average,
)

CPU = torch.device("cpu")


def without_batchnorm(module):
    """The head's BatchNorms become GroupNorms: nothing mixes the images of a batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            without_batchnorm(child)
    return module


def batch(images=4, side=32, seed=0):
    torch.manual_seed(seed)
    grid = side // 4
    weight = (torch.rand(images, grid, grid) > 0.2).float()
    return Batch(torch.randn(images, 3, side, side), torch.randn(images, 2, grid, grid), weight)


def objective(name="test_convnext", amp=None, ridge_weight=0.0, deep_weight=0.0):
    torch.manual_seed(0)
    loss, weights = CrossPixelFlowLoss(learn_scale=True), (ridge_weight, deep_weight)
    module = Objective(create_encoder(name, 8, 16), loss, amp, *weights)
    return without_batchnorm(module).train()


def gradients(module):
    return {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


def one_step(module, accumulate=1, scaler=None, data=None, rate=0.0):
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    buffers = Shadow(module.buffers())
    return take_step(module, data or batch(), optimizer, scaler, accumulate, World(CPU), buffers)


@pytest.mark.parametrize(("accumulate", "weights"), [(2, (0.4, 0.5)), (4, (0.0, 0.0))])
def test_accumulation_gives_the_gradient_of_the_whole_batch(accumulate, weights):
    whole, parts = (objective("test_convnext", None, *weights) for _ in range(2))
    # The definition: the mean of the images' losses, one backward pass; then clipped to norm 1.
    whole(*batch())[0].backward()
    norm = torch.stack([g.norm() for g in gradients(whole).values()]).norm()
    result = one_step(parts, accumulate)
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert result.loss == pytest.approx(whole(*batch())[0].item(), rel=1e-5)
    found = gradients(parts)
    for name, expected in gradients(whole).items():
        expected = expected * min(1.0, 1 / float(norm))
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result.embedding, whole(*batch())[1].detach())


def test_the_ridge_term_is_added_with_its_weight():
    data, module, plain = batch(), objective(ridge_weight=0.5), objective()
    loss, embedding, ridge = module(*data)
    expected = float(RidgeFlowLoss()(embedding.detach(), data.flow, data.weight))
    assert ridge.shape == (1,) and 0.5 < expected == pytest.approx(float(ridge))
    assert not ridge.requires_grad
    assert float(loss) == pytest.approx(float(plain(*data)[0]) + 0.5 * expected, rel=1e-5)
    result = one_step(module, data=data)
    assert result.terms == pytest.approx([expected], rel=1e-5)
    assert result.loss == pytest.approx(float(loss), rel=1e-5)


def test_the_deep_term_is_the_loss_of_one_level_alone():
    data, module = batch(side=64), objective(ridge_weight=0.5, deep_weight=0.7)
    loss, embedding, (ridge, deep) = module(*data)
    maps = module.encoder.features(data.images)
    own = module.encoder.head.project(maps)[16]
    torch.testing.assert_close(module.encoder.head.combine({16: own}).shape, embedding.shape)
    weight = data.weight.reshape(4, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).flatten(3)  # (B, h, w, 16)
    flow = data.flow.reshape(4, 2, 4, 4, 4, 4).permute(0, 1, 2, 4, 3, 5).flatten(4)
    mean = (flow * weight[:, None]).sum(-1) / weight.sum(-1)[:, None].clamp(min=1e-9)
    target = mean, weight.mean(-1)
    torch.testing.assert_close(pool_flow(data.flow, data.weight, 4), target)
    second = module.deep(own)
    expected = module.loss(second, *target) + 0.5 * module.ridge(second, *target)
    torch.testing.assert_close(deep, expected.detach())
    main = module.loss(embedding, data.flow, data.weight) + 0.5 * ridge
    torch.testing.assert_close(loss, main + 0.7 * deep)
    expected.backward()
    projections = module.encoder.head.projections
    assert [k for k, p in projections.items() if gradients(p)] == ["16"]


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_resnet"])
def test_checkpointed_activations_give_the_same_gradient(name):
    plain, cheap = objective(name), objective(name)
    checkpoint_activations(cheap.encoder, torch.zeros(1, 3, 32, 32))
    cheap.train()
    for module in (plain, cheap):
        module(*batch())[0].backward()
    found = gradients(cheap)
    assert found.keys() == gradients(plain).keys()
    for key, expected in gradients(plain).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)


def test_a_backbone_that_keeps_its_activations_is_refused():
    encoder = create_encoder("test_resnet", 8, 16)
    encoder.backbone.set_grad_checkpointing = lambda enable: None
    with pytest.raises(ValueError, match="no memory saved"):
        checkpoint_activations(encoder, torch.zeros(1, 3, 32, 32))

    def refuse(enable=True):
        raise AssertionError("gradient checkpointing not supported")

    encoder.backbone.set_grad_checkpointing = refuse
    with pytest.raises(ValueError, match="test_resnet cannot"):
        checkpoint_activations(encoder, torch.zeros(1, 3, 32, 32))


def test_float16_trains_with_a_scaled_loss():
    module = objective(amp=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    results = [one_step(module, scaler=scaler) for _ in range(40)]
    taken = [result.taken for result in results]
    assert not taken[0]
    assert taken[-1]
    assert taken == sorted(taken)  # the scale falls until gradients fit
    assert all(math.isfinite(result.loss) for result in results)
    exact = objective()
    one_step(exact)
    found, expected = gradients(module), gradients(exact)
    large = max(expected, key=lambda name: float(expected[name].norm()))
    torch.testing.assert_close(found[large], expected[large], rtol=0.1, atol=2e-2)


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    module = Objective(create_encoder("test_resnet", 8, 16), CrossPixelFlowLoss(), None).train()
    before = copy.deepcopy(module.state_dict())
    data = batch()
    data.flow[1, 0, 3, 3] = math.nan
    data.weight[1, 3, 3] = 1
    result = one_step(module, data=data, rate=0.1)
    assert not result.taken
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert one_step(module, rate=0.1).taken
    assert any(not torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_average_is_the_weighted_mean_of_what_was():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = copy.deepcopy(module)
    shadow = Shadow(module.state_dict().values(), average.state_dict().values())
    expected = {k: v.clone().double() for k, v in module.state_dict().items()}
    for step in range(20):
        for value in [*module.parameters(), *module.buffers()]:
            value.data.add_(1 if value.dtype == torch.int64 else torch.randn_like(value))
        update_average(shadow, 0.8, step)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert value == module.state_dict()[name] == 20


def test_the_average_is_what_is_saved(store, tmp_path):
    run = pretrain(tiny(store, tmp_path, ema=0.5, steps=4))
    state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
    saved = load_file(run / "encoder" / "model.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, state["average"][f"backbone.{name}"])
    assert any(not torch.equal(v, state["encoder"][f"backbone.{k}"]) for k, v in saved.items())


def test_crops_grow_in_steps_and_examples_depend_on_their_number_alone(store):
    data, train = (
        DataConfig(str(store), crop=128, start_crop=64),
        TrainConfig(steps=30, batch_size=2),
    )
    config = Config(data=data, train=train)
    sides = [crop_side(config, step) for step in range(30)]
    assert sides == [64] * 10 + [96] * 10 + [128] * 10
    assert {crop_side(replace(config, data=DataConfig(crop=128)), s) for s in range(30)} == {128}
    task = FlowTask(config)
    pairs, again = (task.examples(store) for _ in range(2))
    encoder = create_encoder("test_resnet", 8, 16)
    windows = collate([pairs[k] for k in (41, 7, 20)])
    same = collate([again[k] for k in (41, 7, 20)])
    for side in (64, 128):
        batch = task.batch(windows, side, encoder)
        assert batch.images.shape[-2:] == (side, side)
        assert batch.flow.shape[-2:] == batch.weight.shape[-2:] == (side // 4, side // 4)
        for first, second in zip(batch, task.batch(same, side, encoder), strict=True):
            assert torch.equal(first, second)


def test_processes_share_each_global_batch():
    config = Config(train=TrainConfig(steps=5, batch_size=6))
    shares = [list(Share(config, World(CPU, rank, 3), 2)) for rank in range(3)]
    together = [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)]
    assert together == list(Share(config, World(CPU), 2))
    assert together[0] == [12, 13, 14, 15, 16, 17]
    assert len(together) == 3


def test_trying_a_step_leaves_no_trace_but_freezes_what_is_not_needed():
    torch.manual_seed(0)
    config = Config(data=DataConfig(crop=64, start_crop=32))
    module = Objective(create_encoder("test_convnext", 8, 16), CrossPixelFlowLoss(), None)
    before = copy.deepcopy(module.state_dict())
    try_step(config, module, [FlowTask(config).trial(2, side, CPU) for side in (32, 64)])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.backbone.head.norm.weight", "encoder.backbone.head.norm.bias"]
    assert all(p.grad is None for p in module.parameters())


def test_seeds_of_all_steps_and_processes_differ_and_fit_in_64_bits(store, tmp_path):
    small = Config(seed=3)
    assert step_seed(small, 5, 7) == (3 * 1_000_003 + 5) * 65536 + 7
    large = Config(seed=2**63 - 1)
    seeds = {step_seed(large, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    pretrain(replace(tiny(store, tmp_path, steps=1), seed=2**63 - 1))


class Threads(torch.utils.data.Dataset):
    """Examples that are mirrored where OpenCV has one thread."""

    def __getitem__(self, k):
        frame, flow = torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 2).half()
        return Window(frame, flow, cv2.getNumThreads() == 1, np.eye(3, 4))


def test_processes_that_read_use_one_thread_each_and_end_whatever_happens():
    config = Config(data=DataConfig(workers=1), train=TrainConfig(steps=9, batch_size=2))
    loader = make_loader(config, Threads(), collate, World(CPU), 0)
    with pytest.raises(KeyboardInterrupt), reading(loader) as batches:
        assert next(batches).flip.all()
        raise KeyboardInterrupt
    assert not multiprocessing.active_children()  # Python would wait for them at its exit


def test_a_run_can_checkpoint_its_activations(store, tmp_path, finished, monkeypatch):
    calls = []
    real = loop.checkpoint_activations
    monkeypatch.setattr(loop, "checkpoint_activations", lambda *a: calls.append(1) or real(*a))
    run = pretrain(tiny(store, tmp_path, checkpoint_activations=True))
    assert calls
    for row, expected in zip(lines(run), lines(finished), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_compile_is_asked_for_in_place(store, tmp_path, finished, monkeypatch):
    real, calls = torch.compile, []

    def eager(function, *args, **kwargs):
        calls.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    run = pretrain(tiny(store, tmp_path, compile=True, steps=2))
    assert calls
    assert lines(run)[0]["loss"] == pytest.approx(lines(finished)[0]["loss"], rel=2e-2)
