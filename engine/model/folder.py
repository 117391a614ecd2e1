"""A model folder: diffusers' pipeline layout, plus ``reelforge.json``.

``model_index.json``, ``transformer/``, ``vae/``, ``text_encoder/``, ``tokenizer/`` (UMT5 only) and ``scheduler/`` are
diffusers'; a Wan2.1 checkout loads as it is. ``reelforge.json`` holds what diffusers has no place for: the clip that
the model is made for and how it is sampled by default.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reelforge.engine.core.config import build, nearest
from reelforge.engine.core.errors import CheckpointError
from reelforge.engine.core.files import staged_folder
from reelforge.engine.core.types import VideoSpec
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.io.model_files import read_json, write_json
from reelforge.engine.model.codec import ReelforgeCodec
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.text import SeededTextEncoder, Umt5TextEncoder
from reelforge.engine.model.vae_diffusers import DiffusersWanVae
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import DIFFUSERS_VERSION, load_transformer, save_transformer

Codec = ReelforgeCodec | DiffusersWanVae
Encoder = SeededTextEncoder | Umt5TextEncoder
EXTRAS = "reelforge.json"
# `sample_neg_prompt` of Wan2.1's shared config.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# Class and key of the shift, per kind of schedule.
_SCHEDULERS = {
    "unipc_flow": ("UniPCMultistepScheduler", "flow_shift"),
    "euler": ("FlowMatchEulerDiscreteScheduler", "shift"),
}
_UNIPC = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "solver_type": "bh2",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """How a model is sampled when nothing else is said; the values here are Wan2.1's at 480p.

    Attributes:
        video: the clip it makes.
        schedule: kept in diffusers' ``scheduler/``.
        num_steps: solver steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        negative_prompt: what guidance leads away from.
        chunk_frames: latent frames a chunk of a causal model; 0 makes all frames at once.
        first_chunk_frames: 0 is ``chunk_frames``.
        denoising_steps: a few-step student's timesteps; empty is the ODE.
        context: what a finished chunk leaves for the chunks after it.
    """

    video: VideoSpec = VideoSpec(81, 480, 832, 16.0)
    schedule: FlowSchedule = FlowSchedule()
    num_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    chunk_frames: int = 0
    first_chunk_frames: int = 0
    denoising_steps: tuple[float, ...] = ()
    context: ContextConfig = ContextConfig()


@dataclass(frozen=True)
class ModelFolder:
    """Everything a model folder holds, in memory."""

    transformer: WanTransformer
    codec: Codec
    text_encoder: Encoder
    defaults: GenerationDefaults

    @classmethod
    def load(
        cls, root: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "ModelFolder":
        """Read all of it; the transformer in ``dtype`` (None is float32).

        Raises:
            CheckpointError: a part is missing, damaged or unknown.
            ConfigError: a part needs a package that is not installed.
        """
        root = Path(root)
        return cls(
            load_transformer(root / "transformer", dtype, device),
            load_codec(root, device),
            load_text_encoder(root, device=device),
            load_generation_defaults(root),
        )

    def save(self, root: Path | str) -> None:
        """Write the folder; it appears, or replaces an older one, only when it is complete.

        Raises:
            StorageError: the disk refused.
        """
        with staged_folder(Path(root)) as staging:
            save_transformer(self.transformer, staging / "transformer")
            self.codec.save(staging / "vae")
            self.text_encoder.save(staging / "text_encoder")
            _save_defaults(self.defaults, staging)
            write_json(staging / "model_index.json", _index(staging))


def load_codec(root: Path | str, device: torch.device | str = "cpu") -> Codec:
    """The codec in ``vae/``: Wan's VAE in float32, or the miniature's codec."""
    folder = Path(root) / "vae"
    kind = read_json(folder / "config.json").get("_class_name")
    if kind == "ReelforgeCodec":
        return ReelforgeCodec.load(folder, device)
    if kind == "AutoencoderKLWan":
        return DiffusersWanVae.load(folder, device=device)
    raise _unknown(folder, kind, ("AutoencoderKLWan", "ReelforgeCodec"))


def load_text_encoder(
    root: Path | str, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Encoder:
    """The text encoder in ``text_encoder/``; ``dtype`` is that of UMT5's weights."""
    folder = Path(root) / "text_encoder"
    table = read_json(folder / "config.json")
    kind = table.get("_class_name", table.get("model_type"))
    if kind == "SeededTextEncoder":
        return SeededTextEncoder.load(folder)
    if kind == "umt5":
        return Umt5TextEncoder.load(folder, dtype, device)
    raise _unknown(folder, kind, ("umt5", "SeededTextEncoder"))


