"""Supervised fine-tuning on a latent cache: full weights, or a LoRA adapter."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reelforge.engine.core import config as configuration
from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import ConfigError, DataError
from reelforge.engine.core.metrics import last_metrics
from reelforge.engine.core.progress import say
from reelforge.engine.core.run_dir import RunDir
from reelforge.engine.core.types import pad_text
from reelforge.engine.data.buckets import BucketSampler
from reelforge.engine.data.latents import LatentCache
from reelforge.engine.flow.sampler import initial_noise
from reelforge.engine.flow.schedule import FlowSchedule
from reelforge.engine.io.video import write_video
from reelforge.engine.model.folder import load_codec, load_generation_defaults, load_text_encoder
from reelforge.engine.model.generation import Guidance, half_precision, latent_shape, sample_latents
from reelforge.engine.model.lora import LoraConfig, lora_parameters, save_adapter
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import save_transformer
from reelforge.engine.train import flow_loss
from reelforge.engine.train.flow_loss import FlowLossConfig
from reelforge.engine.train.loop import Hooks, LoopConfig, TrainLoop
from reelforge.engine.train.start import load_for_training
from reelforge.engine.train.state import OptimizerConfig, TrainState
from reelforge.engine.train.validation import BINS, validate
from reelforge.stages.console import emit
from reelforge.stages.generate import decode_uint8


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out clips, judged at every checkpoint.

    Attributes:
        clips: how many; 0 is none.
        cache: where they are; none takes them out of the training cache.
    """

    clips: int = 16
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.clips < 0:
            raise ConfigError(f"validation.clips is {self.clips}.", "It must be 0 or more.")


@dataclass(frozen=True)
class SftConfig:
    """The supervised fine-tuning stage.

    Attributes:
        model: model folder to start from.
        cache: latent cache made with that model's codec and text encoder.
        output: the run directory.
        schedule: its flow_shift warps the training sigmas; none is the model's own, as in sampling.
        loss: noise levels and caption dropout.
        train: length and rhythm.
        optimizer: AdamW.
        lora: train an adapter of this shape; none trains all weights.
        validation: held-out loss.
        preview_prompts: a video of each is made at every checkpoint with the averaged weights and fixed noise.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        max_batch_tokens: latent positions in a global batch, so that large clips come in smaller batches.
        device: ``auto`` takes the GPU if there is one.
    """

    model: Path
    cache: Path
    output: Path
    schedule: FlowSchedule | None = None
    loss: FlowLossConfig = FlowLossConfig()
    train: LoopConfig = LoopConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    validation: ValidationConfig = ValidationConfig()
    preview_prompts: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    max_batch_tokens: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class SftResult:
    """What a run left.

    Attributes:
        weights: ``<run>/transformer`` in diffusers' layout, or ``<run>/adapter``; averaged weights.
        steps: optimizer steps in all.
        first_step: where this call began; ``steps`` when there was nothing left to do.
        metrics: the last training line merged with the last validation line.
    """

    weights: Path
    steps: int
    first_step: int
    metrics: dict[str, Any]


def run(config: SftConfig) -> SftResult:
    """Train, or continue, to the last step and write the averaged weights.

    Raises:
        Interrupted: a signal asked to stop; calling again continues.
        ConfigError, DataError, CheckpointError, StorageError, TrainingError: as named.
    """
    device = distributed.pick_device(config.device)
    with distributed.process_group(device):
        if distributed.rank() == 0:
            RunDir.open(config.output, config, identity(config))
        distributed.barrier()
        weights = config.output / ("adapter" if config.lora else "transformer")
        first_step = config.train.steps
        if weights.exists():
            say(f"{config.output} is finished: {weights} is there.")
        else:
            first_step = _train(config, device, weights)
    return SftResult(weights, config.train.steps, first_step, last_metrics(RunDir(config.output).metrics))


def main(arguments: argparse.Namespace) -> int:
    """The verb: prints where the weights are and the last measurements."""
    result = run(configuration.load(SftConfig, arguments.recipe, arguments.overrides))
    emit(json.dumps({"weights": str(result.weights), "steps": result.steps, **result.metrics}))
    return 0


