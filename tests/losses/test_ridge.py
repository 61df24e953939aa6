"""The ridge-regression flow loss against NumPy's least squares, its limits and its refusals."""

import math

import numpy as np
import pytest
import torch

from ssl_flow.losses import RidgeFlowLoss

OPTIONS = [{}, {"ridge": 0.01}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def _inputs(b=2, d=4, h=5, w=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    e = 0.5 + torch.randn(b, d, h, w, generator=g, dtype=dtype)
    f = e[:, :2] - e[:, 2:] ** 2 + 0.3 * torch.randn(b, 2, h, w, generator=g, dtype=dtype)
    weight = torch.rand(b, h, w, generator=g, dtype=dtype)
    return e, f, weight * (torch.rand(b, h, w, generator=g) < 0.7)


# Against NumPy, with nothing of ours: no centring, the penalty as further rows.


def _dense(fit, score, ridge):
    """Summed errors of the regression and of the constant: rows (N, D), (N, 2), (N,) of an image.

    Weighted least squares over [E 1], of which the last column isn't penalised.
    """
    e, f, w = fit
    share = w / w.sum()
    penalty = ridge * (share[:, None] * e**2).sum() / e.shape[1]
    root = np.sqrt(share)[:, None]
    left = np.vstack(
        [root * np.c_[e, np.ones(len(e))], math.sqrt(penalty) * np.eye(*(e.shape[1] + np.r_[0, 1]))]
    )
    right = np.vstack([root * f, np.zeros((e.shape[1], 2))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    e2, f2, w2 = score
    residuals = f2 - np.c_[e2, np.ones(len(e2))] @ solution, f2 - share @ f
    return np.array([w2 @ np.abs(r).sum(1) for r in residuals])


def _rows(e, f, w):
    e, f, w = e.flatten(1).T.numpy(), f.flatten(1).T.numpy(), w.flatten().numpy()
    return e / np.linalg.norm(e, axis=1, keepdims=True), f, w


@each_option
def test_cross_fit_equals_least_squares(options):
    inputs = _inputs()
    loss = RidgeFlowLoss(**options)
    found = loss.per_image(*inputs)
    # Of 35 pixels one of each two neighbours, the same in every image.
    first = (torch.rand(18, generator=torch.Generator().manual_seed(0)) < 0.5).numpy()
    for image in range(2):
        e, f, w = _rows(*(t[image] for t in inputs))
        one = np.stack([first, ~first], 1).ravel()[:35]
        errors = sum(
            _dense((e[a], f[a], w[a]), (e[~a], f[~a], w[~a]), loss.ridge) for a in (one, ~one)
        )
        assert found[image].item() == pytest.approx(errors[0] / errors[1], rel=1e-10)


@each_option
def test_fit_on_another_crop_equals_least_squares(options):
    inputs, other = _inputs(), _inputs(h=4, w=3, seed=1)
    loss = RidgeFlowLoss(**options)
    found = loss.per_image(*inputs, fit=other)
    for image in range(2):
        here = _rows(*(t[image] for t in inputs))
        there = _rows(*(t[image] for t in other))
        error, constant = _dense(there, here, loss.ridge)
        assert found[image].item() == pytest.approx(error / constant, rel=1e-10)


@each_option
def test_gradients(options):
    e, f, weight = _inputs(d=3, h=3, w=4)
    e2, f2, weight2 = _inputs(d=3, h=2, w=4, seed=1)
    loss = RidgeFlowLoss(**options)
    e, e2 = e.requires_grad_(), e2.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.per_image(x, f, weight), e)
    assert torch.autograd.gradcheck(
        lambda x, y: loss.per_image(x, f, weight, fit=(y, f2, weight2)), (e, e2)
    )


# What it means.


@each_option
def test_linear_flow_is_perfect(options):
    e, _, weight = _inputs(h=8)
    loss = RidgeFlowLoss(**{**options, "ridge": 1e-9})
    unit = torch.nn.functional.normalize(e, dim=1)
    f = torch.einsum("cd,bdhw->bchw", torch.randn(2, 4, dtype=e.dtype), unit) + 3
    assert (loss.per_image(e, f, weight) < 1e-6).all()
    assert (loss.per_image(e, f, weight, fit=(e, f, weight)) < 1e-6).all()


@each_option
def test_constant_embedding_learned_nothing(options):
    e, f, weight = _inputs()
    loss = RidgeFlowLoss(**options)
    for constant in (torch.ones_like(e), torch.zeros_like(e)):
        constant.requires_grad_()
        for fit in (None, (constant, f, weight)):
            each = loss.per_image(constant, f, weight, fit=fit)
            torch.testing.assert_close(each, torch.ones_like(each))
            (gradient,) = torch.autograd.grad(each.sum(), constant)
            assert gradient.isfinite().all()


def test_motion_in_small_ripples_of_a_constant_embedding_does_not_count():
    """The penalty is relative to the whole length; relative to the spread both would be 0.1."""
    _, f, _ = _inputs(h=20)
    loss = RidgeFlowLoss()
    one = torch.ones_like(f[:, :1])
    assert loss(torch.cat([f, one], 1), f) < 0.6
    assert loss(torch.cat([f, 100 * one], 1), f) > 0.9


def test_pixels_scored_are_not_those_fitted_on():
    _, f, _ = _inputs(h=6, w=8)
    noise = torch.randn(2, 20, 6, 8, dtype=f.dtype, generator=torch.Generator().manual_seed(3))
    loss = RidgeFlowLoss(ridge=1e-3)
    assert loss(noise, f) > 1.2  # 20 slopes from 24 pixels tell nothing about the others
    assert loss(noise, f, fit=(noise, f, None)) < 0.9


def test_an_image_has_the_same_loss_in_every_batch():
    """So accumulation and several processes compute what one batch does."""
    inputs = _inputs(b=4)
    loss, state = RidgeFlowLoss(), torch.get_rng_state()
    parts = [loss.per_image(*(t[k : k + 1] for t in inputs)) for k in range(4)]
    torch.testing.assert_close(loss.per_image(*inputs), torch.cat(parts))
    assert torch.equal(torch.get_rng_state(), state)


def test_length_of_the_embedding_and_number_of_pixels_do_not_matter():
    e, f, weight = _inputs()
    loss = RidgeFlowLoss()
    torch.testing.assert_close(loss.per_image(1e3 * e, f, weight), loss.per_image(e, f, weight))
    double = [torch.cat([t, t], -1) for t in (e, f, weight)]
    torch.testing.assert_close(
        loss(e, f, weight, fit=double), loss(e, f, weight, fit=(e, f, weight))
    )
    torch.testing.assert_close(
        loss.per_image(e, 5 * f + 2, 3 * weight), loss.per_image(e, f, weight)
    )


def test_batch_is_the_mean_of_its_images():
    e, f, weight = _inputs()
    loss = RidgeFlowLoss()
    torch.testing.assert_close(loss(e, f, weight), loss.per_image(e, f, weight).mean())
    ones = torch.ones_like(weight)
    torch.testing.assert_close(loss.per_image(e, f), loss.per_image(e, f, ones))


def test_gradient_reaches_the_crop_fitted_on_unless_detached():
    e, f, weight = _inputs()
    teacher = e.clone().requires_grad_()
    loss = RidgeFlowLoss()
    e.requires_grad_()
    loss(e, f, weight, fit=(teacher, f, weight)).backward()
    assert teacher.grad.abs().sum() > 0
    teacher.grad = None
    loss(e, f, weight, fit=(teacher.detach(), f, weight)).backward()
    assert teacher.grad is None


# Precision.


def test_half_precision_is_computed_in_float32():
    e, f, weight = (t.bfloat16() for t in _inputs())
    loss = RidgeFlowLoss()
    half, single = e.clone().requires_grad_(), e.float().requires_grad_()
    a, b = (loss.per_image(x, f.to(x.dtype), weight.to(x.dtype)) for x in (half, single))
    a.sum().backward(), b.sum().backward()
    assert a.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(half.grad, single.grad.bfloat16())
    precise = loss.per_image(*(t.double() for t in (e, f, weight)))
    torch.testing.assert_close(a.double(), precise, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_lower_the_precision():
    e, f, weight = (t.float() for t in _inputs())
    loss = RidgeFlowLoss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss.per_image(e, f, weight)
    torch.testing.assert_close(inside, loss.per_image(e, f, weight), rtol=0, atol=0)


# Bad values.


@each_option
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_under_weight_zero_change_nothing(options, bad):
    e, f, weight = _inputs()
    weight[:, 1, 2] = 0
    loss = RidgeFlowLoss(**options)
    expected = loss.per_image(e, f, weight), loss.per_image(e, f, weight, fit=(e, f, weight))
    e[:, :, 1, 2], f[:, 1, 1, 2] = bad, bad
    e.requires_grad_()
    found = loss.per_image(e, f, weight), loss.per_image(e, f, weight, fit=(e, f, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(a.sum(), e)
        assert gradient.isfinite().all()
        assert (gradient.movedim(1, -1)[weight == 0] == 0).all()


@each_option
@pytest.mark.parametrize("which", ["embedding", "flow", "weight", "negative weight"])
@pytest.mark.parametrize("where", ["here", "fit"])
def test_bad_values_under_a_weight_give_nan_for_that_image(options, which, where):
    bad, good = _inputs(), _inputs(seed=1)
    e, f, weight = bad
    weight[0, 1, 2] = {"weight": math.inf, "negative weight": -1.0}.get(which, 1.0)
    if "weight" not in which:
        (e if which == "embedding" else f)[0, 0, 1, 2] = math.nan
    e.requires_grad_()
    loss = RidgeFlowLoss(**options)
    each = loss.per_image(*bad) if where == "here" else loss.per_image(*good, fit=bad)
    assert each[0].isnan() and each[1].isfinite()
    each.sum().backward()
    assert e.grad[0].isnan().any() and e.grad[1].isfinite().all()


@each_option
@pytest.mark.parametrize("weighted", [0, 1])
def test_image_without_usable_pixels_counts_zero(options, weighted):
    e, f, weight = _inputs()
    weight[0] = 0
    weight[0, 2, 3] = 0.3 * weighted
    e.requires_grad_()
    loss = RidgeFlowLoss(**options)
    for each in (
        loss.per_image(e, f, weight),
        loss.per_image(e, f, weight, fit=(e, f, weight)),
        loss.per_image(e, f, fit=(e, f, weight * (weight[:1] > 1))),
    ):
        assert each[0] == 0
        (gradient,) = torch.autograd.grad(each.sum(), e)
        assert (gradient[0] == 0).all() and gradient.isfinite().all()


def test_constant_flow_counts_zero():
    e, f, _ = _inputs()
    f[0] = 3.7
    loss = RidgeFlowLoss()
    each = loss.per_image(e.requires_grad_(), f)
    assert each[0] == 0 and each[1] > 0
    each.sum().backward()
    assert (e.grad[0] == 0).all() and e.grad.isfinite().all()


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge must be a positive finite number, found 0"),
        ({"ridge": math.nan}, "ridge must be a positive"),
    ],
    ids=str,
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        RidgeFlowLoss(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e, f, w: (e, f[:1], w), ValueError, "embedding and flow must agree in B, H and W"),
        (lambda e, f, w: (e.long(), f, w), TypeError, "embedding must be floating.*int64"),
        (lambda e, f, w: (e, f.requires_grad_(), w), ValueError, "flow gets no gradient"),
    ],
)
def test_bad_inputs(change, error, message):
    bad, good = change(*_inputs()), _inputs()
    loss = RidgeFlowLoss()
    with pytest.raises(error, match=message):
        loss(*bad)
    with pytest.raises(error, match=message):
        loss(*good, fit=bad)


def test_the_crop_to_fit_on_must_match():
    e, f, weight = _inputs()
    with pytest.raises(ValueError, match=r"fit's embedding.*B, D.*\(2, 3, 5, 7\)"):
        RidgeFlowLoss()(e, f, weight, fit=(e[:, :3], f, weight))


def test_repr_tells_the_option():
    assert "ridge=0.01" in repr(RidgeFlowLoss(0.01))
