"""The nouns that several layers share.

Shape letters: B batch, C latent channels, T latent frames, H W latent size, F pixel frames, L tokens,
S text tokens, E width, N heads, D head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from reelforge.engine.core.config import require_positive

# velocity(x_t [B,C,T,H,W], timestep [B]) -> [B,C,T,H,W], fp32: what a solver integrates.
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class VideoSpec:
    """What a clip is brought to before it is encoded, and what a sample is decoded to.

    Attributes:
        num_frames: pixel frames.
        height: pixels.
        width: pixels.
        fps: frames per second, the rate the model is trained at and the file is written with.
    """

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        require_positive(self, "num_frames", "height", "width", "fps")


class VideoCodec(Protocol):
    """Pixels to normalised latents and back: Wan's VAE, or the miniature's codec.

    ``fingerprint`` identifies weights and configuration and keys the latent cache.
    Pixel frames F and latent frames T obey F = 1 + temporal_stride (T - 1).
    """

    @property
    def latent_channels(self) -> int: ...

    @property
    def temporal_stride(self) -> int: ...

    @property
    def spatial_stride(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, video: Tensor) -> Tensor:
        """float32 ``[B,3,F,height,width]`` in [-1, 1] to normalised latents ``[B,C,T,H,W]``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to float32 ``[B,3,F,height,width]`` in [-1, 1]."""
        ...


class TextEncoder(Protocol):
    """Prompts to embeddings: UMT5, or the miniature's seeded embeddings.

    ``fingerprint`` identifies weights and configuration and keys the text cache.
    """

    @property
    def width(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One float32 ``[S_i, width]`` per prompt, unpadded, S_i <= max_tokens.

        The transformer is fed :func:`pad_text` of these: rows behind the true length are zero
        and take part in cross-attention, as Wan was trained.
        """
        ...

    def num_tokens(self, prompt: str) -> int:
        """What the whole prompt takes; above ``max_tokens`` its end is cut away."""
        ...


def pad_text(embeddings: Sequence[Tensor], max_tokens: int) -> Tensor:
    """Unpadded ``[S_i, E]`` embeddings to ``[B, max_tokens, E]`` with zero rows behind."""
    first = embeddings[0]
    padded = first.new_zeros(len(embeddings), max_tokens, first.shape[1])
    for row, embedding in zip(padded, embeddings, strict=True):
        row[: len(embedding)] = embedding
    return padded
