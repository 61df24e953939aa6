"""Synthetic videos with true flow and true class masks, made on the fly from a seed.

A few objects of four classes move over a textured background that pans. A class is known by its
shape and its texture together; colour, scale, orientation, contrast and light are random, and the
background holds patches of the same textures, so neither colour nor texture alone tells a class.

    video = SyntheticVideo(seed=0)
    video.frame(3), video.mask(3), video.flow(3)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from ssl_flow.flow.sources import Source
from ssl_flow.flow.video import Frame

CLASSES = ("background", "dotted disc", "striped square", "checked triangle", "ringed star")
FRAMES_PER_SECOND = 10
# Seeds of training videos stay below; the labelled stills of the probe lie above (segmentation.py).
TRAINING_SEEDS = 1_000_000


@dataclass
class _Layer:
    """A picture that moves rigidly: texture coordinates -> frame coordinates by `matrix(t)`."""

    picture: np.ndarray  # (S, S, 4) float32: RGB in 0..255, alpha in 0..1
    label: int
    position: np.ndarray  # (2,) of the picture's centre at the middle of the video
    velocity: np.ndarray  # (2,) pixels a frame
    bend: np.ndarray  # (2,) pixels a frame^2
    angle: float
    spin: float  # radians a frame
    growth: float  # log scale a frame
    middle: float  # the time of `position`

    def matrix(self, t: float) -> np.ndarray:
        """(2, 3): frame = matrix @ (texture x, texture y, 1)."""
        since = t - self.middle
        angle, scale = self.angle + self.spin * since, np.exp(self.growth * since)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = (len(self.picture) - 1) / 2
        position = self.position + self.velocity * since + self.bend * since**2 / 2
        return np.hstack([turn, (position - turn @ [centre, centre])[:, None]])


class SyntheticVideo:
    """One video; the same seed always gives the same pixels."""

    def __init__(self, seed: int, frames: int = 12, size: int = 128) -> None:
        """Draw the layers: `frames` of `size` x `size` pixels, 3 to 5 objects."""
        self.seed, self.frames, self.size = seed, frames, size
        rng = default_rng(seed)
        reach = 2.2 * frames  # how far the background can pan to each side, and the corners turn
        self._layers = [
            _Layer(
                _background(rng, int(1.2 * size + 2 * reach)),
                label=0,
                position=np.full(2, (size - 1) / 2),
                velocity=_direction(rng) * rng.uniform(0.3, 2),
                bend=rng.normal(0, 0.01, 2),
                angle=0.0,
                spin=rng.normal(0, 0.003),
                growth=rng.normal(0, 0.001),
                middle=(frames - 1) / 2,
            )
        ]
        for _ in range(rng.integers(3, 6)):  # the later ones occlude the earlier ones
            label = int(rng.integers(1, len(CLASSES)))
            self._layers.append(
                _Layer(
                    _object(rng, label, rng.uniform(0.14, 0.24) * size),
                    label=label,
                    position=rng.uniform(0.15, 0.85, 2) * size,
                    velocity=_direction(rng) * rng.uniform(0.8, 3.5),
                    bend=rng.normal(0, 0.04, 2),
                    angle=rng.uniform(0, 2 * np.pi),
                    spin=rng.normal(0, 0.015),
                    growth=rng.normal(0, 0.003),
                    middle=(frames - 1) / 2,
                )
            )
        axis, slope = np.linspace(-1, 1, size, dtype=np.float32), rng.uniform(-0.25, 0.25, 2)
        light = rng.uniform(0.75, 1.1) + slope[0] * axis + slope[1] * axis[:, None]
        self._light = light[..., None].astype(np.float32)
        self._noise = rng.uniform(2, 6)
        x, y = np.meshgrid(np.arange(size), np.arange(size))
        self._grid = np.stack([x, y, np.ones_like(x)], -1).astype(np.float64)  # (H, W, 3)

    def frame(self, t: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        image = np.zeros((self.size, self.size, 3), np.float32)
        for layer in self._layers:
            warped = self._warp(layer.picture, layer.matrix(t))
            image += warped[..., 3:] * (warped[..., :3] - image)
        noise = default_rng([self.seed, t]).standard_normal(image.shape, np.float32)
        return np.asarray(np.clip(image * self._light + self._noise * noise, 0, 255), np.uint8)

    def mask(self, t: int) -> np.ndarray:
        """(H, W) uint8: index into CLASSES of what is seen."""
        labels = np.array([layer.label for layer in self._layers], np.uint8)
        return np.asarray(labels[self.visible(t)])

    def visible(self, t: int) -> np.ndarray:
        """(H, W) int: which layer is seen: 0 the background, then the objects, last in front."""
        seen = np.zeros((self.size, self.size), np.int64)
        for index, layer in enumerate(self._layers[1:], start=1):
            seen[self._warp(layer.picture[..., 3], layer.matrix(t)) > 0.5] = index
        return seen

    def flow(self, t: int) -> np.ndarray:
        """(H, W, 2) float32: motion of what is seen at t until t + 1, pixels, x right, y down."""
        seen = self.visible(t)
        flow = np.zeros((self.size, self.size, 2), np.float32)
        for index, layer in enumerate(self._layers):
            now, then = (np.vstack([layer.matrix(time), [0, 0, 1]]) for time in (t, t + 1))
            step = (then @ np.linalg.inv(now) - np.eye(3))[:2]  # displacement of a frame point
            flow[seen == index] = self._grid[seen == index] @ step.T
        return flow

    def _warp(self, picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        warped: np.ndarray = cv2.warpAffine(picture, matrix, (self.size, self.size))
        return warped


def synthetic_sources(count: int, seed: int, frames: int = 12, size: int = 128) -> list[Source]:
    """`count` videos as sources for flow extraction; another seed gives other videos.

    Raises:
        ValueError: more videos than there are seeds for training.
    """
    if not 0 < count <= TRAINING_SEEDS:
        raise ValueError(f"count = {count}, expected 1 to {TRAINING_SEEDS}")
    seeds = [(seed * 10_007 + i) % TRAINING_SEEDS for i in range(count)]
    return [Source(f"synthetic-{s:06d}", partial(_frames, s, frames, size)) for s in seeds]


def _frames(seed: int, frames: int, size: int, short_side: int | None = None) -> Iterator[Frame]:
    video = SyntheticVideo(seed, frames, size)
    for t in range(frames):
        image = video.frame(t)
        if short_side is not None and short_side < size:
            image = cv2.resize(image, (short_side, short_side), interpolation=cv2.INTER_AREA)
        yield Frame(t / FRAMES_PER_SECOND, image)


def _direction(rng: Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _texture(rng: Generator, kind: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(..., 3) float32 RGB: 1 dots, 2 stripes, 3 checks, 4 rings, 0 clouds; two random colours."""
    wave = 2 * np.pi / rng.uniform(5, 9)  # the period in pixels
    angle = rng.uniform(0, 2 * np.pi)
    u = wave * (np.cos(angle) * x + np.sin(angle) * y)
    v = wave * (np.cos(angle) * y - np.sin(angle) * x)
    if kind == 1:
        pattern = np.cos(u) + np.cos(v) - 0.7
    elif kind == 2:
        pattern = np.cos(u)
    elif kind == 3:
        pattern = 2 * np.cos(u) * np.cos(v)
    elif kind == 4:
        pattern = np.cos(np.hypot(u, v) + rng.uniform(0, 2 * np.pi))
    else:
        pattern = 0.5 * np.cos(u / 4) * np.cos(v / 3)
    mix = (0.5 + 0.5 * np.tanh(1.5 * pattern))[..., None].astype(np.float32)
    # A dark and a light tone of any hue, for objects and background alike.
    hsv = rng.uniform([[0, 0.1, 0.1], [0, 0.1, 0.6]], [[360, 0.7, 0.5], [360, 0.7, 1]])
    tones = cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0] * 255
    first, second = tones[rng.permutation(2)]
    return np.asarray(first + mix * (second - first))


