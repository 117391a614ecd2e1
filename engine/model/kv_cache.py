"""Keys and values of past chunks, for causal decoding.

One static buffer a layer, ``[scratch | slot 0 | slot 1 | ...]`` along the token axis. A chunk that is still being
denoised keeps its keys and values in the scratch slot; the clean pass writes the next committed slot. Softmax does
not care about order and keys are stored rotated, so whatever a chunk may see is always ONE contiguous span:
scratch + committed slots while denoising, committed slots + the new one in the clean pass. Nothing is rolled or
copied. Bookkeeping is host integers: no device counters, no synchronisation. Until :meth:`KVCache.commit` a pass
changes nothing that later passes read, so an aborted chunk can be repeated.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reelforge.engine.core.errors import ConfigError


@dataclass(frozen=True)
class ContextConfig:
    """What a finished chunk leaves for the chunks after it.

    Attributes:
        kind: ``clean`` runs one more pass over it, which writes its keys and values; ``last_step`` keeps those of its
            last denoising step, which saves that pass: a fifth of the work at four steps, a third at two. A student
            decodes well only with the kind that it was trained with.
        noise: sigma to which the pass's input is noised, in [0, 1).
    """

    kind: Literal["clean", "last_step"] = "clean"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ConfigError(f"context.noise is {self.noise}.", "It is a sigma in [0, 1); 0 is clean.")
        if self.noise and self.kind == "last_step":
            raise ConfigError(
                f'context.noise is {self.noise} and context.kind "last_step".',
                "Without a pass there is nothing to noise: leave one of them out.",
            )


@dataclass(frozen=True)
class Slot:
    """A committed chunk: its first latent frame, its frames, its tokens."""

    first_frame: int
    frames: int
    tokens: int


class KVCache:
    """Cache of one batch of streams.

    Args:
        num_layers: transformer blocks.
        batch: streams that advance together.
        chunk_tokens: tokens of the largest chunk, the size of the scratch slot.
        capacity_tokens: tokens of all chunks that can be committed.
        num_heads: N.
        head_dim: D.
        dtype: of keys and values.
        device: where the buffers live.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        chunk_tokens: int,
        capacity_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch, chunk_tokens + capacity_tokens, num_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.scratch_tokens = chunk_tokens
        self.slots: list[Slot] = []

    @property
    def committed_tokens(self) -> int:
        return sum(slot.tokens for slot in self.slots)

    @property
    def next_frame(self) -> int:
        """Latent frame index of the chunk that comes next."""
        return self.slots[-1].first_frame + self.slots[-1].frames if self.slots else 0

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def denoising(self, frames: int, tokens: int) -> "ChunkPass":
        """A pass over the next chunk whose keys stay in the scratch slot."""
        if tokens > self.scratch_tokens:
            raise ConfigError(
                f"A chunk of {tokens} tokens does not fit the scratch slot of {self.scratch_tokens}.",
                "Build the cache for the largest chunk of the pattern.",
            )
        # Right-aligned, so that a short chunk still touches the first committed slot.
        start = self.scratch_tokens - tokens
        read = (start, self.scratch_tokens + self.committed_tokens)
        return ChunkPass(self, Slot(self.next_frame, frames, tokens), start, read)

    def clean(self, frames: int, tokens: int) -> "ChunkPass":
        """A pass over the finished chunk whose keys go to the slot that :meth:`commit` then makes valid."""
        start = self.scratch_tokens + self.committed_tokens
        if start + tokens > self.keys.shape[2]:
            raise ConfigError(
                f"The cache holds {self.keys.shape[2] - self.scratch_tokens} tokens; "
                f"{self.committed_tokens} are committed and {tokens} more do not fit.",
                "Build it with a larger capacity.",
            )
        return ChunkPass(self, Slot(self.next_frame, frames, tokens), start, (self.scratch_tokens, start + tokens))

    def commit(self, chunk: "ChunkPass") -> None:
        """Make the slot that a clean pass wrote visible to later chunks."""
        assert chunk.write_start == self.scratch_tokens + self.committed_tokens, "only the newest clean pass commits"
        self.slots.append(chunk.slot)

    def keep(self, frames: int, tokens: int) -> None:
        """Commit what the last denoising pass over the next chunk wrote."""
        written, kept = self.denoising(frames, tokens), self.clean(frames, tokens)
        for buffer in (self.keys, self.values):
            source = buffer[:, :, written.write_start : self.scratch_tokens]
            buffer[:, :, kept.write_start : kept.write_start + tokens].copy_(source)
        self.commit(kept)

    def upto(self, chunks: int) -> "KVCache":
        """The cache as it was when so many chunks were committed: the same buffers, fewer slots."""
        earlier = copy.copy(self)
        earlier.slots = self.slots[:chunks]
        return earlier

    def reset(self) -> None:
        """Forget every committed chunk."""
        self.slots.clear()


@dataclass(frozen=True)
class ChunkPass:
    """One forward over one chunk: where its keys go and which span it reads."""

    cache: KVCache
    slot: Slot
    write_start: int
    read: tuple[int, int]

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where this chunk's rotated keys and its values go: views of the cache ``[B, tokens, N, D]``."""
        span = slice(self.write_start, self.write_start + self.slot.tokens)
        return self.cache.keys[layer][:, span], self.cache.values[layer][:, span]

    def visible(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the chunk sees, its own included: views ``[B, visible, N, D]``."""
        span = slice(*self.read)
        return self.cache.keys[layer][:, span], self.cache.values[layer][:, span]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this chunk's rotated keys and values and return all that it may see, differentiably.

        Args:
            layer: block index.
            key: ``[B, tokens, N, D]``; ``value`` likewise.

        Returns:
            keys and values ``[B, visible, N, D]``: the past is a constant and the chunk's own part is live. The
            buffer holds detached values, so no later loss can reach an earlier chunk through it.
        """
        for slot, new in zip(self.own(layer), (key, value), strict=True):
            slot.copy_(new.detach())
        return self._joined(self.cache.keys[layer], key), self._joined(self.cache.values[layer], value)

    def _joined(self, buffer: Tensor, new: Tensor) -> Tensor:
        # A copy: what backward needs must survive later writes to the buffer.
        before = buffer[:, self.read[0] : self.write_start]
        after = buffer[:, self.write_start + self.slot.tokens : self.read[1]]
        return torch.cat((before.to(new.dtype), new, after.to(new.dtype)), dim=1)
