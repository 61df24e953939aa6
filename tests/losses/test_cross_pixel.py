"""The loss module: what its options change, what it refuses, what it ignores."""

import importlib.util
import math

import pytest
import torch

from ssl_flow.losses import CrossPixelFlowLoss

OBJECTIVES = [
    ("cross_entropy", "exclude"),
    ("cross_entropy", "subtract_identity"),
    ("kernel_alignment", "exclude"),
    ("regression", "exclude"),
]
# Interpreted; where there is a GPU these tensors on the CPU aren't for it.
TRITON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
BACKENDS = ["chunked", "reference", *["triton"] * TRITON]
each_loss = pytest.mark.parametrize(
    "options",
    [
        {"objective": o, "self_pairs": s, "backend": b, "embedding_scale": 0.7}
        for o, s in OBJECTIVES
        for b in BACKENDS
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)


def _inputs(b=2, d=4, h=5, w=7, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(b, d, h, w, generator=g, dtype=dtype)
    f = torch.randn(b, 2, h, w, generator=g, dtype=dtype)
    weight = torch.rand(b, h, w, generator=g, dtype=dtype)
    return e, f, weight * (torch.rand(b, h, w, generator=g) < 0.7)


def _precise(backend):
    """The most precise type of a back end, and the tolerance to compare its results with."""
    if backend == "triton":
        return torch.float32, {"rtol": 1e-5, "atol": 3e-6}
    return torch.float64, {"rtol": 1e-12, "atol": 1e-12}


# What the options change.


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "kernel_alignment"},
        {"objective": "regression"},
        {"embedding_scale": 0.5},
        {"embedding_temperature": 0.2},
        {"flow_sigma": 1.0},
        {"flow_temperature": 0.2},
        {"self_pairs": "subtract_identity"},
    ],
    ids=str,
)
def test_option_changes_the_value(change):
    e, f, weight = _inputs()
    default, changed = CrossPixelFlowLoss(), CrossPixelFlowLoss(**change)
    assert (changed(e, f, weight) - default(e, f, weight)).abs() > 1e-3


def test_options_of_the_other_objectives():
    e, f, _ = _inputs()
    alignment, regression = ("kernel_alignment", "regression")
    assert CrossPixelFlowLoss(regression)(e, f) != CrossPixelFlowLoss(regression, 0.5)(e, f)
    for objective in (alignment, regression):
        one, other = (CrossPixelFlowLoss(objective, flow_sigma=s)(e, f) for s in (0.5, 1.0))
        assert one != other
        # Temperatures mean nothing here, so cross-entropy's bounds don't apply.
        CrossPixelFlowLoss(objective, 3.0, embedding_temperature=0.001, flow_temperature=0.001)
    torch.testing.assert_close(
        CrossPixelFlowLoss(alignment)(e, f), CrossPixelFlowLoss(alignment, 0.5)(e, f)
    )


def test_learn_scale_makes_a_parameter_that_learns():
    e, f, _ = _inputs()
    assert not list(CrossPixelFlowLoss().parameters())
    for objective in ("cross_entropy", "regression"):
        loss = CrossPixelFlowLoss(objective, 0.5, learn_scale=True)
        assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
        assert loss.scale.item() == pytest.approx(0.5)
        torch.testing.assert_close(loss(e, f), CrossPixelFlowLoss(objective, 0.5)(e, f))
        loss(e, f).backward()
        assert loss.log_scale.grad != 0


def test_learned_scale_stays_in_bounds_and_can_come_back():
    e, f, _ = _inputs()
    loss = CrossPixelFlowLoss(embedding_temperature=0.1, learn_scale=True)
    for far, bound in ((50.0, 4.0), (-50.0, 1e-4)):
        torch.nn.init.constant_(loss.log_scale, far)
        assert loss.scale.item() == pytest.approx(bound, rel=1e-5)
        loss.log_scale.grad = None
        loss(e, f).backward()
        assert loss.log_scale.grad.isfinite() and loss.log_scale.grad != 0


