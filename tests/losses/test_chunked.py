"""The tiled losses against the dense ones, and their memory."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ssl_flow.losses import CrossPixelFlowLoss, chunked

OBJECTIVES = [
    ("cross_entropy", "exclude"),
    ("cross_entropy", "subtract_identity"),
    ("kernel_alignment", "exclude"),
    ("regression", "exclude"),
]
GRIDS = [(1, 1), (1, 2), (5, 7), (4, 8), (3, 11), (9, 16)]  # of tiles of 8 and, the last, of 16


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(chunked, "_CPU_TILE", (8, 2 * 8 * 8))  # two of three images at a time


def _inputs(h, w, dtype, weighted, b=3, d=4):
    g = torch.Generator().manual_seed(h * 100 + w)
    e = torch.randn(b, d, h, w, generator=g, dtype=dtype)
    f = torch.randn(b, 2, h, w, generator=g, dtype=dtype)
    weight = torch.rand(b, h, w, generator=g, dtype=dtype)
    weight = weight * (torch.rand(b, h, w, generator=g) < 0.7)
    return e, f, weight if weighted else None


def _value_and_gradients(loss, e, f, weight):
    """Per-image losses and the gradients of a combination of them in e and the scale."""
    e = e.clone().requires_grad_()
    each = loss.per_image(e, f, weight)
    combination = each @ torch.arange(1, len(each) + 1, dtype=each.dtype)
    parameters = [e, *loss.parameters()]
    return [each.detach(), *torch.autograd.grad(combination, parameters)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_reference(small_tiles, objective, self_pairs, grid, weighted, dtype):
    e, f, weight = _inputs(*grid, dtype, weighted)
    options = {"objective": objective, "self_pairs": self_pairs, "embedding_scale": 0.7}
    options["learn_scale"] = objective != "kernel_alignment"
    results = [
        _value_and_gradients(CrossPixelFlowLoss(**options, backend=b).to(dtype), e, f, weight)
        for b in ("chunked", "reference")
    ]
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-4, 2e-6)
    if dtype == torch.float32 and objective == "kernel_alignment":
        atol = 2e-5  # of two pixels the alignment is 1 or -1: its gradient is 0 by cancellation
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)


@pytest.mark.parametrize("self_pairs", ["exclude", "subtract_identity"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_target_entropy_equals_reference(small_tiles, grid, weighted, self_pairs):
    _, f, weight = _inputs(*grid, torch.float64, weighted)
    options = {"self_pairs": self_pairs, "flow_temperature": 0.2}
    results = [
        CrossPixelFlowLoss(**options, backend=b).target_entropy(f, weight)
        for b in ("chunked", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_gradcheck(small_tiles, objective, self_pairs):
    e, f, weight = _inputs(3, 4, torch.float64, True, b=2, d=3)
    learn = objective != "kernel_alignment"
    loss = CrossPixelFlowLoss(
        objective, 0.7, 0.3, self_pairs=self_pairs, learn_scale=learn, backend="chunked"
    ).double()
    parameters = dict(loss.named_parameters())

    def function(e, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(loss, named, (e, f, weight))

    assert torch.autograd.gradcheck(function, (e.requires_grad_(), *parameters.values()))


def test_only_the_scale_needs_a_gradient():
    e, f, _ = _inputs(5, 7, torch.float64, False)
    loss = CrossPixelFlowLoss(learn_scale=True).double()
    (alone,) = torch.autograd.grad(loss(e, f), loss.log_scale)
    (beside,) = torch.autograd.grad(loss(e.requires_grad_(), f), loss.log_scale)
    torch.testing.assert_close(alone, beside)


def test_sharpest_temperatures_stay_finite_in_float32():
    """The extremes the constructor allows, with all flow equal and N large: exp(80) N overflows."""
    e = F.normalize(torch.randn(1, 3, 100, 100), dim=1).requires_grad_()
    flow = torch.zeros(1, 2, 100, 100)
    loss = CrossPixelFlowLoss("cross_entropy", 1.0, 1 / 40, 0.5, 1 / 80, backend="chunked")
    each = loss.per_image(e, flow)
    each.sum().backward()
    assert each.isfinite().all() and e.grad.isfinite().all()
    torch.testing.assert_close(
        loss.target_entropy(flow), torch.tensor(9999.0).log()[None], rtol=1e-5, atol=0
    )


def test_few_weighted_pixels_among_many():
    """Taking self pairs from sums over all pairs must not lose the pairs that are left."""
    e, f, _ = _inputs(20, 20, torch.float32, False, b=1)
    weight = torch.zeros(1, 20, 20)
    weight[0, 3, 4], weight[0, 9, 1] = 1.0, 1e-4
    for objective in ("kernel_alignment", "regression"):
        a, b = (
            CrossPixelFlowLoss(objective, backend=backend).per_image(e, f, weight)
            for backend in ("chunked", "reference")
        )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def _saved_bytes(objective, side):
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    e, f, _ = _inputs(side, side, torch.float32, False, b=1, d=16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        CrossPixelFlowLoss(objective, backend="chunked")(e.requires_grad_(), f)
    return sum(saved.values())


@pytest.mark.parametrize("objective", ["cross_entropy", "kernel_alignment", "regression"])
def test_bytes_saved_for_backward_grow_linearly(objective):
    small, large = _saved_bytes(objective, 16), _saved_bytes(objective, 32)  # N = 256, 1024
    assert 3.5 < large / small < 4.5
    assert large < 1024 * 16 * 4 * 12  # a dozen tensors the size of the embedding


_MEMORY = """
import json, resource, torch
from ssl_flow.losses import CrossPixelFlowLoss

torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux

def step(side, objective):
    e = torch.randn(1, 16, side, side, requires_grad=True)
    flow = torch.randn(1, 2, side, side)
    loss = CrossPixelFlowLoss(objective, backend="chunked")
    loss(e, flow).backward()
    if objective == "cross_entropy" and side < 128:
        loss.target_entropy(flow)

for objective in ("cross_entropy", "regression"):
    step(32, objective)
growth, start = {}, peak()
for side in (64, 128):  # N = 4096, 16384
    for objective in ("cross_entropy", "regression"):
        step(side, objective)
    growth[side] = peak() - start
print(json.dumps(growth))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory_is_far_below_n_squared():
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True
    )
    growth = json.loads(run.stdout)
    assert growth["64"] < 32  # N x N in float32 would be 64 MiB
    assert growth["128"] < 64  # ... and 1024 MiB
