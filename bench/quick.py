"""Miniature runs: they show that everything works from end to end, and no speed.

On a CPU the kernels run in Triton's interpreter, whose casts to bf16 truncate, so inputs are fp32 there.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from reelforge.bench.cases import case
from reelforge.bench.cases.case import Case, Draw, Shape
from reelforge.bench.records import MIN_ROUNDS
from reelforge.bench.session import Session

MODELS = {"1.3B": (256, 2, 512), "14B": (384, 3, 640)}
TOKENS = (12, 8, 4)  # three, two and one latent frames of four tokens
_MAX_BYTES, _MAX_FLOPS = 1 << 21, 1 << 28  # of a case that the interpreter gets through in seconds


class WideDraw(Draw):
    """bf16 inputs as fp32."""

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16, **options: float) -> Tensor:
        exact = torch.float32 if dtype == torch.bfloat16 else dtype
        return super().__call__(*shape, dtype=exact, **options)  # type: ignore[arg-type]


def shrink() -> None:
    """Put miniature sizes in place of the models'; the families of cases must not have been imported yet."""
    case.MODELS, case.TOKENS = MODELS, TOKENS
    case.SHAPES = [Shape(name, *sizes, tokens) for name, sizes in MODELS.items() for tokens in TOKENS]


def session(found: Session) -> Session:
    """Few rounds, and inputs that the interpreter computes right."""
    draw = Draw if found.device.type == "cuda" else WideDraw
    return replace(found, rounds=MIN_ROUNDS, draw=draw)


def small(found: Case) -> bool:
    """Whether the interpreter gets through the case in seconds."""
    return found.work.bytes <= _MAX_BYTES and found.work.flops <= _MAX_FLOPS


def smallest(cases: Iterable[Case]) -> list[Case]:
    """Of each op, forward and backward apart, the case that moves least."""
    found: dict[tuple[str, bool], Case] = {}
    for each in sorted(cases, key=lambda each: each.work.bytes):
        found.setdefault((each.op, each.backward), each)
    return list(found.values())
