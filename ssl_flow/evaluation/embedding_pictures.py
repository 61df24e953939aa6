"""What an encoder sees in the frames of a video: its embedding as colours and as groups.

All frames share one basis of colours, one set of groups and one scale of the flow, fitted on some
of them, so that nothing flickers that is not in the embedding. Colours (principal components) and
groups (the nearest centre c maximises c.x - |c|^2 / 2) are both linear maps of the embedding: they
are computed on its cells, brought to the frame's resolution and only then cut off or compared.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_flow.data.labelled import read_image
from ssl_flow.data.segmentation import Labelled
from ssl_flow.evaluation.pictures import fit_colors, palette, strip
from ssl_flow.evaluation.pixel_features import bar, estimate_on, image_levels, project_levels
from ssl_flow.evaluation.refusal import import_extra
from ssl_flow.evaluation.suite_pictures import joint_maps
from ssl_flow.flow import FlowStore, optical_flow
from ssl_flow.flow.codec import flow_to_rgb
from ssl_flow.flow.pairs import pair_frames
from ssl_flow.flow.store import SETTINGS_FILE
from ssl_flow.flow.video import IMAGE_EXTENSIONS, VideoError, read_frames, shrunk_size
from ssl_flow.models.encoder import EMBEDDING_STRIDE, Encoder

_FITTED = 2**25  # numbers that colours and groups are fitted on at most: 128 MiB
_PIXELS = 2000  # of them pixels of one frame
_SHIFTED = 1000  # pixels for mean shift, whose time grows with their square
MOST_GROUPS = 254  # colours of `palette` that can be told from the picture


class Shown(NamedTuple):
    """A frame (H, W, 3) uint8, its time in seconds, and what computes its flow (None: no flow)."""

    image: np.ndarray
    time: float = 0.0
    flow: Callable[[], np.ndarray] | None = None


class Look(NamedTuple):
    """What all frames share: a linear map to 3 colours and K groups; the longest flow, pixels."""

    weight: Tensor  # (3 + K, D)
    bias: Tensor  # (3 + K,)
    fastest: float


def shown_frames(path: Path, size: int, gap: float, include: Sequence[str] = ()) -> Iterator[Shown]:
    """Frames of a video, a folder of images, a store of flow, or one image.

    A store gives its own frames and flow, of the sources that `include` names. Other frames are
    shrunk to a shorter side of `size` pixels; a video's are those with a partner `gap` seconds
    later, their flow is OpenCV's DIS between both. A damaged video ends with a warning.

    Raises:
        FileNotFoundError: nothing there. ValueError: it cannot be read.
    """
    if (path / SETTINGS_FILE).is_file():
        store = FlowStore(path, include or None)
        for sample in (store[index] for index in range(len(store))):
            yield Shown(sample.frame, sample.meta["time"], partial(getattr, sample, "flow"))
    elif path.suffix.lower() in IMAGE_EXTENSIONS and not path.is_dir():
        yield Shown(shrunk(read_image(path), size))
    else:
        try:
            for first, second in pair_frames(read_frames(path, size), gap, 0.0, Counter()):
                flow = partial(optical_flow, first.image, second.image, "dis")
                yield Shown(first.image, first.time, flow)
        except VideoError as error:
            warnings.warn(f"{path}: {error}", stacklevel=2)


def shrunk(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) brought to a shorter side of `size` pixels, never enlarged."""
    old = image.shape[1], image.shape[0]
    new = shrunk_size(*old, size)
    return image if new == old else cv2.resize(image, new, interpolation=cv2.INTER_AREA)


def sample_frames(frames: Iterable[Shown], most: int = 32) -> tuple[list[Shown], list[float]]:
    """Frames spread evenly over a stream of unknown length, at most `most`; the times of all."""
    kept: list[Shown] = []
    times: list[float] = []
    step = 1
    for shown in frames:
        if len(times) % step == 0:
            kept.append(shown)
        times.append(shown.time)
        if len(kept) > most:
            kept, step = kept[::2], 2 * step
    return kept, times


def estimate_random(encoder: Encoder, spec: str, images: Sequence[np.ndarray]) -> None:
    """Give an encoder `random:NAME` the BatchNorm statistics of the images; leave others."""
    if spec.startswith("random:"):
        items = [Labelled(image, image[..., 0], "picture") for image in images]
        estimate_on(encoder, items, len(items))


