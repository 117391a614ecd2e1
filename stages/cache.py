"""Decode, filter and encode a data set once, before any training."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reelforge.engine.core import config as configuration
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.distributed import pick_device
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data.clips import Span
from reelforge.engine.data.filters import FilterConfig
from reelforge.engine.data.latents import LatentCache, Precision, Preparation, build_cache
from reelforge.engine.data.manifest import read_manifest
from reelforge.stages.console import emit


@dataclass(frozen=True)
class CacheConfig:
    """The cache stage.

    Attributes:
        data: a folder of clips with caption twins, or a .csv or .jsonl manifest.
        model: the model folder whose codec and text encoder are used.
        output: the cache folder.
        video: what every clip is brought to.
        filters: which clips to keep.
        span: which part of a longer clip.
        precision: of stored latents and embeddings.
        batch_size: clips encoded together.
        decode_threads: clips decoded at once, ahead of the codec.
        device: where codec and text encoder run; ``auto`` takes the GPU if there is one.
    """

    data: Path
    model: Path
    output: Path
    video: VideoSpec
    filters: FilterConfig = FilterConfig()
    span: Span = "centre"
    precision: Precision = "bfloat16"
    batch_size: int = 4
    decode_threads: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "decode_threads")


def run(config: CacheConfig) -> LatentCache:
    """Build or continue the cache; rejected clips are listed in ``reject_report.json`` beside it."""
    from reelforge.engine.model.folder import load_codec, load_text_encoder

    device = pick_device(config.device)
    preparation = Preparation(config.video, config.span, config.precision, config.batch_size, config.decode_threads)
    codec, text = load_codec(config.model, device), load_text_encoder(config.model, device=device)
    return build_cache(config.output, read_manifest(config.data), preparation, config.filters, codec, text)


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints what the cache holds."""
    config = configuration.load(CacheConfig, arguments.recipe, arguments.overrides)
    emit(json.dumps({"cache": str(config.output), "clips": len(run(config))}))
    return 0
