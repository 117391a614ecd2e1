"""The CUDA library: its formulas compiled on the host against the reference's bits, its build, and its absence."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import parity
import pytest
import torch
from torch import Tensor

import reelforge.kernels
from reelforge.bench import sass
from reelforge.kernels import dispatch, philox, sde_step
from reelforge.kernels.backends import sm90
from reelforge.kernels.errors import KernelError

CSRC = Path(__file__).parents[2] / "csrc"
KEYS = torch.tensor([0, 1, 2**31, 2**32 - 1, 0x0123_4567_89AB_CDEF, 2**63 - 1])
COUNT = 40_000
SHIM = """
#include "sde_formula.cuh"
extern "C" void normals(int64_t key, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = reelforge::normals(key, i / 4).value[i % 4];
}
extern "C" void pairs(const uint32_t* first, const uint32_t* second, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) reelforge::box_muller(first[i], second[i], out[2 * i], out[2 * i + 1]);
}
extern "C" void fork(const float* x, const float* v, const float* u, float w, float a, float b, float std, int64_t key,
                     int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = reelforge::step(reelforge::step_mean(a, x[i], b, reelforge::guide(u[i], v[i], w)), std,
                             reelforge::normals(key, i / 4).value[i % 4]);
}
"""


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The headers as plain C++, with nothing contracted."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("host")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", CSRC]
    subprocess.run([compiler, *flags, folder / "shim.cpp", "-o", folder / "shim.so"], check=True)
    return ctypes.CDLL(str(folder / "shim.so"))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = sm90.library()
    if isinstance(found, str) and "not built" in found:
        pytest.skip(found)
    assert not isinstance(found, str), found
    return found


def test_normals_have_the_references_bits(host: ctypes.CDLL) -> None:
    drawn = torch.empty(len(KEYS), COUNT)
    for key, row in zip(KEYS.tolist(), drawn, strict=True):
        host.normals(ctypes.c_int64(key), ctypes.c_int64(COUNT), pointer(row))
    assert torch.equal(drawn, philox.reference(KEYS, COUNT))


def test_extreme_words_have_the_references_bits(host: ctypes.CDLL) -> None:
    words = [0, 1, 213, 2**23, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 213, 2**32 - 1]
    near = torch.arange(2**31 - 200_000, 2**31 + 200_000)
    grid = torch.cartesian_prod(torch.tensor(words), torch.tensor(words))
    first, second = (torch.cat((grid[:, side], near, torch.arange(200_000))).to(torch.int32) for side in (0, 1))
    drawn = torch.empty(len(first), 2)
    host.pairs(pointer(first), pointer(second), ctypes.c_int64(len(first)), pointer(drawn))
    assert torch.equal(drawn.T, torch.stack(philox._turn(philox._radius(first), second)))


@pytest.mark.parametrize("std", [0.0, 0.45])
def test_the_step_has_the_references_bits(host: ctypes.CDLL, std: float) -> None:
    x, v, u = (parity.randn(seed, 1, COUNT).cpu() for seed in (0, 1, 2))
    a, b, deviation = (torch.tensor([value]) for value in (0.89, -0.0312, std))
    with dispatch.pinned("sde_step", "torch"):
        expected = sde_step.fork(x, v, a, b, deviation, KEYS[4:5], v_uncond=u, guidance_scale=4.7).x
    found = torch.empty(1, COUNT)
    numbers = (ctypes.c_float(float(value)) for value in (4.7, a, b, deviation))
    key, count = ctypes.c_int64(int(KEYS[4])), ctypes.c_int64(COUNT)
    host.fork(pointer(x), pointer(v), pointer(u), *numbers, key, count, pointer(found))
    assert torch.equal(found, expected)


def test_the_hash_of_the_sources_is_up_to_date() -> None:
    sources = sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cuh"))
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    digest = hashlib.sha256(digests.encode()).hexdigest()[:16]
    assert digest == sm90.SOURCES, f'csrc/ changed: set SOURCES = "{digest}" in kernels/backends/sm90.py, install again'


def test_kernels_neither_spill_nor_contract(library: ctypes.CDLL) -> None:
    """Each of the two roots unrolls to at most four fused operations; a contracted polynomial would have dozens."""
    paths = [path for root in reelforge.kernels.__path__ for path in Path(root).glob("lib/libreelforge_sm90a.so")]
    kernels = {name: code for name, code in sass.read(paths[0]).items() if "fork_kernel" in name}
    assert len(kernels) == 6
    for name, code in kernels.items():
        assert code.stack == 0 and not {"LDL", "STL"} & code.counts.keys(), name
        assert code.registers <= 40, name
    listing = subprocess.run([sass._cuobjdump(), "-sass", paths[0]], capture_output=True, text=True, check=True).stdout
    fused = [body.count(" FFMA") for body in listing.split("Function :")[1:]]
    assert max(fused) <= 8, fused


def test_the_library_refuses_sizes_it_cannot_launch(library: ctypes.CDLL) -> None:
    nothing = [None] * 10
    assert library.reelforge_sde_fork(*nothing, 1.0, 0, 0, 0, 0, None) == 0
    for sizes in ((-1, 1, 1, 0), (2**31, 1, 1, 0), (4, 65536, 1, 0), (4, 1, -1, 0), (4, 1, 1, 3)):
        assert library.reelforge_sde_fork(*nothing, 1.0, *sizes, None) == 1, "cudaErrorInvalidValue"
    odd = [ctypes.c_void_p(16), ctypes.c_void_p(17), *[None] * 8]
    assert library.reelforge_sde_fork(*odd, 1.0, 4, 1, 1, 1, None) == 716, "cudaErrorMisalignedAddress"


@pytest.mark.skipif(sm90.unfit(dispatch.Query("cuda", torch.float32)) is not None, reason="no Hopper or no library")
@pytest.mark.parametrize("count", [1, 1027, 4096])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_every_implementation_gives_the_same_bits(count: int, dtype: torch.dtype, offset: int) -> None:
    """On a GPU: CUDA, Triton and torch there, and torch on the CPU."""
    x = parity.randn(0, 2 * count + offset)[offset:].view(2, count)
    velocity, v_uncond = (parity.randn(seed, 2, count, dtype=dtype) for seed in (1, 2))
    coefficients = [parity.randn(seed, 2) for seed in (3, 4, 5)]
    groups = KEYS.cuda(), torch.tensor([0, 2, 6], dtype=torch.int32, device="cuda")
    operands, options = (x, velocity, *coefficients, *groups), {"guidance_scale": 4.7, "keep_velocity": True}
    expected = sde_step.fork(*(t.cpu() for t in operands), v_uncond=v_uncond.cpu(), **options)
    for implementation in ("cuda", "triton", "torch"):
        with parity.triton("sde_step", implementation):
            found = sde_step.fork(*operands, v_uncond=v_uncond, **options)
        for actual, wanted in zip(found, expected, strict=True):
            assert torch.equal(actual.cpu(), wanted), implementation


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A package without a library; its folder, to put one in."""
    monkeypatch.setattr(reelforge.kernels, "__path__", [str(tmp_path)])
    sm90.library.cache_clear()
    (tmp_path / "lib").mkdir()
    yield tmp_path / "lib" / "libreelforge_sm90a.so"
    sm90.library.cache_clear()


