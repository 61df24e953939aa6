"""Frames from a video file or a folder of images, in order, with their times."""

from __future__ import annotations

import errno
import io
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # PyAV is imported where a video is opened: reading a store needs none
    from av import VideoFrame, VideoStream
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

Image = NDArray[np.uint8]
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# A damaged or malicious header can claim any size: it is refused before memory is asked for it.
MAX_SIDE = 16384  # pixels, as libavcodec's H.264 decoder
MAX_PIXELS = 2**28
# Why a file cannot be opened that are no trouble of the disk: the next call would meet them too.
_LASTING = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
_NOTHING = "there is nothing"
_FOLDER_FPS = 24.0  # frames a second of an image folder, which has no times of its own


class VideoError(ValueError):
    """A video, or a part of it, could not be read; the message says which and why."""


class Frame:
    """One picture of a video: `time` in seconds, `image` (H, W, 3) RGB uint8.

    `share` tells how much of the video lies behind it, 0 to 1, for a progress bar; 0 if unknown.
    """

    def __init__(self, time: float, image: Image | Callable[[], Image], share: float = 0.0) -> None:
        """Take the picture, or what makes it when it is first asked for: most are never looked at,
        and to shrink one costs about as much as to decode it."""
        self.time, self.share, self._image = time, share, image

    @property
    def image(self) -> Image:
        """The picture."""
        if callable(self._image):
            self._image = self._image()
        return self._image


def read_frames(
    path: str | Path,
    short_side: int | None = None,
    alive: Callable[[], object] = lambda: None,
) -> Iterator[Frame]:
    """Yield the frames of a video file, or of a folder of images, in order of display.

    They are as they are to be displayed (rotation and pixel aspect applied), with strictly
    increasing times. Damaged parts are left out, with all that is predicted from them: reading goes
    on at the next key frame. Only when the last good frame has been yielded does a `VideoError` say
    what was wrong: catch it to keep what could be read.

    Images of a folder are sorted by the numbers in their names, 24 a second. Frames are
    shrunk to a shorter side of `short_side` pixels (aspect kept, area interpolation, never
    enlarged). `alive` is called for each packet or image, also where no frame comes of it.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        VideoError: it cannot be opened, has no video, or a part of it was damaged (at the end).
        OSError: the disk failed while it was read; what was yielded is not all.
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path, short_side, alive)
        return
    reason = why_no_file(path)
    if reason == _NOTHING:
        raise FileNotFoundError(f"no such video or folder: {path}")
    if reason is not None:  # opening a pipe would wait for ever
        raise VideoError(f"{reason}: {path}")
    yield from _read_video(path, short_side, alive)


def why_no_file(path: Path) -> str | None:
    """Return why `path` is no file that can be read to its end, or None; OSError of the disk."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "not a regular file (a link to nothing)" if path.is_symlink() else _NOTHING
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        return f"cannot be reached ({error.strerror})"  # a loop of links, a folder that is locked
    if stat.S_ISREG(mode):
        return None
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
    return f"not a regular file ({kind})"


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in `folder`, sorted so that `frame2` comes before `frame10`."""

    def numeric(path: Path) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", path.stem)
        return [(int(p), "") if i % 2 else (0, p) for i, p in enumerate(parts)], path.name

    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted((f for f in files if f.suffix.lower() in IMAGE_EXTENSIONS), key=numeric)


def _read_folder(
    folder: Path, short_side: int | None, alive: Callable[[], object]
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
        size = shrunk_size(image.shape[1], image.shape[0], short_side)
        if size[::-1] != image.shape[:2]:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        rgb = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        yield Frame(index / _FOLDER_FPS, rgb, (index + 1) / len(files))
    if bad:
        raise VideoError(f"{len(bad)} unusable image(s): {bad[0]}")


def _read_image(file: Path) -> Image:
    """Return the picture, (H, W, 3) BGR."""
    import PIL.Image

    reason = why_no_file(file)
    if reason is not None:
        raise VideoError(f"is {reason}")
    try:
        data = file.read_bytes()
        with PIL.Image.open(io.BytesIO(data)) as header:  # decodes nothing yet
            _check_size(*header.size)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except VideoError:
        raise
    except Exception as error:  # either library has its own ways to fail on broken files
        number = getattr(error, "errno", None)
        if number is not None and number not in _LASTING:
            raise
        raise VideoError(f"cannot be read ({type(error).__name__})") from error
    if image is None:
        raise VideoError("cannot be decoded")
    return np.asarray(image, dtype=np.uint8)


def _read_video(path: Path, short_side: int | None, alive: Callable[[], object]) -> Iterator[Frame]:
    from av.video.reformatter import VideoReformatter

    with opened(path) as (container, stream):
        _check_size(stream.width, stream.height)
        # One thread: the workers fill the processor, and what FFmpeg makes of a damaged file would
        # otherwise depend on how its threads happen to run.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _limits()  # for pictures larger than the header said
        damage: list[str] = []
        step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        seconds, aspect = _header_seconds(container, stream), stream.sample_aspect_ratio
        first: float | None = None
        last = hold = 0.0  # seconds; `hold`: the longest that a frame is shown
        left_out = 0
        reformatter = VideoReformatter()  # one: it keeps its tables
        for raw, read in _decode(container, stream, damage, alive):
            if raw is None:
                left_out += 1
                continue
            time = raw.time
            if first is None:
                first = last = time or 0.0
            else:
                if time is None or time <= last:
                    time = last + step  # no usable time stamp: count by the frame rate
                hold, last = max(hold, time - last), time
            shown = getattr(raw, "duration", 0) * (stream.time_base or 0)  # PyAV 14.4
            hold = max(hold, float(shown))
            share = (last - first) / seconds if seconds else read
            image = partial(_to_rgb, raw, short_side, aspect, reformatter)
            yield Frame(last, image, min(share, 1.0))
        promised = promised_seconds(container, stream)
        if promised and first is not None:
            # To FFmpeg a Matroska file cut off anywhere, and an MP4 between two packets, is whole.
            missing = promised - max(last, last - first) - hold
            if missing > max(1.0, 0.1 * promised):
                damage.append(f"its pictures end after {last:.1f} of {promised:.1f} s")
    if left_out:
        damage.append(f"{left_out} frame(s) damaged")
    if first is None:
        raise VideoError("; ".join(["no frame could be decoded", *damage]))
    if damage:
        raise VideoError("; ".join(damage))


def _decode(
    container: InputContainer, stream: VideoStream, damage: list[str], alive: Callable[[], object]
) -> Iterator[tuple[VideoFrame | None, float]]:
    """Yield all frames that can be decoded, None for one that is damaged; note that in `damage`.

    With each comes the share of the file's bytes that lies before its packet.
    """
    from av import FFmpegError
    from av.error import EOFError as EndOfFile

    bad, reason, lost, read = 0, "", False, 0.0
    packets = container.demux(stream)
    while True:
        alive()
        try:
            packet = next(packets, None)
        except FFmpegError as error:  # a file cut off: FFmpeg can't find more packets
            damage.append(f"file ends early: {_why(error)}")
            packet = None
        if packet is not None and packet.pos is not None:
            read = packet.pos / max(container.size, 1)
        try:
            # Packet None asks the decoder for the frames that it still holds.
            for frame in stream.decode(packet):
                # What is predicted from a picture that is missing is smeared, flagged or not.
                lost = frame.is_corrupt or (lost and not frame.key_frame)
                yield None if lost else frame, read
        except EndOfFile:  # demux has already sent the empty last packet
            pass
        except FFmpegError as error:
            bad, reason, lost = bad + 1, _why(error), True
        if packet is None:
            break
    if bad:
        damage.append(f"{bad} packet(s) could not be decoded: {reason}")


def _to_rgb(
    raw: VideoFrame, short_side: int | None, aspect: Fraction | None, reformatter: VideoReformatter
) -> Image:
    width, height = raw.width, raw.height
    _check_size(width, height)
    if aspect and aspect != 1 and 1 / 4 <= aspect <= 4:  # pixels that are not square
        if aspect > 1:
            height = max(round(height / aspect), 1)
        else:
            width = max(round(width * aspect), 1)
    width, height = shrunk_size(width, height, short_side)
    small = reformatter.reformat(
        raw, width=width, height=height, format="rgb24", interpolation="AREA"
    )
    image = np.asarray(small.to_ndarray(), dtype=np.uint8)  # (H, W, 3)
    # PyAV reports the display matrix's angle, counter-clockwise in degrees, as np.rot90 turns.
    turns = round(raw.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def shrunk_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Width and height in pixels brought to a shorter side (None: as they are), never enlarged."""
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width, height
    return round(width * short_side / shorter), round(height * short_side / shorter)


