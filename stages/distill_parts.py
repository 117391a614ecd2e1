"""From a recipe to the parts of a distillation run: what is wrong with a recipe is found before anything is written."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelforge.engine.core import distributed, rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.data.latents import LatentCache
from reelforge.engine.distill.init_trainer import CachedClips, InitTask, Source, TeacherClips
from reelforge.engine.distill.pairs import Pairs, make_pairs, trajectory, trajectory_grids
from reelforge.engine.distill.trainer import DmdTask, Student, check_rollout
from reelforge.engine.distill.turns import Turns
from reelforge.engine.flow.sampler import guided, initial_noise
from reelforge.engine.flow.schedule import FlowSchedule, Grid
from reelforge.engine.model.folder import GenerationDefaults, load_codec, load_generation_defaults
from reelforge.engine.model.generation import CLEAN, Guidance, half_precision, latent_shape, sample_chunks
from reelforge.engine.model.kv_cache import ContextConfig
from reelforge.engine.model.layout import chunk_pattern
from reelforge.engine.model.lora import inject, lora_parameters
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.wan_config import WanConfig
from reelforge.engine.model.weights import load_transformer
from reelforge.engine.rl.origin import origin
from reelforge.engine.rl.prompts import PromptSet, read_prompts
from reelforge.engine.train.loop import LoopConfig, Trained
from reelforge.engine.train.start import load_for_training
from reelforge.engine.train.state import TrainState
from reelforge.stages.distill_config import DistillConfig, DmdPhase, InitPhase


@dataclass(frozen=True)
class Setup:
    """What the phases share.

    Attributes:
        defaults: how the teacher is sampled, for clips of the recipe's size.
        shape: of a clip's latents.
        schedule: of the student.
        grid: its few steps.
        pattern: its chunks.
        prompts: to train on.
        taught: hashes of what the trajectories start from.
        origin: hashes of what the run starts from.
    """

    device: torch.device
    defaults: GenerationDefaults
    shape: tuple[int, int, int, int]
    schedule: FlowSchedule
    grid: Grid
    pattern: tuple[int, ...]
    prompts: PromptSet
    taught: dict[str, str]
    origin: dict[str, str]


@dataclass(frozen=True)
class Parts:
    """A phase before its first step.

    Attributes:
        model: the student.
        state: what is trained.
        student: the student's part of it.
        losses, describe: hooks.
        stride: steps between which the run is not cut.
        sample: (text, noise, keys of the fresh noise) to x0, one video.
        seed: of the phase.
    """

    model: WanTransformer
    state: Trained
    student: TrainState
    losses: Callable[[int], Iterable[Tensor]]
    describe: Callable[[range], dict[str, Any]]
    stride: int
    sample: Callable[[Tensor, Tensor, Tensor], Tensor]
    seed: int


def set_up(config: DistillConfig, device: torch.device) -> Setup:
    """Check the recipe against the models' folders.

    Raises:
        ConfigError, DataError, CheckpointError: as named.
    """
    defaults = load_generation_defaults(config.teacher)
    if defaults.chunk_frames:
        raise ConfigError(
            f"The teacher {config.teacher} is itself sampled chunk by chunk (chunk_frames {defaults.chunk_frames}).",
            "Give the bidirectional model it comes from; a model to go on with is `student`.",
        )
    defaults = dataclasses.replace(defaults, video=config.video or defaults.video)
    codec, prompts = load_codec(config.teacher), read_prompts(config.prompts)
    shape = latent_shape(codec, defaults.video)
    pattern = chunk_pattern(shape[1], config.chunk_frames, config.first_chunk_frames or None)
    schedule = config.schedule or defaults.schedule
    grid = schedule.few_step(config.denoising_steps)
    for phase in config.phases.values():
        distributed.own_slots(phase.train.batch_size)
    if config.self_forcing:
        rolled = _rollout_pattern(config, config.self_forcing, pattern)
        check_rollout(rolled, shape[1], config.self_forcing.rollout, config.self_forcing.train)
    if config.causal_init and config.causal_init.cache:
        _cached(config, config.causal_init, config.causal_init.cache, shape)
    taught, *others = [origin(prompts, grid, model.parameters(), codec.fingerprint) for model in _models(config)]
    weights = "-".join(each["weights"] for each in (taught, *others))
    return Setup(device, defaults, shape, schedule, grid, pattern, prompts, taught, taught | {"weights": weights})


def _models(config: DistillConfig) -> Iterator[WanTransformer]:
    """The teacher, and every other model that the recipe names; refuses what does not fit it."""
    teacher = load_transformer(config.teacher / "transformer")
    for phase in config.phases.values():
        for lora in filter(None, (phase.lora, getattr(phase, "critic_lora", None))):
            inject(WanTransformer.from_config(teacher.config.to_dict(), device="meta"), lora, seed=0)
    yield teacher
    for folder in (config.student, config.critic, config.causal_init and config.causal_init.teacher):
        if folder:
            model = load_transformer(folder / "transformer")
            _check_fit(config.teacher, teacher.config, folder, model.config)
            yield model


def _check_fit(teacher: Path, wanted: WanConfig, other: Path, found: WanConfig) -> None:
    """Refuse a model of other latents or text than the teacher's; width and depth are free."""
    for name in ("in_channels", "out_channels", "patch_size", "text_dim"):
        if getattr(found, name) != getattr(wanted, name):
            raise ConfigError(
                f"{other} has {name} = {getattr(found, name)}, the teacher {teacher} has {getattr(wanted, name)}.",
                "Student, critic and teacher must share latents and text encoder.",
            )


