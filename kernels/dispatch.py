"""Which implementation of an op runs, and why.

An op's module registers its implementations, best first; ``torch``, the reference, fits everywhere and is always the
last. A choice depends on a :class:`Query` alone (device, dtype, sizes), never on a tensor's values, and is made once
per query. An implementation is passed over when it does not fit, and also when it is unproven: its present source has
never passed its accuracy test on hardware of this class. ``bench/records/proven.json`` lists what has.

:func:`pin` forces an implementation, proven or not; one that does not fit is then an error. Under :func:`strict`
passing over an implementation that was expected is an error too, so that a benchmark cannot measure a fallback.
"""

import ast
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import reelforge.kernels
from reelforge.kernels.errors import KernelError

REFERENCE = "torch"


class Query(NamedTuple):
    """All that a choice may depend on.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of the main operand.
        head_dim: D of attention; 0 elsewhere.
        grad: a backward pass may follow.
    """

    device: str
    dtype: torch.dtype
    head_dim: int = 0
    grad: bool = False

    @classmethod
    def of(cls, *tensors: Tensor, head_dim: int = 0) -> "Query":
        """The query of a call: device and dtype of the first tensor, gradients of any."""
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return cls(tensors[0].device.type, tensors[0].dtype, head_dim, grad)


# Dtypes of the main operand of ops that never get bf16: states, noise and averages are fp32 in every run.
_USUAL = {
    **dict.fromkeys(("ema_lerp", "philox", "sde_step"), torch.float32),
    **dict.fromkeys(("fp8_attention", "fp8_linear"), torch.float8_e4m3fn),
}


Unfit = Callable[[Query], str | None]  # why an implementation cannot serve a query; None when it can


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: ``"triton"``, ``"cuda"``, ``"cudnn"`` ...
        unfit: why it cannot serve a query.
        source: hash of the code that was proven; empty for other people's libraries, which need no proof of ours.
    """

    name: str
    unfit: Unfit
    source: str


@dataclass(frozen=True)
class Choice:
    """What runs for a query, and why each better-ranked implementation does not.

    Attributes:
        passed_over: (implementation, reason).
        fallback: a kernel of ours is among them; a library that is not installed was never expected.
    """

    op: str
    query: Query
    name: str
    passed_over: tuple[tuple[str, str], ...] = ()
    fallback: bool = False

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return f"{self.name}" + (f" ({reasons})" if reasons else "")


_registry: dict[str, list[Implementation]] = {}
_pins: dict[str, str] = {}
_choices: dict[tuple[str, Query], Choice] = {}
_expected: list[bool] = []


def register(op: str, name: str, unfit: Unfit, module: ModuleType | None = None) -> None:
    """Add an implementation behind those already registered.

    Args:
        op: the op's name, its module's.
        name: of the implementation.
        unfit: why it cannot serve a query.
        module: whose source must have been proven on the hardware; None for a library's own kernel.
    """
    source = source_hash(module) if module is not None else ""
    _registry.setdefault(op, []).append(Implementation(name, unfit, source))


def source_hash(module: ModuleType) -> str:
    """Hash of a kernel's code and of the kernel modules it imports; comments and docstrings leave it as it is."""
    seen: dict[str, Any] = {}
    _collect(module, seen)
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _collect(module: ModuleType, seen: dict[str, Any]) -> None:
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    seen[module.__name__] = _plain(tree)
    for value in vars(module).values():
        value = getattr(value, "fn", value)  # a Triton kernel's function: an interpreted one hides its module
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        imported = name.startswith("reelforge.kernels.") and name not in (__name__, KernelError.__module__)
        if imported and name not in seen:
            _collect(sys.modules[name], seen)


