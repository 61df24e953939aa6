"""The dense losses against slow loops written from the formulas, and against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_flow.losses import reference

S, TAU_E, SIGMA, TAU_F = 0.8, 0.3, 0.7, 0.25


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def _loop(objective, e, f, w, self_pairs="exclude"):
    """One image's loss in plain Python: e and f lists of vectors, w a list of numbers."""
    n = len(w)
    minus = self_pairs == "subtract_identity"
    k_e = [[S * _dot(e[u], e[v]) - (minus and u == v) for v in range(n)] for u in range(n)]
    k_f = [
        [
            math.exp(-(math.dist(f[u], f[v]) ** 2) / (2 * SIGMA**2)) - (minus and u == v)
            for v in range(n)
        ]
        for u in range(n)
    ]
    m = [[0.0 if self_pairs == "exclude" and u == v else 1.0 for v in range(n)] for u in range(n)]
    if objective == "kernel_alignment":
        pairs = [(m[u][v] * w[u] * w[v], k_e[u][v], k_f[u][v]) for u in range(n) for v in range(n)]
        e_f, e_e, f_f = (
            sum(p * (a, b)[i] * (a, b)[j] for p, a, b in pairs) for i, j in ((0, 1), (0, 0), (1, 1))
        )
        return 1 - e_f / math.sqrt(e_e * f_f)
    if objective == "regression":
        pairs = [(m[u][v] * w[u] * w[v], k_e[u][v] - k_f[u][v]) for u in range(n) for v in range(n)]
        return sum(p * d * d for p, d in pairs) / sum(p for p, _ in pairs)
    total = 0.0
    for u in range(n):
        z = sum(m[u][v] * w[v] * math.exp(k_e[u][v] / TAU_E) for v in range(n))
        y = sum(m[u][v] * w[v] * math.exp(k_f[u][v] / TAU_F) for v in range(n))
        k, tau, norm = (k_e, TAU_E, z) if objective == "cross_entropy" else (k_f, TAU_F, y)
        mean = sum(m[u][v] * w[v] * math.exp(k_f[u][v] / TAU_F) * k[u][v] / tau for v in range(n))
        total += w[u] * (math.log(norm) - mean / y)
    return total / sum(w)


def _call(objective, e, f, w, self_pairs="exclude", s=S):
    options = reference.Options(TAU_E, SIGMA, TAU_F, self_pairs == "exclude")
    if objective == "cross_entropy":
        return reference.cross_entropy(e, s, f, w, options)
    if objective == "target_entropy":
        return reference.target_entropy(f, w, options)
    products = reference.inner_products(e, f, w, options)
    if objective == "regression":
        return reference.regression(products, w, s)
    return reference.kernel_alignment(products, w)


def _inputs(b=3, n=7, d=4):
    g = torch.Generator().manual_seed(0)
    e = F.normalize(torch.randn(b, n, d, generator=g, dtype=torch.float64), dim=-1)
    f = torch.randn(b, n, 2, generator=g, dtype=torch.float64)
    w = torch.rand(b, n, generator=g, dtype=torch.float64)
    w[:, 2] = 0
    w[0, -3:] = 0
    return e, f, w


CASES = [
    (o, s) for o in ("cross_entropy", "target_entropy") for s in ("exclude", "subtract_identity")
]
CASES += [("kernel_alignment", "exclude"), ("regression", "exclude")]


@pytest.mark.parametrize(("objective", "self_pairs"), CASES)
def test_equals_loop(objective, self_pairs):
    e, f, w = _inputs()
    loss = _call(objective, e, f, w, self_pairs)
    expected = [
        _loop(objective, *(t[b].tolist() for t in (e, f, w)), self_pairs) for b in range(len(w))
    ]
    torch.testing.assert_close(
        loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_constant_embedding_costs_the_log_of_the_other_weights():
    e, f, w = _inputs()
    loss = _call("cross_entropy", e[:, :1].expand_as(e), f, w)
    total = w.sum(-1, keepdim=True)
    expected = (w * (total - w).log()).sum(-1) / total[:, 0]
    torch.testing.assert_close(loss, expected)


def test_constant_flow_and_constant_embedding_agree():
    e, f, w = _inputs()
    e, f = e[:, :1].expand_as(e), f[:, :1].expand_as(f)
    zeros = torch.zeros(len(w), dtype=torch.float64)
    torch.testing.assert_close(_call("kernel_alignment", e, f, w), zeros)
    torch.testing.assert_close(_call("regression", e, f, w, s=1.0), zeros)
    torch.testing.assert_close(
        _call("cross_entropy", e, f, w), _call("target_entropy", e, f, w), rtol=1e-10, atol=1e-10
    )


def test_two_groups_of_flow_and_the_embedding_that_separates_them():
    """Flow far apart makes K_f 0 or 1, which orthogonal embeddings reproduce."""
    group = torch.tensor([0, 1, 0, 1, 1, 0])
    e = F.one_hot(group, 3).double()[None]
    f = 100.0 * torch.stack([group, -group], -1).double()[None]
    w = torch.ones(1, 6, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(_call("kernel_alignment", e, f, w), zero)
    torch.testing.assert_close(_call("regression", e, f, w, s=1.0), zero)
    # Kernels that are 1 for 2 and 0 for 3 of the others, at equal temperatures.
    a = math.exp(S / TAU_E)
    ce = math.log(2 * a + 3) - S / TAU_E * 2 * (b := math.exp(1 / TAU_F)) / (2 * b + 3)
    torch.testing.assert_close(_call("cross_entropy", e, f, w), zero + ce)


def test_alignment_and_regression_do_not_see_the_weights_unit():
    e, f, w = _inputs()
    for objective in ("kernel_alignment", "regression"):
        torch.testing.assert_close(_call(objective, e, f, w), _call(objective, e, f, 1e3 * w))


def test_a_kernel_of_zeros_has_no_alignment():
    e = torch.eye(2, dtype=torch.float64)[None].requires_grad_()
    w = torch.ones(1, 2, dtype=torch.float64)
    loss = _call("kernel_alignment", e, torch.zeros(1, 2, 2, dtype=torch.float64), w)
    loss.sum().backward()
    assert loss.item() == 1
    assert e.grad.isfinite().all()
