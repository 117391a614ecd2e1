"""Attention: every implementation that fits this machine against the formula, which one is chosen, what is refused."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import parity
import pytest
import torch
from torch import Tensor

from reelforge.kernels import attention as op
from reelforge.kernels import dispatch
from reelforge.kernels.errors import KernelError

NAMES = dispatch.implementations()["attention"]
LENGTHS = [(1, 1), (5, 63), (65, 1), (64, 65), (130, 130)]  # the last takes torch's own attention on the CPU too


def operands(lengths: tuple[int, int], head_dim: int, dtype: torch.dtype, grad: bool = False) -> tuple[Tensor, ...]:
    queries, keys = lengths
    return tuple(
        parity.randn(seed, 2, n, 2, head_dim, dtype=dtype, grad=grad) for seed, n in enumerate((queries, keys, keys))
    )


def slack(name: str, dtype: torch.dtype) -> float:
    """Room for rounding the probabilities; libraries round more in 16 bits: on the CPU scores too (9.6 was seen)."""
    return 3.0 if dtype == torch.float32 or name in ("triton", dispatch.REFERENCE) else 12.0


def fits(name: str, head_dim: int, dtype: torch.dtype, grad: bool) -> bool:
    query = dispatch.Query(parity.DEVICE, dtype, head_dim, grad)
    try:
        with dispatch.pinned("attention", name):
            return dispatch.choose("attention", query) == name
    except KernelError:
        return False


FITTING = [
    (name, head_dim, dtype, grad)
    for name in NAMES
    for head_dim in (12, 64, 128)
    for dtype in parity.DTYPES
    for grad in (False, True)
    if fits(name, head_dim, dtype, grad)
]


@pytest.mark.parametrize(("name", "head_dim", "dtype", "grad"), FITTING, ids=str)
def test_implementations_against_fp64(name: str, head_dim: int, dtype: torch.dtype, grad: bool) -> None:
    for lengths in LENGTHS:
        tensors = operands(lengths, head_dim, dtype, grad)
        with parity.triton("attention", name):
            if grad and lengths[1] > 1:  # gradients of the only key and its queries are exactly 0
                parity.check_gradients(op.attention, op.reference, tensors, slack=slack(name, dtype))
            else:
                exact = op.reference(*parity.double(tensors))
                parity.assert_close(op.attention(*tensors), exact, dtype, slack(name, dtype))


@pytest.mark.parametrize("name", [name for name in NAMES if fits(name, 64, torch.bfloat16, False)])
def test_implementations_read_views_of_a_cache(name: str) -> None:
    q, k, v = operands((65, 130), 64, torch.bfloat16)
    buffers = torch.full((2, 2, 300, 2, 64), torch.nan, dtype=q.dtype, device=q.device)
    buffers[0][:, 77:207], buffers[1][:, 77:207] = k, v
    with parity.triton("attention", name):
        out = op.attention(q, buffers[0][:, 77:207], buffers[1][:, 77:207])
        assert torch.equal(out, op.attention(q, k, v))


def test_the_reference_by_rows_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands((65, 30), 12, torch.float64)
    whole = op.reference(*tensors)
    monkeypatch.setattr(op, "_REFERENCE_SCORES", 7 * 30)
    torch.testing.assert_close(op.reference(*tensors), whole, rtol=1e-13, atol=1e-14)


def test_autocast_rounds_the_operands_that_its_other_ops_would() -> None:
    q, k, v = operands((5, 7), 12, torch.float32)
    with torch.autocast(parity.DEVICE, torch.bfloat16):
        mixed = op.attention(q.bfloat16(), k, v)
        assert mixed.dtype == torch.bfloat16
        assert torch.equal(mixed, op.attention(q, k, v))
        assert op.attention(q.double(), k.double(), v.double()).dtype == torch.float64


# -- what is chosen, and why ----------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch believes in an H200 with cuDNN 9.19 and without flash-attn."""
    monkeypatch.setattr(dispatch, "hardware_class", lambda: "9.0")
    monkeypatch.setattr(dispatch, "proven", dict)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(op, "_package", lambda name: f"No module named '{name}'")


def choice(query: dispatch.Query) -> dispatch.Choice:
    return dispatch._decide("attention", query)


