"""The methods of the pairwise benchmark compute the same loss, and the command reports them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention

from ssl_flow.losses import CrossPixelFlowLoss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pairwise
import pairwise_methods

JOB = pairwise_methods.Job("dense", [(2, 64)])


def _value_and_gradient(loss, device="cpu", pixels=81):
    embedding, *rest = pairwise_methods.inputs(2, pixels, JOB._replace(device=device))
    value = loss(embedding, *rest)
    return value.detach(), torch.autograd.grad(value, embedding)[0]


def _assert_equals_reference(loss, device="cpu", pixels=81):
    expected = _value_and_gradient(CrossPixelFlowLoss(backend="reference"), device, pixels)
    found = _value_and_gradient(loss, device, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_options_are_the_defaults_of_the_loss():
    loss = CrossPixelFlowLoss()
    methods = pairwise_methods
    assert loss.embedding_scale == methods.SCALE
    assert loss.options == (methods.TAU_E, methods.SIGMA, methods.TAU_F, True)


@pytest.mark.parametrize("name", ["chunked", "dense"])
def test_equals_reference(name):
    _assert_equals_reference(pairwise_methods.create(name, "cross_entropy", "cpu"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_reference():
    _assert_equals_reference(pairwise_methods.create("compiled", "cross_entropy", "cpu"))


def test_keops_equals_reference():
    pytest.importorskip("pykeops", reason="extra 'bench'")
    _assert_equals_reference(pairwise_methods.create("keops", "cross_entropy", "cpu"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
def test_flex_equals_reference(monkeypatch):
    """Uncompiled. FlexAttention refuses gradients on CPUs, though the uncompiled one has them."""
    embedding, flow, weight = pairwise_methods.inputs(2, 81, JOB)
    value = pairwise_methods.flex(embedding.detach(), flow, weight)
    expected = CrossPixelFlowLoss(backend="reference")(embedding, flow, weight)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=0)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None, raising=False)
    try:
        _assert_equals_reference(pairwise_methods.flex)
    except NotImplementedError as error:
        pytest.skip(f"no gradient: {error}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["triton", "dense", "compiled", "flex", "keops"])
def test_equals_reference_on_a_gpu(name):
    if name == "keops":
        pytest.importorskip("pykeops")
    loss = pairwise_methods.create(name, "cross_entropy", "cuda")
    _assert_equals_reference(loss, "cuda", pixels=784)  # not a multiple of FlexAttention's tile


def test_command_writes_its_files(tmp_path, capsys):
    grid = ["--grid", "2x64", "--methods", "dense", "flex", "--dim", "4"]
    options = ["--rounds", "1", "--seconds", "0.01", "--threads", "1"]
    pairwise.main(["--device", "cpu", *grid, *options, "--out", str(tmp_path)])
    content = json.loads((tmp_path / "pairwise_cpu_d4.json").read_text())
    rows = [(row["method"], row["images"], row["pixels"]) for row in content["rows"]]
    assert rows == [("dense", 2, 64)]
    assert all(row["seconds"] > 0 and len(row["rounds"]) == 1 for row in content["rows"])
    assert "no backward on CPUs" in content["unavailable"]["flex"]
    assert content["versions"]["torch"] and content["machine"] and content["date"]
    text = (tmp_path / "pairwise_cpu_d4.md").read_text()
    assert text in capsys.readouterr().out
    assert "| 2 | 64 | dense |" in text and "| all | all | flex | not available" in text
    assert (tmp_path / "pairwise_cpu_d4.png").read_bytes().startswith(b"\x89PNG")


def test_objective_reaches_the_loss_and_its_rivals_have_none():
    loss = pairwise_methods.create("chunked", "regression", "cpu")
    assert loss.objective == "regression"
    with pytest.raises(ValueError, match="cross-entropy only"):
        pairwise_methods.create("dense", "regression", "cpu")


def test_a_size_too_large_for_memory_or_time_is_left_out(monkeypatch):
    monkeypatch.setattr(pairwise_methods, "free_memory", lambda device: 2.0**20)
    note = pairwise_methods.measure(lambda *_: torch.zeros(()), 1, 2**14, JOB)
    assert note == {"note": "needs ~4 GiB"}

    args = pairwise.parse(["--device", "cpu", "--max-seconds", "50"])
    results = pairwise.Results()
    results.add("dense", [(4, 784)], [{"images": 4, "pixels": 784, "seconds": 1, "bytes": 1}])
    assert not pairwise.settled(args, results, "dense", (4, 3136))  # 16 s expected
    assert pairwise.settled(args, results, "dense", (1, 12544))  # 64 s expected
    assert results.rows()[-1]["note"] == "not run: ~64 s expected, limit 50 s"


def test_a_worker_that_dies_leaves_its_reason():
    args = pairwise.parse(["--device", "cpu"])
    (line,) = pairwise.run_worker("pairwise_methods.py", ["no JSON"], args)
    assert "JSONDecodeError" in line["ended"]
    args.timeout = 0.01
    assert pairwise.run_worker("pairwise_methods.py", [], args) == [{"ended": "ended after 0 s"}]

    results = pairwise.Results()
    lines = [{"images": 1, "pixels": 4, "seconds": 2.0, "bytes": 3}, {"ended": "failed: killed"}]
    results.add("dense", [(1, 4), (1, 9)], lines)
    first, second = results.rows()
    assert first["seconds"] == 2.0 and first["bytes"] == 3
    assert second["note"] == "failed: killed"


def test_rounds_give_the_median_and_the_most_bytes():
    results = pairwise.Results()
    for seconds, size in [(3.0, 5), (1.0, 7), (2.0, 6)]:
        line = {"images": 1, "pixels": 4, "seconds": seconds, "bytes": size}
        results.add("dense", [(1, 4)], [line])
    (row,) = results.rows()
    assert row["seconds"] == 2.0 and row["rounds"] == [3.0, 1.0, 2.0] and row["bytes"] == 7


def test_goals_of_a_gpu():
    args = pairwise.parse(["--device", "cpu"])
    args.device = "cuda"
    results = pairwise.Results()
    for method, seconds in {"triton": 0.002, "dense": 0.04, "flex": 0.003}.items():
        line = {"images": 32, "pixels": 3136, "seconds": seconds, "bytes": 1000 * seconds}
        results.add(method, [(32, 3136)], [line])
    results.gpu = {"exponentials_per_second": 4e12, "tensor_flops_per_second": 4e14, "share": 0.04}
    found = [goal["found"] for goal in pairwise.goals(args, results)]
    floor = 6 * 32 * 3136**2 / 4e12  # the exponentials take longer than the products
    assert found == pytest.approx([20, None, 1.5, None, 0.05, floor / 0.002, 0.04])
