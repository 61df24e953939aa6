"""Frames from a video file or a folder of images, in order, with their times."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class VideoError(ValueError):
    """A video, or a part of it, could not be read; the message says which and why."""


@dataclass
class Frame:
    """One picture of a video: `time` in seconds, `image` (H, W, 3) RGB uint8."""

    time: float
    image: NDArray[np.uint8]


def read_frames(
    path: str | Path, short_side: int | None = None, folder_fps: float = 24.0
) -> Iterator[Frame]:
    """Yield the frames of a video file, or of a folder of images, in order of display.

    Damaged parts are left out and reading goes on behind them. Only when the last good frame has
    been yielded does a `VideoError` say what was wrong: catch it to keep what could be read.

    Args:
        path: a video file, or a folder of images (sorted by the numbers in their names).
        short_side: shrink frames so that the shorter side has this many pixels (aspect kept, area
            interpolation, never enlarged); None keeps the size.
        folder_fps: frames a second of an image folder, which has no times of its own.

    Yields:
        `Frame`s as they are to be displayed (rotation applied), with strictly increasing times.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        VideoError: it cannot be opened, has no video, or a part of it was damaged (at the end).
        ImportError: PyAV is not installed (it is needed for video files only).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such video or folder: {path}")
    if path.is_dir():
        yield from _read_folder(path, short_side, folder_fps)
    elif path.is_file():
        yield from _read_video(path, short_side)
    else:  # opening a pipe would wait for ever
        raise VideoError(f"not a regular file: {path}")


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in `folder`, sorted so that `frame2` comes before `frame10`."""
    files = [
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith(".")
    ]
    return sorted(files, key=_numeric_key)


def _numeric_key(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.split(r"(\d+)", path.stem)
    return [(int(p), "") if i % 2 else (0, p) for i, p in enumerate(parts)], path.name


def _read_folder(folder: Path, short_side: int | None, fps: float) -> Iterator[Frame]:
    unreadable = []
    for index, file in enumerate(image_files(folder)):
        data = np.frombuffer(file.read_bytes(), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if image is None:
            unreadable.append(file.name)
            continue
        width, height = _shrunk(image.shape[1], image.shape[0], short_side)
        if (height, width) != image.shape[:2]:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        rgb = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        yield Frame(index / fps, rgb)
    if unreadable:
        raise VideoError(f"{len(unreadable)} unreadable image(s), the first is {unreadable[0]}")


def _read_video(path: Path, short_side: int | None) -> Iterator[Frame]:
    av = _import_av()
    try:
        # Absolute and with its protocol: FFmpeg would read "a:b.mp4" as protocol "a".
        container = av.open(f"file:{path.absolute()}")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"cannot be opened as video: {_reason(error)}") from error
    with container:
        if not container.streams.video:
            raise VideoError("has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # The next frame is decoded while flow is computed; more threads would fight the workers.
        stream.codec_context.thread_count = 2
        damage: list[str] = []
        step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        last: float | None = None
        corrupt = 0
        for raw in _decode(av, container, stream, damage):
            time = raw.time
            if last is not None and (time is None or time <= last):
                time = last + step  # no usable time stamp: count by the frame rate
            last = time or 0.0
            if raw.is_corrupt:
                corrupt += 1
            else:
                yield Frame(last, _to_rgb(raw, short_side))
    if corrupt:
        damage.append(f"{corrupt} frame(s) damaged")
    if last is None:
        raise VideoError("no frame could be decoded" + "".join(f"; {text}" for text in damage))
    if damage:
        raise VideoError("; ".join(damage))


def _decode(
    av: ModuleType, container: InputContainer, stream: VideoStream, damage: list[str]
) -> Iterator[VideoFrame]:
    """Yield all frames that can be decoded; append to `damage` what went wrong."""
    bad, reason = 0, ""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:  # a file cut off: FFmpeg can't find more packets
            damage.append(f"file ends early: {_reason(error)}")
            packet = None
        try:
            # Packet None asks the decoder for the frames that it still holds.
            yield from stream.decode(packet)
        except av.EOFError:  # demux has already sent the empty last packet
            pass
        except (av.FFmpegError, OSError) as error:
            bad, reason = bad + 1, _reason(error)
        if packet is None:
            break
    if bad:
        damage.append(f"{bad} packet(s) could not be decoded: {reason}")


def _to_rgb(raw: VideoFrame, short_side: int | None) -> NDArray[np.uint8]:
    width, height = _shrunk(raw.width, raw.height, short_side)
    small = raw.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    image = np.asarray(small.to_ndarray(), dtype=np.uint8)  # (H, W, 3)
    # PyAV reports the display matrix's angle, counter-clockwise in degrees, as np.rot90 turns.
    turns = round(raw.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _shrunk(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width, height
    return round(width * short_side / shorter), round(height * short_side / shorter)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _import_av() -> ModuleType:
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install av") from error
    av.logging.set_level(None)  # damage is reported by VideoError, not by lines on stderr
    return av