def identity(config: SftConfig) -> str:
    """Hash of what decides the weights."""
    plain = dataclasses.replace(decisive(config), model=config.model.resolve(), cache=config.cache.resolve())
    return configuration.fingerprint(plain)


def decisive(config: SftConfig) -> SftConfig:
    """The config but for where the run is, how often it reports, and how a batch is cut up."""
    train = dataclasses.replace(config.train, micro_batch_size=1, log_every=1, checkpoint_every=1, keep_last=1)
    return dataclasses.replace(
        config, output=Path(), train=train, preview_prompts=(), gradient_checkpointing=False, device="auto"
    )


def _train(config: SftConfig, device: torch.device, weights: Path) -> int:
    model = load_for_training(config.model, config.lora, config.train, config.gradient_checkpointing, device)
    cache = LatentCache.open(config.cache)
    if distributed.rank() == 0:
        cache.check(load_codec(config.model))  # the text encoder is too large to load for a check alone
    task = SftTask(config, model, cache, device)
    parameters = dict(lora_parameters(model) if config.lora else model.named_parameters())
    state = TrainState(parameters, config.optimizer, config.train.steps)
    previews = Previews(config, model, cache, device) if config.preview_prompts else None
    run_dir = RunDir(config.output)
    loop = TrainLoop(state, config.train, run_dir, f"{identity(config)}-{task.cache.fingerprint}", "sft")
    first_step = loop.resume()

    def at_checkpoint(step: int) -> dict[str, Any]:
        with state.ema.applied():
            if previews:
                previews.make(run_dir.samples / f"step-{step:08d}")
            return task.validate()

    loop.fit(Hooks(task.losses, at_checkpoint, task.sigma_histogram))
    if distributed.rank() == 0:
        with state.ema.applied():
            save_adapter(model, weights) if config.lora else save_transformer(model, weights)
    distributed.barrier()
    return first_step


