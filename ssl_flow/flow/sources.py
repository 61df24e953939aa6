"""Which videos and frame folders lie below the given paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .video import IMAGE_EXTENSIONS, Frame, image_files, read_frames

# fmt: off
VIDEO_EXTENSIONS = (
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
)
# fmt: on


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


def find_sources(paths: Iterable[str | Path]) -> tuple[list[Source], list[Problem]]:
    """Find the videos and frame folders at and below `paths`.

    A folder is searched through. A folder that directly holds images and no video is one source:
    its images are the frames. A source is named by its path from the given folder, that folder's
    own name first (`clips/tom/a.mp4`), so equal file names in two folders do not collide.

    Returns:
        The sources sorted by name, and what looks like a video but is no regular, readable file.

    Raises:
        FileNotFoundError: one of `paths` does not exist.
        ValueError: a file's extension is unknown, two sources would have the same name, or nothing
            was found.
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

    def unreadable(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"cannot be listed: {error.strerror}"))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(folder)
        videos = [here / n for n in sorted(names) if Path(n).suffix.lower() in VIDEO_EXTENSIONS]
        videos = [video for video in videos if not video.name.startswith(".")]
        if not videos and image_files(here):
            files.append(here)
        for video in videos:
            if video.is_file():
                files.append(video)
            else:  # a dangling link, or a pipe that would block for ever
                problems.append(
                    Problem(video.relative_to(root.parent).as_posix(), "not a regular file")
                )
    return files