def test_an_absent_library_is_a_reason(absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "hardware_class", lambda: "9.0")
    assert sm90.unfit(dispatch.Query("cuda", torch.float32)) == (
        "the CUDA library was not built: install with nvcc 12.3 or newer on PATH"
    )
    with pytest.raises(KernelError, match="was not built"):
        _fork(torch.zeros(1, 8), torch.zeros(1, 8))


def test_a_library_that_does_not_load_is_a_reason(absent: Path) -> None:
    absent.write_bytes(b"no library")
    assert "does not load" in str(sm90.library())


def test_a_library_of_other_sources_is_a_reason(absent: Path, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" const char* reelforge_sources() { return "0123456789abcdef"; }')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", absent], check=True)
    assert sm90.library() == "the CUDA library was built from other sources: install again"


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (dispatch.Query("cuda", torch.float32, grad=True), "it records no gradient"),
        (dispatch.Query("cuda", torch.float64), "torch.float64 is not torch.float32"),
        (dispatch.Query("cpu", torch.float32), "it needs a CUDA device, not cpu"),
    ],
)
def test_what_it_does_not_serve(query: dispatch.Query, reason: str) -> None:
    assert sm90.unfit(query) == reason


def test_other_hardware_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "hardware_class", lambda: "10.0")
    reason = sm90.unfit(dispatch.Query("cuda", torch.float32))
    assert reason == "it is compiled for compute capability 9.0, not 10.0"


def _fork(x: Tensor, velocity: Tensor, v_uncond: Tensor | None = None, a: Tensor | None = None) -> None:
    one = torch.ones(1)
    a = one if a is None else a
    sm90.sde_fork(x, velocity, v_uncond, a, one, one, None, None, torch.empty_like(x), None, 1.0, 8, 1)


def test_operands_it_cannot_read_are_named() -> None:
    x = torch.zeros(1, 8)
    misaligned = torch.frombuffer(bytearray(65), dtype=torch.float32, offset=1, count=8).view(1, 8)
    cases = [
        ((x, x.T.expand(8, 8).T), "velocity has strides"),
        ((x, misaligned), "must be aligned to 4 bytes"),
        ((x, x.double()), "velocities are torch.float64"),
        ((x, x.half(), x.bfloat16()), "velocities are torch"),
        ((x, x, None, torch.ones(1).expand(2)), "a has strides"),
    ]
    for operands, message in cases:
        with pytest.raises(KernelError, match=message):
            _fork(*operands)
