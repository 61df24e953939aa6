"""The command `ssl-flow show embedding`: a video of what an encoder sees in a video."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import tyro

from ssl_flow.evaluation.embedding_pictures import (
    MOST_GROUPS,
    Shown,
    draw,
    estimate_random,
    fit_look,
    load_clustering,
    sample_frames,
    shown_frames,
)
from ssl_flow.evaluation.pixel_features import bar, spread
from ssl_flow.evaluation.refusal import run_command
from ssl_flow.flow.shard import replacing, write_atomically
from ssl_flow.models import load_encoder, pick_device

_ROWS = 4  # frames of a sheet
_CODECS = {  # what plays nearly everywhere first; a build of FFmpeg need not have the first two
    "libx264": {"crf": "20", "preset": "medium"},
    "libopenh264": {"b": "8000000"},
    "mpeg4": {"qscale": "3"},
}


@dataclass
class ShowEmbeddingCommand:
    """Draw frames beside their embedding, its groups, and the optical flow.

    The embedding: three principal components as colours. An encoder without an embedding head
    shows all its levels together.
    """

    source: tyro.conf.Positional[Path]
    """A video, a folder of frames, a store of flow, or an image."""
    encoder: str
    """FOLDER | timm:NAME | torchvision:NAME | random:NAME | handmade | python:MODULE:FUNCTION"""
    out: Path = Path("embedding.mp4")
    """.mp4: the video; .png: a sheet of up to 4 of its frames."""
    max_frames: int = 300
    """Frames shown, from the beginning."""
    size: int = 256
    """Shorter side of the frames in pixels (a store has its own)."""
    gap: float = 0.1
    """Seconds between the two frames of a flow (a store has its own)."""
    groups: int | Literal["mean-shift"] = 8
    """Clusters of k-means; mean-shift: as many as it finds; 0: none (extra `eval`)."""
    include: tuple[str, ...] = ()
    """Sources of a store, names or patterns such as "clips/*"; all by default."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def show_embedding_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow show embedding`; returns the exit code: 0, or 2 for input it cannot use."""
    return run_command("ssl-flow show embedding", ShowEmbeddingCommand, argv, _show)


def _show(command: ShowEmbeddingCommand) -> str:
    source, out = command.source, command.out
    if out.suffix not in (".mp4", ".png") or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: expected a .mp4 or .png in a folder that is there")
    groups = 0 if command.groups == "mean-shift" else command.groups
    for name, value, low, high in (("max-frames", command.max_frames, 1, 10**9),
                                   ("size", command.size, 16, 4096),
                                   ("groups", groups, 0, MOST_GROUPS)):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"--{name} {value}: expected {low} to {high}")
    if not 0 < command.gap < 3600:
        raise ValueError(f"--gap {command.gap}: expected seconds above 0")
    if not source.exists():
        raise FileNotFoundError(f"no such video, folder, store or image: {source}")
    if command.groups:
        load_clustering()
    encoder: Any = load_encoder(command.encoder).to(pick_device(command.device))

    def frames() -> Iterator[Shown]:
        every = shown_frames(source, command.size, command.gap, command.include)
        return itertools.islice(every, command.max_frames)

    sample, times = sample_frames(bar(frames(), "reading"))
    if not sample:
        raise ValueError(
            f"{source}: no two frames {command.gap:g} s apart to show; try a smaller --gap, or "
            "give one of its images"
        )
    estimate_random(encoder, command.encoder, [shown.image for shown in sample])
    look = fit_look(encoder, sample, command.groups)
    tile = sample[0].image.shape[:2]
    if out.suffix == ".png":
        rows = [draw(encoder, sample[i], look, tile) for i in spread(len(sample), _ROWS)]
        sheet = np.concatenate(
            [np.pad(r, ((0, 4), (0, 0), (0, 0)), constant_values=255) for r in rows]
        )
        write_atomically(out, cv2.imencode(".png", sheet[:-4, :, ::-1])[1].tobytes())
        return f"wrote {out}: {len(rows)} of {len(times)} frames"
    drawn = (draw(encoder, shown, look, tile) for shown in frames())
    codec = write_video(out, bar(drawn, "drawing", total=len(times)), frame_rate(times))
    return f"wrote {out}: {len(times)} frames, {codec}"


def frame_rate(times: Sequence[float]) -> Fraction:
    """Frames a second, 1 to 60, of increasing times in seconds; 10 where there are too few."""
    steps = np.diff(times)
    steps = steps[steps > 0]  # between two videos of a store time starts again
    rate = 1 / float(np.median(steps)) if len(steps) else 10.0
    return Fraction(min(max(rate, 1.0), 60.0)).limit_denominator(1001)


def write_video(path: Path, pictures: Iterable[np.ndarray], rate: Fraction) -> str:
    """Write pictures (H, W, 3) uint8 of one size as an MP4 that appears when it is complete.

    An odd side gets a white line, since the codecs take even ones. Returns the codec: H.264 where
    this FFmpeg can write it, else MPEG-4.
    """
    import av
    from av.codec.codec import UnknownCodecError

    def known(name: str) -> bool:
        try:
            return bool(av.Codec(name, "w"))
        except UnknownCodecError:
            return False

    codec = next(name for name in _CODECS if known(name))
    with replacing(path) as file, av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=_CODECS[codec])
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            odd = [(0, side % 2) for side in picture.shape[:2]]
            picture = np.pad(picture, [*odd, (0, 0)], constant_values=255)
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return codec
