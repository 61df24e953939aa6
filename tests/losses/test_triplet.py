"""Triplet losses: closed forms, torch's own, finite differences, extreme distances."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ssl_flow.losses import InfoNCELoss, SoftmaxRatioLoss, SoftPNLoss, TripletMarginLoss
from ssl_flow.losses.triplet import distance

TRIPLET_LOSSES = [TripletMarginLoss(0.7), SoftmaxRatioLoss(), SoftPNLoss()]
ALL = [*TRIPLET_LOSSES, InfoNCELoss(0.2)]


def triplets(batch=6, dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, dim, generator=generator, dtype=dtype) for _ in range(3)]


def lengths(*vectors):
    return [
        torch.tensor([math.dist(a, b) for a, b in zip(*pair, strict=True)], dtype=torch.float64)
        for pair in vectors
    ]


def test_by_hand():
    # p = |(3, 4)| = 5, n = |(0, 3)| = 3, |p - n| = |(3, 1)| = sqrt(10) > 3.
    a, p, n = (torch.tensor([v], dtype=torch.float64) for v in ([0, 0], [3, 4], [0, 3]))
    assert TripletMarginLoss(0.5)(a, p, n).item() == pytest.approx(2.5)
    ratio = (math.exp(5) / (math.exp(5) + math.exp(3))) ** 2
    assert SoftmaxRatioLoss()(a, p, n).item() == pytest.approx(ratio)
    assert SoftPNLoss()(a, p, n).item() == pytest.approx(ratio)
    # With the two views exchanged the negative is farther from the anchor: only SoftPN looks back.
    other = (math.exp(5) / (math.exp(5) + math.exp(math.sqrt(10)))) ** 2
    assert SoftmaxRatioLoss()(p, a, n).item() == pytest.approx(other)
    assert SoftPNLoss()(p, a, n).item() == pytest.approx(ratio)


def test_info_nce_by_hand():
    # Two places, views equal: cosines 1 to the own view, 0 to both views of the other.
    view = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert InfoNCELoss(0.5)(view, view).item() == pytest.approx(expected)
    # A further key at 45 degrees of both.
    key = torch.tensor([[1.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2 + 2 * math.exp(math.sqrt(2))))
    assert InfoNCELoss(0.5)(view, view, key).item() == pytest.approx(expected)


def test_against_exponentials_in_float64():
    a, p, n = triplets(20)
    near, far, back = lengths((a, p), (a, n), (p, n))
    ratio = (near.exp() / (near.exp() + far.exp())).square().mean()
    torch.testing.assert_close(SoftmaxRatioLoss()(a, p, n), ratio)
    hard = torch.minimum(far, back)
    ratio = (near.exp() / (near.exp() + hard.exp())).square().mean()
    torch.testing.assert_close(SoftPNLoss()(a, p, n), ratio)
    assert (back < far).any()
    assert (back > far).any()


def test_info_nce_against_a_double_loop():
    a, p, n = triplets()
    keys = torch.cat([a, p, n])
    apart = torch.rand(12, 18, generator=torch.Generator().manual_seed(1)) < 0.5
    for negative, mask in [(None, None), (n, None), (None, apart[:, :12]), (n, apart)]:
        total = 0.0
        for i in range(12):
            own = (i + 6) % 12
            score = [
                math.exp(F.cosine_similarity(keys[i], key, dim=0).item() / 0.2) for key in keys
            ]
            used = [
                k
                for k in range(12 if negative is None else 18)
                if k != i and (k == own or mask is None or mask[i, k])
            ]
            total -= math.log(score[own] / sum(score[k] for k in used)) / 12
        assert InfoNCELoss(0.2)(a, p, negative, mask).item() == pytest.approx(total)


@pytest.mark.parametrize("margin", [0.2, 1.0, 5.0])
def test_margin_loss_equals_torchs(margin):
    embeddings = triplets(64)
    ours = [e.clone().requires_grad_() for e in embeddings]
    theirs = [e.clone().requires_grad_() for e in embeddings]
    loss = TripletMarginLoss(margin)(*ours)
    expected = torch.nn.TripletMarginLoss(margin, eps=1e-12)(*theirs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    )
    assert loss > 0


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradients_against_finite_differences(loss):
    embeddings = [e.requires_grad_() for e in triplets()]
    assert torch.autograd.gradcheck(loss, embeddings)


@pytest.mark.parametrize("loss", TRIPLET_LOSSES, ids=lambda loss: type(loss).__name__)
def test_equal_embeddings_have_a_zero_gradient(loss):
    same = [torch.ones(3, 4, requires_grad=True) for _ in range(3)]
    value = loss(*same)
    value.backward()
    at_zero = 0.7 if isinstance(loss, TripletMarginLoss) else 0.25
    assert value.item() == pytest.approx(at_zero)
    assert all(torch.equal(e.grad, torch.zeros(3, 4)) for e in same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_extreme_distances_stay_finite(loss, scale, dtype):
    embeddings = [(scale * e).to(dtype).requires_grad_() for e in triplets(64, dtype=torch.float32)]
    exact = loss(*(e.detach().double() for e in embeddings))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        value = loss(*embeddings)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert all(e.grad.isfinite().all() for e in embeddings)


def test_one_wildly_wrong_triplet_costs_one_and_a_right_one_nothing():
    a, far = torch.zeros(1, 4), torch.full((1, 4), 1e4)
    for loss in (SoftmaxRatioLoss(), SoftPNLoss()):
        assert loss(a, far, a).item() == 1
        assert loss(a, a, far).item() == 0
    assert TripletMarginLoss(1.0)(a, far, a).item() == 2e4 + 1


def test_distance_takes_half_precision_beyond_its_range():
    first, second = torch.full((1, 16), 3e4, dtype=torch.float16), torch.zeros(1, 16).half()
    assert distance(first, -first).item() == pytest.approx(8 * 3e4, rel=1e-3)
    assert distance(first, second).item() == pytest.approx(1.2e5, rel=1e-3)  # > 65504


def test_negatives_that_are_too_near_are_left_out():
    a, p, _ = triplets()
    nobody = torch.zeros(12, 12, dtype=torch.bool)
    a.requires_grad_()
    loss = InfoNCELoss()(a, p, apart=nobody)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_errors_say_what_was_expected():
    a, p, n = triplets()
    for loss in ALL:
        with pytest.raises(ValueError, match=r"must all be \(B, D\) of one shape"):
            loss(a, p, n[:3])
    with pytest.raises(ValueError, match="one shape"):
        TripletMarginLoss()(a[0], p[0], n[0])
    with pytest.raises(ValueError, match="not empty"):
        SoftPNLoss()(a[:0], p[:0], n[:0])
    with pytest.raises(ValueError, match=r"apart must be \(12, 18\), found \(12, 12\)"):
        InfoNCELoss()(a, p, n, torch.ones(12, 12, dtype=torch.bool))
    for build in (TripletMarginLoss, InfoNCELoss):
        with pytest.raises(ValueError, match="positive finite number, found 0"):
            build(0)


def test_losses_need_torch_and_numpy_alone():
    check = (
        "import sys, ssl_flow.losses.mining\n"
        "wrong = {'timm', 'torchvision', 'cv2', 'av', 'yaml', 'tyro'} & set(sys.modules)\n"
        "sys.exit(str(wrong) if wrong else 0)"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