class SftTask:
    """Batches, losses and measurements of one run; all of them functions of the step.

    Raises:
        DataError: the cache does not fit the model, or nothing is left to train on.
    """

    def __init__(self, config: SftConfig, model: WanTransformer, cache: LatentCache, device: torch.device) -> None:
        self.config, self.model, self.cache, self.device = config, model, cache, device
        self.schedule = config.schedule or load_generation_defaults(config.model).schedule
        self.seed = config.train.seed
        self.held_out, self.clips = self._split()
        shapes = [cache.shape_of(index) for index in self.clips]
        self.sampler = BucketSampler(shapes, config.train.batch_size, self.seed, config.max_batch_tokens)
        for size in self.sampler.batch_sizes:
            distributed.own_slots(size)  # refuse now what would not divide among the ranks at some later step
        self._check_fit()

    def _split(self) -> tuple[tuple[LatentCache, list[int]], list[int]]:
        wanted = self.config.validation
        order = rng.generator("held_out", self.seed).permutation(len(self.cache)).tolist()
        if wanted.cache is not None:
            other = LatentCache.open(wanted.cache)
            if other.header != self.cache.header:
                what = f"{wanted.cache} was prepared in another way than {self.config.cache}."
                raise DataError(what, "Build both with the same model and recipe.")
            return (other, list(range(min(wanted.clips, len(other))))), sorted(order)
        if wanted.clips >= len(self.cache):
            raise DataError(
                f"{self.config.cache} has {len(self.cache)} clips and validation.clips is {wanted.clips}.",
                "Hold out fewer, or give validation.cache.",
            )
        return (self.cache, order[: wanted.clips]), sorted(order[wanted.clips :])

    def _check_fit(self) -> None:
        wanted = (self.model.config.in_channels, self.model.config.text_dim)
        found = (self.cache.latents(self.clips[:1]).shape[1], self.cache.empty_text.shape[1])
        if found != wanted:
            raise DataError(
                f"{self.config.cache} has {found[0]} latent channels and text of width {found[1]}, "
                f"{self.config.model} takes {wanted[0]} and {wanted[1]}.",
                "Build the cache with this model.",
            )

    def losses(self, step: int) -> Iterator[Tensor]:
        """Each micro-batch's share of the global mean loss, on this rank's slots."""
        batch = [self.clips[place] for place in self.sampler.batch(step)]
        size, rows = len(batch), self.config.train.micro_batch_size
        sigma = flow_loss.draw_sigmas(self.config.loss, self.schedule, self.seed, step, size)
        dropped = flow_loss.draw_text_dropout(self.config.loss, self.seed, step, size).tolist()
        own = distributed.own_slots(size)
        for start in range(own.start, own.stop, rows):
            slots = range(start, min(start + rows, own.stop))
            indexes = [batch[slot] for slot in slots]
            text = self.cache.text(indexes, self._captions(step, slots, dropped), self.device)
            losses = self._losses(step, slots, sigma[slots.start : slots.stop], indexes, text)
            yield losses.sum() / size

    def _captions(self, step: int, slots: range, dropped: Sequence[bool]) -> list[int | None]:
        return [None if dropped[slot] else rng.key("caption", self.seed, step, slot) for slot in slots]

    def _losses(self, step: int, slots: range, sigma: Tensor, indexes: Sequence[int], text: Tensor) -> Tensor:
        x0 = self.cache.latents(indexes, self.device)
        noise = flow_loss.draw_noise(self.seed, step, slots, x0.shape[1:], self.device)
        weight = flow_loss.loss_weight(self.config.loss, self.schedule, sigma).to(self.device)
        with half_precision(self.device, self.config.train.precision == "bf16"):
            return weight * flow_loss.flow_losses(self.model, x0, noise, sigma, text)

    def sigma_histogram(self, steps: range) -> dict[str, list[int]]:
        """How many samples fell into each eighth of [0, 1]: what the sampler and the shift together really train."""
        draws = [
            flow_loss.draw_sigmas(self.config.loss, self.schedule, self.seed, step, len(self.sampler.batch(step)))
            for step in steps
        ]
        return {"sigma_histogram": torch.histc(torch.cat(draws), BINS, 0, 1).int().tolist()}

    def validate(self) -> dict[str, Any]:
        """Held-out loss per noise level under the weights in place."""
        cache, held_out = self.held_out

        def clip(number: int) -> tuple[Tensor, Tensor]:
            index = [held_out[number]]
            return cache.latents(index, self.device), cache.text(index, [0], self.device)

        if not held_out:
            return {}
        rows = self.config.train.micro_batch_size
        return validate(self.model, clip, len(held_out), rows, self.config.train.precision)


class Previews:
    """Fixed-seed videos of the preview prompts, sampled by the model folder's defaults; ranks share the prompts.

    Raises:
        DataError: the cache was made with another codec or text encoder.
    """

    def __init__(self, config: SftConfig, model: WanTransformer, cache: LatentCache, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self.defaults = load_generation_defaults(config.model)
        self.codec = load_codec(config.model, device)
        self.shape = latent_shape(self.codec, self.defaults.video)
        self.text = torch.zeros(
            len(config.preview_prompts) + 1, cache.header["max_tokens"], model.config.text_dim, device=device
        )
        if distributed.rank() == 0:
            # On the CPU and once: UMT5 would hold 11 GB of the GPU through the whole run.
            encoder = load_text_encoder(config.model)
            cache.check(self.codec, encoder)
            embeddings = encoder.encode([*config.preview_prompts, self.defaults.negative_prompt])
            self.text.copy_(pad_text(embeddings, encoder.max_tokens))
        distributed.sum_([self.text])

    def make(self, folder: Path) -> None:
        """Write this rank's share, one mp4 per prompt."""
        folder.mkdir(parents=True, exist_ok=True)
        grid, seed = self.defaults.schedule.grid(self.defaults.num_steps), self.config.train.seed
        for number in range(distributed.rank(), len(self.config.preview_prompts), distributed.world_size()):
            guidance = Guidance(self.text[number][None], self.text[-1:], self.defaults.guidance_scale)
            noise = initial_noise(seed, [number], [0], self.shape, device=self.device)
            with half_precision(self.device, self.config.train.precision == "bf16"):
                latents = sample_latents(self.model, guidance, noise, grid)
            write_video(folder / f"{number:02d}.mp4", decode_uint8(self.codec, latents)[0], self.defaults.video.fps)
