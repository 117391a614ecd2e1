"""An iteration of the rewriter's GRPO on a screen of four numbers, and its gradient by hand.

The language model, filming and scoring are real; a "video" is four numbers drawn from its prompt, request and noise.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tiny_enhance import REQUESTS, SAME, dialogue_of
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.enhance.completions import Completion, token_logp
from reelforge.engine.enhance.language_model import LanguageModel
from reelforge.engine.enhance.structure import Structure, StructureConfig
from reelforge.engine.model.generator import Job
from reelforge.engine.rewards.contract import Scores
from reelforge.engine.rewards.scoring import Scoring, ScoringConfig
from reelforge.engine.rl.advantage import Fusion, FusionConfig
from reelforge.engine.rl.filming import Filming, Take
from reelforge.engine.rl.rewriting import STRUCTURE, RewritingConfig, RewritingTask
from reelforge.engine.rl.text_loss import TextLossConfig
from reelforge.engine.train.loop import LoopConfig

GROUP, BATCH, SEED = 3, 2, 2
LOSS = TextLossConfig(clip_low=0.2, clip_high=0.28, kl=0.03)
CUT = ("never ends", False)  # an answer's text, and whether its end mark came


def well_formed(prompt: str) -> tuple[str, bool]:
    return f"so</think> <answer>{prompt}</answer>", True


class Screen:
    """Stands in the generator's place.

    Attributes:
        unscored: prompts whose videos no scorer can score.
        even: all videos are alike.
    """

    def __init__(self, unscored: Sequence[str] = (), even: bool = False) -> None:
        self.config = SimpleNamespace(batch_size=4)
        self.unscored, self.even = unscored, even

    def fits(self, prompt: str) -> bool:
        return len(prompt.split()) < 100

    def latents(self, jobs: Sequence[Job]) -> Tensor:
        """``[B, 4, 1, 1, 1]``; the last number tells who has no score."""
        keys = [rng.key("video:" + job.prompt, job.prompt_id, job.member) for job in jobs]
        found = rng.normal(keys, (4,)) * (not self.even)
        found[:, 3] = torch.tensor([float(job.prompt in self.unscored) for job in jobs])
        return found.view(-1, 4, 1, 1, 1)


class Judge:
    """The first number, and ten times the second and then some."""

    axes = ("vq", "ta")

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Scores]:
        flat = videos.flatten(1)
        return {"vq": Scores.of(flat[:, 0], flat[:, 3] == 0), "ta": Scores.of(10 * flat[:, 1] + 50)}


class Watched(Filming):
    """Remembers its takes, call by call, and their rewards."""

    def __call__(self, takes: Sequence[Take]) -> Tensor:
        found = super().__call__(takes)
        self.calls = [*getattr(self, "calls", []), list(takes)]
        self.known = getattr(self, "known", {}) | dict(zip(takes, found.T.tolist(), strict=True))
        return found


def make_task(
    folder: Path,
    screen: Screen | None = None,
    updates: int = 1,
    rows: int = 4,
    batch: int = BATCH,
    requests: Sequence[str] = REQUESTS,
    fusion: FusionConfig | None = None,
    missing_limit: float = 1.0,
    moved: float = 0.02,
    kl: float = LOSS.kl,
    **config: object,
) -> RewritingTask:
    """A task whose policy has already moved from its reference."""
    language = LanguageModel.load(folder)
    scoring = Scoring([Judge()], lambda latents: latents, ScoringConfig(missing_limit=missing_limit))
    same = tuple(map(tuple, SAME))
    task = RewritingTask(
        language, dialogue_of(language), Structure(StructureConfig((6, 12), (2, 24), same=same)),
        Watched(screen or Screen(), scoring), Fusion(fusion or FusionConfig(), (*scoring.axes, STRUCTURE)), requests,
        RewritingConfig(**({"group_size": GROUP} | config)), dataclasses.replace(LOSS, kl=kl), updates,
        LoopConfig(batch_size=batch, micro_batch_size=rows, precision="fp32", seed=SEED),
    )  # fmt: skip
    shake(task, moved)
    return task


def shake(task: RewritingTask, size: float, seed: int = 0) -> None:
    """Other weights."""
    for name, weight in task.language.model.named_parameters():
        weight.data += size * rng.normal([rng.key(name, seed)], weight.shape)[0]


def plant(task: RewritingTask, script: dict[str, list[tuple[str, bool]]]) -> None:
    """Answers from a script, by request and member, as if they had been drawn; other requests' are drawn."""
    real, language = task.write, task.language

    def write(asked: Sequence[tuple[str, int]]) -> list[Completion]:
        found, places = real(asked), dict.fromkeys(script, 0)
        for number, (request, _) in enumerate(asked):
            if request in script:
                text, ended = script[request][places[request]]
                places[request] += 1
                ids = [*task.dialogue.encode(text), *language.ends[:ended]]
                with torch.no_grad():
                    logp, _ = token_logp(
                        language.model, [task.dialogue.ask(request)], [ids], language.pad, task.config.temperature
                    )
                found[number] = Completion(tuple(ids), logp[0], ended)
        return found

    task.write = write


