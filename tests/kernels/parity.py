"""Comparing a Triton kernel with its reference: on a GPU as compiled, elsewhere in Triton's interpreter.

Inputs are random; outputs of ``torch.empty`` are NaN beforehand, so a kernel that leaves an element unwritten fails.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from reelforge.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding of the result: half a unit in the last place, and a little for the order of fp32 sums.
ROUNDING = {torch.float32: 4e-6, torch.float16: 2**-11 * 1.05, torch.bfloat16: 2**-8 * 1.05}


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, device=DEVICE, dtype=dtype)


@contextmanager
def triton(op: str, implementation: str = "triton") -> Iterator[None]:
    """Run ``op`` by its kernel, with NaN in every buffer it allocates."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with dispatch.pinned(op, implementation):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def every_op(implementation: str) -> Iterator[None]:
    """Run every op that has ``implementation`` by it; attention's gradient needs a library's."""
    dispatch.load()
    with ExitStack() as stack:
        for op, names in dispatch.implementations().items():
            if implementation in names and not (op == "attention" and torch.is_grad_enabled()):
                stack.enter_context(dispatch.pinned(op, implementation))
        yield


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values in fp64, with gradients where the originals have them."""
    return [
        None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors
    ]


def assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Within rounding to ``dtype``: relative to the element, or to the tensor's RMS for small elements."""
    assert torch.isfinite(actual).all(), "an element is not finite, or was never written"
    bound = ROUNDING[dtype] * slack
    scale = exact.abs().maximum(exact.square().mean().sqrt())
    worst = ((actual.double() - exact) / scale).abs().max().item()
    assert worst <= bound, f"worst relative error {worst:.2e}, bound {bound:.2e}"


def check_gradients(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    slack: float = 1.0,
) -> None:
    """Values and gradients of ``op(*tensors)`` against the reference in fp64 on the same values."""
    exact_tensors = double(tensors)
    results, exact_results = (
        _tuple(function(*given)) for function, given in ((op, tensors), (reference, exact_tensors))
    )
    for result, exact in zip(results, exact_results, strict=True):
        assert_close(result, exact, result.dtype, slack)
    upstream = [randn(100 + i, *result.shape, dtype=result.dtype) for i, result in enumerate(results)]
    torch.autograd.backward(results, upstream)
    torch.autograd.backward(exact_results, [gradient.double() for gradient in upstream])
    for tensor, exact in zip(tensors, exact_tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            assert_close(tensor.grad, exact.grad, tensor.dtype, slack)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result
