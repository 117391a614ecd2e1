"""The architecture of a Wan2.1 transformer as data: the keys of diffusers' ``transformer/config.json``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reelforge.engine.core.config import build
from reelforge.engine.core.errors import ConfigError


@dataclass(frozen=True)
class WanConfig:
    """The keys of diffusers' ``transformer/config.json``; defaults are Wan2.1 T2V 14B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @property
    def width(self) -> int:
        """E."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "WanConfig":
        """From a diffusers config; its bookkeeping keys (leading underscore) are dropped.

        Raises:
            ConfigError: an unknown key, or an architecture that is not Wan2.1 text to video.
        """
        return build(cls, {name: value for name, value in table.items() if not name.startswith("_")}, "transformer.")

    def __post_init__(self) -> None:
        if self.image_dim is not None or self.added_kv_proj_dim is not None:
            raise ConfigError("The checkpoint is an image-to-video model (image_dim is set).", "Use a T2V checkpoint.")
        if self.qk_norm != "rms_norm_across_heads" or not self.cross_attn_norm:
            raise ConfigError(
                f"qk_norm is {self.qk_norm!r} and cross_attn_norm is {self.cross_attn_norm}.",
                "Wan2.1 uses 'rms_norm_across_heads' and true.",
            )
        if self.attention_head_dim % 2:
            raise ConfigError(f"attention_head_dim is {self.attention_head_dim}.", "Rotary positions need an even one.")

    def to_dict(self) -> dict[str, Any]:
        """Plain types under diffusers' names."""
        return {**asdict(self), "patch_size": list(self.patch_size)}
