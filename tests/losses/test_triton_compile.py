"""The kernels' binaries for GPUs, compiled without one: no spills, little shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.3", reason="needs Triton 3.3, which compiles without a GPU")

SCRIPT = Path(__file__).parents[2] / "benchmarks/triton_resources.py"
WIDTHS = [16, 128, 256]  # what is used most, and where registers are scarce


@pytest.fixture(scope="module")
def rows():
    # In a process of its own: here the kernels may be interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", "--widths", *map(str, WIDTHS)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_both_generations(rows):
    found = {(r["kernel"], r["width"], r["capability"], r["N of 16"]) for r in rows}
    expected = {(k, w) for k in ("sums", "gradient", "products") for w in WIDTHS}
    assert found == {(*e, c, a) for e in expected for c in (80, 90) for a in (True, False)}


def test_registers_and_shared_memory_suffice(rows):
    for row in rows:
        assert row["stack bytes"] == row["spills"] == 0, row
        limit = 227 if row["capability"] == 90 else 99  # of a block, KiB; 99 on consumer GPUs too
        assert row["registers"] <= 255 and row["shared bytes"] <= limit * 1024, row


def test_products_run_on_tensor_cores(rows):
    assert all(r["tensor cores"] != "none" for r in rows)
    assert all(
        r["tensor cores"] == "HGMMA" for r in rows if (r["width"], r["capability"]) == (16, 90)
    )


def test_each_exponential_is_worked_out_once(rows):
    counts = {"sums": 3, "gradient": 3, "products": 1}
    for row in (r for r in rows if r["width"] == 16):
        assert row["exponentials a pair"] == counts[row["kernel"]], row
