"""FLOPs of a self-forcing cycle by arithmetic.

A chunk of M tokens that sees V, its own included, costs per layer of width E and FFN width F, with S text tokens,

    12 M E^2 + 4 M E F + 4 M V E + 4 M S E                 and 4 S E^2 where it projects its text itself

    rollout    exit step + 1 such forwards a chunk, one more to write its keys and values but for the last; text once
    replay     one forward and backward a chunk, which projects its text
    teacher    a forward of all frames, two under guidance
    critic     one forward of all frames for its score; one forward and backward to train it

A forward and backward is 4 forwards under checkpointing, 3 without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from reelforge.bench import rl_cost, wan_cost
from reelforge.bench.cases.case import Shape


@dataclass(frozen=True)
class Network:
    """A model at a clip's size.

    Attributes:
        size: at the tokens of all frames.
        layers: blocks.
        checkpointed: its backward computes the forward again.
    """

    size: Shape
    layers: int
    checkpointed: bool = False

    @property
    def trained(self) -> float:
        """Forwards that a forward and backward costs."""
        return rl_cost.TRAINED if self.checkpointed else rl_cost.TRAINED_KEEPING


@dataclass(frozen=True)
class Layout:
    """A clip and how it is decoded.

    Attributes:
        pattern: latent frames of each chunk.
        frame_tokens: of a latent frame.
        text_tokens: S.
        batch: clips.
    """

    pattern: tuple[int, ...]
    frame_tokens: int
    text_tokens: int = wan_cost.TEXT_TOKENS
    batch: int = 1

    def chunks(self, network: Network) -> list[float]:
        """A forward of each chunk against the ones before it, text projected already."""
        forwards = []
        for frames, seen in zip(self.pattern, accumulate(self.pattern), strict=True):
            part = replace(network.size, tokens=frames * self.frame_tokens)
            block = wan_cost.block_flops(part, seen * self.frame_tokens, self.text_tokens).block
            forwards.append(self.batch * network.layers * block)
        return forwards

    def text(self, network: Network) -> float:
        """Keys and values of the text."""
        return self.batch * network.layers * 4.0 * self.text_tokens * network.size.width**2

    def whole(self, network: Network) -> float:
        """A forward of all frames at once."""
        return self.batch * rl_cost.forward_flops(network.size, network.layers, self.text_tokens)

    def rollout(self, student: Network, exits: Sequence[int]) -> float:
        """Of every chunk to its exit step."""
        chunks = self.chunks(student)
        steps = sum((step + 1) * flops for step, flops in zip(exits, chunks, strict=True))
        return steps + sum(chunks[:-1]) + self.text(student)

    def replays(self, student: Network) -> list[float]:
        """Of each chunk."""
        return [student.trained * (flops + self.text(student)) for flops in self.chunks(student)]

    def extra(self, student: Network, exits: Sequence[int]) -> float:
        """Rollout and replays over the joint graph of all chunks, which runs no exit step twice."""
        replayed = self.rollout(student, exits) + sum(self.replays(student))
        return replayed / (replayed - sum(self.chunks(student)))

    def critic_step(self, critic: Network) -> float:
        """Without the rollout that it learns from."""
        return critic.trained * self.whole(critic)

    def pairs(self, teacher: Network, steps: int, branches: int) -> float:
        """Trajectories of so many solver steps."""
        return steps * branches * self.whole(teacher)
