"""README's picture: frames of unseen DAVIS sequences, their flow, the embedding of the frame alone.

python benchmarks/readme_picture.py --encoder runs/NAME --davis DAVIS --out docs/images/davis.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import default_collate

from ssl_flow.data.augment import Pair
from ssl_flow.data.segmentation import open_segmentation
from ssl_flow.flow import optical_flow
from ssl_flow.models import load_encoder
from ssl_flow.training.flow_task import embedding_sheet

SIDE = 256


def square(image: np.ndarray) -> np.ndarray:
    """The middle of a frame, SIDE x SIDE."""
    height, width = image.shape[:2]
    left = (width - height) // 2
    cut = image[:, left : left + height]
    return cv2.resize(cut, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def main() -> None:
    """Two frames from each held-out sequence, a third and two thirds through."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--davis", required=True)
    parser.add_argument("--out", type=Path, required=True)
    known = parser.parse_args()
    test = open_segmentation(f"davis:{known.davis}", "test")
    pairs = []
    for sequence in test.protocol["sequences"]:
        numbers = [i for i, name in enumerate(test.names) if name.startswith(f"{sequence}/")]
        for share in (1 / 3, 2 / 3):
            at = numbers[int(share * len(numbers))]
            first, second = square(test[at].image), square(test[at + 2].image)
            flow = optical_flow(first, second, method="dis")
            pairs.append(
                Pair(
                    torch.from_numpy(first),
                    torch.from_numpy(flow).permute(2, 0, 1),
                    torch.ones(SIDE, SIDE),
                )
            )
    sheet = embedding_sheet(load_encoder(known.encoder), default_collate(pairs), tile=160)
    known.out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(known.out), sheet[..., ::-1])


if __name__ == "__main__":
    main()