class _File(io.FileIO):
    """Tells FFmpeg of a place that no file can have; other errors of the disk are raised."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -errno.EINVAL  # the damage is in the file: what lies before it is good


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream; VideoError if it is none, OSError of the disk."""
    import av
    import av.logging

    av.logging.set_level(None)  # damage is reported by VideoError, not by lines on stderr
    with ExitStack() as stack:
        try:
            # We read, not FFmpeg: to it a disk that fails is the end of the file, or, as a file cut
            # off, an "I/O error". And it would take the name "a:b.mp4" for protocol "a".
            file = stack.enter_context(_File(path))
            # The limit also holds for what is decoded to learn what the header does not say. A
            # playlist or a session description must not open connections.
            options = {**_limits(), "protocol_whitelist": "file,crypto,data"}
            # A title that is not UTF-8 is no fault of the pictures; PyAV 19 takes any by itself.
            old = int(av.__version__.split(".")[0]) < 19
            titles: dict[str, Any] = {"metadata_errors": "replace"} if old else {}
            container = stack.enter_context(av.open(file, options=options, **titles))
        except (av.FFmpegError, ValueError, OSError) as error:
            number = None if isinstance(error, av.FFmpegError) else getattr(error, "errno", None)
            if number is not None and number not in _LASTING:
                raise
            raise VideoError(f"cannot be opened as video: {_why(error)}") from error
        if not container.streams.video:
            raise VideoError("has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError("no decoder for its codec in the installed PyAV")
        yield container, stream


def _limits() -> dict[str, str]:
    """Return the options of FFmpeg that refuse pictures too large."""
    return {"max_pixels": str(MAX_PIXELS)}


def _header_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Return what the header says; its stream's own number before that of all streams."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None  # microseconds


def promised_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the seconds of pictures in a file that is whole; None where no header is sure of it.

    AVI's may count frames that were never written. Matroska's is that of the longest stream, so the
    sound's, perhaps; programs that write it mostly add each stream's own.
    """
    if container.format.name.startswith("mov"):
        return _header_seconds(container, stream) if stream.duration else None
    if not container.format.name.startswith("matroska"):
        return None
    own = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if own:
        return int(own[1]) * 3600 + int(own[2]) * 60 + float(own[3])
    return _header_seconds(container, stream) if len(container.streams) == 1 else None


def _check_size(width: int, height: int) -> None:
    """Raise VideoError for pictures too large, in pixels."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(
            f"frames of {width} x {height} pixels are refused: more than {MAX_SIDE} a side or "
            f"{MAX_PIXELS} in all, probably a damaged header"
        )


def _why(error: BaseException) -> str:
    """Return the message of an error, without its number."""
    return str(getattr(error, "strerror", None) or error)
