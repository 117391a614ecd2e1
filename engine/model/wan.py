"""The Wan2.1 video diffusion transformer (Wan et al. 2025), text to video.

One module, one set of weights, three ways through it: bidirectional, chunk-causal (any chunk pattern, packed teacher
forcing included) and KV-cached. Parameter names and shapes are those of diffusers' ``WanTransformer3DModel``.

    patchify -> blocks (wan_block.py) -> velocity = unpatchify(Linear(LN(x)(1 + scale) + shift))

Shape letters: B batch, C channels, T H W latent size, L = T (H/2) (W/2) tokens, S text tokens, E width,
M = 1 timestep a sample or T, one a latent frame.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.fp8_linear import Rounded
from reelforge.engine.model.kv_cache import ChunkPass, KVCache
from reelforge.engine.model.layout import Layout, bidirectional
from reelforge.engine.model.rope import RotaryTable
from reelforge.engine.model.wan_block import Block, Precision, TokenSequence
from reelforge.engine.model.wan_config import WanConfig
from reelforge.kernels.gelu import gelu
from reelforge.kernels.norm_modulate import norm_modulate


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Full precision inside an autocast region; nothing elsewhere (the meta device knows no autocast)."""
    autocast = torch.is_autocast_enabled(device_type) if device_type != "meta" else False
    return torch.autocast(device_type, enabled=False) if autocast else nullcontext()


