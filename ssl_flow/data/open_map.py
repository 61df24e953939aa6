"""Opens a map: a folder with a meta.json, an image beside one, a GeoTIFF, or z/x/y tiles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_flow.data.georeference import META, WebMercator, read_georeference
from ssl_flow.data.labelled import IMAGE_SUFFIXES
from ssl_flow.data.mosaic import Mosaic, image_size
from ssl_flow.data.tiles import TileMap

LAYOUT = (
    "a folder with meta.json and NAME.png or layers/NAME.png, an image in such a folder, "
    "a GeoTIFF, or a folder of tiles ZOOM/X/Y.png"
)


def open_map(path: Path | str, layers: Sequence[str] | None = None) -> TileMap:
    """Open a map; a picture or a layer is decoded when the first tile needs it.

    Args:
        path: a folder with meta.json; an image in one; a GeoTIFF (.tif, .tiff; needs
            `ssl-flow[geo]`); or a folder of tiles in the XYZ scheme, ZOOM/X/Y.png (or jpg, webp):
            its deepest zoom, where a missing tile is empty.
        layers: which layers or pictures of a folder; None = all layers, or else the first picture.

    Raises:
        FileNotFoundError, ValueError: a file is missing, not aligned, of another kind, or without
            a georeference; the message names it and says what to do.
        ImportError: a GeoTIFF, without rasterio.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. A map is {LAYOUT}")
    if path.is_dir():
        if (path / "meta.json").exists():
            return _folder(path, layers)
        if layers is not None:
            raise ValueError(f"{path} has no meta.json, so no layers {', '.join(layers)}")
        return _xyz(path)
    if layers is not None:
        raise ValueError(f"{path} is one file: layers can only be chosen from a folder")
    if (path.parent / "meta.json").exists():
        return _folder(path.parent, [path.stem])
    if path.suffix.lower() in (".tif", ".tiff"):
        from ssl_flow.data.geotiff import open_geotiff

        return open_geotiff(path)
    raise ValueError(f"{path} has no georeference: {META}, or give a GeoTIFF")


def open_map_spec(spec: str) -> TileMap:
    """`map:PATH`, or `map:PATH@NAME,NAME`: these layers or pictures of a folder; see `open_map`."""
    place = spec.removeprefix("map:")
    path, found, names = place.rpartition("@")
    if not found or Path(place).exists():
        return open_map(place)
    return open_map(path, names.split(","))


def _folder(folder: Path, wanted: Sequence[str] | None) -> TileMap:
    meta = _read_meta(folder / "meta.json")
    georeference = read_georeference(meta, folder / "meta.json")
    for key in ("layers", "images"):
        if not all(isinstance(name, str) for name in meta.get(key, [])):
            raise ValueError(f"{folder / 'meta.json'}: {key} should hold names")
    if wanted is None:
        pictures = [Path(name).stem for name in meta.get("images", {})][:1]
        wanted = list(meta.get("layers", [])) or pictures
    if not wanted:
        raise ValueError(f"{folder / 'meta.json'} names neither layers nor images: add a list")
    rasters = [_raster(folder, name, meta) for name in wanted]
    names = {Path(file).stem: values for file, values in meta.get("labels", {}).items()}
    if "landcover" in meta:
        names["landcover"] = meta["landcover"]
    labels = {name: _raster(folder, name, meta, values) for name, values in names.items()}
    has_inside = (folder / "inside").exists() or (folder / "inside.png").exists()
    inside = _raster(folder, "inside", meta) if has_inside else None
    every = [*rasters, *labels.values(), *([inside] if inside else [])]
    for raster in every:
        if raster.size != every[0].size:
            raise ValueError(
                f"{folder} is not aligned: {raster.name} is {raster.size[0]}x{raster.size[1]}, "
                f"{every[0].name} is {every[0].size[0]}x{every[0].size[1]}; all must cover the "
                "same pixels"
            )
    stated = (meta.get("width", every[0].size[0]), meta.get("height", every[0].size[1]))
    if stated != every[0].size:
        raise ValueError(
            f"{folder / 'meta.json'} states {stated[0]}x{stated[1]} pixels, {every[0].name} is "
            f"{every[0].size[0]}x{every[0].size[1]}: the georeference would be wrong"
        )
    return TileMap(folder, rasters, georeference, labels, inside)


