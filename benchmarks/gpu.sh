#!/usr/bin/env bash
# Everything that wants a GPU, in one command, or in parts of less than 7 minutes each:
#
#     [OUT=benchmarks/results] [STORE=flow_store] [PYTHON=python3] bash benchmarks/gpu.sh
#     bash benchmarks/gpu.sh tests speed          # parts: tests speed sanitizer training
#
# Tests, the pairwise benchmark with the GPU's floor and the loss's share of a training step,
# compute-sanitizer over the loss, the parts of a training step, and, with STORE (written by `ssl-flow flow`), a short pretraining.
# Every step has its own time limit; one that fails is noted and the others go on. Into OUT go
# gpu_summary.md, gpu.log (what the steps printed), the benchmark's files and gpu_training.json.
# The package need not be installed, and packages that a step lacks only cost that step.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: no CUDA device was found (asked torch of $python)" >&2
    exit 1
fi
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export NO_COLOR=1 TQDM_MININTERVAL=10

log="$out/gpu.log" summary="$out/gpu_summary.md" failures=0
: >"$log"
printf '| step | result | seconds |\n|---|---|---|\n' >"$summary"

note() { # name, result, seconds: a line of the summary
    printf '| %s | %s | %s |\n' "$@" >>"$summary"
}

step() { # name, limit in seconds, command...
    local name=$1 limit=$2 start=$SECONDS status=0 result=ok
    shift 2
    echo "gpu.sh: $name (at most $limit s)" >&2
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    # Interrupted rather than killed, so that a benchmark still reports what it has.
    timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
    case $status in
        0) ;;
        124 | 137) result="failed: over its limit of $limit s" ;;
        *) result="failed: status $status, see gpu.log" ;;
    esac
    [ "$status" -eq 0 ] || failures=$((failures + 1))
    note "$name" "$result" $((SECONDS - start))
}

skip() { # name, reason
    echo "gpu.sh: $1 skipped: $2" >&2
    note "$1" "skipped: $2" 0
}

cat >"$scratch/environment.py" <<'PYTHON_SCRIPT'
import importlib.metadata, platform, subprocess
import torch

subprocess.run("nvidia-smi", shell=True, check=False)
print("Python", platform.python_version(), "CUDA", torch.version.cuda, torch.cuda.get_device_name())
for package in ("torch", "triton", "torchvision", "timm", "numpy", "av", "tyro", "safetensors",
                "opencv-contrib-python-headless", "tensorboard", "matplotlib", "pytest", "pykeops"):
    try:
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "is missing")
PYTHON_SCRIPT

cat >"$scratch/loss.py" <<'PYTHON_SCRIPT'
import torch
from ssl_flow.losses import CrossPixelFlowLoss
from ssl_flow.losses.cross_pixel import OBJECTIVES

# Sizes below, at and off the multiples of a tile; each objective, with weights and without.
for height, width in ((1, 2), (8, 8), (13, 17)):
    embedding = torch.randn(2, 16, height, width, device="cuda", requires_grad=True)
    flow = torch.randn(2, 2, height, width, device="cuda")
    weight = (torch.rand(2, height, width, device="cuda") > 0.3).float()
    for objective in OBJECTIVES:
        loss = CrossPixelFlowLoss(objective, backend="triton")
        for weights in (None, weight):
            loss(embedding, flow, weights).backward()
            if objective == "cross_entropy":
                loss.target_entropy(flow, weights)
    CrossPixelFlowLoss(self_pairs="subtract_identity", backend="triton")(embedding, flow).backward()
torch.cuda.synchronize()
print("finite gradient:", embedding.grad.isfinite().all().item())
PYTHON_SCRIPT

cat >"$scratch/speed.py" <<'PYTHON_SCRIPT'
import json, statistics, sys
from pathlib import Path
import torch
import yaml

(run,) = Path(sys.argv[1]).iterdir()
config = yaml.safe_load((run / "config.yaml").read_text())
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
warm = lines[len(lines) // 2 :]  # the first steps wait for kernels and workers to be ready
result = {
    "gpu": torch.cuda.get_device_name(),
    "config": {key: config[key] for key in ("data", "model", "loss", "train")},
    "steps_done": lines[-1]["step"],
    "steps_per_second": statistics.median(line["images_per_second"] for line in warm)
    / config["train"]["batch_size"],
    "share_of_time_waiting_for_data": statistics.median(line["data_wait"] for line in warm),
    "lines": lines,
}
result["config"]["data"].pop("store")  # a path of this machine
Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
print({key: value for key, value in result.items() if key not in ("config", "lines")})
PYTHON_SCRIPT

parts=" ${*:-tests speed sanitizer training} "
wants() { [[ $parts == *" $1 "* ]]; }

step "environment" 20 "$python" "$scratch/environment.py"
if wants tests; then
    # Not the ahead-of-time compilation: it needs no GPU and knows one version of Triton.
    step "tests of the losses" 180 "$python" -m pytest tests/losses -k "(triton or gpu) and not test_triton_compile"
    step "tests of the flow methods" 60 "$python" -m pytest -m gpu tests/flow
    step "tests of the training loop" 120 "$python" -m pytest -m gpu tests/training tests/data
    step "values of the benchmark's methods" 60 "$python" -m pytest -m gpu tests/benchmarks
fi
if wants speed; then
    pairwise=("$python" benchmarks/pairwise.py --device cuda --seconds 0.5 --out "$out")
    step "pairwise benchmark, floor, share of a step" 220 "${pairwise[@]}" --timeout 70
    # The rivals at their fastest: products in TensorFloat-32, embeddings in bfloat16.
    few=(--grid 32x3136 --methods triton flex compiled dense --timeout 40)
    step "pairwise benchmark, tf32" 70 "${pairwise[@]}" "${few[@]}" --tf32
    step "pairwise benchmark, bfloat16" 70 "${pairwise[@]}" "${few[@]}" --dtype bfloat16
    step "flow in batches" 60 "$python" benchmarks/flow_accuracy.py --device cuda --json "$out/gpu_flow.json"
fi
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if ! wants sanitizer; then
    :
elif [ -x "$sanitizer" ]; then
    step "loss without sanitizer" 20 "$python" "$scratch/loss.py" # compiles and caches the kernels
    for tool in memcheck racecheck initcheck; do
        # Without torch's cache each tensor is an allocation of its own, whose ends are watched.
        step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
            --error-exitcode 1 --print-limit 20 "$python" "$scratch/loss.py"
    done
else
    skip "memcheck, racecheck, initcheck" "no compute-sanitizer"
fi

if wants training; then
    step "a training step beside the bare backbone" 150 "$python" benchmarks/training.py \
        --device cuda --out "$out"
fi
if ! wants training; then
    :
elif [ ! -d "${STORE:-}" ]; then
    skip "pretraining" "STORE names no folder"
elif ! why=$("$python" -c 'import tyro, ssl_flow.training.loop' 2>&1); then
    skip "pretraining" "$(tail -n 1 <<<"$why")"
else
    step "pretraining, 200 steps of the preset small" 45 "$python" -m ssl_flow.cli train small \
        --data.store "$STORE" --data.workers 8 --train.steps 200 --train.log-every 20 \
        --out "$scratch/runs"
    step "its steps a second" 10 "$python" "$scratch/speed.py" "$scratch/runs" \
        "$out/gpu_training.json"
fi

note "all" "$failures failed" "$SECONDS"
cat "$summary"
[ "$failures" -eq 0 ]
