"""Peak memory and time of dense kNN with a memory of a million patch features.

    python benchmarks/dense_knn_memory.py --rows 1000000 --channels 384 --classes 21

Random unit features in float16 with label shares in float16, as `run_dense_knn` keeps them, and the
queries of one image of 512 x 512 pixels at stride 16. The peak counts Python and PyTorch too.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from ssl_flow.evaluation.dense_knn import nearest, vote


def peak_gib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def main() -> None:
    """Fill, search, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    known = parser.parse_args()
    before, generator = peak_gib(), torch.Generator(known.device).manual_seed(0)
    features, labels = (
        torch.empty(known.rows, width, dtype=torch.float16, device=known.device)
        for width in (known.channels, known.classes)
    )
    for part in [*features.split(65536), *labels.split(65536)]:
        noise = torch.randn(part.shape, generator=generator, device=known.device)
        part.copy_(F.normalize(noise, dim=1))
    filled = peak_gib()
    queries = features[:: known.rows // known.queries][: known.queries].float()
    start = time.perf_counter()
    cosine, rows = nearest(features, queries, 30)
    vote(cosine, rows, labels, 0.02).sum().item()  # on a GPU: waits for the result
    seconds = time.perf_counter() - start
    if cosine[:, 0].min() < 0.999:
        raise RuntimeError("every query is in the memory, but some did not find itself")
    print(
        f"{known.rows} x {known.channels} float16, {known.queries} queries, 30 neighbours, "
        f"{torch.get_num_threads()} threads, {known.device}: {seconds:.1f} s; "
        f"peak {peak_gib():.2f} GiB ({before:.2f} before, {filled:.2f} with the memory)"
    )


if __name__ == "__main__":
    main()
