"""``reelforge generate``: prompts to mp4 files."""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reelforge.engine.core import rng
from reelforge.engine.core.config import fingerprint
from reelforge.engine.core.distributed import pick_device
from reelforge.engine.core.errors import ConfigError, Interrupted
from reelforge.engine.core.files import make_folder
from reelforge.engine.core.interrupt import StopRequest, stop_on_signals
from reelforge.engine.core.progress import say, track
from reelforge.engine.enhance.rewriter import Enhanced, load_rewriter
from reelforge.engine.io.video import write_video
from reelforge.engine.model.folder import load_generation_defaults
from reelforge.engine.model.generator import Generator, Job, decode_uint8, load_served, resolve
from reelforge.stages.console import emit


@dataclass(frozen=True)
class Target:
    """A video to make and the file it goes to."""

    job: Job
    path: Path


def _targets(asked: Sequence[Enhanced], samples: int, seed: int, out: Path, made_by: str) -> list[Target]:
    """File names tell request and seed to people, and by a hash whatever else decides the pixels."""
    targets = []
    for made in asked:
        slug = re.sub(r"[^a-z0-9]+", "-", made.request.lower()).strip("-")[:48] or "prompt"
        words = made.prompt if made.prompt == made.request else f"{made.request}\n{made.prompt}"
        unique = f"{rng.key(f'{made_by} {words}') % 16**8:08x}"
        names = (f"{slug}-{unique}-seed{seed}-{member}.mp4" for member in range(samples))
        targets += [Target(Job(made.prompt, member, made.request), out / name) for member, name in enumerate(names)]
    return targets


def _weights_state(*folders: Path | None) -> str:
    """Which weight files, and of when: a model trained anew makes its videos anew."""
    files = (file for folder in folders if folder is not None for file in sorted(folder.rglob("*.safetensors")))
    return " ".join(f"{file.resolve()}:{file.stat().st_mtime_ns}" for file in files)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            text = arguments.prompts.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{arguments.prompts} cannot be read ({error}).", "Give a UTF-8 text file.") from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("There is no prompt.", 'Add --prompt "..." or --prompts FILE.')
    return prompts


def _enhanced(arguments: argparse.Namespace, prompts: Sequence[str], generator: Generator) -> list[Enhanced]:
    """The prompts as a rewriter puts them, remembered in ``--out``; without one as they are."""
    if arguments.enhance is None:
        return [Enhanced(prompt, prompt) for prompt in prompts]
    made = load_rewriter(
        arguments.enhance,
        device=pick_device("auto"),
        fits=generator.fits,
        cache=make_folder(arguments.out) / "enhanced.jsonl",
    )(prompts)
    for each in made:
        say(f"{each.request!r} {f'stays as it is: {each.kept}' if each.kept else f'becomes {each.prompt!r}'}")
    return made


def main(arguments: argparse.Namespace) -> int:
    """Make what is missing in ``--out``; print one JSON line a video."""
    config = resolve(load_generation_defaults(arguments.model), arguments.overrides)
    prompts = _prompts(arguments)
    device = pick_device(config.device)
    dtype = config.weights_dtype(device)
    folder = load_served(arguments.model, arguments.transformer, arguments.adapter, dtype, device)
    generator = Generator(folder, config, arguments.seed)
    weights = _weights_state(arguments.model, arguments.transformer, arguments.adapter)
    made_by = f"{fingerprint(config)} {weights}"
    asked = _enhanced(arguments, prompts, generator)
    targets = _targets(asked, config.samples, arguments.seed, make_folder(arguments.out), made_by)
    missing = [target for target in targets if not target.path.exists()]
    batches = [missing[i : i + config.batch_size] for i in range(0, len(missing), config.batch_size)]
    with stop_on_signals() as stop:
        for batch in track(batches, "generate", total=len(batches)):
            _make(generator, batch, stop)
    found = len(targets) - len(missing)
    emit(f"{len(missing)} videos made, {found} were there, {generator.num_evaluations} network evaluations each")
    return 0


def _make(generator: Generator, batch: Sequence[Target], stop: StopRequest) -> None:
    def check(_: int) -> None:
        if stop.requested:
            raise Interrupted(f"{stop.signal_name} arrived.", "Run the same command to make the missing videos.")

    start = time.perf_counter()
    latents = generator.latents([target.job for target in batch], check)
    denoised = time.perf_counter()
    frames = decode_uint8(generator.folder.codec, latents)
    decoded = time.perf_counter()
    for target, clip in zip(batch, frames, strict=True):
        write_video(target.path, clip, generator.config.video.fps)
        record = {
            "path": str(target.path),
            "prompt": target.job.prompt,
            "request": target.job.request,
            "seed": generator.seed,
            "member": target.job.member,
            "denoise_s": round((denoised - start) / len(batch), 4),
            "decode_s": round((decoded - denoised) / len(batch), 4),
        }
        emit(json.dumps(record, ensure_ascii=False))