def test_backend_is_the_one_asked_for(monkeypatch):
    from ssl_flow.losses import chunked, reference

    for module, name in ((chunked, "chunked"), (reference, "reference")):
        monkeypatch.setattr(
            module, "cross_entropy", lambda *a, name=name: torch.tensor([len(name)])
        )
    e, f, _ = _inputs()
    for backend, length in (("chunked", 7), ("reference", 9), ("auto", 7)):
        assert CrossPixelFlowLoss(backend=backend)(e, f.float()) == length


def test_repr_tells_the_options():
    shown = repr(CrossPixelFlowLoss(flow_sigma=0.25, self_pairs="subtract_identity"))
    for option in ("'cross_entropy'", "backend='auto'", "flow_sigma=0.25", "exclude=False"):
        assert option in shown


# What the loss means.


@each_loss
def test_batch_is_the_mean_of_its_halves(options):
    dtype, close = _precise(options["backend"])
    e, f, weight = _inputs(b=4, dtype=dtype)
    loss = CrossPixelFlowLoss(**options)
    whole, halves = e.clone().requires_grad_(), e.clone().requires_grad_()
    loss(whole, f, weight).backward()
    for part in (slice(0, 2), slice(2, 4)):
        (loss(halves[part], f[part], weight[part]) / 2).backward()
    torch.testing.assert_close(whole.grad, halves.grad, **close)
    torch.testing.assert_close(loss(e, f, weight), loss.per_image(e, f, weight).mean())


@each_loss
def test_length_of_the_embedding_and_order_of_pixels_do_not_matter(options):
    dtype, close = _precise(options["backend"])
    e, f, weight = _inputs(dtype=dtype)
    loss = CrossPixelFlowLoss(**options)
    expected = loss(e, f, weight)
    torch.testing.assert_close(loss(7 * e, f, weight), expected, **close)
    torch.testing.assert_close(loss(e.flip(-1), f.flip(-1), weight.flip(-1)), expected, **close)
    channels_last = e.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss(channels_last, f, weight), expected, **close)


@each_loss
def test_ignored_pixels_are_as_if_absent(options):
    dtype, close = _precise(options["backend"])
    e, f, _ = _inputs(h=1, w=12, dtype=dtype)
    weight = torch.ones(2, 1, 12, dtype=dtype)
    weight[..., 9:] = 0
    loss = CrossPixelFlowLoss(**options)
    torch.testing.assert_close(loss(e, f, weight), loss(e[..., :9], f[..., :9]), **close)


@pytest.mark.parametrize("self_pairs", ["exclude", "subtract_identity"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence(self_pairs, backend):
    """L - H is at least 0, and 0 where the two kernels are equal: here both are 0 or 1."""
    dtype, close = _precise(backend)
    e, f, weight = _inputs(dtype=dtype)
    loss = CrossPixelFlowLoss(self_pairs=self_pairs, backend=backend)
    assert (loss.per_image(e, f, weight) > loss.target_entropy(f, weight)).all()
    group = torch.arange(35).reshape(1, 5, 7) % 2
    e = torch.stack([group, 1 - group], 1).to(dtype)
    f = 100 * e
    divergence = loss.per_image(e, f, weight[:1]) - loss.target_entropy(f, weight[:1])
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), **close)


@each_loss
def test_constant_loss(options):
    e, f, weight = _inputs()
    loss = CrossPixelFlowLoss(**options)
    constant = loss.constant_loss(f, weight)
    torch.testing.assert_close(constant, loss.per_image(torch.ones_like(e), f, weight))
    assert not constant.requires_grad
    if options["objective"] == "cross_entropy" and options["self_pairs"] == "exclude":
        torch.testing.assert_close(loss.constant_loss(f), torch.full((2,), math.log(34)))


# Precision.


