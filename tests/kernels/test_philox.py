"""Noise: Philox against published vectors, the transform against fp64, and the same bits from torch and Triton."""

import subprocess
import sys

import numpy as np
import parity
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from reelforge.kernels import philox
from reelforge.kernels.errors import KernelError

VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KEYS = torch.tensor([0, 1, 2**31, 2**32 - 1, 0x0123_4567_89AB_CDEF, 2**63 - 1], device=parity.DEVICE)
EXTREMES = [0, 1, 213, 2**23, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 213, 2**32 - 1]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)


def exact(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Box-Muller in fp64 of the uniform, which is exact in fp32, and of the angle's 31 bits."""
    u = philox.uniform(first).clamp_min(1e-7).double().numpy()
    bits = second.numpy().astype(np.int64)
    angle = 2 * np.pi * np.where(bits < 0, ~bits, bits) * 2.0**-31
    return np.sqrt(-2 * np.log(u)) * np.stack((np.cos(angle), np.sin(angle)))


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_random123_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = (torch.tensor([word]) for word in words(key))
    out = philox.philox(tuple(torch.tensor([word]) for word in words(counter)), low, high)
    assert [int(word) for word in out] == words(expected)


def python_philox(counter: int, key: int) -> list[int]:
    """Salmon et al. 2011, with Python's unbounded integers."""
    c0, c1, c2, c3 = counter, 0, 0, 0
    for i in range(10):
        k0, k1 = (key + i * 0x9E3779B9) % 2**32, ((key >> 32) + i * 0xBB67AE85) % 2**32
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
    return [c0, c1, c2, c3]


def test_elements_are_the_words_of_their_counters() -> None:
    for row, key in enumerate(KEYS.tolist()):
        found = [word[row].tolist() for word in philox.words(KEYS.cpu(), 9)]
        assert [[word % 2**32 for word in counter] for counter in zip(*found, strict=True)] == [
            python_philox(counter, key) for counter in range(3)
        ]


def test_within_a_millionth_of_the_exact_transform() -> None:
    w0, w1, w2, w3 = philox.words(KEYS.cpu(), 2_000_000)
    drawn = philox.reference(KEYS.cpu(), 2_000_000).view(len(KEYS), -1, 4).double().numpy()
    for place, pair in ((0, (w0, w1)), (2, (w2, w3))):
        error = np.abs(exact(*pair) - drawn[..., place : place + 2].transpose(2, 0, 1))
        assert error.max() < 1e-6
        assert np.sqrt((error**2).mean()) < 2**-23  # a unit in the last place of 1


def test_every_radius_is_close_and_finite() -> None:
    """A sweep over the clamp, the largest and the smallest uniforms, and both ends of each binade's mantissas."""
    near_one = 2**31 - 1 - torch.arange(2**20)
    powers = torch.cat([2**p + torch.arange(-300, 300) for p in range(10, 31)])
    middles = torch.cat([int(2**p * 2**-0.5) + torch.arange(-300, 300) for p in range(12, 32)])
    bits = torch.cat((torch.arange(2**20), near_one, powers, middles)).to(torch.int32)
    radius = philox._radius(bits).double().numpy()
    error = np.abs(radius - np.sqrt(-2 * np.log(philox.uniform(bits).clamp_min(1e-7).double().numpy())))
    assert error.max() < 6e-7
    assert radius.min() > 0
    assert radius.max() == pytest.approx(5.6777, abs=1e-4)


@pytest.mark.parametrize("turn", EXTREMES)
def test_extreme_words(turn: int) -> None:
    first, second = signed(EXTREMES), signed([turn] * len(EXTREMES))
    found = torch.stack(philox._turn(philox._radius(first), second)).double().numpy()
    np.testing.assert_allclose(found, exact(first, second), rtol=0, atol=1e-6)


def test_the_root_is_correctly_rounded() -> None:
    """torch's own fp32 root on a CPU is not; the one through fp64 is."""
    values = philox.uniform(philox.words(KEYS.cpu(), 100_000)[0]) * 33
    np.testing.assert_array_equal(values.double().sqrt().float(), np.sqrt(values.numpy()))


def test_normals_are_normal_also_in_the_tails() -> None:
    sample = philox.reference(KEYS[4:5].cpu(), 4_000_000)[0].double().numpy()
    assert stats.kstest(sample[:400_000], "norm").pvalue > 1e-3
    n = len(sample)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs((sample**power).mean() - moment) < 4 * np.sqrt(variance / n)
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * n * stats.norm.sf(bound)
        assert abs((np.abs(sample) > bound).sum() - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize("count", [1, 3, 4, 1001, 1024, 2051])
def test_triton_gives_the_same_bits(count: int) -> None:
    with parity.triton("philox"):
        drawn = philox.normal(KEYS[:3], count)
    assert torch.equal(drawn.cpu(), philox.reference(KEYS[:3].cpu(), count))


@triton.jit
def _extremes_kernel(first_ptr, second_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    n0, n1 = philox._box_muller(tl.load(first_ptr + place), tl.load(second_ptr + place))
    tl.store(out_ptr + place, n0)
    tl.store(out_ptr + BLOCK + place, n1)


def test_triton_gives_the_same_bits_for_extreme_words() -> None:
    pairs = [(first, second) for first in EXTREMES for second in EXTREMES]
    first, second = (signed([pair[side] for pair in pairs] + [0] * (256 - len(pairs))) for side in (0, 1))
    out = torch.empty(2, 256, device=parity.DEVICE)
    _extremes_kernel[(1,)](first.to(parity.DEVICE), second.to(parity.DEVICE), out, BLOCK=256, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), torch.stack(philox._turn(philox._radius(first), second)))


@triton.jit
def _randn_kernel(out_ptr, seed, BLOCK: tl.constexpr):
    counter = tl.arange(0, BLOCK)
    n0, n1, n2, n3 = tl.randn4x(seed, counter)
    tl.store(out_ptr + 4 * counter, n0)
    tl.store(out_ptr + 4 * counter + 1, n1)
    tl.store(out_ptr + 4 * counter + 2, n2)
    tl.store(out_ptr + 4 * counter + 3, n3)


def test_layout_and_values_are_tritons_up_to_rounding() -> None:
    out = torch.empty(4096, device=parity.DEVICE)
    _randn_kernel[(1,)](out, 0x0123_4567_89AB_CDEF, BLOCK=1024)
    torch.testing.assert_close(out, philox.reference(KEYS[4:5], 4096)[0], rtol=0, atol=3e-6)


def test_custom_op_is_registered_right() -> None:
    torch.library.opcheck(philox._op, (KEYS[:2], 9))


@pytest.mark.parametrize(
    ("keys", "count", "message"),
    [
        (torch.zeros(2), 4, "keys are torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), 4, r"keys are torch.int64 \(2, 2\)"),
        (torch.zeros(4, dtype=torch.int64)[::2], 4, "contiguous"),
        (torch.zeros(2, dtype=torch.int64), 2**30 + 1, "1073741825 elements"),
    ],
)
def test_what_cannot_be_drawn_is_named(keys: torch.Tensor, count: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        philox.normal(keys, count)


FUSED = """
import subprocess, tempfile, triton
from reelforge.bench import sass
from reelforge.bench.cases import sde
from reelforge.bench.launches import TARGET, launches
for launch in {launch.key: launch for case in sde.CASES[2::2] for launch in launches(case)}.values():
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=TARGET, options=launch.options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([sass._cuobjdump(), "-sass", file.name], capture_output=True, text=True).stdout
    print(launch.name, listing.count(" FMUL "), listing.count(" FFMA "))
"""


def test_compiled_kernels_contract_nothing() -> None:
    """Two correctly rounded roots take seven fused operations; contracted polynomials would take dozens."""
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", FUSED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    counted = [line.split() for line in done.stdout.splitlines()]
    assert len(counted) >= 6, done.stderr
    assert max(int(multiplied) for _, multiplied, _ in counted) > 50
    assert all(int(fused) <= 7 for _, _, fused in counted), done.stdout
