"""The kernel launches that a benchmark case makes, recorded without a GPU and without running anything.

A case runs on fake tensors, with its op pinned to Triton and each custom op's fake implementation replaced by its
real body, so the launchers that ship choose tiles, warps and grids. Triton's own ``JITFunction.run`` binds and
specialises the arguments for a driver that says ``sm_90a``; only the step that compiles is replaced, by a note. So a
launch is never declared twice, and the types, divisibilities and options are those of a real run.

The fakes live on the CPU: autograd in a CPU build of torch aborts on CUDA tensors, fake or not. What depends on the
device is the dispatch alone, which is told ``cuda``.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from reelforge.bench.cases.case import Case, Draw
from reelforge.kernels import dispatch

TARGET = GPUTarget("cuda", 90, 32)
_STORAGE = 1 << 20  # address of every fake storage: allocators align to 256 bytes and more


@dataclass(frozen=True)
class Launch:
    """One launch as Triton would compile it.

    Attributes:
        kernel: the jitted function.
        signature: types by parameter, ``constexpr`` among them.
        constants: values of the constexprs, by position.
        attributes: divisibility, by position.
        options: warps, stages and the rest.
        grid: of programs.
    """

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: Any
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel.module.removeprefix('reelforge.kernels.')}.{self.kernel.__name__}"

    @property
    def types(self) -> str:
        """Types of the arguments that are left at run time; ``/16`` marks what is known to be divisible by 16."""
        kinds = [(kind, self.attributes.get((place,))) for place, kind in enumerate(self.signature.values())]
        return " ".join(f"{kind}{'/16' if known else ''}" for kind, known in kinds if kind != "constexpr")

    @property
    def values(self) -> str:
        """The constexprs, declared ones and integers that equal 1."""
        names = list(self.signature)
        return " ".join(f"{names[place[0]]}={value}" for place, value in sorted(self.constants.items()))

    @property
    def switches(self) -> str:
        """Compiler options besides warps and stages that are not the default, such as ``enable_fp_fusion=False``."""
        usual, own = vars(make_backend(TARGET).parse_options({})), vars(self.options)
        changed = {name: own[name] for name in sorted(own) if own[name] != usual[name]}
        return " ".join(f"{name}={value}" for name, value in changed.items() if name not in ("num_warps", "num_stages"))

    @property
    def key(self) -> tuple:
        """Equal for launches that compile to the same code."""
        return self.kernel.module, self.kernel.__name__, self.types, self.values, str(self.options)


class _Driver:
    """As much of a GPU as binding arguments needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def launches(case: Case) -> list[Launch]:
    """What ``case`` launches, in order.

    Raises:
        KernelError: the op has no Triton implementation, or that one does not take the case.
    """
    mode = FakeTensorMode()
    mode.cache_enabled = False  # a cached result would skip the launcher
    with _recording() as found, mode, dispatch.pinned(case.op, "triton"), torch.set_grad_enabled(case.backward):
        operands = case.inputs(Draw(torch.device("cpu"), None))
        results = case.run(*operands)
        if case.backward:
            outputs = [results] if isinstance(results, Tensor) else [out for out in results if out.requires_grad]
            leaves = [tensor for tensor in operands if tensor is not None and tensor.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])
    return found


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    found: list[Launch] = []
    grids: list[tuple[int, ...]] = []
    original_run, choose = JITFunction.run, dispatch.choose

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        grids.append(grid({**dict(zip(self.arg_names, args, strict=False)), **kwargs}) if callable(grid) else grid)
        original_run(self, *args, grid=grid, warmup=True, **kwargs)

    def note(self: JITFunction, key: Any, signature: Any, device: int, constexprs: Any, options: Any,
             attrs: Any, warmup: bool) -> None:  # fmt: skip
        found.append(Launch(self, signature, constexprs, attrs, options, tuple(grids[-1])))

    def choose_for_cuda(op: str, query: dispatch.Query) -> str:
        return choose(op, query._replace(device="cuda"))

    driver.set_active(_Driver())
    replaced: list[tuple[Any, str, Callable]] = [
        (JITFunction, "run", run),
        (JITFunction, "_do_compile", note),
        (Autotuner, "run", _run_every_config),
        (FakeTensor, "data_ptr", lambda self: _STORAGE + self.storage_offset() * self.element_size()),
        (dispatch, "choose", choose_for_cuda),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        for name, op in OPDEFS.items():
            if name.startswith("reelforge::"):
                stack.enter_context(patch.object(op, "_abstract_fn", op._init_fn))
        yield found


def _run_every_config(self: Autotuner, *args: Any, **kwargs: Any) -> None:
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    for config in self.prune_configs(kwargs):
        self.fn.run(*args, **kwargs, **config.all_kwargs())
