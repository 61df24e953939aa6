"""docs/method.md shows formulas as code: they are the gradients of losses/reference.py."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_flow import CrossPixelFlowLoss

PAGE = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines."""
    names = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)), names)
    return names


@pytest.fixture
def image():
    """Embedding (N, D), flow (N, 2) and weight (N,) of 5 x 4 pixels, two of them ignored."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.2, 2, 20)
    weight[[3, 11]] = 0
    return rng.normal(size=(20, 6)), rng.normal(size=(20, 2)), weight


def by_autograd(image, **options):
    """The gradients in the embedding (N, D) and, where it is learned, in the logarithm of s."""
    loss = CrossPixelFlowLoss(backend="reference", flow_sigma=0.7, **options).double()
    e, flow, weight = (torch.from_numpy(x) for x in image)
    e = e.T.reshape(1, -1, 5, 4).requires_grad_()
    loss(e, flow.T.reshape(1, 2, 5, 4), weight.view(1, 5, 4)).backward()
    slope = loss.log_scale.grad.item() if loss.learn_scale else None
    return e.grad.flatten(2)[0].T.numpy(), slope


@pytest.mark.parametrize("self_pairs", ["exclude", "subtract_identity"])
def test_cross_entropy(page, image, self_pairs):
    s, tau_e, tau_f = 0.8, 0.3, 0.2
    expected, slope = by_autograd(
        image,
        self_pairs=self_pairs,
        embedding_scale=s,
        embedding_temperature=tau_e,
        flow_temperature=tau_f,
        learn_scale=True,
    )
    gradient = page["cross_entropy_gradient"]
    found, in_s = gradient(*image, s, 0.7, tau_e, tau_f, self_pairs == "exclude")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * scale)
    np.testing.assert_allclose(in_s * s, slope, rtol=1e-6)  # ds = s d log s
    assert scale > 1e-3 and not found[[3, 11]].any()


@pytest.mark.parametrize("objective", ["kernel_alignment", "regression"])
def test_kernel_alignment_and_regression(page, image, objective):
    expected, _ = by_autograd(image, objective=objective, embedding_scale=0.8)
    found = page[f"{objective.removeprefix('kernel_')}_gradient"](*image, 0.8, 0.7)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)
    assert scale > 1e-3 and not found[[3, 11]].any()
