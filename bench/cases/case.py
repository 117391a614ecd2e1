"""A benchmark case: one op at one size, with its inputs, its reference, its peers and what it must cost.

The same cases serve three purposes: rates and accuracy on a GPU, the compile gate without one (which runs ``run`` on
fake CUDA tensors and compiles every kernel launch it sees), and a smoke test in miniature on the CPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Operands = tuple[Tensor | None, ...]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """A model's block at one length.

    Attributes:
        name: ``"1.3B"`` or ``"14B"``.
        width: E.
        heads: N, of 128 dimensions each.
        ffn_dim: F.
        tokens: L, query tokens of one forward.
    """

    name: str
    width: int
    heads: int
    ffn_dim: int
    tokens: int


MODELS = {"1.3B": (1536, 12, 8960), "14B": (5120, 40, 13824)}
TOKENS = (32760, 4680, 1560)  # 21 latent frames of 480 x 832, a chunk of three, one frame
SHAPES = [Shape(name, *sizes, tokens) for name, sizes in MODELS.items() for tokens in TOKENS]


@dataclass(frozen=True)
class Work:
    """What a case has to do at least; ``bench.cost`` turns it into a time.

    Attributes:
        bytes: every input read once and every output written once.
        flops: of the tensor cores, multiply and add counted apart.
        exponentials: of the special-function unit.
        dtype: the tensor cores' operand type.
    """

    bytes: float
    flops: float = 0.0
    exponentials: float = 0.0
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Draw:
    """Makes a case's inputs: random normal, so that power and clocks are those of real data.

    Attributes:
        device: where.
        generator: of the values; None on fake devices.
    """

    device: torch.device
    generator: torch.Generator | None

    def __call__(
        self,
        *shape: int,
        dtype: torch.dtype = torch.bfloat16,
        scale: float = 1.0,
        mean: float = 0.0,
        grad: bool = False,
    ) -> Tensor:
        """Normal values with standard deviation ``scale`` around ``mean``."""
        values = torch.randn(shape, dtype=torch.float32, device=self.device, generator=self.generator)
        return (values * scale + mean).to(dtype).requires_grad_(grad)


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: its name in ``kernels.dispatch``.
        label: what tells it from the op's other cases: model, tokens, variant.
        inputs: makes the operands; those that require a gradient get one when ``backward``.
        run: the public op on those operands.
        reference: the same in plain torch, any floating dtype.
        work: the least it must do.
        tolerance: relative L2 error against the reference in fp64 that still passes.
        backward: time and check forward and backward instead of the forward alone.
        peers: other people's way to the same result, by name.
        exact: the reference in fp64 on a part of the output, for sizes where all of it would take too long:
            given the operands and the op's outputs, returns (outputs' part, exact part).
    """

    op: str
    label: str
    inputs: Callable[[Draw], Operands]
    run: Op
    reference: Op
    work: Work
    tolerance: float = 4e-3
    backward: bool = False
    peers: Mapping[str, Op] = field(default_factory=dict)
    exact: Callable[[Operands, tuple[Tensor, ...]], tuple[Tensor, Tensor]] | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}" + (" backward" if self.backward else "")
