"""What the arms of an RLHF iteration share: network, prompts, schedule, decoder and scorers.

From a model folder, with its own codec; or at a published model's shape with random weights, where latents are taken
for pictures as they are: such an iteration is that of the transformer alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reelforge.bench import block, rl_cost, wan_cost
from reelforge.bench.cases import case
from reelforge.bench.cases.case import Shape
from reelforge.bench.rl_cost import Calls
from reelforge.engine.core import rng
from reelforge.engine.core.types import pad_text
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rewards.contract import Scorer, Scores
from reelforge.engine.rewards.scoring import Decode
from reelforge.engine.rl.policy import Precision

PROMPTS = 8
_SMALL_LATENT, _SMALL_LAYERS, _SMALL_TEXT = (16, 4, 6), 2, 8
_GUIDANCE, _HEAD_STD = 5.0, 0.02
_COLOURS = 3


@dataclass(frozen=True)
class World:
    """The parts.

    Attributes:
        name: of the model, ``"1.3B"`` or the folder's.
        model: with adapters where those train.
        trained: the weights that train, fp32.
        text: ``[N + 1, S, E]``, the negative prompt last.
        prompts: the N texts.
        latent: ``[C, T, H, W]``.
        schedule: of the sampler.
        guidance_scale: of classifier-free guidance.
        precision: of both paths.
        decode: latents to frames.
        scorers: of frames.
    """

    name: str
    model: WanTransformer
    trained: dict[str, nn.Parameter]
    text: Tensor
    prompts: tuple[str, ...]
    latent: tuple[int, int, int, int]
    schedule: FlowSchedule
    guidance_scale: float
    precision: Precision
    decode: Decode
    scorers: Sequence[Scorer]

    @property
    def size(self) -> Shape:
        """The network at this clip's tokens."""
        config = self.model.config
        _, frames, height, width = self.latent
        tokens = frames * (height // config.patch_size[1]) * (width // config.patch_size[2])
        return Shape(self.name, config.width, config.num_attention_heads, config.ffn_dim, tokens)

    @property
    def units(self) -> Calls:
        """The calls in forwards of a network row."""
        trained = rl_cost.TRAINED if self.model.gradient_checkpointing else rl_cost.TRAINED_KEEPING
        return rl_cost.units(1 if self.guidance_scale == 1.0 else 2, trained)

    @property
    def forward_flops(self) -> float:
        """Of one network row."""
        return rl_cost.forward_flops(self.size, self.model.config.num_layers, self.text.shape[1])


class Level:
    """Mean brightness: a reward that costs nothing."""

    axes: tuple[str, ...] = ("level",)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        return {"level": Scores.of(videos.double().flatten(1).mean(1))}


def from_folder(folder: Path, device: torch.device) -> World:
    """A model folder's world; all weights train on a CPU, on a GPU an adapter beside bf16 weights.

    Raises:
        CheckpointError: it is not a model folder.
    """
    from reelforge.bench.toy.verifiers import ToyVerifier
    from reelforge.bench.toy.world import captions, scenes
    from reelforge.engine.model.codec import ReelforgeCodec
    from reelforge.engine.model.folder import load_codec, load_generation_defaults, load_text_encoder
    from reelforge.engine.model.generation import latent_shape
    from reelforge.engine.model.generator import decode_uint8
    from reelforge.engine.model.weights import load_transformer

    defaults, codec, encoder = load_generation_defaults(folder), load_codec(folder, device), load_text_encoder(folder)
    prompts = tuple(captions(scene)[0] for scene in scenes()[::53])[:PROMPTS]
    text = pad_text(encoder.encode([*prompts, defaults.negative_prompt]), encoder.max_tokens)
    adapted = device.type == "cuda"
    model = load_transformer(folder / "transformer", torch.bfloat16 if adapted else None, device)
    miniature = isinstance(codec, ReelforgeCodec)  # the toy world's scorers know only its pictures
    scorer: Scorer = ToyVerifier(defaults.video) if miniature else Level()

    def decode(latents: Tensor) -> Tensor:
        return torch.from_numpy(decode_uint8(codec, latents))

    return World(
        folder.resolve().name, model, _trained(model, adapted), text, prompts, latent_shape(codec, defaults.video),
        defaults.schedule, defaults.guidance_scale, "bf16" if adapted else "fp32", decode, [scorer],
    )  # fmt: skip


def from_shape(name: str, frames: int, device: torch.device, *, small: bool = False) -> World:
    """Random weights at a published shape, 480 x 832 x ``frames``, an adapter on all linears; tiny when ``small``."""
    layers = _SMALL_LAYERS if small else wan_cost.LAYERS[name]
    config = rl_cost.transformer_config(shape(name, frames, small=small), layers)
    text_tokens = _SMALL_TEXT if small else wan_cost.TEXT_TOKENS
    return from_config(name, config, _latent(frames, small), text_tokens, device, adapted=True)


def from_config(
    name: str,
    config: Mapping[str, int],
    latent: tuple[int, int, int, int],
    text_tokens: int,
    device: torch.device,
    *,
    adapted: bool,
) -> World:
    """Random weights of any architecture; all of them train, or an adapter beside them."""
    model = WanTransformer.from_config(config, device=device)
    head = model.proj_out.weight  # zero at first, and so would be every velocity
    head.data = _HEAD_STD * rng.normal([rng.key("rl_bench_head")], head.shape, device)[0]
    half = adapted and device.type == "cuda"
    model = model.to(torch.bfloat16 if half else torch.float32)
    keys = [rng.key("rl_bench_text", prompt) for prompt in range(PROMPTS + 1)]
    text = rng.normal(keys, (text_tokens, model.config.text_dim))
    return World(
        name, model, _trained(model, adapted), text, tuple(f"prompt {n}" for n in range(PROMPTS)), latent,
        FlowSchedule(), _GUIDANCE, "bf16" if device.type == "cuda" else "fp32", _as_pictures, [Level()],
    )  # fmt: skip


def shape(name: str, frames: int, *, small: bool = False) -> Shape:
    """The size of :func:`from_shape`."""
    _, steps, height, width = _latent(frames, small)
    return Shape(name, *case.MODELS[name], steps * (height // 2) * (width // 2))


def _latent(frames: int, small: bool) -> tuple[int, int, int, int]:
    channels, height, width = _SMALL_LATENT if small else block.LATENT
    return channels, (frames - 1) // 4 + 1, height, width


def _trained(model: WanTransformer, adapted: bool) -> dict[str, nn.Parameter]:
    if not adapted:
        return dict(model.named_parameters())
    inject(model, LoraConfig(), seed=0)
    model.gradient_checkpointing = True
    return dict(lora_parameters(model))


def _as_pictures(latents: Tensor) -> Tensor:
    """The first three channels ``[B,C,T,H,W]`` as frames ``[B,T,H,W,3]``."""
    colours = latents[:, :_COLOURS].movedim(1, -1)
    return (127.5 + 32 * colours).clamp(0, 255).to(torch.uint8).cpu()
