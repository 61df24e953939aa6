"""Which videos and frame folders lie below the given paths."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .video import IMAGE_EXTENSIONS, Frame, image_files, read_frames, why_no_file

VIDEO_EXTENSIONS = (
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One video to compute flow of.

    `name` is unique, and the same on the next run. `frames(short_side)` iterates over the frames;
    it has to be picklable (a plain function or a `functools.partial` of one) when several worker
    processes are used. `path` is where the frames come from, None when they are generated.
    """

    name: str
    frames: Callable[[int | None], Iterator[Frame]]
    path: Path | None = None


@dataclass(frozen=True)
class Problem:
    """A source, or a part of it, that could not be used, and why."""

    source: str
    reason: str


def fingerprint(source: Source) -> tuple[int | None, str | None]:
    """Return what tells whether a source is still what it was, without reading contents.

    That is its size in bytes, and of an image folder a hash of names and sizes. Times of files are
    left out: a copied collection is the same collection. OSError: the source has gone.
    """
    if source.path is None:
        return None, None
    if not source.path.is_dir():
        return source.path.stat().st_size, None
    total, names = 0, hashlib.sha256()
    for file in image_files(source.path):
        size = file.stat().st_size if file.exists() else 0  # 0: a link to nothing
        total += size
        names.update(os.fsencode(file.name) + b"\0%d\n" % size)
    return total, names.hexdigest()[:16]


def part_of(sources: Sequence[Source], number: int, count: int) -> list[Source]:
    """Return part `number` (1 ... `count`) of the sources; all parts together are all of them.

    A hash of its name decides where a source belongs: it stays there when others are added.
    ValueError: `number` is not from 1 to `count`.
    """
    if not 1 <= number <= count:
        raise ValueError(f"part {number} of {count}: the first part is 1, the last is {count}")

    def part(source: Source) -> int:
        digest = hashlib.sha256(os.fsencode(source.name)).digest()
        return int.from_bytes(digest[:8], "big") % count + 1

    return [source for source in sources if part(source) == number]


def find_sources(paths: Iterable[str | Path]) -> tuple[list[Source], list[Problem]]:
    """Find the videos and frame folders at and below `paths`.

    A folder is searched through. A folder that directly holds images and no video is one source:
    its images are the frames. A source is named by its path from the given folder, that folder's
    own name first (`clips/tom/a.mp4`), so equal file names in two folders do not collide.

    Returns the sources sorted by name, and what looks like a video but is no file that can be read.
    FileNotFoundError: one of `paths` does not exist. ValueError: a file's extension is unknown, two
    sources would have the same name, or nothing was found.
    """
    found: dict[str, Path] = {}
    problems: list[Problem] = []
    given = [Path(path) for path in paths]
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
    for path in given:
        root = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would rename links)
        if root.is_dir():
            files = _search(root, problems)
        elif path.suffix.lower() in VIDEO_EXTENSIONS:
            files = [root]
        else:
            raise ValueError(f"{path}: not a known video extension ({' '.join(VIDEO_EXTENSIONS)})")
        base = root.parent if root.is_dir() else root.parent.parent
        for file in files:
            name = file.relative_to(base).as_posix()
            if found.setdefault(name, file) != file:
                raise ValueError(
                    f"{found[name]} and {file} would both be named {name!r}: give the folder "
                    "above both instead, or use one store for each"
                )
    if not found:
        raise ValueError(
            f"no video found in {', '.join(map(str, given)) or 'an empty list of paths'}: looked "
            f"for files ending in {' '.join(VIDEO_EXTENSIONS)} and for folders of images ending "
            f"in {' '.join(IMAGE_EXTENSIONS)}"
        )
    sources = [Source(name, partial(read_frames, found[name]), found[name]) for name in found]
    return sorted(sources, key=lambda source: source.name), problems


def _search(root: Path, problems: list[Problem]) -> list[Path]:
    """Return the videos and frame folders below `root`; hidden files and folders are left out."""
    files: list[Path] = []
    searched: set[tuple[int, int]] = set()  # by device and inode: links may lead in circles

    def problem(path: Path, reason: str) -> None:
        problems.append(Problem(path.relative_to(root.parent).as_posix(), reason))

    def unreadable(error: OSError) -> None:
        problem(Path(error.filename), f"cannot be listed: {error.strerror}")

    def is_video(path: Path) -> bool:
        return not path.name.startswith(".") and path.suffix.lower() in VIDEO_EXTENSIONS

    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        here = Path(folder)
        status = here.stat()
        if (status.st_dev, status.st_ino) in searched:
            problem(here, "a link to a folder that is searched already")
            subfolders.clear()
            continue
        searched.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        videos = [here / name for name in sorted(names) if is_video(here / name)]
        for video in videos:
            try:
                reason = why_no_file(video)
            except OSError as error:
                reason = f"cannot be reached ({error.strerror})"
            if reason is None:
                files.append(video)
            else:
                problem(video, reason)
        if not videos and image_files(here):
            files.append(here)
        elif not videos and is_video(here) and not subfolders:
            problem(here, "not a regular file (a folder)")
    return files