def _plain(node: Any) -> Any:
    """A syntax tree as lists, the same from every Python: ``ast.dump`` differs between 3.11, 3.12 and 3.13."""
    if isinstance(node, list):
        return [_plain(child) for child in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    return [type(node).__name__, *([k, _plain(v)] for k, v in ast.iter_fields(node) if v not in (None, []))]


def choose(op: str, query: Query) -> str:
    """Name of the implementation that serves ``query``; compiled code keeps the one it was traced with.

    Raises:
        KernelError: the pinned one does not fit, or under :func:`strict` a kernel of ours was passed over.
    """
    return _chosen(op, *query)


@torch.compiler.assume_constant_result
def _chosen(op: str, device: str, dtype: torch.dtype, head_dim: int, grad: bool) -> str:
    query = Query(device, dtype, head_dim, grad)
    choice = _choices.get((op, query))
    if choice is None:
        choice = _choices[op, query] = _decide(op, query)
    if _expected and choice.fallback and op not in _pins:
        raise KernelError(f"{op} would fall back to {choice}.", "Pin an implementation to measure that one.")
    return choice.name


def _decide(op: str, query: Query) -> Choice:
    names = [implementation.name for implementation in _registry[op]] + [REFERENCE]
    pinned = _pins.get(op)
    passed_over: list[tuple[str, str]] = []
    fallback = False
    for implementation in _registry[op]:
        if pinned is not None and implementation.name != pinned:
            continue
        reason = implementation.unfit(query) or (_unproven(op, implementation, query) if pinned is None else None)
        if reason is None:
            return Choice(op, query, implementation.name, tuple(passed_over), fallback)
        if pinned is not None:
            raise KernelError(f"{op} is pinned to {pinned}, which does not fit: {reason}.", f"Choose of {names}.")
        passed_over.append((implementation.name, reason))
        fallback |= bool(implementation.source)
    return Choice(op, query, REFERENCE, tuple(passed_over), fallback)


def pin(op: str, name: str | None) -> None:
    """Run ``op`` by implementation ``name`` from now on; None lets capability decide again.

    Raises:
        KernelError: no such op or implementation.
    """
    if op not in _registry:
        raise KernelError(f"There is no op {op!r}.", f"Choose of {sorted(_registry)}.")
    names = [implementation.name for implementation in _registry[op]] + [REFERENCE]
    if name is not None and name not in names:
        raise KernelError(f"{op} has no implementation {name!r}.", f"Choose of {names}.")
    if name is None:
        _pins.pop(op, None)
    else:
        _pins[op] = name
    _choices.clear()


def pins() -> tuple[tuple[str, str], ...]:
    """What is forced now, (op, implementation)."""
    return tuple(sorted(_pins.items()))


@contextmanager
def pinned(op: str, name: str) -> Iterator[None]:
    """:func:`pin` for a while."""
    before = _pins.get(op)
    pin(op, name)
    try:
        yield
    finally:
        pin(op, before)


@contextmanager
def strict() -> Iterator[None]:
    """Inside, a fallback that nobody pinned is an error."""
    _expected.append(True)
    try:
        yield
    finally:
        _expected.pop()


def load() -> None:
    """Import every op's module, so that the registry is whole."""
    for module in pkgutil.iter_modules(reelforge.kernels.__path__):
        importlib.import_module(f"reelforge.kernels.{module.name}")


def registered() -> dict[str, tuple[Implementation, ...]]:
    """What each op's module registered, best first."""
    return {op: tuple(found) for op, found in _registry.items()}


def implementations() -> dict[str, list[str]]:
    """Every op with its implementations, best first."""
    return {op: [implementation.name for implementation in found] + [REFERENCE] for op, found in _registry.items()}


def explain(device: str, head_dim: int = 128) -> list[Choice]:
    """What would serve each op on ``device`` in the dtype it usually gets, and why."""
    return [_decide(op, _usual(op, device, head_dim)) for op in sorted(_registry)]


def usable(op: str, device: str, head_dim: int = 128) -> list[str]:
    """The implementations of ``op`` that fit ``device`` in the dtype it usually gets, proven or not, best first."""
    query = _usual(op, device, head_dim)
    return [implementation.name for implementation in _registry[op] if implementation.unfit(query) is None]


def _usual(op: str, device: str, head_dim: int) -> Query:
    return Query(device, _USUAL.get(op, torch.bfloat16), head_dim)


# -- what implementations check -------------------------------------------------------------------------------------


@cache
def hardware_class() -> str:
    """Compute capability of the CUDA device, such as ``"9.0"``; empty without one."""
    if not torch.cuda.is_available():
        return ""
    return "{}.{}".format(*torch.cuda.get_device_capability())


def interpreted() -> bool:
    """Whether Triton interprets kernels (TRITON_INTERPRET=1), which also runs them on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def needs_triton(*dtypes: torch.dtype) -> Unfit:
    """An :data:`Unfit` for our own Triton kernels on these dtypes."""

    def unfit(query: Query) -> str | None:
        if query.dtype not in dtypes:
            return f"{query.dtype} is not one of {', '.join(map(str, dtypes))}"
        if query.device != "cuda":
            return None if interpreted() else f"it needs a CUDA device, not {query.device}"
        if hardware_class() and float(hardware_class()) < 8.0:
            return f"compute capability {hardware_class()} is below 8.0"
        return None

    return unfit


def _unproven(op: str, implementation: Implementation, query: Query) -> str | None:
    if not implementation.source:
        return None
    if query.device != "cuda":
        return "the interpreter is for tests"
    known = proven().get(f"{op}/{implementation.name}", {}).get(hardware_class())
    if known is None:
        return f"unproven on compute capability {hardware_class() or 'unknown'}"
    return None if known == implementation.source else "its source changed since it was proven"


def proven_path() -> Path | None:
    """The table of proven kernels, in a checkout or an installed package."""
    paths = (Path(root) / "bench/records/proven.json" for root in reelforge.__path__)
    return next((path for path in paths if path.exists()), None)


@cache
def proven() -> dict[str, dict[str, str]]:
    """``op/implementation`` to the source hash that passed on each hardware class."""
    path = proven_path()
    return json.loads(path.read_text(encoding="utf-8")) if path is not None else {}


def forget() -> None:
    """Read the table of proven kernels again, and choose anew; compiled code keeps its choices."""
    proven.cache_clear()
    _choices.clear()
