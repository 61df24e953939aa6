"""Opening a file of video, and what it says about itself before anything is decoded."""

from __future__ import annotations

import errno
import io
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

# A damaged or malicious header can claim any size: it is refused before memory is asked for it.
MAX_SIDE = 16384  # pixels, as libavcodec's H.264 decoder
MAX_PIXELS = 2**28
# Why a file cannot be opened that are no trouble of the disk: the next call would meet them too.
# fmt: off
LASTING = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
)
# fmt: on


class VideoError(ValueError):
    """A video, or a part of it, could not be read; the message says which and why."""


NOTHING = "there is nothing"


def why_no_file(path: Path) -> str | None:
    """Return why `path` is no file that can be read to its end, None if it is one.

    Raises:
        OSError: the disk failed; the next call may find the file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "not a regular file (a link to nothing)" if path.is_symlink() else NOTHING
    except OSError as error:
        if error.errno not in LASTING:
            raise
        return f"cannot be reached ({error.strerror})"  # a loop of links, a folder that is locked
    if stat.S_ISREG(mode):
        return None
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
    return f"not a regular file ({kind})"


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
    """Open a file and its first video stream.

    Raises:
        VideoError: it is no video, or may not be read.
        OSError: the disk failed.
        ImportError: PyAV is not installed.
    """
    av = import_av()
    with ExitStack() as stack:
        try:
            # We read, not FFmpeg: to it a disk that fails is the end of the file, or, as a file cut
            # off, an "I/O error". And it would take the name "a:b.mp4" for protocol "a".
            file = stack.enter_context(_File(path))
            # The limit also holds for what is decoded to learn what the header does not say. A
            # playlist or a session description must not open connections.
            options = {**limits(), "protocol_whitelist": "file,crypto,data"}
            # A title that is not UTF-8 is no fault of the pictures; PyAV 19 takes any by itself.
            old = int(av.__version__.split(".")[0]) < 19
            titles = {"metadata_errors": "replace"} if old else {}
            container = stack.enter_context(av.open(file, options=options, **titles))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"cannot be opened as video: {why(error)}") from error
        except OSError as error:
            if error.errno not in LASTING:
                raise
            raise VideoError(f"cannot be opened as video: {why(error)}") from error
        if not container.streams.video:
            raise VideoError("has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError("no decoder for its codec in the installed PyAV")
        yield container, stream


def limits() -> dict[str, str]:
    """Return the options of FFmpeg that refuse pictures too large."""
    return {"max_pixels": str(MAX_PIXELS)}


def video_seconds(container: InputContainer, stream: VideoStream) -> float | None:
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
        return video_seconds(container, stream) if stream.duration else None
    if not container.format.name.startswith("matroska"):
        return None
    own = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if own:
        return int(own[1]) * 3600 + int(own[2]) * 60 + float(own[3])
    return video_seconds(container, stream) if len(container.streams) == 1 else None


def check_size(width: int, height: int) -> None:
    """Raise VideoError for pictures too large, in pixels."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(
            f"frames of {width} x {height} pixels are refused: more than {MAX_SIDE} a side or "
            f"{MAX_PIXELS} in all, probably a damaged header"
        )


def why(error: BaseException) -> str:
    """Return the message of an error, without its number."""
    return str(getattr(error, "strerror", None) or error)


def import_av() -> ModuleType:
    """Return PyAV; ImportError says how to install it."""
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install av") from error
    av.logging.set_level(None)  # damage is reported by VideoError, not by lines on stderr
    return av
