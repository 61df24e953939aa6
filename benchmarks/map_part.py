"""Cut some rows out of a map in degrees, so that an encoder can be judged on land it never saw.

    python benchmarks/map_part.py --map MAP --rows 0 1020 --out maps/north

Takes a folder with a meta.json in an equirectangular projection (docs/maps.md) whose pictures and
labels are one file each; pictures are written as PNG, so that nothing is encoded a second time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image


def cut_rows(folder: Path, first: int, last: int, out: Path) -> None:
    """Write the rows `first` to `last` (exclusive) of all pictures and labels, and their meta.json.

    ValueError for another projection or rows that the map has not.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if missing := {"lat_top", "pixels_per_degree", "height", "images"} - meta.keys():
        raise ValueError(
            f"{folder / 'meta.json'} lacks {', '.join(sorted(missing))}: an equirectangular map of "
            "pictures has them, see docs/maps.md"
        )
    if not 0 <= first < last <= meta["height"]:
        height = meta["height"]
        raise ValueError(f"rows {first} to {last} of {height}: give 0 <= FIRST < LAST <= {height}")
    out.mkdir(parents=True)
    kept = {Path(name).stem + ".png": text for name, text in meta["images"].items()}
    for name in [*meta["images"], *meta.get("labels", {})]:
        with Image.open(folder / name) as image:
            part = image.crop((0, first, image.width, last))
            part.save(out / f"{Path(name).stem}.png")
    top = meta["lat_top"]
    degrees = {
        f"lat_{side}": top - row / meta["pixels_per_degree"]
        for side, row in (("top", first), ("bottom", last))
    }
    text = json.dumps({**meta, **degrees, "height": last - first, "images": kept}, indent=1)
    (out / "meta.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line, cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs=2, required=True, metavar=("FIRST", "LAST"))
    parser.add_argument("--out", type=Path, required=True)
    known = parser.parse_args()
    cut_rows(known.map, *known.rows, known.out)


if __name__ == "__main__":
    main()