def load_generation_defaults(root: Path | str) -> GenerationDefaults:
    """``scheduler/`` and ``reelforge.json``; without the latter, Wan2.1's defaults."""
    root = Path(root)
    extras = read_json(root / EXTRAS) if (root / EXTRAS).exists() else {}
    schedule = dataclasses.asdict(_load_schedule(root / "scheduler"))
    return build(GenerationDefaults, {**extras, "schedule": schedule}, f"{root / EXTRAS}: ")


def _load_schedule(folder: Path) -> FlowSchedule:
    table = read_json(folder / "scheduler_config.json")
    for kind, (name, shift) in _SCHEDULERS.items():
        if table.get("_class_name") == name:
            return build(FlowSchedule, {"kind": kind, "flow_shift": table.get(shift, 1.0)}, f"{folder}: ")
    raise _unknown(folder, table.get("_class_name"), tuple(name for name, _ in _SCHEDULERS.values()))


def _save_defaults(defaults: GenerationDefaults, root: Path) -> None:
    extras = dataclasses.asdict(defaults)
    del extras["schedule"]
    write_json(root / EXTRAS, extras)
    name, shift = _SCHEDULERS[defaults.schedule.kind]
    table: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
    }
    table |= {shift: defaults.schedule.flow_shift, **(_UNIPC if name.startswith("UniPC") else {})}
    (root / "scheduler").mkdir()
    write_json(root / "scheduler" / "scheduler_config.json", table)


def _index(root: Path) -> dict[str, Any]:
    """diffusers' list of parts, each with its library and class."""
    codec = read_json(root / "vae" / "config.json")["_class_name"]
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")["_class_name"]
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["reelforge" if codec == "ReelforgeCodec" else "diffusers", codec],
        "scheduler": ["diffusers", scheduler],
    }
    if not (root / "tokenizer").exists():
        return {**index, "text_encoder": ["reelforge", "SeededTextEncoder"]}
    tokenizer = read_json(root / "tokenizer" / "tokenizer_config.json")["tokenizer_class"]
    return {
        **index,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
    }


def derive_model_folder(
    source: Path | str,
    root: Path | str,
    transformer: WanTransformer,
    defaults: GenerationDefaults | None = None,
) -> None:
    """Write a folder with a new transformer and ``source``'s other parts, whose weights are hard-linked if possible.

    Args:
        source: a model folder; may be ``root`` itself.
        root: the new folder, which appears only when it is complete.
        transformer: the new one, adapters merged.
        defaults: how it is sampled; None keeps ``source``'s.

    Raises:
        CheckpointError: ``source`` lacks a part.
        StorageError: the disk refused.
    """
    defaults = defaults or load_generation_defaults(source)
    replaced = shutil.ignore_patterns("transformer", "scheduler", EXTRAS)
    with staged_folder(Path(root)) as staging:
        shutil.copytree(source, staging, ignore=replaced, copy_function=_link_weights, dirs_exist_ok=True)
        save_transformer(transformer, staging / "transformer")
        _save_defaults(defaults, staging)
        write_json(staging / "model_index.json", _index(staging))


def _link_weights(source: str, target: str) -> None:
    """Hard-link a weight file, which nothing ever writes in place; copy what is small or on another disk."""
    if source.endswith(".safetensors"):
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def _unknown(folder: Path, kind: object, allowed: tuple[str, ...]) -> CheckpointError:
    return CheckpointError(f"{folder} holds {kind!r}.", nearest(str(kind), allowed))
