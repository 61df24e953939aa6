"""`ssl-flow loc2vec embed` and `ssl-flow loc2vec neighbours`: places -> vectors -> places alike."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssl_flow.data.georeference import great_circle
from ssl_flow.data.open_map import open_map_spec
from ssl_flow.evaluation.feature_cache import encoder_digest
from ssl_flow.evaluation.loc2vec import embed_tiles, files_of, load_judged
from ssl_flow.evaluation.refusal import run_command
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models import pick_device

_PART = 4096  # places between two saves
_KINDS = (".csv", ".npy", ".parquet")


@dataclass
class Embed:
    """A vector for each place of a list. Started again after a stop, it goes on where it was."""

    lonlat: Path
    """CSV file with columns lon and lat (or longitude and latitude) in degrees; without a header
    the first two are taken as such."""
    map: str
    """What tiles are cut from: a folder with meta.json (`ssl-flow loc2vec rasterize` writes one),
    an image in it, a GeoTIFF, tiles ZOOM/X/Y.png; FOLDER@NAME,NAME: some of its layers."""
    encoder: str
    """A run or encoder folder of `ssl-flow train loc2vec`; or histograms."""
    out: Path
    """.csv (lon, lat, e0, e1, ...), .parquet (likewise; needs pyarrow), or .npy (N, D) float32."""
    metres: float = 0.0
    """Side of a tile on the ground, where the encoder does not say."""
    pixels: int = 64
    """Side of a tile in pixels, likewise."""
    batch: int = 256
    """Tiles per forward pass."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass
class Neighbours:
    """The places whose vectors are nearest to that of one of them."""

    vectors: Path
    """A file that `ssl-flow loc2vec embed` wrote."""
    row: int | None = None
    """Line of the place to start from, counted from 0 without the header."""
    lonlat: tuple[float, float] | None = None
    """Or longitude and latitude: the place of the file that lies nearest to it."""
    count: int = 10
    """How many."""


def embed_command(argv: list[str]) -> int:
    """Run `ssl-flow loc2vec embed`; 2 for bad input, told on stderr."""
    return run_command("ssl-flow loc2vec embed", Embed, argv, _embed)


def neighbours_command(argv: list[str]) -> int:
    """Run `ssl-flow loc2vec neighbours`; 2 for bad input, told on stderr."""
    return run_command("ssl-flow loc2vec neighbours", Neighbours, argv, _neighbours)