class TimeEmbedder(nn.Module):
    """Sinusoid of the timestep (cosine half first, base 10,000), then two linears; stays in fp32."""

    def __init__(self, freq_dim: int, width: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.linear_1 = nn.Linear(freq_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps in [0, 1000], any shape, to ``[..., E]``."""
        weight = self.linear_1.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        half = torch.arange(self.freq_dim // 2, dtype=wide, device=timestep.device)
        angle = timestep.to(wide)[..., None] * torch.exp(-math.log(10_000.0) * half / (self.freq_dim // 2))
        sinusoid = torch.cat((angle.cos(), angle.sin()), dim=-1).to(weight.dtype)
        with _no_autocast(timestep.device.type):
            return self.linear_2(nn.functional.silu(self.linear_1(sinusoid)))


class TextProjection(nn.Module):
    """Text embeddings to the transformer's width."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(text)))


class ConditionEmbedder(nn.Module):
    """Timestep and text to what the blocks are conditioned on."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.time_embedder = TimeEmbedder(config.freq_dim, config.width)
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = TextProjection(config.text_dim, config.width)

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """``[B]`` or ``[B, T]`` timesteps to the embedding ``[B, M, E]`` and the modulation ``[B, M, 6, E]``."""
        embedding = self.time_embedder(timestep if timestep.ndim == 2 else timestep[:, None])
        embedding = embedding.to(self.time_proj.weight.dtype)
        return embedding, self.time_proj(nn.functional.silu(embedding)).unflatten(-1, (6, -1))


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of every block, computed once per prompt."""

    blocks: tuple[tuple[Tensor, Tensor], ...]


class WanTransformer(nn.Module):
    """The denoiser: noisy latents, timestep and text to velocity = noise - x0.

    Attributes:
        config: the architecture.
        precision: ``"reference"`` rounds where diffusers rounds, ``"fast"`` once per fused op; equal in fp32.
        gradient_checkpointing: recompute each block's activations in the backward pass.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = "fast"
        self.gradient_checkpointing = False
        self.rope = RotaryTable(config.attention_head_dim, config.rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(config.in_channels, config.width, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(config.width, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.width))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], seed: int = 0, device: torch.device | str = "cpu"
    ) -> "WanTransformer":
        """Build from a diffusers config and initialise; on ``device="meta"`` shapes only.

        Raises:
            ConfigError: unknown key or unsupported architecture.
        """
        with torch.device(device):
            model = cls(WanConfig.from_dict(config))
        if torch.device(device).type != "meta":
            model.initialise(seed)
        return model

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Wan's own initialisation: Xavier for matrices, zero biases, zero head, so v = 0 at first.

        Wan draws the time and text embedders with deviation 0.02, which at its widths is Xavier's; at the miniature's
        it would mute the text.
        """
        for index, (name, parameter) in enumerate(self.named_parameters()):
            generator = torch.Generator(parameter.device).manual_seed(rng.key("initialise", seed, index))
            if name.endswith("scale_shift_table"):
                parameter.normal_(0, self.config.width**-0.5, generator=generator)
            elif name.endswith("bias") or name.startswith("proj_out"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def text_context(self, text: Tensor) -> TextContext:
        """Embeddings ``[B, S, text_dim]`` to what :meth:`forward` accepts in their place."""
        projected = self._project(text)
        return TextContext(tuple(block.attn2.keys_values(projected) for block in self._blocks()))

    def _project(self, text: Tensor) -> Tensor:
        embedder = self.condition_embedder.text_embedder
        return embedder(text.to(embedder.linear_1.weight.dtype))

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Of latents ``height x width``."""
        _, patch_h, patch_w = self.config.patch_size
        return (height // patch_h) * (width // patch_w)

    def new_cache(self, batch: int, chunk_frames: int, max_frames: int, height: int, width: int) -> KVCache:
        """A KV cache for ``max_frames`` latent frames of ``height x width`` latents in chunks of ``chunk_frames``."""
        tokens = self.tokens_per_frame(height, width)
        weight = self.proj_out.weight
        device = weight.device.type
        # What attention computes in: a cache in another dtype would be cast, whole, at every call.
        half = device != "meta" and torch.is_autocast_enabled(device)
        return KVCache(
            self.config.num_layers,
            batch,
            chunk_frames * tokens,
            max_frames * tokens,
            self.config.num_attention_heads,
            self.config.attention_head_dim,
            torch.get_autocast_dtype(device) if half else weight.dtype,
            weight.device,
        )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        *,
        layout: Layout | None = None,
        chunk: ChunkPass | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            latents: ``[B, C, T, H, W]``; with ``chunk`` only that chunk's frames.
            timestep: 1000 sigma, ``[B]`` or per latent frame ``[B, T]``.
            text: ``[B, S, text_dim]``, zero rows behind the true length; or :meth:`text_context` of it.
            layout: who sees whom; None is bidirectional.
            chunk: a pass over one chunk against a :class:`KVCache`; excludes ``layout``.

        Returns:
            ``[B, C, T, H, W]`` in the dtype of the weights (autocast's under autocast).

        Raises:
            ConfigError: the latents do not fit the patch size or the layout.
        """
        assert layout is None or chunk is None, "a cached chunk has no layout"
        grid = self._token_grid(latents, timestep, layout)
        sequence = self._sequence(grid, latents.device, layout, chunk)
        x = self._tokens(latents)
        embedding, projection = self.condition_embedder.time(timestep)
        shift, scale = (self.scale_shift_table[:, None] + embedding[:, :, None]).unbind(2)
        modulations = [block.modulation(projection) for block in self._blocks()]
        next_norms = [modulation[0] for modulation in modulations[1:]] + [(1 + scale, shift)]
        readers = [block.attn1.readers for block in self._blocks()[1:]] + [(self.proj_out,)]
        projected = self._project(text) if isinstance(text, Tensor) else None

        h: Tensor | Rounded = norm_modulate(x, *modulations[0][0], self.config.eps)
        for layer, block in enumerate(self._blocks()):
            context = text.blocks[layer] if isinstance(text, TextContext) else projected
            place = (sequence, layer, self.precision, readers[layer])
            arguments = (x, h, modulations[layer], next_norms[layer], context, *place)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, h = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, h = block(*arguments)
        return self._unpatchify(self.proj_out(h), grid)

    def _tokens(self, latents: Tensor) -> Tensor:
        """Patches ``[B, L, E]`` in the weights' dtype: under autocast the residual stream stays fp32."""
        dtype = self.patch_embedding.weight.dtype
        return self.patch_embedding(latents.to(dtype)).flatten(2).transpose(1, 2).contiguous().to(dtype)

    def _token_grid(self, latents: Tensor, timestep: Tensor, layout: Layout | None) -> tuple[int, int, int]:
        channels, *size = latents.shape[1:]
        if channels != self.config.in_channels or any(n % p for n, p in zip(size, self.config.patch_size, strict=True)):
            raise ConfigError(
                f"Latents of shape {tuple(latents.shape)} do not fit {self.config.in_channels} channels "
                f"and patches of {self.config.patch_size}.",
                "Use a height and width that are multiples of the codec's stride times the patch.",
            )
        frames, height, width = (n // p for n, p in zip(size, self.config.patch_size, strict=True))
        if layout is not None and len(layout.frame_index) != frames:
            raise ConfigError(
                f"The layout covers {len(layout.frame_index)} latent frames, the latents have {frames}.",
                "Build the chunk pattern for this length.",
            )
        assert timestep.shape in ((len(latents),), (len(latents), frames)), "timestep is [B] or [B, T]"
        return frames, height, width

    def _sequence(
        self, grid: tuple[int, int, int], device: torch.device, layout: Layout | None, chunk: ChunkPass | None
    ) -> TokenSequence:
        frames, height, width = grid
        layout = layout or bidirectional(frames)
        first = chunk.slot.first_frame if chunk is not None else 0
        index = [first + frame for frame in layout.frame_index]
        wide = torch.promote_types(self.proj_out.weight.dtype, torch.float32)
        return TokenSequence(self.rope(index, height, width, device, wide), layout, height * width, chunk)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """``[B, L, p_t p_h p_w C]``, channels fastest, to ``[B, C, T, H, W]``."""
        split = patches.unflatten(1, grid).unflatten(-1, (*self.config.patch_size, -1))
        return split.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