def test_a_hopper_runs_cudnn_unless_flash_attention_3_imports(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    query = dispatch.Query("cuda", torch.bfloat16, 128)
    assert str(choice(query)) == "cudnn (not flash_attn_3: it does not import: No module named 'flash_attn_3')"
    monkeypatch.setattr(op, "_package", lambda name: ModuleType(name))
    assert choice(query).name == "flash_attn_3"


@pytest.mark.parametrize(
    ("query", "reasons"),
    [
        (
            dispatch.Query("cuda", torch.float32, 128),
            {"cudnn": "torch.float32 is not torch.bfloat16 or torch.float16", "triton": "unproven on .* 9.0"},
        ),
        (
            dispatch.Query("cuda", torch.bfloat16, 300, True),
            {"cudnn": "head_dim 300 is not a multiple of 8 up to 128", "triton": "head_dim 300 is above 256"},
        ),
        (
            dispatch.Query("cuda", torch.bfloat16, 160, True),
            {"cudnn": "up to 128", "triton": "it has no backward pass"},
        ),
        (dispatch.Query("cpu", torch.bfloat16, 128), {"flash_attn_3": "it needs a CUDA device, not cpu"}),
    ],
)
def test_others_run_torchs_attention(query: dispatch.Query, reasons: dict[str, str], hopper: None) -> None:
    found = choice(query)
    assert found.name == "sdpa"
    for name, reason in reasons.items():
        assert re.search(reason, dict(found.passed_over)[name])


@pytest.mark.parametrize("capability", ["7.5", "10.0"])
def test_flash_attention_3_is_for_hopper(capability: str, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_package", lambda name: ModuleType(name))
    monkeypatch.setattr(dispatch, "hardware_class", lambda: capability)
    found = choice(dispatch.Query("cuda", torch.bfloat16, 128))
    assert f"compute capability {capability} is not within 9.0 to 9.0" in dict(found.passed_over)["flash_attn_3"]
    assert found.name == ("sdpa" if capability == "7.5" else "cudnn")


# -- adapters to other people's kernels -----------------------------------------------------------------------------


class FlashAttention(ModuleType):
    """In the place of a flash-attn package: checks how it is CALLED, and computes the reference. Not the library."""

    def __init__(self, name: str, returns_lse: bool) -> None:
        super().__init__(name)
        self.returns_lse, self.strides, self.deterministic = returns_lse, (), False

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape, "[B, L, N, D] each"
        self.strides, self.deterministic = k.stride(), deterministic
        out = op.reference(q, k, v)
        return (out, out[..., 0].transpose(1, 2)) if self.returns_lse else out


ADAPTERS = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}


@pytest.fixture
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapters are imported anew, before and after."""

    def forget() -> None:
        op._package.cache_clear()
        for name in ADAPTERS:
            sys.modules.pop(f"reelforge.kernels.backends.{name}", None)

    forget()
    yield
    forget()


@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize(("name", "package"), ADAPTERS.items())
def test_adapters_call_their_package(
    name: str, package: str, returns_lse: bool, fresh_imports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FlashAttention(package, returns_lse and name == "flash_attn_3")
    monkeypatch.setitem(sys.modules, package, module)
    q, k, v = operands((5, 7), 16, torch.float32, grad=True)
    out = op._RUN[name](q, k[:, 2:], v[:, 2:])
    parity.assert_close(out, op.reference(q.double(), k[:, 2:].double(), v[:, 2:].double()), torch.float32)
    assert out.requires_grad and module.strides == k.stride() and not module.deterministic


@pytest.mark.parametrize(("name", "package"), ADAPTERS.items())
def test_a_package_that_fails_to_load_is_passed_over(
    name: str, package: str, fresh_imports: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"{package}.py").write_text('raise OSError("libcudart.so.12: cannot open\\nsecond line")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(dispatch, "hardware_class", lambda: "9.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    passed_over = dict(choice(dispatch.Query("cuda", torch.bfloat16, 128)).passed_over)
    assert passed_over[name] == "it does not import: libcudart.so.12: cannot open"
    assert passed_over["cudnn"] == "cuDNN 9 is needed, found None"


def meta(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().to("meta").requires_grad_(tensor.requires_grad) for tensor in tensors)


@pytest.mark.parametrize("keys", [1, 130])
@pytest.mark.parametrize("grad", [False, True])
def test_cudnn_is_called_in_place_and_differentiably(keys: int, grad: bool) -> None:
    """On meta tensors: shapes, strides and the autograd graph are torch's, as on a GPU; no kernel runs."""
    q, k, v = meta(*operands((65, 200), 64, torch.bfloat16, grad))
    out = op._cudnn(q, k[:, 40 : 40 + keys], v[:, 40 : 40 + keys])
    assert out.shape == q.shape and out.dtype == q.dtype and out.requires_grad == grad
    if grad:
        out.backward(torch.empty_like(out))
        assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape
    if keys > 1:
        assert out.is_contiguous()


@pytest.mark.parametrize("name", ["cudnn", *ADAPTERS])
@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.flatten()[4:-12].as_strided((2, 6, 2, 16), k.stride()),
        lambda k: k.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["off 16 bytes", "D strided"],
)
def test_libraries_get_aligned_rows_only(name: str, change: Callable[[Tensor], Tensor]) -> None:
    q, k, v = meta(*operands((5, 7), 16, torch.bfloat16))
    message = (
        rf"k starts at element \d+ of its storage with strides .* {name} takes D contiguous .* pin attention to sdpa"
    )
    with pytest.raises(KernelError, match=message):
        op._RUN[name](q, change(k), v)


def test_cudnn_has_no_deterministic_backward() -> None:
    tensors = meta(*operands((5, 7), 16, torch.bfloat16, grad=True))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(KernelError, match="no deterministic backward"):
            op._cudnn(*tensors)
        with torch.no_grad():
            op._cudnn(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q \(5, 2, 16\), k \(2, 7, 2, 16\).* It takes q \[B, Lq, N, D\]"),
        (lambda q, k, v: (q, k, v[:, :6]), r"v \(2, 6, 2, 16\)"),
        (lambda q, k, v: (q, k[:1], v[:1]), r"k \(1, 7, 2, 16\)"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), r"k \(2, 7, 2, 8\)"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "Lk >= 1"),
        (lambda q, k, v: (q, k.half(), v), "q, k, v of torch.float32 on .*, torch.float16 on .* must agree"),
        (lambda q, k, v: (q, k, v.to("meta")), "torch.float32 on meta"),
    ],
)
@pytest.mark.parametrize("name", ["sdpa", "torch", "triton"])
def test_operands_that_do_not_match_are_named(name: str, change: object, message: str) -> None:
    tensors = change(*operands((5, 7), 16, torch.float32))
    with dispatch.pinned("attention", name), pytest.raises(KernelError, match=message):
        op.attention(*tensors)


def test_a_pin_that_does_not_fit_is_an_error() -> None:
    tensors = operands((5, 7), 16, torch.float32)
    with dispatch.pinned("attention", "cudnn"), pytest.raises(KernelError, match="pinned to cudnn, which does not fit"):
        op.attention(*tensors)
