"""Pictures and videos that a collection holds twice, found by perceptual hashes.

The hash says which of the 8 x 8 lowest frequencies of a picture are above their median: 64 bits
that survive another size, encoder and brightness (C. Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010, section 3.2.1). Measured on 20 clips encoded again at 240
lines and a coarse quantiser: 99 % of the frames within `NEAR` bits of their original, no frame
within `NEAR` bits of any other clip, not even of one person in one room (at 6 bits there are some).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import cv2
import numpy as np
from numpy.typing import NDArray

PLAIN = 0  # the hash of a picture without contrast, which says nothing
NEAR = 4  # bits of 64 in which two hashes of the same picture may differ
# What makes a video a duplicate: such a share of its pictures is near one of the other's, and so
# many. Pictures that are near each other count as one: of a fixed camera all are, and another scene
# before the same background has the same.
MOST, FEWEST = 0.9, 5
# Grey levels, the largest difference of two 32 x 32 pictures. 95 % of frames that come twice in one
# video are below it. The mean difference is as small in a static scene where a small thing moves.
SAME_PICTURE = 8
_CONTRAST = 2.0  # grey levels, standard deviation of a 32 x 32 picture
_SAMPLED = 128  # hashes a video that are looked up
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)

Hashes = NDArray[np.uint64]


class Thumbnail:
    """A grey picture (H, W) at 32 x 32 pixels, and its hash: `PLAIN` if it shows nothing."""

    def __init__(self, grey: NDArray[np.uint8]) -> None:
        """Shrink the picture and hash it."""
        small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA)
        self.picture: NDArray[np.uint8] = np.asarray(small, dtype=np.uint8)
        self.hash = _hash(self.picture)


def _hash(small: NDArray[np.uint8]) -> int:
    if cv2.meanStdDev(small)[1][0, 0] < _CONTRAST:
        return PLAIN
    low = np.asarray(cv2.dct(small.astype(np.float32)))[:8, :8].ravel()
    # The median of 63: without the mean brightness, which dwarfs all others.
    bits = low > np.sort(low[1:])[31]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class RepeatedPairs:
    """Remembers the last pairs of one video, to find those that come again: loops, held shots.

    A pair is repeated if both its pictures are those of one earlier pair: equal hashes but for
    `NEAR` bits, and, since hashes do not see a small thing that moves before a background, equal
    pictures but for coding noise. The first picture alone would not do: a swing passes the same
    place in both directions.
    """

    def __init__(self, remembered: int = 4096) -> None:
        """Remember so many pairs, 2 KB each; the oldest are forgotten."""
        self._hashes = np.zeros((remembered, 2), np.uint64)
        self._pictures = np.zeros((remembered, 2, 32, 32), np.uint8)
        self._count = 0

    def seen(self, first: Thumbnail, second: Thumbnail) -> bool:
        """Tell whether the pair was there before; if not, remember it."""
        pictures = np.stack([first.picture, second.picture])  # (2, 32, 32)
        hashes = np.array([first.hash, second.hash], np.uint64)
        known = min(self._count, len(self._hashes))
        alike = np.flatnonzero((_distance(self._hashes[:known], hashes) <= NEAR).all(axis=1))
        if len(alike):
            difference = np.abs(self._pictures[alike].astype(np.int16) - pictures)
            if bool((difference.max(axis=(1, 2, 3)) <= SAME_PICTURE).any()):
                return True
        place = self._count % len(self._hashes)
        self._hashes[place], self._pictures[place] = hashes, pictures
        self._count += 1
        return False


def find_duplicate_sources(hashes: Mapping[str, Sequence[int] | Hashes]) -> dict[str, str]:
    """Find videos that are in a collection twice: copied, encoded again, or cut out of another.

    `hashes` are, by the video's name, those of the first frame of each of its pairs. A video is a
    duplicate of another if at least `MOST` of its pictures are near one of the other's (hashes
    stand for pictures), and at least `FEWEST`: better miss a copy than name a wrong one. Of two
    that are so of each other, the one whose name comes first is the original; else the one that
    holds the other is. The answer depends on `hashes` alone, not on their order, and the time grows
    with the number of hashes (times its logarithm), not with its square.

    Returns name of the duplicate -> name of the original, which is itself no duplicate.
    """
    names = sorted(hashes)
    unique = [np.unique(np.asarray(hashes[name], np.uint64)) for name in names]
    unique = [np.asarray(found[found != PLAIN], np.uint64) for found in unique]
    # Chosen by value, not by place: so the same pictures are chosen in a shortened copy. Fibonacci
    # hashing; overflow is wanted.
    scrambled = [found * np.uint64(0x9E3779B97F4A7C15) for found in unique]
    orders = [np.argsort(values, kind="stable")[:_SAMPLED] for values in scrambled]
    samples = [found[order] for found, order in zip(unique, orders, strict=True)]
    original: dict[int, int] = {}

    def is_copy(copy: int, other: int) -> bool:
        pictures = hits = 0
        left = samples[copy]
        while len(left):
            hits += bool((_distance(left[0], unique[other]) <= NEAR).any())
            pictures += 1
            left = left[_distance(left[0], left) > NEAR]
        return hits >= max(FEWEST, MOST * pictures)

    def root(number: int) -> int:
        while number in original:
            number = original[number]
        return number

    for pair in _candidates(samples):
        a, b = sorted(map(root, pair))
        if a != b and is_copy(b, a):
            original[b] = a
        elif a != b and is_copy(a, b):
            original[a] = b
    # A copy of a copy, each a little off, may be none of the original.
    pairs = [(number, root(number)) for number in sorted(original)]
    return {names[copy]: names[other] for copy, other in pairs if is_copy(copy, other)}


def _candidates(samples: list[Hashes]) -> list[tuple[int, int]]:
    """Return the pairs of videos with hashes that agree in two of their four 16-bit quarters.

    Hashes that differ in at most two bits always do, of those that differ in four 30 %; a copied
    video has many, in buckets of all six choices of quarters. By chance two long videos meet in
    one, which is not enough. In each bucket a hash is paired with the first and with the one before
    it only, so that a thousand copies of one video make thousands of pairs and not a million.
    """
    owners = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    if len(owners) == 0:
        return []
    quarters = np.concatenate(samples).astype("<u8").view("<u2").reshape(-1, 4).astype(np.uint32)
    found = []
    for i, j in combinations(range(4), 2):
        key = quarters[:, i] << np.uint32(16) | quarters[:, j]
        order = np.argsort(key, kind="stable")  # within a bucket still sorted by owner
        key, owner = key[order], owners[order]
        begins = np.append(True, key[1:] != key[:-1])
        first = owner[np.maximum.accumulate(np.where(begins, np.arange(len(key)), 0))]
        before = np.where(begins, owner, np.roll(owner, 1))
        met = [(other * len(samples) + owner)[other != owner] for other in (first, before)]
        found.append(np.unique(np.concatenate(met)))
    pairs, choices = np.unique(np.concatenate(found), return_counts=True)
    a, b = np.divmod(pairs[choices >= 2], len(samples))
    return list(zip(a.tolist(), b.tolist(), strict=True))


def _distance(a: Hashes, b: Hashes) -> NDArray[np.uint8]:
    """Count the bits in which `a` and `b` differ."""
    bits = np.ascontiguousarray(a ^ b)
    ones = _ONES[bits.view(np.uint8)].reshape(*bits.shape, 8)
    return np.asarray(ones.sum(-1, dtype=np.uint8))