def _rollout_pattern(config: DistillConfig, phase: DmdPhase, pattern: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of a rollout, of which the clip's ``pattern`` may be the end."""
    first, frames = config.first_chunk_frames or None, phase.rollout.frames
    return chunk_pattern(frames, config.chunk_frames, first) if frames else pattern


def build(config: DistillConfig, name: str, setup: Setup, before: Path, text: Tensor) -> Parts:
    """A phase's parts.

    Args:
        before: model folder, or finished phase, whose weights the student starts from.
        text: ``[N + 1, S, E]``, the negative prompt last.
    """
    phase = config.phases[name]
    model = load_for_training(before, phase.lora, phase.train, config.gradient_checkpointing, setup.device)
    if isinstance(phase, InitPhase):
        return _causal_init(config, phase, setup, model, before, text)
    pattern = setup.pattern if name == "self_forcing" else (setup.shape[1],)
    return _dmd(config, phase, setup, model, pattern, text)


def _dmd(
    config: DistillConfig, phase: DmdPhase, setup: Setup, model: WanTransformer, pattern: tuple[int, ...], text: Tensor
) -> Parts:
    critic, teacher = _critic_and_teacher(config, phase, setup.device)
    student = Student(model, setup.grid, _rollout_pattern(config, phase, pattern), setup.shape)
    task = DmdTask(
        student, critic, teacher, text, setup.prompts.ids, phase.dmd, phase.rollout, setup.schedule, phase.train
    )
    mine, others = Turns.share(phase.train.steps, phase.dmd.critic_steps)
    state = Turns(
        TrainState(_trained(model), phase.optimizer, mine),
        TrainState(_trained(critic), phase.critics, others),
        phase.dmd.critic_steps,
    )
    sample = _sampler(model, setup, pattern, phase.train, context=phase.rollout.context)
    return Parts(
        model, state, state.student, task.losses, task.describe, phase.rollout.segments, sample, phase.train.seed
    )


def _critic_and_teacher(
    config: DistillConfig, phase: DmdPhase, device: torch.device
) -> tuple[WanTransformer, WanTransformer | None]:
    """The critic, and the teacher unless it is the critic without its adapter."""
    folder = config.critic or config.teacher
    critic = load_for_training(folder, phase.critic_lora, phase.train, config.gradient_checkpointing, device)
    if phase.critic_lora:
        return critic, None
    return critic, _frozen(config.teacher, phase.train, device)


def _frozen(folder: Path, train: LoopConfig, device: torch.device) -> WanTransformer:
    """A model that only answers; bf16 on a GPU if the run is, while a CPU multiplies fp32 weights under autocast."""
    half = train.precision == "bf16" and device.type == "cuda"
    model = load_transformer(folder / "transformer", torch.bfloat16 if half else None, device)
    return model.requires_grad_(False)


def _trained(model: WanTransformer) -> dict[str, torch.nn.Parameter]:
    return dict(lora_parameters(model)) or dict(model.named_parameters())


def _causal_init(
    config: DistillConfig, phase: InitPhase, setup: Setup, model: WanTransformer, before: Path, text: Tensor
) -> Parts:
    source = _source(config, phase, setup, text)
    state = TrainState(_trained(model), phase.optimizer, phase.train.steps)
    teacher = None
    if phase.init.method == "consistency":
        teacher = _frozen(phase.teacher or before, phase.train, setup.device)
    task = InitTask(
        model, state.ema.applied, teacher, source, phase.init, setup.schedule, setup.grid, setup.pattern, phase.train
    )
    sample = _sampler(model, setup, setup.pattern, phase.train, None if phase.few_step else text[-1])
    return Parts(model, state, state, task.losses, lambda steps: {}, 1, sample, phase.train.seed)


def _source(config: DistillConfig, phase: InitPhase, setup: Setup, text: Tensor) -> Source:
    if phase.cache is not None:
        return _cached(config, phase, phase.cache, setup.shape)
    return TeacherClips(_pairs(config, phase, setup, text), text)


def _cached(config: DistillConfig, phase: InitPhase, folder: Path, shape: Sequence[int]) -> CachedClips:
    cache = LatentCache.open(folder)
    cache.check(load_codec(config.teacher))
    return CachedClips(cache, shape, phase.train.seed)


def _pairs(config: DistillConfig, phase: InitPhase, setup: Setup, text: Tensor) -> Pairs:
    """The teacher's trajectories, made here if they are not there."""
    wanted, seed, device = phase.pairs, phase.train.seed, setup.device
    scale = setup.defaults.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale
    header = {
        **setup.taught, "shape": list(setup.shape), "guidance_scale": scale, "seed": seed,
        "negative_prompt": setup.defaults.negative_prompt, "solver": wanted.solver, "substeps": wanted.substeps,
        "precision": phase.train.precision,
    }  # fmt: skip
    grids = trajectory_grids(setup.schedule, config.denoising_steps, wanted.substeps)
    teacher = _frozen(config.teacher, phase.train, device)
    half = phase.train.precision == "bf16" and teacher.proj_out.weight.dtype == torch.float32

    @torch.no_grad()
    def make(pairs: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        prompts = [pair % len(setup.prompts.prompts) for pair in pairs]
        rows = text[[*prompts, -1]].to(device)
        noise = initial_noise(seed, [setup.prompts.ids[p] for p in prompts], pairs, setup.shape, device=device)
        with half_precision(device, half):
            velocity = guided(teacher, rows[:-1], rows[-1:].expand(len(pairs), -1, -1), scale)
            states = trajectory(velocity, noise, grids, wanted.solver)
        return states, [{"prompt": setup.prompts.prompts[prompt]} for prompt in prompts]

    folder = config.output / "pairs"
    make_pairs(folder, header, wanted, make)
    return Pairs(folder, header, wanted.count)


def _sampler(
    model: WanTransformer,
    setup: Setup,
    pattern: tuple[int, ...],
    train: LoopConfig,
    negative: Tensor | None = None,
    context: ContextConfig = CLEAN,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As ``generate`` samples the finished folder: in few steps, or, with a negative prompt, as the teacher's ODE."""
    many, scale = setup.schedule.grid(setup.defaults.num_steps), setup.defaults.guidance_scale

    def sample(text: Tensor, noise: Tensor, keys: Tensor) -> Tensor:
        with half_precision(setup.device, train.precision == "bf16"):
            if negative is not None:
                return sample_chunks(model, Guidance(text, negative[None].to(text), scale), noise, many, pattern)
            guidance = Guidance(text, text[:0], 1.0)
            return sample_chunks(
                model, guidance, noise, setup.grid, pattern, lambda k: rng.normal(keys[k], setup.shape), context=context
            )

    return sample
