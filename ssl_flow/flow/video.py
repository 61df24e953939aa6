"""Frames from a video file or a folder of images, in order, with their times."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from .container import (
    LASTING,
    NOTHING,
    VideoError,
    check_size,
    import_av,
    limits,
    opened,
    promised_seconds,
    video_seconds,
    why,
    why_no_file,
)

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Frame:
    """One picture of a video: `time` in seconds, `image` (H, W, 3) RGB uint8.

    `share` tells how much of the video lies behind it, 0 to 1, for a progress bar; 0 if unknown.
    """

    def __init__(
        self,
        time: float,
        image: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]],
        share: float = 0.0,
    ) -> None:
        """Take the picture, or what makes it: then it is made when it is first asked for.

        At a gap of three frames two of three are never looked at, and to shrink one costs about as
        much as to decode it.
        """
        self.time, self.share, self._image = time, share, image

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture."""
        if callable(self._image):
            self._image = self._image()
        return self._image


@dataclass(frozen=True)
class Header:
    """What a video says about itself, before anything is decoded; None where it does not say."""

    seconds: float | None
    frames: int | None


def _nothing() -> None:
    pass


def read_frames(
    path: str | Path,
    short_side: int | None = None,
    folder_fps: float = 24.0,
    alive: Callable[[], object] = _nothing,
) -> Iterator[Frame]:
    """Yield the frames of a video file, or of a folder of images, in order of display.

    Damaged parts are left out, with all that is predicted from them: reading goes on at the next
    key frame. Only when the last good frame has been yielded does a `VideoError` say what was
    wrong: catch it to keep what could be read.

    Args:
        path: a video file, or a folder of images (sorted by the numbers in their names).
        short_side: shrink frames so that the shorter side has this many pixels (aspect kept, area
            interpolation, never enlarged); None keeps the size.
        folder_fps: frames a second of an image folder, which has no times of its own.
        alive: called for each packet or image, also where no frame comes of it.

    Yields:
        `Frame`s as they are to be displayed (rotation and pixel aspect applied), with strictly
        increasing times.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        VideoError: it cannot be opened, has no video, or a part of it was damaged (at the end).
        OSError: the disk failed while it was read; what was yielded is not all.
        ImportError: PyAV is not installed (it is needed for video files only).
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path, short_side, folder_fps, alive)
        return
    reason = why_no_file(path)
    if reason == NOTHING:
        raise FileNotFoundError(f"no such video or folder: {path}")
    if reason is not None:  # opening a pipe would wait for ever
        raise VideoError(f"{reason}: {path}")
    yield from _read_video(path, short_side, alive)


def read_header(path: str | Path, folder_fps: float = 24.0) -> Header:
    """Return what a video, or a folder of images, says about its length; cheap.

    Raises:
        VideoError: it cannot be opened, or has no video.
        OSError: the disk failed.
    """
    path = Path(path)
    if path.is_dir():
        count = len(image_files(path))
        return Header(count / folder_fps, count)
    reason = why_no_file(path)
    if reason is not None:
        raise VideoError(f"{reason}: {path}")
    with opened(path) as (container, stream):
        seconds = video_seconds(container, stream)
        rate = stream.average_rate or stream.guessed_rate
        frames = stream.frames or (round(seconds * rate) if seconds and rate else None)
        return Header(seconds, frames)


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


def _read_folder(
    folder: Path, short_side: int | None, fps: float, alive: Callable[[], object]
) -> Iterator[Frame]:
    bad: list[str] = []
    files = image_files(folder)
    for index, file in enumerate(files):
        alive()
        try:
            image = _read_image(file)
        except VideoError as error:
            bad.append(f"{file.name} {error}")
            continue
        width, height = _shrunk(image.shape[1], image.shape[0], short_side)
        small = image
        if (height, width) != image.shape[:2]:
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore
        rgb = np.asarray(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        yield Frame(index / fps, rgb, (index + 1) / len(files))
    if bad:
        raise VideoError(f"{len(bad)} unusable image(s): {bad[0]}")


def _read_image(file: Path) -> NDArray[np.uint8]:
    """Return the picture, (H, W, 3) BGR."""
    from PIL import Image

    reason = why_no_file(file)
    if reason is not None:
        raise VideoError(f"is {reason}")
    try:
        data = file.read_bytes()
    except OSError as error:
        if error.errno not in LASTING:
            raise
        raise VideoError(f"cannot be read ({error.strerror})") from error
    try:
        with Image.open(io.BytesIO(data)) as header:  # decodes nothing yet
            check_size(*header.size)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except VideoError:
        raise
    except Exception as error:  # either library has its own ways to fail on broken files
        raise VideoError(f"cannot be read ({type(error).__name__})") from error
    if image is None:
        raise VideoError("cannot be decoded")
    return np.asarray(image, dtype=np.uint8)


def _read_video(path: Path, short_side: int | None, alive: Callable[[], object]) -> Iterator[Frame]:
    av = import_av()
    with opened(path) as (container, stream):
        check_size(stream.width, stream.height)
        # One thread: the workers fill the processor, and what FFmpeg makes of a damaged file would
        # otherwise depend on how its threads happen to run.
        stream.codec_context.thread_count = 1
        # The same limit for pictures that turn out larger than the header said.
        stream.codec_context.options = limits()
        damage: list[str] = []
        step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        seconds, aspect = video_seconds(container, stream), stream.sample_aspect_ratio
        first: float | None = None
        last: float | None = None
        hold = 0.0  # seconds: the longest that a frame is shown
        left_out = 0
        reformatter = av.video.reformatter.VideoReformatter()  # one: it keeps its tables
        for raw in _decode(av, container, stream, damage, alive):
            if raw is None:
                left_out += 1
                continue
            time = raw.time
            if last is not None and (time is None or time <= last):
                time = last + step  # no usable time stamp: count by the frame rate
            hold = max(hold, _shown(raw, stream), (time or 0.0) - last if last is not None else 0.0)
            last = time or 0.0
            first = last if first is None else first
            share = min((last - first) / seconds, 1.0) if seconds else 0.0
            yield Frame(last, partial(_to_rgb, raw, short_side, aspect, reformatter), share)
        promised = promised_seconds(container, stream)
        if promised and first is not None and last is not None:
            # To FFmpeg a Matroska file cut off anywhere, and an MP4 between two packets, is whole.
            missing = promised - max(last, last - first) - hold
            if missing > max(1.0, 0.1 * promised):
                damage.append(f"its pictures end after {last:.1f} of {promised:.1f} s")
    if left_out:
        damage.append(f"{left_out} frame(s) damaged")
    if last is None:
        raise VideoError("no frame could be decoded" + "".join(f"; {text}" for text in damage))
    if damage:
        raise VideoError("; ".join(damage))


def _decode(
    av: ModuleType,
    container: InputContainer,
    stream: VideoStream,
    damage: list[str],
    alive: Callable[[], object],
) -> Iterator[VideoFrame | None]:
    """Yield all frames that can be decoded, None for one that cannot be trusted.

    Appends to `damage` what went wrong.
    """
    bad, reason, lost = 0, "", False
    packets = container.demux(stream)
    while True:
        alive()
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:  # a file cut off: FFmpeg can't find more packets
            damage.append(f"file ends early: {why(error)}")
            packet = None
        try:
            # Packet None asks the decoder for the frames that it still holds.
            for frame in stream.decode(packet):
                # What is predicted from a picture that is missing is smeared, flagged or not.
                lost = frame.is_corrupt or (lost and not frame.key_frame)
                yield None if lost else frame
        except av.EOFError:  # demux has already sent the empty last packet
            pass
        except av.FFmpegError as error:
            bad, reason, lost = bad + 1, why(error), True
        if packet is None:
            break
    if bad:
        damage.append(f"{bad} packet(s) could not be decoded: {reason}")


def _shown(raw: VideoFrame, stream: VideoStream) -> float:
    duration = getattr(raw, "duration", 0)  # PyAV 14.4
    return float(duration * stream.time_base) if duration and stream.time_base else 0.0


def _to_rgb(
    raw: VideoFrame, short_side: int | None, aspect: Fraction | None, reformatter: VideoReformatter
) -> NDArray[np.uint8]:
    width, height = raw.width, raw.height
    check_size(width, height)
    if aspect and aspect != 1 and 1 / 4 <= aspect <= 4:  # pixels that are not square
        if aspect > 1:
            height = max(round(height / aspect), 1)
        else:
            width = max(round(width * aspect), 1)
    width, height = _shrunk(width, height, short_side)
    small = reformatter.reformat(
        raw, width=width, height=height, format="rgb24", interpolation="AREA"
    )
    image = np.asarray(small.to_ndarray(), dtype=np.uint8)  # (H, W, 3)
    # PyAV reports the display matrix's angle, counter-clockwise in degrees, as np.rot90 turns.
    turns = round(raw.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _shrunk(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width, height
    return round(width * short_side / shorter), round(height * short_side / shorter)