def chosen_requests(task: RewritingTask, iteration: int = 0) -> list[str]:
    """Of each slot."""
    size = task.train.batch_size
    places = rng.in_epochs("requests", SEED, len(task.requests), range(iteration * size, (iteration + 1) * size))
    return [task.requests[place] for place in places]


def written(task: RewritingTask) -> list[list[Completion]]:
    """The answers of the next rollout, filled as it writes, a list a group."""
    groups, real = [], task.write

    def write(asked: Sequence[tuple[str, int]]) -> list[Completion]:
        found = real(asked)
        groups.extend(found[first : first + task.config.group_size] for first in range(0, len(found), GROUP))
        return found

    task.write = write
    return groups


def gradient_of(task: RewritingTask, step: int = 0) -> tuple[float, Tensor]:
    """Loss and gradient of one step of the task, in one process."""
    parameters, total, found = list(task.language.model.parameters()), 0.0, None
    for loss in task.losses(step):
        part = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        total, found = total + loss.item(), part if found is None else found + part
    assert found is not None
    return total, found


@dataclasses.dataclass
class Snapshot:
    """Policy and reference as they are now, in fp64."""

    policy: torch.nn.Module
    reference: torch.nn.Module

    @classmethod
    def of(cls, task: RewritingTask) -> "Snapshot":
        return cls(*(copy.deepcopy(model).double().requires_grad_() for model in (task.language.model, task.reference)))


def rewards_by_hand(task: RewritingTask, requests: list[str], groups: list[list[Completion]]) -> np.ndarray:
    """``[3, P, G + 1]``: what the screen showed of every member; NaN where the answer was cut."""
    table = np.full((3, len(requests), GROUP + 1), np.nan)
    noise = {take.request: take.noise for take in task.filming.calls[-1]}
    for row, (request, answers) in enumerate(zip(requests, groups, strict=True)):
        texts = [task.dialogue.read(answer.ids) for answer in answers]
        for place, text in enumerate([*texts, request]):
            if place < GROUP and not answers[place].finished:
                continue
            table[:2, row, place] = task.filming.known[Take(request, text or request, noise[request])]
            table[2, row, place] = task.structure(text or request, request, text is not None)
    return table


def advantages_by_hand(table: np.ndarray) -> np.ndarray:
    """``[P, G + 1]`` of the default fusion's first iteration; NaN where a member does not count."""
    there = ~np.isnan(table).any(0)
    there &= there.sum(1, keepdims=True) > 1
    kept = np.where(there, table, np.nan)
    alike = np.array([np.ptp(group[:, there[row]], axis=1).max(initial=0) == 0 if there[row].any() else True
                      for row, group in enumerate(table.transpose(1, 0, 2))])  # fmt: skip
    kept[:, alike] = np.nan
    centred = (
        kept
        - np.array([[np.nanmean(row) if np.isfinite(row).any() else 0 for row in axis] for axis in kept])[..., None]
    )
    scale = np.maximum(np.sqrt(np.nanmean(centred**2, axis=(1, 2), keepdims=True)), 1e-4)
    fused = (centred / scale).sum(0)
    return np.clip(fused / max(np.sqrt(np.nanmean(fused**2)), 1e-4), -5, 5)


def gradient_by_hand(
    task: RewritingTask,
    requests: list[str],
    groups: list[list[Completion]],
    advantages: np.ndarray,
    now: Snapshot,
    drawn: Snapshot | None = None,
) -> tuple[float, Tensor]:
    """In fp64, an answer at a time, unpadded, token by token.

    Args:
        advantages: ``[P, G + 1]``, NaN where a member does not count.
        now: the policy of the step.
        drawn: the policy that wrote, if that was another.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, request in enumerate(requests):
        asked = task.dialogue.ask(request)
        for place, answer in enumerate(groups[row]):
            a = advantages[row, place]
            if np.isnan(a):
                continue
            logp, reference, old = (
                _logp(model, asked, answer.ids, task.config.temperature)
                for model in (now.policy, now.reference, (drawn or now).policy)
            )
            for token in range(len(answer.ids)):
                ratio = (logp[token] - old[token].detach()).exp()
                gain = a * (ratio.clamp(max=1.28) if a > 0 else ratio.clamp(min=0.8))
                away = reference[token].detach() - logp[token]
                total = total - gain + LOSS.kl * (away.exp() - away - 1)
            count += len(answer.ids)
    loss = total / count
    parts = torch.autograd.grad(loss, list(now.policy.parameters()))
    return loss.item(), torch.cat([part.flatten() for part in parts])


def _logp(model: torch.nn.Module, asked: Sequence[int], answer: Sequence[int], temperature: float) -> Tensor:
    """Of each token of an answer."""
    logits = model(torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