@each_loss
def test_half_precision_inputs_are_computed_in_float32(options):
    e, f, weight = (t.bfloat16() for t in _inputs())
    loss = CrossPixelFlowLoss(**options)
    half, single = e.clone().requires_grad_(), e.float().requires_grad_()
    a, b = loss(half, f, weight), loss(single, f.float(), weight.float())
    a.backward(), b.backward()
    assert a.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(half.grad, single.grad.bfloat16())


@each_loss
def test_autocast_does_not_lower_the_precision(options):
    e, f, weight = _inputs()
    loss = CrossPixelFlowLoss(**options)
    inside, outside = e.clone().requires_grad_(), e.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        a = loss(inside, f, weight)
        if options["backend"] != "reference":
            a.backward()
    if options["backend"] == "reference":
        a.backward()  # dense autograd: backward belongs outside autocast, as PyTorch recommends
    b = loss(outside, f, weight)
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(inside.grad, outside.grad)


def test_result_dtype_is_the_embeddings():
    e, f, weight = _inputs()
    assert CrossPixelFlowLoss()(e.double(), f, weight).dtype == torch.float64
    assert CrossPixelFlowLoss()(e, f.double(), weight.double()).dtype == torch.float32
    assert CrossPixelFlowLoss().target_entropy(f.half()).dtype == torch.float32


# Bad values.


@each_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_under_weight_zero_change_nothing(options, bad):
    e, f, weight = _inputs()
    weight[:, 1, 2] = 0
    loss = CrossPixelFlowLoss(**options)
    clean = e.clone().requires_grad_()
    expected = loss(clean, f, weight)
    expected.backward()
    e[:, :, 1, 2], f[:, 1, 1, 2] = bad, bad
    found = loss(e.requires_grad_(), f, weight)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(e.grad, clean.grad, rtol=0, atol=0)
    assert (e.grad.movedim(1, -1)[weight == 0] == 0).all()
    assert loss.constant_loss(f, weight).isfinite().all()


@each_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["embedding", "flow", "weight"])
def test_bad_values_under_a_weight_give_nan_for_that_image(options, bad, which):
    e, f, weight = _inputs()
    weight[0, 1, 2] = 1
    (e if which == "embedding" else f)[0, 0, 1, 2] = 0 if which == "weight" else bad
    if which == "weight":
        weight[0, 1, 2] = bad
    loss = CrossPixelFlowLoss(**options)
    each = loss.per_image(e.requires_grad_(), f, weight)
    assert each[0].isnan() and each[1].isfinite()
    each.sum().backward()
    assert e.grad[0][:, weight[0] != 0].isnan().all() and e.grad[1].isfinite().all()


@each_loss
def test_negative_weight_gives_nan(options):
    e, f, weight = _inputs()
    weight[1, 0, 0] = -1e-3
    loss = CrossPixelFlowLoss(**options)
    assert loss.per_image(e, f, weight).isnan().tolist() == [False, True]
    assert loss.constant_loss(f, weight).isnan().tolist() == [False, True]
    if options["objective"] == "cross_entropy":
        assert loss.target_entropy(f, weight).isnan().tolist() == [False, True]


@each_loss
@pytest.mark.parametrize("weighted", [0, 1])
def test_image_without_pairs_counts_zero(options, weighted):
    e, f, weight = _inputs()
    weight[0] = 0
    weight[0, 2, 3] = 0.3 * weighted
    e.requires_grad_()
    learn = options["objective"] != "kernel_alignment"
    loss = CrossPixelFlowLoss(**options, learn_scale=learn)
    each = loss.per_image(e, f, weight)
    assert each[0] == 0 and each[1] != 0
    torch.testing.assert_close(loss(e, f, weight), each[1] / 2)
    (gradient,) = torch.autograd.grad(loss(e, f, weight), e)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()
    alone = loss(e[:1], f[:1], weight[:1])
    gradients = torch.autograd.grad(alone, [e, *loss.parameters()])
    assert all((g == 0).all() for g in gradients)
    if not weighted:
        assert loss.constant_loss(f, weight)[0] == 0
    if options["objective"] == "cross_entropy":
        assert loss.target_entropy(f, weight)[0] == 0


