"""How many different chunks were seen, and which: a sample of bounded size that two processes agree on.

Spatial sampling as in SHARDS (Waldspurger, Park, Garthwaite, Ahmad: "Efficient MRC Construction with SHARDS", FAST
2015): a key is in the sample exactly when its hash is below a threshold, so every process samples the same keys, and
samples of several instances can be united. The size is fixed as in that paper: when the sample is full, the threshold
falls and what is above it is dropped. Each new key counts for 1 / rate at the moment it came, which estimates the
number of different keys without bias; the number of lookups is counted exactly, which is the paper's adjustment
(SHARDS-adj) for samples that happen to miss or to catch the hottest keys.

With unlimited pools and perfect sharing every chunk is computed once, by the first who asks for it. So

    achievable hit rate = 1 - different chunks / chunks looked up

Chunk keys are chained hashes: whoever has seen a key has seen its whole prefix, so no prefix rule is needed on top. A
HyperLogLog would count the different keys of everybody, but cannot say whose lookup was the first, nor start over for
the last hour; a sample of keys can do both.

Pure state. Not thread-safe.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

import xxhash

HASH_BITS = 63
"""Hashes are below 2 ** 63, so that they are plain integers in every message."""
EVERYTHING = 1 << HASH_BITS
"""Threshold of a sample that takes every key."""
MIN_THRESHOLD = EVERYTHING >> 24
"""Whatever another process says: 16 thousand keys at this rate stand for hundreds of billions."""
HASH_BYTES = 8
KEEP = 0.75
"""What is left of a full sample after its threshold has fallen."""


def key_hash(key: bytes) -> int:
    """Where a key stands in the sampling order: uniform over 0 to 2 ** 63 - 1, the same everywhere."""
    return xxhash.xxh3_64_intdigest(key) >> 1


class SeenSketch:
    """A sample of the keys seen so far."""

    def __init__(self, limit: int) -> None:
        """`limit`: keys in the sample, at most. The estimate's relative error is about 1 / sqrt(limit)."""
        if limit < 1:
            raise ValueError("a sample needs room for one key at least")
        self._limit = limit
        self._seen: set[int] = set()
        self._threshold = EVERYTHING

    @property
    def threshold(self) -> int:
        """Hashes below it are sampled."""
        return self._threshold

    @property
    def rate(self) -> float:
        """Share of the keys that are sampled, above 0 and at most 1."""
        return self._threshold / EVERYTHING

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, hashed: int) -> bool:
        return hashed in self._seen

    def add(self, hashed: int) -> float:
        """Take one key's hash. Returns how many keys never seen before it stands for: 0 when it is known or not
        sampled.
        """
        if hashed >= self._threshold or hashed in self._seen:
            return 0.0
        self._seen.add(hashed)
        weight = EVERYTHING / self._threshold
        if len(self._seen) > self._limit:
            self._shrink()
        return weight

    def lower(self, threshold: int) -> None:
        """Sample no more than another process does, whose keys are about to be united with ours."""
        if threshold >= self._threshold:
            return
        self._threshold = max(threshold, MIN_THRESHOLD)
        self._seen = {hashed for hashed in self._seen if hashed < self._threshold}

    def hashes(self) -> list[int]:
        """The whole sample, in no order."""
        return list(self._seen)

    def estimate(self) -> float:
        """How many different keys were seen."""
        return len(self._seen) / self.rate

    def _shrink(self) -> None:
        ordered = sorted(self._seen)
        self.lower(ordered[min(len(ordered) - 1, max(1, int(self._limit * KEEP)))])


def pack_hashes(hashes: Iterable[int]) -> bytes:
    """Hashes as they travel: eight bytes each, little-endian."""
    packed = array("Q", hashes)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_hashes(packed: bytes) -> list[int]:
    """What `pack_hashes` has packed. Bytes at the end that make no whole hash are left out."""
    found = array("Q")
    found.frombytes(packed[: len(packed) // HASH_BYTES * HASH_BYTES])
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()


def hash_all(keys: Iterable[bytes]) -> list[int]:
    """`key_hash` of each."""
    return [xxhash.xxh3_64_intdigest(key) >> 1 for key in keys]