def _raster(
    folder: Path, name: str, meta: Mapping[str, Any], values: Mapping[str, str] | None = None
) -> Mosaic:
    """The layer, picture or label raster of that name, wherever in the folder it is."""
    try:
        names = None if values is None else {int(value): text for value, text in values.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'meta.json'}: the labels {name} should be an object of whole numbers and "
            f"names ({error})"
        ) from error
    layer = values is None and name in [*meta.get("layers", []), "inside"]
    places = [folder / "layers", folder] if layer else [folder]
    if "block" in meta and (layer or names is not None):
        block = int(meta["block"])
        for place in places:
            if (place / name).is_dir():
                if "width" not in meta or "height" not in meta:
                    raise ValueError(f"{folder / 'meta.json'}: blocks need width and height")
                size = (int(meta["width"]), int(meta["height"]))
                template = "{row}_{col}.png"
                return Mosaic(name, place / name, template, size, (block, block), names=names)
    for place in places:
        files = [file for file in sorted(place.glob("*"))
                 if file.stem == name and file.suffix.lower() in IMAGE_SUFFIXES]  # fmt: skip
        if len(files) > 1:
            both = ", ".join(file.name for file in files)
            raise ValueError(f"{place} has several images named {name} ({both}): keep one of them")
        for file in files:
            size = image_size(file)
            colour = names is None and not layer
            escaped = file.name.replace("{", "{{").replace("}", "}}")
            return Mosaic(name, file.parent, escaped, size, size, colour, names)
    known = [*meta.get("layers", []), *(Path(image).stem for image in meta.get("images", {}))]
    raise FileNotFoundError(f"{folder} has no image {name}; meta.json names {', '.join(known)}")


def _read_meta(path: Path) -> Mapping[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: expected an object of names and values")
    kinds = {"layers": "a list", "images": "an object", "labels": "an object",
             "block": "a whole number"}  # fmt: skip
    known = {"a list": list, "an object": dict, "a whole number": int}
    for key, kind in kinds.items():
        if key in meta and not isinstance(meta[key], known[kind]):
            raise ValueError(f"{path}: {key} is {meta[key]!r}, expected {kind}")
    return meta


def _xyz(folder: Path) -> TileMap:
    zooms = [int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()]
    tiles = [
        (int(column.name), int(file.stem), file)
        for column in (folder / str(max(zooms))).iterdir() if column.name.isdigit()
        for file in column.iterdir()
        if file.stem.isdigit() and file.suffix.lower() in IMAGE_SUFFIXES
    ] if zooms else []  # fmt: skip
    if not tiles:
        raise ValueError(f"{folder} has no meta.json and no tiles ZOOM/X/Y.png. A map is {LAYOUT}")
    kinds = sorted({file.suffix for _, _, file in tiles})
    if len(kinds) > 1:
        raise ValueError(f"{folder} mixes tiles of {', '.join(kinds)}: keep one kind")
    x, y, zoom = [t[0] for t in tiles], [t[1] for t in tiles], max(zooms)
    width, height = image_size(tiles[0][2])
    if width != height:
        raise ValueError(f"{tiles[0][2]} is {width}x{height}: tiles have to be square")
    size = ((max(x) - min(x) + 1) * width, (max(y) - min(y) + 1) * height)
    template = "{col}/{row}" + kinds[0]
    mosaic = Mosaic(
        "tiles", folder / str(zoom), template, size, (width, height), True, first=(min(y), min(x))
    )
    georeference = WebMercator(zoom, min(x) * width, min(y) * height, width)
    return TileMap(folder, [mosaic], georeference)
