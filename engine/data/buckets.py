"""One bucket per global step: clips of equal latent shape, drawn as a pure function of (seed, step).

Each bucket is an endless stream of shuffled epochs, cut into batches without regard to the epochs' ends, so that no
sample is dropped: what does not fill a batch opens the next. Rounds hold each bucket's whole batches of one epoch in
shuffled order, so buckets are drawn in proportion to their size. Resume needs the step alone, and every rank computes
the same global batch and takes ``a contiguous part of it``.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from reelforge.engine.core.rng import generator

Shape = tuple[int, int, int]


class BucketSampler:
    """Global batches of indexes.

    Args:
        shapes: (T, H, W) of every clip's latents, by index.
        batch_size: clips in a global batch.
        seed: of the order.
        max_tokens: a global batch also holds at most this many latent positions T * H * W (but at least one clip), so
            that large clips come in smaller batches; None for no limit.
    """

    def __init__(self, shapes: Sequence[Shape], batch_size: int, seed: int, max_tokens: int | None = None) -> None:
        assert shapes and batch_size >= 1
        self.seed = seed
        self.shapes = sorted(set(shapes))
        self.members = [[i for i, shape in enumerate(shapes) if shape == bucket] for bucket in self.shapes]
        limit = [batch_size if max_tokens is None else max(1, max_tokens // (t * h * w)) for t, h, w in self.shapes]
        self.batch_sizes = [min(batch_size, most) for most in limit]
        self._order = lru_cache(maxsize=4 * len(self.shapes))(self._shuffled)
        self._round = lru_cache(maxsize=2)(self._schedule)

    def batch(self, step: int) -> list[int]:
        """Indexes of the global batch of ``step`` (from 0), all of one shape."""
        bucket, ordinal = self.draw(step)
        size, members = self.batch_sizes[bucket], self.members[bucket]
        epochs = ((ordinal * size + offset) for offset in range(size))
        return [members[self._order(bucket, at // len(members))[at % len(members)]] for at in epochs]

    def draw(self, step: int) -> tuple[int, int]:
        """(bucket, how many batches of it came before) at ``step``."""
        round_index = self._round_of(step)
        order = self._round(round_index)
        place = step - self._steps_before(round_index)
        bucket = int(order[place])
        earlier = self._batches_before(round_index)[bucket]
        return bucket, earlier + int(np.count_nonzero(order[:place] == bucket))

    def _batches_before(self, round_index: int) -> list[int]:
        """Whole batches that each bucket's first ``round_index`` epochs fill."""
        pairs = zip(self.members, self.batch_sizes, strict=True)
        return [round_index * len(members) // size for members, size in pairs]

    def _steps_before(self, round_index: int) -> int:
        return sum(self._batches_before(round_index))

    def _round_of(self, step: int) -> int:
        """The round with ``_steps_before(r) <= step < _steps_before(r + 1)``, by doubling and halving."""
        low, high = 0, 1
        while self._steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= step else (low, middle)
        return low

    def _schedule(self, round_index: int) -> np.ndarray:
        before, after = self._batches_before(round_index), self._batches_before(round_index + 1)
        counts = np.subtract(after, before)
        return generator("bucket-schedule", self.seed, round_index).permutation(np.arange(len(counts)).repeat(counts))

    def _shuffled(self, bucket: int, epoch: int) -> np.ndarray:
        shape = self.shapes[bucket]
        return generator("bucket-order", self.seed, epoch, *shape).permutation(len(self.members[bucket]))
