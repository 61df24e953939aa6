"""On what, when and with which versions something was measured: the end of each result file."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "timm", "numpy", "opencv-contrib-python-headless", "pykeops")


def cpu_model() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(
    script: str, arguments: Sequence[str], device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """Command, date, machine and versions; `threads` of torch, None = as it is set now."""
    name = f"{cpu_model()}, {threads or torch.get_num_threads()} thread(s)"
    if device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *arguments]),
        "date": str(datetime.date.today()),
        "machine": name,
        "versions": versions,
    }


def footer(found: dict[str, Any]) -> str:
    """The same as lines of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"Command: `{found['command']}`", f"Date: {found['date']}"]
    lines += [f"Machine: {found['machine']}", f"Versions: {versions}"]
    return "  \n".join(lines) + "\n"
