"""A tiny model folder, real in every part."""

from pathlib import Path

import numpy as np
import torch

from reelforge.bench.toy import codec_fit, render
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.codec import CodecConfig
from reelforge.engine.model.folder import GenerationDefaults, ModelFolder
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder
from reelforge.engine.model.wan import WanTransformer

TINY_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
TINY_VIDEO = VideoSpec(num_frames=9, height=16, width=16, fps=16.0)


def make_model_folder(root: Path) -> Path:
    """A random transformer, a codec fitted in closed form, seeded text embeddings; two steps, no guidance."""
    clips = [render.make_clip(1, index, spec=TINY_VIDEO).frames for index in range(24)]
    transformer = WanTransformer.from_config(TINY_TRANSFORMER, seed=1)
    head = transformer.proj_out.weight
    head.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    ModelFolder(
        transformer,
        codec_fit.fit(CodecConfig(), np.stack(clips), seed=0),
        SeededTextEncoder(SeededTextConfig(width=16, max_tokens=12)),
        GenerationDefaults(TINY_VIDEO, FlowSchedule("unipc_flow", 3.0), 2, 1.0, ""),
    ).save(root)
    return root
