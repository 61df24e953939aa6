"""The fused kernels against the dense reference in float64; interpreted where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the fused kernels need the package triton")

from ssl_flow.losses import CrossPixelFlowLoss, chunked, triton_pairwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBJECTIVES = [
    ("cross_entropy", "exclude"),
    ("cross_entropy", "subtract_identity"),
    ("kernel_alignment", "exclude"),
    ("regression", "exclude"),
]
# (B, D, H, W): one tile, ragged tiles, several; channels below, at and above the kernels' widths.
SHAPES = [
    (2, 4, 1, 5),
    (1, 16, 8, 8),
    (2, 5, 9, 15),
    (2, 32, 5, 13),
    (1, 70, 6, 11),
    (1, 256, 4, 9),
]


def _inputs(b, d, h, w, weighted=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(h * 100 + w)
    e = torch.randn(b, d, h, w, generator=g).to(dtype)
    f = torch.randn(b, 2, h, w, generator=g).to(dtype)
    weight = torch.rand(b, h, w, generator=g).to(dtype)
    weight[torch.rand(b, h, w, generator=g) < 0.3] = 0
    weight = weight if weighted else None
    return tuple(t if t is None else t.to(DEVICE) for t in (e, f, weight))


def _results(loss, e, f, weight):
    """Per-image losses, and gradients of a combination of them in e and the scale."""
    e = e.clone().requires_grad_()
    each = loss.per_image(e, f, weight)
    combination = each @ torch.arange(1, len(each) + 1, dtype=each.dtype, device=each.device)
    return [each.detach(), *torch.autograd.grad(combination, [e, *loss.parameters()])]


def _compare(options, e, f, weight, tolerance=2e-6):
    """Each result is the dense one in float64, to ``tolerance`` of that one's length."""
    learn = options.get("objective") != "kernel_alignment"
    found = _results(
        CrossPixelFlowLoss(**options, learn_scale=learn, backend="triton").to(DEVICE), e, f, weight
    )
    dense = CrossPixelFlowLoss(**options, learn_scale=learn, backend="reference").to(DEVICE)
    exact = _results(dense.double(), *(t if t is None else t.double() for t in (e, f, weight)))
    for a, b in zip(found, exact, strict=True):
        limit = tolerance if a.dtype == torch.float32 else 2 * torch.finfo(a.dtype).eps
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-6)
        assert error < limit, (error.item(), a.shape)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_equals_reference(objective, self_pairs, shape, weighted):
    options = {"objective": objective, "self_pairs": self_pairs, "embedding_scale": 0.7}
    _compare(options, *_inputs(*shape, weighted=weighted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_half_precision_inputs(objective, self_pairs, dtype):
    """Of the same rounded inputs the value is as exact; the gradient is rounded to their type."""
    options = {"objective": objective, "self_pairs": self_pairs}
    _compare(options, *_inputs(2, 16, 7, 10, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"embedding_temperature": 1 / 40, "flow_temperature": 1 / 80},  # the sharpest allowed
        {"embedding_temperature": 1.0, "embedding_scale": 0.25, "flow_sigma": 0.06},
        {"embedding_temperature": 5.0, "flow_temperature": 3.0, "flow_sigma": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("self_pairs", ["exclude", "subtract_identity"])
def test_temperatures(options, self_pairs):
    # Exponents up to 58 carry their rounding into the powers: 58 * 2^-24 * a few.
    _compare({**options, "self_pairs": self_pairs}, *_inputs(1, 16, 9, 9), tolerance=2e-5)


@pytest.mark.parametrize("unit", [1e-12, 1e-3, 1e9])
@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_weights_of_any_unit(objective, self_pairs, unit):
    e, f, weight = _inputs(2, 8, 7, 10)
    weight[0, 0, :5] *= 1e-4  # far below the others: float16 products must still see them
    _compare({"objective": objective, "self_pairs": self_pairs}, e, f, weight * unit)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_motion_common_to_all_pixels_costs_no_precision(offset):
    e, f, weight = _inputs(1, 8, 7, 10)
    f = (f * 1024).round() / 1024  # so that the sum with the offset is exact
    _compare({}, e, f + offset, weight)


def test_huge_flow_is_finite():
    e, f, weight = _inputs(1, 4, 3, 3)
    f[0, :, 0, 0], f[0, :, 1, 1] = 3e38, -3e38
    weight[:] = 1
    _compare({}, e, f, weight)


@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_memory_layout_does_not_matter(objective, self_pairs):
    """Batches that are the innermost dimension in memory give what contiguous ones give."""
    tensors = _inputs(3, 8, 6, 7)
    strange = [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in tensors]
    loss = CrossPixelFlowLoss(objective, self_pairs=self_pairs, backend="triton").to(DEVICE)
    for weighted in (True, False):
        a, b = (_results(loss, *ts[:2], ts[2] if weighted else None) for ts in (tensors, strange))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_same_bits_every_time():
    e, f, weight = _inputs(2, 16, 9, 15)
    loss = CrossPixelFlowLoss(backend="triton", learn_scale=True).to(DEVICE)
    first, second = (_results(loss, e, f, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What the rest of PyTorch sees.


def _operator_arguments(grad=True):
    e, f, weight = _inputs(2, 8, 5, 7)
    rows, flow = (t.flatten(2).transpose(1, 2).contiguous() for t in (e, f))
    rows = F.normalize(rows, dim=-1).requires_grad_(grad)
    scale = torch.tensor(0.7, device=DEVICE, requires_grad=grad)
    return rows, scale, flow, weight.flatten(1)


@pytest.mark.parametrize("exclude", [True, False])
def test_opcheck(exclude):
    e, scale, flow, weight = _operator_arguments()
    options = (0.1, 0.5, 0.1, exclude)
    check = torch.library.opcheck
    flow = flow.transpose(0, 1).contiguous().transpose(0, 1)  # strides must not matter
    weight = weight.t().contiguous().t()
    check(triton_pairwise._cross_entropy, (e, scale, flow, weight, *options))
    e, scale, flow, weight = _operator_arguments(grad=False)
    check(triton_pairwise._gaussian_products, (e, flow, weight, 0.5))
    _, z, y = triton_pairwise._cross_entropy(e, scale, flow, weight, *options)
    arguments = (torch.ones(2, device=DEVICE), e, scale, flow, weight, z, y, *options)
    check(triton_pairwise._cross_entropy_gradient, arguments)


class _Model(torch.nn.Module):
    """A small embedding network and its loss."""

    def __init__(self, objective="cross_entropy", checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv2d(3, 8, 1)
        learn = objective == "cross_entropy"
        self.loss = CrossPixelFlowLoss(objective, learn_scale=learn, backend="triton")
        self.checkpointed = checkpointed
        self.to(DEVICE)

    def forward(self, image, flow):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self._loss, image, flow, use_reentrant=False)
        return self._loss(image, flow)

    def _loss(self, image, flow):
        return self.loss(self.embed(image), flow)


def _gradients(model, *inputs):
    model(*inputs).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("objective", ["cross_entropy", "kernel_alignment"])
def test_compiled_in_one_graph(objective):
    inputs = torch.randn(2, 3, 5, 7, device=DEVICE), torch.randn(2, 2, 5, 7, device=DEVICE)
    expected = _gradients(_Model(objective), *inputs)
    compiled = torch.compile(_Model(objective), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_gradients(compiled, *inputs), expected)


def test_activation_checkpointing():
    inputs = torch.randn(2, 3, 5, 7, device=DEVICE), torch.randn(2, 2, 5, 7, device=DEVICE)
    expected = _gradients(_Model(), *inputs)
    assert all(
        torch.equal(a, b)
        for a, b in zip(_gradients(_Model(checkpointed=True), *inputs), expected, strict=True)
    )


def test_autocast():
    inputs = torch.randn(2, 3, 5, 7, device=DEVICE), torch.randn(2, 2, 5, 7, device=DEVICE)
    model = _Model()
    with torch.autocast(DEVICE, torch.bfloat16):
        value = model(*inputs)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, _Model()(*inputs), rtol=1e-2, atol=1e-2)
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in model.parameters())


def test_distributed_data_parallel(tmp_path):
    inputs = torch.randn(2, 3, 5, 7, device=DEVICE), torch.randn(2, 2, 5, 7, device=DEVICE)
    expected = _gradients(_Model(), *inputs)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(_Model())
        torch.testing.assert_close(_gradients(model, *inputs), expected)
    finally:
        torch.distributed.destroy_process_group()


class _LargestTensor(TorchDispatchMode):
    """Watches the numbers of the largest tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in tensors)])
        return out


def test_nothing_quadratic_is_allocated():
    """Of N = 576 pixels no tensor has more than N times a few numbers, inside operators too."""
    names = ("_cross_entropy", "_cross_entropy_gradient", "_gaussian_products")
    sums, gradient, products = (getattr(triton_pairwise, name)._init_fn for name in names)
    e, f, weight = _inputs(1, 4, 24, 24)
    rows, flow = (t.flatten(2).transpose(1, 2) for t in (F.normalize(e, dim=1), f))
    weight = weight.flatten(1)
    scale, options = torch.tensor(1.0, device=DEVICE), (0.1, 0.5, 0.1, True)
    with _LargestTensor() as largest:
        _, z, y = sums(rows, scale, flow, weight, *options)
        gradient(torch.ones(1, device=DEVICE), rows, scale, flow, weight, z, y, *options)
        products(rows, flow, weight, 0.5)
    assert 576 * 16 <= largest.numbers <= 576 * 64  # far from 576 * 576


# Errors.


def test_refuses_what_it_cannot_compute():
    loss = CrossPixelFlowLoss(backend="triton")
    e, f, _ = _inputs(1, 257, 2, 2)
    with pytest.raises(ValueError, match="at most 256 channels, found 257: use backend='chunked'"):
        loss(e, f)
    with pytest.raises(ValueError, match=r"half precision, found torch\.float64"):
        loss(e[:, :4].double(), f)
    assert CrossPixelFlowLoss()(e, f).isfinite()  # auto knows where to turn
    assert CrossPixelFlowLoss()(e[:, :4].double(), f).dtype == torch.float64


_ON_CPU = """
import torch
from ssl_flow.losses import CrossPixelFlowLoss
e, f = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 3, 3)
CrossPixelFlowLoss()(e, f)
try:
    CrossPixelFlowLoss(backend="triton")(e, f)
except ValueError as error:
    print(error)
"""


def test_never_falls_back_silently_on_a_cpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _ON_CPU], capture_output=True, text=True, check=True, env=environment
    )
    assert "runs on CUDA devices" in run.stdout
    assert "found cpu: use backend='chunked'" in run.stdout


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ssl_flow.losses.cross_pixel._HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package triton.*pip install triton"):
        CrossPixelFlowLoss(backend="triton")


def test_has_the_interface_of_the_other_back_ends():
    for name in ("cross_entropy", "target_entropy", "inner_products"):
        assert callable(getattr(triton_pairwise, name)) and callable(getattr(chunked, name))
