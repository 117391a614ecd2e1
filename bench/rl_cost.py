"""What an iteration of isotemporal GRPO costs by arithmetic: evaluations, FLOPs, waiting ranks, memory.

G samples of a prompt take T sampler steps, the k-th of them stochastic, k uniform among the first K; they start from
M initial noises and are one state until step k when M is 1. A prompt's evaluations, each C network rows (2 under
guidance):

    rollout    M (k + 1) + G (T - 1 - k)
    training   M forwards and backwards when collapsed, G otherwise

A row's forward is the unit; a trained row costs 4: forward, the forward recomputed by checkpointing, a backward of 2.
Decoding and scoring are nobody's to share and come on top. A forward is, for L tokens of width E, S text tokens and
an FFN of F, per layer

    12 L E^2 + 4 L E F + 4 L^2 E + 4 L S E + 4 S E^2

of which the last, keys and values of the text, is spared where they are projected once for all steps.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import nn

from reelforge.bench import wan_cost
from reelforge.bench.cases.case import MODELS, Shape
from reelforge.engine.core.config import require_positive
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.lora import LoraConfig
from reelforge.engine.model.wan import WanTransformer

TRAINED, TRAINED_KEEPING = 4.0, 3.0  # forwards that a trained row costs; the latter without checkpointing
_FRAME_STRIDE, _TOKEN_SIDE = 4, 16  # frames to latent frames, pixels to tokens: strides of Wan's VAE and the patch
# Bytes that the backward of one block keeps of each token, as (of E, of F, constant): counted with saved-tensor hooks,
# torch's implementations, for fp32 weights under bf16 autocast and for a bf16 network with LoRA on every linear.
_BLOCK_BYTES = {False: (78.0625, 4.0, 1060.0), True: (42.0625, 4.0, 1060.0)}
_LORA_BYTES = 16  # more of each token and rank
_BOUNDARY_TENSORS = 2  # what a checkpointed block keeps: the residual stream and its normed twin, [L, E] each


@dataclass(frozen=True)
class Calls:
    """Seconds (or any unit) of the calls that an iteration is made of.

    Attributes:
        call: of a sampling forward, whatever its rows.
        state: of each state in it.
        decision: the stochastic step's forward of one state, on the training path.
        train: forward and backward of one state.
    """

    call: float
    state: float
    decision: float
    train: float

    def sample(self, states: int) -> float:
        """A sampling forward."""
        return self.call + states * self.state


def units(branches: int = 2, trained: float = TRAINED) -> Calls:
    """In forwards of a network row."""
    return Calls(0.0, branches, branches, trained * branches)


@dataclass(frozen=True)
class Layout:
    """How a group's samples are laid out.

    Attributes:
        group_size: G.
        num_steps: T.
        choices: K, how many first steps may be the stochastic one.
        distinct_noise: M; G shares nothing.
        collapsed: one training forward a state, not one a sample.
        trained_steps: forwards and backwards of each sample; above 1 where every step is stochastic.
    """

    group_size: int = 8
    num_steps: int = 20
    choices: int = 10
    distinct_noise: int = 1
    collapsed: bool = True
    trained_steps: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "group_size", "num_steps", "choices")
        if self.choices > self.num_steps:
            raise ConfigError(
                f"choices is {self.choices}, there are {self.num_steps} steps.", "Only a step can be stochastic."
            )

    def states(self, k: int) -> list[int]:
        """How many states take each step."""
        return [self.distinct_noise] * (k + 1) + [self.group_size] * (self.num_steps - 1 - k)

    def evaluations(self, k: int) -> int:
        """Velocities of a rollout."""
        return sum(self.states(k))

    @property
    def trained(self) -> int:
        """Forwards and backwards."""
        return (self.distinct_noise if self.collapsed else self.group_size) * self.trained_steps

    @property
    def mean_evaluations(self) -> float:
        """Over k."""
        return sum(map(self.evaluations, range(self.choices))) / self.choices

    def rollout(self, k: int, calls: Calls, batch: int | None = None) -> float:
        """Of a group, in the unit of ``calls``; ``batch`` states a sampling forward at most, None is all of them."""
        states = self.states(k)
        sampled = sum(calls.sample(part) for n in states[:k] + states[k + 1 :] for part in _parts(n, batch or n))
        return sampled + states[k] * calls.decision

    def training(self, calls: Calls) -> float:
        """Of a group."""
        return self.trained * calls.train

    def mean(self, calls: Calls) -> float:
        """Of a group's rollout and training, over k."""
        return sum(self.rollout(k, calls) for k in range(self.choices)) / self.choices + self.training(calls)


def _parts(count: int, batch: int) -> list[int]:
    return [min(batch, count - start) for start in range(0, count, batch)]


def independent(layout: Layout) -> Layout:
    """The same with a noise of its own and a training forward for every sample: Flash-GRPO as coded."""
    return replace(layout, distinct_noise=layout.group_size, collapsed=False)