def _background(rng: Generator, size: int) -> np.ndarray:
    """Irregular patches, each with a texture of any kind: (size, size, 4)."""
    x, y = np.meshgrid(*[np.arange(size, dtype=np.float32)] * 2)
    coarse = rng.normal(0, 9, (size // 12, size // 12, 2)).astype(np.float32)
    wobble = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    points = np.dstack([x, y]) + wobble
    centres = rng.uniform(0, size, (max(4, int((size / 45) ** 2)), 2)).astype(np.float32)
    # The nearest centre; |point|^2 is the same for all of them.
    nearest = np.argmin((centres**2).sum(1) - 2 * points @ centres.T, axis=-1)
    picture = np.ones((size, size, 4), np.float32)
    for index, (cx, cy) in enumerate(centres):
        inside = nearest == index
        kind = int(rng.integers(1, 5)) if rng.random() < 0.2 else 0  # mostly clouds
        picture[inside, :3] = _texture(rng, kind, x[inside] - cx, y[inside] - cy)
    return picture


def _object(rng: Generator, label: int, radius: float) -> np.ndarray:
    """A shape of class `label` filled with its texture: (S, S, 4), edge antialiased in alpha."""
    size = int(2 * radius) + 7
    axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
    x, y = np.meshgrid(axis, axis)
    angle = np.arctan2(y, x)
    # Signed distances in pixels (negative inside) of shapes of about equal area.
    if label == 1:
        outside = np.hypot(x, y) - 0.85 * radius
    elif label == 2:
        outside = np.maximum(abs(x), abs(y)) - 0.72 * radius
    elif label == 3:
        turns = np.array([np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6])
        outside = np.max([x * np.cos(a) + y * np.sin(a) for a in turns], axis=0) - 0.5 * radius
    else:
        outside = np.hypot(x, y) - radius * (0.75 + 0.25 * np.cos(5 * angle))
    alpha = np.clip(0.5 - outside, 0, 1)
    return np.dstack([_texture(rng, label, x, y), alpha]).astype(np.float32)
