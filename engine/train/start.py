"""The model that a stage trains: all weights, or an adapter on frozen ones."""

from pathlib import Path

import torch

from reelforge.engine.model.lora import LoraConfig, inject
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import load_transformer
from reelforge.engine.train.loop import LoopConfig


def load_for_training(
    folder: Path, lora: LoraConfig | None, train: LoopConfig, gradient_checkpointing: bool, device: torch.device
) -> WanTransformer:
    """``folder``'s transformer, in fp32; under an adapter its frozen weights are in the run's precision."""
    frozen_bf16 = lora is not None and train.precision == "bf16"
    model = load_transformer(folder / "transformer", torch.bfloat16 if frozen_bf16 else None, device)
    model.gradient_checkpointing = gradient_checkpointing
    if lora:
        inject(model, lora, train.seed)
    return model
