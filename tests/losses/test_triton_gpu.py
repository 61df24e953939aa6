"""The fused kernels at real sizes on a GPU: against the tiled loss in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need the package triton")

from ssl_flow.losses import CrossPixelFlowLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OBJECTIVES = [
    ("cross_entropy", "exclude"),
    ("cross_entropy", "subtract_identity"),
    ("kernel_alignment", "exclude"),
    ("regression", "exclude"),
]


def _inputs(b, d, h, w, dtype=torch.float32):
    g = torch.Generator("cuda").manual_seed(h * 100 + w)
    e = torch.randn(b, d, h, w, generator=g, device="cuda").to(dtype)
    f = torch.randn(b, 2, h, w, generator=g, device="cuda")
    weight = torch.rand(b, h, w, generator=g, device="cuda")
    return e, f, weight * (torch.rand(b, h, w, generator=g, device="cuda") < 0.7)


def _results(loss, e, f, weight):
    e = e.clone().requires_grad_()
    each = loss.per_image(e, f, weight)
    combination = each @ torch.arange(1, len(each) + 1, dtype=each.dtype, device="cuda")
    return [each.detach(), *torch.autograd.grad(combination, [e, *loss.parameters()])]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 16, 56, 56), (2, 16, 57, 55), (2, 64, 56, 56), (1, 128, 40, 41), (1, 256, 33, 33)]
)
@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_equals_chunked_in_float64(objective, self_pairs, shape, dtype, weighted):
    e, f, weight = _inputs(*shape, dtype)
    weight = weight if weighted else None
    options = {"objective": objective, "self_pairs": self_pairs}
    options["learn_scale"] = objective != "kernel_alignment"
    found = _results(CrossPixelFlowLoss(**options).cuda(), e, f, weight)
    exact = _results(
        CrossPixelFlowLoss(**options, backend="chunked").cuda().double(),
        e.double(),
        f.double(),
        None if weight is None else weight.double(),
    )
    for a, b in zip(found, exact, strict=True):
        limit = 1e-5 if a.dtype == torch.float32 else 2 * torch.finfo(a.dtype).eps
        assert (a.double() - b).norm() / b.norm() < limit


@pytest.mark.parametrize("self_pairs", ["exclude", "subtract_identity"])
def test_target_entropy(self_pairs):
    _, f, weight = _inputs(4, 1, 56, 57)
    found = CrossPixelFlowLoss(self_pairs=self_pairs).target_entropy(f, weight)
    tiled = CrossPixelFlowLoss(self_pairs=self_pairs, backend="chunked")
    exact = tiled.target_entropy(f.double(), weight.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_same_bits_every_time(objective, self_pairs):
    e, f, weight = _inputs(8, 16, 56, 56)
    loss = CrossPixelFlowLoss(objective, self_pairs=self_pairs).cuda()
    first = _results(loss, e, f, weight)
    for _ in range(5):
        again = _results(loss, e, f, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_images_of_224_pixels_side():
    """N = 50176: 2.5e9 pairs an image; what the last image gives, it gives alone too."""
    e, f, weight = _inputs(8, 16, 224, 224)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    each, gradient = _results(CrossPixelFlowLoss(), e, f, weight)
    assert torch.cuda.max_memory_allocated() - before < 40 * e.nbytes
    value, alone = _results(CrossPixelFlowLoss(), e[7:], f[7:], weight[7:])
    torch.testing.assert_close(each[7:], value, rtol=1e-6, atol=0)
    atol = 1e-6 * alone.abs().max().item()
    torch.testing.assert_close(gradient[7:] / 8, alone, rtol=1e-6, atol=atol)


@pytest.mark.parametrize(("objective", "self_pairs"), OBJECTIVES)
def test_smooth_scene_of_224_pixels_side(objective, self_pairs):
    """All terms of a row's sum have one sign: rounding that leans one way would add up."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 224, device="cuda")] * 2, indexing="ij")
    inside = (x**2 + y**2 < 0.3).float()
    f = torch.stack([2 * inside + 0.1 * x, 0.2 * y])[None]
    e = torch.stack([1 - inside, inside, 0.1 * x, 0.1 * y])[None]
    options = {"objective": objective, "self_pairs": self_pairs}
    found = _results(CrossPixelFlowLoss(**options), e, f, None)
    tiled = CrossPixelFlowLoss(**options, backend="chunked")
    exact = _results(tiled, e.double(), f.double(), None)
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("objective", ["cross_entropy", "kernel_alignment", "regression"])
def test_no_wait_for_the_device(objective):
    """NaN in, NaN out, without a synchronisation."""
    e, f, weight = _inputs(2, 16, 56, 56)
    e[0, 0, 0, 0], weight[0, 0, 0] = torch.nan, 1
    loss = CrossPixelFlowLoss(objective, learn_scale=objective != "kernel_alignment").cuda()

    def run():
        if objective == "cross_entropy":
            loss.target_entropy(f, weight)
        return _results(loss, e, f, weight)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        each, gradient, *_ = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert each[0].isnan() and each[1].isfinite()
    assert gradient[0].isnan().any() and gradient[1].isfinite().all()


def test_compiled_with_inductor():
    e, f, weight = _inputs(2, 16, 28, 28)
    loss = CrossPixelFlowLoss()
    compiled = torch.compile(loss, fullgraph=True)
    eager, inductor = (_gradient(g, e, f, weight) for g in (loss, compiled))
    torch.testing.assert_close(inductor, eager, rtol=1e-4, atol=1e-7)


def _gradient(function, e, f, weight):
    e = e.clone().requires_grad_()
    function(e, f, weight).backward()
    return e.grad