def saving(layout: Layout) -> float:
    """Share of the independent rollout's evaluations that sharing saves; (K + 1)(G - 1) / (2 G T) for M = 1."""
    return 1 - layout.mean_evaluations / independent(layout).mean_evaluations


# -- ranks that wait for each other ------------------------------------------------------------------------------------


def slowest(layout: Layout, ranks: int, groups: int, paired: bool) -> float:
    """Expected evaluations of the busiest of ``ranks`` over the mean rank's, with ``groups`` whole groups each.

    Args:
        layout: of a group.
        ranks: that wait for each other.
        groups: of each; an even number when ``paired``.
        paired: groups come in pairs with steps k and K - 1 - k; otherwise every k is drawn alone.
    """
    assert not (paired and groups % 2), "a pair is two groups"
    each = [layout.evaluations(k) for k in range(layout.choices)]
    drawn = [one + other for one, other in zip(each, reversed(each), strict=True)] if paired else each
    totals = {0: 1.0}
    for _ in range(groups // 2 if paired else groups):
        totals = _sum(totals, drawn)
    values = sorted(totals)
    below = list(itertools.accumulate(totals[value] for value in values))
    shares = [now**ranks - before**ranks for before, now in itertools.pairwise([0.0, *below])]
    expected = sum(value * share for value, share in zip(values, shares, strict=True))
    return expected / (groups * layout.mean_evaluations)


def _sum(totals: Mapping[int, float], drawn: Sequence[int]) -> dict[int, float]:
    """Distribution of a total plus one uniform draw."""
    found: dict[int, float] = {}
    for total, share in totals.items():
        for value in drawn:
            found[total + value] = found.get(total + value, 0.0) + share / len(drawn)
    return found


# -- FLOPs of a forward ------------------------------------------------------------------------------------------------


def shape(model: str, frames: int, height: int, width: int) -> Shape:
    """A model at a clip's size."""
    tokens = ((frames - 1) // _FRAME_STRIDE + 1) * (height // _TOKEN_SIDE) * (width // _TOKEN_SIDE)
    return Shape(model, *MODELS[model], tokens)


def forward_flops(
    size: Shape, layers: int, text_tokens: int = wan_cost.TEXT_TOKENS, *, text_cached: bool = False
) -> float:
    """FLOPs of one row; :func:`wan_cost.block_flops` is that of a block whose text is projected already."""
    text = 0.0 if text_cached else 4.0 * text_tokens * size.width**2
    return layers * (wan_cost.block_flops(size, size.tokens, text_tokens).block + text)


def attention_share(size: Shape, layers: int) -> float:
    """Of a forward's FLOPs, those of self-attention."""
    attention = wan_cost.block_flops(size, size.tokens).self_attention
    return layers * attention / forward_flops(size, layers)


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a training process.

    Attributes:
        weights: of the network: bf16 under a LoRA adapter, fp32 without.
        learnt: gradients, both Adam moments and the average of what trains, and an adapter's own weights, all fp32.
        boundaries: what checkpointed blocks keep.
        block: what the backward of one block keeps.
    """

    weights: float
    learnt: float
    boundaries: float
    block: float

    @property
    def total(self) -> float:
        return self.weights + self.learnt + self.boundaries + self.block


def memory(size: Shape, layers: int, rows: int, lora: LoraConfig | None) -> Memory:
    """Of a training forward and backward of ``rows`` network rows with every block checkpointed."""
    parameters = parameter_count(size, layers)
    of_width, of_ffn, constant = _BLOCK_BYTES[lora is not None]
    token = of_width * size.width + of_ffn * size.ffn_dim + constant + (_LORA_BYTES * lora.rank if lora else 0)
    return Memory(
        weights=(2 if lora else 4) * parameters,
        learnt=20 * lora_count(size, layers, lora) if lora else 16 * parameters,
        boundaries=float(_BOUNDARY_TENSORS * (2 if lora else 4) * layers * rows * size.tokens * size.width),
        block=token * rows * size.tokens,
    )


def parameter_count(size: Shape, layers: int) -> int:
    """Of the whole network."""
    return sum(parameter.numel() for parameter in _skeleton(size, layers).parameters())


def lora_count(size: Shape, layers: int, lora: LoraConfig) -> int:
    """Of an adapter: rank (in + out) of each adapted linear."""
    linears = (
        module
        for name, module in _skeleton(size, layers).named_modules()
        if isinstance(module, nn.Linear) and lora.matches(name)
    )
    return lora.rank * sum(linear.in_features + linear.out_features for linear in linears)


@cache
def _skeleton(size: Shape, layers: int) -> WanTransformer:
    """The network without values."""
    return WanTransformer.from_config(transformer_config(size, layers), device="meta")


def transformer_config(size: Shape, layers: int) -> dict[str, int]:
    """Keys of diffusers' ``transformer/config.json``."""
    return {
        "num_attention_heads": size.heads,
        "attention_head_dim": size.width // size.heads,
        "in_channels": 16,
        "out_channels": 16,
        "ffn_dim": size.ffn_dim,
        "num_layers": layers,
    }
