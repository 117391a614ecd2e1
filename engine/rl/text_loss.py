"""The policy-gradient loss of a language model, token by token.

    L = 1 / N  sum over counted answers, sum over their tokens of  [ -min(r A, clip(r) A) + beta k3 ]

r = pi / pi_old of a token, A the advantage of its whole answer, N the tokens of the optimizer step on all ranks, so
that a token of a long answer weighs what one of a short answer does (DAPO, Yu et al. 2025). k3 = exp(d) - d - 1 with
d = log pi_ref - log pi estimates KL(pi || pi_ref) without bias and is never negative (Schulman 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError


@dataclass(frozen=True)
class TextLossConfig:
    """The objective.

    Attributes:
        clip_low, clip_high: ratios are clipped to [1 - clip_low, 1 + clip_high]; more room upwards keeps rare words
            alive. Without effect at one update a rollout.
        kl: beta, the pull towards the model that training started from; a small model drifts fast without.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.005

    def __post_init__(self) -> None:
        require_positive(self, "clip_low", "clip_high")
        if self.kl < 0:
            raise ConfigError(f"loss.kl is {self.kl}.", "It must be 0 (none) or more.")


def text_loss(
    logp: Tensor, logp_old: Tensor, logp_reference: Tensor, advantages: Tensor, tokens: Tensor, config: TextLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of the loss; divide it by N.

    Args:
        logp: of the answers' tokens, with gradient, ``[B, C]``.
        logp_old: under the policy that wrote them.
        logp_reference: under the model that training started from.
        advantages: of each answer, ``[B]``.
        tokens: which tokens count, bool ``[B, C]``.

    Returns:
        The sum, and sums over the same tokens of ``ratio``, ``kl_reference`` (k3), ``clipped_low``, ``clipped_high``.
    """
    ratio = torch.where(tokens, logp - logp_old, 0.0).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    distance = torch.where(tokens, logp_reference - logp, 0.0)
    k3 = distance.exp() - distance - 1
    bound = (clipped * advantages[:, None] < ratio * advantages[:, None]) & tokens
    sums = {
        "ratio": ratio[tokens].sum(),
        "kl_reference": k3[tokens].sum(),
        "clipped_low": (bound & (ratio < 1)).sum(),
        "clipped_high": (bound & (ratio > 1)).sum(),
    }
    return (config.kl * k3 - gain)[tokens].sum(), {name: value.detach().double() for name, value in sums.items()}
