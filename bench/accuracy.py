"""How far an arm's result is from the reference in fp64 on the same values, gradients included.

Every buffer that one of our kernels allocates holds NaN beforehand, so an element that was never written cannot pass;
and it runs twice, because a result that moves between runs is a race.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelforge.bench.cases.case import Case, Op, Operands
from reelforge.bench.records import Quality

Outputs = tuple[Tensor, ...]
_CHUNK = 1 << 24  # elements compared at a time: fp64 copies of a whole FFN tensor take gigabytes
_UPSTREAM_SEED = 1


@dataclass(frozen=True)
class Result:
    """What a call gave: its outputs, then the gradients of the operands that want one."""

    outputs: Outputs
    gradients: Outputs

    @property
    def tensors(self) -> Outputs:
        return self.outputs + self.gradients


def evaluate(op: Op, operands: Operands, backward: bool) -> Result:
    """One call on copies of the operands, which some ops write to."""
    copies = tuple(None if tensor is None else _copy(tensor, backward) for tensor in operands)
    with torch.set_grad_enabled(backward):
        outputs = _tuple(op(*copies))
    if not backward:
        return Result(outputs, ())
    wanted = [tensor for tensor in copies if tensor is not None and tensor.requires_grad]
    live = [output for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(live, wanted, upstream(live))
    return Result(tuple(output.detach() for output in outputs), gradients)


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to start the backward pass with: the same normal values at every call and for every dtype."""
    made = []
    for index, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(_UPSTREAM_SEED + index)
        values = torch.randn(output.shape, dtype=torch.float32, device=output.device, generator=generator)
        made.append(values.to(torch.bfloat16).to(output.dtype))
    return made


class Exact:
    """A case's exact result on given operands, computed once for all arms."""

    def __init__(self, case: Case, operands: Operands) -> None:
        self._case, self._operands = case, operands
        self._whole: Outputs | None = None
        if case.exact is None:
            wide = tuple(None if tensor is None else _double(tensor) for tensor in operands)
            self._whole = evaluate(case.reference, wide, case.backward).tensors

    def quality(self, op: Op, *, poisoned: bool = False) -> Quality:
        """Run ``op`` and compare.

        Args:
            op: the arm.
            poisoned: it is ours: NaN in its buffers, and a second run that must agree bit for bit.
        """
        if not poisoned:
            return self._compare(evaluate(op, self._operands, self._case.backward))
        with poison():
            result = evaluate(op, self._operands, self._case.backward)
            again = evaluate(op, self._operands, self._case.backward)
        stable = all(same_bits(*pair) for pair in zip(result.tensors, again.tensors, strict=True))
        del again
        return self._compare(result, stable)

    def _compare(self, result: Result, stable: bool = True) -> Quality:
        if self._whole is None:
            assert self._case.exact is not None, "without a whole exact result the case gives a part"
            part, exact = self._case.exact(self._operands, result.outputs)
            pairs = [(part, exact)]
            # The part is a sample of rows: NaN anywhere else has to fail too.
            stable = stable and all(bool(torch.isfinite(tensor).all()) for tensor in result.tensors)
        else:
            pairs = list(zip(result.tensors, self._whole, strict=True))
        found = [distance(actual, exact) for actual, exact in pairs]
        rel_l2, max_abs = (_worst([getattr(each, name) for each in found]) for name in ("rel_l2", "max_abs"))
        cosine = -_worst([-each.cosine for each in found])
        passed = stable and rel_l2 <= self._case.tolerance
        return Quality(rel_l2, self._case.tolerance, "pass" if passed else "fail", cosine, max_abs)


@dataclass(frozen=True)
class Distance:
    """Between a tensor and the exact one."""

    rel_l2: float
    cosine: float
    max_abs: float


def distance(actual: Tensor, exact: Tensor) -> Distance:
    """Relative L2 error, cosine and largest difference; NaN wherever an element is NaN."""
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} against {tuple(exact.shape)}"
    sums = torch.zeros(4, dtype=torch.float64, device=actual.device)
    largest = sums.new_zeros(())
    for a, e in zip(actual.reshape(-1).split(_CHUNK), exact.reshape(-1).split(_CHUNK), strict=True):
        a, e = a.double(), e.double()
        error = a - e
        sums += torch.stack(((error * error).sum(), (e * e).sum(), (a * a).sum(), (a * e).sum()))
        largest = torch.maximum(largest, error.abs().max())
    error2, exact2, actual2, product = sums.tolist()
    if not exact2:  # an exact zero
        return Distance(error2**0.5, 1.0 if not error2 else 0.0, largest.item())
    cosine = product / (exact2 * actual2) ** 0.5 if actual2 else 0.0
    return Distance((error2 / exact2) ** 0.5, cosine, largest.item())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


@contextmanager
def poison() -> Iterator[None]:
    """NaN in every buffer that ``torch.empty`` gives."""
    memory: Any = torch.utils.deterministic
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = fill


def step(op: Op, operands: Operands, backward: bool) -> Callable[[], object]:
    """A call to time: forward, or forward and backward from fixed gradients."""
    if not backward:
        return lambda: op(*operands)
    wanted = [tensor for tensor in operands if tensor is not None and tensor.requires_grad]
    given = upstream([output for output in _tuple(op(*operands)) if output.requires_grad])

    def run() -> object:
        live = [output for output in _tuple(op(*operands)) if output.requires_grad]
        return torch.autograd.grad(live, wanted, given)

    return run


def _copy(tensor: Tensor, backward: bool) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(tensor.requires_grad and backward)


def _double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _tuple(result: Tensor | Outputs) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _worst(values: list[float]) -> float:
    """The largest; NaN if any is."""
    return max(values, key=lambda value: (value != value, value))