@torch.no_grad()
def pixel_maps(encoder: Encoder, image: np.ndarray) -> tuple[Tensor, int]:
    """Unit vectors (1, D, h, w) of an image (H, W, 3) on the CPU, and their stride.

    The embedding; of an encoder without a head all its levels on one grid, each counting alike.

    Raises:
        ValueError: features that are not finite.
    """
    if getattr(encoder, "head", None) is None:
        multiple, (height, width) = math.lcm(8, *encoder.strides), image.shape[:2]
        sides = (0, -height % multiple), (0, -width % multiple), (0, 0)
        maps, stride = joint_maps(encoder, np.pad(image, sides, mode="edge")[None])
        return maps[..., : -(-height // stride), : -(-width // stride)], stride
    item = Labelled(image, image[..., 0], "the picture")
    _, (embedding,), _ = next(image_levels(encoder, [item], "embedding"))
    return embedding.cpu(), EMBEDDING_STRIDE


def fit_look(
    encoder: Encoder, sample: Sequence[Shown], groups: int | Literal["mean-shift"]
) -> Look:
    """Fit colours, groups (0: none) and the flow's full colour on some frames.

    Groups are scikit-learn's MiniBatchKMeans (Sculley, "Web-Scale K-Means Clustering", WWW 2010),
    or its MeanShift (Comaniciu & Meer, PAMI 2002) on `_SHIFTED` pixels, which finds their number
    (at a bandwidth of their root mean square distance from the mean; of 1 % of the pixels or more).

    Raises:
        ValueError: features that are not finite, or fewer pixels than groups.
    """
    vectors = []
    generator = torch.Generator().manual_seed(0)
    for shown in bar(sample, "fitting"):
        pixels = pixel_maps(encoder, shown.image)[0][0].flatten(1).T  # (h w, D)
        count = min(_PIXELS, _FITTED // (len(sample) * pixels.shape[1]))
        vectors.append(pixels[torch.randperm(len(pixels), generator=generator)[:count]])
    pixels = torch.cat(vectors)
    weight, bias = fit_colors(pixels)
    if groups:
        cluster, points = load_clustering(), pixels.numpy()
        if groups == "mean-shift":
            points = points[:: math.ceil(len(points) / _SHIFTED)]
            width = max(float(points.var(0).sum()) ** 0.5, 1e-3)  # how far they lie from the mean
            found = cluster.MeanShift(bandwidth=width).fit(points)
            large: Any = np.bincount(found.labels_) >= len(points) / 100
        else:
            kmeans = cluster.MiniBatchKMeans(groups, n_init=3, batch_size=4096, random_state=0)
            found, large = kmeans.fit(points), slice(None)
        centres = torch.from_numpy(found.cluster_centers_[large])
        weight = torch.cat([weight, centres])
        bias = torch.cat([bias, -centres.square().sum(1) / 2])
    flows = [shown.flow() for shown in sample if shown.flow is not None]
    lengths = [np.nanpercentile(np.linalg.norm(flow, axis=-1), 99) for flow in flows]
    return Look(weight, bias, max(float(np.max(lengths, initial=0)), 0.1))


def load_clustering() -> Any:  # noqa: ANN401 (a module)
    """sklearn.cluster; ImportError, with what to do, without scikit-learn."""
    text = "groups need scikit-learn: pip install 'ssl-flow[eval]', or --groups 0"
    return import_extra("sklearn.cluster", text)


def draw(encoder: Encoder, shown: Shown, look: Look, tile: tuple[int, int]) -> np.ndarray:
    """Frame | embedding as colours | groups | flow, each fitted into `tile`: (H, W, 3) uint8."""
    image = shown.image
    maps, stride = pixel_maps(encoder, image)
    size = (image.shape[0], image.shape[1])
    painted = project_levels([maps], [stride], look.weight, look.bias, size)[0]
    panels = [image, (painted[:3].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()]
    if len(painted) > 3:
        panels.append(draw_segments(image, painted[3:].argmax(0).numpy()))
    if shown.flow is not None:
        panels.append(flow_to_rgb(np.nan_to_num(shown.flow()), look.fastest))
    return strip(panels, tile)


def draw_segments(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The grey image (H, W, 3) in the colours of its segments (H, W), with white borders."""
    grey = image.mean(2, keepdims=True) / 2
    colors = np.delete(palette(256), (0, 7), axis=0)  # black and grey would be no group
    drawn: np.ndarray = (grey + colors[labels]).clip(0, 255).astype(np.uint8)
    border = np.zeros(labels.shape, bool)
    border[1:] |= labels[1:] != labels[:-1]
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    drawn[border] = 255
    return drawn
