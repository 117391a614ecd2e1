"""Shapes that the CPU benchmarks share: the demo's model, and one with a wider block and more tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A model and an input.

    Attributes:
        name: of the benchmark's row.
        config: of the transformer, diffusers' keys.
        latents: ``[B, C, T, H, W]``.
        text_tokens: S.
    """

    name: str
    config: dict[str, int]
    latents: tuple[int, int, int, int, int]
    text_tokens: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timesteps and text, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        batch = self.latents[0]
        timestep = torch.linspace(1.0, 999.0, batch)
        text = torch.randn(batch, self.text_tokens, self.config["text_dim"], generator=generator)
        return torch.randn(self.latents, generator=generator), timestep, text


def _config(heads: int, head_dim: int, layers: int) -> dict[str, int]:
    width = heads * head_dim
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 64,
        "freq_dim": 256,
        "ffn_dim": 4 * width,
        "num_layers": layers,
    }


CASES = [
    Case("demo_80_tokens", _config(4, 32, 4), (32, 16, 5, 8, 8), 24),
    Case("wide_1040_tokens", _config(3, 128, 4), (1, 16, 5, 26, 32), 64),
]
