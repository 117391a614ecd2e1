"""``reelforge bench sensitivity``: what e4m3 in each class of linears does to a model's videos.

The same prompts and noise are sampled in bf16, then with one class of linears in e4m3 at a time, then with the whole
policy, then with no block spared. Same-seed distance is not loss of quality: it says which class to look at first.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.bench.markdown import table
from reelforge.engine.core.distributed import pick_device
from reelforge.engine.core.files import replace_file
from reelforge.engine.core.progress import track
from reelforge.engine.model.folder import ModelFolder, load_generation_defaults
from reelforge.engine.model.generator import GenerateConfig, Generator, Job, resolve
from reelforge.engine.model.precision import Fp8Policy, fp8_copy
from reelforge.engine.rl.prompts import read_prompts

SEED = 0
_PEAK = 2.0  # of pixels in [-1, 1]


@dataclass(frozen=True)
class Distance:
    """From the bf16 model's videos.

    Attributes:
        rel_l2: of all latents.
        worst_psnr: dB, of the chunk furthest off.
        by_chunk: relative L2 of each chunk's latents; it grows where errors feed on each other.
    """

    rel_l2: float
    worst_psnr: float
    by_chunk: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    linears: int
    distance: Distance


def policies() -> Iterator[tuple[str, Fp8Policy]]:
    """Each class of linears alone, then all that the default policy names, then in every block."""
    whole = Fp8Policy()
    for name in whole.rows:
        yield f"{name}, rows", Fp8Policy((name,), ())
    for name in whole.groups:
        yield f"{name}, groups", Fp8Policy((), (name,))
    yield "the policy", whole
    yield "the policy, no block spared", dataclasses.replace(whole, spared=0)


def measure(folder: ModelFolder, config: GenerateConfig, prompts: Sequence[str]) -> list[Result]:
    """Every policy against bf16."""
    plain = _Clips.sample(folder, config, prompts)
    results = []
    for name, policy in track(list(policies()), "sensitivity", total=len(list(policies()))):
        twin = fp8_copy(folder.transformer, policy)
        changed = _Clips.sample(dataclasses.replace(folder, transformer=twin), config, prompts)
        linears = sum(sharing is not None for _, sharing in policy.table(folder.transformer))
        results.append(Result(name, linears, changed.distance(plain)))
    return results


@dataclass(frozen=True)
class _Clips:
    """Latents ``[B, C, T, H, W]`` and pixels ``[B, 3, F, height, width]``, and the latent frames of each chunk."""

    latents: Tensor
    pixels: Tensor
    pattern: tuple[int, ...]
    temporal_stride: int

    @classmethod
    def sample(cls, folder: ModelFolder, config: GenerateConfig, prompts: Sequence[str]) -> "_Clips":
        generator = Generator(folder, config, SEED)
        jobs = [Job(prompt, member) for prompt in prompts for member in range(config.samples)]
        batches = [jobs[start : start + config.batch_size] for start in range(0, len(jobs), config.batch_size)]
        latents = torch.cat([generator.latents(batch).float() for batch in batches])
        pixels = torch.cat([folder.codec.decode(part).float() for part in latents.split(config.batch_size)])
        return cls(latents, pixels, generator.pattern or (latents.shape[2],), folder.codec.temporal_stride)

    def distance(self, right: "_Clips") -> Distance:
        by_chunk, worst, first = [], math.inf, 0
        for frames in self.pattern:
            last = first + frames
            by_chunk.append(_rel_l2(self.latents[:, :, first:last], right.latents[:, :, first:last]))
            span = slice(*(max(0, 1 + self.temporal_stride * (at - 1)) for at in (first, last)))
            error = (self.pixels[:, :, span] - right.pixels[:, :, span]).square().mean().item()
            worst = min(worst, 10 * math.log10(_PEAK**2 / error) if error else math.inf)
            first = last
        return Distance(_rel_l2(self.latents, right.latents), worst, tuple(by_chunk))


def _rel_l2(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def text(results: Sequence[Result]) -> str:
    head = ("in e4m3", "linears", "latent rel. L2", "worst chunk, dB", "first chunk", "last chunk")
    rows = [
        (
            each.name, str(each.linears), f"{each.distance.rel_l2:.4f}", f"{each.distance.worst_psnr:.1f}",
            f"{each.distance.by_chunk[0]:.4f}", f"{each.distance.by_chunk[-1]:.4f}",
        )
        for each in results
    ]  # fmt: skip
    return table(head, rows)


def main(arguments: argparse.Namespace) -> int:
    config = resolve(load_generation_defaults(arguments.model), [*arguments.overrides, "precision=bf16"])
    device = pick_device(config.device)
    folder = ModelFolder.load(arguments.model, config.weights_dtype(device), device)
    prompts = read_prompts(arguments.prompts).prompts[: arguments.count]
    found = text(measure(folder, config, prompts)) + "\n"
    sys.stdout.write(found)
    if arguments.out is not None:
        replace_file(arguments.out, found)
    return 0
