"""What a user would bring to the demo: clips, requests, a small language model, and the folder of a fresh video model.

Each function does nothing where its result is there already.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelforge.bench.toy import codec_fit, render
from reelforge.bench.toy.requests import pair, request
from reelforge.bench.toy.world import captions, scenes
from reelforge.engine.core import rng
from reelforge.engine.core.files import replace_file, staged_folder
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.data.clips import load_clip
from reelforge.engine.enhance.language_model import LanguageModel, TinyLanguageModelConfig
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.model.codec import CodecConfig
from reelforge.engine.model.folder import GenerationDefaults, ModelFolder
from reelforge.engine.model.text import SeededTextConfig, SeededTextEncoder
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig


@dataclass(frozen=True)
class WorldConfig:
    """The toy world's files.

    Attributes:
        base_clips: broad and flawed clips.
        curated_clips: rightly described ones, before filtering.
        codec_clips: clips of the base set that the codec is fitted to.
        video: what every clip is brought to.
    """

    base_clips: int
    curated_clips: int
    codec_clips: int
    video: VideoSpec = render.TOY_SPEC


@dataclass(frozen=True)
class SamplingDefaults:
    """How the miniature is sampled, as in a model folder."""

    num_steps: int
    guidance_scale: float
    schedule: FlowSchedule


def render_clips(videos: Path, world: WorldConfig, seed: int) -> None:
    """mp4 files with captions beside them in ``videos/base`` and ``videos/curated``."""
    sets = {"base": (world.base_clips, render.WEB), "curated": (world.curated_clips, render.CAPTIONED)}
    for number, (name, (count, rates)) in enumerate(sets.items()):
        folder = videos / name
        if len(list(folder.glob("*.txt"))) < count:
            folder.mkdir(parents=True, exist_ok=True)
            render.write_flawed(folder, count, rng.key("demo_set", seed, number), "train", rates, world.video)


def write_requests(root: Path, seed: int, pairs: int) -> None:
    """One caption of every training scene for RLHF; requests, and pairs of request and caption, for the rewriter."""
    known = scenes("train")
    of_pairs, asked = rng.generator("demo_pairs", seed), rng.generator("demo_requests", seed)
    lines = {
        "rl_prompts.txt": [captions(scene)[3 + index % 4] for index, scene in enumerate(known)],
        "requests.txt": [request(scene, "train", asked) for scene in known],
        "pairs.jsonl": [json.dumps(pair(scene, of_pairs)) for scene in known for _ in range(pairs)],
    }
    for name, texts in lines.items():
        if not (root / name).exists():
            replace_file(root / name, "\n".join(texts) + "\n")


def make_language_model(folder: Path, config: TinyLanguageModelConfig, pairs: Path, seed: int) -> None:
    """A fresh one with a tokenizer of the pairs' words."""
    if not folder.exists():
        words = [text for line in pairs.read_text(encoding="utf-8").splitlines() for text in json.loads(line).values()]
        with staged_folder(folder) as staging:
            LanguageModel.create(config, words, seed, staging)


def make_model(
    folder: Path,
    clips: Path,
    world: WorldConfig,
    transformer: WanConfig,
    codec: CodecConfig,
    text: SeededTextConfig,
    sampling: SamplingDefaults,
    seed: int,
) -> None:
    """A fresh transformer, a codec fitted to clips, a seeded text encoder."""
    if folder.exists():
        return
    paths = sorted(clips.glob("*.mp4"))[: world.codec_clips]
    seen = np.stack([load_clip(path, world.video)[0] for path in paths])
    defaults = GenerationDefaults(
        video=world.video,
        schedule=sampling.schedule,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        negative_prompt="",
    )
    ModelFolder(
        WanTransformer.from_config(transformer.to_dict(), seed),
        codec_fit.fit(codec, seen, seed),
        SeededTextEncoder(text),
        defaults,
    ).save(folder)