def _embed(command: Embed) -> None:
    if command.out.suffix not in _KINDS:
        raise ValueError(f"--out {command.out}: expected a name in {', '.join(_KINDS)}")
    if command.out.suffix == ".parquet":
        _pyarrow()
    if command.batch < 1 or command.pixels < 1:
        raise ValueError("--batch and --pixels have to be 1 or more")
    places, tile_map = read_places(command.lonlat), open_map_spec(command.map)
    xy = tile_map.locate(places)
    encoder = load_judged(command.encoder, 0, tile_map).to(pick_device(command.device))
    tile = getattr(encoder, "tile", {}) or {"side": command.pixels, "metres": command.metres}
    if not tile["metres"] > 0:
        raise ValueError(f"{command.encoder} does not say how large its tiles are: give --metres")
    digests = [encoder_digest(encoder), hashlib.sha256(places.tobytes()).hexdigest()]
    stamps = [
        (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files_of(tile_map)
    ]
    about = json.dumps([*digests, stamps, tile_map.channels, tile])
    parts = command.out.with_name(command.out.name + ".parts")
    noted = parts / "about.json"
    if not noted.exists() or noted.read_text() != about:
        shutil.rmtree(parts, ignore_errors=True)  # of another encoder, map or list
        parts.mkdir(parents=True)
        write_atomically(noted, about.encode())
    starts = range(0, len(xy), _PART)
    for start in tqdm(starts, desc="places", unit_scale=_PART, disable=not sys.stderr.isatty()):
        file = parts / f"{start:012d}.npy"
        if not file.exists():
            cuts = [tile_map.cut(x, y, **tile) for x, y in xy[start : start + _PART].tolist()]
            tiles = np.stack(cuts)
            found = embed_tiles(encoder, tiles, command.batch)
            found[~tiles.any((1, 2, 3))] = np.nan  # nothing there: all such would be alike
            data = io.BytesIO()
            np.save(data, found)
            write_atomically(file, data.getvalue())
    vectors = np.concatenate([np.load(parts / f"{start:012d}.npy") for start in starts])
    write_vectors(command.out, places, vectors)
    shutil.rmtree(parts)
    empty = np.flatnonzero(np.isnan(vectors[:, 0]))
    if len(empty):
        rows = ", ".join(f"row {i}: {places[i, 0]:g}, {places[i, 1]:g}" for i in empty[:3])
        print(
            f"{len(empty)} of {len(places)} places have nan for a vector, as the map shows nothing "
            f"there: {rows}",
            file=sys.stderr,
        )
    print(f"{command.out}: {vectors.shape[0]} places, {vectors.shape[1]} numbers each")


def read_places(path: Path) -> np.ndarray:
    """(N, 2) longitudes and latitudes of a CSV file; ValueError names the line that is none."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, line) for line in reader if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8 ({error})") from error
    columns, first = [0, 1], 0
    heads = [head.strip().lower() for head in lines[0][1]] if lines else []
    if heads and heads[0][:1] not in tuple("+-.0123456789"):
        names = (("lon", "longitude", "lng"), ("lat", "latitude"))
        columns = [next((heads.index(n) for n in known if n in heads), -1) for known in names]
        if -1 in columns:
            raise ValueError(f"{path} has the columns {', '.join(heads)}; expected lon and lat")
        first = 1
    places = []
    for number, line in lines[first:]:
        try:
            places.append([float(line[column]) for column in columns])
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} line {number} is {line}; expected two numbers") from error
        if abs(places[-1][1]) > 90:
            raise ValueError(
                f"{path} line {number}: latitude {places[-1][1]:g} is not within -90 and 90; the "
                "order is lon, lat unless a first line names the columns"
            )
    if not places or not np.isfinite(places).all():
        raise ValueError(f"{path} holds no places, or some that are not finite")
    return np.array(places)


def write_vectors(path: Path, places: np.ndarray, vectors: np.ndarray) -> None:
    """Places (N, 2) and their vectors (N, D) as .npy (vectors alone), .csv or .parquet."""
    buffer = io.BytesIO()
    table = {"lon": places[:, 0], "lat": places[:, 1]}
    table |= {f"e{i}": column for i, column in enumerate(vectors.T)}
    if path.suffix == ".npy":
        np.save(buffer, vectors)
    elif path.suffix == ".csv":
        rows = np.column_stack(list(table.values()))
        np.savetxt(buffer, rows, "%.9g", ",", header=",".join(table), comments="")
    else:
        pyarrow, parquet = _pyarrow()
        parquet.write_table(pyarrow.table(table), buffer)
    write_atomically(path, buffer.getvalue())


def read_vectors(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Places (N, 2), NaN where the file has none, and vectors (N, D), as `write_vectors` wrote."""
    try:
        if path.suffix == ".npy":
            table = np.load(path)
            table = np.hstack([np.full((len(table), 2), np.nan), table])
        elif path.suffix == ".parquet":
            table = np.array(list(_pyarrow()[1].read_table(path).to_pydict().values())).T
        elif path.suffix == ".csv":
            table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        else:
            raise ValueError(f"expected a name in {', '.join(_KINDS)}")
        if table.shape[1] < 3:
            raise ValueError(f"{table.shape[1]} columns, expected lon, lat and a vector")
    except ImportError:
        raise
    except Exception as error:  # each format has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not what `loc2vec embed` writes ({reason})") from error
    return table[:, :2], table[:, 2:]


def _neighbours(command: Neighbours) -> None:
    places, vectors = read_vectors(command.vectors)
    if (command.row is None) == (command.lonlat is None):
        raise ValueError("give either --row or --lonlat")
    if command.lonlat is not None:
        if np.isnan(places).all():
            raise ValueError(f"{command.vectors} holds no places: give --row")
        away = great_circle(np.array(command.lonlat), places)
        away = np.where(np.isnan(vectors[:, 0]), np.inf, away)
        command.row = int(away.argmin())
        print(f"row {command.row} is the nearest, {away.min():.0f} m away", file=sys.stderr)
    row = command.row or 0
    if not 0 <= row < len(vectors):
        raise ValueError(f"--row is {row}; {command.vectors} has {len(vectors)}, from 0 on")
    if np.isnan(vectors[row, 0]):
        raise ValueError(f"row {row} of {command.vectors} is nan: the map shows nothing there")
    distances = np.linalg.norm(vectors - vectors[row], axis=1)
    order = distances.argsort(kind="stable")[: np.isfinite(distances).sum()]  # nan is last
    print("row,lon,lat,distance")
    for index in order[: command.count + 1].tolist():
        lon, lat = places[index]
        print(f"{index},{lon:.7g},{lat:.7g},{distances[index]:.6g}")


def _pyarrow():  # type: ignore[no-untyped-def]  # noqa: ANN202 (two modules without types)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "pip install 'ssl-flow[parquet]', or take .csv or .npy"
        raise ImportError(f"a .parquet file needs pyarrow: {hint}") from error
    return pyarrow, parquet
