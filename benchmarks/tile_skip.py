"""How many tiles of the flow kernel vanish if pixels are sorted by their flow.

    python benchmarks/tile_skip.py STORE

For pixels far apart in flow the target is its floor, a global sum, so a kernel could skip the
exponentials of tiles that hold such pairs alone. This counts those tiles on real flow: crops of
224 x 224 at stride 4, standardised per image, pixels in the order of the picture or along a Morton
curve over the flow.
"""

import argparse

import torch
from torch import Tensor

from ssl_flow.data.augment import augment, normalize_flow
from ssl_flow.data.pairs import FlowPairs, collate
from ssl_flow.flow import FlowStore

FLOOR = 1e-6  # a kernel value over its temperature that float32 can't tell from 0 beside 1


def morton_order(flow: Tensor) -> Tensor:
    """The order (N,) of flow vectors (N, 2) along a Morton curve of 1024 x 1024 cells."""
    cells = flow - flow.amin(0)
    cells = (cells / cells.amax().clamp(min=1e-6) * 1023).long()
    bits = torch.arange(10)
    places = torch.stack([2 * bits, 2 * bits + 1])  # of the bits of x and of y
    return ((cells[:, :, None] >> bits & 1) << places).sum((1, 2)).argsort()


def vanishing_share(flow: Tensor, side: int, sigma: float, temperature: float) -> float:
    """Share of the tiles of ``side`` pixels whose flows (N, 2) are nowhere near each other."""
    tiles = flow[: len(flow) // side * side].view(-1, side, 2)
    low, high = tiles.amin(1), tiles.amax(1)
    apart = torch.maximum(low[:, None] - high, low - high[:, None]).clamp(min=0)  # of the boxes
    kernel = torch.exp(-apart.square().sum(-1) / (2 * sigma**2))
    return float((kernel / temperature < FLOOR).float().mean())


def main() -> None:
    """Print a row a width of the kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--side", type=int, default=64, help="of a tile, pixels")
    arguments = parser.parse_args()
    pairs = FlowPairs(FlowStore(arguments.store), arguments.pairs)
    flows = []
    for i in range(arguments.pairs):
        _, flow, weight = augment(collate([pairs[i]]), shape=(224, 224))
        flows.append(normalize_flow(flow, weight)[0].flatten(1).T)
    print("| sigma | picture order | Morton order |\n|---|---|---|")
    for sigma in (0.5, 0.25, 0.06):
        shares = [
            sum(vanishing_share(f, arguments.side, sigma, 0.1) for f in ordered) / len(flows)
            for ordered in (flows, [flow[morton_order(flow)] for flow in flows])
        ]
        print(f"| {sigma} | {shares[0]:.3f} | {shares[1]:.3f} |")


if __name__ == "__main__":
    main()
