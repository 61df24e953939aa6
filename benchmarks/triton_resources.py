"""What the fused kernels take of a GPU, read off binaries compiled here: no GPU is needed.

    python benchmarks/triton_resources.py

Each kernel is compiled for each operand width (the embedding's channels, rounded up) and compute
capability and disassembled with the tools that Triton brings: registers, spills, shared memory,
and what a pair costs in the loop over the columns. A multiprocessor starts 128 instructions a
clock, but only 16 exponentials: while a loop has fewer than 8 instructions for each exponential,
exponentials bound it.
"""

import argparse
import collections
import datetime
import itertools
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssl_flow.losses import triton_kernels
from ssl_flow.losses.triton_pairwise import OPTIONS, WIDTHS, tile

KERNELS = ("sums", "gradient", "products")
_TYPES = {"hi": "*fp16", "lo": "*fp16", "n": "i32"} | dict.fromkeys(
    ["rate", "amplitude", "drop_e", "drop_f"], "fp32"
)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_kernel(name: str, width: int, capability: int, aligned: bool) -> tuple[bytes, int]:
    """The binary of a kernel at its tile's constants, and its bytes of shared memory.

    Addresses count as multiples of 16 bytes, which PyTorch's are; ``aligned`` says whether
    the number of pixels is a multiple of 16, too.
    """
    kernel = getattr(triton_kernels, f"{name}_kernel")
    side, stages = tile(width, divmod(capability, 10))
    constants = {"SIDE": side, "WIDTH": width, "STAGES": stages}
    places = {argument: i for i, argument in enumerate(kernel.arg_names)}
    signature = {a: "constexpr" if a in constants else _TYPES.get(a, "*fp32") for a in places}
    sixteens = [a for a, t in signature.items() if t[0] == "*" or (aligned and t == "i32")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(places[a],): value for a, value in constants.items()},
        attrs={(places[a],): [["tt.divisibility", 16]] for a in sixteens},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=OPTIONS)
    return compiled.asm["cubin"], compiled.metadata.shared


def resources(
    capability: int, aligned: bool, name: str, width: int
) -> dict[str, int | float | str | bool]:
    """Registers a thread, bytes spilled, shared memory, and instructions a pair of the loop."""
    binary, shared = compile_kernel(name, width, capability, aligned)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        code = _run("nvdisasm", "--print-code", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    side, _ = tile(width, divmod(capability, 10))
    pairs = side * side / (32 * OPTIONS["num_warps"])  # of a tile, in each thread
    loop = _loop(code)
    return {
        "kernel": name,
        "width": width,
        "capability": capability,
        "N of 16": aligned,
        "tile": f"{side} x {side}",
        "registers": int(found[1]),
        "stack bytes": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared bytes": shared,
        "tensor cores": next((i for i in ("HGMMA", "HMMA") if loop[i]), "none"),
        "exponentials a pair": round(loop["MUFU"] / pairs, 2),
        "instructions a pair": round(loop.total() / pairs, 1),
    }


def _run(tool: str, *arguments: str | Path) -> str:
    command = [_TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loop(code: str) -> "collections.Counter[str]":
    """Instructions of the longest loop (a branch back to an earlier label), by name."""
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L\w+):", line))}
    longest: list[str] = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if branch and labels.get(branch[1], i) < i:
            longest = max(longest, lines[labels[branch[1]] : i], key=len)
    names = (re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line) for line in longest)
    return collections.Counter(m[1] for m in names if m)


def main() -> None:
    """Print a row a kernel, width and capability; write them as Markdown or print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--json", action="store_true", help="print JSON alone, write nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    capabilities, alignments = arguments.capabilities, (True, False)
    jobs = itertools.product(capabilities, alignments, KERNELS, arguments.widths)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(resources, *zip(*jobs, strict=True)))
    if arguments.json:
        print(json.dumps(rows))
        return
    table = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    table += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows]
    about = (__doc__ or "").split("\n\n", 2)[2]
    made = "`python benchmarks/triton_resources.py`, {}, Triton {} and the ptxas in its wheel"
    made = made.format(datetime.date.today(), triton.__version__)
    heading = ["# The fused kernels, compiled ahead of time", "", about]
    text = "\n".join([*heading, *table, "", made, ""])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "triton_resources.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
