"""The picture of docs/pictures.md: two frames of each video, as `ssl-flow show embedding` draws it.

python benchmarks/embedding_picture.py VIDEO VIDEO --encoder runs/NAME --out PICTURE.jpg
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from ssl_flow.evaluation.embedding_command import show_embedding_command

WIDTH = 960


def main() -> None:
    """The first and the third of the four rows of each video's sheet, above each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--out", type=Path, required=True)
    known = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for video in known.videos:
            path = f"{folder}/sheet.png"
            if show_embedding_command([video, "--encoder", known.encoder, "--out", path]):
                sys.exit(2)
            sheet = np.pad(cv2.imread(path), ((0, 4), (0, 0), (0, 0)), constant_values=255)
            for row in np.split(sheet, 4)[::2]:
                size = (WIDTH, round(len(row) * WIDTH / row.shape[1]))
                rows.append(cv2.resize(row, size, interpolation=cv2.INTER_AREA))
    cv2.imwrite(str(known.out), np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 90])


if __name__ == "__main__":
    main()
