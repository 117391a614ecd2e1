"""The arms of a case: implementations of ours and of libraries behind the op, plain torch, compiled torch, peers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from triton.errors import TritonError

from reelforge.bench import machine
from reelforge.bench.cases.case import Case, Op
from reelforge.bench.records import OURS
from reelforge.kernels import dispatch
from reelforge.kernels.errors import ReelforgeError

# What an arm may fail with and the next one still runs. Anything else ends the process, and its case is recorded so.
FAILURES = (
    RuntimeError,  # CUDA, out of memory, torch.compile
    TritonError,
    ReelforgeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)
EAGER, COMPILED = "eager", "compiled"
COMPILE_MODE = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Arm:
    """One way to run a case.

    Attributes:
        name: as records name it.
        impl: what ran, as ``kernels.dispatch`` names it; a peer's own name.
        op: takes the case's operands.
        ours: a kernel of this repository.
        pins: ops and implementations to pin while it runs; then a fallback is an error.
        graph: short calls may be timed in a CUDA graph; chains that may touch the host are not captured, because a
            capture that fails leaves torch's random generator unusable.
    """

    name: str
    impl: str
    op: Op
    ours: bool = False
    pins: tuple[tuple[str, str], ...] = ()
    graph: bool = True

    @contextmanager
    def active(self, grad: bool) -> Iterator[None]:
        """The state in which its op is called: pinned, no fallback, with or without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for pin in self.pins:
                stack.enter_context(dispatch.pinned(*pin))
            if self.pins:
                stack.enter_context(dispatch.strict())
            yield


def kernel_arms(case: Case) -> list[Arm]:
    """Every implementation behind the op but the reference; ``ours`` is the best of ours that this machine can run."""
    names = [name for name in dispatch.implementations().get(case.op, []) if name != dispatch.REFERENCE]
    usable = dispatch.usable(case.op, "cuda" if torch.cuda.is_available() else "cpu") if names else []
    own = [name for name in names if f"{case.op}/{name}" in machine.sources()]
    own.sort(key=lambda name: name not in usable)
    arms = [
        Arm(OURS if index == 0 else f"{OURS}/{name}", name, case.run, ours=True, pins=((case.op, name),))
        for index, name in enumerate(own)
    ]
    return arms + [Arm(name, name, case.run, pins=((case.op, name),)) for name in names if name not in own]


def peer_arms(case: Case, *, compiled: bool) -> list[Arm]:
    """Plain torch, that compiled where ``compiled``, and the case's own peers.

    A case with an ``exact`` part has a reference that is too slow to be an arm.
    """
    arms = [Arm(name, name, op, graph=False) for name, op in case.peers.items()]
    if case.exact is None:
        arms.append(Arm(EAGER, dispatch.REFERENCE, case.reference, graph=False))
        arms += [Arm(COMPILED, COMPILED, compile_op(case.reference))] if compiled else []
    return arms


def compile_op(op: Callable) -> Callable:
    """``op`` by torch.compile for fixed shapes; it compiles at its first call."""
    return torch.compile(op, mode=COMPILE_MODE, dynamic=False)