@each_loss
def test_single_pixel_and_zero_embedding(options):
    loss = CrossPixelFlowLoss(**options)
    e = torch.randn(2, 3, 1, 1, requires_grad=True)
    one = loss(e, torch.zeros(2, 2, 1, 1))
    one.backward()
    assert one == 0 and (e.grad == 0).all()
    e, f, weight = _inputs()
    e[0, :, 0, 0] = 0
    value = loss(e.requires_grad_(), f, weight)
    value.backward()
    assert value.isfinite() and e.grad.isfinite().all()


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "entropy"}, "objective must be one of cross_entropy.*'entropy'"),
        ({"self_pairs": "keep"}, "self_pairs must be one of"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, chunked, reference"),
        ({"embedding_scale": 0.0}, "embedding_scale must be a positive"),
        ({"embedding_temperature": -1.0}, "embedding_temperature must be a positive"),
        ({"flow_sigma": math.nan}, "flow_sigma must be a positive"),
        ({"flow_temperature": math.inf}, "flow_temperature must be a positive"),
        ({"embedding_scale": 4.1}, "must be at most 80, found 82 and 10"),
        ({"flow_temperature": 0.012}, "must be at most 80, found 20 and 83"),
        ({"objective": "regression", "self_pairs": "subtract_identity"}, "is for objective="),
        ({"objective": "kernel_alignment", "learn_scale": True}, "learn_scale=True has no effect"),
    ],
    ids=str,
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        CrossPixelFlowLoss(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e, f, w: (e[0], f, w), ValueError, r"embedding must be \(B, channels, H, W\)"),
        (lambda e, f, w: (e, f[0], w), ValueError, "flow must be"),
        (lambda e, f, w: (e, f, w[:, None]), ValueError, r"weight must be \(B, H, W\)"),
        (lambda e, f, w: (e[:, :0], f, w), ValueError, "not empty"),
        (lambda e, f, w: (e, f[:, :1], w), ValueError, "flow must have 2 channels"),
        (lambda e, f, w: (e, f[0, 0, 0]), ValueError, r"flow must be \(B, channels, H, W\)"),
        (lambda e, f, w: (e, f[:, :0]), ValueError, "flow must be .* not empty"),
        (lambda e, f, w: (e, f[:1], w), ValueError, "embedding and flow must agree in B, H and W"),
        (lambda e, f, w: (e, f[..., 1:], w), ValueError, "must agree"),
        (lambda e, f, w: (e, f, w[:, 1:]), ValueError, "weight and flow must agree"),
        (lambda e, f, w: (e.long(), f, w), TypeError, "embedding must be floating.*int64"),
        (lambda e, f, w: (e, f.int(), w), TypeError, "flow must be floating.*int32"),
        (lambda e, f, w: (e, f, w > 0), TypeError, "weight must be floating.*bool"),
        (lambda e, f, w: (e, f.to("meta"), w), ValueError, "one device, found cpu and meta"),
        (lambda e, f, w: (e, f, w.to("meta")), ValueError, "one device"),
        (lambda e, f, w: (e, f.requires_grad_(), w), ValueError, "flow gets no gradient"),
        (lambda e, f, w: (e, f, w.requires_grad_()), ValueError, "weight gets no gradient"),
    ],
)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        CrossPixelFlowLoss()(*change(*_inputs()))


def test_bad_inputs_for_monitoring():
    loss = CrossPixelFlowLoss()
    _, f, weight = _inputs()
    for function in (loss.target_entropy, loss.constant_loss):
        with pytest.raises(ValueError, match="weight and flow must agree"):
            function(f, weight[:1])
        with pytest.raises(TypeError, match="flow must be floating"):
            function(f.int())
        with pytest.raises(ValueError, match=r"flow must be \(B, channels, H, W\)"):
            function(f[0, 0, 0])
    with pytest.raises(ValueError, match="needs objective='cross_entropy', found 'regression'"):
        CrossPixelFlowLoss("regression").target_entropy(f)
