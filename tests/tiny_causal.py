"""A tiny transformer whose every weight says something, and noise, text and steps for its rollouts."""

import torch
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.wan import WanTransformer

TINY_CAUSAL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 10,
    "freq_dim": 32,
    "ffn_dim": 20,
    "num_layers": 2,
}
SCHEDULE = FlowSchedule("unipc_flow", 5.0)
FEW_STEPS = SCHEDULE.few_step((1000, 750, 500, 250))
SIZE = (4, 6)  # of a latent frame: 2 x 3 tokens
TOKENS = 6


def tiny_causal(seed: int = 1, dtype: torch.dtype = torch.float64) -> WanTransformer:
    """Wan's initialisation, shaken: the head, the biases and the gates are not what they start from."""
    model = WanTransformer.from_config(TINY_CAUSAL, seed=seed)
    shake(model, 0.2, seed)
    return model.to(dtype)


def shake(model: WanTransformer, size: float, seed: int = 0) -> None:
    """Other weights, ``size`` of a normal number away."""
    for index, parameter in enumerate(model.parameters()):
        parameter.data += size * rng.normal([rng.key("shake", seed, index)], parameter.shape)[0].to(parameter)


def latents(frames: int, name: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal ``[B, 3, frames, 4, 6]``, the draw of that number."""
    return rng.normal([rng.key("latents", name, row) for row in range(batch)], (3, frames, *SIZE)).to(dtype)


def texts(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Embeddings ``[count, 7, 10]``."""
    return rng.normal([rng.key("text", row) for row in range(count)], (7, 10)).to(dtype)


def gradients(model: WanTransformer) -> Tensor:
    """All weights' in one vector, which begins anew."""
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found
